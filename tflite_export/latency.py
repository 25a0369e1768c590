"""Latency tables: how long many small models take on one device, by key.

A table knows keys and models, not what they stand for. Each model is exported, sent, and timed in turns with all the
others, in sittings, until the interval of its median is narrow. Three things are taken out of the times:

- what any call costs, by a model that does next to nothing;
- the drift of the device (clock, heat, neighbours): a sitting's common factor, since all models take turns in it;
- the clock's resolution: models of a few microseconds are put several in series in one file.

The sum of parts is not the whole: caches are warm in small models, and runtimes fuse across borders. Rows of whole
networks name their parts, and from them a table fits one correction, a scale and an offset.
"""

import csv
import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tflite_export.benchmarking import compare_outputs, turns_of
from tflite_export.convert import ExportResult, export
from tflite_export.devices import Device, DeviceInfo, DeviceOptions, Nature, Quota, Timing, open_device
from tflite_export.errors import DataError, DeviceError, OptionError
from tflite_export.files import check_target, place
from tflite_export.worker import ExportWorker

Progress = Callable[[int, int, str], None]

EMPTY = "empty"
"""Key of the model that does next to nothing; its time is in every other one."""
REST = "rest:"
"""What is left of a network without its parts has the key of the network with `network:` replaced by this."""
NETWORK = "network:"

PRECISIONS = ("float32", "float16", "dynamic", "int8")
WIDTH = 0.03
MIN_SITTINGS, MAX_SITTINGS = 5, 40
KEPT_IN_TURNS = 8  # models that stay in the later sittings, so that the drift can still be told from their times
QUOTA_RUNS, QUOTA_MS = 4, 40.0
SERIES_BELOW_US, SERIES_US, MAX_SERIES = 20.0, 60.0, 16
MAX_FILES, MAX_BYTES = 100, 400_000_000  # loaded at the same time
MIN_NETWORKS = 3  # that a correction is fitted to
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
class Conditions:
    """What all rows of a table were measured on: rows of others cannot be added to them or compared with them."""

    nature: str
    description: str
    system: str
    runtime: str
    delegate: str
    precision: str
    threads: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        estimate = ", estimate" if self.nature == Nature.ESTIMATE else ""
        by = f"{self.runtime}, {self.delegate}, {threads}"
        return f"{self.precision} on {self.description} ({self.system}; {by}){estimate}"


@dataclass(frozen=True)
class LatencyRow:
    """The time of one model.

    Attributes:
        key: its name.
        parts: keys that add up to it, for whole networks.
        latency_us: median in microseconds, what any call costs taken off.
        low_us: lower end of the 95 % interval of the median; NaN where a device tells a single number.
        high_us: upper end.
        noisy: whether that interval is wider than 3 %.
        sittings: how often it was loaded and timed.
        series: how often the model stood in the file; the time is that of one.
        size_bytes: of the file with the model once, less that of the empty model.
        sha256: of that file.
        ran_by: the delegate that took operators, or "none".
        device: name of the device.
        governor: of its clock; empty where unknown.
        cores: that it was bound to; empty where it was not.
        date: ISO 8601, UTC.
        conditions: device, runtime, precision and threads.
    """

    key: str
    parts: tuple[str, ...]
    latency_us: float
    low_us: float
    high_us: float
    noisy: bool
    sittings: int
    series: int
    size_bytes: int
    sha256: str
    ran_by: str
    device: str
    governor: str
    cores: str
    date: str
    conditions: Conditions

    def as_json(self) -> dict[str, Any]:
        """Return one flat record; NaN becomes None."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "conditions"}
        record = own | {"parts": " ".join(self.parts)} | asdict(self.conditions)
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in record.items()
        }


@dataclass(frozen=True)
class Correction:
    """What turns a sum of parts into the time of a whole network.

    Attributes:
        scale: the sum is multiplied by it.
        offset_us: and this is added.
        n: number of networks that it was fitted to; below 3 nothing is corrected, nor where it would not help.
        error: median relative error of networks that were left out of the fit in turn; NaN where there is no fit.
        error_before: median relative error of the sums as they are; NaN where no network was measured.
    """

    scale: float = 1.0
    offset_us: float = 0.0
    n: int = 0
    error: float = math.nan
    error_before: float = math.nan

    def __str__(self) -> str:
        if self.n < MIN_NETWORKS:
            return "sums of parts, not corrected: too few whole networks were measured"
        if self.error >= self.error_before:
            return (
                f"sums of parts, off by {100 * self.error_before:.1f} % (median of {self.n} networks); not corrected, "
                f"which would give {100 * self.error:.1f} % on networks left out of the fit"
            )
        return (
            f"time = {self.scale:.3f} x sum of parts {self.offset_us:+.1f} us, fitted to {self.n} networks; median "
            f"error of networks left out of the fit {100 * self.error:.1f} % "
            f"(sums alone: {100 * self.error_before:.1f} %)"
        )


@dataclass(frozen=True)
class LatencyTable:
    """Times by key, all measured under the same conditions.

    Attributes:
        rows: with different keys.
        source: what it was read from, for messages.
    """

    rows: tuple[LatencyRow, ...]
    source: str = "the latency table"

    def __post_init__(self) -> None:
        if not self.rows:
            raise DataError(f"{self.source} holds no rows.")
        for row in self.rows[1:]:
            if row.conditions != self.rows[0].conditions:
                raise DataError(
                    f"{self.source} mixes rows of {self.rows[0].conditions} and of {row.conditions}: keep a table each."
                )
        if len(self._row_by_key) < len(self.rows):
            keys = [row.key for row in self.rows]
            raise DataError(f"{self.source} has two rows '{next(key for key in keys if keys.count(key) > 1)}'.")

    # --- what it says ------------------------------------------------------------------------------------------------

    @property
    def conditions(self) -> Conditions:
        """What the rows were measured on."""
        return self.rows[0].conditions

    @cached_property
    def _row_by_key(self) -> dict[str, LatencyRow]:
        return {row.key: row for row in self.rows}

    def __contains__(self, key: object) -> bool:
        return key in self._row_by_key or (isinstance(key, str) and self._network_of(key) in self._row_by_key)

    def __getitem__(self, key: str) -> LatencyRow:
        """Return a row.

        Raises:
            DataError: there is none; the message names the key.
        """
        if key not in self._row_by_key:
            raise DataError(f"{self.source} ({self.conditions}) has no row '{key}'.")
        return self._row_by_key[key]

    @staticmethod
    def _network_of(key: str) -> str:
        return NETWORK + key.removeprefix(REST) if key.startswith(REST) else key

    def latency_us(self, key: str) -> float:
        """Return the microseconds of a model, or of a network's rest, as they were measured.

        Raises:
            DataError: a row is missing.
        """
        if key.startswith(REST):
            network = self[self._network_of(key)]
            return network.latency_us - math.fsum(self.latency_us(part) for part in network.parts)
        return self[key].latency_us

    def size_bytes(self, key: str) -> int:
        """Return the bytes of a model in a `.tflite` file, or those of a network's rest.

        Raises:
            DataError: a row is missing.
        """
        if key.startswith(REST):
            network = self[self._network_of(key)]
            return network.size_bytes - sum(self.size_bytes(part) for part in network.parts)
        return self[key].size_bytes

    def corrected_us(self, key: str) -> float:
        """Return what a part adds to the time of a whole network: the offset is the rest's.

        Raises:
            DataError: a row is missing.
        """
        offset = self.correction.offset_us if key.startswith(REST) else 0.0
        return self.correction.scale * self.latency_us(key) + offset

    def predict_us(self, keys: Iterable[str]) -> float:
        """Return the time of a network of these parts, its rest included."""
        return math.fsum(self.corrected_us(key) for key in keys)

    @cached_property
    def correction(self) -> Correction:
        """Scale and offset, fitted to the whole networks of the table."""
        pairs = [
            (math.fsum(self.latency_us(part) for part in row.parts), row.latency_us)
            for row in self.rows
            if any(part.startswith(REST) for part in row.parts) and all(part in self for part in row.parts)
        ]
        originals = {self._network_of(part) for row in self.rows for part in row.parts if part.startswith(REST)}
        # their sums are right by the definition of a rest: they hold the line, and say nothing about its error
        exact = [(self.latency_us(key),) * 2 for key in sorted(originals) if key in self._row_by_key]
        return fit_correction(pairs, exact)

    # --- files -------------------------------------------------------------------------------------------------------

    def as_csv(self) -> str:
        """Return a CSV document with a header, one line for each row."""
        text = io.StringIO()
        records = [row.as_json() for row in self.rows]
        writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue()

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the rows as CSV.

        Raises:
            OutputError: the file exists and `force` is not set, or it cannot be written.
        """
        path = Path(path)
        check_target(path, force=force)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "table.csv"
            made.write_text(self.as_csv(), encoding="utf-8")
            place(made, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, precision: str | None = None, device: str | None = None
    ) -> "LatencyTable":
        """Read a table that `save` or `measure` wrote.

        Args:
            path: of the CSV file.
            precision: the one that is wanted, None for any.
            device: name of the one that is wanted, None for any.

        Raises:
            DataError: the file is missing, damaged, empty, or of another precision or device: both are named.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"'{path}' cannot be read: {error}.") from error
        table = cls.from_csv(text, source=f"'{path}'")
        table.require(precision=precision, device=device)
        return table

    @classmethod
    def from_csv(cls, text: str, *, source: str = "the latency table") -> "LatencyTable":
        """Return the table of a CSV document.

        Raises:
            DataError: it is no such table; the line and column are named.
        """
        reader = csv.DictReader(io.StringIO(text))
        wanted = [one.name for one in fields(LatencyRow) if one.name != "conditions"]
        wanted += [one.name for one in fields(Conditions)]
        missing = [name for name in wanted if name not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{source} is no latency table: the column '{missing[0]}' is missing.")
        return cls(tuple(_row(line, f"{source}, line {n}") for n, line in enumerate(reader, start=2)), source)

    def require(self, *, precision: str | None = None, device: str | None = None) -> None:
        """Check what the table was measured with.

        Raises:
            DataError: another precision or device; both are named.
        """
        if precision is not None and precision != self.conditions.precision:
            raise DataError(f"{self.source} was measured in {self.conditions.precision}, but {precision} is asked for.")
        names = {row.device for row in self.rows}
        if device is not None and names != {device}:
            raise DataError(f"{self.source} was measured on '{', '.join(sorted(names))}', but '{device}' is asked for.")

    def joined(self, other: "LatencyTable") -> "LatencyTable":
        """Return a table with the rows of both; where both have a key, the less noisy row, else the newer one.

        Raises:
            DataError: they were measured under other conditions; both are named.
        """
        if self.conditions != other.conditions:
            raise DataError(
                f"rows of {self.source} ({self.conditions}) and of {other.source} ({other.conditions}) do not go "
                "together: keep a table each."
            )
        rows = dict(self._row_by_key)
        for row in other.rows:
            mine = rows.get(row.key)
            if mine is None or (not row.noisy, row.date) >= (not mine.noisy, mine.date):
                rows[row.key] = row
        return LatencyTable(tuple(rows.values()), self.source)

    def __str__(self) -> str:
        header = ("key", "us", "95 % interval", "bytes", "")
        lines = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        shown = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]
        row = self.rows[-1]
        governor = f"; governor {row.governor}" if row.governor else ""
        return "\n".join(
            [*(line.rstrip() for line in shown), f"{self.conditions}{governor}; {row.date}", str(self.correction)]
        )

    # --- measuring ---------------------------------------------------------------------------------------------------

    @classmethod
    def measure(
        cls,
        items: Iterable[LatencyItem | tuple[Any, ...]],
        *,
        device: str = "local",
        options: DeviceOptions | None = None,
        precision: str = "float32",
        threads: int = 1,
        max_seconds: float = 300.0,
        known: "LatencyTable | None" = None,
        out: str | os.PathLike[str] | None = None,
        worker: ExportWorker | None = None,
        progress: Progress | None = None,
    ) -> "LatencyTable":
        """Export models and time them on a device, in one visit.

        Args:
            items: keys and models (and parts); a generator is read one model at a time, so that they need not be in
                memory together. Keys that come again, or that the table has without noise, are not measured.
            device: as `open_device` names it.
            options: what else the device should know.
            precision: "float32", "float16", "dynamic" or "int8" (ranges from random images: they do not change times).
            threads: that one inference may use.
            max_seconds: of timing, though each model is timed twice at least; models whose interval is still wide
                then are marked noisy.
            known: rows to go on from.
            out: a CSV file that is written after each sitting. One that exists is gone on from: what a lost connection
                left there is not measured again.
            worker: a process to export with, shared with other calls; by default one of its own.
            progress: called with (done, in all, what comes next).

        Returns:
            The rows that were known and the new ones.

        Raises:
            OptionError: an option out of range.
            DataError: `known` or `out` is of another device, runtime, precision or number of threads.
            DeviceError: the device is absent, went away, is emulated, or cannot run a model.
            TfliteExportError: a model cannot be exported.
        """
        if precision not in PRECISIONS:
            raise OptionError(f"a latency table is of {', '.join(PRECISIONS)}, not of {precision!r}.")
        if threads < 1 or not max_seconds > 0:
            raise OptionError(f"threads must be at least 1 and max_seconds above 0, not {threads} and {max_seconds}.")
        target = None if out is None else Path(out)
        if target is not None and target.exists():
            found = cls.load(target)
            known = found if known is None else known.joined(found)
        options = options or DeviceOptions()
        with ExitStack() as stack:
            opened = open_device(device, options)
            stack.callback(opened.close)
            visit = _Visit(opened, str(options.delegate), precision, threads, known, target, progress)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tflite_export_")))
            worker = worker or stack.enter_context(ExportWorker())
            return visit.measure(_items(items), folder, worker, max_seconds)


def _items(items: Iterable[LatencyItem | tuple[Any, ...]]) -> Iterator[LatencyItem]:
    for item in items:
        yield item if isinstance(item, LatencyItem) else LatencyItem(*item)


def fit_correction(pairs: Sequence[tuple[float, float]], exact: Sequence[tuple[float, float]] = ()) -> Correction:
    """Return the scale and offset that bring sums closest to measured times, by relative squared error.

    Args:
        pairs: (sum of parts, measured) of whole networks, in microseconds.
        exact: the same of networks whose sums are right by definition; they are fitted to, but tell no error.
    """
    if not pairs:
        return Correction()
    sums, measured = np.array([*pairs, *exact], np.float64).T
    errors = np.abs(sums / measured - 1)[: len(pairs)]
    before = float(np.median(errors))
    if len(pairs) < MIN_NETWORKS:
        return Correction(n=len(pairs), error_before=before)
    left_out = []
    for index in range(len(pairs)):
        others = np.arange(len(sums)) != index
        scale, offset = _scale_and_offset(sums[others], measured[others])
        left_out.append(abs((scale * sums[index] + offset) / measured[index] - 1))
    error = float(np.median(left_out))
    if error >= before:  # what is fitted to noise is worse than nothing
        return Correction(n=len(pairs), error=error, error_before=before)
    return Correction(*_scale_and_offset(sums, measured), len(pairs), error, before)


def _scale_and_offset(sums: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    if len(sums) < MIN_NETWORKS or np.ptp(sums) < 0.05 * float(np.mean(sums)):
        # networks of one size tell a scale, but no offset
        return float(np.mean(measured / sums)), 0.0
    design = np.stack([sums / measured, 1 / measured], axis=1)
    (scale, offset), *_ = np.linalg.lstsq(design, np.ones(len(sums)), rcond=None)
    if scale <= 0:
        return float(np.mean(measured / sums)), 0.0
    return float(scale), float(offset)


# --- one visit to a device -------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Level:
    """What sittings tell of one model: log of the time, half the width of its interval, number of sittings."""

    center: float
    half: float
    n: int

    @property
    def width(self) -> float:
        """Width of the interval as a part of the time; NaN with a single sitting."""
        return math.exp(self.half) - math.exp(-self.half)


def levels(log_times: Mapping[Any, Mapping[int, float]]) -> dict[Any, Level]:
    """Return the level of each model, with what is common to a sitting taken out.

    The log of a time is the model's level plus the sitting's, which is the median over its models; the sittings'
    levels are zero on average, so that models keep their times.

    Args:
        log_times: by model, then by number of the sitting; a model may be absent from some sittings.
    """
    from scipy.special import stdtrit

    numbers = sorted({number for times in log_times.values() for number in times})
    drift = dict.fromkeys(numbers, 0.0)
    center = {key: float(np.mean(list(times.values()))) for key, times in log_times.items()}
    if len(log_times) >= KEPT_IN_TURNS // 2:
        for _ in range(20):
            for number in numbers:
                found = [times[number] - center[key] for key, times in log_times.items() if number in times]
                drift[number] = float(np.median(found))
            mean = float(np.mean(list(drift.values())))
            drift = {number: value - mean for number, value in drift.items()}
            center = {key: float(np.mean([v - drift[n] for n, v in t.items()])) for key, t in log_times.items()}
    found_levels = {}
    for key, times in log_times.items():
        left = np.array([value - drift[number] for number, value in times.items()])
        half = math.nan
        if len(left) > 1:
            half = float(stdtrit(len(left) - 1, 0.975) * np.std(left, ddof=1) / math.sqrt(len(left)))
        found_levels[key] = Level(center[key], half, len(left))
    return found_levels


class _Visit:
    """One call of `measure` on an open device."""

    def __init__(
        self,
        device: Device,
        delegate: str,
        precision: str,
        threads: int,
        known: LatencyTable | None,
        target: Path | None,
        progress: Progress | None,
    ) -> None:
        self._device, self._precision, self._threads = device, precision, threads
        self._target, self._progress = target, progress
        self._info: DeviceInfo = device.describe()
        if self._info.nature == Nature.EMULATED:
            raise DeviceError(
                f"'{self._info.name}' is emulated: its times mean nothing, so no table can be made on it."
            )
        self._conditions = Conditions(
            str(self._info.nature),
            self._info.description,
            self._info.system,
            self._info.runtime,
            delegate,
            precision,
            threads,
        )
        if known is not None and known.conditions != self._conditions:
            raise DataError(
                f"{known.source} is of {known.conditions}, but what would be measured is {self._conditions}: give "
                "another file, or leave the table out."
            )
        self._known = known
        self._date = datetime.now(UTC).isoformat(timespec="seconds")
        self._new: dict[str, LatencyRow] = {}

    def measure(
        self, items: Iterator[LatencyItem], folder: Path, worker: ExportWorker, max_seconds: float
    ) -> LatencyTable:
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
        return self._table()

    def _has(self, key: str) -> bool:
        known = self._known is not None and key in self._known._row_by_key
        return key in self._new or (known and self._known is not None and not self._known[key].noisy)

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
        elif (row := self._new.get(EMPTY) or (self._known[EMPTY] if self._known else None)) is not None:
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
                conditions=self._conditions,
            )
        if self._target is not None:
            self._table().save(self._target, force=True)

    def _table(self) -> LatencyTable:
        source = "the latency table" if self._target is None else f"'{self._target}'"
        kept = self._known.rows if self._known is not None else ()
        rows = {row.key: row for row in kept} | self._new
        return LatencyTable(tuple(rows.values()), source)

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


# --- reading and showing ---------------------------------------------------------------------------------------------


def _row(line: Mapping[str, str | None], source: str) -> LatencyRow:
    def number(name: str) -> float:
        text = line[name] or ""
        try:
            value = float(text) if text else math.nan
        except ValueError:
            raise DataError(f"{source}: '{name}' is no number. Received: '{text}'.") from None
        return value

    def whole(name: str) -> int:
        value = number(name)
        if not float(value).is_integer():
            raise DataError(f"{source}: '{name}' is no whole number. Received: '{line[name]}'.")
        return int(value)

    def text(name: str) -> str:
        return line[name] or ""

    latency_us = number("latency_us")
    if not (text("key") and math.isfinite(latency_us) and latency_us >= 0):
        raise DataError(f"{source}: the row has no key or no time. Received: '{line['key']}', '{line['latency_us']}'.")
    return LatencyRow(
        key=text("key"),
        parts=tuple(text("parts").split()),
        latency_us=latency_us,
        low_us=number("low_us"),
        high_us=number("high_us"),
        noisy=text("noisy") == "True",
        sittings=whole("sittings"),
        series=whole("series"),
        size_bytes=whole("size_bytes"),
        sha256=text("sha256"),
        ran_by=text("ran_by"),
        device=text("device"),
        governor=text("governor"),
        cores=text("cores"),
        date=text("date"),
        conditions=Conditions(
            nature=text("nature"),
            description=text("description"),
            system=text("system"),
            runtime=text("runtime"),
            delegate=text("delegate"),
            precision=text("precision"),
            threads=whole("threads"),
        ),
    )


def _cells(row: LatencyRow) -> tuple[str, ...]:
    interval = "-" if math.isnan(row.low_us) else f"{row.low_us:.4g} to {row.high_us:.4g}"
    return row.key, f"{row.latency_us:.4g}", interval, f"{row.size_bytes:,}", "noisy" if row.noisy else ""
