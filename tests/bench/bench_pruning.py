"""Time and memory of `prune` on a MobileNetV2 with ImageNet weights: 500 images, five blocks merged.

    uv run --frozen python tests/bench/bench_pruning.py

Needs the real images and weights beside the repository. Run it on a machine that does nothing else, or it means little:
the load before the run is printed.
"""

import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import updp_tf
from tests.experiments.records import shared_loader


def main() -> None:
    load = shared_loader()
    model = load.mobilenet_v2()
    images, _ = load.imagenet1000()
    images = load.mobilenet_preprocess(images[::2])
    load_before = os.getloadavg()[0]
    wall, cpu = time.perf_counter(), time.process_time()
    small = updp_tf.prune(model, calibration=images, budget={"merged": 5})
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(images)} images: {wall:.1f} s, {cpu:.1f} CPU s, peak {peak:.2f} GiB, load {load_before:.1f} before")
    print(small.pruning)


if __name__ == "__main__":
    main()
