"""Rows of measured times, their table, their files, and the interval of a ratio."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from tflite_export.benchmark_model import BenchmarkLog
from tflite_export.devices import DeviceInfo, Nature
from tflite_export.errors import DataError, OptionError
from tflite_export.files import write_text

NOISY_WIDTH = 0.05


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

    def without_times(self) -> "BenchmarkRow":
        """Return the row of an emulated processor, whose times mean nothing."""
        no = math.nan
        without_runs = replace(self, median_ms=no, p10_ms=no, p90_ms=no, init_ms=no)
        return replace(without_runs, ratio=no, ratio_low=no, ratio_high=no, noisy=False)


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
        return Ratio(*ratio_interval([log_ratio(sitting, own, other) for sitting in self.turns_ms]))

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

    def save(self, path: Path) -> None:
        """Write the rows, JSON where the file is called `.json`, else CSV; what is there is replaced in one step.

        Raises:
            OutputError: it cannot be written.
        """
        write_text(json.dumps(self.as_json(), indent=1) + "\n" if path.suffix == ".json" else self.as_csv(), path)

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


# --- intervals -------------------------------------------------------------------------------------------------------


def log_ratio(sitting: tuple[tuple[float, ...], ...], index: int, other: int) -> float:
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
