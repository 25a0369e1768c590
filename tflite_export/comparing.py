"""Which layer hurts: the error of each layer of an integer file against the float file it was made from. No TensorFlow.

Two errors are told. What has gathered up to a layer: its output in the whole file against the float one. And its own:
its output where it reads the float file's values, rounded as it wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tflite_export.errors import DataError
from tflite_export.files import check_target, place
from tflite_export.flatbuffer import read_bytes
from tflite_export.layerwise import OperatorFile
from tflite_export.noise import CONVERSIONS, decibels, noise_sums
from tflite_export.post_training import short_name

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LayerError:
    """Error of one operator's output.

    Attributes:
        name: of the layer, as the converter named its tensor.
        operator: what computes it.
        shape: of its output.
        gathered_db: signal over noise, in dB, of its output in the whole file.
        own_db: the same where it alone is in integers; infinite where its output is exact, None where the float file
            does not hold what it reads.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    gathered_db: float | None
    own_db: float | None


@dataclass(frozen=True)
class Comparison:
    """Errors of all layers that both files have, in the order of the file.

    Attributes:
        reference: the float file.
        path: the integer file.
        n: number of images.
        layers: one row for each.
        skipped: names of the layers of the integer file that the float one does not have.
    """

    reference: Path
    path: Path
    n: int
    layers: tuple[LayerError, ...]
    skipped: tuple[str, ...]

    @property
    def worst(self) -> tuple[LayerError, ...]:
        """The layers by their own error, the largest first."""
        return tuple(sorted(self.layers, key=lambda one: np.inf if one.own_db is None else one.own_db))

    def as_json(self) -> dict[str, Any]:
        """Return the record as values that `json.dump` takes; infinite ones are None."""
        layers = [
            {key: None if value == np.inf else value for key, value in asdict(one).items()} for one in self.layers
        ]
        return {
            "reference": str(self.reference),
            "path": str(self.path),
            "n": self.n,
            "layers": layers,
            "worst": [one.name for one in self.worst[:5]],
            "skipped": list(self.skipped),
        }

    def __str__(self) -> str:
        rank = {one.name: number + 1 for number, one in enumerate(self.worst[:5])}
        rows: list[tuple[str, ...]] = [("layer", "operator", "shape", "gathered dB", "own dB", "")]
        for one in self.layers:
            shape = "x".join(map(str, one.shape[1:])) or "1"
            mark = f"<- {rank[one.name]}" if one.name in rank else ""
            numbers = ("-" if value is None else f"{value:.1f}" for value in (one.gathered_db, one.own_db))
            rows.append((one.name, one.operator, shape, *numbers, mark))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(
            f"'{self.path}' against '{self.reference}', {self.n} images; the arrows mark the largest own errors"
        )
        return "\n".join(lines)

    def plot(self, path: str | Path, *, force: bool = False) -> None:
        """Draw both errors of each layer.

        Args:
            path: the picture to write; its ending says which kind.
            force: whether an existing file is replaced.

        Raises:
            OutputError: the file exists and `force` is not set, or it cannot be written.
        """
        from matplotlib.figure import Figure

        target = Path(path)
        check_target(target, force=force)
        figure = Figure(figsize=(max(6.0, 0.22 * len(self.layers)), 4.5), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(self.layers))
        own, gathered = (
            np.array([np.nan if one is None or np.isinf(one) else one for one in column])
            for column in zip(*((one.own_db, one.gathered_db) for one in self.layers), strict=True)
        )
        axes.bar(places, own, color="#9ecae1", label="of the layer alone")
        axes.plot(places, gathered, "o-", ms=3, color="#d62728", label="all up to it")
        axes.set_xticks(places, [one.name.rpartition("/")[0] or one.name for one in self.layers], rotation=90)
        axes.tick_params(axis="x", labelsize=6)
        axes.set_ylabel("signal over noise (dB), higher is better")
        axes.set_title(f"{self.path.name} against {self.reference.name}, {self.n} images", fontsize=9)
        axes.legend()
        made = target.with_name(f".making_{target.name}")
        try:
            figure.savefig(made)
            place(made, target)
        finally:
            made.unlink(missing_ok=True)


def compare(
    reference: str | Path,
    path: str | Path,
    images: np.ndarray | Mapping[str, np.ndarray],
    *,
    progress: Progress | None = None,
) -> Comparison:
    """Compare an integer file with the float file it was made from, layer by layer.

    Args:
        reference: the float file: `export(..., float_copy=reference)` writes it. Another export of the same model has
            other ranges of channels where `post_training` equalized them.
        path: the integer file.
        images: what the Keras model takes, of shape (n, ...), by name where there are several inputs; 20 tell enough.
        progress: called with (images done, images in all, what runs).

    Raises:
        DataError: the images do not fit, or the files have no layer in common.
        FlatbufferError: a file is damaged.
        DeviceError: the runtime here cannot run an operator alone.

    Example:
        >>> print(compare("m_float.tflite", "m.tflite", images[:20]))  # doctest: +SKIP
    """
    files = {
        name: OperatorFile(read_bytes(Path(one)), name=str(one)) for name, one in (("float", reference), ("int", path))
    }
    named = dict(images) if isinstance(images, Mapping) else {files["float"].model.input_names[0]: np.asarray(images)}
    n = min(len(array) for array in named.values())
    _check_images(files["float"], named, n)
    totals = noise_sums(
        files["float"],
        files["int"],
        named,
        progress=progress and (lambda done, count: progress(done, count, f"comparing '{path}'")),
    )
    graph = files["int"].graph
    if not totals:
        raise DataError(f"'{reference}' and '{path}' have no layer in common: export both from one model.")
    rows = []
    for number, (signal, gathered, own) in totals.items():
        tensor = graph.tensors[graph.operators[number].outputs[0]]
        rows.append(
            LayerError(
                short_name(tensor.name),
                graph.operators[number].name,
                tensor.shape,
                decibels(signal, gathered),
                decibels(signal, own),
            )
        )
    skipped = [
        short_name(graph.tensors[one.outputs[0]].name)
        for number, one in enumerate(graph.operators)
        if number not in totals and one.name not in CONVERSIONS
    ]
    return Comparison(Path(reference), Path(path), n, tuple(_numbered(rows)), tuple(skipped))


def _check_images(file: OperatorFile, named: Mapping[str, np.ndarray], n: int) -> None:
    for index, name in zip(file.graph.inputs, file.model.input_names, strict=True):
        shape = file.graph.tensors[index].shape
        if name not in named or not n or named[name].shape[1:] != shape[1:]:
            given = {key: array.shape for key, array in named.items()}
            raise DataError(f"input '{name}' of '{file.model.source}' takes images of shape {shape[1:]}, not {given}.")


def _numbered(rows: list[LayerError]) -> list[LayerError]:
    """Two operators of one layer have one name: tell them apart."""
    seen: dict[str, int] = {}
    result = []
    for one in rows:
        seen[one.name] = seen.get(one.name, 0) + 1
        result.append(one if seen[one.name] == 1 else replace(one, name=f"{one.name} ({seen[one.name]})"))
    return result
