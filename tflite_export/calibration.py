"""Gather calibration images from whatever holds them: an array, a data set, an iterable of batches."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tflite_export.errors import DataError


@dataclass(frozen=True)
class Calibration:
    """Images, one array of shape (n, ...) per input; names where the caller gave them by name."""

    arrays: tuple[np.ndarray, ...]
    names: tuple[str, ...] | None
    note: str | None


def collect(calibration: Any, limit: int) -> Calibration:
    """Return at most `limit` images: spread evenly over an array, the first ones of a stream.

    Args:
        calibration: as `export` takes it.
        limit: most images to keep.

    Raises:
        DataError: no images, images of different shapes, or values that are no finite numbers.
    """
    whole = calibration[0] if isinstance(calibration, tuple) and calibration else calibration
    if isinstance(whole, Mapping) or _is_array(whole):
        arrays, names = _inputs_of(whole)
        n = len(arrays[0]) if arrays and arrays[0].ndim else 0
        chosen = np.unique(np.linspace(0, max(n - 1, 0), min(n, limit)).astype(int))
        if any(array.shape[:1] != (n,) for array in arrays):
            raise DataError(f"the calibration arrays have different lengths: {[array.shape for array in arrays]}.")
        gathered = [[array[chosen]] for array in arrays]
    else:
        gathered, names, n = _collect_batches(whole, limit)
    if not n:
        raise DataError("the calibration data holds no images: give about 100.")
    joined = tuple(_checked(parts) for parts in gathered)
    note = f"calibrated on {len(joined[0])} images, the limit (calibration_limit)" if n > limit else None
    return Calibration(joined, names, note)


def _collect_batches(batches: Iterable[Any], limit: int) -> tuple[list[list[np.ndarray]], tuple[str, ...] | None, int]:
    """Return the arrays of each input, their names, and how many images there were (more than `limit`: at least)."""
    gathered: list[list[np.ndarray]] = []
    names: tuple[str, ...] | None = None
    n = 0
    for batch in _batches(batches):
        if n >= limit:
            return gathered, names, n + 1
        arrays, batch_names = _inputs_of(batch[0] if isinstance(batch, tuple) and batch else batch)
        if gathered and (len(arrays) != len(gathered) or batch_names != names):
            raise DataError(f"the calibration batches differ: one has {len(gathered)} inputs, another {len(arrays)}.")
        if any(array.ndim == 0 for array in arrays):
            raise DataError("the calibration data must be batches of images, but one batch is a single number.")
        gathered, names = gathered or [[] for _ in arrays], batch_names
        for parts, array in zip(gathered, arrays, strict=True):
            parts.append(array[: limit - n])
        n += len(arrays[0])
    return gathered, names, n


def _batches(data: Any) -> Iterator[Any]:
    # A PyDataset has no __iter__, and iterating by index would never end.
    if not hasattr(data, "__iter__") and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return (data[i] for i in range(len(data)))
    if not isinstance(data, Iterable):
        raise DataError(
            f"calibration must be an array, a dataset or an iterable of batches, but got {type(data).__name__}."
        )
    return iter(data)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "__array__")


def _inputs_of(value: Any) -> tuple[list[np.ndarray], tuple[str, ...] | None]:
    if isinstance(value, Mapping):
        return [np.asarray(array) for array in value.values()], tuple(map(str, value))
    if isinstance(value, list | tuple) and value and all(_is_array(item) and np.ndim(item) for item in value):
        return [np.asarray(item) for item in value], None
    return [np.asarray(value)], None


def _checked(parts: list[np.ndarray]) -> np.ndarray:
    shapes = sorted({part.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise DataError(f"the calibration images have different shapes: {shapes[0]} and {shapes[1]}.")
    images = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if images.dtype.kind not in "fiub":
        raise DataError(f"the calibration images must be numbers, but their type is {images.dtype}.")
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        bad = int(np.sum(~np.isfinite(images.reshape(len(images), -1)).all(axis=1)))
        raise DataError(f"{bad} of {len(images)} calibration images hold NaN or infinite values: remove them.")
    return images
