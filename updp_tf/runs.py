"""Runs that go on where they were stopped.

A `RunDir` is a folder of results. One process at a time works in it; each stage of the work is there, whole, or not;
and a process that was killed at any moment is continued by the same call.
"""

from __future__ import annotations

import csv
import fcntl
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import socket
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from updp_tf.errors import OutputError, RunError
from updp_tf.run_dir import write_atomically, write_folder_atomically

LOCK, ARGUMENTS = "lock.json", "arguments.json"

HEARTBEAT_SECONDS = 20.0
"""How often a process says that it is alive, for other machines that cannot see it."""

SILENT_SECONDS = 180.0
"""After how long without that a process of another machine counts as dead."""

T = TypeVar("T")


class RunWarning(UserWarning):
    """A run goes on with other versions of packages than it began with."""


@dataclass(frozen=True)
class Checkpoint:
    """A state of a stage that is still at work.

    Attributes:
        step: that it was written at.
        path: of its folder.
    """

    step: int
    path: Path


class RunDir:
    """A folder that one process at a time works in, and that the same call continues after any end.

    It holds `arguments.json` (what was asked, seeds, package versions), a folder for every finished stage, checkpoints
    of the one at work, and CSV logs. A context manager: inside, the folder is locked.

    Args:
        path: of the folder; made where it does not exist, its parents as well.
        arguments: what decides the results, as plain JSON data: options, budgets, fingerprints, seeds.
        packages: whose versions are recorded; a run that goes on with other versions warns.

    Raises:
        RunError: another process works in it (its id and machine are named); it was made with other arguments (which,
            and both values); it is no run directory.
        OutputError: it cannot be written to.

    Example:
        >>> with RunDir("runs/a", arguments={"budget": {"macs": 0.7}, "seed": 0}) as run:
        ...     scores = run.json("scores", lambda: {"block1": 0.1})  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        arguments: Mapping[str, Any],
        packages: Sequence[str] = ("updp-tf", "numpy"),
    ) -> None:
        self.path = Path(path)
        self.arguments = _as_json(arguments)
        self.versions = {name: importlib.metadata.version(name) for name in packages}
        self._lock = _Lock(self.path / LOCK)

    def __enter__(self) -> RunDir:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"'{self.path}' is a file: give a folder for the run.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            strangers = [one.name for one in self.path.iterdir() if not one.name.startswith((LOCK, ".tmp-"))]
            if strangers and ARGUMENTS not in strangers:
                raise RunError(
                    f"'{self.path}' is no run directory: it holds '{min(strangers)}' and no '{ARGUMENTS}'. Give a new "
                    "or an empty folder."
                )
            self._lock.take()
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"Cannot write to '{self.path}': {error.strerror}.") from error
        try:
            # what a killed process left half written
            for leftover in [*self.path.rglob(".tmp-*")]:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            self._check_arguments()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def stage(
        self, name: str, compute: Callable[[], T], *, write: Callable[[T, Path], None], read: Callable[[Path], T]
    ) -> T:
        """Return what a stage gives: from its folder where it is finished, else computed and written first.

        What is returned was read back in both cases, so that an unbroken run goes on with the very same values as one
        that was stopped. Checkpoints of the stage are removed once it is finished.

        Args:
            name: of the stage: letters, digits, `-` and `_`.
            compute: does the work.
            write: writes its result into an empty folder.
            read: reads the result from that folder.

        Raises:
            OutputError: the disk is full, or cannot be written to.
        """
        folder = self.path / _checked_name(name)
        if not folder.is_dir():
            result = compute()
            with write_folder_atomically(folder) as temporary:
                write(result, temporary)
        shutil.rmtree(self._checkpoints(name), ignore_errors=True)
        return read(folder)

    def json(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the plain data that a stage gives, as `stage` does."""

        def write(value: Any, folder: Path) -> None:
            (folder / "value.json").write_text(_dump(value), encoding="utf-8")

        return self.stage(
            name, compute, write=write, read=lambda folder: json.loads((folder / "value.json").read_text())
        )

    def is_finished(self, name: str) -> bool:
        """True where a stage is there already."""
        return (self.path / _checked_name(name)).is_dir()

    def checkpoint(self, stage: str, step: int, write: Callable[[Path], None], *, keep: int = 2) -> None:
        """Write a state of a stage at work into a folder of its own; the last `keep` are left.

        Args:
            stage: name of the stage.
            step: that the state belongs to; one that is there already is not written again.
            write: writes the state into an empty folder.
            keep: how many to leave, 1 or more.
        """
        folder = self._checkpoints(stage)
        folder.mkdir(exist_ok=True)
        target = folder / f"{step:012d}"
        if not target.exists():
            with write_folder_atomically(target) as temporary:
                write(temporary)
        for old in sorted(folder.iterdir())[: -max(keep, 1)]:
            shutil.rmtree(old)

    def last_checkpoint(self, stage: str) -> Checkpoint | None:
        """Return the last state that was written of a stage at work, None where there is none."""
        folder = self._checkpoints(stage)
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        return Checkpoint(int(found[-1].name), found[-1]) if found else None

    def log(self, name: str, columns: Sequence[str], *, after: int | None = None) -> Log:
        """Return a CSV log `<name>.csv` to append rows to, cut back to a step.

        Args:
            name: of the log.
            columns: of a row; the first one is `step`, in whole numbers.
            after: rows of later steps are removed: those written after the checkpoint that the work goes on from.
                All where there is no checkpoint.
        """
        return Log(self.path / f"{_checked_name(name)}.csv", columns, after=after)

    def _checkpoints(self, stage: str) -> Path:
        return self.path / f"{_checked_name(stage)}.checkpoints"

    def _check_arguments(self) -> None:
        path = self.path / ARGUMENTS
        if not path.exists():
            with write_atomically(path) as temporary:
                temporary.write_text(_dump({"arguments": self.arguments, "versions": self.versions}), encoding="utf-8")
            return
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            before, versions = dict(document["arguments"]), dict(document["versions"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"'{path}' cannot be read: {error}. Give another folder for the run.") from error
        differ = _differences(before, self.arguments)
        if differ:
            raise RunError(
                f"'{self.path}' is a run with other arguments: {'; '.join(differ)}. Give the same ones, or another "
                "folder."
            )
        changed = _differences(versions, self.versions)
        if changed:
            warnings.warn(
                f"The run in '{self.path}' goes on with other packages than it began with: {'; '.join(changed)}.",
                RunWarning,
                stacklevel=4,
            )


class Log:
    """An append-only CSV file whose rows are in the order of their steps; see `RunDir.log`."""

    def __init__(self, path: Path, columns: Sequence[str], *, after: int | None) -> None:
        if not columns or columns[0] != "step":
            raise RunError(f"The first column of a log is 'step'. Received: {list(columns)}.")
        self.path, self.columns = path, tuple(columns)
        rows = [] if after is None else [row for row in self._rows() if int(row[0]) <= after]
        with write_atomically(path, force=True) as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([self.columns, *rows])

    def append(self, **values: Any) -> None:
        """Write one row; it is in the file, whole, when this returns."""
        if set(values) != set(self.columns):
            raise RunError(
                f"A row of '{self.path.name}' has the columns {list(self.columns)}. Received: {list(values)}."
            )
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([values[name] for name in self.columns])

    def rows(self) -> list[dict[str, str]]:
        """Return every row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self._rows()]

    def _rows(self) -> list[list[str]]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        # a process killed while it wrote leaves half a row, without its end
        head, *rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines())) or [[]]
        if tuple(head) != self.columns:
            raise RunError(f"'{self.path}' has the columns {head}, not {list(self.columns)}. Give another folder.")
        return rows


@dataclass(frozen=True)
class _Owner:
    """A process that works in a run directory."""

    pid: int
    host: str
    boot: str

    @classmethod
    def me(cls) -> _Owner:
        boot = Path("/proc/sys/kernel/random/boot_id")
        return cls(os.getpid(), socket.gethostname(), boot.read_text().strip() if boot.exists() else "")


class _Lock:
    """A file that one process holds.

    On one machine the kernel says who is alive: it drops the lock of a process however that ends. Folders may be
    shared with machines whose locks it does not see; those are told by name, and alive as long as they touch the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._ended = threading.Event()

    def take(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._in_use(self._owner(descriptor)) from None
            owner, me = self._owner(descriptor), _Owner.me()
            if owner is not None and owner.host != me.host and (quiet := self._quiet_for()) < SILENT_SECONDS:
                raise self._in_use(owner, f", which showed itself {quiet:.0f} s ago")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(me)).encode(), 0)
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(self)
        self._ended.clear()
        threading.Thread(target=self._beat, name="updp-tf run", daemon=True).start()

    def release(self) -> None:
        if self._descriptor is None:
            return
        self._ended.set()
        _held.discard(self)
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = None

    def drop_in_child(self) -> None:
        """A forked process holds its parent's lock too, unless it closes it: it would outlive the parent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            # the folder may be gone by now, and nothing is to be kept then
            with suppress(FileNotFoundError):
                os.utime(self.path)

    def _quiet_for(self) -> float:
        """Seconds since the file was touched, by the clock of the folder's own machine."""
        now = self.path.with_name(f".tmp-{secrets.token_hex(4)}-now")
        now.touch()
        try:
            return now.stat().st_mtime - self.path.stat().st_mtime
        finally:
            now.unlink()

    def _owner(self, descriptor: int) -> _Owner | None:
        content = os.pread(descriptor, 4096, 0)
        try:
            return _Owner(**json.loads(content)) if content else None
        except (ValueError, TypeError):
            return None  # killed while it wrote; the kernel knows that it is gone

    def _in_use(self, owner: _Owner | None, told: str = "") -> RunError:
        who = "another process" if owner is None else f"process {owner.pid} on '{owner.host}'"
        return RunError(f"'{self.path.parent}' is in use by {who}{told}. Wait for its end, or give another folder.")


_held: weakref.WeakSet[_Lock] = weakref.WeakSet()


def _drop_locks() -> None:
    for lock in list(_held):
        lock.drop_in_child()


os.register_at_fork(after_in_child=_drop_locks)


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise RunError(f"The name of a stage or log has letters, digits, '-' and '_' alone. Received: {name!r}.")
    return name


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping as JSON gives it back: lists for tuples, texts for keys."""
    try:
        return dict(json.loads(_dump(dict(value))))
    except (TypeError, ValueError) as error:
        raise RunError(f"The arguments of a run are what JSON can hold: {error}.") from error


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    missing = "(not given)"
    return [
        f"'{name}' was {_short(before.get(name, missing))} and is {_short(now.get(name, missing))}"
        for name in sorted({*before, *now})
        if before.get(name, missing) != now.get(name, missing)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
