"""Measure how long `.tflite` files take, against each other, with an interval for the ratio.

Processors drift (clock, heat, neighbours), so the files take turns: A B A B ... What remains is that one load of a
file can be some percent faster than another load of the same file, because its memory lies better. So the whole is
done in several sittings, each with freshly loaded files, and the interval comes from the spread between sittings.
"""

import csv
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tflite_export.devices import Device, DeviceInfo, LoadedModel, open_device
from tflite_export.errors import DataError, OptionError
from tflite_export.flatbuffer import TfliteModel, read_flatbuffer

Progress = Callable[[int, int, str], None]

SITTINGS = 12  # even, since every other one runs the files in reverse order
_SLICE_MS = 20.0  # one file's turn: short against the drift, long against the clock's resolution
_WARM_UP_RUNS = 2
_WARM_UP_MS = 30.0
NOISY_WIDTH = 0.05


@dataclass(frozen=True)
class BenchmarkRow:
    """The times of one file.

    Attributes:
        path: the file.
        name: its name in tables.
        median_ms: median of all runs; p10_ms and p90_ms likewise.
        p10_ms: tenth percentile.
        p90_ms: ninetieth percentile.
        n: number of runs, warm-up not counted.
        ratio: its time over that of the first file, geometric mean over the sittings; 1 for the first file.
        ratio_low: lower end of the 95 % interval of the ratio.
        ratio_high: upper end.
        noisy: whether that interval (for the first file: that of its median) is wider than 5 %.
        threads: threads that one inference may use.
        delegate: "XNNPACK" or another, "none" where the plain kernels ran.
        sha256: hash of the file.
        size_bytes: size of the file.
        date: when it was measured, ISO 8601 in UTC.
        device: what it was measured on.
    """

    path: Path
    name: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    n: int
    ratio: float
    ratio_low: float
    ratio_high: float
    noisy: bool
    threads: int
    delegate: str
    sha256: str
    size_bytes: int
    date: str
    device: DeviceInfo

    def as_json(self) -> dict[str, Any]:
        """Return one flat record; the device's fields carry the prefix `device_`."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "device"}
        return own | {"path": str(self.path)} | {f"device_{key}": value for key, value in asdict(self.device).items()}


@dataclass(frozen=True)
class BenchmarkTable:
    """One row for each file, in the order given; ratios are to the first."""

    rows: tuple[BenchmarkRow, ...]

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
        return "\n".join(
            [
                *table,
                f"{device.name}: {device.description}, {device.system}; {device.runtime}, {first.delegate}, "
                f"{first.threads} thread{'s' if first.threads > 1 else ''}; governor {device.governor or 'unknown'}, "
                f"load {'unknown' if device.load_average is None else f'{device.load_average:.2f}'}; {first.date}",
            ]
        )


def _cells(row: BenchmarkRow) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.median_ms:.4g}",
        f"{row.p10_ms:.4g}",
        f"{row.p90_ms:.4g}",
        str(row.n),
        f"{row.ratio:.3f}",
        f"{row.ratio_low:.3f} to {row.ratio_high:.3f}",
        f"{row.size_bytes:,}",
        "noisy" if row.noisy else "",
    )


def _aligned(cells: tuple[str, ...], widths: list[int]) -> list[str]:
    return [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]


def benchmark(
    paths: Sequence[str | Path],
    *,
    device: str = "local",
    threads: int = 1,
    min_runs: int = 50,
    min_seconds: float = 3.0,
    max_seconds: float = 150.0,
    progress: Progress | None = None,
) -> BenchmarkTable:
    """Time `.tflite` files against each other, in turns.

    Each file gets at least `min_runs` runs and `min_seconds` of running; so two files of 5 ms take about 7 seconds.

    Args:
        paths: the files; ratios are to the first.
        device: where to run, as `open_device` names it.
        threads: threads that one inference may use.
        min_runs: least number of runs of each file.
        min_seconds: least running time of each file, in seconds.
        max_seconds: stop after this many seconds in all, whatever the least numbers; each file still gets its turns.
        progress: called with (sittings done, sittings in all, what comes next).

    Raises:
        OptionError: no files, or a number out of range.
        FlatbufferError: a file is damaged.
        DeviceError: the device is unknown or absent, or cannot run a file.
    """
    files = [Path(path) for path in paths]
    _check_options(files, threads, min_runs, min_seconds)
    models = [read_flatbuffer(path) for path in files]
    target = open_device(device)
    info, date = target.describe(), datetime.now(UTC).isoformat(timespec="seconds")
    sittings: list[_Sitting] = []
    budget = _Budget(min_runs / SITTINGS, 1000 * min_seconds / SITTINGS, 1000 * max_seconds / SITTINGS)
    for number in range(SITTINGS):
        if progress:
            progress(number, SITTINGS, f"timing {len(files)} files on '{info.name}'")
        sittings.append(_sit(target, files, threads, budget, backwards=number % 2 == 1))
    rows = [
        _row(index, files, models[index], sittings, threads=threads, date=date, device=info)
        for index in range(len(files))
    ]
    return BenchmarkTable(tuple(rows))


def _check_options(files: list[Path], threads: int, min_runs: int, min_seconds: float) -> None:
    if not files:
        raise OptionError("there is nothing to time: give at least one .tflite file.")
    if threads < 1 or min_runs < 1 or not 0 <= min_seconds < math.inf:
        raise OptionError(
            f"threads and min_runs must be at least 1 and min_seconds at least 0, "
            f"not {threads}, {min_runs} and {min_seconds}."
        )


@dataclass(frozen=True)
class _Budget:
    """What each file gets in one sitting: at least `runs` and `ms`; the whole sitting at most about `max_ms`."""

    runs: float
    ms: float
    max_ms: float


@dataclass(frozen=True)
class _Sitting:
    """times_ms[f][r]: the runs of file f in round r; delegates[f]: what ran it."""

    times_ms: list[list[list[float]]]
    delegates: list[str]


def _sit(device: Device, files: list[Path], threads: int, budget: _Budget, *, backwards: bool) -> _Sitting:
    order = list(range(len(files)))[:: -1 if backwards else 1]
    loaded = {index: device.load(files[index], threads=threads) for index in order}
    slice_runs = {index: max(1, round(_SLICE_MS / _warm_up(loaded[index]))) for index in order}
    times_ms: list[list[list[float]]] = [[] for _ in files]
    while _unfinished(times_ms, budget):
        for index in order:
            times_ms[index].append(loaded[index].time_runs(slice_runs[index]))
    return _Sitting(times_ms, [loaded[index].delegate for index in range(len(files))])


def _warm_up(model: LoadedModel) -> float:
    """Run until the times have settled and return the time of one run in milliseconds."""
    times = model.time_runs(1)
    while len(times) < _WARM_UP_RUNS or (sum(times) < _WARM_UP_MS and len(times) < 1000):
        times += model.time_runs(len(times))
    return max(float(np.median(times)), 1e-4)


def _unfinished(times_ms: list[list[list[float]]], budget: _Budget) -> bool:
    totals = [[sum(turn) for turn in file] for file in times_ms]
    if not totals[0]:
        return True
    if sum(map(sum, totals)) >= budget.max_ms:
        return False
    n_runs = [sum(map(len, file)) for file in times_ms]
    return min(n_runs) < budget.runs or min(map(sum, totals)) < budget.ms


def _row(
    index: int,
    files: list[Path],
    model: TfliteModel,
    sittings: list[_Sitting],
    *,
    threads: int,
    date: str,
    device: DeviceInfo,
) -> BenchmarkRow:
    runs = np.concatenate([np.concatenate(sitting.times_ms[index]) for sitting in sittings])
    p10, median, p90 = np.percentile(runs, [10, 50, 90])
    ratio, low, high = ratio_interval([_log_ratio(sitting, index) for sitting in sittings])
    if index:
        width = (high - low) / ratio
    else:
        _, own_low, own_high = ratio_interval([_log_median(sitting, index) for sitting in sittings])
        width = (own_high - own_low) / float(median)
    return BenchmarkRow(
        path=files[index],
        name=_names(files)[index],
        median_ms=float(median),
        p10_ms=float(p10),
        p90_ms=float(p90),
        n=len(runs),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        noisy=bool(width > NOISY_WIDTH),
        threads=threads,
        delegate=sittings[0].delegates[index],
        sha256=model.sha256,
        size_bytes=model.size_bytes,
        date=date,
        device=device,
    )


def _names(files: list[Path]) -> list[str]:
    """Return the shortest names that tell the files apart."""
    stems = [path.stem for path in files]
    if len(set(stems)) == len(stems):
        return stems
    common = os.path.commonpath([path.absolute().parent for path in files])
    return [os.path.relpath(path.absolute(), common) for path in files]


def _log_ratio(sitting: _Sitting, index: int) -> float:
    """Return the log of file `index`'s time over the first file's: the median over rounds, whose turns are adjacent."""
    rounds = zip(sitting.times_ms[index], sitting.times_ms[0], strict=True)
    return float(np.median([math.log(np.median(own) / np.median(first)) for own, first in rounds]))


def _log_median(sitting: _Sitting, index: int) -> float:
    return math.log(np.median(np.concatenate(sitting.times_ms[index])))


def ratio_interval(log_ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return geometric mean, lower and upper end of its 95 % interval, of independent log ratios of shape (n,).

    Student's interval: each value is itself a median over many rounds, hence close to normal, and with a dozen of
    values a percentile bootstrap would be too narrow by a tenth.

    Raises:
        DataError: fewer than two values.
    """
    from scipy.special import stdtrit

    n = len(log_ratios)
    if n < 2:
        raise DataError(f"an interval needs at least 2 sittings, not {n}.")
    center = float(np.mean(log_ratios))
    half = float(stdtrit(n - 1, 0.975) * np.std(log_ratios, ddof=1) / math.sqrt(n))
    return math.exp(center), math.exp(center - half), math.exp(center + half)
