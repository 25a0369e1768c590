"""Element-wise functions by name, and the straight line closest to each under a normal distribution.

`ACTIVATIONS` holds every function this package knows, with the parameters and defaults of `keras.activations`. A
function made of polynomials has closed-form moments; the others are integrated numerically. No Keras.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from math import inf, isfinite
from typing import NamedTuple

import numpy as np
from scipy import special

from updp_tf.errors import ModelError


@dataclass(frozen=True)
class Activation:
    """An element-wise function: a name of `ACTIVATIONS` and its parameters; equal if it is the same function.

    Attributes:
        name: as in `keras.activations`; the aliases `swish` and `hard_swish` are replaced.
        parameters: pairs of name and value; those left out get Keras' defaults.

    Raises:
        ModelError: the name or a parameter is unknown, or a value makes no function.

    Example:
        >>> Activation("relu", (("max_value", 2.0),))(np.array([-1.0, 1.0, 3.0]))
        array([0., 1., 2.])
        >>> Activation("swish") == Activation("silu")
        True
    """

    name: str
    parameters: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        name = ALIASES.get(self.name, self.name)
        if name not in ACTIVATIONS:
            raise ModelError(f"Unknown activation '{self.name}'. Known: {', '.join(sorted(ACTIVATIONS))}")
        known = {key: parameter.default for key, parameter in signature(ACTIVATIONS[name]).parameters.items()}
        given = {key: float(value) for key, value in dict(self.parameters).items()}
        if unknown := sorted(set(given) - set(known)):
            raise ModelError(f"'{name}' has the parameters {sorted(known)}. Received: {unknown}")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "parameters", tuple({**known, **given}.items()))
        ACTIVATIONS[name](**dict(self.parameters))

    @property
    def function(self) -> Function:
        """What computes it: `Pieces` or `Smooth`."""
        return ACTIVATIONS[self.name](**dict(self.parameters))

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Return the function of every element, in float64."""
        return self.function(np.asarray(z, dtype=np.float64))


@dataclass(frozen=True)
class OwnActivation(Activation):
    """An element-wise function of the user's: a NumPy function that is smooth but at 0.

    Attributes:
        own: returns the function of every element of a float64 array.
    """

    own: Callable[[np.ndarray], np.ndarray] = np.asarray

    def __post_init__(self) -> None:
        pass  # the name is not one of `ACTIVATIONS`

    @property
    def function(self) -> Smooth:
        """What computes it."""
        return Smooth(self.own)


def make_activation(name: str, **parameters: float) -> Activation | None:
    """Return the named function, or None if this package does not know the name.

    Raises:
        ModelError: the name is known, but a parameter is not, or makes no function.
    """
    if ALIASES.get(name, name) not in ACTIVATIONS:
        return None
    return Activation(name, tuple(parameters.items()))


class GaussianMoments(NamedTuple):
    """Moments of f(z) for normal z, per channel: E f, E (z - E z) f, Var f."""

    mean: np.ndarray
    covariance: np.ndarray
    variance: np.ndarray


class GaussianFit(NamedTuple):
    """The line `slope * z + offset` closest to f(z), and the part of Var f that it explains, per channel."""

    slope: np.ndarray
    offset: np.ndarray
    explained: np.ndarray


def gaussian_moments(activation: Activation, mean: np.ndarray, std: np.ndarray) -> GaussianMoments:
    """Return E f, Cov(z, f) and Var f for z ~ N(mean, std^2).

    Exact for piecewise polynomials; for the others to about 1e-12 up to std 10 and 1e-9 at std 50, relative to std.

    Args:
        activation: f.
        mean: of z, shape (channels,).
        std: of z, shape (channels,), not negative.

    Raises:
        ModelError: `mean` or `std` is not finite, or `std` is negative.
    """
    mean, std = np.broadcast_arrays(np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64))
    if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(std)) and np.all(std >= 0)):
        raise ModelError("The means and standard deviations of a pre-activation must be finite, the latter not < 0.")
    function = activation.function
    # Moments of g = f(z) - f(mean): for a saturated channel E f^2 - (E f)^2 would cancel to noise.
    first, with_t, second = function.centred_moments(mean, std)
    return GaussianMoments(function(mean) + first, std * with_t, np.maximum(second - first**2, 0.0))


def gaussian_fit(activation: Activation, mean: np.ndarray, std: np.ndarray) -> GaussianFit:
    """Return the best affine stand-in `a * z + c` of f in mean square, for z ~ N(mean, std^2).

    a = E[(z - mean) f(z)] / std^2 (which is E f' by Stein's lemma), c = E f - a * mean, explained = a^2 std^2 / Var f.
    A constant pre-activation (std 0) is replaced by its value, f(mean), with slope 0; a constant output (Var f = 0,
    a dead or saturated channel) counts as fully explained.

    Args:
        activation: f.
        mean: of z, shape (channels,); for a BatchNorm its beta.
        std: of z, shape (channels,); for a BatchNorm |gamma| * sqrt(variance / (variance + epsilon)).

    Returns:
        Slope, offset and explained part (0 to 1), each of shape (channels,).

    Raises:
        ModelError: `mean` or `std` is not finite, or `std` is negative.

    Source: METHOD section 2, `gaussian`.

    Example:
        >>> slope, offset, explained = gaussian_fit(Activation("relu"), np.zeros(1), np.ones(1))
        >>> slope.round(4), offset.round(4), explained.round(4)
        (array([0.5]), array([0.3989]), array([0.7335]))
    """
    moments = gaussian_moments(activation, mean, std)
    mean, std = np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)
    spread = std > 0
    # Divided twice: the square of a tiny std is 0.
    correlation = moments.covariance / np.where(spread, std, 1.0)
    slope = np.where(spread, correlation / np.where(spread, std, 1.0), 0.0)
    varies = moments.variance > 0
    explained = np.where(varies, correlation**2 / np.where(varies, moments.variance, 1.0), 1.0)
    return GaussianFit(slope, moments.mean - slope * mean, np.clip(explained, 0.0, 1.0))


Moments = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Pieces:
    """A piecewise polynomial of degree 2 or less.

    Attributes:
        breaks: where one piece ends, ascending; a break belongs to the piece on its left.
        coefficients: (c0, c1, c2) of c0 + c1 z + c2 z^2 for every piece, one more than breaks.
    """

    breaks: tuple[float, ...]
    coefficients: tuple[tuple[float, float, float], ...]

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Return the polynomial of the piece that every element lies in."""
        out = _polynomial(self.coefficients[0], z)
        for left, coefficients in zip(self.breaks, self.coefficients[1:], strict=True):
            out = np.where(z > left, _polynomial(coefficients, z), out)
        return out

    def centred_moments(self, mean: np.ndarray, std: np.ndarray) -> Moments:
        """Return E g, E t g and E g^2 of g(t) = f(mean + std * t) - f(mean) for standard normal t; closed form."""
        at_mean = self(mean)
        scale = np.where(std > 0, std, 1.0)
        edges = [(edge - mean) / scale for edge in (-inf, *self.breaks, inf)]
        first, with_t, second = (np.zeros(mean.shape) for _ in range(3))
        for lower, upper, (c0, c1, c2) in zip(edges, edges[1:], self.coefficients, strict=False):
            m = _truncated_moments(lower, upper)
            g0 = _polynomial((c0, c1, c2), mean) - at_mean
            g1 = std * (c1 + 2 * c2 * mean)
            g2 = std**2 * c2
            first += g0 * m[0] + g1 * m[1] + g2 * m[2]
            with_t += g0 * m[1] + g1 * m[2] + g2 * m[3]
            second += g0**2 * m[0] + 2 * g0 * g1 * m[1] + (g1**2 + 2 * g0 * g2) * m[2]
            second += 2 * g1 * g2 * m[3] + g2**2 * m[4]
        constant = std == 0
        return (np.where(constant, 0.0, first), np.where(constant, 0.0, with_t), np.where(constant, 0.0, second))


@dataclass(frozen=True)
class Smooth:
    """A function that is smooth but at 0, and has its only features near 0."""

    function: Callable[[np.ndarray], np.ndarray]

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Return the function of every element."""
        return self.function(z)

    def centred_moments(self, mean: np.ndarray, std: np.ndarray) -> Moments:
        """Return E g, E t g and E g^2 of g(t) = f(mean + std * t) - f(mean) for standard normal t, by quadrature.

        Gauss-Legendre on both sides of z = 0, where a kink may be and where its nodes are densest. Gauss-Hermite
        errs by 2e-3 on SELU's kink with 64 nodes, and as much on a SiLU at std 10, which looks like a kink to it.
        """
        zero = np.clip(-mean / np.where(std > 0, std, 1.0), -_REACH, _REACH)
        at_mean = self(mean)
        first, with_t, second = (np.zeros(mean.shape) for _ in range(3))
        reach = np.full(mean.shape, _REACH)
        for lower, upper in ((-reach, zero), (zero, reach)):
            half = (upper - lower) / 2
            for node, node_weight in zip(*_LEGENDRE, strict=True):
                t = lower + half * (node + 1)
                weight = node_weight * half * _density(t)
                g = self(mean + std * t) - at_mean
                first += weight * g
                with_t += weight * t * g
                second += weight * g**2
        return first, with_t, second


Function = Pieces | Smooth

_REACH = 9.0
"""Standard deviations that are integrated over; 2e-19 of the mass lies outside."""

_LEGENDRE = np.polynomial.legendre.leggauss(100)


def _density(t: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * t**2) / np.sqrt(2 * np.pi)


def _polynomial(coefficients: tuple[float, float, float], z: np.ndarray) -> np.ndarray:
    c0, c1, c2 = coefficients
    return c0 + z * (c1 + z * c2)


def _truncated_moments(lower: np.ndarray, upper: np.ndarray) -> list[np.ndarray]:
    """Return E t^k 1(lower < t < upper) for k = 0 to 4 and standard normal t.

    By parts: m_k = (k - 1) m_{k-2} + lower^(k-1) density(lower) - upper^(k-1) density(upper).
    """
    # The density underflows to 0 at 39; this keeps infinite edges out of 0 * inf.
    lower, upper = np.clip(lower, -40.0, 40.0), np.clip(upper, -40.0, 40.0)
    # In the upper tail 1 - small would lose the digits of small.
    mass = np.where(lower > 0, special.ndtr(-lower) - special.ndtr(-upper), special.ndtr(upper) - special.ndtr(lower))
    below, above = _density(lower), _density(upper)
    moments = [mass, below - above]
    for k in range(2, 5):
        moments.append((k - 1) * moments[k - 2] + lower ** (k - 1) * below - upper ** (k - 1) * above)
    return moments


# The functions


def _relu(negative_slope: float = 0.0, max_value: float = inf, threshold: float = 0.0) -> Pieces:
    if not (threshold >= 0 and isfinite(threshold) and max_value >= 0 and isfinite(negative_slope)):
        raise ModelError(
            "A ReLU needs a finite negative_slope, a finite threshold >= 0 and max_value >= 0. Received: "
            f"negative_slope={negative_slope}, threshold={threshold}, max_value={max_value}"
        )
    below, linear = (0.0 - negative_slope * threshold, negative_slope, 0.0), (0.0, 1.0, 0.0)
    if max_value == inf:
        return Pieces((threshold,), (below, linear))
    return Pieces((threshold, max(threshold, max_value)), (below, linear, (max_value, 0.0, 0.0)))


def _leaky_relu(negative_slope: float = 0.2) -> Pieces:
    return _relu(negative_slope)


def _elu(alpha: float = 1.0) -> Smooth:
    return Smooth(lambda z: np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0.0))))


def _selu() -> Smooth:
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    return Smooth(lambda z: scale * np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0.0))))


def _gelu(approximate: float = 0.0) -> Smooth:
    if approximate:
        return Smooth(lambda z: 0.5 * z * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3))))
    return Smooth(lambda z: z * special.ndtr(z))


ACTIVATIONS: Mapping[str, Callable[..., Function]] = {
    "linear": lambda: Pieces((), ((0.0, 1.0, 0.0),)),
    "relu": _relu,
    "relu6": lambda: _relu(max_value=6.0),
    "leaky_relu": _leaky_relu,
    "hard_tanh": lambda: Pieces((-1.0, 1.0), ((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))),
    "hard_sigmoid": lambda: Pieces((-3.0, 3.0), ((0.0, 0.0, 0.0), (1 / 2, 1 / 6, 0.0), (1.0, 0.0, 0.0))),
    "hard_silu": lambda: Pieces((-3.0, 3.0), ((0.0, 0.0, 0.0), (0.0, 1 / 2, 1 / 6), (0.0, 1.0, 0.0))),
    "sigmoid": lambda: Smooth(special.expit),
    "tanh": lambda: Smooth(np.tanh),
    "silu": lambda: Smooth(lambda z: z * special.expit(z)),
    "gelu": _gelu,
    "elu": _elu,
    "selu": _selu,
    "softplus": lambda: Smooth(lambda z: np.logaddexp(0.0, z)),
    "mish": lambda: Smooth(lambda z: z * np.tanh(np.logaddexp(0.0, z))),
}
"""Every function by its name in `keras.activations`; the builder's arguments are its parameters and defaults."""

ALIASES: Mapping[str, str] = {"swish": "silu", "hard_swish": "hard_silu"}
