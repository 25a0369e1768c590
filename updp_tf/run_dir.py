"""Files and folders that are complete or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from updp_tf.errors import OutputError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CANNOT_WRITE = (*NO_SPACE, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EIO)


@contextmanager
def write_atomically(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder; what was written there gets the name `path` at the end.

    The temporary name ends in the whole name of `path`, so that writers that look at the suffix (`.keras`,
    `.weights.h5`, `.npz`) do the same as for `path`. Whatever goes wrong before the rename, the temporary file is
    removed and an existing file is as it was. Only a process killed outright leaves a `.tmp-` file behind.

    Args:
        path: of the file to write; its folder must exist.
        force: replace a file that exists.

    Yields:
        Where to write.

    Raises:
        OutputError: the file exists and `force` is False, its folder does not exist or cannot be written to, the
            disk is full, or nothing was written. Other errors of the writer pass through.

    Example:
        >>> with write_atomically("model.keras", force=True) as temporary:
        ...     model.save(temporary)  # doctest: +SKIP
    """
    target = Path(path)
    _refuse_target(target, force=force)
    temporary = target.with_name(f".tmp-{secrets.token_hex(4)}-{target.name}")
    try:
        with _disk_errors_told(target, temporary):
            yield temporary
            if not temporary.is_file():
                raise OutputError(f"Cannot write '{target}': the writer left no file at '{temporary.name}'.")
            _flush(temporary)
            _refuse_target(target, force=force)  # again: the writer may have taken minutes
            os.replace(temporary, target)
            _flush(target.parent)
    finally:
        _remove(temporary)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_target(target: Path, *, force: bool) -> None:
    if not target.parent.is_dir():
        raise OutputError(f"Cannot write '{target}': the folder '{target.parent}' does not exist.")
    if target.is_dir():
        raise OutputError(f"Cannot write '{target}': it is a folder.")
    if target.exists() and not force:
        raise OutputError(f"'{target}' exists already: choose another name, or replace it with force=True (--force).")


def _remove(temporary: Path) -> None:
    """Remove a temporary file, and what a writer that appends a suffix of its own has made of its name."""
    for leftover in temporary.parent.glob(f"{glob.escape(temporary.name)}*"):
        leftover.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network and FUSE folders cannot be synchronised; their files can
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors_told(target: Path, temporary: Path) -> Iterator[None]:
    """Raise `OutputError` where the disk did not take what is written; other errors of the writer pass through."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        reason = _why_not_written(error, temporary)
        if reason is None:
            raise
        raise OutputError(f"Cannot write '{target}': {reason}.") from error


def _why_not_written(error: BaseException, temporary: Path) -> str | None:
    """Return why the disk did not take a file, or None where the error is about something else.

    Writers raise over what the system said: an HDF5 file that cannot be flushed fails once more, with a RuntimeError,
    when it is closed. So the whole chain is looked at.
    """
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        link = link.__cause__ or link.__context__
    for cause in seen:
        number = cause.errno if isinstance(cause, OSError) else None
        if number in NO_SPACE:
            _remove(temporary)  # else it would fill what it says is free
            free = shutil.disk_usage(temporary.parent).free
            return f"the disk or its quota is full, {free / 1e6:.1f} MB are free in '{temporary.parent}'"
        concerns_file = isinstance(cause, OSError) and cause.filename in (None, str(temporary), temporary)
        if concerns_file and number in CANNOT_WRITE:
            return os.strerror(number or 0)
    return None


# --- folders -------------------------------------------------------------------------------------------------------


@contextmanager
def write_folder_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; with all that was written into it, it gets that name at the end.

    Raises:
        OutputError: `path` exists already, its folder does not exist or cannot be written to, or the disk is full.
            Other errors of the writer pass through.
    """
    target = Path(path)
    _refuse_folder(target)
    temporary = target.with_name(f".tmp-{secrets.token_hex(4)}-{target.name}")
    try:
        with _disk_errors_told(target, temporary):
            temporary.mkdir()
            yield temporary
            for one in [*temporary.rglob("*"), temporary]:
                _flush(one)
            _refuse_folder(target)
            os.rename(temporary, target)
            _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_folder(target: Path) -> None:
    if not target.parent.is_dir():
        raise OutputError(f"Cannot write '{target}': the folder '{target.parent}' does not exist.")
    if target.exists():
        raise OutputError(f"'{target}' exists already.")
