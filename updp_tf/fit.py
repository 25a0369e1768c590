"""Fit linear maps to a block: from its own weights (identity, gaussian) or from images (least squares).

Everything about the images goes into `Moments`, the second moments of input patches and outputs: one set of moments
serves every form and every smaller kernel of a block, and their size does not depend on the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy.linalg

from updp_tf import affine
from updp_tf.activations import gaussian_fit, gaussian_moments
from updp_tf.affine import AffineConv
from updp_tf.errors import CalibrationError, ShapeError
from updp_tf.structure import Stage

RIDGE = 1e-4
"""Ridge as a fraction of the mean eigenvalue of the centred Gram matrix (METHOD, section 2)."""

ROWS_PER_UPDATE = 4096
"""Patches that are collected before the Gram matrix is updated with them."""

POSITIONS_PER_UNKNOWN = 100
"""Sampled output positions per unknown of a fit: more changes nothing, fewer shows."""


@dataclass(frozen=True)
class Window:
    """The patch of input pixels that one output pixel is fitted from.

    Attributes:
        kernel_size: taps along height and width.
        strides: input pixels between two outputs.
        padding: zeros around the image: top, bottom, left, right.
    """

    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]

    @property
    def n_taps(self) -> int:
        """Number of taps."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def skip_tap(self) -> tuple[int, int] | None:
        """The tap that reads the pixel an unpadded 1x1 layer of the same strides reads, or None if outside."""
        top, left = self.padding[0], self.padding[2]
        inside = 0 <= top < self.kernel_size[0] and 0 <= left < self.kernel_size[1]
        return (top, left) if inside else None

    def contains(self, other: Window) -> bool:
        """True if the other window's patch is a part of this one's."""
        offset = self.offset_of(other)
        return other.strides == self.strides and all(
            0 <= offset[axis] and offset[axis] + other.kernel_size[axis] <= self.kernel_size[axis] for axis in (0, 1)
        )

    def taps_of(self, other: Window) -> np.ndarray:
        """Numbers of this window's taps that a window inside it has, in its order."""
        offset = self.offset_of(other)
        taps = np.arange(self.n_taps).reshape(self.kernel_size)
        return taps[offset[0] :, offset[1] :][: other.kernel_size[0], : other.kernel_size[1]].ravel()

    def offset_of(self, other: Window) -> tuple[int, int]:
        """Tap of this window that the other one's first tap is."""
        return self.padding[0] - other.padding[0], self.padding[2] - other.padding[2]


def sample_patches(
    window: Window, x: np.ndarray, y: np.ndarray, n_positions: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return patches and outputs at sampled positions.

    Args:
        window: which pixels a patch holds.
        x: block input, shape (images, height, width, c_in).
        y: block output, shape (images, out_height, out_width, c_out).
        n_positions: how many to take; all, if there are no more.
        rng: chooses them.

    Returns:
        Patches of shape (n, kernel height, kernel width, c_in) and outputs of shape (n, c_out).

    Raises:
        ShapeError: the output is not of the size that the window gives.
    """
    top, bottom, left, right = window.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    views = np.lib.stride_tricks.sliding_window_view(padded, window.kernel_size, axis=(1, 2))
    views = views[:, :: window.strides[0], :: window.strides[1]]
    if views.shape[:3] != y.shape[:3]:
        raise ShapeError(
            f"A window of {window} gives outputs of size {views.shape[1:3]}, the block writes {y.shape[1:3]}."
        )
    total = int(np.prod(y.shape[:3]))
    chosen = np.arange(total) if n_positions >= total else np.sort(rng.choice(total, n_positions, replace=False))
    where = np.unravel_index(chosen, y.shape[:3])
    return views[where].transpose(0, 2, 3, 1), y[where]


@dataclass
class Moments:
    """Running sums over sampled output positions of one block, float64.

    Attributes:
        window: which pixels a patch holds.
        c_in: channels of the input.
        c_out: channels of the output.
        n: positions seen.
        gram: sum of patch patch^T, shape (taps * c_in, taps * c_in), upper triangle until read by `centred`.
        cross: sum of patch y^T, shape (taps * c_in, c_out).
        sum_x: sum of patches, shape (taps * c_in,); taps vary slowest, channels fastest.
        sum_y: sum of outputs, shape (c_out,).
        sum_yy: sum of squared outputs, shape (c_out,).
    """

    window: Window
    c_in: int
    c_out: int
    n: int = 0
    gram: np.ndarray = field(init=False)
    cross: np.ndarray = field(init=False)
    sum_x: np.ndarray = field(init=False)
    sum_y: np.ndarray = field(init=False)
    sum_yy: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        unknowns = self.n_unknowns
        self.gram = np.zeros((unknowns, unknowns), order="F")
        self.cross = np.zeros((unknowns, self.c_out))
        self.sum_x = np.zeros(unknowns)
        self.sum_y = np.zeros(self.c_out)
        self.sum_yy = np.zeros(self.c_out)
        self._pending: list[np.ndarray] = []

    @property
    def n_unknowns(self) -> int:
        """Weights that each output channel of a dense fit has."""
        return self.window.n_taps * self.c_in

    def add(self, x: np.ndarray, y: np.ndarray, *, n_positions: int, rng: np.random.Generator) -> None:
        """Add sampled positions of some images.

        Args:
            x: block input, shape (images, height, width, c_in).
            y: block output, shape (images, out_height, out_width, c_out).
            n_positions: how many of the images' positions to take; all, if there are no more.
            rng: chooses them.

        Raises:
            ShapeError: the output is not of the size that the window gives.
        """
        self.add_samples(*sample_patches(self.window, x, y, n_positions, rng))

    def add_samples(self, patches: np.ndarray, outputs: np.ndarray) -> None:
        """Add sampled patches, shape (n, ...) with taps before channels, and outputs, shape (n, c_out)."""
        patches = np.ascontiguousarray(patches.reshape(len(patches), -1), dtype=np.float64)
        outputs = outputs.astype(np.float64)
        self._pending.append(patches)
        if sum(len(part) for part in self._pending) >= ROWS_PER_UPDATE:
            self._update_gram()
        self.cross += patches.T @ outputs
        self.sum_x += patches.sum(axis=0)
        self.sum_y += outputs.sum(axis=0)
        self.sum_yy += np.square(outputs).sum(axis=0)
        self.n += len(outputs)

    def _update_gram(self) -> None:
        """Add the patches that wait: many small updates would spend their time reading and writing the matrix."""
        if self._pending:
            rows = np.concatenate(self._pending)
            self.gram = scipy.linalg.blas.dsyrk(1.0, rows.T, beta=1.0, c=self.gram, overwrite_c=1)
            self._pending = []

    def crop(self, window: Window) -> Moments:
        """Return the moments of a smaller window inside this one.

        Raises:
            ShapeError: the window reads pixels that this one does not, or has other strides.
        """
        if window == self.window:
            return self
        if not self.window.contains(window):
            raise ShapeError(f"{window} is no part of {self.window}.")
        self._update_gram()
        kept = self.window.taps_of(window)
        index = (kept[:, None] * self.c_in + np.arange(self.c_in)).ravel()
        part = Moments(window, self.c_in, self.c_out, n=self.n)
        part.gram = np.asfortranarray(self.gram[np.ix_(index, index)])
        part.cross, part.sum_x = self.cross[index], self.sum_x[index]
        part.sum_y, part.sum_yy = self.sum_y, self.sum_yy
        return part

    def centred(self) -> Centred:
        """Return the covariances that the fits solve for."""
        if self.n < 2:
            raise CalibrationError("A fit needs at least 2 output positions; give more calibration images.")
        self._update_gram()
        gram = np.triu(self.gram)
        gram += np.triu(gram, 1).T
        mean_x, mean_y = self.sum_x / self.n, self.sum_y / self.n
        return Centred(
            window=self.window,
            gram=gram / self.n - np.outer(mean_x, mean_x),
            cross=self.cross / self.n - np.outer(mean_x, mean_y),
            mean_x=mean_x,
            mean_y=mean_y,
            variance_y=np.maximum(self.sum_yy / self.n - mean_y**2, 0.0),
        )


@dataclass(frozen=True, eq=False)
class Centred:
    """Covariances of patches and outputs: what every fit is computed from.

    Weights are matrices of shape (taps * c_in, c_out) throughout, taps slowest.
    """

    window: Window
    gram: np.ndarray
    cross: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray
    variance_y: np.ndarray

    @property
    def c_in(self) -> int:
        """Channels of the input."""
        return len(self.mean_x) // self.window.n_taps

    @property
    def c_out(self) -> int:
        """Channels of the output."""
        return len(self.mean_y)

    @cached_property
    def mean_eigenvalue(self) -> float:
        """Mean eigenvalue of the Gram matrix: the unit of ridges."""
        return float(np.trace(self.gram)) / len(self.gram)

    def weights_of(self, map: AffineConv | None) -> np.ndarray:
        """Return a map as weights of this window: a skip at its tap, or a kernel of the window's own size."""
        weights = np.zeros((*self.window.kernel_size, self.c_in, self.c_out))
        if map is None:
            return weights.reshape(-1, self.c_out)
        kernel = affine.regroup(map, 1).kernel
        if kernel.shape[:2] == self.window.kernel_size:
            weights[:] = kernel
        elif kernel.shape[:2] == (1, 1) and (tap := self.window.skip_tap) is not None:
            weights[tap] = kernel[0, 0]
        else:
            raise ShapeError(f"A kernel of {kernel.shape[:2]} has no place in {self.window}.")
        return weights.reshape(-1, self.c_out)

    def bias_of(self, weights: np.ndarray) -> np.ndarray:
        """Return the bias that makes the mean residual 0."""
        return self.mean_y - self.mean_x @ weights

    def explained(self, weights: np.ndarray, bias: np.ndarray | None = None) -> float:
        """Return R^2: the part of the output's variance that weights and bias explain; below 0 is possible.

        Args:
            weights: shape (taps * c_in, c_out), everything that is added to make the output, skip included.
            bias: shape (c_out,); the best one where None.
        """
        total = float(self.variance_y.sum())
        if total == 0.0:
            return 1.0
        residual = self.variance_y.sum() - 2 * np.sum(weights * self.cross) + np.sum(weights * (self.gram @ weights))
        if bias is not None:
            residual += np.square(self.bias_of(weights) - bias).sum()
        return float(1.0 - max(residual, 0.0) / total)

    def ridge_regression(
        self, *, prior: np.ndarray | None = None, ridge: float = RIDGE, gram_floor: float = 0.0
    ) -> np.ndarray:
        """Return the weights that minimise the residual, drawn towards `prior`.

        Args:
            prior: weights that the ridge shrinks to, for instance the skip's; zeros where None.
            ridge: strength, in mean eigenvalues of the Gram matrix; 0 gives the least-norm solution.
            gram_floor: absolute ridge that is added to it.

        Returns:
            Weights of shape (taps * c_in, c_out).
        """
        right = self.cross if prior is None else self.cross - self.gram @ prior
        strength = ridge * self.mean_eigenvalue + gram_floor
        if strength == 0.0:
            change = scipy.linalg.lstsq(self.gram, right, lapack_driver="gelsd")[0]
        else:
            change = solve_positive(self.gram + strength * np.eye(len(self.gram)), right)
        return change if prior is None else prior + change

    def ridge_path(self, *, prior: np.ndarray) -> Callable[[float], np.ndarray]:
        """Return a function of the ridge that gives `ridge_regression(prior=prior, ridge=ridge)`.

        One eigendecomposition serves all strengths.
        """
        values, vectors = scipy.linalg.eigh(self.gram)
        right = vectors.T @ (self.cross - self.gram @ prior)
        values = np.maximum(values, 0.0)

        def solve(ridge: float) -> np.ndarray:
            return prior + vectors @ (right / (values + ridge * self.mean_eigenvalue)[:, None])

        return solve


@dataclass
class Samples:
    """Sampled patches and outputs themselves, for fits that are not linear in their unknowns.

    A depthwise and a pointwise layer have far fewer unknowns than the dense kernel they make up, so few positions do,
    and no Gram matrix of all taps is ever formed.

    Attributes:
        window: which pixels a patch holds.
        patches: float32, shape (n, taps, c_in).
        outputs: shape (n, c_out).
    """

    window: Window
    patches: np.ndarray
    outputs: np.ndarray

    @classmethod
    def empty(cls, window: Window, c_in: int, c_out: int) -> Samples:
        """No samples yet."""
        return cls(window, np.zeros((0, window.n_taps, c_in), "float32"), np.zeros((0, c_out)))

    @property
    def n(self) -> int:
        """Positions seen."""
        return len(self.outputs)

    @property
    def n_unknowns(self) -> int:
        """Unknowns that each output channel has in an alternating fit."""
        return self.patches.shape[2] + self.window.n_taps

    def add(self, x: np.ndarray, y: np.ndarray, *, n_positions: int, rng: np.random.Generator) -> None:
        """Add sampled positions of some images; arguments as for `Moments.add`."""
        self.add_samples(*sample_patches(self.window, x, y, n_positions, rng))

    def add_samples(self, patches: np.ndarray, outputs: np.ndarray) -> None:
        """Add sampled patches, shape (n, ...) with taps before channels, and outputs, shape (n, c_out)."""
        patches = patches.reshape(len(patches), self.window.n_taps, -1)
        self.patches = np.concatenate([self.patches, patches.astype("float32")])
        self.outputs = np.concatenate([self.outputs, outputs.astype(np.float64)])

    def crop(self, window: Window) -> Samples:
        """Return the same positions as a smaller window inside this one sees them."""
        if not self.window.contains(window):
            raise ShapeError(f"{window} is no part of {self.window}.")
        return Samples(window, self.patches[:, self.window.taps_of(window)], self.outputs)

    def skip(self, map: AffineConv) -> np.ndarray:
        """Return what a 1x1 skip writes at the sampled positions, shape (n, c_out)."""
        tap = self.window.skip_tap
        if tap is None:
            raise ShapeError(f"The pixel that the skip reads lies outside {self.window}.")
        pixel = self.patches[:, tap[0] * self.window.kernel_size[1] + tap[1]].astype(np.float64)
        return pixel @ affine.regroup(map, 1).kernel[0, 0] + map.bias

    def convolve(self, map: AffineConv) -> np.ndarray:
        """Return what a convolution with this window's taps writes at the sampled positions, shape (n, c_out)."""
        kernel = affine.regroup(map, 1).kernel.reshape(-1, map.c_out)
        return self.patches.reshape(self.n, -1) @ kernel.astype("float32") + map.bias

    def fit_depthwise_pointwise(
        self, target: np.ndarray, *, ridge: float = RIDGE, n_rounds: int = 3, n_steps: int = 8
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the depthwise kernel, pointwise matrix and bias that explain `target` best, by alternation.

        Starts from the pixel in the middle alone, so that the first round is the best pointwise map. The pointwise
        matrix is solved exactly; the depthwise kernel by conjugate gradients on its normal equations.

        Args:
            target: shape (n, c_out).
            ridge: strength of both regressions in mean eigenvalues.
            n_rounds: alternations; the residual never rises.
            n_steps: conjugate gradient steps in each.

        Returns:
            Depthwise kernel of shape (taps, c_in), pointwise matrix (c_in, c_out), bias (c_out,).
        """
        mean_patch, mean_target = self.patches.mean(axis=0), target.mean(axis=0)
        x = self.patches - mean_patch
        y = (target - mean_target).astype("float32")
        depthwise = np.zeros(x.shape[1:], "float32")
        depthwise[self._middle_tap()] = 1.0
        pointwise = _ridge(np.einsum("ntc,tc->nc", x, depthwise), y, ridge)
        for _ in range(n_rounds):
            depthwise = _depthwise_step(x, y, depthwise, pointwise, ridge, n_steps)
            pointwise = _ridge(np.einsum("ntc,tc->nc", x, depthwise), y, ridge)
        bias = mean_target - np.einsum("tc,tc,co->o", mean_patch, depthwise, pointwise)
        return depthwise.astype(np.float64), pointwise.astype(np.float64), bias

    def _middle_tap(self) -> int:
        if (tap := self.window.skip_tap) is not None:
            return tap[0] * self.window.kernel_size[1] + tap[1]
        return self.window.n_taps // 2

    def explained(self, predicted: np.ndarray) -> float:
        """Return R^2 of predicted outputs, shape (n, c_out)."""
        total = float(np.square(self.outputs - self.outputs.mean(axis=0)).sum())
        return 1.0 if total == 0.0 else float(1.0 - np.square(self.outputs - predicted).sum() / total)


def _ridge(features: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge regression of centred `y` on centred features, both (n, channels); a dead feature gets weight 0."""
    gram = (features.T @ features).astype(np.float64)
    gram += (ridge * np.trace(gram) / len(gram) + np.finfo("float32").tiny) * np.eye(len(gram))
    return solve_positive(gram, (features.T @ y).astype(np.float64)).astype("float32")


def solve_positive(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve a symmetric positive definite system: Cholesky alone, without the condition estimate of `solve`."""
    return scipy.linalg.cho_solve(scipy.linalg.cho_factor(matrix, lower=True), right)


def _depthwise_step(
    x: np.ndarray, y: np.ndarray, depthwise: np.ndarray, pointwise: np.ndarray, ridge: float, n_steps: int
) -> np.ndarray:
    """Improve the depthwise kernel for a fixed pointwise matrix, by conjugate gradients from where it is."""
    products = pointwise @ pointwise.T
    wanted = np.einsum("ntc,nc->tc", x, y @ pointwise.T, optimize=True)
    # mean diagonal of the normal equations: each tap's energy times its channel's outgoing energy
    strength = ridge * float(np.mean(np.square(x).sum(axis=0) * np.diag(products)))

    def normal(kernel: np.ndarray) -> np.ndarray:
        features = np.einsum("ntc,tc->nc", x, kernel)
        return np.einsum("ntc,nc->tc", x, features @ products) + strength * kernel

    kernel = depthwise.copy()
    residual = wanted - normal(kernel)
    direction = residual.copy()
    energy = float(np.square(residual).sum())
    for _ in range(n_steps):
        if energy == 0.0:
            break
        image = normal(direction)
        step = energy / float((direction * image).sum())
        kernel += step * direction
        residual -= step * image
        energy, previous = float(np.square(residual).sum()), energy
        direction = residual + (energy / previous) * direction
    return kernel


@dataclass(frozen=True, eq=False)
class Linearized:
    """The linear map that replaces a block's stages without images.

    Attributes:
        maps: the stages' maps with each activation as slope and offset, in order.
        explained: what the slopes explain of the activations' variance, between 0 and 1; None where unknown.
    """

    maps: tuple[AffineConv, ...]
    explained: float | None


def identity_start(stages: Sequence[Stage]) -> Linearized:
    """Replace every activation by the identity (UPDP's end point)."""
    return Linearized(tuple(one for stage in stages for one in stage.maps), None)


def gaussian_start(stages: Sequence[Stage]) -> Linearized:
    """Replace every activation by its best affine stand-in under the distribution that the norm before it tells.

    Raises:
        CalibrationError: an activation has no norm in front of it; calibration images are needed.
    """
    maps: list[AffineConv] = []
    explained = 1.0
    for index, stage in enumerate(stages):
        maps += stage.maps
        if stage.activation is None:
            continue
        if stage.mean is None or stage.std is None:
            raise CalibrationError(
                f"The activation '{stage.activation.name}' has no normalization in front of it that tells its input's "
                "distribution: needs calibration images."
            )
        slope, offset, share = gaussian_fit(stage.activation, stage.mean, stage.std)
        variance = gaussian_moments(stage.activation, stage.mean, stage.std).variance
        explained *= _weighted_share(stages, index, variance, share)
        maps[-1] = affine.fold_norm_after(maps[-1], slope, offset)
    return Linearized(tuple(maps), explained)


def _weighted_share(stages: Sequence[Stage], index: int, variance: np.ndarray, share: np.ndarray) -> float:
    """Explained variance of one activation, weighted by the squared kernels of the layer that reads it."""
    if index + 1 < len(stages):
        variance = variance * _read_energy(stages[index + 1].maps[0])
    total = float(variance.sum())
    return 1.0 if total == 0.0 else float((variance * share).sum() / total)


def _read_energy(map: AffineConv) -> np.ndarray:
    """Squared norm of the kernel slice that reads each input channel, shape (c_in,)."""
    per_group = map.c_out // map.groups
    kernel = map.kernel.reshape(*map.kernel.shape[:3], map.groups, per_group)
    return np.square(kernel).sum(axis=(0, 1, 4)).T.ravel()
