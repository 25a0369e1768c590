"""A Coral Edge TPU on this machine: libedgetpu as a delegate of LiteRT, in a process of its own."""

import ctypes
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tflite_export.devices.device import Answer, Delegate, DeviceInfo, DeviceOptions, Quota, Timing
from tflite_export.devices.remote import EDGETPU_LIBRARY, RemoteDevice
from tflite_export.devices.transport import HostTransport
from tflite_export.edgetpu import COMPILED_OPERATOR
from tflite_export.edgetpu_compiler import compile_edgetpu
from tflite_export.errors import CompilerError, DeviceError
from tflite_export.flatbuffer import read_flatbuffer


class EdgeTpuDevice:
    """The Edge TPU at this machine's USB or PCIe. Files are compiled first where they are not."""

    n_sittings = None

    def __init__(self, options: DeviceOptions) -> None:
        """Look for the library and start.

        Raises:
            DeviceError: the library is not installed.
        """
        try:
            ctypes.CDLL(EDGETPU_LIBRARY)
        except OSError as error:
            raise DeviceError(
                f"there is no '{EDGETPU_LIBRARY}' on this machine ({error}): install Coral's runtime "
                "(libedgetpu1-std), or for current LiteRT the builds of github.com/feranick/libedgetpu."
            ) from error
        self._compiled = Path(tempfile.mkdtemp(prefix="updp-tf-"))
        try:
            options = replace(options, delegate=Delegate.EDGETPU, python=sys.executable, benchmark_model=None)
            self._inner = RemoteDevice(HostTransport("edgetpu"), options)
        except BaseException:
            shutil.rmtree(self._compiled)
            raise

    def describe(self) -> DeviceInfo:
        """Return what drives the device, and the machine around it."""
        info = self._inner.describe()
        return replace(info, description=f"Edge TPU on {info.description}")

    def run(self, paths: Sequence[Path], *, threads: int, quota: Quota, backwards: bool = False) -> list[Timing]:
        """Time the compiled files; see `Device`."""
        compiled = [self._compile(path) for path in paths]
        return self._inner.run(compiled, threads=threads, quota=quota, backwards=backwards)

    def fetch(self, path: Path, inputs: Sequence[np.ndarray], *, threads: int) -> Answer:
        """Run the compiled file once; see `Device`."""
        return self._inner.fetch(self._compile(path), inputs, threads=threads)

    def close(self) -> None:
        """Remove the compiled files."""
        self._inner.close()
        shutil.rmtree(self._compiled, ignore_errors=True)

    def _compile(self, path: Path) -> Path:
        model = read_flatbuffer(path)
        if COMPILED_OPERATOR in model.custom_operators:
            return path
        target = self._compiled / f"{model.sha256[:24]}_edgetpu.tflite"
        if not target.exists():
            try:
                compile_edgetpu(path, target)
            except CompilerError as error:
                raise DeviceError(f"'{path}' is not compiled for the Edge TPU, and cannot be here: {error}") from error
        return target
