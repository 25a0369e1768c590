"""What every kind of device offers to `benchmarking.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np

from tflite_export.benchmark_model import BenchmarkLog
from tflite_export.errors import OptionError


class Nature(StrEnum):
    """What the times of a device are."""

    MEASURED = "measured"
    EMULATED = "emulated"  # the outputs are real, the times mean nothing and are left out
    ESTIMATE = "estimate"  # a compiler's word, nothing has run


class Delegate(StrEnum):
    """What is asked to run the operators."""

    CPU = "cpu"
    GPU = "gpu"
    NNAPI = "nnapi"
    EDGETPU = "edgetpu"


@dataclass(frozen=True)
class DeviceOptions:
    """What a user may say about a device beside its name.

    Attributes:
        delegate: what runs the operators: "cpu", "gpu", "nnapi" or "edgetpu".
        benchmark_model: the vendor's tool, built for the device; see `benchmark_model.find_benchmark_model`.
        python: the Python interpreter on a board, a name or an absolute path.
        ssh_config: a configuration file for the ssh client, in place of the user's own.

    Raises:
        OptionError: there is no such delegate.
    """

    delegate: str = Delegate.CPU
    benchmark_model: Path | None = None
    python: str = "python3"
    ssh_config: Path | None = None

    def __post_init__(self) -> None:
        if self.delegate not in list(Delegate):
            raise OptionError(f"there is no delegate '{self.delegate}': choose one of {', '.join(Delegate)}.")


@dataclass(frozen=True)
class DeviceInfo:
    """What the times were measured on.

    Attributes:
        name: the name that `open_device` takes.
        description: processor and number of cores.
        system: operating system and architecture.
        runtime: name and version of what runs the files.
        governor: the processor's frequency governor, None where it cannot be read; several where cores differ.
        load_average: processes that were running or waiting, mean of one minute; None where it cannot be read.
        cores: the cores that runs are bound to, "4-7" for example; None where they are not bound.
        temperature_c: of the processor's hottest part, None where it cannot be read.
        thermal_status: how much the system slows itself down, in its own words; None where it does not tell.
        nature: whether times are measured, estimated, or those of an emulated processor.
    """

    name: str
    description: str
    system: str
    runtime: str
    governor: str | None = None
    load_average: float | None = None
    cores: str | None = None
    temperature_c: float | None = None
    thermal_status: str | None = None
    nature: Nature = Nature.MEASURED


@dataclass(frozen=True)
class Quota:
    """What each file gets in one sitting: at least `runs` runs and `ms` of running; the sitting at most `max_ms`."""

    runs: float
    ms: float
    max_ms: float


@dataclass(frozen=True)
class Timing:
    """What one file took in one sitting.

    Attributes:
        delegate: what ran it.
        turns_ms: the single runs, turn by turn; all files of a sitting have the same number of turns. Empty where the
            device tells only a summary.
        log: that summary, None where the single runs are known.
        init_ms: time to load the file; None where it is not known.
    """

    delegate: str
    turns_ms: tuple[tuple[float, ...], ...] = ()
    log: BenchmarkLog | None = None
    init_ms: float | None = None


@dataclass(frozen=True)
class Answer:
    """What a file computed on a device.

    Attributes:
        outputs: the outputs as they are stored, in the file's order.
        log: the whole report of that run with operator times, where the device has one.
    """

    outputs: tuple[np.ndarray, ...]
    log: BenchmarkLog | None = None


class Device(Protocol):
    """A place where `.tflite` files run, or where their times are known. Close it: it may have files elsewhere."""

    @property
    def n_sittings(self) -> int | None:
        """How many sittings there are; None where there can be any number."""

    def describe(self) -> DeviceInfo:
        """Return what the device is now (load, temperature and governor may change).

        Raises:
            DeviceError: it is gone.
        """

    def run(self, paths: Sequence[Path], *, threads: int, quota: Quota, backwards: bool = False) -> list[Timing]:
        """Load all files afresh, warm them up, and let them run in turns.

        Args:
            paths: the files; the same file may be there twice, as two independent models.
            threads: threads that one inference may use.
            quota: what each file gets.
            backwards: whether the last file goes first.

        Returns:
            One timing for each file, in the order of `paths`.

        Raises:
            DeviceError: the device cannot run a file, failed, or went away.
        """

    def fetch(self, path: Path, inputs: Sequence[np.ndarray], *, threads: int) -> Answer | None:
        """Run a file once on given inputs and return what it computes; None where nothing can run.

        Args:
            path: the file.
            inputs: arrays of the stored types and shapes, in the file's order.
            threads: threads that one inference may use.

        Raises:
            DeviceError: the device cannot run the file, failed, or went away.
        """

    def close(self) -> None:
        """Remove what was put on the device and let go of it; may be called twice."""
