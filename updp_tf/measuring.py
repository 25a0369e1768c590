"""Measure how long every block and every form of a model takes on a device."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from updp_tf.blocks import find_blocks, prepared_graph
from updp_tf.console import shown
from updp_tf.cost import NS_PER_MS
from updp_tf.forms import all_forms, form_by_name
from updp_tf.isomorphic.ratios import Measure
from updp_tf.timing import NETWORKS, depthwise_macs, latency_items

if TYPE_CHECKING:
    from tflite_export import DeviceOptions, Estimate, LatencyTable

N_IMAGES = 4
"""That networks are quantized with to be timed."""


@dataclass(frozen=True)
class Target:
    """A device, and how networks run on it.

    Attributes:
        device: where to run, as for `tflite_export.benchmark`.
        precision: "float32", "float16", "dynamic" or "int8".
        threads: that one inference may use.
        device_options: what else the device should know.
        min_seconds: least running time of each network in a visit.
    """

    device: str = "local"
    precision: str = "int8"
    threads: int = 1
    device_options: DeviceOptions | None = None
    min_seconds: float = 1.0

    @contextmanager
    def against(self, original: Any) -> Iterator[Measure]:
        """Give what measures networks beside an original; the process that exports them lives as long.

        It takes networks by names that files may have, and returns the nanoseconds and the bytes of the file of each,
        and of `original`. All are timed in turns, in one visit; times are the original's times the ratios to it. It
        raises a `TfliteExportError` where a network cannot be exported, or the device is absent or went away.

        Args:
            original: a Keras model; exported once.
        """
        from tflite_export import ExportWorker, benchmark, export_many

        # ranges of integers change no times
        shape = original.input_shape[1:]
        images = np.random.default_rng(0).normal(size=(N_IMAGES, *shape)).astype("float32")
        with tempfile.TemporaryDirectory() as folder, ExportWorker() as worker:
            first = Path(folder) / "original.tflite"

            def measure(models: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
                paths = {name: Path(folder) / f"{name}.tflite" for name in models}
                jobs = [(original, first)] if not first.exists() else []
                jobs += [(model, paths[name]) for name, model in models.items()]
                export_many(
                    jobs, quantize=self.precision, calibration=images, post_training=(), worker=worker, force=True
                )
                rows = benchmark(
                    [first, *paths.values()],
                    device=self.device,
                    options=self.device_options,
                    threads=self.threads,
                    min_seconds=self.min_seconds,
                ).rows
                first_ns = rows[0].median_ms * NS_PER_MS
                names = ("original", *models)
                return {
                    name: (round(row.ratio * first_ns), row.size_bytes) for name, row in zip(names, rows, strict=True)
                }

            yield measure


def measure_latency(
    model: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    device: str = "local",
    device_options: DeviceOptions | None = None,
    precision: str = "float32",
    threads: int = 1,
    forms: Sequence[str] | None = None,
    skip: str = "auto",
    spans: int = 1,
    networks: int = NETWORKS,
    max_seconds: float = 300.0,
    verbose: bool = True,
) -> LatencyTable:
    """Return the latency table that `prune` and `search` read: every block, every form it can take, and the rest.

    Args:
        model: a Functional or Sequential Keras model of fixed size; it is not changed.
        out: a CSV file for the rows, written while they are measured. One that exists is gone on from: rows of other
            models are kept, and those that this model shares with them are not measured again.
        device: where to run, as for `tflite_export.benchmark`.
        device_options: what else the device should know.
        precision: "float32", "float16", "dynamic" or "int8".
        threads: that one inference may use.
        forms: names of the forms to time; all registered ones where None.
        skip: as in `Options`.
        spans: as in `Options`.
        networks: whole networks of random plans, to which the correction of sums is fitted.
        max_seconds: of timing; what is not settled then is marked noisy.
        verbose: show progress on standard error.

    Raises:
        ModelError: the model cannot be read, has no blocks, or takes images of any size.
        TfliteExportError: the device is absent or went away, or `out` is of another device or precision.

    Example:
        >>> table = updp_tf.measure_latency(model, device="adb", precision="int8", out="phone.csv")  # doctest: +SKIP
        >>> small = updp_tf.prune(model, calibration=images, budget={"latency": 0.7}, latency=table)  # doctest: +SKIP
    """
    from tflite_export import LatencyTable

    wanted = all_forms() if forms is None else [form_by_name(name) for name in forms]
    items = latency_items(find_blocks(model), forms=wanted, skip=skip, spans=spans, networks=networks)
    with shown(verbose) as progress:
        return LatencyTable.measure(
            items,
            device=device,
            options=device_options,
            precision=precision,
            threads=threads,
            max_seconds=max_seconds,
            out=None if out is None else Path(out),
            progress=progress,
        )


def estimate_latency(model: Any, *, device: str = "Pixel 1", precision: str = "float32") -> Estimate:
    """Return what published times of a phone's CPU suggest for a model: an estimate, where no device is at hand.

    Args:
        model: a Functional or Sequential Keras model.
        device: name of the phone; `tflite_export.phones()` lists them.
        precision: "float32" or "int8".

    Raises:
        ModelError: the model cannot be read.
        DeviceError: nothing was published for the phone in this precision.
    """
    from tflite_export import estimate_phone

    macs, depthwise = depthwise_macs(prepared_graph(model))
    return estimate_phone(macs, depthwise, device=device, precision=precision)
