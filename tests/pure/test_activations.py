"""Gaussian fits of activations against adaptive integration with break points and against least squares."""

from __future__ import annotations

import doctest
from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate, special

from updp_tf import activations
from updp_tf.activations import (
    ACTIVATIONS,
    ALIASES,
    Activation,
    Pieces,
    gaussian_fit,
    gaussian_moments,
    make_activation,
)
from updp_tf.errors import ModelError

PIECEWISE = [
    Activation("linear"),
    Activation("relu"),
    Activation("relu", (("max_value", 1.5), ("negative_slope", 0.1), ("threshold", 0.5))),
    Activation("relu", (("max_value", 0.25), ("threshold", 1.0))),
    Activation("relu6"),
    Activation("leaky_relu"),
    Activation("hard_tanh"),
    Activation("hard_sigmoid"),
    Activation("hard_silu"),
]
SMOOTH = [Activation(name) for name in ("sigmoid", "tanh", "silu", "gelu", "elu", "selu", "softplus", "mish")] + [
    Activation("gelu", (("approximate", 1.0),)),
    Activation("elu", (("alpha", 0.3),)),
]
EVERY = PIECEWISE + SMOOTH

# Where features of every function are: kinks, or the places where a smooth one bends.
LANDMARKS = (-10, -6, -3, -1, -0.5, 0, 0.25, 0.5, 1, 1.5, 3, 6, 10)
MEANS = np.array([-7.0, -2.5, -0.4, 0.0, 0.9, 3.0, 8.0])
STDS = np.array([0.02, 0.3, 1.0, 4.0])


def name_of(activation: Activation) -> str:
    return activation.name + "".join(f"-{value:g}" for _, value in activation.parameters)


def integrate_moments(activation: Activation, mean: float, std: float) -> tuple[float, float, float]:
    """E f, Cov(z, f) and Var f, integrated piece by piece, about f's value at the mean."""
    at_mean = float(activation(np.array(mean)))
    inner = sorted({float(np.clip((z - mean) / std, -13, 13)) for z in LANDMARKS} | {-13.0, -3.0, 0.0, 3.0, 13.0})

    def expect(power_t: int, power_f: int) -> float:
        def integrand(t: float) -> float:
            f = float(activation(np.array(mean + std * t))) - at_mean
            return t**power_t * f**power_f * np.exp(-t * t / 2) / np.sqrt(2 * np.pi)

        return sum(integrate.quad(integrand, a, b, epsabs=1e-14, epsrel=1e-12)[0] for a, b in pairwise(inner))

    first = expect(0, 1)
    return at_mean + first, std * expect(1, 1), expect(0, 2) - first**2


@pytest.mark.parametrize("activation", EVERY, ids=name_of)
@pytest.mark.parametrize("std", STDS)
def test_moments_agree_with_adaptive_integration(activation: Activation, std: float) -> None:
    moments = gaussian_moments(activation, MEANS, np.full(MEANS.shape, std))
    fit = gaussian_fit(activation, MEANS, np.full(MEANS.shape, std))
    for i, mean in enumerate(MEANS):
        expected_mean, covariance, variance = integrate_moments(activation, float(mean), float(std))
        assert moments.mean[i] == pytest.approx(expected_mean, abs=1e-10)
        assert moments.covariance[i] == pytest.approx(covariance, abs=1e-10)
        assert moments.variance[i] == pytest.approx(variance, abs=1e-10)
        slope = covariance / std**2
        assert fit.slope[i] == pytest.approx(slope, abs=1e-10)
        assert fit.offset[i] == pytest.approx(expected_mean - slope * mean, abs=1e-9)
        if variance > 1e-9:
            assert fit.explained[i] == pytest.approx(covariance**2 / std**2 / variance, abs=1e-7)


@pytest.mark.parametrize("activation", EVERY, ids=name_of)
def test_fit_is_least_squares_on_normal_samples(activation: Activation) -> None:
    # Samples at the quantiles of the normal distribution: no noise but what the outermost of them leave out.
    t = special.ndtri((np.arange(100_000) + 0.5) / 100_000)
    for mean, std in ((0.0, 1.0), (-1.0, 2.0), (1.5, 0.7), (2.0, 4.0)):
        z = mean + std * t
        f = activation(z)
        solution, residual, _, _ = np.linalg.lstsq(np.stack([z, np.ones_like(z)], axis=1), f, rcond=None)
        fit = gaussian_fit(activation, np.array([mean]), np.array([std]))
        assert fit.slope[0] == pytest.approx(solution[0], abs=1e-3)
        assert fit.offset[0] == pytest.approx(solution[1], abs=2e-3)
        assert fit.explained[0] == pytest.approx(1 - residual[0] / np.sum((f - f.mean()) ** 2), abs=1e-3)


def test_closed_forms_that_are_known() -> None:
    mean, std = np.array([0.7, -1.2]), np.array([1.3, 0.4])
    relu = gaussian_moments(Activation("relu"), mean, std)
    ratio = mean / std
    density = np.exp(-(ratio**2) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(relu.mean, mean * special.ndtr(ratio) + std * density, rtol=1e-12)
    # Stein: E[(z - mean) f] = std^2 E f', and ReLU' is 1 where z > 0.
    np.testing.assert_allclose(gaussian_fit(Activation("relu"), mean, std).slope, special.ndtr(ratio), rtol=1e-12)
    linear = gaussian_fit(Activation("linear"), mean, std)
    np.testing.assert_allclose(linear.slope, 1.0, rtol=1e-14)
    np.testing.assert_allclose(linear.offset, 0.0, atol=1e-14)
    np.testing.assert_allclose(linear.explained, 1.0, rtol=1e-14)


@pytest.mark.parametrize("activation", EVERY, ids=name_of)
def test_limits(activation: Activation) -> None:
    mean = np.array([-30.0, -0.7, 0.0, 0.7, 2.0, 30.0])
    constant = gaussian_fit(activation, mean, np.zeros(6))
    np.testing.assert_array_equal(constant.slope, 0.0)
    np.testing.assert_array_equal(constant.offset, activation(mean))
    np.testing.assert_array_equal(constant.explained, 1.0)
    # Narrow: the tangent, away from kinks.
    for std in (1e-3, 1e-6):
        narrow = gaussian_fit(activation, np.array([2.0]), np.array([std]))
        tangent = (activation(np.array([2.0 + 1e-6])) - activation(np.array([2.0 - 1e-6]))) / 2e-6
        np.testing.assert_allclose(narrow.slope, tangent, atol=2e-6)
        np.testing.assert_allclose(narrow.slope * 2 + narrow.offset, activation(np.array([2.0])), atol=2e-6)
    for std in (1e-200, 1e-8, 1.0, 1e3):
        fit = gaussian_fit(activation, mean, np.full(6, std))
        assert all(np.isfinite(part).all() for part in fit)
        assert (fit.explained >= 0).all() and (fit.explained <= 1).all()


@pytest.mark.parametrize(("name", "mean", "value"), [("relu", -60.0, 0.0), ("relu6", 60.0, 6.0), ("hard_silu", -60, 0)])
def test_dead_and_saturated_channels_are_constants(name: str, mean: float, value: float) -> None:
    fit = gaussian_fit(Activation(name), np.array([mean]), np.array([1.0]))
    assert (fit.slope[0], fit.offset[0], fit.explained[0]) == (0.0, value, 1.0)


def test_nearly_saturated_channels_do_not_cancel() -> None:
    # E f^2 - (E f)^2 of a ReLU6 at mean 12 would be 36 - 36; by symmetry it is the ReLU at mean -6.
    low = gaussian_fit(Activation("relu"), np.array([-6.0]), np.array([1.0]))
    high = gaussian_fit(Activation("relu6"), np.array([12.0]), np.array([1.0]))
    np.testing.assert_allclose(high.slope, low.slope, rtol=1e-10)
    np.testing.assert_allclose(high.explained, low.explained, rtol=1e-10)


@pytest.mark.parametrize("activation", EVERY, ids=name_of)
def test_fit_works_channel_by_channel(activation: Activation) -> None:
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=5), rng.uniform(0, 2, size=5)
    std[2] = 0
    together = gaussian_fit(activation, mean, std)
    for i in range(5):
        alone = gaussian_fit(activation, mean[i : i + 1], std[i : i + 1])
        for one, many in zip(alone, together, strict=True):
            assert one.shape == (1,) and one[0] == pytest.approx(many[i], rel=1e-12, abs=1e-15)


# Names and parameters


def test_every_name_has_a_test_and_a_function() -> None:
    assert {activation.name for activation in EVERY} == set(ACTIVATIONS)
    assert set(ALIASES.values()) <= set(ACTIVATIONS) and not set(ALIASES) & set(ACTIVATIONS)
    for activation in EVERY:
        assert isinstance(activation.function, Pieces) == (activation in PIECEWISE)


def test_equal_functions_are_equal_values() -> None:
    assert Activation("relu") == make_activation("relu", threshold=0, negative_slope=0)
    assert Activation("hard_swish") == Activation("hard_silu")
    assert Activation("relu") != make_activation("relu", negative_slope=0.1)
    first, second = (
        make_activation("relu", negative_slope=1, threshold=2),
        make_activation("relu", threshold=2, negative_slope=1),
    )
    assert first == second and hash(first) == hash(second)
    assert make_activation("softmax") is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Activation("softmax"), "Unknown activation 'softmax'. Known: elu, gelu"),
        (lambda: make_activation("elu", slope=1.0), r"'elu' has the parameters \['alpha'\]. Received: \['slope'\]"),
        (lambda: make_activation("relu", threshold=-1.0), "threshold=-1.0"),
        (lambda: make_activation("relu", max_value=-1.0), "max_value=-1.0"),
        (lambda: make_activation("relu", negative_slope=float("nan")), "negative_slope=nan"),
        (lambda: gaussian_fit(Activation("relu"), np.zeros(2), np.array([1.0, -1.0])), "not < 0"),
        (lambda: gaussian_fit(Activation("relu"), np.array([np.nan]), np.ones(1)), "must be finite"),
    ],
)
def test_bad_activations_are_refused(call, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        call()


def test_docstring_examples() -> None:
    result = doctest.testmod(activations)
    assert result.attempted > 0 and result.failed == 0
