"""What every kind of device offers to `benchmarking.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class DeviceInfo:
    """What the times were measured on.

    Attributes:
        name: the name that `open_device` takes.
        description: processor and number of cores.
        system: operating system and architecture.
        runtime: name and version of what runs the files.
        governor: the processor's frequency governor, None where it cannot be read.
        load_average: processes that were running or waiting, mean of one minute; None where it cannot be read.
    """

    name: str
    description: str
    system: str
    runtime: str
    governor: str | None
    load_average: float | None


class LoadedModel(Protocol):
    """A file that is loaded on a device, with inputs set."""

    @property
    def delegate(self) -> str:
        """Name of the delegate that runs it or part of it, "none" where there is none."""

    def time_runs(self, n_runs: int) -> list[float]:
        """Run it `n_runs` times in a row and return the milliseconds of each run.

        Raises:
            DeviceError: the device failed or went away.
        """


class Device(Protocol):
    """A place where `.tflite` files run. Loading the same file twice gives two independent models."""

    def describe(self) -> DeviceInfo:
        """Return what the device is now (load and governor may change)."""

    def load(self, path: Path, *, threads: int) -> LoadedModel:
        """Load a file; it is not warm yet.

        Raises:
            FlatbufferError: the file is damaged.
            DeviceError: the device cannot run it.
        """
