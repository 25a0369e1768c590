"""Second moments of input patches and outputs, and the linear regressions that are solved from them.

One set of moments serves every dense form and every smaller kernel of a block; its size does not depend on the number
of images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy.linalg

from updp_tf.affine import AffineConv
from updp_tf.errors import CalibrationError, ShapeError
from updp_tf.samples import Samples
from updp_tf.solving import RIDGE, solve_positive
from updp_tf.windows import Drawn, Window, rows_at_once, weights_in

ROWS_PER_UPDATE = 4096
"""Patches that are collected before the Gram matrix is updated with them."""

MAX_DENSE_UNKNOWNS = 10_000
"""Unknowns of the largest Gram matrix: 0.8 GB. Above it a dense kernel is fitted by conjugate gradients."""


@dataclass
class Moments:
    """Running sums over sampled output positions of one block, less an offset close to the mean.

    Float32 patches are multiplied in float32, a few thousand at a time, and those sums are added up in float64: half
    the time. With the offset taken off, covariances are wrong by less than 1e-6 of their mean eigenvalue, a hundredth
    of the ridge. Float64 patches are multiplied in float64.

    Attributes:
        window: which pixels a patch holds.
        c_in: channels of the input.
        c_out: channels of the output.
        n: positions seen, special ones by their weight.
        gram: sum of patch patch^T, shape (taps * c_in, taps * c_in), upper triangle until read by `centred`.
        cross: sum of patch y^T, shape (taps * c_in, c_out).
        sum_x: sum of patches, shape (taps * c_in,); taps vary slowest, channels fastest.
        sum_y: sum of outputs, shape (c_out,).
        sum_yy: sum of squared outputs, shape (c_out,).
        rounding: relative rounding of the products.
    """

    window: Window
    c_in: int
    c_out: int
    n: float = 0
    gram: np.ndarray = field(init=False)
    cross: np.ndarray = field(init=False)
    sum_x: np.ndarray = field(init=False)
    sum_y: np.ndarray = field(init=False)
    sum_yy: np.ndarray = field(init=False)
    rounding: float = field(init=False, default=float(np.finfo(np.float64).eps))

    def __post_init__(self) -> None:
        unknowns = self.n_unknowns
        self.gram = np.zeros((unknowns, unknowns), order="F")
        self.cross = np.zeros((unknowns, self.c_out))
        self.sum_x = np.zeros(unknowns)
        self.sum_y = np.zeros(self.c_out)
        self.sum_yy = np.zeros(self.c_out)
        self._offset_x: np.ndarray | None = None
        self._offset_y: np.ndarray | None = None
        self._pending: list[np.ndarray] = []

    @property
    def n_unknowns(self) -> int:
        """Weights that each output channel of a dense fit has."""
        return self.window.n_taps * self.c_in

    def add(self, drawn: Drawn) -> None:
        """Add sampled positions of some images."""
        step = min(rows_at_once(self.n_unknowns), ROWS_PER_UPDATE)
        for start in range(0, drawn.n, step):
            rows = slice(start, start + step)
            self.add_samples(drawn.patches(rows), drawn.outputs[rows], drawn.chosen.weights[rows])

    def add_samples(self, patches: np.ndarray, outputs: np.ndarray, weights: np.ndarray) -> None:
        """Add sampled patches, shape (n, ...) with taps before channels, outputs, shape (n, c_out), and weights."""
        if not len(patches):
            return
        dtype = np.result_type(patches, np.float32)
        patches = patches.reshape(len(patches), -1)
        if self._offset_x is None or self._offset_y is None:
            self._offset_x, self._offset_y = (one.mean(axis=0).astype(dtype) for one in (patches, outputs))
        rows, outputs = patches - self._offset_x, outputs.astype(dtype) - self._offset_y
        self.rounding = max(self.rounding, float(np.finfo(dtype).eps))
        weights = weights.astype(dtype)
        self.n += float(weights.sum(dtype=np.float64))
        self.sum_x += weights @ rows
        self.sum_y += weights @ outputs
        if np.any(weights != 1.0):
            # A position of weight w is a row of sqrt(w) times itself.
            root = np.sqrt(weights)[:, None]
            rows, outputs = rows * root, outputs * root
        self.cross += rows.T @ outputs
        self.sum_yy += np.square(outputs).sum(axis=0, dtype=np.float64)
        self._pending.append(rows)
        if sum(len(part) for part in self._pending) >= ROWS_PER_UPDATE:
            self._update_gram()

    def add_all(self, samples: Samples) -> None:
        """Add samples of the same window."""
        outputs, weights = samples.outputs, samples.weights
        for rows, patches in samples.chunks():
            self.add_samples(patches, outputs[rows], weights[rows])

    def _update_gram(self) -> None:
        """Add the patches that wait: many small updates would spend their time reading and writing the matrix."""
        if not self._pending:
            return
        rows = np.concatenate(self._pending) if len(self._pending) > 1 else self._pending[0]
        if rows.dtype == np.float32:
            self.gram += scipy.linalg.blas.ssyrk(1.0, rows.T)
        else:
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
        part.rounding = self.rounding
        part._offset_x = None if self._offset_x is None else self._offset_x[index]
        part._offset_y = self._offset_y
        return part

    def centred(self) -> Centred:
        """Return the covariances that the fits solve for."""
        if self.n < 2 or self._offset_x is None or self._offset_y is None:
            raise CalibrationError("A fit needs at least 2 output positions; give more calibration images.")
        self._update_gram()
        above_x, above_y = self.sum_x / self.n, self.sum_y / self.n
        # In place: at 1,024 channels each temporary would be as large as the 0.7 GB matrix itself.
        gram = self.gram.copy(order="F")
        gram *= 1.0 / self.n
        gram = scipy.linalg.blas.dsyr(-1.0, above_x, a=gram, overwrite_a=1)
        _mirror_upper(gram)
        return Centred(
            window=self.window,
            gram=gram,
            cross=self.cross / self.n - np.outer(above_x, above_y),
            mean_x=self._offset_x + above_x,
            mean_y=self._offset_y + above_y,
            variance_y=np.maximum(self.sum_yy / self.n - above_y**2, 0.0),
            rounding=self.rounding,
        )


def _mirror_upper(matrix: np.ndarray, block: int = 1024) -> None:
    """Copy the upper triangle to the lower one, in place."""
    for start in range(0, len(matrix), block):
        rows = slice(start, start + block)
        corner = np.triu(matrix[rows, rows])
        matrix[rows, rows] = corner + np.triu(corner, 1).T
        matrix[start + block :, rows] = matrix[rows, start + block :].T


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
    rounding: float = float(np.finfo(np.float64).eps)

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
        if map is None:
            return np.zeros((len(self.mean_x), self.c_out))
        weights = weights_in(self.window, map)
        if weights is None:
            raise ShapeError(f"A kernel of {map.kernel_size} has no place in {self.window}.")
        return weights

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
        if ridge > 0.0:
            # rounded products can make the smallest eigenvalues negative
            ridge = max(ridge, 100 * self.rounding)
        strength = ridge * self.mean_eigenvalue + gram_floor
        if strength == 0.0:
            cutoff = self.rounding * len(self.gram)
            change = scipy.linalg.lstsq(self.gram, right, cond=cutoff, lapack_driver="gelsd")[0]
        else:
            gram = self.gram.copy(order="F")
            gram[np.diag_indices_from(gram)] += strength
            change = solve_positive(gram, right)
        return change if prior is None else prior + change

    def scale_regression(self, *, prior: float, ridge: float = RIDGE) -> np.ndarray:
        """Return the weight of each channel on its own tap alone, drawn towards `prior`: shape (c,).

        Args:
            prior: weight that the ridge shrinks to: 1 for an identity skip, else 0.
            ridge: strength, in mean eigenvalues of the Gram matrix; a dead channel keeps the prior.

        Raises:
            ShapeError: the window has more than one tap, or input and output have other channels.
        """
        if self.window.n_taps != 1 or self.c_in != self.c_out:
            raise ShapeError(f"A scale maps a channel to itself: {self.c_in} to {self.c_out} channels, {self.window}.")
        own = np.diag(self.gram)
        strength = own + ridge * self.mean_eigenvalue
        change = np.divide(np.diag(self.cross) - own * prior, strength, out=np.zeros_like(own), where=strength > 0)
        return prior + change

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
