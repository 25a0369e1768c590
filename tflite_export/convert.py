"""Keras 3 models to checked `.tflite` files. The conversion itself runs in a worker process (`_converter.py`)."""

import os
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tflite_export._converter import N_PROBES, check_model
from tflite_export.calibration import Calibration, collect
from tflite_export.errors import DataError, ModelError, OptionError, OutputError
from tflite_export.flatbuffer import read_flatbuffer
from tflite_export.worker import ExportWorker, temporary_files_error

Progress = Callable[[int, int, str], None]

_SCHEMES = ("float32", "int8")
_IO_DTYPES = ("int8", "uint8", "float32")
_STEPS_PER_MODEL = 5  # save, load, convert, check, write


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how it compares with the Keras model.

    Attributes:
        path: the `.tflite` file.
        size_bytes: its size.
        sha256: its hash; the same model and calibration data give the same one.
        quantize: "float32" or "int8".
        input_dtype: type of the inputs and outputs.
        operators: how often each operator occurs.
        float_tensors: of an int8 file, the tensors that stayed float32 without being asked for.
        float_operators: the operators that compute on them.
        select_operators: operators that need TensorFlow inside the runtime; always empty, since such files are refused.
        input_names: names in the signature "serving_default".
        output_names: names in the signature "serving_default".
        max_error: max|file - Keras| / max|Keras|, the largest over the outputs, on up to 16 of the calibration images,
            or on random ones where there are none.
        notes: what a reader should know: renamed, converted, suspicious ranges.
        seconds: time of the conversion without the start of the worker process.
        peak_memory_bytes: most memory that the worker process has used so far (0 where it is not known).
        versions: of what converted it.
    """

    path: Path
    size_bytes: int
    sha256: str
    quantize: str
    input_dtype: str
    operators: dict[str, int]
    float_tensors: tuple[str, ...]
    float_operators: tuple[str, ...]
    select_operators: tuple[str, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    max_error: float
    notes: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int
    versions: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return the record as values that `json.dump` takes."""
        return asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        operators = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        lines = [
            f"{self.path}: {self.quantize}, {self.size_bytes:,} bytes, "
            f"largest error against Keras {100 * self.max_error:.2g} % of the largest output",
            f"  operators: {operators}",
        ]
        if self.float_tensors:
            lines.append(f"  left in float32: {len(self.float_tensors)} tensors of {', '.join(self.float_operators)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class _Job:
    """A model, either an object or the path of a `.keras` file, and where its file goes."""

    model: Any
    path: Path

    @property
    def keras_file(self) -> Path | None:
        return Path(self.model) if isinstance(self.model, str | Path) else None

    @property
    def label(self) -> str:
        return f"'{self.keras_file}'" if self.keras_file else f"model '{self.model.name}'"


def export(
    model: Any,
    path: str | Path,
    *,
    quantize: str = "float32",
    calibration: Any = None,
    calibration_limit: int = 500,
    input_dtype: str = "int8",
    force: bool = False,
    worker: ExportWorker | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a Keras 3 model as a `.tflite` file, read it back, and compare it with the model.

    The file takes one image at a time, has no dynamic sizes, and holds the signature "serving_default" with the names
    of the model's input layers and outputs. The model is not changed; it may run on any Keras backend.

    Args:
        model: a `keras.Model`, or the path of a `.keras` file.
        path: the file to write.
        quantize: "float32", or "int8" for integer weights (a scale per channel), activations, inputs and outputs.
        calibration: images as the model takes them; int8 sets its ranges by them. An array of shape (n, ...), a
            `tf.data.Dataset`, a Keras `PyDataset` or any iterable of batches; of `(x, y)` batches x is used; a dict of
            arrays by input name for several inputs.
        calibration_limit: use at most this many images, spread evenly over an array, else the first ones.
        input_dtype: for int8, the type of inputs and outputs: "int8", "uint8" or "float32".
        force: whether an existing file is replaced.
        worker: a worker process to share with other calls; by default one of its own.
        progress: called with (steps done, steps in all, what comes next).

    Raises:
        ModelError: the model is subclassed, of dynamic size, not from Keras 3, or cannot be loaded by the worker.
        DataError: calibration data that is missing, not finite, or of the wrong shape.
        OptionError: an option has an unknown value.
        ExportError: the conversion failed, or the file does not compute what the model does.
        OutputError: the file exists and `force` is not set, or it cannot be written.

    Example:
        >>> result = export(model, "model.tflite", quantize="int8", calibration=images)  # doctest: +SKIP
        >>> print(result)  # doctest: +SKIP
    """
    (result,) = export_many(
        [(model, path)],
        quantize=quantize,
        calibration=calibration,
        calibration_limit=calibration_limit,
        input_dtype=input_dtype,
        force=force,
        worker=worker,
        progress=progress,
    )
    return result


def export_many(
    models: Iterable[tuple[Any, str | Path]],
    *,
    quantize: str = "float32",
    calibration: Any = None,
    calibration_limit: int = 500,
    input_dtype: str = "int8",
    force: bool = False,
    worker: ExportWorker | None = None,
    progress: Progress | None = None,
) -> tuple[ExportResult, ...]:
    """Export several models in turn in one worker process, whose start costs more than converting a small model.

    Args:
        models: pairs of a model and its path, as `export` takes them. The other arguments are the same as there and
            hold for all; so all models must take the same calibration images.
        quantize: as in `export`.
        calibration: as in `export`.
        calibration_limit: as in `export`.
        input_dtype: as in `export`.
        force: as in `export`.
        worker: as in `export`.
        progress: as in `export`; counts the steps of all models.

    Returns:
        One result for each pair, in order.

    Raises:
        TfliteExportError: as in `export`; the files of the models before the one that failed stay.
    """
    jobs = [_Job(model, Path(path)) for model, path in models]
    _check_options(quantize, input_dtype, calibration, calibration_limit)
    for job in jobs:
        _check_source(job)
        _check_target(job.path, force=force)
    if len({job.path.resolve() for job in jobs}) < len(jobs):
        raise OptionError("two models are to be written to the same path: give each its own.")
    if not jobs:
        return ()
    # Without quantization they only serve to compare the outputs.
    limit = N_PROBES if quantize == "float32" else calibration_limit
    images = None if calibration is None else collect(calibration, limit)
    steps = _Steps(progress, _STEPS_PER_MODEL * len(jobs))
    with _work_folder() as folder, _running(worker) as converter:
        request = {"quantize": quantize, "input_dtype": input_dtype} | _save_calibration(images, folder)
        results: list[ExportResult] = []
        for number, job in enumerate(jobs):
            model_request = request | _save_model(job, folder / f"{number}.keras", steps)
            answer = converter.convert(model_request, job.label, steps.next)
            results.append(_write(job, folder / f"{number}.tflite", answer, request, images, steps))
    return tuple(results)


class _Steps:
    """Counts steps for a progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def next(self, what: str) -> None:
        if self._progress:
            self._progress(self._done, self._total, what)
        self._done += 1


def _check_options(quantize: str, input_dtype: str, calibration: Any, calibration_limit: int) -> None:
    if quantize not in _SCHEMES:
        raise OptionError(f"quantize must be one of {_SCHEMES}, not {quantize!r}.")
    if input_dtype not in _IO_DTYPES:
        raise OptionError(f"input_dtype must be one of {_IO_DTYPES}, not {input_dtype!r}.")
    if calibration_limit < 1:
        raise OptionError(f"calibration_limit must be at least 1, not {calibration_limit}.")
    if quantize == "int8" and calibration is None:
        raise DataError(
            "int8 export needs calibration images to set the ranges of the activations: "
            "give calibration=images, about 100 of those that the model was trained on."
        )


def _check_source(job: _Job) -> None:
    if job.keras_file is not None:
        if not job.keras_file.is_file():
            raise ModelError(f"there is no file '{job.keras_file}'.")
        if not zipfile.is_zipfile(job.keras_file):
            raise ModelError(
                f"'{job.keras_file}' is no .keras file, or is cut short: save the model again with model.save()."
            )
        return
    modules = [cls.__module__.split(".")[0] for cls in type(job.model).__mro__]
    if "tf_keras" in modules:
        raise ModelError(
            f"model '{job.model.name}' is from tf_keras (Keras 2), but only Keras 3 models can be exported: "
            "build it with `import keras` and copy its weights with set_weights(get_weights())."
        )
    if "keras" not in modules or not hasattr(job.model, "layers"):
        raise ModelError(f"expected a keras.Model or the path of a .keras file, but got {type(job.model).__name__}.")
    check_model(job.model)


def _check_target(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise OutputError(f"cannot write '{path}': it is a folder, give the name of a file in it.")
    if path.exists() and not force:
        raise OutputError(f"'{path}' exists already: give force=True to replace it, or another name.")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write '{path}': there is no folder '{path.parent}', make it first.")


@contextmanager
def _running(worker: ExportWorker | None) -> Iterator[ExportWorker]:
    """The caller's worker, which stays, or a new one, which ends with the block."""
    if worker is not None:
        worker.start()
        yield worker
    else:
        with ExportWorker() as own:
            own.start()
            yield own


@contextmanager
def _work_folder() -> Iterator[Path]:
    with _writing_to(Path(tempfile.gettempdir())):
        folder = tempfile.TemporaryDirectory(prefix="tflite_export_")
    with folder as name:
        yield Path(name)


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise temporary_files_error(folder, error) from error


def _save_calibration(images: Calibration | None, folder: Path) -> dict[str, Any]:
    if images is None:
        return {"calibration": [], "calibration_names": None}
    paths = [folder / f"calibration_{i}.npy" for i in range(len(images.arrays))]
    with _writing_to(folder):
        for path, array in zip(paths, images.arrays, strict=True):
            np.save(path, array)
    return {"calibration": [str(path) for path in paths], "calibration_names": images.names}


def _save_model(job: _Job, path: Path, steps: _Steps) -> dict[str, Any]:
    steps.next(f"{job.label}: saving a copy for the worker process")
    request = {"label": job.label, "output": str(path.with_suffix(".tflite"))}
    if job.keras_file is not None:
        return request | {"model": str(job.keras_file.resolve()), "custom_objects": [], "safe_mode": True}
    custom_objects = _custom_objects(job)
    with _writing_to(path.parent):
        try:
            job.model.save(path)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ModelError(f"{job.label} cannot be saved: {error}") from error
    # The model was an object of this process a moment ago, so that its Python lambdas are no more foreign than it is.
    return request | {"model": str(path), "custom_objects": custom_objects, "safe_mode": False}


def _custom_objects(job: _Job) -> list[tuple[str, str]]:
    """Return (module, class) of every layer that is not Keras' own: the worker imports them before it loads."""
    found: dict[tuple[str, str], None] = {}
    waiting = [job.model]
    while waiting:
        layer = waiting.pop()
        waiting += [*getattr(layer, "operations", ()), *getattr(layer, "layers", ())]
        cls = type(layer)
        if cls.__module__.split(".")[0] == "keras":
            continue
        if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
            raise ModelError(
                f"layer '{layer.name}' of {job.label} is of the class {cls.__qualname__}, which lives in the main "
                "script or a function, where the worker process cannot import it: move the class into a module."
            )
        found[cls.__module__, cls.__qualname__] = None
    return list(found)


def _write(
    job: _Job,
    made: Path,
    answer: dict[str, Any],
    request: dict[str, Any],
    images: Calibration | None,
    steps: _Steps,
) -> ExportResult:
    steps.next(f"{job.label}: writing '{job.path}'")
    _place(made, job.path)
    made.unlink()
    file = read_flatbuffer(job.path)
    if file.sha256 != answer["sha256"]:
        raise OutputError(f"'{job.path}' does not hold what was written to it: check the disk.")
    notes = (images.note,) if images and images.note and request["quantize"] != "float32" else ()
    fields = answer | {key: tuple(value) for key, value in answer.items() if isinstance(value, list)}
    return ExportResult(
        **fields
        | {
            "path": job.path,
            "size_bytes": file.size_bytes,
            "quantize": request["quantize"],
            "input_dtype": request["input_dtype"] if request["quantize"] == "int8" else "float32",
            "notes": (*notes, *answer["notes"]),
        }
    )


def _place(made: Path, path: Path) -> None:
    """Copy a finished file to its place: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with made.open("rb") as source, temporary.open("xb") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
