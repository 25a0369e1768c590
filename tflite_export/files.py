"""Put finished files in their place: whole or not at all."""

import os
import secrets
import shutil
from pathlib import Path

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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with made.open("rb") as source, temporary.open("xb") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
