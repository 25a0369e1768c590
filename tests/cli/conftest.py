"""A small network with all that hides bugs in fresh ones, its images, and ways to run the command line."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (12, 12, 3)
CLASSES = 5


def conv_norm(x, filters, kernel_size=1):
    x = keras.layers.Conv2D(filters, kernel_size, padding="same", use_bias=False)(x)
    return keras.layers.BatchNormalization()(x)


def relu(x):
    return keras.layers.ReLU(6.0)(x)


def small_mobilenet() -> keras.Model:
    """Three inverted residual blocks behind a stem; random statistics, gammas of both signs."""
    keras.utils.set_random_seed(0)
    image = keras.Input(SHAPE, name="image")
    x = relu(conv_norm(image, 8, 3))
    for number in range(3):
        y = relu(conv_norm(x, 32))
        y = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y)
        y = conv_norm(relu(keras.layers.BatchNormalization()(y)), 8)
        x = keras.layers.Add(name=f"add{number}")([x, y])
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, keras.layers.Dense(CLASSES, activation="softmax")(x), name="small")
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            n = layer.gamma.shape[0]
            sign = rng.choice([-1, 1], n)
            values = sign * rng.uniform(0.5, 1.5, n), rng.normal(0, 0.5, n), rng.normal(0, 0.3, n)
            layer.set_weights([*values, rng.uniform(0.5, 2, n)])
    return model


@keras.saving.register_keras_serializable(package="tests")
class Doubled(keras.layers.Layer):
    """A layer that only this process knows."""

    def call(self, x):
        return 2 * x


def save_custom(path: Path) -> None:
    image = keras.Input(SHAPE)
    keras.Model(image, Doubled()(image)).save(path)


def save_damaged(path: Path, whole: Path) -> None:
    """Write a zip file that opens but whose configuration is cut short."""
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content[: len(content) // 2] if name == "config.json" else content)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> SimpleNamespace:
    """Paths of a model, damaged and foreign ones, and images; `network` and `images` are the objects themselves."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(1)
    # of different brightness, contrast and colour, so that answers differ
    images = rng.normal(0, 1, (60, *SHAPE)) * rng.uniform(0.3, 2, (60, 1, 1, 1)) + rng.normal(0, 1, (60, 1, 1, 3))
    images = images.astype("float32")
    network = small_mobilenet()
    found = SimpleNamespace(folder=folder, network=network, images=images)
    for name in ("model", "cut", "custom", "damaged", "text", "missing"):
        setattr(found, name, folder / f"{name}.keras")
    network.save(found.model)
    found.cut.write_bytes(found.model.read_bytes()[:20_000])
    save_custom(found.custom)
    save_damaged(found.damaged, found.model)
    found.text.write_text("no model")
    with_nan = images.copy()
    with_nan[3, 4, 5, 1] = np.nan
    labels = np.arange(60) % CLASSES
    arrays = {"x": images, "small_x": images[:, :8], "nan": with_nan, "y": labels, "few": labels[:59]}
    for name, array in arrays.items():
        setattr(found, name, folder / f"{name}.npy")
        np.save(folder / f"{name}.npy", array)
    found.npz = folder / "images.npz"
    np.savez(found.npz, calibration=images, labels=labels)
    return found


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}


def updp_tf(*arguments, cwd: Path, script: str | None = None) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own; `script` runs before it."""
    code = f"{script or ''}\nfrom updp_tf.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        timeout=600,
    )


# Importing TensorFlow takes 5 seconds, so this process runs many command lines, each with descriptors of its own.
DRIVER = """
import json, os, resource, sys, tempfile
from updp_tf import cli

def run(arguments, file_limit):
    kept = [os.dup(1), os.dup(2)]
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, hard))
        sys.argv = ["updp-tf", *arguments]
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
        out.seek(0), err.seek(0)
        return {"code": code, "out": out.read(), "err": err.read()}

for name, arguments, file_limit in json.load(sys.stdin):
    print(json.dumps([name, run(arguments, file_limit)]), flush=True)
"""


def run_all(commands: dict[str, list], *, cwd: Path, file_limits: dict[str, int]) -> dict[str, SimpleNamespace]:
    """Run command lines one after the other in one process; return exit code and output by name."""
    request = [[name, [str(one) for one in line], file_limits.get(name, 0)] for name, line in commands.items()]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        timeout=600,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(commands), done.stderr
    return {name: SimpleNamespace(**result) for name, result in results}
