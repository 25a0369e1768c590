"""Fit linear maps to a block: from its own weights (identity, gaussian) or from images (least squares).

Everything about the images goes into `Moments`, the second moments of input patches and outputs: one set of moments
serves every form and every smaller kernel of a block, and their size does not depend on the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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

BYTES_AT_ONCE = 64 * 2**20
"""Bytes of float32 patches that are written out at a time."""

BYTES_IN_CACHE = 2**20
"""Bytes of images that depthwise sums are computed of at a time."""

MAX_DENSE_UNKNOWNS = 10_000
"""Unknowns of the largest Gram matrix: 0.8 GB. Above it a dense kernel is fitted by conjugate gradients."""

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


def weights_in(window: Window, map: AffineConv) -> np.ndarray | None:
    """Return a map as weights of a window, shape (taps * c_in, c_out): a skip at its tap, or a kernel of its size.

    None where it has no place in the window.
    """
    weights = np.zeros((*window.kernel_size, map.c_in, map.c_out))
    if map.kernel_size == window.kernel_size:
        weights[:] = affine.regroup(map, 1).kernel
    elif map.kernel_size == (1, 1) and (tap := window.skip_tap) is not None:
        weights[tap] = affine.regroup(map, 1).kernel[0, 0]
    else:
        return None
    return weights.reshape(-1, map.c_out)


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Output positions of some images that a fit looks at.

    Attributes:
        where: image, row and column of each, three arrays of shape (n,).
        weights: how much each counts, shape (n,).
    """

    where: tuple[np.ndarray, np.ndarray, np.ndarray]
    weights: np.ndarray

    @property
    def n(self) -> int:
        return len(self.weights)

    def part(self, rows: slice) -> _Chosen:
        images, heights, widths = self.where
        return _Chosen((images[rows], heights[rows], widths[rows]), self.weights[rows])


def _choose(
    shape: tuple[int, int, int], n_positions: int, rng: np.random.Generator, special_rows: Sequence[int] = ()
) -> _Chosen:
    """Choose positions of outputs of shape (images, rows, columns), all if there are no more.

    Special rows (class tokens) are taken from every image and weigh as much as all other positions together: one token
    among 197 is invisible to a plain fit (METHOD, section 2).
    """
    n_images, n_rows, n_columns = shape
    special = sorted({row % n_rows for row in special_rows})
    rows = np.setdiff1d(np.arange(n_rows), special)
    total = n_images * len(rows) * n_columns
    chosen = np.arange(total) if n_positions >= total else np.sort(rng.choice(total, n_positions, replace=False))
    images, heights, widths = np.unravel_index(chosen, (n_images, len(rows), n_columns))
    heights = rows[heights]
    weights = np.ones(len(chosen))
    if special:
        grid = np.meshgrid(np.arange(n_images), special, np.arange(n_columns), indexing="ij")
        more = [one.ravel() for one in grid]
        images, heights, widths = (np.concatenate(pair) for pair in zip((images, heights, widths), more, strict=True))
        n_special = n_images * len(special) * n_columns
        weights = np.concatenate([weights, np.full(n_special, (len(chosen) or 1) / n_special)])
    return _Chosen((images, heights, widths), weights)


def _views(window: Window, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return all patches of images as a view, shape (images, rows, columns, c_in, kernel height, kernel width)."""
    views = _padded_views(window, x)
    if views.shape[:3] != y.shape[:3]:
        raise ShapeError(
            f"A window of {window} gives outputs of size {views.shape[1:3]}, the block writes {y.shape[1:3]}."
        )
    return views


def _rows_at_once(n_unknowns: int) -> int:
    return max(1, BYTES_AT_ONCE // (4 * n_unknowns))


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
    chosen = _choose(_grid(y), n_positions, rng)
    return _views(window, x, y)[chosen.where].transpose(0, 2, 3, 1), y[chosen.where]


def _grid(y: np.ndarray) -> tuple[int, int, int]:
    return y.shape[0], y.shape[1], y.shape[2]


@dataclass
class Moments:
    """Running sums over sampled output positions of one block, float64.

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

    def add(
        self,
        x: np.ndarray,
        y: np.ndarray,
        *,
        n_positions: int,
        rng: np.random.Generator,
        special_rows: Sequence[int] = (),
    ) -> None:
        """Add sampled positions of some images.

        Args:
            x: block input, shape (images, height, width, c_in).
            y: block output, shape (images, out_height, out_width, c_out).
            n_positions: how many of the images' positions to take; all, if there are no more.
            rng: chooses them.
            special_rows: rows of the output that weigh as much as all others together.

        Raises:
            ShapeError: the output is not of the size that the window gives.
        """
        views = _views(self.window, x, y)
        chosen = _choose(_grid(y), n_positions, rng, special_rows)
        step = min(_rows_at_once(self.n_unknowns), ROWS_PER_UPDATE)
        for start in range(0, chosen.n, step):
            part = chosen.part(slice(start, start + step))
            self.add_samples(views[part.where].transpose(0, 2, 3, 1), y[part.where], part.weights)

    def add_samples(self, patches: np.ndarray, outputs: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Add sampled patches, shape (n, ...) with taps before channels, outputs, shape (n, c_out), and weights."""
        patches = np.ascontiguousarray(patches.reshape(len(patches), -1), dtype=np.float64)
        outputs = outputs.astype(np.float64)
        if weights is None or np.all(weights == 1.0):
            rows = patches
            self.n += len(outputs)
        else:
            # A position of weight w is a row of sqrt(w) times itself.
            root = np.sqrt(weights)[:, None]
            self.n += float(weights.sum())
            rows, patches, outputs = patches * root, patches * weights[:, None], outputs * root
        self._pending.append(rows)
        if sum(len(part) for part in self._pending) >= ROWS_PER_UPDATE:
            self._update_gram()
        self.cross += rows.T @ outputs
        self.sum_x += patches.sum(axis=0)
        self.sum_y += (outputs if rows is patches else outputs * root).sum(axis=0)
        self.sum_yy += np.square(outputs).sum(axis=0)

    def add_all(self, samples: Samples) -> None:
        """Add samples of the same window."""
        for rows, patches in samples.chunks():
            self.add_samples(patches, samples.outputs[rows], samples.weights[rows])

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
        mean_x, mean_y = self.sum_x / self.n, self.sum_y / self.n
        # In place: at 1,024 channels each temporary would be as large as the 0.7 GB matrix itself.
        gram = self.gram.copy(order="F")
        gram *= 1.0 / self.n
        gram = scipy.linalg.blas.dsyr(-1.0, mean_x, a=gram, overwrite_a=1)
        _mirror_upper(gram)
        return Centred(
            window=self.window,
            gram=gram,
            cross=self.cross / self.n - np.outer(mean_x, mean_y),
            mean_x=mean_x,
            mean_y=mean_y,
            variance_y=np.maximum(self.sum_yy / self.n - mean_y**2, 0.0),
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
        strength = ridge * self.mean_eigenvalue + gram_floor
        if strength == 0.0:
            change = scipy.linalg.lstsq(self.gram, right, lapack_driver="gelsd")[0]
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


@dataclass(frozen=True, eq=False)
class _Part:
    """Samples of some images: their patches, or, where that takes less memory, the images to cut them from.

    Attributes:
        patches: float32, shape (n, taps, c_in), or None.
        images: float32, shape (images, height, width, c_in), or None.
        chosen: positions, in the images.
        outputs: float64, shape (n, c_out).
    """

    patches: np.ndarray | None
    images: np.ndarray | None
    chosen: _Chosen
    outputs: np.ndarray

    def in_pieces(self, window: Window) -> Iterator[tuple[_Inside, Iterator[tuple[int, np.ndarray]], tuple[int, ...]]]:
        """Yield some images at a time: which samples are theirs, their pixels at each tap, and the outputs' grid.

        Work on whole images needs no patches: at 7x7 they are 49 times the pixels.
        """
        assert self.images is not None  # noqa: S101 - asked for only where they are
        images, heights, widths = self.chosen.where
        order = np.argsort(images, kind="stable")
        step = max(1, BYTES_IN_CACHE // (4 * self.images[0].size))
        for start in range(0, len(self.images), step):
            views = _padded_views(window, self.images[start : start + step])
            first, last = np.searchsorted(images[order], (start, start + step))
            rows = order[first:last]
            where = (images[rows] - start, heights[rows], widths[rows])
            taps = (
                (row * window.kernel_size[1] + column, views[..., row, column])
                for row in range(window.kernel_size[0])
                for column in range(window.kernel_size[1])
            )
            yield _Inside(rows, where), taps, views.shape[:3]


@dataclass(frozen=True, eq=False)
class _Inside:
    """Samples that lie in some images: their numbers, and where in the images."""

    rows: np.ndarray
    where: tuple[np.ndarray, np.ndarray, np.ndarray]


class Samples:
    """Sampled patches and outputs themselves, for fits that are not linear in their unknowns, or have too many.

    A depthwise and a pointwise layer have far fewer unknowns than the dense kernel they make up, so few positions do,
    and no Gram matrix of all taps is ever formed.

    Attributes:
        window: which pixels a patch holds.
        c_in: channels of the input.
        c_out: channels of the output.
        n_unknowns: that each output channel has in the fit they are for; an alternating one where it is not told.
    """

    def __init__(
        self, window: Window, c_in: int, c_out: int, n_unknowns: int | None = None, *, parts: Sequence[_Part] = ()
    ) -> None:
        self.window, self.c_in, self.c_out = window, c_in, c_out
        self.n_unknowns = n_unknowns or c_in + window.n_taps
        self._parts = list(parts)

    @classmethod
    def empty(cls, window: Window, c_in: int, c_out: int) -> Samples:
        """No samples yet."""
        return cls(window, c_in, c_out)

    @property
    def n(self) -> int:
        """Positions seen."""
        return sum(len(part.outputs) for part in self._parts)

    @property
    def outputs(self) -> np.ndarray:
        """Outputs, float64, shape (n, c_out)."""
        if len(self._parts) == 1:
            return self._parts[0].outputs
        return np.concatenate([np.zeros((0, self.c_out)), *(part.outputs for part in self._parts)])

    @property
    def weights(self) -> np.ndarray:
        """How much each position counts, shape (n,)."""
        return np.concatenate([np.zeros(0), *(part.chosen.weights for part in self._parts)])

    @property
    def patches(self) -> np.ndarray:
        """All patches, float32, shape (n, taps, c_in): for few samples only, `chunks` writes them out bit by bit."""
        empty = np.zeros((0, self.window.n_taps, self.c_in), "float32")
        return np.concatenate([empty, *(chunk for _, chunk in self.chunks())])

    def add(
        self,
        x: np.ndarray,
        y: np.ndarray,
        *,
        n_positions: int,
        rng: np.random.Generator,
        special_rows: Sequence[int] = (),
    ) -> None:
        """Add sampled positions of some images; arguments as for `Moments.add`."""
        views = _views(self.window, x, y)
        chosen = _choose(_grid(y), n_positions, rng, special_rows)
        outputs = y[chosen.where].astype(np.float64)
        if chosen.n * self.window.n_taps * self.c_in <= x.size:
            patches = np.asarray(views[chosen.where].transpose(0, 2, 3, 1), "float32")
            part = _Part(patches.reshape(chosen.n, -1, self.c_in), None, chosen, outputs)
        else:
            part = _Part(None, np.array(x, "float32"), chosen, outputs)
        self._parts.append(part)

    def add_all(self, samples: Samples) -> None:
        """Add samples of the same window."""
        self._parts += samples._parts

    def crop(self, window: Window) -> Samples:
        """Return the same positions as a smaller window inside this one sees them."""
        if not self.window.contains(window):
            raise ShapeError(f"{window} is no part of {self.window}.")
        taps = self.window.taps_of(window)
        parts = [part if part.patches is None else replace(part, patches=part.patches[:, taps]) for part in self._parts]
        return Samples(window, self.c_in, self.c_out, parts=parts)

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield which positions, and their patches, float32, shape (rows, taps, c_in), a few at a time."""
        step, done = _rows_at_once(self.window.n_taps * self.c_in), 0
        for part in self._parts:
            views = None if part.images is None else _padded_views(self.window, part.images)
            for start in range(0, len(part.outputs), step):
                rows = slice(start, min(start + step, len(part.outputs)))
                if views is None:
                    assert part.patches is not None  # noqa: S101 - one of the two is there
                    patches = part.patches[rows]
                else:
                    patches = views[part.chosen.part(rows).where].transpose(0, 2, 3, 1)
                yield (
                    slice(done + rows.start, done + rows.stop),
                    patches.reshape(rows.stop - rows.start, self.window.n_taps, self.c_in),
                )
            done += len(part.outputs)

    def skip(self, map: AffineConv) -> np.ndarray:
        """Return what a 1x1 skip writes at the sampled positions, shape (n, c_out)."""
        tap = self.window.skip_tap
        if tap is None:
            raise ShapeError(f"The pixel that the skip reads lies outside {self.window}.")
        number = tap[0] * self.window.kernel_size[1] + tap[1]
        written = np.empty((self.n, map.c_out))
        if affine.is_identity(map):
            for rows, patches in self.chunks():
                written[rows] = patches[:, number]
            return written
        matrix = affine.regroup(map, 1).kernel[0, 0]
        for rows, patches in self.chunks():
            written[rows] = patches[:, number].astype(np.float64) @ matrix
        return written + map.bias

    def convolve(self, map: AffineConv) -> np.ndarray:
        """Return what a convolution with this window's taps writes at the sampled positions, shape (n, c_out)."""
        if map.groups == map.c_in == map.c_out:
            return self.depthwise(map.kernel.reshape(self.window.n_taps, -1)) + map.bias
        kernel = affine.regroup(map, 1).kernel.reshape(-1, map.c_out).astype("float32")
        written = np.empty((self.n, map.c_out))
        for rows, patches in self.chunks():
            written[rows] = patches.reshape(len(patches), -1) @ kernel
        return written + map.bias

    def depthwise(self, kernel: np.ndarray) -> np.ndarray:
        """Return each channel's own sum over taps, kernel of shape (taps, c_in): float32, shape (n, c_in)."""
        kernel = kernel.astype("float32")
        written = np.empty((self.n, self.c_in), "float32")
        for rows, part in self._by_part():
            if part.patches is not None:
                np.einsum("ntc,tc->nc", part.patches, kernel, out=written[rows])
                continue
            for inside, seen, grid in part.in_pieces(self.window):
                found = np.zeros((*grid, self.c_in), "float32")
                product = np.empty_like(found)
                for tap, pixels in seen:
                    found += np.multiply(pixels, kernel[tap], out=product)
                written[rows][inside.rows] = found[inside.where]
        return written

    def correlate(self, values: np.ndarray, *, squared: bool = False) -> np.ndarray:
        """Return the sum over positions of each patch times values of shape (n, c_in): float64, shape (taps, c_in).

        With `squared` it is the sum of squared patches times values.
        """
        values = values.astype("float32")
        total = np.zeros((self.window.n_taps, self.c_in))
        for rows, part in self._by_part():
            if part.patches is not None:
                patches = np.square(part.patches) if squared else part.patches
                total += np.einsum("ntc,nc->tc", patches, values[rows])
                continue
            for inside, seen, grid in part.in_pieces(self.window):
                spread = np.zeros((*grid, self.c_in), "float32")
                spread[inside.where] = values[rows][inside.rows]
                for tap, pixels in seen:
                    others = (pixels, pixels) if squared else (pixels,)
                    total[tap] += np.einsum(f"nhwc,{','.join(['nhwc'] * len(others))}->c", spread, *others)
        return total

    def _by_part(self) -> Iterator[tuple[slice, _Part]]:
        done = 0
        for part in self._parts:
            yield slice(done, done + len(part.outputs)), part
            done += len(part.outputs)

    def mean_patch(self) -> np.ndarray:
        """Mean patch, shape (taps, c_in)."""
        weights = self.weights
        total = np.zeros((self.window.n_taps, self.c_in))
        for rows, patches in self.chunks():
            total += np.einsum("n,ntc->tc", weights[rows], patches.astype(np.float64))
        return total / weights.sum()

    def ridge_regression(
        self, *, prior: np.ndarray | None = None, ridge: float = RIDGE, n_steps: int = 100, tolerance: float = 1e-9
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return weights (taps * c_in, c_out) and bias of a dense fit by conjugate gradients over the samples.

        What `Centred.ridge_regression` computes, without its Gram matrix: for more unknowns than that can hold. An
        early end shrinks towards the prior too.

        Args:
            prior: weights that the ridge shrinks to; zeros where None.
            ridge: strength, in mean eigenvalues of the Gram matrix.
            n_steps: at most.
            tolerance: squared residual, of the squared right side, at which a channel is solved.
        """
        n_unknowns = self.window.n_taps * self.c_in
        total, weights = float(self.weights.sum()), self.weights
        mean_x = self.mean_patch().reshape(-1)
        mean_y = weights @ self.outputs / total
        energy = 0.0

        def centred() -> Iterator[tuple[slice, np.ndarray]]:
            for rows, patches in self.chunks():
                yield rows, patches.reshape(len(patches), -1).astype(np.float64) - mean_x

        start = np.zeros((n_unknowns, self.c_out)) if prior is None else prior.copy()
        right = np.zeros_like(start)
        for rows, x in centred():
            energy += float(weights[rows] @ np.square(x).sum(axis=1))
            right += x.T @ (weights[rows, None] * (self.outputs[rows] - mean_y - x @ start))
        strength = ridge * energy / n_unknowns

        def normal(directions: np.ndarray) -> np.ndarray:
            image = strength * directions
            for rows, x in centred():
                image += x.T @ (weights[rows, None] * (x @ directions))
            return image

        change = _conjugate_gradients(normal, right, n_steps, tolerance)
        start += change
        return start, mean_y - mean_x @ start

    def fit_depthwise_pointwise(
        self,
        target: np.ndarray,
        *,
        start: np.ndarray | None = None,
        ridge: float = RIDGE,
        n_rounds: int = 3,
        n_steps: int = 8,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the depthwise kernel, pointwise matrix and bias that explain `target` best, by alternation.

        The pointwise matrix is solved exactly; the depthwise kernel by conjugate gradients on its normal equations.

        Args:
            target: shape (n, c_out).
            start: depthwise kernel to begin with, shape (taps, c_in); the pixel in the middle alone where None, so
                that the first round is the best pointwise map.
            ridge: strength of both regressions in mean eigenvalues.
            n_rounds: alternations; the residual never rises.
            n_steps: conjugate gradient steps in each.

        Returns:
            Depthwise kernel of shape (taps, c_in), pointwise matrix (c_in, c_out), bias (c_out,).
        """
        mean_patch, mean_target = self.mean_patch(), target.mean(axis=0)
        y = target - mean_target
        depthwise = np.zeros((self.window.n_taps, self.c_in))
        if start is None:
            depthwise[self._middle_tap()] = 1.0
        else:
            depthwise[:] = start
        pointwise = _ridge(self._features(mean_patch, depthwise), y, ridge)
        if n_rounds:
            energy = self.correlate(np.ones((self.n, self.c_in)), squared=True) - self.n * np.square(mean_patch)
        for _ in range(n_rounds):
            # mean diagonal of the normal equations: each tap's energy times its channel's outgoing energy
            strength = ridge * float(np.mean(energy * np.square(pointwise).sum(axis=1)))
            depthwise = self._depthwise_step(mean_patch, y, depthwise, pointwise, strength, n_steps)
            pointwise = _ridge(self._features(mean_patch, depthwise), y, ridge)
        bias = mean_target - np.einsum("tc,tc,co->o", mean_patch, depthwise, pointwise, optimize=True)
        return depthwise, pointwise, bias

    def _features(self, mean_patch: np.ndarray, depthwise: np.ndarray) -> np.ndarray:
        """Return what a depthwise kernel writes, less its mean."""
        return self.depthwise(depthwise) - np.einsum("tc,tc->c", mean_patch, depthwise)

    def _depthwise_step(
        self,
        mean_patch: np.ndarray,
        y: np.ndarray,
        depthwise: np.ndarray,
        pointwise: np.ndarray,
        strength: float,
        n_steps: int,
    ) -> np.ndarray:
        """Improve the depthwise kernel for a fixed pointwise matrix, by conjugate gradients from where it is."""
        products = pointwise @ pointwise.T

        def adjoint(values: np.ndarray) -> np.ndarray:
            return self.correlate(values) - mean_patch * values.sum(axis=0, dtype=np.float64)

        def normal(kernel: np.ndarray) -> np.ndarray:
            return adjoint(self._features(mean_patch, kernel) @ products) + strength * kernel

        right = (adjoint(y @ pointwise.T) - normal(depthwise)).reshape(-1, 1)
        change = _conjugate_gradients(lambda one: normal(one.reshape(depthwise.shape)).reshape(-1, 1), right, n_steps)
        return depthwise + change.reshape(depthwise.shape)

    def _middle_tap(self) -> int:
        if (tap := self.window.skip_tap) is not None:
            return tap[0] * self.window.kernel_size[1] + tap[1]
        return self.window.n_taps // 2

    def explained(self, predicted: np.ndarray) -> float:
        """Return R^2 of predicted outputs, shape (n, c_out)."""
        outputs, weights = self.outputs, self.weights
        spread = np.square(outputs - weights @ outputs / max(weights.sum(), 1.0)).sum(axis=1)
        total = float(weights @ spread)
        return 1.0 if total == 0.0 else float(1.0 - weights @ np.square(outputs - predicted).sum(axis=1) / total)


def _padded_views(window: Window, x: np.ndarray) -> np.ndarray:
    top, bottom, left, right = window.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0))) if any(window.padding) else x
    views = np.lib.stride_tricks.sliding_window_view(padded, window.kernel_size, axis=(1, 2))
    return views[:, :: window.strides[0], :: window.strides[1]]


def _ridge(features: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge regression of centred `y` on centred features, both (n, channels); a dead feature gets weight 0."""
    features = features.astype(np.float64)
    gram = features.T @ features
    gram[np.diag_indices_from(gram)] += ridge * np.trace(gram) / len(gram) + np.finfo("float32").tiny
    return solve_positive(gram, features.T @ y)


def solve_positive(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve a symmetric positive definite system: Cholesky alone, without the condition estimate of `solve`.

    The matrix is overwritten.
    """
    return scipy.linalg.cho_solve(scipy.linalg.cho_factor(matrix, lower=True, overwrite_a=True), right)


def _conjugate_gradients(
    normal: Callable[[np.ndarray], np.ndarray], right: np.ndarray, n_steps: int, tolerance: float = 0.0
) -> np.ndarray:
    """Solve positive definite equations for each column of `right`, from zero, in at most `n_steps` steps.

    Args:
        normal: what the matrix makes of columns.
        right: shape (unknowns, columns).
        n_steps: at most.
        tolerance: squared residual, of the squared right side, at which a column is solved.
    """
    found = np.zeros_like(right)
    residual, direction = right.copy(), right.copy()
    energy = np.square(residual).sum(axis=0)
    small = tolerance * energy
    for _ in range(n_steps):
        if np.all(energy <= small):
            break
        image = normal(direction)
        curvature = np.einsum("uc,uc->c", direction, image)
        step = np.divide(energy, curvature, out=np.zeros_like(energy), where=curvature > 0)
        found += step * direction
        residual -= step * image
        before, energy = energy, np.square(residual).sum(axis=0)
        direction = residual + np.divide(energy, before, out=np.zeros_like(energy), where=before > 0) * direction
    return found


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
