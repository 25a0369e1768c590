"""Hypothesis strategies for linear maps. Weights come from a drawn seed: generic, so that nothing cancels by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from updp_tf.affine import AffineConv

BIASES = ("zero", "generic")


@st.composite
def affine_maps(
    draw: st.DrawFn,
    *,
    c_in: int | None = None,
    kernel: int = 7,
    stride: int = 3,
    dilation: int = 3,
    padding: int = 4,
    biases: Sequence[str] = BIASES,
) -> AffineConv:
    """Maps of any kernel, stride, dilation and asymmetric padding up to the given numbers, and any groups."""
    if c_in is None:
        groups = draw(st.sampled_from([1, 2, 3, 4]), label="groups")
        c_in = groups * draw(st.integers(1, 3), label="c_in per group")
    else:
        groups = draw(st.sampled_from([n for n in range(1, c_in + 1) if c_in % n == 0]), label="groups")
    c_out = groups * draw(st.integers(1, 3), label="c_out per group")
    pair = lambda most: (draw(st.integers(1, most)), draw(st.integers(1, most)))  # noqa: E731
    kernel_size = pair(kernel)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    bias = np.zeros(c_out) if draw(st.sampled_from(tuple(biases))) == "zero" else rng.normal(size=c_out)
    return AffineConv(
        rng.normal(size=(*kernel_size, c_in // groups, c_out)),
        bias,
        strides=pair(stride),
        dilation_rate=pair(dilation),
        groups=groups,
        padding=tuple(draw(st.integers(0, padding)) for _ in range(4)),
    )


@st.composite
def chains(
    draw: st.DrawFn,
    *,
    length: int,
    kernel: int = 3,
    stride: int = 2,
    dilation: int = 2,
    padding: int = 2,
    biases: Sequence[str] = BIASES,
) -> tuple[AffineConv, ...]:
    """Maps that fit one after the other."""
    maps: list[AffineConv] = []
    for _ in range(length):
        maps.append(
            draw(
                affine_maps(
                    c_in=maps[-1].c_out if maps else None,
                    kernel=kernel,
                    stride=stride,
                    dilation=dilation,
                    padding=padding,
                    biases=biases,
                )
            )
        )
    return tuple(maps)


def smallest_input(maps: Sequence[AffineConv], *, axis: int) -> int:
    """Least height (axis 0) or width (axis 1) for which every map of a chain writes at least one pixel."""
    size = 1
    for conv in reversed(maps):
        extent = (conv.kernel_size[axis] - 1) * conv.dilation_rate[axis] + 1
        size = max(1, conv.strides[axis] * (size - 1) + extent - sum(conv.padding[2 * axis : 2 * axis + 2]))
    return size


@st.composite
def images(draw: st.DrawFn, *maps: AffineConv, batch: int = 2, extra: int = 6) -> np.ndarray:
    """Images that the chain `maps` can read: odd, even, not square, up to `extra` pixels over the smallest."""
    height, width = (smallest_input(maps, axis=axis) + draw(st.integers(0, extra)) for axis in (0, 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="image seed"))
    return rng.normal(size=(batch, height, width, maps[0].c_in))


def random_map(
    rng: np.random.Generator,
    kernel_size: int | tuple[int, int],
    c_in: int,
    c_out: int,
    *,
    strides: int = 1,
    padding: int | tuple[int, int, int, int] = 0,
    groups: int = 1,
    dilation_rate: int = 1,
    bias: bool = True,
) -> AffineConv:
    """A map with generic weights, for tests of one geometry."""
    size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    return AffineConv(
        rng.normal(size=(*size, c_in // groups, c_out)),
        rng.normal(size=c_out) if bias else np.zeros(c_out),
        strides=(strides, strides),
        dilation_rate=(dilation_rate, dilation_rate),
        groups=groups,
        padding=(padding,) * 4 if isinstance(padding, int) else padding,
    )


def without_padding(conv: AffineConv) -> AffineConv:
    """The same map that pads nothing."""
    return replace(conv, padding=(0, 0, 0, 0))
