"""A device that is only known from the logs that `benchmark_model` printed on it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tflite_export.benchmark_model import BenchmarkLog, graph_name, read_benchmark_log
from tflite_export.devices.device import DeviceInfo, Quota, Timing
from tflite_export.errors import DeviceError

_SUFFIXES = (".log", ".txt")


class LogDevice:
    """A log, or a folder of logs. Several logs of one file are several sittings, in the order of their names."""

    def __init__(self, address: str) -> None:
        """Read the logs.

        Raises:
            DeviceError: there is none, or one cannot be read.
        """
        root = Path(address)
        if not address or not root.exists():
            raise DeviceError(f"there is no log '{address}': write file:LOG or file:FOLDER.")
        found = sorted(path for path in root.iterdir() if path.suffix in _SUFFIXES) if root.is_dir() else [root]
        if not found:
            raise DeviceError(f"there is no log in '{root}': names end in {' or '.join(_SUFFIXES)}.")
        self._root = root
        self._logs = {path: read_benchmark_log(path) for path in found}
        self._next_by_path: dict[Path, int] = {}

    @property
    def paths(self) -> tuple[Path, ...]:
        """The logs, for a table of them all: each may be given to `run` in place of a `.tflite` file."""
        return tuple(self._logs)

    @property
    def n_sittings(self) -> int:
        """As many as there are logs of each file."""
        counts: dict[str, int] = {}
        for log in self._logs.values():
            counts[graph_name(log)] = counts.get(graph_name(log), 0) + 1
        return min(counts.values())

    def describe(self) -> DeviceInfo:
        """Return where the logs are: they do not tell the device."""
        return DeviceInfo(
            name=f"file:{self._root}",
            description=f"{len(self._logs)} log{'s' if len(self._logs) > 1 else ''}, device unknown",
            system="unknown",
            runtime="benchmark_model",
        )

    def run(self, paths: Sequence[Path], *, threads: int, quota: Quota, backwards: bool = False) -> list[Timing]:
        """Return what the next log of each file tells; see `Device`.

        Raises:
            DeviceError: there is no log of a file, or only of one of another size, or with other threads.
        """
        return [self._timing(path, threads) for path in paths]

    def fetch(self, path: Path, inputs: Sequence[np.ndarray], *, threads: int) -> None:
        """Return None: nothing can run."""
        return None

    def close(self) -> None:
        """Nothing is left behind."""

    def _timing(self, path: Path, threads: int) -> Timing:
        if path in self._logs:
            log = self._logs[path]
        else:
            of_file = [log for log in self._logs.values() if graph_name(log) == path.name]
            if not of_file:
                named = ", ".join(sorted({f"'{graph_name(log)}'" for log in self._logs.values()}))
                raise DeviceError(f"no log in '{self._root}' is of '{path.name}'; there are logs of {named}.")
            number = self._next_by_path.get(path, 0)
            self._next_by_path[path] = number + 1
            log = of_file[number % len(of_file)]
            self._check(path, log, threads)
        return Timing(log.delegate_text, log=log, init_ms=log.init_ms)

    def _check(self, path: Path, log: BenchmarkLog, threads: int) -> None:
        size_mb = path.stat().st_size / 1e6
        # The tool prints six digits.
        if log.size_mb is not None and abs(log.size_mb - size_mb) > 1e-5 * size_mb:
            raise DeviceError(
                f"the log of '{path.name}' in '{self._root}' is of a file of {log.size_mb} MB, but this one has "
                f"{size_mb:.6g} MB: it is another file."
            )
        if log.threads is not None and log.threads != threads:
            raise DeviceError(
                f"the log of '{path.name}' in '{self._root}' was made with {log.threads} threads, not {threads}: "
                f"give threads={log.threads}."
            )
