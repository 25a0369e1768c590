"""Accuracy of a `.tflite` file on labelled images, and its agreement with a reference. No TensorFlow."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from tflite_export.errors import DataError, OptionError
from tflite_export.interpreter import TfliteRunner

Progress = Callable[[int, int, str], None]

_CHUNK = 16  # images between two calls of `progress`


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of one file.

    Attributes:
        path: the file.
        n: number of images.
        accuracy: share of images whose label is among the k highest outputs, by k.
        standard_error: one standard error of each accuracy, by k: sqrt(p (1 - p) / n).
        agreement: share of images whose highest output is the reference's; None without a reference.
        mean_kl: mean Kullback-Leibler divergence from the reference's probabilities in nats; None without a reference.
    """

    path: Path
    n: int
    accuracy: dict[int, float]
    standard_error: dict[int, float]
    agreement: float | None
    mean_kl: float | None

    @property
    def top1(self) -> float:
        """Accuracy of the highest output."""
        return self.accuracy[1]

    @property
    def top5(self) -> float:
        """Share of images whose label is among the five highest outputs."""
        return self.accuracy[5]

    def as_json(self) -> dict[str, Any]:
        """Return the record as values that `json.dump` takes."""
        by_k = {"accuracy": self.accuracy, "standard_error": self.standard_error}
        return asdict(self) | {"path": str(self.path)} | {name: {str(k): v[k] for k in v} for name, v in by_k.items()}

    def __str__(self) -> str:
        parts = [
            f"top-{k} {100 * value:.1f} % (+- {100 * self.standard_error[k]:.1f})" for k, value in self.accuracy.items()
        ]
        if self.agreement is not None:
            parts.append(f"agreement {100 * self.agreement:.1f} %, mean KL {self.mean_kl:.3g}")
        return f"{self.path}: {', '.join(parts)}, {self.n} images"


def evaluate(
    path: str | Path,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    top: Sequence[int] = (1, 5),
    reference: np.ndarray | None = None,
    output: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run a classifier on labelled images.

    Args:
        path: the `.tflite` file.
        images: what the Keras model takes, of shape (n, ...).
        labels: class indices of shape (n,), or one-hot rows of shape (n, classes).
        top: which top-k accuracies to compute; those with k above the number of classes are left out.
        reference: outputs of another model on the same images, of shape (n, classes): probabilities or logits.
        output: name of the output to judge, where the file has several.
        threads: how many images run at a time, by default one for each core.
        progress: called with (images done, images in all, what runs).

    Raises:
        DataError: images, labels and reference do not fit the file or each other.
        OptionError: an option is out of range.
        FlatbufferError: the file is damaged.
        DeviceError: the runtime here cannot run the file.
    """
    n = len(images)
    if not n or len(labels) != n or (reference is not None and len(reference) != n):
        lengths = [n, len(labels)] + ([] if reference is None else [len(reference)])
        raise DataError(f"images, labels (and reference) must have one length above 0, not {lengths}.")
    if not top or min(top) < 1:
        raise OptionError(f"top must hold numbers of at least 1, not {tuple(top)}.")
    outputs = run_tflite(path, images, output=output, threads=threads, progress=progress).reshape(n, -1)
    classes = _class_indices(np.asarray(labels), outputs.shape[1])
    if reference is not None and np.shape(reference) != outputs.shape:
        raise DataError(f"the reference has shape {np.shape(reference)}, but the file gives {outputs.shape}.")
    # Stable, so that equal outputs (common in int8) are ranked by index, the same on every machine.
    ranked = np.argsort(-outputs, axis=1, kind="stable")
    accuracy = {k: float((ranked[:, :k] == classes[:, None]).any(axis=1).mean()) for k in top if k <= outputs.shape[1]}
    agreement = None if reference is None else float((ranked[:, 0] == np.argmax(reference, axis=1)).mean())
    return Evaluation(
        path=Path(path),
        n=n,
        accuracy=accuracy,
        standard_error={k: float(np.sqrt(p * (1 - p) / n)) for k, p in accuracy.items()},
        agreement=agreement,
        mean_kl=None if reference is None else _mean_kl(np.asarray(reference), outputs),
    )


def run_tflite(
    path: str | Path,
    images: np.ndarray | Mapping[str, np.ndarray],
    *,
    output: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Return the outputs of a `.tflite` file as real numbers, float32 of shape (n, ...).

    Images run one by one in `threads` interpreters of one thread each: as fast as one interpreter with two threads on
    two cores, and faster on more, since small layers do not split well.

    Args:
        path: the `.tflite` file.
        images: what the Keras model takes, of shape (n, ...); by input name where the file has several inputs.
        output: name of the output to return, where the file has several.
        threads: how many images run at a time, by default one for each core.
        progress: called with (images done, images in all, what runs).

    Raises:
        DataError: the images do not fit the file, or the output must be named.
        OptionError: an option is out of range.
        FlatbufferError: the file is damaged.
        DeviceError: the runtime here cannot run the file.
    """
    if threads is not None and threads < 1:
        raise OptionError(f"threads must be at least 1, not {threads}.")
    arrays = dict(images) if isinstance(images, Mapping) else {"": np.asarray(images)}
    n = min((len(array) for array in arrays.values()), default=0)
    first = TfliteRunner(path)
    name = _output_name(first, output)
    chunks = [slice(start, start + _CHUNK) for start in range(0, n, _CHUNK)] or [slice(0, 0)]
    workers = min(threads or _n_cores(), len(chunks))
    idle: SimpleQueue[TfliteRunner] = SimpleQueue()
    for runner in (first, *(TfliteRunner(path) for _ in range(workers - 1))):
        idle.put(runner)

    def run(chunk: slice) -> np.ndarray:
        runner = idle.get()
        try:
            part = {key: array[chunk] for key, array in arrays.items()}
            return runner.run(part if isinstance(images, Mapping) else part[""])[name]
        finally:
            idle.put(runner)

    results = []
    with ThreadPoolExecutor(workers) as pool:
        for chunk, result in zip(chunks, pool.map(run, chunks), strict=True):
            results.append(result)
            if progress:
                progress(min(chunk.stop, n), n, f"running '{path}'")
    return np.concatenate(results)


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _output_name(runner: TfliteRunner, output: str | None) -> str:
    names = runner.model.output_names
    if output is None and len(names) == 1:
        return names[0]
    if output not in names:
        raise DataError(f"'{runner.model.source}' has the outputs {list(names)}: name one of them with output=.")
    return output


def _class_indices(labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Return class indices of shape (n,) from indices or one-hot rows."""
    if labels.ndim == 2 and labels.shape[1] == n_classes and n_classes > 1:
        return labels.argmax(axis=1)
    flat = labels.reshape(len(labels), -1)
    if flat.shape[1] != 1 or flat.dtype.kind not in "iu":
        raise DataError(
            f"labels must be class indices of shape (n,) or one-hot rows of shape (n, {n_classes}), "
            f"not {labels.dtype} of shape {labels.shape}."
        )
    if flat.min() < 0 or flat.max() >= n_classes:
        raise DataError(f"labels range from {flat.min()} to {flat.max()}, but the file has {n_classes} classes.")
    return flat[:, 0]


def _mean_kl(reference: np.ndarray, outputs: np.ndarray) -> float:
    p, q = _probabilities(reference), _without_zeros(_probabilities(outputs))
    return float(np.mean(np.sum(np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(q)), 0), axis=1)))


def _without_zeros(q: np.ndarray) -> np.ndarray:
    """Share out among the zeros of each row what the row lacks to 1: int8 softmax rounds small values to 0."""
    zero = q <= 0
    lacking = np.maximum(1 - q.sum(axis=1, keepdims=True), 1e-6)
    filled = np.where(zero, lacking / np.maximum(zero.sum(axis=1, keepdims=True), 1), q)
    return filled / filled.sum(axis=1, keepdims=True)


def _probabilities(outputs: np.ndarray) -> np.ndarray:
    """Return probabilities: the outputs where they look like some, else their softmax.

    Rows of an int8 softmax sum to anything up to about 1: what is rounded to 0 is lacking.
    """
    values = outputs.astype(np.float64)
    if values.min() >= 0 and values.max() <= 1 and values.sum(axis=1).max() < 1.25:
        return values
    exponentials = np.exp(values - values.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
