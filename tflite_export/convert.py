"""Keras 3 models to checked `.tflite` files. The conversion itself runs in a worker process (`_converter.py`)."""

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tflite_export._converter import N_PROBES, check_model
from tflite_export.calibration import Calibration, collect
from tflite_export.edgetpu import check_edgetpu
from tflite_export.errors import DataError, ExportError, ModelError, OptionError, OutputError
from tflite_export.files import check_target, place
from tflite_export.flatbuffer import read_flatbuffer
from tflite_export.metadata import Meaning, make_meaning, with_meaning
from tflite_export.post_training import DEFAULT_STEPS
from tflite_export.schemes import Scheme
from tflite_export.steps import Step
from tflite_export.worker import ExportWorker, temporary_files_error

Progress = Callable[[int, int, str], None]

_STEPS_PER_MODEL = 6  # save, load, rewrite, convert, check, write


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how it compares with the Keras model.

    Attributes:
        path: the `.tflite` file.
        size_bytes: its size.
        sha256: its hash; the same model and calibration data give the same one.
        quantize: the scheme that was asked for.
        input_dtype: type of the inputs and outputs.
        operators: how often each operator occurs.
        float_tensors: of an integer file, the tensors that stayed float32 without being asked for.
        float_operators: the operators that compute on them.
        float_layers: layers that compute in float because `float_below_db` asked for it, with the signal over noise
            that each had alone in integers, in dB.
        select_operators: operators that need TensorFlow inside the runtime; always empty, since such files are refused.
        input_names: names in the signature "serving_default".
        output_names: names in the signature "serving_default".
        max_error: max|file - Keras| / max|Keras|, the largest over the outputs, on up to 16 of the calibration images,
            or on random ones where there are none.
        notes: what a reader should know: renamed, converted, suspicious ranges.
        steps: what was rewritten before the conversion and done for the accuracy of integers, one record each.
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
    float_layers: dict[str, float]
    select_operators: tuple[str, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    max_error: float
    notes: tuple[str, ...]
    steps: tuple[Step, ...]
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
        if self.float_layers:
            layers = ", ".join(f"'{name}' ({db:.1f} dB)" for name, db in self.float_layers.items())
            lines.append(f"  kept in float32: {layers}")
        told = [*self.steps, *(f"note: {note}" for note in self.notes)]
        return "\n".join([*lines, *(f"  {one}" for one in told)])


@dataclass(frozen=True)
class _Job:
    """A model, either an object or the path of a `.keras` file, and where its files go."""

    model: Any
    path: Path
    float_copy: Path | None = None
    meaning: Meaning | None = None

    @property
    def keras_file(self) -> Path | None:
        return Path(self.model) if isinstance(self.model, str | Path) else None

    @property
    def beside(self) -> Path:
        """The JSON file beside the file."""
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def name(self) -> str:
        return self.keras_file.stem if self.keras_file else str(self.model.name)

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
    input_dtype: str | None = None,
    target: str | None = None,
    input_normalization: str = "fold",
    clean: bool = True,
    post_training: Sequence[str] = DEFAULT_STEPS,
    float_below_db: float | None = None,
    float_copy: str | Path | None = None,
    labels: Sequence[str] | None = None,
    normalization: tuple[Any, Any] | None = None,
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
        quantize: "float32"; "float16" (weights stored in half); "dynamic" (weights stored in 8 bits, computed with in
            float where a kernel has no other way); "int8" for integer weights (a scale per channel), activations,
            inputs and outputs; "int16x8" (activations of 16 bits, weights of 8).
        calibration: images as the model takes them; int8 and int16x8 set their ranges by them. An array of shape
            (n, ...), a `tf.data.Dataset`, a Keras `PyDataset` or any iterable of batches; of `(x, y)` batches x is
            used; a dict of arrays by input name for several inputs.
        calibration_limit: use at most this many images, spread evenly over an array, else the first ones.
        input_dtype: type of inputs and outputs: for int8 "int8" (default), "uint8" or "float32"; for int16x8 "int16"
            (default) or "float32"; else "float32".
        target: "edgetpu" writes int8 as its compiler takes it and notes what it would map; None for any runtime.
        input_normalization: "fold" moves Rescaling and Normalization behind the input into the first layer, where
            that is exact; "keep" leaves them as operators of their own.
        clean: whether the network is rewritten first into operators that the runtime runs best, exactly: norms folded,
            grouped convolutions as depthwise ones, and so on; `ExportResult.steps` tells what was done.
        post_training: what is done for the accuracy of int8, () for nothing: "equalize" gives the channels of a tensor
            equal ranges; "measure_ranges" takes the range of each activation from the calibration images, "clip_mse"
            and "clip_percentile" a narrower one; "correct_bias" makes up for the mean error of each layer.
        float_below_db: of int8, operators whose own signal over noise, measured on calibration images, is less than
            this many dB compute in float, if the end of the network gains by it; None for integers everywhere.
            `ExportResult.float_layers` says which. NPUs that run integers alone leave them to the CPU.
        float_copy: where the float file goes that the int8 file was quantized from: what `compare` compares it with.
        labels: name of each class; told inside the file as TFLite Metadata, and in a JSON file beside it
            (`model.tflite.json`), with this call's result.
        normalization: mean and standard deviation of what the model reads, (pixel - mean) / std, each a number or one
            for each channel; told the same way, computed by nobody.
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
    job = _Job(model, Path(path), None if float_copy is None else Path(float_copy), make_meaning(labels, normalization))
    scheme = Scheme(quantize, input_dtype, target, input_normalization, clean, post_training, float_below_db)
    images = _Images(calibration, calibration_limit)
    return _export([job], scheme, images, force=force, worker=worker, progress=progress)[0]


def export_many(
    models: Iterable[tuple[Any, str | Path]],
    *,
    quantize: str = "float32",
    calibration: Any = None,
    calibration_limit: int = 500,
    input_dtype: str | None = None,
    target: str | None = None,
    input_normalization: str = "fold",
    clean: bool = True,
    post_training: Sequence[str] = DEFAULT_STEPS,
    float_below_db: float | None = None,
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
        target: as in `export`.
        input_normalization: as in `export`.
        clean: as in `export`.
        post_training: as in `export`.
        float_below_db: as in `export`.
        force: as in `export`.
        worker: as in `export`.
        progress: as in `export`; counts the steps of all models.

    Returns:
        One result for each pair, in order.

    Raises:
        TfliteExportError: as in `export`; the files of the models before the one that failed stay.
    """
    jobs = [_Job(model, Path(path)) for model, path in models]
    scheme = Scheme(quantize, input_dtype, target, input_normalization, clean, post_training, float_below_db)
    images = _Images(calibration, calibration_limit)
    return _export(jobs, scheme, images, force=force, worker=worker, progress=progress)


def _export(
    jobs: Sequence[_Job],
    scheme: Scheme,
    calibration: "_Images",
    *,
    force: bool,
    worker: ExportWorker | None,
    progress: Progress | None,
) -> tuple[ExportResult, ...]:
    calibration.check(scheme)
    for job in jobs:
        _check_source(job)
        check_target(job.path, force=force)
        _check_float_copy(job, scheme.quantize, force=force)
        if job.meaning is not None:
            check_target(job.beside, force=force)
    if len({job.path.resolve() for job in jobs}) < len(jobs):
        raise OptionError("two models are to be written to the same path: give each its own.")
    if not jobs:
        return ()
    images = calibration.collect(scheme)
    n_steps = _STEPS_PER_MODEL + len(scheme.accuracy_steps) + (scheme.float_below_db is not None)
    steps = _Steps(progress, n_steps * len(jobs))
    with _work_folder() as folder, _running(worker) as converter:
        request = scheme.as_json() | _save_calibration(images, folder)
        results: list[ExportResult] = []
        for number, job in enumerate(jobs):
            model_request = request | _save_model(job, folder / f"{number}.keras", steps)
            model_request["float_copy"] = job.float_copy is not None
            answer = converter.convert(model_request, job.label, steps.next)
            results.append(_write(job, folder / f"{number}.tflite", answer, scheme, images, steps))
    return tuple(results)


@dataclass(frozen=True)
class _Images:
    """Calibration data as the caller gives it."""

    data: Any
    limit: int

    def check(self, scheme: Scheme) -> None:
        if self.limit < 1:
            raise OptionError(f"calibration_limit must be at least 1, not {self.limit}.")
        if scheme.integer and self.data is None:
            raise DataError(
                f"{scheme.quantize} export needs calibration images to set the ranges of the activations: "
                "give calibration=images, about 100 of those that the model was trained on."
            )

    def collect(self, scheme: Scheme) -> Calibration | None:
        """Return the arrays; without integers they only serve to compare the outputs, which a few do."""
        return None if self.data is None else collect(self.data, self.limit if scheme.integer else N_PROBES)


class _Steps:
    """Counts steps for a progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def next(self, what: str) -> None:
        if self._progress:
            self._progress(self._done, self._total, what)
        self._done += 1


def _check_float_copy(job: _Job, quantize: str, *, force: bool) -> None:
    if job.float_copy is None:
        return
    if quantize != "int8":
        raise OptionError(f"float_copy is what an int8 file was quantized from: {quantize} files have none.")
    if job.float_copy.resolve() == job.path.resolve():
        raise OptionError("float_copy and the file itself are to be written to the same path: give each its own.")
    check_target(job.float_copy, force=force)


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
    scheme: Scheme,
    images: Calibration | None,
    steps: _Steps,
) -> ExportResult:
    steps.next(f"{job.label}: writing '{job.path}'")
    told = [_edgetpu_note(made, job.label)] if scheme.target == "edgetpu" else []
    sha256 = answer["sha256"]
    if job.meaning is not None:
        with _writing_to(made.parent):
            data = with_meaning(made.read_bytes(), job.meaning, name=job.name)
            made.write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
    place(made, job.path)
    made.unlink()
    if job.float_copy is not None:
        place(made.with_suffix(".float"), job.float_copy)
    file = read_flatbuffer(job.path)
    if file.sha256 != sha256:
        raise OutputError(f"'{job.path}' does not hold what was written to it: check the disk.")
    notes = [images.note] if images and images.note and scheme.integer else []
    fields = answer | {key: tuple(value) for key, value in answer.items() if isinstance(value, list)}
    result = ExportResult(
        **fields
        | {
            "path": job.path,
            "sha256": sha256,
            "size_bytes": file.size_bytes,
            "quantize": scheme.quantize,
            "input_dtype": scheme.io_dtype,
            "notes": (*notes, *told, *answer["notes"]),
            "steps": tuple(Step.from_json(step) for step in answer["steps"]),
        }
    )
    if job.meaning is not None:
        with _writing_to(made.parent):
            made.write_text(json.dumps(result.as_json() | job.meaning.as_json(), indent=1), encoding="utf-8")
        place(made, job.beside)
        made.unlink()
    return result


def _edgetpu_note(made: Path, label: str) -> str:
    """Return what the Edge TPU would run of a file.

    Raises:
        ExportError: nothing of it, or its compiler cannot read it.
    """
    report = check_edgetpu(made)
    if report.rejections or not report.n_mapped:
        reasons = [*report.rejections, *report.advice] or [one.reason for one in report.operators]
        raise ExportError(f"the Edge TPU cannot run {label}: {' '.join(reasons[:3])}")
    mapped = f"the Edge TPU maps {report.n_mapped} of {len(report.operators)} operators, by the documented rules"
    if report.blocker is None:
        return mapped
    operator = report.blocker.operator
    return f"{mapped}; stopped by {operator.name} '{operator.output}' ({operator.reason})"
