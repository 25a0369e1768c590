"""Sampled patches themselves: for fits that are not linear in their unknowns, or have too many for a Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from updp_tf import affine
from updp_tf.affine import AffineConv
from updp_tf.errors import ShapeError
from updp_tf.solving import RIDGE, conjugate_gradients, solve_positive
from updp_tf.windows import Chosen, Drawn, Patches, Window, rows_at_once

BYTES_IN_CACHE = 2**20
"""Bytes of images that depthwise sums are computed of at a time."""


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
    chosen: Chosen
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
            patches = Patches.of(window, self.images[start : start + step])
            first, last = np.searchsorted(images[order], (start, start + step))
            rows = order[first:last]
            where = (images[rows] - start, heights[rows], widths[rows])
            taps = (
                (row * window.kernel_size[1] + column, patches.tap(row, column))
                for row in range(window.kernel_size[0])
                for column in range(window.kernel_size[1])
            )
            yield _Inside(rows, where), taps, patches.grid


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

    def add(self, drawn: Drawn) -> None:
        """Add sampled positions of some images."""
        outputs = drawn.outputs.astype(np.float64)
        if drawn.n * self.window.n_taps * self.c_in <= drawn.images.size:
            part = _Part(drawn.patches().astype("float32"), None, drawn.chosen, outputs)
        else:
            part = _Part(None, np.array(drawn.images, "float32"), drawn.chosen, outputs)
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
        step, done = rows_at_once(self.window.n_taps * self.c_in), 0
        for part in self._parts:
            every = None if part.images is None else Patches.of(self.window, part.images)
            for start in range(0, len(part.outputs), step):
                rows = slice(start, min(start + step, len(part.outputs)))
                if every is None:
                    assert part.patches is not None  # noqa: S101 - one of the two is there
                    patches = part.patches[rows]
                else:
                    patches = every.at(part.chosen.part(rows))
                yield slice(done + rows.start, done + rows.stop), patches
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

        change = conjugate_gradients(normal, right, n_steps, tolerance)
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
        change = conjugate_gradients(lambda one: normal(one.reshape(depthwise.shape)).reshape(-1, 1), right, n_steps)
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


def _ridge(features: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge regression of centred `y` on centred features, both (n, channels); a dead feature gets weight 0."""
    features = features.astype(np.float64)
    gram = features.T @ features
    gram[np.diag_indices_from(gram)] += ridge * np.trace(gram) / len(gram) + np.finfo("float32").tiny
    return solve_positive(gram, features.T @ y)
