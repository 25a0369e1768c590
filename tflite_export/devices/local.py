"""This machine: LiteRT with XNNPACK, its default delegate."""

import os
import platform
import re
import time
from importlib.metadata import version
from pathlib import Path

from tflite_export.devices.device import DeviceInfo, LoadedModel
from tflite_export.interpreter import TfliteRunner

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_CPUINFO = Path("/proc/cpuinfo")


class LocalModel:
    """A file in an interpreter of this process, with random inputs."""

    def __init__(self, path: Path, *, threads: int) -> None:
        self._runner = TfliteRunner(path, threads=threads)
        self._runner.fill()

    @property
    def delegate(self) -> str:
        """The delegate that has taken over operators."""
        return "XNNPACK" if self._runner.delegated else "none"

    def time_runs(self, n_runs: int) -> list[float]:
        """Run `n_runs` times; see `LoadedModel`."""
        invoke, times_ms = self._runner.invoke, []
        for _ in range(n_runs):
            start = time.perf_counter_ns()
            invoke()
            times_ms.append((time.perf_counter_ns() - start) / 1e6)
        return times_ms


class LocalDevice:
    """This machine."""

    def describe(self) -> DeviceInfo:
        """Return processor, system, runtime, governor and load."""
        return DeviceInfo(
            name="local",
            description=f"{_processor()}, {os.cpu_count()} cores",
            system=f"{platform.system()} {platform.machine()}",
            runtime=f"ai-edge-litert {version('ai-edge-litert')}",
            governor=_first_line(_GOVERNOR),
            load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        )

    def load(self, path: Path, *, threads: int) -> LoadedModel:
        """Load a file into an interpreter of its own."""
        return LocalModel(path, threads=threads)


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").partition("\n")[0].strip() or None
    except OSError:
        return None


def _processor() -> str:
    try:
        found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", _CPUINFO.read_text("utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
