"""One visit to a device: many small models exported, sent, and timed in turns until their medians are known.

Three things are taken out of the times: what any call costs, by a model that does next to nothing; the drift of the
device, which all models of a sitting have in common; the clock's resolution, by models of a few microseconds put
several in series in one file.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tflite_export.benchmarking import compare_outputs, turns_of
from tflite_export.convert import ExportResult, export
from tflite_export.devices import Device, DeviceInfo, Nature, Quota, Timing
from tflite_export.errors import DeviceError, OptionError
from tflite_export.latency_fits import MIN_MODELS, Level, levels
from tflite_export.latency_rows import Conditions, LatencyRow, save_rows
from tflite_export.worker import ExportWorker

Progress = Callable[[int, int, str], None]

EMPTY = "empty"
"""Key of the model that does next to nothing; its time is in every other one."""

WIDTH = 0.03
MIN_SITTINGS, MAX_SITTINGS = 5, 40
KEPT_IN_TURNS = 2 * MIN_MODELS  # models that stay in the later sittings, so that the drift can still be told
QUOTA_RUNS, QUOTA_MS = 4, 40.0
SERIES_BELOW_US, SERIES_US, MAX_SERIES = 20.0, 60.0, 16
MAX_FILES, MAX_BYTES = 100, 400_000_000  # loaded at the same time
SMALL_BYTES = 1_000_000  # models of larger files take longer than a few microseconds


@dataclass(frozen=True)
class LatencyItem:
    """A model to time.

    Attributes:
        key: its name in the table, without spaces.
        model: a Keras model with one input, or the path of a `.keras` file.
        parts: of a whole network: the keys that add up to it.
    """

    key: str
    model: Any
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _File:
    """A model in a file."""

    item: LatencyItem
    path: Path
    export: ExportResult
    series: int = 1
    single: ExportResult | None = None  # of the model once, where the file has it in series

    @property
    def told(self) -> ExportResult:
        return self.single or self.export


class Visit:
    """An open device that models are timed on, under conditions that hold for all of them.

    Attributes:
        conditions: what every row will tell of device, runtime, precision and threads.

    Raises:
        DeviceError: the device is emulated.
    """

    def __init__(
        self, device: Device, *, delegate: str, precision: str, threads: int, progress: Progress | None = None
    ) -> None:
        self._device, self._precision, self._threads, self._progress = device, precision, threads, progress
        self._info: DeviceInfo = device.describe()
        if self._info.nature == Nature.EMULATED:
            raise DeviceError(
                f"'{self._info.name}' is emulated: its times mean nothing, so no table can be made on it."
            )
        self.conditions = Conditions(
            str(self._info.nature),
            self._info.description,
            self._info.system,
            self._info.runtime,
            delegate,
            precision,
            threads,
        )
        self._date = datetime.now(UTC).isoformat(timespec="seconds")
        self._known: Mapping[str, LatencyRow] = {}
        self._new: dict[str, LatencyRow] = {}
        self._target: Path | None = None

    def measure(
        self,
        items: Iterable[LatencyItem],
        known: Mapping[str, LatencyRow],
        *,
        folder: Path,
        worker: ExportWorker,
        max_seconds: float,
        target: Path | None = None,
    ) -> tuple[LatencyRow, ...]:
        """Time what is not known yet without noise; return the rows that were known and the new ones.

        Args:
            items: models with their keys, read one at a time.
            known: rows by key, measured under the same conditions.
            folder: where the models' files go.
            worker: that exports them.
            max_seconds: of timing, though each model is timed twice at least.
            target: a CSV file of all rows, written after each sitting.

        Raises:
            DeviceError: the device went away, cannot run a model, or computes something else.
            TfliteExportError: a model cannot be exported.
        """
        self._known, self._target = known, target
        waiting = [] if self._has(EMPTY) else [self._export(LatencyItem(EMPTY, _empty_model()), folder, worker, 0)]
        spent, n_exported = 0.0, len(waiting)
        seen: set[str] = set()
        for item in items:
            if item.key in seen or self._has(item.key):
                continue
            seen.add(item.key)
            file = self._export(item, folder, worker, n_exported)
            n_exported += 1
            loaded = [*waiting, file]
            if len(loaded) > MAX_FILES or sum(one.export.size_bytes for one in loaded) > MAX_BYTES:
                spent += self._time(waiting, folder, worker, max_seconds - spent)
                waiting = [file]
            else:
                waiting = loaded
        if waiting:
            self._time(waiting, folder, worker, max_seconds - spent)
        return self._rows()

    def _has(self, key: str) -> bool:
        return key in self._new or (key in self._known and not self._known[key].noisy)

    def _export(self, item: LatencyItem, folder: Path, worker: ExportWorker, number: int) -> _File:
        self._tell(number, number + 1, f"exporting {item.key}")
        path = folder / f"{number}.tflite"
        return _File(item, path, self._exported(item.model, path, worker))

    def _exported(self, model: Any, path: Path, worker: ExportWorker) -> ExportResult:
        images = None
        if self._precision == "int8":
            if isinstance(model, str | os.PathLike):
                raise OptionError("an int8 latency table is measured with models, not with paths of .keras files.")
            (shape,) = (tensor.shape[1:] for tensor in model.inputs)
            images = np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float32)
        return export(model, path, quantize=self._precision, calibration=images, worker=worker)

    def _time(self, files: list[_File], folder: Path, worker: ExportWorker, max_seconds: float) -> float:
        """Hold sittings until all intervals are narrow, keep the rows after each; return the seconds it took."""
        start = time.monotonic()
        n_sittings = self._device.n_sittings
        if n_sittings is None and self._info.nature == Nature.MEASURED:
            if self._info.name != "local":
                compare_outputs(
                    self._device, [file.path for file in files], threads=self._threads, progress=self._progress
                )
            files = self._in_series(files, folder, worker)
        log_times: dict[str, dict[int, float]] = {file.item.key: {} for file in files}
        timings: dict[str, Timing] = {}
        current = files
        for number in range(n_sittings or MAX_SITTINGS):
            self._tell(number, n_sittings or MAX_SITTINGS, f"timing {len(current)} models on '{self._info.name}'")
            for file, timing in zip(current, self._sit(current, max_seconds, backwards=number % 2 == 1), strict=True):
                log_times[file.item.key][number] = math.log(max(float(np.median(turns_of(timing))), 1e-6))
                timings[file.item.key] = timing
            found = levels(log_times)
            self._keep(files, timings, found)
            left = max_seconds - (time.monotonic() - start)
            wide = [file for file in files if not found[file.item.key].width < WIDTH]
            # two at least: one tells no interval
            if (left <= 0 and number > 0) or (number + 1 >= MIN_SITTINGS and not wide):
                break
            if number + 1 >= MIN_SITTINGS:
                others = [file for file in files if file not in wide]
                chosen = {id(file) for file in (*wide, *others[: max(0, KEPT_IN_TURNS - len(wide))])}
                current = [file for file in files if id(file) in chosen]
        return time.monotonic() - start

    def _in_series(self, files: list[_File], folder: Path, worker: ExportWorker) -> list[_File]:
        """Put models that take a few microseconds several in a row, where their output fits their input."""
        able = [
            file
            for file in files
            if file.item.key != EMPTY and file.export.size_bytes < SMALL_BYTES and _can_follow_itself(file.item.model)
        ]
        if not able:
            return files
        put: dict[int, _File] = {}
        for file, timing in zip(able, self._sit(able, math.inf, backwards=False), strict=True):
            once_us = 1000 * float(np.median(turns_of(timing)))
            if once_us < SERIES_BELOW_US:
                count = min(MAX_SERIES, math.ceil(SERIES_US / max(once_us, 1.0)))
                path = file.path.with_name(f"{file.path.stem}x{count}.tflite")
                made = self._exported(_in_a_row(file.item.model, count), path, worker)
                put[id(file)] = _File(file.item, path, made, count, file.export)
        return [put.get(id(file), file) for file in files]

    def _sit(self, files: list[_File], max_seconds: float, *, backwards: bool) -> list[Timing]:
        limit = 1000 * min(max_seconds, 3600.0) / MIN_SITTINGS
        quota = Quota(QUOTA_RUNS, QUOTA_MS, limit)
        try:
            return self._device.run(
                [file.path for file in files], threads=self._threads, quota=quota, backwards=backwards
            )
        except DeviceError as error:
            if self._new and self._target is not None:
                raise DeviceError(
                    f"{error} The {len(self._new)} rows measured so far are in '{self._target}': the same call goes on."
                ) from error
            raise

    def _keep(self, files: list[_File], timings: Mapping[str, Timing], found: Mapping[str, Level]) -> None:
        """Make rows of what is known now, and write them."""
        empty_us = 0.0
        if EMPTY in found:
            empty_us, empty_bytes = 1000 * math.exp(found[EMPTY].center), files[0].export.size_bytes
        elif (row := self._new.get(EMPTY) or self._known.get(EMPTY)) is not None:
            empty_us, empty_bytes = row.latency_us, row.size_bytes
        for file in files:
            level, key = found[file.item.key], file.item.key
            empty = key == EMPTY
            taken = 0.0 if empty else empty_us
            low, middle, high = (
                max(0.0, (1000 * math.exp(level.center + shift) - taken) / file.series)
                if not math.isnan(shift)
                else math.nan
                for shift in (-level.half, 0.0, level.half)
            )
            self._new[key] = LatencyRow(
                key=key,
                parts=file.item.parts,
                latency_us=middle,
                low_us=low,
                high_us=high,
                noisy=not level.width < WIDTH and self._info.nature == Nature.MEASURED,
                sittings=level.n,
                series=file.series,
                size_bytes=file.told.size_bytes - (0 if empty else empty_bytes),
                sha256=file.told.sha256,
                ran_by=timings[key].delegate,
                device=self._info.name,
                governor=self._info.governor or "",
                cores=self._info.cores or "",
                date=self._date,
                conditions=self.conditions,
            )
        if self._target is not None:
            save_rows(self._rows(), self._target)

    def _rows(self) -> tuple[LatencyRow, ...]:
        return tuple((dict(self._known) | self._new).values())

    def _tell(self, done: int, total: int, what: str) -> None:
        if self._progress:
            self._progress(done, total, what)


def _empty_model() -> Any:
    import keras

    image = keras.Input((1, 1, 1))
    return keras.Model(image, keras.layers.ReLU()(image), name=EMPTY)


def _can_follow_itself(model: Any) -> bool:
    shapes = [[tuple(tensor.shape) for tensor in getattr(model, side, ())] for side in ("inputs", "outputs")]
    return len(shapes[0]) == 1 and shapes[0] == shapes[1]


def _in_a_row(model: Any, count: int) -> Any:
    """Return `count` calls of a copy of a model, each reading what the one before wrote."""
    import keras

    copy = keras.models.clone_model(model)  # calling the model itself would add calls to it
    copy.set_weights(model.get_weights())
    image = keras.Input(model.inputs[0].shape[1:])
    written = image
    for _ in range(count):
        written = copy(written)
    return keras.Model(image, written, name=f"{model.name}_x{count}")
