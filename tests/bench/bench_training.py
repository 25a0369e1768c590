"""Time of a training step of students and of the merged network, over training the original, without a teacher.

    uv run --frozen python tests/bench/bench_training.py resnet20|mobilenet_v2

Needs the weights beside the repository. All networks take turns, batch by batch, so that a busy machine slows all of
them; still, run it on one that does nothing else. The plan merges all blocks that 3x3 convolutions can stand for.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np

import updp_tf
from tests.experiments.records import shared_loader

BATCHES = {"resnet20": 128, "mobilenet_v2": 16}
MERGED = {"resnet20": 9, "mobilenet_v2": 5}
ROUNDS = 20
WARM_UP = 3


def main(network: str) -> None:
    model = getattr(shared_loader(), network)()
    blocks = updp_tf.find_blocks(model)
    rng = np.random.default_rng(0)
    batch = BATCHES[network]
    images = rng.normal(size=(batch, *model.input_shape[1:])).astype("float32")
    labels = rng.integers(0, 10, batch)
    keep = [blocks[0].name] if network == "mobilenet_v2" else []  # dearer merged than as it is
    budget = {"merged": MERGED[network]}
    merged = updp_tf.prune(model, budget=budget, forms=["conv3"], keep=keep, verbose=False)
    plan = merged.pruning.plan
    schedule = updp_tf.Schedule(total_steps=100_000)
    nets = {
        "original": keras.models.clone_model(model),
        "expanded": updp_tf.progressive(model, plan, schedule=schedule, mode="expanded", verbose=False),
        "whole": updp_tf.progressive(model, plan, schedule=schedule, mode="whole", verbose=False),
        "merged": merged,
    }
    for net in nets.values():
        net.compile("sgd", "sparse_categorical_crossentropy")
    times = {name: [] for name in nets}
    load_before = os.getloadavg()[0]
    for _ in range(WARM_UP + ROUNDS):
        for name, net in nets.items():
            begin = time.perf_counter()
            net.train_on_batch(images, labels)
            times[name].append(time.perf_counter() - begin)
    report = merged.pruning
    macs = report.after.macs / report.before.macs
    print(
        f"{len(plan.edits)} of {len(blocks)} blocks, {macs:.2f} of the MACs after merging, batch {batch}, n = {ROUNDS}"
    )
    print(f"load {load_before:.1f} before, keras {keras.__version__} on {keras.backend.backend()}")
    base = np.array(times["original"][WARM_UP:])
    for name, taken in times.items():
        ratios = np.array(taken[WARM_UP:]) / base
        low, middle, high = np.percentile(ratios, [10, 50, 90])
        print(f"{name:10} {1000 * np.median(taken[WARM_UP:]):7.1f} ms  {middle:.2f} [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main(sys.argv[1])
