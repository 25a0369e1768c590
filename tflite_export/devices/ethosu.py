"""An Arm Ethos-U NPU that is not there: the vendor's compiler says how long it would take."""

import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from tflite_export.devices.device import DeviceInfo, Nature, Quota, Timing
from tflite_export.errors import CompilerError, DeviceError
from tflite_export.ethosu import ACCELERATORS, compile_ethosu


class EthosUDevice:
    """The compiler's estimate for one accelerator. Rows say `estimate`: nothing has run."""

    n_sittings = 1

    def __init__(self, accelerator: str) -> None:
        """Choose the accelerator.

        Raises:
            DeviceError: there is no such accelerator, or the compiler is not installed.
        """
        if accelerator not in ACCELERATORS:
            raise DeviceError(f"there is no device '{accelerator}': choose one of {', '.join(ACCELERATORS)}.")
        try:
            self._version = version("ethos-u-vela")
        except PackageNotFoundError as error:
            raise DeviceError("the Ethos-U compiler is not installed: pip install 'updp-tf[ethosu]'.") from error
        self._accelerator = accelerator

    def describe(self) -> DeviceInfo:
        """Return the accelerator and the compiler that speaks for it."""
        return DeviceInfo(
            name=self._accelerator,
            description=f"Arm {self._accelerator}, the compiler's default system",
            system="none",
            runtime=f"estimate by ethos-u-vela {self._version}",
            nature=Nature.ESTIMATE,
        )

    def run(self, paths: Sequence[Path], *, threads: int, quota: Quota, backwards: bool = False) -> list[Timing]:
        """Compile the files; see `Device`.

        Raises:
            DeviceError: the compiler failed, or leaves operators on a processor of which it knows no times.
        """
        return [self._estimate(path) for path in paths]

    def fetch(self, path: Path, inputs: Sequence[np.ndarray], *, threads: int) -> None:
        """Return None: nothing can run."""
        return None

    def close(self) -> None:
        """Nothing is left behind."""

    def _estimate(self, path: Path) -> Timing:
        with tempfile.TemporaryDirectory(prefix="updp-tf-") as folder:
            try:
                made = compile_ethosu(path, self._accelerator, Path(folder) / "compiled.tflite")
            except CompilerError as error:
                raise DeviceError(f"there is no estimate for '{path}' on '{self._accelerator}': {error}") from error
        if made.estimated_ms is None:
            raise DeviceError(
                f"there is no estimate for '{path}' on '{self._accelerator}': all its {made.n_operators} operators "
                'stay on the CPU. The NPU computes in 8 or 16 bits: export the model with quantize="int8".'
            )
        on_cpu = f" ({made.n_cpu_operators} operators on the CPU left out)" if made.n_cpu_operators else ""
        return Timing(f"{self._accelerator}{on_cpu}", ((made.estimated_ms,),))
