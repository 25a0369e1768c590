"""`prune(train=...)` on several devices and in several processes, against one device.

Devices have to be counted before a backend starts, so every case is a process of its own.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]

PRUNED = """
import sys
import keras
import numpy as np
import updp_tf
from tests import zoo

def pruned():
    images = np.random.default_rng(0).normal(size=(48, 9, 11, 3)).astype("float32")
    training = updp_tf.Training(epochs=3, batch_size=16, learning_rate=0.05, mode=sys.argv[2])
    small = updp_tf.prune(
        zoo.residual_without_norms(),
        calibration=images,
        budget={"merged": 2},
        train=images,
        training=training,
        verbose=False,
    )
    return [keras.ops.convert_to_numpy(weight) for weight in small.weights]

def save(weights):
    np.savez(sys.argv[1], *weights)
"""

ONE = "save(pruned())"

MIRRORED = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
with strategy.scope():
    save(pruned())
"""

PARALLEL = """
if len(sys.argv) > 3:
    import jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize(job_addresses=sys.argv[3], num_processes=2, process_id=int(sys.argv[4]))
devices = keras.distribution.list_devices()
assert len(devices) == 2, devices
keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False))
save(pruned())
"""


def started(code: str, out: Path, *arguments: str, backend: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRUNED + code, str(out), *arguments],
        env={**os.environ, "KERAS_BACKEND": backend, **environment},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights_of(runs: list[subprocess.Popen[str]], outs: list[Path]) -> list[list[np.ndarray]]:
    """Wait for processes, which may wait for each other, and return the weights that each wrote."""
    told = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs), "\n".join(text[-2000:] for text in told)
    weights = []
    for out in outs:
        with np.load(out) as arrays:
            weights.append([arrays[f"arr_{i}"] for i in range(len(arrays.files))])
    return weights


def assert_close(have: list[np.ndarray], want: list[np.ndarray]) -> None:
    for a, b in zip(have, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["direct", "whole"])
def test_two_devices_of_tensorflow_train_as_one(mode: str, tmp_path: Path) -> None:
    outs = [tmp_path / "one.npz", tmp_path / "two.npz"]
    codes = zip((ONE, MIRRORED), outs, strict=True)
    one, two = weights_of([started(code, out, mode, backend="tensorflow") for code, out in codes], outs)
    assert_close(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["direct", "expanded"])
def test_two_devices_and_two_processes_of_jax_train_as_one(mode: str, tmp_path: Path) -> None:
    outs = [tmp_path / f"{name}.npz" for name in ("one", "two", "first", "second")]
    two_devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    runs = [
        started(ONE, outs[0], mode, backend="jax"),
        started(PARALLEL, outs[1], mode, backend="jax", **two_devices),
        *(started(PARALLEL, outs[2 + i], mode, address, str(i), backend="jax") for i in range(2)),
    ]
    one, *others = weights_of(runs, outs)
    for weights in others:
        assert_close(weights, one)
