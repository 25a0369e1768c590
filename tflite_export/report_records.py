"""What a run directory holds: its JSON and CSV files, recognised by what is in them, never by their names."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tflite_export.errors import DataError

MOST_BYTES = 20_000_000  # of a record; larger files are data, not records


@dataclass(frozen=True)
class Record:
    """A file of a run directory, as data.

    Attributes:
        path: of the file, relative to the run directory.
        kind: what it was recognised as; empty where it was not.
        data: a JSON value, or the rows of a CSV file as dicts of text.
    """

    path: str
    kind: str
    data: Any


def _is_pruning(data: Any) -> bool:
    return isinstance(data, Mapping) and {"plan", "blocks", "before", "after"} <= set(data)


def _is_plan(data: Any) -> bool:
    return isinstance(data, Mapping) and {"schema", "edits", "fingerprint"} <= set(data)


def _is_sweep(data: Any) -> bool:
    return isinstance(data, Mapping) and {"original", "rows", "measured_on"} <= set(data)


def _is_block_list(data: Any) -> bool:
    return isinstance(data, Mapping) and {"model", "blocks", "skipped"} <= set(data)


def _are_rows(*columns: str) -> Callable[[Any], bool]:
    def check(data: Any) -> bool:
        return isinstance(data, list) and bool(data) and isinstance(data[0], Mapping) and set(columns) <= set(data[0])

    return check


def _is_record(*keys: str) -> Callable[[Any], bool]:
    return lambda data: isinstance(data, Mapping) and set(keys) <= set(data)


KINDS: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("pruning", _is_pruning),
    ("plan", _is_plan),
    ("sweep", _is_sweep),
    ("blocks", _is_block_list),
    ("latencies", _are_rows("key", "latency_us", "precision")),
    ("times", _are_rows("name", "median_ms", "ratio")),
    ("swept rows", _are_rows("budget", "merged", "score")),
    ("training", _are_rows("step")),
    ("training", _are_rows("epoch")),
    ("edgetpu", _is_record("operators", "n_mapped")),
    ("edgetpu compiled", _is_record("operators", "log")),
    ("ethosu", _is_record("accelerator", "n_operators", "n_cpu_operators")),
    ("export", _is_record("sha256", "quantize", "max_error")),
    ("evaluation", _is_record("accuracy", "standard_error", "n")),
    ("run", _is_record("command")),
    ("run", _is_record("arguments", "versions")),
)
"""How records are recognised: the first that fits."""


def read_records(folder: Path) -> tuple[Record, ...]:
    """Return the JSON and CSV files of a folder and of those directly below it, recognised or not.

    Raises:
        DataError: a file that is damaged: which one.
    """
    records = []
    for path in sorted((*folder.glob("*.*"), *folder.glob("*/*.*"))):
        if path.suffix not in (".json", ".csv", ".jsonl") or path.name.startswith(".") or not path.is_file():
            continue
        name = str(path.relative_to(folder))
        if path.stat().st_size > MOST_BYTES:
            records.append(Record(name, "", None))
            continue
        data = _read(path)
        kind = next((kind for kind, fits in KINDS if fits(data)), "")
        records.append(Record(name, kind, data))
    return tuple(records)


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text)))
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise DataError(f"'{path}' cannot be read: {error}.") from error


def model_name(record: Record) -> str:
    """Return the name of the model that a record is about; empty where it tells none."""
    if record.kind == "pruning":
        return str(record.data["plan"].get("model", ""))
    return str(record.data.get("model", "")) if record.kind in ("plan", "sweep", "blocks") else ""
