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
class Patches:
    """All patches of some images, of which only those that are asked for are written out.

    Attributes:
        window: which pixels a patch holds.
        padded: the images with the window's padding, shape (images, height, width, c_in).
    """

    window: Window
    padded: np.ndarray

    @classmethod
    def of(cls, window: Window, x: np.ndarray) -> Patches:
        """Patches of images of shape (images, height, width, c_in)."""
        top, bottom, left, right = window.padding
        padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0))) if any(window.padding) else x
        return cls(window, np.ascontiguousarray(padded))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Images, rows and columns of patches."""
        n, *size, _ = self.padded.shape
        rows, columns = (
            (pixels - taps) // stride + 1
            for pixels, taps, stride in zip(size, self.window.kernel_size, self.window.strides, strict=True)
        )
        return n, rows, columns

    def at(self, chosen: Chosen) -> np.ndarray:
        """Return the patches of some positions, shape (n, taps, c_in)."""
        _, height, width, channels = self.padded.shape
        images, rows, columns = chosen.where
        first = (images * height + rows * self.window.strides[0]) * width + columns * self.window.strides[1]
        taps = np.arange(self.window.kernel_size[0])[:, None] * width + np.arange(self.window.kernel_size[1])
        # whole pixels are copied: their channels lie side by side
        return self.padded.reshape(-1, channels)[first[:, None] + taps.ravel()]

    def tap(self, row: int, column: int) -> np.ndarray:
        """Return the pixel of every patch at one tap, a view of shape (images, rows, columns, c_in)."""
        _, n_rows, n_columns = self.grid
        down, right = self.window.strides
        return self.padded[:, row::down, column::right][:, :n_rows, :n_columns]


@dataclass(frozen=True, eq=False)
class Drawn:
    """Sampled positions of a batch of images: what evidence is added from.

    Attributes:
        images: block input, shape (images, height, width, c_in).
        chosen: output positions of them.
        outputs: what the block writes there, shape (n, c_out).
        every: the patches of all positions.
    """

    images: np.ndarray
    chosen: Chosen
    outputs: np.ndarray
    every: Patches

    @property
    def n(self) -> int:
        """Number of positions."""
        return self.chosen.n

    def patches(self, rows: slice = slice(None)) -> np.ndarray:
        """Return the patches of some positions, shape (n, taps, c_in)."""
        return self.every.at(self.chosen.part(rows))


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
    every = Patches.of(window, x)
    if every.grid != y.shape[:3]:
        raise ShapeError(
            f"A window of {window} gives outputs of size {every.grid[1:]}, the block writes {y.shape[1:3]}."
        )
    chosen = _choose(every.grid, n_positions, rng, special_rows)
    return Drawn(x, chosen, y[chosen.where], every)


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


def rows_at_once(n_unknowns: int) -> int:
    """Patches of so many numbers that are written out at a time."""
    return max(1, BYTES_AT_ONCE // (4 * n_unknowns))
