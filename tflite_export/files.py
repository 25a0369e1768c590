"""Put finished files in their place: whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tflite_export.errors import OutputError


def check_target(path: Path, *, force: bool) -> None:
    """Check that a file can be written, before the work that makes it.

    Raises:
        OutputError: it exists already and `force` is not given, or its folder does not exist.
    """
    if path.is_dir():
        raise OutputError(f"cannot write '{path}': it is a folder, give the name of a file in it.")
    if path.exists() and not force:
        raise OutputError(f"'{path}' exists already: give force=True (--force) to replace it, or another name.")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write '{path}': there is no folder '{path.parent}', make it first.")


def place(made: Path, path: Path) -> None:
    """Copy a finished file to its place.

    Raises:
        OutputError: it cannot be written.
    """
    with _replacing(path) as target, made.open("rb") as source:
        shutil.copyfileobj(source, target)


def write_text(text: str, path: Path) -> None:
    """Write a document in UTF-8, replacing one that is there in one step.

    Raises:
        OutputError: it cannot be written.
    """
    with _replacing(path) as target:
        target.write(text.encode("utf-8"))


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` that takes its place when all is written, and is gone if it was not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as target:
            yield target
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
