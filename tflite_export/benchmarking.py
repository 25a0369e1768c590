"""Measure how long `.tflite` files take, against each other, with an interval for the ratio.

Processors drift (clock, heat, neighbours), so the files take turns: A B A B ... What remains is that one load of a
file can be some percent faster than another load of the same file, because its memory lies better. So the whole is
done in several sittings, each with freshly loaded files, and the interval comes from the spread between sittings.

Before that each file runs once on a fixed input, there and here, and must give the same: a wrong or badly delegated
file would be timed in vain.
"""

import csv
import io
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tflite_export.benchmark_model import BenchmarkLog, read_benchmark_log
from tflite_export.devices import Answer, Device, DeviceInfo, DeviceOptions, Nature, Quota, Timing, open_device
from tflite_export.devices.local import LocalDevice
from tflite_export.devices.logs import LogDevice
from tflite_export.errors import DataError, DeviceError, OptionError, OutputError
from tflite_export.files import check_target
from tflite_export.flatbuffer import TfliteModel, read_flatbuffer
from tflite_export.interpreter import dequantize

Progress = Callable[[int, int, str], None]

SITTINGS = 12  # even, since every other one runs the files in reverse order
NOISY_WIDTH = 0.05

# How far outputs may lie from those of this machine, as a part of their spread. Other processors round float sums in
# another order (1e-6 each); a GPU computes in float16; eight-bit kernels differ by a step here and there, and steps add
# up through a deep network. Another network altogether is off by about 1.4.
_TOLERANCES = {"float32 on a CPU": 1e-3, "float32 elsewhere": 0.05, "quantized": 0.2}


@dataclass(frozen=True)
class BenchmarkRow:
    """The times of one file. A number that is not known is NaN here, null in JSON, and empty in CSV.

    Attributes:
        path: the file.
        name: its name in tables.
        nature: "measured"; "estimate" where a compiler says so; "emulated" where an emulated processor ran it: then
            all times and ratios are NaN.
        median_ms: median of all runs.
        p10_ms: tenth percentile; NaN where there is a single value.
        p90_ms: ninetieth percentile.
        n: number of runs, warm-up not counted; 0 where nothing ran.
        sittings: how often all files were loaded afresh.
        spread: "runs" where the percentiles are those of single runs, "sittings" where the device tells only a summary
            of each sitting: then they are those of the sittings' medians, or means where it tells no medians.
        ratio: its time over that of the first file, geometric mean over the sittings; 1 for the first file.
        ratio_low: lower end of the 95 % interval of the ratio; NaN with a single sitting.
        ratio_high: upper end.
        noisy: whether that interval (for the first file: that of its median) is wider than 5 %.
        threads: threads that one inference may use.
        delegate: "XNNPACK" or another, "none" where the plain kernels ran.
        init_ms: time to load it, the least of all sittings.
        memory_mb: memory at the end or its peak (MiB), where the device tells.
        output_difference: root mean square of the difference between its outputs there and on this machine, as a part
            of their spread; NaN where they cannot be compared.
        temperature_after_c: of the processor, at the end; the one before is in `device`.
        sha256: hash of the file.
        size_bytes: size of the file.
        date: when it was measured, ISO 8601 in UTC.
        device: what it was measured on.
        log: the whole report of a run with operator times, where the device has one; not in JSON and CSV.
    """

    path: Path
    name: str
    nature: Nature
    median_ms: float
    p10_ms: float
    p90_ms: float
    n: int
    sittings: int
    spread: str
    ratio: float
    ratio_low: float
    ratio_high: float
    noisy: bool
    threads: int
    delegate: str
    init_ms: float
    memory_mb: float
    output_difference: float
    temperature_after_c: float
    sha256: str
    size_bytes: int
    date: str
    device: DeviceInfo
    log: BenchmarkLog | None = field(default=None, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return one flat record; the device's fields carry the prefix `device_`."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("device", "log")}
        device = {f"device_{key}": value for key, value in asdict(self.device).items() if key != "nature"}
        record = own | {"path": str(self.path), "nature": str(self.nature)} | device
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in record.items()}


@dataclass(frozen=True)
class Ratio:
    """One file's time over another's, and the ends of its 95 % interval (NaN with a single sitting)."""

    value: float
    low: float
    high: float

    @property
    def noisy(self) -> bool:
        """Whether the interval is wider than 5 %."""
        return bool((self.high - self.low) / self.value > NOISY_WIDTH)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({_interval(self.low, self.high)})"


@dataclass(frozen=True)
class BenchmarkTable:
    """One row for each file, in the order given; their ratios are to the first.

    Attributes:
        rows: the rows.
        turns_ms: median time of each turn: turns_ms[sitting][file][round]. What `ratio` is computed from.
    """

    rows: tuple[BenchmarkRow, ...]
    turns_ms: tuple[tuple[tuple[float, ...], ...], ...] = field(default=(), repr=False)

    def ratio(self, file: int | str, to: int | str) -> Ratio:
        """Return the time of one file over that of another, from turns that were next to each other.

        Args:
            file: its number or name; the dividend.
            to: number or name of the divisor.

        Raises:
            OptionError: there is no such row.
        """
        own, other = self._index(file), self._index(to)
        return Ratio(*ratio_interval([_log_ratio(sitting, own, other) for sitting in self.turns_ms]))

    def _index(self, file: int | str) -> int:
        names = [row.name for row in self.rows]
        if isinstance(file, str) and file in names:
            return names.index(file)
        if isinstance(file, int) and 0 <= file < len(names):
            return file
        raise OptionError(f"there is no row {file!r}: the names are {names}.")

    def as_json(self) -> list[dict[str, Any]]:
        """Return the rows as values that `json.dump` takes."""
        return [row.as_json() for row in self.rows]

    def as_csv(self) -> str:
        """Return the rows as a CSV document with a header."""
        records = self.as_json()
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue()

    def __str__(self) -> str:
        first = self.rows[0]
        header = ("file", "median ms", "p10", "p90", "runs", "ratio", "95 % interval", "bytes", "")
        lines = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        table = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
        device = first.device
        delegates = "/".join(dict.fromkeys(row.delegate for row in self.rows))
        threads = "/".join(dict.fromkeys(str(row.threads) for row in self.rows))
        cores = f" on cores {device.cores}" if device.cores else ""
        heat = "" if device.temperature_c is None else f", {device.temperature_c:.0f} °C"
        if heat and not math.isnan(first.temperature_after_c):
            heat += f" to {first.temperature_after_c:.0f} °C"
        status = f", {device.thermal_status}" if device.thermal_status else ""
        return "\n".join(
            [
                *table,
                f"{device.name}: {device.description}, {device.system}; {device.runtime}, {delegates}, "
                f"{threads} thread{'' if threads == '1' else 's'}{cores}; "
                f"governor {device.governor or 'unknown'}, "
                f"load {'unknown' if device.load_average is None else f'{device.load_average:.2f}'}{heat}{status}; "
                f"{first.date}",
                *_NOTES[first.nature],
            ]
        )


_NOTES: dict[Nature, tuple[str, ...]] = {
    Nature.MEASURED: (),
    Nature.ESTIMATE: ("estimate: a compiler's word, nothing was run.",),
    Nature.EMULATED: ("emulated: the outputs are right, times on an emulated processor mean nothing.",),
}


def _number(value: float, digits: str) -> str:
    return "-" if math.isnan(value) else format(value, digits)


def _interval(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"{low:.3f} to {high:.3f}"


def _cells(row: BenchmarkRow) -> tuple[str, ...]:
    marks = [*(["noisy"] if row.noisy else []), *([str(row.nature)] if row.nature != Nature.MEASURED else [])]
    return (
        row.name,
        _number(row.median_ms, ".4g"),
        _number(row.p10_ms, ".4g"),
        _number(row.p90_ms, ".4g"),
        str(row.n),
        _number(row.ratio, ".3f"),
        _interval(row.ratio_low, row.ratio_high),
        f"{row.size_bytes:,}",
        ", ".join(marks),
    )


def _aligned(cells: tuple[str, ...], widths: list[int]) -> list[str]:
    return [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]


# --- measuring -------------------------------------------------------------------------------------------------------


def benchmark(
    paths: Sequence[str | Path],
    *,
    device: str | Device = "local",
    options: DeviceOptions | None = None,
    threads: int = 1,
    min_runs: int = 50,
    min_seconds: float = 3.0,
    max_seconds: float = 150.0,
    check_outputs: bool = True,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> BenchmarkTable:
    """Time `.tflite` files against each other, in turns.

    Each file gets at least `min_runs` runs and `min_seconds` of running; so two files of 5 ms take about 7 seconds.
    Where an interval is wide at the end, all is measured once more, and both halves count.

    Args:
        paths: the files; ratios are to the first. With a device `file:LOGS` there may be none: a row for each log.
        device: where to run, as `open_device` names it; or an open device, which stays open.
        options: what else the device should know.
        threads: threads that one inference may use.
        min_runs: least number of runs of each file.
        min_seconds: least running time of each file, in seconds.
        max_seconds: stop after this many seconds in all, whatever the least numbers; each file still gets its turns.
        check_outputs: whether outputs there are compared with those of this machine first.
        out: a file for the rows, JSON where it is called `.json`, else CSV. It is written after each sitting:
            whatever happens, what was measured until then is there.
        force: replace that file.
        progress: called with (sittings done, sittings in all, what comes next).

    Raises:
        OptionError: no files, or a number or option out of range.
        FlatbufferError: a file is damaged.
        DeviceError: the device is unknown or absent, went away, cannot run a file, or computes something else.
        OutputError: `out` exists already or cannot be written.
    """
    files = [Path(path) for path in paths]
    _check_options(files, device, threads, min_runs, min_seconds)
    target = None if out is None else Path(out)
    if target is not None:
        check_target(target, force=force)
    models = [read_flatbuffer(path) for path in files]
    opened = open_device(device, options) if isinstance(device, str) else device
    try:
        n_sittings = opened.n_sittings
        if not files and isinstance(opened, LogDevice):
            files, n_sittings = list(opened.paths), 1  # each log stands for itself
            models = [_unknown_model(path) for path in files]
        quota = Quota(min_runs / SITTINGS, 1000 * min_seconds / SITTINGS, 1000 * max_seconds / SITTINGS)
        visit = _Visit(
            opened, files, models, n_sittings, threads=threads, quota=quota, target=target, progress=progress
        )
        if check_outputs:
            visit.compare_outputs()
        return visit.measure(max_seconds)
    finally:
        if isinstance(device, str):
            opened.close()


def _check_options(files: list[Path], device: str | Device, threads: int, min_runs: int, min_seconds: float) -> None:
    from_logs = isinstance(device, LogDevice) or (isinstance(device, str) and device.startswith("file:"))
    if not files and not from_logs:
        raise OptionError("there is nothing to time: give at least one .tflite file.")
    if threads < 1 or min_runs < 1 or not 0 <= min_seconds < math.inf:
        raise OptionError(
            f"threads and min_runs must be at least 1 and min_seconds at least 0, "
            f"not {threads}, {min_runs} and {min_seconds}."
        )


def _unknown_model(log: Path) -> TfliteModel:
    """Stand in for a model of which there is only a log, which tells its size to six digits."""
    size_mb = read_benchmark_log(log).size_mb or 0
    return TfliteModel(source=str(log), size_bytes=round(1e6 * size_mb), sha256="", subgraphs=(), signatures=())


@dataclass(frozen=True)
class _Sitting:
    """What one sitting gave: one timing for each file."""

    timings: list[Timing]

    def turns_ms(self, index: int) -> tuple[float, ...]:
        return turns_of(self.timings[index])


def turns_of(timing: Timing) -> tuple[float, ...]:
    """Return the median time of each turn in milliseconds; what it told of the sitting where it tells only that."""
    if timing.log is not None:
        return (timing.log.typical_ms,)
    return tuple(float(np.median(turn)) for turn in timing.turns_ms)


def compare_outputs(
    device: Device, paths: Sequence[Path], *, threads: int = 1, progress: Progress | None = None
) -> None:
    """Run each file once on an open device and once here.

    Raises:
        DeviceError: a file cannot run there, or computes something else there than here.
    """
    models = [read_flatbuffer(path) for path in paths]
    nothing = Quota(1, 0, 0)
    _Visit(
        device, list(paths), models, 1, threads=threads, quota=nothing, target=None, progress=progress
    ).compare_outputs()


class _Visit:
    """One call of `benchmark` on an open device."""

    def __init__(
        self,
        device: Device,
        files: list[Path],
        models: list[TfliteModel],
        n_sittings: int | None,
        *,
        threads: int,
        quota: Quota,
        target: Path | None,
        progress: Progress | None,
    ) -> None:
        self._device, self._files, self._models, self._threads = device, files, models, threads
        self._n_sittings = n_sittings
        self._quota, self._target, self._progress = quota, target, progress
        self._info, self._date = device.describe(), datetime.now(UTC).isoformat(timespec="seconds")
        self._names = _names(files)
        self._sittings: list[_Sitting] = []
        self._differences = [math.nan] * len(files)
        self._logs: list[BenchmarkLog | None] = [None] * len(files)

    def compare_outputs(self) -> None:
        """Run each file once there and here; stop where they differ."""
        for index, (path, model) in enumerate(zip(self._files, self._models, strict=True)):
            if not model.subgraphs:
                continue
            self._tell(0, SITTINGS, f"checking the outputs of '{self._names[index]}' on '{self._info.name}'")
            inputs = fixed_inputs(model)
            answer = self._device.fetch(path, inputs, threads=self._threads)
            if answer is None:
                continue
            self._logs[index] = answer.log
            expected = _local_outputs(path, inputs)
            if expected is not None:
                self._differences[index] = self._difference(index, answer, expected)

    def measure(self, max_seconds: float) -> BenchmarkTable:
        """Hold the sittings, twice as many where it is noisy, and keep what there is after each."""
        live = self._n_sittings is None and self._info.nature == Nature.MEASURED
        n_sittings = SITTINGS if live else self._n_sittings or 1
        start = time.monotonic()
        try:
            self._hold(n_sittings)
            if live and self._is_noisy() and time.monotonic() - start < max_seconds:
                self._hold(2 * n_sittings)
        except DeviceError as error:
            kept = len(self._sittings)
            if kept and self._target is not None:
                raise DeviceError(f"{error} The rows of {kept} sittings are in '{self._target}'.") from error
            raise
        return self._table(final=True)

    def _hold(self, n_sittings: int) -> None:
        for number in range(len(self._sittings), n_sittings):
            self._tell(number, n_sittings, f"timing {len(self._files)} files on '{self._info.name}'")
            timings = self._device.run(self._files, threads=self._threads, quota=self._quota, backwards=number % 2 == 1)
            self._sittings.append(_Sitting(timings))
            if self._target is not None:
                _write(self._table(final=number == n_sittings - 1), self._target)

    def _is_noisy(self) -> bool:
        return any(row.noisy for row in self._table(final=False).rows)

    def _tell(self, done: int, total: int, what: str) -> None:
        if self._progress:
            self._progress(done, total, what)

    def _difference(self, index: int, answer: Answer, expected: Sequence[np.ndarray]) -> float:
        """Return how far the outputs are from the expected ones.

        Raises:
            DeviceError: farther than rounding explains.
        """
        worst = 0.0
        delegate = answer.log.delegate if answer.log is not None else ""
        for tensor, there, here in zip(self._models[index].outputs, answer.outputs, expected, strict=True):
            quantized = bool(tensor.scales) or there.dtype.kind in "iu"
            on_cpu = delegate in ("", "CPU", "XNNPACK", "none")
            kind = "quantized" if quantized else "float32 on a CPU" if on_cpu else "float32 elsewhere"
            difference, steps = output_difference(dequantize(there, tensor), dequantize(here, tensor), tensor.scales)
            # One step on nearly constant outputs is rounding, however large a part of their spread it is.
            if difference > _TOLERANCES[kind] and steps > 1 or math.isnan(difference):
                raise DeviceError(
                    f"'{self._files[index]}' computes something else on '{self._info.name}' than on this machine: its "
                    f"output '{tensor.name}' is off by {difference:.2g} of its spread, more than "
                    f"{_TOLERANCES[kind]:g} for {kind}. It is the wrong file, or its delegate computes wrongly; "
                    "nothing was timed."
                )
            worst = max(worst, difference)
        return worst

    def _table(self, *, final: bool) -> BenchmarkTable:
        after = self._device.describe().temperature_c if final else None
        count = range(len(self._files))
        turns_ms = tuple(tuple(sitting.turns_ms(index) for index in count) for sitting in self._sittings)
        return BenchmarkTable(tuple(self._row(index, turns_ms, after) for index in count), turns_ms)

    def _row(
        self, index: int, turns_ms: tuple[tuple[tuple[float, ...], ...], ...], after_c: float | None
    ) -> BenchmarkRow:
        timings = [sitting.timings[index] for sitting in self._sittings]
        logs = [timing.log for timing in timings if timing.log is not None]
        nature = self._info.nature
        values, n = _values(timings)
        p10, median, p90 = np.percentile(values, [10, 50, 90]) if len(values) > 1 else (math.nan, values[0], math.nan)
        ratio, low, high = ratio_interval([_log_ratio(sitting, index, 0) for sitting in turns_ms])
        if index:
            width = (high - low) / ratio
        else:
            own, own_low, own_high = ratio_interval([float(np.mean(np.log(sitting[0]))) for sitting in turns_ms])
            width = (own_high - own_low) / own
        init_ms = [timing.init_ms for timing in timings if timing.init_ms is not None]
        memory = [log.memory_mb for log in logs if log.memory_mb is not None]
        row = BenchmarkRow(
            path=self._files[index],
            name=self._names[index],
            nature=nature,
            median_ms=float(median),
            p10_ms=float(p10),
            p90_ms=float(p90),
            n=n if nature != Nature.ESTIMATE else 0,
            sittings=len(self._sittings),
            spread="sittings" if logs else "runs",
            ratio=ratio,
            ratio_low=low,
            ratio_high=high,
            noisy=bool(width > NOISY_WIDTH),
            threads=(logs[0].threads or self._threads) if logs else self._threads,
            delegate=timings[0].delegate,
            init_ms=min(init_ms, default=math.nan),
            memory_mb=max(memory, default=math.nan),
            output_difference=self._differences[index],
            temperature_after_c=math.nan if after_c is None else after_c,
            sha256=self._models[index].sha256,
            size_bytes=self._models[index].size_bytes,
            date=self._date,
            device=self._info,
            log=self._logs[index] or (logs[0] if logs else None),
        )
        return _without_times(row) if nature == Nature.EMULATED else row


def _without_times(row: BenchmarkRow) -> BenchmarkRow:
    values = {one.name: getattr(row, one.name) for one in fields(row)}
    times = ("median_ms", "p10_ms", "p90_ms", "ratio", "ratio_low", "ratio_high", "init_ms")
    return BenchmarkRow(**values | dict.fromkeys(times, math.nan) | {"noisy": False})


def _values(timings: list[Timing]) -> tuple[np.ndarray, int]:
    """Return the times whose percentiles a row tells, and the number of runs behind them."""
    logs = [timing.log for timing in timings if timing.log is not None]
    if logs:
        return np.array([log.typical_ms for log in logs]), sum(log.n for log in logs)
    runs = np.concatenate([np.concatenate([np.asarray(turn) for turn in timing.turns_ms]) for timing in timings])
    return runs, len(runs)


def _write(table: BenchmarkTable, path: Path) -> None:
    """Replace the file of rows in one step."""
    text = json.dumps(table.as_json(), indent=1) + "\n" if path.suffix == ".json" else table.as_csv()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _names(files: list[Path]) -> list[str]:
    """Return the shortest names that tell the files apart."""
    stems = [path.stem for path in files]
    if len(set(stems)) == len(stems):
        return stems
    common = os.path.commonpath([path.absolute().parent for path in files])
    return [os.path.relpath(path.absolute(), common) for path in files]


# --- outputs ---------------------------------------------------------------------------------------------------------


def fixed_inputs(model: TfliteModel) -> list[np.ndarray]:
    """Return the same random inputs at every call, as the file stores them.

    All values of an integer type, a standard normal for floats.

    Raises:
        DeviceError: an input is of a type without numbers.
    """
    rng = np.random.default_rng(0)
    arrays = []
    for tensor in model.inputs:
        try:
            dtype = np.dtype(tensor.dtype)
        except TypeError as error:
            raise DeviceError(f"'{model.source}' has an input of type {tensor.dtype}, which cannot be made.") from error
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            arrays.append(rng.integers(limits.min, limits.max, tensor.shape, dtype, endpoint=True))
        elif dtype.kind == "b":
            arrays.append(rng.integers(0, 2, tensor.shape).astype(dtype))
        else:
            arrays.append(rng.standard_normal(tensor.shape).astype(dtype))
    return arrays


def _local_outputs(path: Path, inputs: list[np.ndarray]) -> tuple[np.ndarray, ...] | None:
    """Return what this machine computes; None where it lacks an operator, such as one made for an accelerator."""
    if read_flatbuffer(path).custom_operators:
        return None
    return LocalDevice().fetch(path, inputs, threads=1).outputs


def output_difference(there: np.ndarray, here: np.ndarray, scales: Sequence[float]) -> tuple[float, float]:
    """Return the root mean square of a difference as a part of the spread of `here`, and in quantization steps.

    NaN in the same places is no difference; NaN in one of them only gives NaN.

    Args:
        there: real numbers of any shape.
        here: what they should be, of the same shape.
        scales: size of a step; empty where there are none: the second number is infinite then.
    """
    a, b = np.asarray(there, np.float64).ravel(), np.asarray(here, np.float64).ravel()
    both = np.isnan(a) & np.isnan(b)
    a, b = a[~both], b[~both]
    if not len(b):
        return 0.0, 0.0
    differing = a != b  # equal infinities are no difference
    if not differing.any():
        return 0.0, 0.0
    gaps, finite = a[differing] - b[differing], b[np.isfinite(b)]
    spread = (float(np.std(finite)) or float(np.abs(finite).max()) if len(finite) else 0) or 1.0
    steps = float(np.abs(gaps).max()) / scales[0] if scales else math.inf
    return math.sqrt(float(np.sum(gaps**2)) / len(b)) / spread, steps


# --- intervals -------------------------------------------------------------------------------------------------------


def _log_ratio(sitting: tuple[tuple[float, ...], ...], index: int, other: int) -> float:
    """Return the log of a file's time over another's: the median over rounds, whose turns are adjacent."""
    return float(np.median(np.log(sitting[index]) - np.log(sitting[other])))


def ratio_interval(log_ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return geometric mean, lower and upper end of its 95 % interval, of independent log ratios of shape (n,).

    Student's interval: each value is itself a median over many rounds, hence close to normal, and with a dozen of
    values a percentile bootstrap would be too narrow by a tenth. The ends are NaN where there is only one value.

    Raises:
        DataError: there is no value.
    """
    from scipy.special import stdtrit

    n = len(log_ratios)
    if not n:
        raise DataError("an interval needs at least one sitting.")
    center = float(np.mean(log_ratios))
    if n == 1:
        return math.exp(center), math.nan, math.nan
    half = float(stdtrit(n - 1, 0.975) * np.std(log_ratios, ddof=1) / math.sqrt(n))
    return math.exp(center), math.exp(center - half), math.exp(center + half)
