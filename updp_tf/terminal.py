"""What the commands share: standard output for results alone, one sentence for our errors, files that are read."""

from __future__ import annotations

import json
import os
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import typer

from tflite_export.errors import DataError, TfliteExportError
from updp_tf.errors import ModelError, UpdpError
from updp_tf.run_dir import write_atomically

QUIET = "3"
"""Level at which TensorFlow logs nothing but the end of the world; a level that the user set stays."""

LOADING_FAILS_WITH = (
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What `keras.saving.load_model` was seen to raise over files that are damaged or need code that is not there."""


# --- output -------------------------------------------------------------------------------------------------------


@contextmanager
def working(debug: bool) -> Iterator[Callable[[Any], None]]:
    """Give a function that shows the result once all files are in place; turn our errors into exit code 1.

    From here to the end of the process descriptor 1 is standard error: TensorFlow, Keras and HiGHS print to it from C,
    and what C has buffered is written when the process ends.
    """
    shown: list[Any] = []
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as results, warnings.catch_warnings():
        os.dup2(2, 1)
        warnings.showwarning = _show_warning
        try:
            yield shown.append
        except (UpdpError, TfliteExportError) as error:
            if debug:
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error
        for result in shown:
            text = result if isinstance(result, str) else json.dumps(result, indent=1, allow_nan=False)
            print(text, file=results, flush=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    typer.echo(f"Warning: {message}", err=True)


@contextmanager
def progress_shown() -> Iterator[Callable[[int, int, str], None] | None]:
    """Show on standard error what is done, where that is a terminal."""
    with _quiet():
        from updp_tf.console import shown
    with shown(True) as progress:
        yield progress


def maybe_written(path: Path | None, *, force: bool) -> AbstractContextManager[Path | None]:
    """Give where to write a file that was asked for, None for one that was not."""
    return nullcontext() if path is None else write_atomically(path, force=force)


# --- input --------------------------------------------------------------------------------------------------------


def numbers(pairs: list[str], option: str) -> dict[str, float]:
    """Return `KEY=VALUE` pairs as a mapping; what is no such pair is an error of usage."""
    found: dict[str, float] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise typer.BadParameter(f"'{pair}' is not of the form KEY=NUMBER.", param_hint=option) from None
        if not key or key in found:
            raise typer.BadParameter(f"'{pair}' has no key, or one that was given before.", param_hint=option)
        found[key] = int(number) if number.is_integer() else number
    return found


def require_keras_output(output: Path, model: Path) -> None:
    """Raise an error of usage where a model cannot be written: another suffix, or over the one that is read."""
    if output.suffix != ".keras":
        raise typer.BadParameter(f"'{output}' does not end in .keras.", param_hint="--output")
    if output.exists() and model.exists() and output.samefile(model):
        raise typer.BadParameter(f"'{output}' is the model itself: give another name.", param_hint="--output")


def load_array(source: str, what: str) -> Any:
    """Return an array from `FILE.npy`, `FILE.npz` (the only one in it) or `FILE.npz:KEY`.

    Raises:
        DataError: there is no such file, array, or it is damaged.
    """
    import numpy as np

    name, _, key = source.partition(".npz:")
    path = Path(f"{name}.npz") if key else Path(source)
    if not path.is_file():
        raise DataError(f"There is no file '{path}' to read the {what} from.")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return loaded[_only_key(loaded.files, key, path, what)]
    except (EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"'{path}' cannot be read as .npy or .npz: {_one_line(error)}") from error


def calibration_array(source: str | None) -> Any:
    """Return the calibration images, None where none are given."""
    return None if source is None else load_array(source, "calibration images")


def training_data(images: str | None, labels: str | None) -> Any:
    """Return images, or images and labels, None where none are given.

    Raises:
        DataError: there is another number of labels.
    """
    if images is None:
        return None
    shown = load_array(images, "training images")
    if labels is None:
        return shown
    told = load_array(labels, "labels")
    if len(told) != len(shown):
        raise DataError(f"'{labels}' holds {len(told)} labels for {len(shown)} training images.")
    return shown, told


def timed_like(latency: Path | None, device: str) -> Any:
    """Return the target that times networks on a device as those of a latency table were timed.

    Raises:
        DataError: there is no table, or it cannot be read.
    """
    if latency is None:
        raise DataError("--device says where narrower networks are timed: it goes with --latency TABLE.csv.")
    from tflite_export import LatencyTable
    from updp_tf.measuring import Target

    conditions = LatencyTable.load(latency).conditions
    return Target(device=device, precision=conditions.precision, threads=conditions.threads)


def _only_key(keys: list[str], key: str, path: Path, what: str) -> str:
    if not key and len(keys) == 1:
        return keys[0]
    if key not in keys:
        raise DataError(f"'{path}' holds the arrays {keys}: name the {what} as '{path}:KEY'.")
    return key


def load_model(path: Path) -> Any:
    """Return the Keras model in a file.

    Raises:
        ModelError: there is no such file, or Keras cannot make a model of it.
    """
    if not path.is_file():
        raise ModelError(f"There is no file '{path}'.")
    if not zipfile.is_zipfile(path):
        raise ModelError(
            f"'{path}' is no .keras file, or is cut short: save the model again with model.save('{path.stem}.keras')."
        )
    keras = import_keras()
    try:
        return keras.saving.load_model(path, compile=False)
    except LOADING_FAILS_WITH as error:
        raise ModelError(
            f"Keras cannot load '{path}' ({_one_line(_innermost(error))}): save it again with model.save, or, if it "
            "needs custom classes or lambdas, load it in Python where they are defined and call updp_tf.prune there."
        ) from error


def import_keras() -> Any:
    """Import Keras, without what its backend says meanwhile."""
    with _quiet():
        import keras

        keras.ops.zeros(1)  # looks for devices, which TensorFlow comments on as well
    return keras


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what is written to descriptor 2: TensorFlow greets there when it is loaded, whatever the log level."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") != QUIET:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _innermost(error: BaseException) -> BaseException:
    """Return the error that started it: Keras wraps one in the whole configuration of what it was reading."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _one_line(error: BaseException, limit: int = 300) -> str:
    """Return the text of an error without line breaks, cut where it gets long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} ..."


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the labels in '{path}': {error}") from error


def floats(text: str, option: str) -> list[float]:
    """Return numbers with commas between; anything else is an error of usage."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers with commas, got {text!r}.", param_hint=option) from None


def step_names(text: str) -> list[str]:
    """Return names with commas between, nothing for `none`."""
    return [] if text == "none" else [word.strip() for word in text.split(",")]
