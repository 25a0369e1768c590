"""Blocks as values, without Keras, for tests of forms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from updp_tf import affine
from updp_tf.affine import AffineConv, Geometry
from updp_tf.structure import Block, Cost, Ref, Refusal


def make_block(
    geometry: Geometry | Sequence[AffineConv] | None,
    *,
    c_in: int = 4,
    c_out: int | None = None,
    size: tuple[int | None, int | None] = (9, 10),
    exit_size: tuple[int | None, int | None] | None = None,
    skip: AffineConv | None = None,
    projected: bool = False,
    live_bytes: int = 0,
) -> Block:
    """A block whose body has this geometry, or is made of these maps; `projected` calls the skip a projection."""
    if geometry is not None and not isinstance(geometry, Geometry):
        c_in, c_out = geometry[0].c_in, geometry[-1].c_out
        geometry = affine.composed_geometry(geometry)
    c_out = c_out or c_in
    if exit_size is None and geometry is not None:
        exit_size = tuple(
            None if n is None else (n + sum(geometry.padding[2 * i : 2 * i + 2]) - geometry.kernel_size[i]) // s + 1
            for i, (n, s) in enumerate(zip(size, geometry.strides, strict=True))
        )
    positions = (exit_size[0] or 1) * (exit_size[1] or 1) if exit_size else 1
    projection = Cost()
    if projected:
        projection = Cost(macs=skip.kernel.size * positions, params=skip.kernel.size + skip.bias.size)
    return Block(
        name="block",
        nodes=("body", "block"),
        body=("body",),
        entry=Ref("in"),
        exit=Ref("block"),
        entry_shape=(None, *size, c_in),
        exit_shape=(None, *(exit_size or size), c_out),
        skip=skip,
        skip_nodes=("project",) if projected else (),
        join=None if skip is None else "block",
        geometry=geometry,
        linear_refusal=None if geometry is not None else Refusal("block", "linear", "'gate' is a Multiply"),
        cost=Cost(10**9, 10**9, 10**9),
        skip_cost=projection,
        live_bytes=live_bytes,
        geometry_refusal=None if geometry is not None else Refusal("block", "window", "it turns rank 4 into rank 2"),
        skip_exit=None if skip is None else Ref("project" if projected else "in"),
    )


def output_of(maps: Sequence[AffineConv], skip: AffineConv | None, x: np.ndarray) -> np.ndarray:
    """What a linear block writes: maps in order, plus the skip."""
    y = None
    if maps:
        y = x
        for one in maps:
            y = affine.apply(one, y)
    if skip is None:
        return y
    skipped = affine.apply(skip, x)
    return skipped if y is None else y + skipped
