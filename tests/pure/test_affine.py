"""The algebra of linear maps against direct float64 convolutions written here as plain loops.

Every equality is to 1e-12 relative (max |difference| / max |output|): float64 sums of at most a few thousand terms err
by about 1e-15 times the square root of their number; a wrong tap or border pixel errs by about 1.
"""

from __future__ import annotations

import copy
import doctest
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy import signal

from tests.strategies import affine_maps, chains, images, random_map, smallest_input, without_padding
from updp_tf import affine
from updp_tf.affine import AffineConv, compose
from updp_tf.errors import ShapeError

TOLERANCE = 1e-12
SIDES = (0, 0, 0, 0)

# A busy machine may not fail a test: no deadlines. The same examples every time.
few = settings(derandomize=True, deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
many = settings(few, max_examples=200)


def direct(x: np.ndarray, *maps: AffineConv) -> np.ndarray:
    """Apply maps one after the other: a dot product per output pixel and group, by definition."""
    for conv in maps:
        x = _direct(x, conv)
    return x


def _direct(x: np.ndarray, conv: AffineConv) -> np.ndarray:
    top, bottom, left, right = conv.padding
    n, height, width, channels = x.shape
    padded = np.zeros((n, height + top + bottom, width + left + right, channels))
    padded[:, top : top + height, left : left + width] = x
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.strides, conv.dilation_rate
    rows = (padded.shape[1] - (kh - 1) * dh - 1) // sh + 1
    columns = (padded.shape[2] - (kw - 1) * dw - 1) // sw + 1
    reads, writes = channels // conv.groups, conv.kernel.shape[3] // conv.groups
    y = np.empty((n, rows, columns, conv.kernel.shape[3]))
    for g in range(conv.groups):
        kernel = conv.kernel[..., g * writes : (g + 1) * writes].reshape(-1, writes)
        for i in range(rows):
            for j in range(columns):
                patch = padded[:, i * sh :, j * sw :, g * reads : (g + 1) * reads]
                patch = patch[:, : kh * dh : dh, : kw * dw : dw].reshape(n, -1)
                y[:, i, j, g * writes : (g + 1) * writes] = patch @ kernel
    return y + conv.bias


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    scale = np.abs(expected).max()
    return float(np.abs(actual - expected).max() / scale) if scale > 0 else float(np.abs(actual).max())


def assert_same_map(actual: AffineConv, expected: AffineConv, *, tolerance: float = TOLERANCE) -> None:
    actual, expected = (affine.write_out_dilation(conv) for conv in (actual, expected))
    assert (actual.strides, actual.padding, actual.c_in) == (expected.strides, expected.padding, expected.c_in)
    actual, expected = affine.regroup(actual, 1), affine.regroup(expected, 1)
    assert relative_error(actual.kernel, expected.kernel) <= tolerance
    assert np.abs(actual.bias - expected.bias).max() <= tolerance * max(1.0, np.abs(expected.bias).max())


def interior(x: np.ndarray, first: AffineConv, second: AffineConv) -> np.ndarray:
    """Output pixels for which no tap of `second` lies in its padding: (height, width), bool."""
    probe = direct(np.zeros((1, *x.shape[1:])), first)[..., :1] * 0 + 1
    ones = AffineConv(
        np.ones((*second.kernel_size, 1, 1)),
        np.zeros(1),
        strides=second.strides,
        dilation_rate=second.dilation_rate,
        padding=second.padding,
    )
    return direct(probe, ones)[0, :, :, 0] == np.prod(second.kernel_size)


# The reference itself, and apply


def test_the_reference_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    conv = random_map(rng, (3, 4), 2, 3)
    x = rng.normal(size=(1, 7, 9, 2))
    expected = np.stack(
        [
            sum(signal.correlate(x[0, :, :, c], conv.kernel[:, :, c, o], mode="valid") for c in range(2)) + conv.bias[o]
            for o in range(3)
        ],
        axis=-1,
    )
    assert relative_error(direct(x, conv)[0], expected) <= TOLERANCE


@many
@given(st.data())
def test_apply_is_the_direct_convolution(data: st.DataObject) -> None:
    conv = data.draw(affine_maps())
    x = data.draw(images(conv))
    expected = direct(x, conv)
    assert relative_error(affine.apply(conv, x), expected) <= TOLERANCE
    assert affine.output_size(conv, *x.shape[1:3]) == expected.shape[1:3]
    assert affine.macs(conv, *x.shape[1:3]) == np.prod(expected.shape[1:]) * np.prod(conv.kernel.shape[:3])


@few
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_depthwise_has_the_channel_order_of_keras(channels: int, multiplier: int, stride: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kernel, bias = rng.normal(size=(3, 2, channels, multiplier)), rng.normal(size=channels * multiplier)
    conv = affine.from_depthwise(kernel, bias, strides=(stride, 1), dilation_rate=(1, 2), padding=(1, 0, 0, 2))
    x = rng.normal(size=(2, 6, 7, channels))
    actual = affine.apply(conv, x)
    for c in range(channels):
        for m in range(multiplier):
            one = AffineConv(
                kernel[:, :, c : c + 1, m : m + 1],
                bias[[c * multiplier + m]],
                strides=(stride, 1),
                dilation_rate=(1, 2),
                padding=(1, 0, 0, 2),
            )
            expected = direct(x[..., c : c + 1], one)
            assert relative_error(actual[..., [c * multiplier + m]], expected) <= TOLERANCE


def test_dense_scale_identity_and_padding_are_maps() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 4, 3, 5))
    kernel, bias, scale, shift = rng.normal(size=(5, 7)), rng.normal(size=7), rng.normal(size=5), rng.normal(size=5)
    assert relative_error(affine.apply(affine.from_dense(kernel, bias), x), x @ kernel + bias) <= TOLERANCE
    assert relative_error(affine.apply(affine.from_scale(scale, shift), x), x * scale + shift) <= TOLERANCE
    assert np.array_equal(affine.apply(affine.identity(5), x), x)
    padded = np.pad(x, ((0, 0), (1, 0), (2, 3), (0, 0)))
    assert np.array_equal(affine.apply(affine.from_padding(5, (1, 0, 2, 3)), x), padded)


# The same map, written differently


@many
@given(st.data())
def test_regroup_and_write_out_dilation_change_nothing(data: st.DataObject) -> None:
    conv = data.draw(affine_maps(kernel=3))
    x = data.draw(images(conv))
    expected = direct(x, conv)
    plain = affine.write_out_dilation(conv)
    assert plain.dilation_rate == (1, 1) and plain.kernel_size == conv.effective_size
    assert relative_error(direct(x, plain), expected) <= TOLERANCE
    for groups in (n for n in range(1, conv.groups + 1) if conv.groups % n == 0):
        fewer = affine.regroup(conv, groups)
        assert fewer.groups == groups
        assert relative_error(direct(x, fewer), expected) <= TOLERANCE


@many
@given(st.data())
def test_crop_equals_a_kernel_with_its_outer_taps_zeroed(data: st.DataObject) -> None:
    conv = data.draw(affine_maps(kernel=7, dilation=2, padding=12))
    size = tuple(data.draw(st.integers(1, k)) for k in conv.kernel_size)
    cut = [(k - n) // 2 for k, n in zip(conv.kernel_size, size, strict=True)]
    kept = np.zeros(conv.kernel.shape)
    window = slice(cut[0], cut[0] + size[0]), slice(cut[1], cut[1] + size[1])
    kept[window] = conv.kernel[window]
    zeroed = replace(conv, kernel=kept)
    rest = [(k - n - c) for k, n, c in zip(conv.kernel_size, size, cut, strict=True)]
    shrinks = (cut[0] * conv.dilation_rate[0], rest[0] * conv.dilation_rate[0])
    shrinks += (cut[1] * conv.dilation_rate[1], rest[1] * conv.dilation_rate[1])
    if any(less > pad for less, pad in zip(shrinks, conv.padding, strict=True)):
        with pytest.raises(ShapeError, match="the padding would become"):
            affine.crop_kernel(conv, size)
        return
    cropped, dropped = affine.crop_kernel(conv, size)
    x = data.draw(images(conv))
    assert cropped.kernel_size == size
    assert relative_error(direct(x, cropped), direct(x, zeroed)) <= TOLERANCE
    assert dropped == pytest.approx(1 - np.sum(kept**2) / np.sum(conv.kernel**2), abs=1e-12)


def test_crop_of_all_taps_drops_nothing() -> None:
    conv = random_map(np.random.default_rng(2), 5, 2, 3, padding=2)
    cropped, dropped = affine.crop_kernel(conv, (5, 5))
    assert dropped == 0.0 and np.array_equal(cropped.kernel, conv.kernel)
    assert affine.crop_kernel(replace(conv, kernel=np.zeros(conv.kernel.shape)), (3, 3))[1] == 0.0
    with pytest.raises(ShapeError, match="cannot be cropped to"):
        affine.crop_kernel(conv, (7, 3))


# Norms


@many
@given(st.data())
def test_norms_fold_exactly(data: st.DataObject) -> None:
    conv = data.draw(affine_maps(kernel=4))
    x = data.draw(images(conv))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scale, shift = rng.normal(size=conv.c_out), rng.normal(size=conv.c_out)
    after = affine.fold_norm_after(conv, scale, shift)
    assert relative_error(direct(x, after), direct(x, conv) * scale + shift) <= TOLERANCE

    scale, shift = rng.normal(size=conv.c_in), rng.normal(size=conv.c_in)
    before = affine.fold_norm_before(conv, scale, np.zeros(conv.c_in))
    assert relative_error(direct(x, before), direct(x * scale, conv)) <= TOLERANCE
    if conv.pads:
        with pytest.raises(ShapeError, match="pads with 0"):
            affine.fold_norm_before(conv, scale, shift)
    conv = without_padding(conv)
    x = data.draw(images(conv))
    before = affine.fold_norm_before(conv, scale, shift)
    assert relative_error(direct(x, before), direct(x * scale + shift, conv)) <= TOLERANCE


# Composition


@many
@given(st.data())
def test_compose_is_exact_where_second_does_not_pad(data: st.DataObject) -> None:
    first = data.draw(affine_maps())
    second = data.draw(affine_maps(c_in=first.c_out, padding=0))
    x = data.draw(images(first, second, batch=1, extra=4))
    both = compose(first, second)
    assert both.dilation_rate == (1, 1)
    assert relative_error(direct(x, both), direct(x, first, second)) <= TOLERANCE


@many
@given(st.data())
def test_compose_is_exact_in_the_interior_and_keeps_the_size(data: st.DataObject) -> None:
    first = data.draw(affine_maps(kernel=4, dilation=2))
    second = data.draw(affine_maps(c_in=first.c_out, kernel=4, dilation=2))
    x = data.draw(images(first, second))
    expected, actual = direct(x, first, second), direct(x, compose(first, second))
    assert actual.shape == expected.shape
    inside = interior(x, first, second)
    assume(inside.any())
    assert relative_error(actual[:, inside], expected[:, inside]) <= TOLERANCE


@pytest.mark.parametrize(
    ("groups1", "groups2", "expected"),
    [(1, 12, 1), (12, 1, 1), (12, 12, 12), (4, 12, 4), (12, 3, 3), (4, 6, 2), (2, 3, 1)],
)
def test_composed_groups_are_the_greatest_common_divisor(groups1: int, groups2: int, expected: int) -> None:
    rng = np.random.default_rng(3)
    first = random_map(rng, 2, 24, 12, groups=groups1)
    second = random_map(rng, 3, 12, 24, groups=groups2)
    both = compose(first, second)
    assert both.groups == expected
    assert both.kernel.shape == (4, 4, 24 // expected, 24)
    x = rng.normal(size=(1, 6, 5, 24))
    assert relative_error(direct(x, both), direct(x, first, second)) <= TOLERANCE


def test_composed_depthwise_with_multiplier_stays_grouped() -> None:
    rng = np.random.default_rng(4)
    first = affine.from_depthwise(rng.normal(size=(3, 3, 4, 2)), rng.normal(size=8), strides=(2, 2))
    second = affine.from_depthwise(rng.normal(size=(3, 3, 8, 3)), rng.normal(size=24), dilation_rate=(2, 1))
    both = compose(first, second)
    assert (both.groups, both.kernel_size, both.strides) == (4, (11, 7), (2, 2))
    x = rng.normal(size=(1, 15, 12, 4))
    assert relative_error(direct(x, both), direct(x, first, second)) <= TOLERANCE


@few
@given(chains(length=3))
def test_compose_is_associative(maps: tuple[AffineConv, ...]) -> None:
    f, g, h = maps
    assert_same_map(compose(compose(f, g), h), compose(f, compose(g, h)))
    assert compose(compose(f, g), h).groups == compose(f, compose(g, h)).groups


@few
@given(affine_maps(kernel=4))
def test_identity_is_neutral(conv: AffineConv) -> None:
    for same in (compose(affine.identity(conv.c_in), conv), compose(conv, affine.identity(conv.c_out))):
        assert same.groups == conv.groups
        assert_same_map(same, conv, tolerance=0.0)


@few
@given(st.data())
def test_compose_all_and_its_geometry(data: st.DataObject) -> None:
    maps = data.draw(chains(length=data.draw(st.integers(1, 4)), kernel=2))
    composed = affine.compose_all(maps)
    in_order = affine.write_out_dilation(maps[0])
    for conv in maps[1:]:
        in_order = compose(in_order, conv)
    assert_same_map(composed, in_order)
    assert composed.dilation_rate == (1, 1)
    geometry = affine.composed_geometry(maps)
    assert (composed.kernel_size, composed.strides, composed.padding) == (
        geometry.kernel_size,
        geometry.strides,
        geometry.padding,
    )
    moved = affine.move_padding_to_front(maps)
    x = data.draw(images(*maps, batch=1))
    assert relative_error(direct(x, composed), direct(x, *moved)) <= TOLERANCE


@pytest.mark.parametrize(
    ("channels", "sizes"),
    [
        ((64, 2, 64, 2, 64), [4, 128, 4096]),  # left to right: 4096, 128, 4096
        ((4, 20, 4, 1), [4, 20]),  # 4 * 20 * 1 + 20 * 4 * 1 multiplications; left to right 4 * 20 * 4 + 4 * 4 * 1
    ],
)
def test_compose_all_takes_the_cheap_order(
    monkeypatch: pytest.MonkeyPatch, channels: tuple[int, ...], sizes: list[int]
) -> None:
    rng = np.random.default_rng(5)
    composed: list[int] = []

    def recording(first: AffineConv, second: AffineConv) -> AffineConv:
        both = compose(first, second)
        composed.append(both.kernel.size)
        return both

    monkeypatch.setattr(affine, "compose", recording)
    affine.compose_all(random_map(rng, 1, *pair) for pair in zip(channels, channels[1:], strict=False))
    assert sorted(composed) == sizes


@pytest.mark.parametrize("where", ["after", "before", "both"])
def test_depthwise_kernels_are_never_written_out(where: str) -> None:
    rng = np.random.default_rng(6)
    channels = 1024
    depthwise = affine.from_depthwise(rng.normal(size=(3, 3, channels, 1)), rng.normal(size=channels), padding=(1,) * 4)
    expand, project = random_map(rng, 1, 4, channels), random_map(rng, 1, channels, 4)
    maps = {"after": [expand, depthwise], "before": [depthwise, project], "both": [depthwise, depthwise]}[where]
    tracemalloc.start()
    try:
        compose(*maps)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6  # bytes; a dense kernel of 1024 x 1024 alone is 8.4e6, nine taps of it 75e6


# Borders


def equal_everywhere(x: np.ndarray, first: AffineConv, second: AffineConv) -> bool:
    expected = affine.apply(second, affine.apply(first, x))
    return relative_error(affine.apply(compose(first, second), x), expected) <= 1e-9


@many
@given(st.data())
def test_padding_is_exact_is_tight(data: st.DataObject) -> None:
    first = data.draw(affine_maps(kernel=3, stride=3, dilation=2, padding=3, biases=("zero", "zero", "generic")))
    second = data.draw(affine_maps(c_in=first.c_out, kernel=3, stride=3, dilation=2, padding=1))
    claim = affine.padding_is_exact(first, second)
    rng = np.random.default_rng(0)
    # Large enough for both ends of the image to be apart, then every remainder of both strides.
    large = max(first.effective_size) + max(first.strides) * (max(second.effective_size) + max(second.padding) * 2)
    period = [large + n for n in range(9)]
    found: list[bool] = []
    for height, width in [*((n, large) for n in period), *((large, n) for n in period)]:
        equal = equal_everywhere(rng.normal(size=(1, height, width, first.c_in)), first, second)
        assert affine.padding_is_exact(first, second, height=height, width=width) == equal
        found.append(equal)
    assert claim == all(found)
    if claim:
        small = [smallest_input((first, second), axis=axis) for axis in (0, 1)]
        for more in range(4):
            x = rng.normal(size=(1, small[0] + more, small[1] + more, first.c_in))
            assert equal_everywhere(x, first, second)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "bias", "exact"),
    [
        (1, 1, SIDES, False, True),
        (1, 2, SIDES, False, True),
        (1, 1, (2, 0, 1, 1), False, True),  # padding alone is 0 outside, too
        (1, 1, SIDES, True, False),
        (3, 1, (1, 1, 1, 1), False, False),
        (3, 1, SIDES, False, False),
        (3, 1, (2, 2, 2, 2), False, True),  # 'full': it has left the image already
        (3, 1, (2, 2, 2, 2), True, False),
        (2, 2, SIDES, False, False),  # exact on even sizes alone
    ],
)
def test_padding_is_exact_by_kind(
    kernel: int, stride: int, padding: tuple[int, int, int, int], bias: bool, exact: bool
) -> None:
    rng = np.random.default_rng(7)
    first = random_map(rng, kernel, 2, 3, strides=stride, padding=padding, bias=bias)
    second = random_map(rng, 3, 3, 2, padding=1)
    assert affine.padding_is_exact(first, second) == exact
    assert affine.padding_is_exact(first, without_padding(second))
    for height, width in ((6, 8), (7, 9), (6, 9)):
        x = rng.normal(size=(1, height, width, 2))
        equal = relative_error(direct(x, compose(first, second)), direct(x, first, second)) <= 1e-9
        assert affine.padding_is_exact(first, second, height=height, width=width) == equal
        assert equal or not exact


def test_two_by_two_patches_are_exact_on_even_sizes_only() -> None:
    rng = np.random.default_rng(8)
    first, second = random_map(rng, 2, 3, 4, strides=2, bias=False), random_map(rng, 3, 4, 2, padding=1)
    for n, exact in ((8, True), (9, False)):
        assert affine.padding_is_exact(first, second, height=n, width=8) == exact
        assert affine.padding_is_exact(first, second, height=8, width=n) == exact
        x = rng.normal(size=(1, n, 8, 3))
        assert (relative_error(direct(x, compose(first, second)), direct(x, first, second)) <= TOLERANCE) == exact
    with pytest.raises(ShapeError, match="too small"):
        affine.padding_is_exact(first, second, height=1)


def test_taps_that_step_over_the_edge_are_not_read() -> None:
    # Stride 2 and dilation 2: `second` reads rows -2, 0, 2, ... of `first`, never -1, which still sees the image.
    rng = np.random.default_rng(19)
    first = random_map(rng, 2, 2, 3, bias=False)
    second = random_map(rng, 2, 3, 2, strides=2, dilation_rate=2, padding=(2, 0, 0, 0))
    assert affine.padding_is_exact(first, second)
    assert not affine.padding_is_exact(first, replace(second, padding=(1, 0, 0, 0)))
    x = rng.normal(size=(1, 8, 9, 2))
    assert relative_error(direct(x, compose(first, second)), direct(x, first, second)) <= TOLERANCE


def inverted_residual(
    rng: np.random.Generator, stride: int, padding: tuple[int, int, int, int], *, kernel: int = 3
) -> tuple[AffineConv, ...]:
    depthwise = random_map(rng, kernel, 12, 12, groups=12, strides=stride, padding=padding)
    return random_map(rng, 1, 4, 12), depthwise, random_map(rng, 1, 12, 6)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (7, 7), (6, 9), (5, 8), (2, 3)])
@pytest.mark.parametrize(
    ("stride", "padding"), [(1, (1, 1, 1, 1)), (2, (0, 1, 0, 1)), (2, (1, 1, 1, 1)), (3, (0, 2, 1, 3))]
)
def test_border_map_makes_an_inverted_residual_exact(
    height: int, width: int, stride: int, padding: tuple[int, int, int, int]
) -> None:
    rng = np.random.default_rng(9)
    maps = inverted_residual(rng, stride, padding)
    x = rng.normal(size=(2, height, width, 4))
    merged, constant = affine.compose_with_border_map(maps, height, width)
    expected = direct(x, *maps)
    assert not merged.bias.any() and constant.shape == expected.shape[1:]
    assert relative_error(direct(x, merged) + constant, expected) <= TOLERANCE
    expand, depthwise, _ = maps
    unbiased = replace(compose(expand, depthwise), bias=np.zeros(12))
    pair = direct(x, unbiased) + affine.border_map(expand, depthwise, height, width)
    assert relative_error(pair, direct(x, expand, depthwise)) <= TOLERANCE
    # The trap: the plain composition has a wrong border, wherever the padding is read at all.
    exact = affine.padding_is_exact(expand, depthwise, height=height, width=width)
    assert exact == (stride == 2 and padding[0] == 0 and height % 2 == 1 and width % 2 == 1)
    assert (relative_error(direct(x, affine.compose_all(maps)), expected) <= TOLERANCE) == exact


@many
@given(st.data())
def test_border_map_is_exact_or_refused(data: st.DataObject) -> None:
    maps = data.draw(chains(length=3, kernel=2, stride=2, dilation=1, padding=2))
    x = data.draw(images(*maps, batch=1))
    expected = direct(x, *maps)
    try:
        merged, constant = affine.compose_with_border_map(maps, *x.shape[1:3])
    except ShapeError as error:
        assert "No constant map repairs the border" in str(error)
        assert not all(conv.kernel_size == (1, 1) for conv in maps[:-1])
        return
    assert relative_error(direct(x, merged) + constant, expected) <= TOLERANCE


def test_mobilenetv2_pads_before_its_strided_depthwise() -> None:
    # Keras' MobileNetV2: 1x1, ZeroPadding2D ((0, 1), (0, 1)), 3x3 depthwise stride 2 'valid', 1x1.
    rng = np.random.default_rng(10)
    expand, depthwise, project = inverted_residual(rng, 2, SIDES)
    maps = (expand, affine.from_padding(12, (0, 1, 0, 1)), depthwise, project)
    for height, width in ((6, 8), (7, 8), (5, 5)):
        x = rng.normal(size=(2, height, width, 4))
        merged, constant = affine.compose_with_border_map(maps, height, width)
        assert (merged.kernel_size, merged.strides, merged.padding) == ((3, 3), (2, 2), (0, 1, 0, 1))
        assert relative_error(direct(x, merged) + constant, direct(x, *maps)) <= TOLERANCE


def test_resnet_block_has_no_border_map_but_composes_with_padding_in_front() -> None:
    rng = np.random.default_rng(11)
    maps = random_map(rng, 3, 4, 4, padding=1), random_map(rng, 3, 4, 4, padding=1)
    with pytest.raises(ShapeError, match=r"map 1, AffineConv\(3x3.*pads what the maps before it have made of \(3, 3\)"):
        affine.compose_with_border_map(maps, 8, 8)
    with pytest.raises(ShapeError, match="No constant map"):
        affine.border_map(*maps, 8, 8)
    moved = affine.move_padding_to_front(maps)
    assert [conv.padding for conv in moved] == [(2, 2, 2, 2), SIDES]
    composed = affine.compose_all(maps)
    for height, width in ((8, 8), (7, 9)):
        x = rng.normal(size=(2, height, width, 4))
        original, merged = direct(x, *maps), direct(x, composed)
        assert relative_error(merged, direct(x, *moved)) <= TOLERANCE
        assert relative_error(merged[:, 1:-1, 1:-1], original[:, 1:-1, 1:-1]) <= TOLERANCE
        for ring in (np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1]):
            assert relative_error(merged[ring], original[ring]) > 1e-3


def test_strided_padding_moves_to_the_front_in_input_pixels() -> None:
    rng = np.random.default_rng(12)
    maps = (
        random_map(rng, 3, 2, 3, strides=2, padding=(0, 1, 0, 1)),
        random_map(rng, 3, 3, 3, padding=1),
        random_map(rng, 1, 3, 2, padding=(0, 2, 1, 0)),
    )
    moved = affine.move_padding_to_front(maps)
    assert moved[0].padding == (2, 7, 4, 3) and not any(conv.pads for conv in moved[1:])
    x = rng.normal(size=(1, 9, 12, 2))
    assert direct(x, *moved).shape == direct(x, *maps).shape
    assert relative_error(direct(x, affine.compose_all(maps)), direct(x, *moved)) <= TOLERANCE


# Skips


@many
@given(st.data())
def test_identity_skip(data: st.DataObject) -> None:
    conv = data.draw(affine_maps(kernel=5, stride=1))
    pads = [data.draw(st.integers(0, size - 1)) for size in conv.effective_size]
    (rows, columns) = conv.effective_size
    conv = replace(
        conv,
        kernel=np.resize(conv.kernel, (*conv.kernel_size, conv.kernel.shape[2], conv.c_in)),
        bias=np.resize(conv.bias, conv.c_in),
        padding=(pads[0], rows - 1 - pads[0], pads[1], columns - 1 - pads[1]),
    )
    x = data.draw(images(conv))
    assert relative_error(direct(x, affine.add_identity_skip(conv)), direct(x, conv) + x) <= TOLERANCE


@many
@given(st.data())
def test_projection_skip(data: st.DataObject) -> None:
    conv = data.draw(affine_maps(kernel=5, dilation=2))
    pads = [data.draw(st.integers(0, size - 1)) for size in conv.effective_size]
    (rows, columns) = conv.effective_size
    conv = replace(conv, padding=(pads[0], rows - 1 - pads[0], pads[1], columns - 1 - pads[1]))
    groups = data.draw(st.sampled_from([n for n in range(1, 10) if conv.c_in % n == 0 and conv.c_out % n == 0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    projection = replace(random_map(rng, 1, conv.c_in, conv.c_out, groups=groups), strides=conv.strides)
    x = data.draw(images(conv))
    folded = affine.add_projection_skip(conv, projection)
    assert relative_error(direct(x, folded), direct(x, conv) + direct(x, projection)) <= TOLERANCE


def test_skip_of_a_strided_same_convolution_is_not_at_the_centre() -> None:
    # 'same' with stride 2 pads (0, 1) on even sizes and (1, 1) on odd ones.
    rng = np.random.default_rng(13)
    for size, before, tap in ((8, 0, 0), (7, 1, 1)):
        conv = random_map(rng, 3, 4, 6, strides=2, padding=(before, 1, before, 1))
        projection = random_map(rng, 1, 4, 6, strides=2)
        x = rng.normal(size=(2, size, size, 4))
        folded = affine.add_projection_skip(conv, projection)
        assert relative_error(direct(x, folded), direct(x, conv) + direct(x, projection)) <= TOLERANCE
        changed = np.argwhere(np.abs(folded.kernel - conv.kernel).max(axis=(2, 3)) > 0)
        assert changed.tolist() == [[tap, tap]]


def test_a_whole_inverted_residual_with_its_skip() -> None:
    rng = np.random.default_rng(14)
    expand, depthwise, _ = inverted_residual(rng, 1, (1, 1, 1, 1))
    maps = (expand, depthwise, random_map(rng, 1, 12, 4))
    x = rng.normal(size=(2, 5, 8, 4))
    merged, constant = affine.compose_with_border_map(maps, 5, 8)
    merged = affine.add_identity_skip(merged)
    assert relative_error(direct(x, merged) + constant, direct(x, *maps) + x) <= TOLERANCE


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (lambda rng: random_map(rng, 3, 4, 5, padding=1), "equal channels and stride 1"),
        (lambda rng: random_map(rng, 3, 4, 4, padding=1, strides=2), "equal channels and stride 1"),
        (lambda rng: random_map(rng, 3, 4, 4), "never has the size"),
        (lambda rng: random_map(rng, 3, 4, 4, padding=(1, 1, 1, 2)), "never has the size"),
        (lambda rng: random_map(rng, 3, 4, 4, padding=1, dilation_rate=2), "never has the size"),
    ],
)
def test_identity_skips_that_are_refused(conv, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        affine.add_identity_skip(conv(np.random.default_rng(15)))


@pytest.mark.parametrize(
    ("conv", "projection", "message"),
    [
        ({"strides": 2, "padding": 1}, {"kernel_size": 3, "strides": 2, "padding": 1}, "1x1 without padding"),
        ({"strides": 2, "padding": 1}, {"strides": 2, "padding": (1, 0, 0, 0)}, "1x1 without padding"),
        ({"strides": 2, "padding": 1}, {"strides": 1}, "channels and strides"),
        ({"strides": 2, "padding": 1}, {"strides": 2, "c_out": 5}, "channels and strides"),
        ({"strides": 2, "padding": 1}, {"strides": 2, "c_in": 3}, "channels and strides"),
        ({"strides": 2, "padding": 2}, {"strides": 2}, "never has the size"),
        ({"strides": 2, "padding": (3, 0, 1, 1)}, {"strides": 2}, r"tap \(3, 1\).*outside the kernel of \(3, 3\)"),
        ({"strides": 2, "padding": (1, 1, 3, 0)}, {"strides": 2}, r"tap \(1, 3\).*outside the kernel of \(3, 3\)"),
    ],
)
def test_projection_skips_that_are_refused(conv: dict, projection: dict, message: str) -> None:
    rng = np.random.default_rng(16)
    body = random_map(rng, **{"kernel_size": 3, "c_in": 4, "c_out": 6, **conv})
    with pytest.raises(ShapeError, match=message):
        affine.add_projection_skip(body, random_map(rng, **{"kernel_size": 1, "c_in": 4, "c_out": 6, **projection}))


# Values and errors


def test_a_map_owns_its_arrays() -> None:
    kernel, bias = np.ones((1, 1, 2, 3), dtype=np.float32), np.zeros(3)
    conv = AffineConv(kernel, bias)
    kernel[:], bias[:] = 7, 7
    assert conv.kernel.dtype == conv.bias.dtype == np.float64
    assert conv.kernel.max() == 1 and conv.bias.max() == 0
    view = np.ones((1, 1, 2, 3))
    read_only = view[:]
    read_only.flags.writeable = False
    conv = AffineConv(read_only, np.zeros(3))
    view[:] = 7
    assert conv.kernel.max() == 1
    for array in (conv.kernel, conv.bias):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    for same in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert_same_map(same, conv, tolerance=0.0)


def test_facts_of_a_map() -> None:
    rng = np.random.default_rng(17)
    conv = random_map(rng, (3, 5), 4, 6, groups=2, dilation_rate=2, padding=(0, 1, 2, 3))
    assert (conv.c_in, conv.c_out, conv.kernel_size, conv.effective_size) == (4, 6, (3, 5), (5, 9))
    assert repr(conv) == "AffineConv(3x5, 4 -> 6 channels, dilation_rate (2, 2), groups 2, padding (0, 1, 2, 3))"
    pointwise = random_map(rng, 1, 4, 6)
    assert pointwise.is_pointwise and not conv.is_pointwise
    assert not replace(pointwise, strides=(1, 2)).is_pointwise
    assert not replace(pointwise, padding=(0, 0, 0, 1)).is_pointwise
    assert affine.macs(random_map(rng, 3, 4, 6, strides=2, padding=1, groups=2), 8, 7) == 4 * 4 * 9 * 2 * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": np.ones((3, 3, 2))}, r"height, width, c_in // groups, c_out.*\(3, 3, 2\)"),
        ({"kernel": np.ones((3, 0, 2, 4))}, "none of them 0"),
        ({"bias": np.ones(3)}, r"has shape \(4,\). Received: \(3,\)"),
        ({"bias": np.ones((4, 1))}, r"has shape \(4,\)"),
        ({"groups": 3}, "must divide the 4 output channels. Received: groups=3"),
        ({"groups": 0}, "`groups` must be 1 integers of at least 1"),
        ({"strides": (0, 1)}, r"`strides` must be 2 integers of at least 1. Received: strides=\(0, 1\)"),
        ({"strides": 2}, "`strides` must be 2 integers"),
        ({"strides": (1.5, 1)}, "`strides` must be 2 integers"),
        ({"dilation_rate": (1, 1, 1)}, "`dilation_rate` must be 2 integers"),
        ({"padding": (1, 1)}, "`padding` must be 4 integers of at least 0"),
        ({"padding": (0, 0, -1, 0)}, "`padding` must be 4 integers of at least 0"),
    ],
)
def test_what_is_no_convolution_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        AffineConv(**{"kernel": np.ones((3, 3, 2, 4)), "bias": np.zeros(4), **change})


def test_calls_that_do_not_fit_are_refused() -> None:
    rng = np.random.default_rng(18)
    conv = random_map(rng, 3, 4, 6, groups=2)
    calls = [
        (lambda: affine.apply(conv, np.zeros((1, 5, 5, 3))), r"\(batch, height, width, 4\). Received: \(1, 5, 5, 3\)"),
        (lambda: affine.apply(conv, np.zeros((5, 5, 4))), "Images must have shape"),
        (lambda: affine.apply(conv, np.zeros((1, 5, 2, 4))), r"spans \(3, 3\)"),
        (lambda: affine.output_size(conv, 2, 5), r"An input of \(2, 5\)"),
        (lambda: compose(conv, conv), "writes 6 channels, the second reads 4"),
        (lambda: affine.padding_is_exact(conv, conv), "writes 6 channels, the second reads 4"),
        (lambda: affine.compose_all([]), "no maps"),
        (lambda: affine.move_padding_to_front([]), "no maps"),
        (lambda: affine.compose_with_border_map([], 4, 4), "no maps"),
        (lambda: affine.regroup(conv, 3), "must divide the 2 groups"),
        (lambda: affine.regroup(conv, 0), "must divide the 2 groups"),
        (lambda: affine.fold_norm_after(conv, np.ones(4), np.zeros(6)), r"`scale` must have shape \(6,\)"),
        (lambda: affine.fold_norm_before(conv, np.ones(4), np.zeros(6)), r"`shift` must have shape \(4,\)"),
        (lambda: affine.from_dense(np.ones(3), np.ones(3)), r"shape \(c_in, c_out\)"),
        (lambda: affine.from_depthwise(np.ones((3, 3)), np.ones(3)), "depthwise kernel"),
        (lambda: affine.from_scale(np.ones((3, 3)), np.ones(3)), r"`scale` must have shape \(channels,\)"),
    ]
    for call, message in calls:
        with pytest.raises(ShapeError, match=message):
            call()


def test_docstring_examples() -> None:
    result = doctest.testmod(affine)
    assert result.attempted > 0 and result.failed == 0


@st.composite
def aligned(draw: st.DrawFn, *, strides: int) -> AffineConv:
    """A map of four channels whose output is as large as a 1x1's, its kernel anywhere around the pixel."""
    k, dilation = draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 2]))
    spare = (k - 1) * dilation
    top, left = draw(st.integers(0, spare)), draw(st.integers(0, spare))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    options = {"groups": draw(st.sampled_from([1, 2, 4])), "strides": strides, "dilation_rate": dilation}
    return random_map(rng, k, 4, 4, padding=(top, spare - top, left, spare - left), **options)


@few
@given(data=st.data(), size=st.tuples(st.integers(5, 12), st.integers(5, 12)), strides=st.integers(1, 3))
def test_a_sum_of_two_maps_is_one_map(data: st.DataObject, size: tuple[int, int], strides: int) -> None:
    first, second = data.draw(aligned(strides=strides)), data.draw(aligned(strides=strides))
    x = np.random.default_rng(0).normal(size=(2, *size, 4))
    have, want = direct(x, affine.add(first, second)), direct(x, first) + direct(x, second)
    assert relative_error(have, want) <= TOLERANCE


@pytest.mark.parametrize(
    ("change", "message"),
    [({"strides": 2}, "other channels or strides"), ({"c_out": 6}, "other channels"), ({"padding": 0}, "other sizes")],
    ids=["strides", "channels", "size"],
)
def test_maps_whose_outputs_do_not_match_have_no_sum(change: dict, message: str) -> None:
    rng = np.random.default_rng(0)
    plain = {"kernel_size": 3, "c_in": 4, "c_out": 4, "padding": 1}
    with pytest.raises(ShapeError, match=message):
        affine.add(random_map(rng, **plain), random_map(rng, **(plain | change)))
