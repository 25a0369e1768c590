"""Rows of a latency table, and their file: a CSV document with a column for each fact."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from tflite_export.devices import Nature
from tflite_export.errors import DataError
from tflite_export.files import write_text


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


def write_rows(rows: Sequence[LatencyRow]) -> str:
    """Return a CSV document with a header, one line for each row."""
    text = io.StringIO()
    records = [row.as_json() for row in rows]
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def save_rows(rows: Sequence[LatencyRow], path: Path) -> None:
    """Put that document in its place, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(write_rows(rows), path)


def read_rows(text: str, *, source: str) -> tuple[LatencyRow, ...]:
    """Return the rows of such a document.

    Args:
        text: the document.
        source: what it was read from, for messages.

    Raises:
        DataError: it is no such document; the line and column are named.
    """
    reader = csv.DictReader(io.StringIO(text))
    missing = [name for name in (*_ROW_COLUMNS, *_CONDITIONS) if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{source} is no latency table: the column '{missing[0]}' is missing.")
    return tuple(_row(line, f"{source}, line {number}") for number, line in enumerate(reader, start=2))


def _row(line: Mapping[str, str | None], source: str) -> LatencyRow:
    values = {name: read(line[name] or "", name, source) for name, read in _ROW_COLUMNS.items()}
    if not (values["key"] and math.isfinite(values["latency_us"]) and values["latency_us"] >= 0):
        raise DataError(f"{source}: the row has no key or no time. Received: '{line['key']}', '{line['latency_us']}'.")
    conditions = Conditions(**{name: read(line[name] or "", name, source) for name, read in _CONDITIONS.items()})
    return LatencyRow(**values, conditions=conditions)


def _text(cell: str, name: str, source: str) -> str:
    return cell


def _words(cell: str, name: str, source: str) -> tuple[str, ...]:
    return tuple(cell.split())


def _flag(cell: str, name: str, source: str) -> bool:
    return cell == "True"


def _number(cell: str, name: str, source: str) -> float:
    try:
        return float(cell) if cell else math.nan
    except ValueError as error:
        raise DataError(f"{source}: '{name}' is no number. Received: '{cell}'.") from error


def _whole(cell: str, name: str, source: str) -> int:
    value = _number(cell, name, source)
    if not value.is_integer():
        raise DataError(f"{source}: '{name}' is no whole number. Received: '{cell}'.")
    return int(value)


_READERS: Mapping[Any, Callable[[str, str, str], Any]] = {
    str: _text,
    tuple[str, ...]: _words,
    bool: _flag,
    float: _number,
    int: _whole,
}
"""How a cell becomes a value, by the type of its field; called with the cell, its column, and the line's place."""


def _columns(cls: type) -> dict[str, Callable[[str, str, str], Any]]:
    return {name: _READERS[hint] for name, hint in get_type_hints(cls).items() if hint is not Conditions}


_ROW_COLUMNS, _CONDITIONS = _columns(LatencyRow), _columns(Conditions)
