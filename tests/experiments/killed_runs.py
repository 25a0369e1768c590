"""ResNet-20 on CIFAR-10 (JPEG): what twenty kills cost a `prune` with training and a run directory.

    uv run --frozen python -m tests.experiments.killed_runs FOLDER

Trains once unbroken and once killed twenty times with SIGKILL at random moments, started again each time, in FOLDER
(outside of the project); writes killed_runs.csv beside this file. Blocks are blended away as a whole, 10,000 images, 16
epochs, a checkpoint every 10 steps, the original as teacher. `seconds` are those of all processes together, imports
included; `steps` those trained, `same` whether weights, plan and logs are those of the unbroken run, bit for bit.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.experiments.records import HERE, Records, shared_loader

ROOT = HERE.parents[1]
EPOCHS, BATCH, N_TRAIN, CHECKPOINT_STEPS = 16, 128, 10_000, 10
KILLS = 20


def work(folder: Path) -> None:
    """The call that is killed."""
    import keras

    import updp_tf

    def count(batch, logs=None) -> None:
        with folder.with_suffix(".steps").open("ab") as file:
            file.write(b".")

    load = shared_loader()
    model = load.resnet20(classifier_activation=None)
    x, y = load.cifar10_jpeg("train", N_TRAIN)
    x = load.cifar_preprocess(x)
    small = updp_tf.prune(
        model,
        calibration=x[:600],
        train=(x, y),
        budget={"macs": 1 / 2.1},
        forms=("conv3", "pointwise"),
        training=updp_tf.Training(
            mode="whole",
            epochs=EPOCHS,
            batch_size=BATCH,
            learning_rate=0.02,
            checkpoint_steps=CHECKPOINT_STEPS,
            callbacks=(keras.callbacks.LambdaCallback(on_train_batch_end=count),),
        ),
        run_dir=folder,
        verbose=False,
    )
    small.save(folder.with_suffix(".keras"))


def run(folder: Path, limit: float | None = None) -> tuple[bool, float]:
    """Return whether the call ended before its limit, and after how many seconds it ended or was killed."""
    began = time.monotonic()
    environment = {**os.environ, "TF_DETERMINISTIC_OPS": "1"}
    command = [sys.executable, "-m", "tests.experiments.killed_runs", "work", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        if process.wait(timeout=limit):
            raise SystemExit(f"The call ended with {process.returncode}.")
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return False, time.monotonic() - began
    return True, time.monotonic() - began


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    whole, killed = folder / "whole", folder / "killed"
    records = Records(HERE / "killed_runs.csv", ("run",), ("kills", "seconds", "steps", "same"))
    _, unbroken = run(whole)

    def row(path: Path, kills: int, seconds: float, same: object) -> dict[str, object]:
        return {"kills": kills, "seconds": f"{seconds:.0f}", "steps": path.with_suffix(".steps").stat().st_size} | {
            "same": same
        }

    records.ensure(lambda: row(whole, 0, unbroken, "-"), run="unbroken")
    draws, kills, seconds, done = random.Random(0), 0, 0.0, False
    while not done:
        # twenty of these are as long as the unbroken run with what starting again costs
        limit = draws.uniform(0.2, 1.8) * 1.2 * unbroken / KILLS if kills < KILLS else None
        done, took = run(killed, limit)
        kills, seconds = kills + (not done), seconds + took
        print(f"killed {kills} times, {seconds:.0f} s", flush=True)
    records.ensure(lambda: row(killed, kills, seconds, same(whole, killed)), run="killed")


def same(first: Path, second: Path) -> bool:
    import keras
    import numpy as np

    nets = [keras.models.load_model(path.with_suffix(".keras")) for path in (first, second)]
    weights = zip(*(net.get_weights() for net in nets), strict=True)
    names = ("start/plan.json", "training_student.csv", "training_merged.csv")
    return all(np.array_equal(have, want) for have, want in weights) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names
    )


if __name__ == "__main__":
    work(Path(sys.argv[2])) if sys.argv[1] == "work" else main(Path(sys.argv[1]))
