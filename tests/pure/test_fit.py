"""Fits against what they have to equal: known maps, numpy's least squares on explicit patches, sampled normals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.strategies import random_map
from updp_tf import affine, starts, windows
from updp_tf import samples as samples_module
from updp_tf.activations import Activation
from updp_tf.affine import AffineConv
from updp_tf.errors import CalibrationError, ShapeError
from updp_tf.moments import Centred, Moments
from updp_tf.samples import Samples
from updp_tf.starts import gaussian_start, identity_start
from updp_tf.structure import Stage
from updp_tf.windows import Window, draw

EVERY = 10**9
GEOMETRIES = {
    "3x3 same": Window((3, 3), (1, 1), (1, 1, 1, 1)),
    "1x1": Window((1, 1), (1, 1), (0, 0, 0, 0)),
    "5x5 stride 2": Window((5, 5), (2, 2), (2, 2, 2, 2)),
    "stride 2, padded at one side": Window((3, 3), (2, 2), (0, 1, 0, 1)),
    "not square": Window((2, 4), (1, 2), (1, 0, 2, 1)),
}


def patches_of(window: Window, x: np.ndarray) -> np.ndarray:
    """Shape (images, rows, columns, kernel height, kernel width, c_in), by plain loops."""
    top, bottom, left, right = window.padding
    padded = np.zeros((len(x), x.shape[1] + top + bottom, x.shape[2] + left + right, x.shape[3]))
    padded[:, top : top + x.shape[1], left : left + x.shape[2]] = x
    (kh, kw), (sh, sw) = window.kernel_size, window.strides
    rows, columns = (padded.shape[1] - kh) // sh + 1, (padded.shape[2] - kw) // sw + 1
    out = np.empty((len(x), rows, columns, kh, kw, x.shape[3]))
    for i in range(rows):
        for j in range(columns):
            out[:, i, j] = padded[:, i * sh : i * sh + kh, j * sw : j * sw + kw]
    return out


def flat(window: Window, x: np.ndarray) -> np.ndarray:
    return patches_of(window, x).reshape(-1, window.n_taps * x.shape[-1])


def moments_of(window: Window, x: np.ndarray, y: np.ndarray, *, n_positions: int = EVERY, seed: int = 0) -> Moments:
    moments = Moments(window, x.shape[-1], y.shape[-1])
    moments.add(draw(moments.window, x, y, n_positions=n_positions, rng=np.random.default_rng(seed)))
    return moments


def in_window(window: Window, rng: np.random.Generator, c_in: int, c_out: int, **options) -> AffineConv:
    one = random_map(rng, window.kernel_size, c_in, c_out, padding=window.padding, **options)
    return replace(one, strides=window.strides)


def curved(
    window: Window, seed: int = 0, *, n: int = 6, c_in: int = 3, c_out: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Correlated images with a mean, and something that is not linear in them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 9, 10, c_in)) @ rng.normal(size=(c_in, c_in)) + 2.0
    y = np.maximum(affine.apply(in_window(window, rng, c_in, c_out), x), 0.3)
    return x, y + 0.1 * rng.normal(size=y.shape)


# Windows


@pytest.mark.parametrize(
    ("kernel_size", "padding", "tap"),
    [
        ((3, 3), (1, 1, 1, 1), (1, 1)),
        ((3, 3), (0, 1, 0, 1), (0, 0)),
        ((5, 3), (2, 2, 0, 2), (2, 0)),
        ((1, 1), (0, 0, 0, 0), (0, 0)),
        ((3, 3), (3, 0, 1, 1), None),
        ((3, 3), (1, 1, 3, 0), None),
    ],
)
def test_the_skip_tap_reads_the_pixel_of_a_1x1_layer(kernel_size, padding, tap) -> None:
    window = Window(kernel_size, (2, 2), padding)
    assert window.skip_tap == tap
    if tap is None:
        return
    x = np.random.default_rng(0).normal(size=(2, 9, 8, 2))
    patches = patches_of(window, x)[:, :, :, tap[0], tap[1]]
    pixels = x[:, ::2, ::2][:, : patches.shape[1], : patches.shape[2]]
    np.testing.assert_array_equal(patches[:, : pixels.shape[1], : pixels.shape[2]], pixels)


def test_windows_inside_windows() -> None:
    large = Window((5, 5), (2, 2), (2, 2, 2, 2))
    small = Window((3, 2), (2, 2), (0, 1, 1, 0))
    assert large.contains(small) and large.contains(large) and not small.contains(large)
    assert large.offset_of(small) == (2, 1)
    assert not large.contains(replace(small, strides=(1, 1)))
    assert not large.contains(replace(small, padding=(3, 1, 1, 0)))
    assert not large.contains(replace(small, padding=(0, 1, -2, 0)))


@pytest.mark.parametrize("window", GEOMETRIES.values(), ids=GEOMETRIES)
def test_patches_are_the_windows_pixels(window: Window) -> None:
    x, y = curved(window)
    drawn = draw(window, x, y, n_positions=EVERY, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(drawn.patches().reshape(drawn.n, -1), flat(window, x))
    np.testing.assert_array_equal(drawn.outputs, y.reshape(-1, y.shape[-1]))


def test_sampled_patches_belong_to_their_outputs() -> None:
    window = GEOMETRIES["3x3 same"]
    x, _ = curved(window)
    y = affine.apply(in_window(window, np.random.default_rng(5), 3, 2), x)
    kernel, bias = (lambda one: (one.kernel.reshape(-1, 2), one.bias))(
        in_window(window, np.random.default_rng(5), 3, 2)
    )
    drawn = draw(window, x, y, n_positions=50, rng=np.random.default_rng(1))
    assert drawn.n == 50 and len(np.unique(drawn.outputs[:, 0])) == 50
    np.testing.assert_allclose(drawn.patches().reshape(50, -1) @ kernel + bias, drawn.outputs, rtol=1e-12)
    again = draw(window, x, y, n_positions=50, rng=np.random.default_rng(1))
    np.testing.assert_array_equal(drawn.patches(), again.patches())


def test_an_output_of_another_size_is_refused() -> None:
    x = np.zeros((1, 8, 8, 2))
    with pytest.raises(ShapeError, match=r"gives outputs of size \(8, 8\), the block writes \(7, 8\)"):
        draw(GEOMETRIES["3x3 same"], x, np.zeros((1, 7, 8, 2)), n_positions=5, rng=np.random.default_rng(0))


# Least squares


@pytest.mark.parametrize("window", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_linear_block_is_recovered(window: Window) -> None:
    rng = np.random.default_rng(3)
    truth = in_window(window, rng, 3, 4)
    x = rng.normal(size=(20, 9, 10, 3))
    centred = moments_of(window, x, affine.apply(truth, x)).centred()
    weights = centred.ridge_regression(ridge=0.0)
    # float64 moments of about 1000 positions: 1e-16 times a condition number of some tens
    np.testing.assert_allclose(weights, truth.kernel.reshape(-1, 4), atol=1e-8)
    np.testing.assert_allclose(centred.bias_of(weights), truth.bias, atol=1e-8)
    assert centred.explained(weights) == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(centred.weights_of(truth), weights, atol=1e-8)


def test_a_linear_block_is_recovered_from_few_positions_and_far_from_zero() -> None:
    window = GEOMETRIES["3x3 same"]
    rng = np.random.default_rng(3)
    truth = random_map(rng, 3, 3, 4)  # unpadded: a border of zeros next to 1000 would dominate
    x = 1000.0 + rng.normal(size=(20, 9, 10, 3))
    moments = moments_of(replace(window, padding=(0, 0, 0, 0)), x, affine.apply(truth, x), n_positions=300)
    assert moments.n == 300
    weights = moments.centred().ridge_regression(ridge=0.0)
    # the mean is 1000 deviations away: six digits of the covariance are lost
    np.testing.assert_allclose(weights, truth.kernel.reshape(-1, 4), atol=1e-5)


@pytest.mark.parametrize("window", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("ridge", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("with_prior", [False, True])
def test_ridge_regression_is_least_squares_on_augmented_patches(window: Window, ridge: float, with_prior: bool) -> None:
    x, y = curved(window)
    centred = moments_of(window, x, y).centred()
    patches, target = flat(window, x), y.reshape(-1, y.shape[-1])
    n, unknowns = patches.shape
    prior = np.random.default_rng(1).normal(size=(unknowns, target.shape[1])) if with_prior else None
    a, b = patches - patches.mean(axis=0), target - target.mean(axis=0)
    mean_eigenvalue = np.linalg.eigvalsh(a.T @ a / n).mean()
    pull = np.sqrt(ridge * mean_eigenvalue * n)
    wanted = np.linalg.lstsq(
        np.concatenate([a, pull * np.eye(unknowns)]),
        np.concatenate([b, pull * (np.zeros((unknowns, b.shape[1])) if prior is None else prior)]),
        rcond=None,
    )[0]

    weights = centred.ridge_regression(prior=prior, ridge=ridge)

    assert centred.mean_eigenvalue == pytest.approx(mean_eigenvalue, rel=1e-9)
    have = patches @ weights + centred.bias_of(weights)
    want = a @ wanted + target.mean(axis=0)
    assert np.abs(have - want).max() <= 1e-6 * np.abs(want).max()


def test_one_decomposition_serves_all_ridges() -> None:
    window = GEOMETRIES["3x3 same"]
    x, y = curved(window)
    centred = moments_of(window, x, y).centred()
    prior = np.random.default_rng(0).normal(size=(27, 4))
    solve = centred.ridge_path(prior=prior)
    for ridge in (1e-4, 0.1, 10.0):
        np.testing.assert_allclose(solve(ridge), centred.ridge_regression(prior=prior, ridge=ridge), atol=1e-8)


def test_least_norm_where_channels_are_dead() -> None:
    window = GEOMETRIES["3x3 same"]
    x, y = curved(window)
    x[..., 1] = 0.0
    centred = moments_of(window, x, y).centred()
    for ridge in (0.0, 1e-4):
        weights = centred.ridge_regression(ridge=ridge).reshape(9, 3, -1)
        assert np.isfinite(weights).all()
        np.testing.assert_allclose(weights[:, 1], 0.0, atol=1e-9)
    nothing = moments_of(window, np.zeros_like(x), y).centred()
    np.testing.assert_array_equal(nothing.ridge_regression(), 0.0)
    np.testing.assert_allclose(nothing.bias_of(nothing.ridge_regression()), y.mean(axis=(0, 1, 2)))


@pytest.mark.parametrize("skip", ["identity", "projection"])
def test_the_ridge_shrinks_to_the_skip_and_not_to_zero(skip: str) -> None:
    window = GEOMETRIES["3x3 same"]
    x, y = curved(window, c_out=3)
    rng = np.random.default_rng(2)
    one = affine.identity(3) if skip == "identity" else random_map(rng, 1, 3, 3)
    centred = moments_of(window, x, y).centred()
    prior = centred.weights_of(one)
    assert prior.reshape(3, 3, 3, 3)[1, 1] == pytest.approx(affine.regroup(one, 1).kernel[0, 0])
    assert np.count_nonzero(prior) == np.count_nonzero(affine.regroup(one, 1).kernel)

    distance = [np.abs(centred.ridge_regression(prior=prior, ridge=r) - prior).max() for r in (1e-4, 1.0, 1e3, 1e9)]
    assert distance == sorted(distance, reverse=True) and distance[-1] < 1e-6 < distance[0]
    np.testing.assert_allclose(centred.ridge_regression(ridge=1e9), 0.0, atol=1e-6)
    # The bias is not penalised: the mean is right however strong the ridge is.
    weights = centred.ridge_regression(prior=prior, ridge=1e9)
    residual = y.reshape(-1, 3) - flat(window, x) @ weights - centred.bias_of(weights)
    np.testing.assert_allclose(residual.mean(axis=0), 0.0, atol=1e-9)


def test_weights_of_a_map_that_has_no_place() -> None:
    x, y = curved(GEOMETRIES["3x3 same"])
    centred = moments_of(GEOMETRIES["3x3 same"], x, y).centred()
    np.testing.assert_array_equal(centred.weights_of(None), 0.0)
    with pytest.raises(ShapeError, match=r"A kernel of \(5, 5\) has no place"):
        centred.weights_of(random_map(np.random.default_rng(0), 5, 3, 4))


@pytest.mark.parametrize("window", GEOMETRIES.values(), ids=GEOMETRIES)
def test_explained_on_other_images_is_the_direct_r2(window: Window) -> None:
    x, y = curved(window)
    weights = moments_of(window, x, y).centred().ridge_regression(ridge=0.01)
    bias = np.random.default_rng(0).normal(size=4)
    x2, y2 = curved(window, seed=9)
    held_out = moments_of(window, x2, y2).centred()
    target = y2.reshape(-1, 4)
    total = np.square(target - target.mean(axis=0)).sum()
    for given, used in ((bias, bias), (None, (target - flat(window, x2) @ weights).mean(axis=0))):
        direct = 1.0 - np.square(target - flat(window, x2) @ weights - used).sum() / total
        assert held_out.explained(weights, given) == pytest.approx(direct, abs=1e-9)


def test_a_constant_output_counts_as_explained() -> None:
    window = GEOMETRIES["1x1"]
    x, _ = curved(window)
    centred = moments_of(window, x, np.full((6, 9, 10, 2), 3.0)).centred()
    assert centred.explained(np.zeros((3, 2))) == 1.0


# Moments


def test_moments_of_a_smaller_window_are_a_part_of_the_larger_ones() -> None:
    large = Window((5, 5), (2, 2), (2, 2, 2, 2))
    for small in (
        Window((3, 3), (2, 2), (1, 1, 1, 1)),
        Window((1, 1), (2, 2), (0, 0, 0, 0)),
        Window((2, 3), (2, 2), (0, 1, 2, 0)),
    ):
        x, y = curved(large)
        cropped, direct = moments_of(large, x, y).crop(small), moments_of(small, x, y)
        assert cropped.n == direct.n and cropped.window == small
        a, b = cropped.centred(), direct.centred()
        for name in ("cross", "mean_x", "mean_y", "variance_y"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(a.gram, b.gram, atol=1e-12 * np.abs(b.gram).max())
        np.testing.assert_allclose(a.gram, a.gram.T)
        np.testing.assert_allclose(a.ridge_regression(ridge=1e-3), b.ridge_regression(ridge=1e-3), rtol=1e-7, atol=1e-9)


def test_moments_of_a_window_that_is_no_part_are_refused() -> None:
    x, y = curved(GEOMETRIES["3x3 same"])
    moments = moments_of(GEOMETRIES["3x3 same"], x, y)
    assert moments.crop(moments.window) is moments
    with pytest.raises(ShapeError, match="is no part of"):
        moments.crop(Window((5, 5), (1, 1), (2, 2, 2, 2)))


def test_order_and_cut_of_batches_do_not_matter() -> None:
    window = GEOMETRIES["3x3 same"]
    x, y = curved(window, n=7)
    whole = moments_of(window, x, y).centred()
    rng = np.random.default_rng(0)
    for order, cuts in (([6, 2, 4, 0, 1, 3, 5], (1, 3, 3)), (list(range(7)), (2, 5)), ([1, 0, 3, 2, 5, 4, 6], (7,))):
        parts = Moments(window, 3, 4)
        start = 0
        for n in cuts:
            chosen = order[start : start + n]
            parts.add(draw(parts.window, x[chosen], y[chosen], n_positions=EVERY, rng=rng))
            start += n
        centred = parts.centred()
        for name in ("gram", "cross", "mean_x", "mean_y", "variance_y"):
            np.testing.assert_allclose(getattr(centred, name), getattr(whole, name), rtol=1e-9, atol=1e-10)


def test_products_in_float32_disturb_a_fit_less_than_its_ridge() -> None:
    """Patches as they come from a network: a mean of several standard deviations, few directions, many positions."""
    window = GEOMETRIES["3x3 same"]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 15, 17, 5)) @ rng.normal(size=(5, 12)) + 0.01 * rng.normal(size=(40, 15, 17, 12)) + 20.0
    x = x.astype("float32")
    y = np.maximum(x[..., :4] - 20.0, 0.0)
    exact, fast = Moments(window, 12, 4), Moments(window, 12, 4)
    for part in (slice(0, 13), slice(13, 40)):
        exact.add(draw(window, x[part].astype("float64"), y[part].astype("float64"), n_positions=EVERY, rng=rng))
        fast.add(draw(window, x[part], y[part], n_positions=EVERY, rng=rng))
    assert fast.rounding == np.finfo("float32").eps and exact.rounding == np.finfo("float64").eps
    want, have = exact.centred(), fast.centred()
    eigenvalue = want.mean_eigenvalue
    assert np.linalg.norm(have.gram - want.gram, 2) <= 1e-5 * eigenvalue  # a tenth of the ridge; measured: 1e-6
    for name in ("mean_x", "mean_y", "variance_y"):
        np.testing.assert_allclose(getattr(have, name), getattr(want, name), rtol=1e-5)
    a, b = want.ridge_regression(), have.ridge_regression()
    assert want.explained(a) - want.explained(b) <= 1e-7
    # without a ridge, directions below rounding are left out instead of blown up
    assert want.explained(want.ridge_regression(ridge=0.0)) - want.explained(have.ridge_regression(ridge=0.0)) <= 1e-2
    # a ridge below rounding is raised: the matrix stays positive definite
    assert want.explained(a) - want.explained(have.ridge_regression(ridge=1e-12)) <= 1e-3


def test_size_of_moments_does_not_depend_on_the_number_of_images() -> None:
    window = GEOMETRIES["3x3 same"]
    x, y = curved(window)
    moments = moments_of(window, x, y)
    sizes = [getattr(moments, name).shape for name in ("gram", "cross", "sum_x", "sum_y", "sum_yy")]
    moments.add(draw(moments.window, x, y, n_positions=EVERY, rng=np.random.default_rng(0)))
    assert moments.n == 2 * 6 * 9 * 10
    assert sizes == [(27, 27), (27, 4), (27,), (4,), (4,)]
    assert sizes == [getattr(moments, name).shape for name in ("gram", "cross", "sum_x", "sum_y", "sum_yy")]


def test_one_position_is_too_few() -> None:
    moments = moments_of(GEOMETRIES["1x1"], np.ones((1, 1, 1, 2)), np.ones((1, 1, 1, 2)))
    with pytest.raises(CalibrationError, match="at least 2 output positions; give more calibration images"):
        moments.centred()


# Separable


def samples_of(window: Window, x: np.ndarray, y: np.ndarray, n_positions: int = EVERY) -> Samples:
    samples = Samples.empty(window, x.shape[-1], y.shape[-1])
    half = len(x) // 2
    for part in (slice(0, half), slice(half, None)):
        samples.add(draw(samples.window, x[part], y[part], n_positions=n_positions, rng=np.random.default_rng(0)))
    return samples


def predict(samples: Samples, depthwise: np.ndarray, pointwise: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return np.einsum("ntc,tc,co->no", samples.patches.astype("float64"), depthwise, pointwise) + bias


@pytest.mark.parametrize("name", ["3x3 same", "stride 2, padded at one side"])
def test_a_true_depthwise_pointwise_pair_is_found(name: str) -> None:
    window = GEOMETRIES[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 9, 10, 4))
    depthwise = affine.from_depthwise(
        rng.normal(size=(*window.kernel_size, 4, 1)), rng.normal(size=4), strides=window.strides, padding=window.padding
    )
    pair = (depthwise, random_map(rng, 1, 4, 6))
    y = affine.apply(pair[1], affine.apply(pair[0], x))
    samples = samples_of(window, x, y)
    found = samples.fit_depthwise_pointwise(samples.outputs)
    assert [array.shape for array in found] == [(9, 4), (4, 6), (6,)]
    r2 = samples.explained(predict(samples, *found))
    assert r2 > 0.999
    other = np.random.default_rng(1).normal(size=x.shape)
    unseen = samples_of(window, other, affine.apply(pair[1], affine.apply(pair[0], other)))
    assert unseen.explained(predict(unseen, *found)) > 0.999


def test_the_separable_fit_is_never_worse_than_its_pointwise_start() -> None:
    for seed in range(8):
        window = GEOMETRIES["3x3 same" if seed % 2 else "5x5 stride 2"]
        x, y = curved(window, seed=seed)
        samples = samples_of(window, x, y)
        r2 = []
        for n_rounds in (0, 1, 2, 4):
            found = samples.fit_depthwise_pointwise(samples.outputs, n_rounds=n_rounds)
            r2.append(samples.explained(predict(samples, *found)))
        pixel = samples.patches[:, samples._middle_tap()].astype("float64")
        best = np.linalg.lstsq(np.c_[pixel, np.ones(len(pixel))], samples.outputs, rcond=None)[0]
        pointwise = samples.explained(np.c_[pixel, np.ones(len(pixel))] @ best)
        assert r2[0] == pytest.approx(pointwise, abs=2e-3)  # the ridge and float32
        # Each round minimises the residual; the ridges of 1e-4 may move it by as much.
        assert all(after >= before - 1e-3 for before, after in zip(r2, r2[1:], strict=False))
        assert r2[-1] > r2[0]


def test_the_separable_fit_survives_dead_channels_and_constant_outputs() -> None:
    window = GEOMETRIES["3x3 same"]
    x, y = curved(window)
    x[..., 0] = 0.0
    y[..., 1] = 5.0
    samples = samples_of(window, x, y)
    found = samples.fit_depthwise_pointwise(samples.outputs)
    assert all(np.isfinite(array).all() for array in found)
    np.testing.assert_allclose(predict(samples, *found)[:, 1], 5.0, atol=1e-3)
    empty = samples_of(window, np.zeros_like(x), y)
    found = empty.fit_depthwise_pointwise(empty.outputs)
    np.testing.assert_allclose(predict(empty, *found), np.broadcast_to(y.mean(axis=(0, 1, 2)), empty.outputs.shape))


def test_samples_of_a_smaller_window_are_the_same_positions() -> None:
    large = Window((5, 5), (2, 2), (2, 2, 2, 2))
    x, y = curved(large)
    for small in (Window((3, 3), (2, 2), (1, 1, 1, 1)), Window((1, 1), (2, 2), (0, 0, 0, 0))):
        cropped, direct = samples_of(large, x, y, 40).crop(small), samples_of(small, x, y, 40)
        np.testing.assert_array_equal(cropped.patches, direct.patches)
        np.testing.assert_array_equal(cropped.outputs, direct.outputs)
    with pytest.raises(ShapeError, match="is no part of"):
        direct.crop(large)


def test_samples_know_what_a_convolution_writes() -> None:
    window = GEOMETRIES["5x5 stride 2"]
    one = in_window(window, np.random.default_rng(0), 3, 4)
    x = np.random.default_rng(1).normal(size=(4, 9, 10, 3))
    samples = samples_of(window, x, affine.apply(one, x))
    np.testing.assert_allclose(samples.convolve(one), samples.outputs, atol=1e-4)  # patches are float32


def test_samples_know_what_the_skip_writes() -> None:
    rng = np.random.default_rng(0)
    window = GEOMETRIES["stride 2, padded at one side"]
    x = rng.normal(size=(4, 8, 8, 3))
    skip = replace(random_map(rng, 1, 3, 5), strides=(2, 2))
    y = affine.apply(skip, x)
    samples = samples_of(window, x, y)
    np.testing.assert_allclose(samples.skip(skip), samples.outputs, atol=1e-5)  # patches are float32
    assert samples.explained(samples.skip(skip)) == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(ShapeError, match="The pixel that the skip reads lies outside"):
        Samples.empty(Window((1, 1), (1, 1), (1, 0, 0, 0)), 3, 5).skip(skip)


# Starts without images


def _stages(rng: np.random.Generator, activation: str, c_mid: int = 6) -> tuple[Stage, Stage]:
    """A pointwise layer whose outputs on white noise are independent normals, an activation, another layer."""
    directions = np.linalg.qr(rng.normal(size=(c_mid, c_mid)))[0]
    std, mean = rng.uniform(0.3, 2.0, size=c_mid), rng.normal(size=c_mid)
    first = AffineConv((directions * std)[None, None], mean)
    second = random_map(rng, 3, c_mid, 4, padding=1)
    return Stage((first,), Activation(activation), mean, std), Stage((second,))


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "hard_silu", "silu", "gelu", "sigmoid", "tanh"])
def test_gaussian_slopes_are_the_regression_on_sampled_normals(activation: str) -> None:
    rng = np.random.default_rng(0)
    stage, last = _stages(rng, activation)
    found = gaussian_start((stage, last))

    x = rng.normal(size=(100_000, 1, 1, 6))
    z = affine.apply(stage.maps[0], x)[:, 0, 0]
    f = stage.activation(z)
    for c in range(6):
        slope, offset = np.polyfit(z[:, c], f[:, c], 1)
        want = slope * z[:, c] + offset
        have = affine.apply(found.maps[0], x)[:, 0, 0, c]
        # 100,000 samples: slopes and offsets are known to about 1 %
        assert np.abs(have - want).max() <= 0.03 * max(1.0, np.abs(want).max())
    assert found.maps[1] is last.maps[0]

    lines = affine.apply(found.maps[0], x)[:, 0, 0]
    share = 1.0 - np.square(f - lines).mean(axis=0) / f.var(axis=0)
    weight = f.var(axis=0) * np.square(last.maps[0].kernel).sum(axis=(0, 1, 3))
    assert found.explained == pytest.approx(float((share * weight).sum() / weight.sum()), abs=0.01)


def test_gaussian_beats_identity_on_its_own_ground() -> None:
    rng = np.random.default_rng(1)
    stages = _stages(rng, "relu")
    x = rng.normal(size=(50, 8, 8, 6))
    y = affine.apply(stages[1].maps[0], stages[0].activation(affine.apply(stages[0].maps[0], x)))

    def error(maps) -> float:
        return float(
            np.square(affine.apply(maps[1], affine.apply(maps[0], x)) - y).sum() / np.square(y - y.mean()).sum()
        )

    by_identity, by_gaussian = identity_start(stages), gaussian_start(stages)
    assert by_identity.maps == (*stages[0].maps, *stages[1].maps) and by_identity.explained is None
    assert error(by_gaussian.maps) < 0.5 * error(by_identity.maps)


def test_a_grouped_reader_weighs_the_channels_it_reads() -> None:
    rng = np.random.default_rng(0)
    depthwise = affine.from_depthwise(rng.normal(size=(3, 3, 4, 2)), np.zeros(8))
    np.testing.assert_allclose(
        starts._read_energy(depthwise), np.square(affine.regroup(depthwise, 1).kernel).sum(axis=(0, 1, 3))
    )
    grouped = random_map(rng, 3, 6, 4, groups=2)
    np.testing.assert_allclose(
        starts._read_energy(grouped), np.square(affine.regroup(grouped, 1).kernel).sum(axis=(0, 1, 3))
    )


def test_shares_of_several_activations_multiply() -> None:
    rng = np.random.default_rng(0)
    first, last = _stages(rng, "relu")
    once = gaussian_start((first, last)).explained
    closed = gaussian_start((first,)).explained  # nobody reads it: weighted by variance alone
    both = gaussian_start((first, first, last)).explained
    between = gaussian_start((first, Stage(first.maps))).explained
    assert both == pytest.approx(once * between)
    assert 0 < both < once < 1 and 0 < closed < 1


def test_no_norm_needs_images() -> None:
    stage = Stage((random_map(np.random.default_rng(0), 1, 3, 3),), Activation("relu"))
    with pytest.raises(CalibrationError, match="'relu' has no normalization in front .* needs calibration images"):
        gaussian_start((stage,))
    assert gaussian_start((Stage(stage.maps),)).explained == 1.0


def test_centred_is_a_frozen_value() -> None:
    x, y = curved(GEOMETRIES["1x1"])
    centred = moments_of(GEOMETRIES["1x1"], x, y).centred()
    assert isinstance(centred, Centred) and (centred.c_in, centred.c_out) == (3, 4)
    with pytest.raises(AttributeError):
        centred.gram = None


# The oracle: numpy's least squares on centred patches with sqrt(ridge) * I below them


def augmented(patches, target, ridge, *, prior=None, weights=None):
    """Predictions of a ridge regression towards a prior, by numpy's least squares; positions may have weights."""
    weights = np.ones(len(patches)) if weights is None else weights
    mean_x, mean_y = (np.average(one, axis=0, weights=weights) for one in (patches, target))
    a, b = patches - mean_x, target - mean_y
    root = np.sqrt(weights / weights.sum())[:, None]
    pull = np.sqrt(ridge * np.linalg.eigvalsh((root * a).T @ (root * a)).mean())
    prior = np.zeros((a.shape[1], b.shape[1])) if prior is None else prior
    found = np.linalg.lstsq(
        np.concatenate([root * a, pull * np.eye(a.shape[1])]), np.concatenate([root * b, pull * prior]), rcond=None
    )[0]
    return a @ found + mean_y


def assert_predicts(have: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(have - want).max() <= 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("window", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("with_prior", [False, True])
def test_conjugate_gradients_find_what_least_squares_finds(window: Window, with_prior: bool) -> None:
    x, y = curved(window, c_out=3)
    x = x.astype("float32").astype("float64")  # samples are float32
    prior = np.random.default_rng(1).normal(size=(3 * window.n_taps, 3)) if with_prior else None
    samples = samples_of(window, x, y)
    weights, bias = samples.ridge_regression(prior=prior, ridge=1e-2, n_steps=500, tolerance=1e-20)
    patches = flat(window, x)
    assert_predicts(patches @ weights + bias, augmented(patches, y.reshape(-1, 3), 1e-2, prior=prior))


def test_a_linear_block_is_recovered_by_conjugate_gradients() -> None:
    window = GEOMETRIES["3x3 same"]
    rng = np.random.default_rng(3)
    truth = in_window(window, rng, 3, 4)
    x = rng.normal(size=(20, 9, 10, 3)).astype("float32").astype("float64")
    weights, bias = samples_of(window, x, affine.apply(truth, x)).ridge_regression(
        ridge=0.0, n_steps=500, tolerance=1e-24
    )
    np.testing.assert_allclose(weights, truth.kernel.reshape(-1, 4), atol=1e-8)
    np.testing.assert_allclose(bias, truth.bias, atol=1e-8)


@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_a_scale_is_each_channels_own_least_squares(prior: float) -> None:
    window = GEOMETRIES["1x1"]
    x, y = curved(window, c_out=3)
    centred = moments_of(window, x, y).centred()
    for ridge in (0.0, 1e-2):
        scale = centred.scale_regression(prior=prior, ridge=ridge)
        have = x.reshape(-1, 3) * scale + centred.bias_of(np.diag(scale))
        # The ridge is in mean eigenvalues of all channels: rescaled, so that each alone gets the same pull.
        own = np.diag(centred.gram)
        for c in range(3):
            one = x.reshape(-1, 3)[:, c : c + 1], y.reshape(-1, 3)[:, c : c + 1]
            want = augmented(*one, ridge * centred.mean_eigenvalue / own[c], prior=np.full((1, 1), prior))
            assert_predicts(have[:, c : c + 1], want)


def test_a_channelwise_block_is_recovered_and_dead_channels_keep_the_prior() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 9, 10, 4))
    x[..., 2] = 0.0
    scale, shift = rng.normal(size=4), rng.normal(size=4)
    centred = moments_of(GEOMETRIES["1x1"], x, x * scale + shift).centred()
    found = centred.scale_regression(prior=1.0, ridge=0.0)
    alive = [0, 1, 3]
    np.testing.assert_allclose(found[alive], scale[alive], atol=1e-8)
    np.testing.assert_allclose(centred.bias_of(np.diag(found)), shift, atol=1e-8)
    assert found[2] == 1.0
    with pytest.raises(ShapeError, match="A scale maps a channel to itself: 3 to 4 channels"):
        moments_of(GEOMETRIES["1x1"], *curved(GEOMETRIES["1x1"])).centred().scale_regression(prior=0.0)


@pytest.mark.parametrize("name", ["3x3 same", "5x5 stride 2"])
def test_the_pointwise_half_of_a_separable_fit_is_least_squares(name: str) -> None:
    window = GEOMETRIES[name]
    x, y = curved(window)
    x = x.astype("float32").astype("float64")
    samples = samples_of(window, x, y)
    # Powers of two: the depthwise sums are exact in float32, so that only the solve is compared.
    start = 2.0 ** np.random.default_rng(0).integers(-2, 2, size=(window.n_taps, 3))
    start[1:] = 0.0
    depthwise, pointwise, bias = samples.fit_depthwise_pointwise(samples.outputs, start=start, ridge=1e-2, n_rounds=0)
    np.testing.assert_array_equal(depthwise, start)
    features = np.einsum("ntc,tc->nc", samples.patches.astype("float64"), start)
    assert_predicts(features @ pointwise + bias, augmented(features, samples.outputs, 1e-2))


def test_whole_images_and_patches_are_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where patches would be larger than the images they are cut from, the images are kept."""
    monkeypatch.setattr(samples_module, "BYTES_IN_CACHE", 1)  # one image at a time
    monkeypatch.setattr(windows, "BYTES_AT_ONCE", 4 * 7 * 9 * 3)  # seven patches at a time
    rng = np.random.default_rng(0)
    for window in (GEOMETRIES["3x3 same"], GEOMETRIES["stride 2, padded at one side"]):
        x, y = curved(window)
        few, many = Samples.empty(window, 3, 4), Samples.empty(window, 3, 4)
        for part in (slice(0, 4), slice(4, 6)):
            few.add(draw(few.window, x[part], y[part], n_positions=9, rng=rng))
            many.add(draw(many.window, x[part], y[part], n_positions=70, rng=np.random.default_rng(part.start)))
        assert [part.images is None for part in (*few._parts, *many._parts)] == [True, True, False, False]
        direct = [
            draw(window, x[part], y[part], n_positions=70, rng=np.random.default_rng(part.start))
            for part in (slice(0, 4), slice(4, 6))
        ]
        patches = np.concatenate([one.patches() for one in direct]).astype("float32")
        np.testing.assert_array_equal(many.patches, patches)
        np.testing.assert_array_equal(many.outputs, np.concatenate([one.outputs for one in direct]))
        for samples in (few, many):
            kernel, values = rng.normal(size=(window.n_taps, 3)), rng.normal(size=(samples.n, 3))
            patches = samples.patches.astype("float64")
            np.testing.assert_allclose(samples.depthwise(kernel), np.einsum("ntc,tc->nc", patches, kernel), atol=1e-4)
            np.testing.assert_allclose(samples.correlate(values), np.einsum("ntc,nc->tc", patches, values), atol=1e-3)
            squares = np.einsum("ntc,ntc,nc->tc", patches, patches, values)
            np.testing.assert_allclose(samples.correlate(values, squared=True), squares, atol=1e-2)
            np.testing.assert_allclose(samples.mean_patch(), patches.mean(axis=0), atol=1e-5)
            one = random_map(rng, window.kernel_size, 3, 2)
            np.testing.assert_allclose(
                samples.convolve(one), patches.reshape(samples.n, -1) @ one.kernel.reshape(-1, 2) + one.bias, atol=1e-4
            )


# Tokens


def token_case(n: int = 12, tokens: int = 17, c: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Tokens as images one pixel wide; the first behaves in another way than the others."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, tokens, 1, c)).astype("float32").astype("float64")
    x[:, 0] += 2.0
    y = x @ rng.normal(size=(c, 3)) + 0.1 * rng.normal(size=(n, tokens, 1, 3))
    y[:, 0] = x[:, 0] @ rng.normal(size=(c, 3)) + 1.0
    return x, y


@pytest.mark.parametrize("special", [(0,), (0, 1), (-1,), ()])
def test_special_tokens_weigh_as_much_as_all_patches(special: tuple[int, ...]) -> None:
    x, y = token_case()
    window = GEOMETRIES["1x1"]
    moments, samples = Moments(window, 4, 3), Samples.empty(window, 4, 3)
    for evidence in (moments, samples):
        for part in (slice(0, 5), slice(5, 12)):
            options = {"n_positions": EVERY, "rng": np.random.default_rng(0), "special_rows": special}
            evidence.add(draw(window, x[part], y[part], **options))
    weights = np.ones((12, 17))
    if special:
        weights[:, list(special)] = (17 - len(special)) / len(special)
    patches, target, weights = x.reshape(-1, 4), y.reshape(-1, 3), weights.ravel()
    assert moments.n == pytest.approx(weights.sum()) == pytest.approx(samples.weights.sum())
    want = augmented(patches, target, 1e-3, weights=weights)
    centred = moments.centred()
    solved = centred.ridge_regression(ridge=1e-3)
    assert_predicts(patches @ solved + centred.bias_of(solved), want)
    by_steps, bias = samples.ridge_regression(ridge=1e-3, n_steps=200, tolerance=1e-20)
    assert_predicts(patches @ by_steps + bias, want)
    mean = np.average(target, axis=0, weights=weights)
    total = np.average(np.square(target - mean).sum(axis=1), weights=weights)
    r2 = 1 - np.average(np.square(target - want).sum(axis=1), weights=weights) / total
    assert centred.explained(solved) == pytest.approx(r2, abs=1e-9)
    one = AffineConv(solved[None, None], centred.bias_of(solved))
    assert samples.explained(samples.convolve(one)) == pytest.approx(r2, abs=1e-5)


def test_one_class_token_is_visible_to_a_weighted_fit_only() -> None:
    x, y = token_case(n=40, tokens=197)
    errors = []
    for special in ((), (0,)):
        moments = Moments(GEOMETRIES["1x1"], 4, 3)
        moments.add(draw(moments.window, x, y, n_positions=2000, rng=np.random.default_rng(0), special_rows=special))
        centred = moments.centred()
        weights = centred.ridge_regression(ridge=1e-6)
        errors.append(np.square(x[:, 0, 0] @ weights + centred.bias_of(weights) - y[:, 0, 0]).mean())
    assert errors[1] < 0.7 * errors[0]
