"""This machine: LiteRT with XNNPACK, its default delegate."""

import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tflite_export.devices import runner, thermal
from tflite_export.devices.device import Answer, DeviceInfo, Quota, Timing
from tflite_export.errors import DeviceError

_GOVERNORS = "cpu[0-9]*/cpufreq/scaling_governor"
_PROCESSORS = Path("/sys/devices/system/cpu")
_ZONES = Path("/sys/class/thermal")
_CPUINFO = Path("/proc/cpuinfo")


class LocalDevice:
    """This machine, in this process."""

    n_sittings = None

    def describe(self) -> DeviceInfo:
        """Return processor, system, runtime, governor, load and temperature."""
        governors = sorted({_first_line(path) for path in _PROCESSORS.glob(_GOVERNORS)} - {""})
        zones = [(_first_line(zone / "type"), _first_line(zone / "temp")) for zone in _ZONES.glob("thermal_zone*")]
        return DeviceInfo(
            name="local",
            description=f"{_processor()}, {os.cpu_count()} cores",
            system=f"{platform.system()} {platform.machine()}",
            runtime=f"ai-edge-litert {version('ai-edge-litert')}",
            governor=" ".join(governors) or None,
            load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            temperature_c=thermal.processor_temperature(zones),
        )

    def run(self, paths: Sequence[Path], *, threads: int, quota: Quota, backwards: bool = False) -> list[Timing]:
        """Load all files and let them take turns; see `Device`."""
        order = list(range(len(paths)))[:: -1 if backwards else 1]
        loaded, init_ms = {}, {}
        for index in order:
            start = time.perf_counter()
            loaded[index] = _load(paths[index], threads)
            init_ms[index] = 1000 * (time.perf_counter() - start)
        interpreters = [loaded[index] for index in range(len(paths))]
        with _failures(", ".join(f"'{path}'" for path in dict.fromkeys(paths))):
            times_ms = runner.sit(interpreters, order, asdict(quota))
        return [
            Timing(runner.delegate_name(one), tuple(map(tuple, turns)), init_ms=init_ms[index])
            for index, (one, turns) in enumerate(zip(interpreters, times_ms, strict=True))
        ]

    def fetch(self, path: Path, inputs: Sequence[np.ndarray], *, threads: int) -> Answer:
        """Run a file once; see `Device`."""
        interpreter = _load(path, threads)
        with _failures(f"'{path}'"):
            for detail, values in zip(interpreter.get_input_details(), inputs, strict=True):
                interpreter.set_tensor(detail["index"], values)
            return Answer(tuple(runner.answer(interpreter)))

    def close(self) -> None:
        """Nothing is left behind."""


def _load(path: Path, threads: int) -> runner.Any:
    with _failures(f"'{path}'"):
        return runner.load(str(path), threads)


@contextmanager
def _failures(files: str) -> Iterator[None]:
    try:
        yield
    except runner.RunnerError as error:
        raise DeviceError(f"this machine cannot run {files}: {error}.") from error


def _first_line(path: Path) -> str:
    try:
        return path.read_text("utf-8").partition("\n")[0].strip()
    except OSError:
        return ""


def _processor() -> str:
    try:
        found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", _CPUINFO.read_text("utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
