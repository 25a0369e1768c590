"""Arrays for all images: in memory up to a limit, then in memory-mapped files of a temporary folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from updp_tf.errors import CalibrationError

DEFAULT_LIMIT_BYTES = 1_500_000_000
"""How much of the activations at block borders may live in memory."""


class Memory:
    """Gives out arrays; a context manager that takes its files along when it closes.

    Args:
        limit_bytes: what may live in memory at the same time; larger arrays go to disk.
    """

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._used = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._n_files = 0

    def __enter__(self) -> Memory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def allocate(self, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
        """Return an uninitialised array, memory-mapped where memory is used up."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if self._used + size <= self._limit:
            self._used += size
            return np.empty(shape, dtype)
        return np.memmap(self._new_file(), dtype=dtype, mode="w+", shape=shape)

    def release(self, array: np.ndarray) -> None:
        """Say that an array is not needed any more; its file is deleted."""
        if isinstance(array, np.memmap):
            if array.filename is not None:
                Path(array.filename).unlink(missing_ok=True)
        else:
            self._used -= array.nbytes

    def _new_file(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="updp_tf_")
        self._n_files += 1
        return Path(self._folder.name) / f"{self._n_files}.bin"

    def collect(self, batches: Iterable[np.ndarray]) -> np.ndarray:
        """Return all batches as one float32 array, written through to disk once memory is used up.

        Args:
            batches: arrays of images of one shape; at least one.

        Raises:
            CalibrationError: two batches hold images of different shapes.
        """
        held: list[np.ndarray] = []
        file: Path | None = None
        n = 0
        shape: tuple[int, ...] = ()
        for batch in batches:
            if n and batch.shape[1:] != shape:
                raise CalibrationError(
                    f"Calibration batches hold images of shape {shape} and {batch.shape[1:]}; give one shape."
                )
            shape = batch.shape[1:]
            held.append(np.ascontiguousarray(batch, dtype="float32"))
            n += len(batch)
            if self._used + sum(part.nbytes for part in held) > self._limit:
                file = file or self._new_file()
                _append(file, held)
                held = []
        if file is None:
            array = self.allocate((n, *shape))
            np.concatenate(held, out=array) if held else None
            return array
        _append(file, held)
        return np.memmap(file, dtype="float32", mode="r", shape=(n, *shape))


def _append(file: Path, parts: list[np.ndarray]) -> None:
    with file.open("ab") as stream:
        for part in parts:
            stream.write(part.tobytes())


def calibration_images(source: Any, *, shape: tuple[int | None, ...], memory: Memory) -> np.ndarray:
    """Return checked calibration images as one float32 array, on disk where memory is used up.

    Args:
        source: as `image_batches` reads it; a float32 array is returned as it is.
        shape: that the model reads, batch axis first.
        memory: where they live.

    Raises:
        CalibrationError: as `image_batches`.
    """
    if isinstance(source, np.ndarray) and source.dtype == np.float32:
        for _ in image_batches(source, shape=shape):
            pass
        return source
    return memory.collect(image_batches(source, shape=shape))


def image_batches(source: Any, *, shape: tuple[int | None, ...], batch_size: int = 64) -> Iterator[np.ndarray]:
    """Yield calibration images as checked float32 batches.

    Args:
        source: an array of images, a `tf.data.Dataset`, a Keras `PyDataset`, or any iterable of batches; of a batch
            (images, labels, ...) the first element counts.
        shape: that the model reads, batch axis first; None where dynamic.
        batch_size: how an array is cut.

    Raises:
        CalibrationError: no images, or images of another shape, of no number type, or with NaN or infinite values.
    """
    empty = True
    for batch in _batches(source, batch_size, rank=len(shape)):
        images = np.asarray(batch)
        _check(images, shape)
        if len(images):
            empty = False
            yield images.astype("float32", copy=False)
    if empty:
        raise CalibrationError("The calibration data holds no images.")


def _batches(source: Any, batch_size: int, *, rank: int) -> Iterator[Any]:
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        array = np.asarray(source)
        if array.ndim != rank:
            raise CalibrationError(
                f"The calibration images have shape {array.shape}; the model reads rank {rank}, batch axis first."
            )
        for start in range(0, len(array), batch_size):
            yield array[start : start + batch_size]
        return
    plain = isinstance(source, list | tuple | str | bytes | dict)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not plain:
        # A PyDataset: iterating over it would go on for ever.
        items: Iterable[Any] = (source[index] for index in range(len(source)))
    elif isinstance(source, Iterable) and not isinstance(source, str | bytes | dict):
        items = source
    else:
        raise CalibrationError(
            f"Calibration data is an array of images or an iterable of batches. Received: {type(source).__name__}"
        )
    for item in items:
        yield item[0] if isinstance(item, list | tuple) else item


def _check(images: np.ndarray, shape: tuple[int | None, ...]) -> None:
    fits = images.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(images.shape[1:], shape[1:], strict=False)
    )
    if not fits:
        wanted = tuple("any" if axis is None else axis for axis in shape[1:])
        raise CalibrationError(
            f"A calibration batch has shape {images.shape}; the model reads images of shape {wanted}, batch axis first."
        )
    if images.dtype.kind not in "fiu" and images.dtype.name != "bfloat16":
        raise CalibrationError(f"Calibration images have dtype {images.dtype}; numbers are needed.")
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise CalibrationError("The calibration images hold NaN or infinite values; remove or repair those images.")
