"""The parent's side of the worker process that converts (`_converter.py` is the other side)."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tflite_export import errors
from tflite_export.errors import ExportError, OutputError


class WorkerTracebackError(Exception):
    """What an error in the worker process came from, as text: exceptions themselves do not cross processes."""


class ExportWorker:
    """A process that converts models, one after another. Its start costs more than converting a small model.

    `export` starts one of its own for each call; give several calls the same one to save the starts. It starts with
    its first model, starts anew after a crash, and ends with the `with` block or `close()`. For one thread at a time.

    Example:
        >>> with ExportWorker() as worker:  # doctest: +SKIP
        ...     export(model, "float32.tflite", worker=worker)
        ...     export(model, "int8.tflite", quantize="int8", calibration=images, worker=worker)
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._log: Any = None

    def __enter__(self) -> "ExportWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process at once; nothing that was written is touched."""
        if self._process is not None:
            # Between two models it has nothing to finish, and in the middle of one nobody wants the rest.
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                try:
                    if pipe:
                        pipe.close()
                except BrokenPipeError:  # a request that a dead process never read
                    pass
            self._log.close()
            self._process = self._log = None

    def start(self) -> None:
        """Start the process if it does not run, so that it loads TensorFlow while the caller prepares a model.

        Raises:
            OutputError: no temporary file can be made for its log.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.close()  # it may have died between two models, with the user's Ctrl-C for example
        try:
            self._log = tempfile.TemporaryFile()
        except OSError as error:
            raise temporary_files_error(Path(tempfile.gettempdir()), error) from error
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tflite_export._converter"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=converter_environment(),
            text=True,
            encoding="utf-8",
        )

    def convert(self, request: dict[str, Any], label: str, progress: Callable[[str], None]) -> dict[str, Any]:
        """Have one model converted and return the process's record of it.

        Args:
            request: what `_converter.serve` reads.
            label: the model in messages.
            progress: called with what comes next.

        Raises:
            TfliteExportError: what the process refused or failed to do.
            ExportError: the process died; the message holds its last lines.
        """
        self.start()
        try:
            return self._ask(request, label, progress)
        except errors.TfliteExportError:
            raise
        except BaseException:
            # Interrupted in the middle: the rest of the answer must not be taken for that to the next request.
            self.close()
            raise

    def _ask(self, request: dict[str, Any], label: str, progress: Callable[[str], None]) -> dict[str, Any]:
        process: Any = self._process
        try:
            process.stdin.write(json.dumps(request | {"sys_path": _search_path()}) + "\n")
            process.stdin.flush()
        except BrokenPipeError as error:
            raise self._death(label) from error
        for line in iter(process.stdout.readline, ""):
            answer = json.loads(line)
            if "result" in answer:
                return answer["result"]
            if "error" in answer:
                cause = WorkerTracebackError(answer["cause"]) if answer["cause"] else None
                raise getattr(errors, answer["error"])(answer["message"]) from cause
            progress(f"{label}: {answer['progress']}")
        raise self._death(label)

    def _death(self, label: str) -> ExportError:
        process: Any = self._process
        status = process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        hint = " (out of memory?)" if status == -9 else ""
        self._log.seek(0)
        log = self._log.read().decode("utf-8", errors="replace")
        last = "\n".join([line for line in log.splitlines() if line.strip()][-5:])
        self.close()
        return ExportError(f"the worker process that converted {label} {how}{hint}; its last lines were:\n{last}")


def temporary_files_error(folder: Path, error: OSError) -> OutputError:
    """Return what to raise when the disk for temporary files is full or read-only."""
    return OutputError(
        f"cannot write temporary files in '{folder}': {error.strerror or error}. Set TMPDIR to a disk with space."
    )


def _search_path() -> list[str]:
    return [os.path.abspath(entry) for entry in sys.path]


def converter_environment() -> dict[str, str]:
    """Return the environment of a process that converts: TensorFlow on the processor, modules found as here."""
    environment = dict(os.environ)
    environment.pop("TF_USE_LEGACY_KERAS", None)
    return environment | {
        "KERAS_BACKEND": "tensorflow",
        # The parent may hold all of the GPU's memory, and constants folded on a GPU would change the bytes.
        "CUDA_VISIBLE_DEVICES": "-1",
        # It rounds differently from run to run, and the error against Keras should repeat.
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "1",
        "PYTHONPATH": os.pathsep.join(_search_path()),
    }
