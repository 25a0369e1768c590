"""Measure how long `.tflite` files take, against each other, with an interval for the ratio.

Processors drift (clock, heat, neighbours), so the files take turns: A B A B ... What remains is that one load of a
file can be some percent faster than another load of the same file, because its memory lies better. So the whole is
done in several sittings, each with freshly loaded files, and the interval comes from the spread between sittings.

Before that each file runs once on a fixed input, there and here, and must give the same: a wrong or badly delegated
file would be timed in vain.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from tflite_export.benchmark_model import BenchmarkLog, read_benchmark_log
from tflite_export.benchmark_rows import NOISY_WIDTH, BenchmarkRow, BenchmarkTable, log_ratio, ratio_interval
from tflite_export.devices import Device, DeviceOptions, Nature, Quota, Timing, open_device
from tflite_export.devices.logs import LogDevice
from tflite_export.errors import DeviceError, OptionError
from tflite_export.files import check_target
from tflite_export.flatbuffer import TfliteModel, read_flatbuffer
from tflite_export.outputs import check_outputs, fixed_inputs, local_outputs

Progress = Callable[[int, int, str], None]

SITTINGS = 12  # even, since every other one runs the files in reverse order


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
            expected = local_outputs(path, inputs)
            if expected is not None:
                self._differences[index] = check_outputs(model, answer, expected, on=self._info.name)

    def measure(self, max_seconds: float) -> BenchmarkTable:
        """Hold the sittings, half as many more where it is noisy, and keep what there is after each."""
        live = self._n_sittings is None and self._info.nature == Nature.MEASURED
        n_sittings = SITTINGS if live else self._n_sittings or 1
        start = time.monotonic()
        try:
            self._hold(n_sittings)
            if live and self._is_noisy() and time.monotonic() - start < max_seconds:
                self._hold(n_sittings + n_sittings // 2)
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
                self._table(final=number == n_sittings - 1).save(self._target)

    def _is_noisy(self) -> bool:
        return any(row.noisy for row in self._table(final=False).rows)

    def _tell(self, done: int, total: int, what: str) -> None:
        if self._progress:
            self._progress(done, total, what)

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
        ratio, low, high = ratio_interval([log_ratio(sitting, index, 0) for sitting in turns_ms])
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
        return row.without_times() if nature == Nature.EMULATED else row


def _values(timings: list[Timing]) -> tuple[np.ndarray, int]:
    """Return the times whose percentiles a row tells, and the number of runs behind them."""
    logs = [timing.log for timing in timings if timing.log is not None]
    if logs:
        return np.array([log.typical_ms for log in logs]), sum(log.n for log in logs)
    runs = np.concatenate([np.concatenate([np.asarray(turn) for turn in timing.turns_ms]) for timing in timings])
    return runs, len(runs)


def _names(files: list[Path]) -> list[str]:
    """Return the shortest names that tell the files apart."""
    stems = [path.stem for path in files]
    if len(set(stems)) == len(stems):
        return stems
    common = os.path.commonpath([path.absolute().parent for path in files])
    return [os.path.relpath(path.absolute(), common) for path in files]
