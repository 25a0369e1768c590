"""What an int8 export costs: time and memory of both processes, the caller's and the one that converts.

    uv run --frozen python -m tests.experiments.export_cost [NETWORK ...]

Writes export_cost.csv beside this file; what is there is not run again. MobileNetV2 with ImageNet weights, 200 images;
ResNet-50 at 224 pixels with random weights and 50 random images. Each network runs in a process of its own, since a
process knows only the most memory that it ever used. CPU seconds are those of both processes, from the call to its end,
the start of the worker included. Seconds mean something on an idle machine alone: the load before is in the row.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.experiments.records import HERE, Records, shared_loader

NETWORKS = {"MobileNetV2": 200, "ResNet-50": 50}


def records() -> Records:
    values = ("n_images", "size_bytes", "seconds", "load_before", "cpu_seconds", "caller_gib", "worker_gib")
    return Records(HERE / "export_cost.csv", ("network",), values)


def network(name: str):
    """Return a model and its calibration images."""
    n = NETWORKS[name]
    if name == "MobileNetV2":
        load = shared_loader()
        images, _ = load.imagenet1000()
        chosen = np.linspace(0, len(images) - 1, n).astype(int)
        return load.mobilenet_v2(), load.mobilenet_preprocess(images[chosen])
    import keras

    from tests import zoo

    images = np.random.default_rng(0).normal(size=(n, 224, 224, 3)).astype("float32")
    return zoo.randomise(keras.applications.ResNet50(weights=None)), images


def run(name: str) -> None:
    """Export one network here, and add its row."""
    import tflite_export

    model, images = network(name)
    load = os.getloadavg()[0]
    wall, cpu = time.perf_counter(), cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        result = tflite_export.export(model, Path(folder) / "m.tflite", quantize="int8", calibration=images)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu

    def row() -> dict[str, object]:
        return {
            "n_images": len(images),
            "size_bytes": result.size_bytes,
            "seconds": f"{wall:.1f}",
            "load_before": f"{load:.1f}",
            "cpu_seconds": f"{cpu:.1f}",
            "caller_gib": f"{gib(resource.RUSAGE_SELF):.2f}",
            "worker_gib": f"{gib(resource.RUSAGE_CHILDREN):.2f}",
        }

    records().ensure(row, network=name)


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def gib(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / 2**20


def main(names: list[str]) -> None:
    for name in names or NETWORKS:
        if records().find(network=name) is None:
            command = [sys.executable, "-m", "tests.experiments.export_cost", "--here", name]
            subprocess.run(command, check=True, cwd=HERE.parents[1])


if __name__ == "__main__":
    run(sys.argv[2]) if sys.argv[1:2] == ["--here"] else main(sys.argv[1:])
