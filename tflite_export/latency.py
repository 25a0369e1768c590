"""Latency tables: how long many small models take on one device, by key.

A table knows keys and models, not what they stand for. What it says is measured in visits (`latency_visit`) and kept
as rows (`latency_rows`).

The sum of parts is not the whole: caches are warm in small models, and runtimes fuse across borders. Rows of whole
networks name their parts, and from them a table fits one correction, a scale and an offset (`latency_fits`).
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tflite_export.devices import DeviceOptions, open_device
from tflite_export.errors import DataError, OptionError
from tflite_export.files import check_target
from tflite_export.latency_fits import Correction, fit_correction
from tflite_export.latency_rows import Conditions, LatencyRow, read_rows, save_rows, write_rows
from tflite_export.latency_visit import LatencyItem, Visit
from tflite_export.worker import ExportWorker

Progress = Callable[[int, int, str], None]

REST = "rest:"
"""What is left of a network without its parts has the key of the network with `network:` replaced by this."""
NETWORK = "network:"

PRECISIONS = ("float32", "float16", "dynamic", "int8")


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
        return write_rows(self.rows)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the rows as CSV.

        Raises:
            OutputError: the file exists and `force` is not set, or it cannot be written.
        """
        path = Path(path)
        check_target(path, force=force)
        save_rows(self.rows, path)

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
        return cls(read_rows(text, source=source), source)

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
            visit = Visit(
                opened, delegate=str(options.delegate), precision=precision, threads=threads, progress=progress
            )
            if known is not None and known.conditions != visit.conditions:
                raise DataError(
                    f"{known.source} is of {known.conditions}, but what would be measured is {visit.conditions}: give "
                    "another file, or leave the table out."
                )
            rows = visit.measure(
                _items(items),
                known._row_by_key if known is not None else {},
                folder=Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tflite_export_"))),
                worker=worker or stack.enter_context(ExportWorker()),
                max_seconds=max_seconds,
                target=target,
            )
        return cls(rows, "the latency table" if target is None else f"'{target}'")


def _items(items: Iterable[LatencyItem | tuple[Any, ...]]) -> Iterator[LatencyItem]:
    for item in items:
        yield item if isinstance(item, LatencyItem) else LatencyItem(*item)


def _cells(row: LatencyRow) -> tuple[str, ...]:
    interval = "-" if math.isnan(row.low_us) else f"{row.low_us:.4g} to {row.high_us:.4g}"
    return row.key, f"{row.latency_us:.4g}", interval, f"{row.size_bytes:,}", "noisy" if row.noisy else ""
