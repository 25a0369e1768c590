"""Which input pixels an output pixel is fitted from, and which output pixels of some images a fit looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from updp_tf import affine
from updp_tf.affine import AffineConv
from updp_tf.errors import ShapeError

BYTES_AT_ONCE = 64 * 2**20
"""Bytes of float32 patches that are written out at a time."""


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
class Chosen:
    """Output positions of some images that a fit looks at.

    Attributes:
        where: image, row and column of each, three arrays of shape (n,).
        weights: how much each counts, shape (n,).
    """

    where: tuple[np.ndarray, np.ndarray, np.ndarray]
    weights: np.ndarray

    @property
    def n(self) -> int:
        """Number of positions."""
        return len(self.weights)

    def part(self, rows: slice) -> Chosen:
        """Some of them."""
        images, heights, widths = self.where
        return Chosen((images[rows], heights[rows], widths[rows]), self.weights[rows])


@dataclass(frozen=True, eq=False)
class Drawn:
    """Sampled positions of a batch of images: what evidence is added from.

    Attributes:
        images: block input, shape (images, height, width, c_in).
        chosen: output positions of them.
        outputs: what the block writes there, shape (n, c_out).
        views: patches of all positions, a view of shape (images, rows, columns, c_in, kernel height, kernel width).
    """

    images: np.ndarray
    chosen: Chosen
    outputs: np.ndarray
    views: np.ndarray

    @property
    def n(self) -> int:
        """Number of positions."""
        return self.chosen.n

    def patches(self, rows: slice = slice(None)) -> np.ndarray:
        """Return the patches of some positions, shape (n, taps, c_in)."""
        return patches_at(self.views, self.chosen.part(rows))


def draw(
    window: Window,
    x: np.ndarray,
    y: np.ndarray,
    *,
    n_positions: int,
    rng: np.random.Generator,
    special_rows: Sequence[int] = (),
) -> Drawn:
    """Choose output positions of some images at random.

    Special rows (class tokens) are taken from every image and weigh as much as all other positions together: one token
    among 197 is invisible to a plain fit (METHOD, section 2).

    Args:
        window: which pixels a patch holds.
        x: block input, shape (images, height, width, c_in).
        y: block output, shape (images, out_height, out_width, c_out).
        n_positions: how many of the images' positions to take; all, if there are no more.
        rng: chooses them.
        special_rows: rows of the output that weigh as much as all others together.

    Raises:
        ShapeError: the output is not of the size that the window gives.
    """
    views = patch_views(window, x)
    if views.shape[:3] != y.shape[:3]:
        raise ShapeError(
            f"A window of {window} gives outputs of size {views.shape[1:3]}, the block writes {y.shape[1:3]}."
        )
    chosen = _choose(y.shape[:3], n_positions, rng, special_rows)
    return Drawn(x, chosen, y[chosen.where], views)


def _choose(shape: tuple[int, ...], n_positions: int, rng: np.random.Generator, special_rows: Sequence[int]) -> Chosen:
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
    return Chosen((images, heights, widths), weights)


def patch_views(window: Window, x: np.ndarray) -> np.ndarray:
    """Return all patches of images as a view: (images, rows, columns, c_in, kernel height, kernel width)."""
    top, bottom, left, right = window.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0))) if any(window.padding) else x
    views = np.lib.stride_tricks.sliding_window_view(padded, window.kernel_size, axis=(1, 2))
    return views[:, :: window.strides[0], :: window.strides[1]]


def patches_at(views: np.ndarray, chosen: Chosen) -> np.ndarray:
    """Return the patches of some positions, taps before channels: shape (n, taps, c_in)."""
    c_in, *kernel_size = views.shape[3:]
    return views[chosen.where].transpose(0, 2, 3, 1).reshape(chosen.n, int(np.prod(kernel_size)), c_in)


def rows_at_once(n_unknowns: int) -> int:
    """Patches of so many numbers that are written out at a time."""
    return max(1, BYTES_AT_ONCE // (4 * n_unknowns))
