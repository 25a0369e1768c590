"""Labels and input normalization in a `.tflite` file, where readers of TFLite Metadata look, and beside it as JSON.

The format: a buffer named TFLITE_METADATA, a flatbuffer of its own with the identifier M001, says what the tensors
mean; files that it names (the labels, one a line) stand in a zip archive behind the model's bytes.

Source: the schema of TFLite Metadata, `metadata_schema.fbs` of tflite-support, version 1.5.0.
"""

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np

from tflite_export.errors import DataError
from tflite_export.flatbuffer import TfliteModel, read_flatbuffer

LABEL_FILE = "labels.txt"
_NAME, _IDENTIFIER, _MIN_VERSION = "TFLITE_METADATA", b"M001", "1.0.0"
# Numbers of the schema: AssociatedFileType, ContentProperties, ProcessUnitOptions, ColorSpaceType.
_TENSOR_AXIS_LABELS, _FEATURE, _IMAGE, _NORMALIZATION, _RGB, _GRAYSCALE = 2, 1, 2, 1, 1, 2
# A fixed date, so that the same model gives the same bytes.
_DATE = (1980, 1, 1, 0, 0, 0)
_ALIGNMENT = 16


@dataclass(frozen=True)
class Meaning:
    """What the numbers of a classifier's file mean.

    Attributes:
        labels: name of each class, in order; empty where they are not told.
        mean: of each channel, or one for all: the model reads (pixel - mean) / std.
        std: the same way.
    """

    labels: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the record as values that `json.dump` takes."""
        normalization = {"mean": list(self.mean), "std": list(self.std)} if self.mean else None
        return {"labels": list(self.labels), "normalization": normalization}


def make_meaning(labels: Sequence[str] | None, normalization: tuple[Any, Any] | None) -> Meaning | None:
    """Return what a user said of a model, checked, or None where nothing was said.

    Args:
        labels: name of each class.
        normalization: mean and standard deviation, each a number or one for each channel.

    Raises:
        DataError: labels that are no words of one line, or a normalization that divides by 0.
    """
    if labels is None and normalization is None:
        return None
    names = tuple(labels or ())
    if isinstance(labels, str) or not all(isinstance(one, str) and "\n" not in one for one in names):
        raise DataError("labels must be a sequence of names without line breaks, one for each class.")
    if normalization is None:
        return Meaning(names)
    mean, std = (tuple(float(one) for one in np.ravel(part)) for part in normalization)
    if len(mean) != len(std) or not all(np.isfinite([*mean, *std])) or 0 in std:
        raise DataError(f"normalization must be finite (mean, std) of one length, std not 0, not {normalization!r}.")
    return Meaning(names, mean, std)


def with_meaning(data: bytes, meaning: Meaning, *, name: str) -> bytes:
    """Return the bytes of a `.tflite` file with metadata in it and the labels behind.

    Args:
        data: a file without metadata.
        meaning: what to tell.
        name: of the model.

    Raises:
        DataError: there are not as many labels as classes, or as many means as channels.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = read_flatbuffer(data, name=name)
    _check(model, meaning)
    parts = schema.ModelT.InitFromPackedBuf(data, 0)
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = np.frombuffer(_metadata(model, meaning, name), np.uint8)
    entry.name, entry.buffer = _NAME, len(parts.buffers)
    parts.buffers.append(buffer)
    parts.metadata = [*(parts.metadata or []), entry]
    builder = _AlignedBuilder(len(data) + 1024)
    builder.Finish(parts.Pack(builder), b"TFL3")
    return bytes(builder.Output()) + (_archive(meaning.labels) if meaning.labels else b"")


def _check(model: TfliteModel, meaning: Meaning) -> None:
    classes = [tensor.shape[-1] for tensor in model.outputs if tensor.shape]
    if meaning.labels and len(meaning.labels) not in classes:
        raise DataError(f"there are {len(meaning.labels)} labels, but model '{model.source}' has {classes} outputs.")
    channels = [tensor.shape[-1] for tensor in model.inputs if tensor.shape]
    if len(meaning.mean) > 1 and len(meaning.mean) not in channels:
        raise DataError(f"there are {len(meaning.mean)} means, but model '{model.source}' reads {channels} channels.")


class _AlignedBuilder(flatbuffers.Builder):
    """Keeps stored weights at multiples of 16 bytes, as the schema wants; the generated code forgets it."""

    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:  # noqa: N802, N803
        return super().StartVector(elemSize, numElems, max(alignment, _ALIGNMENT) if elemSize == 1 else alignment)


def _archive(labels: Sequence[str]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(zipfile.ZipInfo(LABEL_FILE, _DATE), "\n".join(labels))
    return packed.getvalue()


def _metadata(model: TfliteModel, meaning: Meaning, name: str) -> bytes:
    """Return the flatbuffer that says what the tensors mean."""
    build = _Tables()
    inputs = [_input(build, meaning, *one) for one in zip(model.input_names, model.inputs, strict=True)]
    outputs = [_output(build, meaning, *one) for one in zip(model.output_names, model.outputs, strict=True)]
    graph = build.table(10, {2: build.offsets(inputs), 3: build.offsets(outputs)})
    fields = {0: build.text(name), 3: build.offsets([graph]), 7: build.text(_MIN_VERSION)}
    return build.finish(build.table(8, fields))


def _input(build: "_Tables", meaning: Meaning, name: str, tensor: Any) -> int:
    fields = {0: build.text(name)}
    channels = tensor.shape[-1] if len(tensor.shape) == 4 else 0
    if channels in (1, 3):
        image = build.table(2, {}, small={0: _RGB if channels == 3 else _GRAYSCALE})
        fields[3] = build.table(3, {1: image}, small={0: _IMAGE})
    if meaning.mean and len(tensor.shape) == 4:
        options = build.table(2, {0: build.floats(meaning.mean), 1: build.floats(meaning.std)})
        fields[4] = build.offsets([build.table(2, {1: options}, small={0: _NORMALIZATION})])
    return build.table(7, fields)


def _output(build: "_Tables", meaning: Meaning, name: str, tensor: Any) -> int:
    fields = {0: build.text(name), 3: build.table(3, {1: build.table(0, {})}, small={0: _FEATURE})}
    if meaning.labels and tensor.shape and tensor.shape[-1] == len(meaning.labels):
        file = build.table(5, {0: build.text(LABEL_FILE)}, small={2: _TENSOR_AXIS_LABELS})
        fields[6] = build.offsets([file])
    return build.table(7, fields)


class _Tables:
    """Writes tables by the numbers of their fields."""

    def __init__(self) -> None:
        self._builder = flatbuffers.Builder(1024)

    def text(self, value: str) -> int:
        return self._builder.CreateString(value)

    def floats(self, values: Sequence[float]) -> int:
        return self._vector(values, self._builder.PrependFloat32)

    def offsets(self, values: Sequence[int]) -> int:
        return self._vector(values, self._builder.PrependUOffsetTRelative)

    def _vector(self, values: Sequence[Any], prepend: Callable[[Any], None]) -> int:
        self._builder.StartVector(4, len(values), 4)
        for value in reversed(values):
            prepend(value)
        return self._builder.EndVector()

    def table(self, n_fields: int, offsets: dict[int, int], *, small: dict[int, int] | None = None) -> int:
        """Write a table; `small` are its fields of one byte."""
        self._builder.StartObject(n_fields)
        for slot, value in offsets.items():
            self._builder.PrependUOffsetTRelativeSlot(slot, value, 0)
        for slot, value in (small or {}).items():
            self._builder.PrependUint8Slot(slot, value, 0)
        return self._builder.EndObject()

    def finish(self, root: int) -> bytes:
        self._builder.Finish(root, _IDENTIFIER)
        return bytes(self._builder.Output())
