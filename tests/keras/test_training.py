"""`prune` with training: every mode and kind of data, run directories, kills, and what goes wrong."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import updp_tf
from tests import zoo
from updp_tf.compiling import jit_compile
from updp_tf.errors import RunError, TrainingError
from updp_tf.judging import divergence
from updp_tf.training import Batches, Training, blend_layers

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"epochs": 3, "batch_size": 16, "learning_rate": 0.005}


def sharp():
    """A network of random weights whose classes differ, and whose norms know what they read, as trained ones do."""
    model = zoo.build("residual")
    model = updp_tf.reestimate_norms(model, images(model))
    kernel = model.layers[-1].kernel
    kernel.assign(12 * kernel)
    return model


def images(model, n=96):
    return zoo.inputs_of(model, n=n)


def outputs(model, x):
    return np.asarray(model(x, training=False))


def pruned(model, x, **options):
    return updp_tf.prune(
        model, calibration=x, budget={"merged": 3}, forms=("conv3",), verbose=False, **{"train": x, **options}
    )


@pytest.fixture(scope="module")
def begun():
    """A network, images, and what pruning without training makes of it."""
    model = sharp()
    x = images(model)
    options = updp_tf.Options(start="gaussian", refit=False, reestimate=False)
    start = updp_tf.prune(model, calibration=x, budget={"merged": 3}, forms=("conv3",), options=options, verbose=False)
    return model, x, options, start


@pytest.mark.parametrize("mode", ["direct", "whole", "expanded"])
def test_training_brings_the_pruned_network_closer_to_the_original(begun, mode):
    model, x, options, start = begun
    before = [np.array(weight) for weight in model.get_weights()]
    small = pruned(
        model,
        x,
        training=Training(mode=mode, epochs=8, batch_size=16, optimizer=keras.optimizers.Adam(3e-4)),
        options=options,
    )
    want = outputs(model, x)
    assert divergence(want, outputs(small, x)) < 0.8 * divergence(want, outputs(start, x))
    assert not list(blend_layers(small))
    assert small.pruning.plan.edits == start.pruning.plan.edits or len(small.pruning.plan.edits) == 3
    assert model.trainable
    for have, was in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(have, was)


def test_frozen_norms_stay_as_they_were_fitted(begun):
    model, x, options, start = begun
    quiet = Training(batch_size=16, epochs=1, freeze_norms=True, optimizer=keras.optimizers.Adam(3e-4))
    small = pruned(model, x, training=quiet, options=options)
    moved = 0
    for have, was in zip(small.layers, start.layers, strict=True):
        is_norm = isinstance(have, keras.layers.BatchNormalization)
        same = all(np.array_equal(a, b) for a, b in zip(have.get_weights(), was.get_weights(), strict=True))
        assert same or not is_norm
        moved += not same
        assert have.trainable
    assert moved >= 3 and sum(isinstance(one, keras.layers.BatchNormalization) for one in small.layers) >= 3


class Ordered(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x) // 16

    def __getitem__(self, index):
        part = slice(16 * index, 16 * index + 16)
        return self.x[part], self.y[part]


def test_the_same_batches_from_every_kind_of_data_give_the_same_network():
    import tensorflow as tf

    model = zoo.build("residual")
    x = images(model)
    y = outputs(model, x).argmax(-1)
    kinds = [
        Ordered(x, y),
        tf.data.Dataset.from_tensor_slices((x, y)).batch(16),
        list(zip(x.reshape(6, 16, *x.shape[1:]), y.reshape(6, 16), strict=True)),
    ]
    # batches are the same in every mode; this one traces a single network
    nets = [pruned(model, x, train=kind, training=Training(mode="direct", **QUICK)) for kind in kinds]
    for other in nets[1:]:
        for have, want in zip(other.get_weights(), nets[0].get_weights(), strict=True):
            np.testing.assert_array_equal(have, want)


def test_batches_in_the_middle_of_an_epoch_are_those_of_an_unbroken_one():
    x = np.arange(40, dtype="float32")[:, None]
    training = Training(batch_size=8)
    arrays = Batches(x, training)
    assert arrays.steps_per_epoch == 5
    epochs = [np.concatenate([arrays[step][0] for step in range(5 * e, 5 * e + 5)]).ravel() for e in (0, 1)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()
    stream = [x[i : i + 8] for i in range(0, 40, 8)]
    whole = [batch[0] for batch in Batches(stream, training).window(0, 12)]
    later = [batch[0] for batch in Batches(stream, training).window(7, 12)]
    np.testing.assert_array_equal(np.stack(whole[7:]), np.stack(later))


def test_a_finished_run_is_read_and_not_trained_again(tmp_path):
    model = zoo.build("residual")
    x = images(model)
    y = outputs(model, x).argmax(-1)
    ask = {
        "train": (x, y),
        "training": Training(mode="whole", **QUICK),
        "run_dir": tmp_path / "run",
        "validation": [(x[:32], y[:32])],
    }
    first = pruned(model, x, **ask)
    rows = {
        path.name: list(csv.DictReader(path.read_text().splitlines()))
        for path in (tmp_path / "run").glob("training_*.csv")
    }
    assert set(rows) == {"training_student.csv", "training_merged.csv"}
    student = rows["training_student.csv"]
    assert float(student[-1]["blend"]) == 0.0 < float(student[0]["blend"]) < 1
    assert all(0 <= float(row["validation"]) <= 1 for row in student)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.keras")}
    again = pruned(model, x, **ask)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.keras")}
    for have, want in zip(again.get_weights(), first.get_weights(), strict=True):
        np.testing.assert_array_equal(have, want)
    assert again.pruning.to_json() == first.pruning.to_json()
    with pytest.raises(RunError, match="epochs"):
        pruned(model, x, **{**ask, "training": Training(mode="whole", **{**QUICK, "epochs": 4})})


KILLED = """
import os, sys
os.environ["TF_DETERMINISTIC_OPS"] = "1"
import numpy as np, keras
import updp_tf
from tests import zoo
model = zoo.build("residual")
x = zoo.inputs_of(model, n=96)
y = np.asarray(model(x, training=False)).argmax(-1)
training = updp_tf.Training(
    mode="whole", epochs=6, batch_size=16, learning_rate=0.005, checkpoint_steps=4,
    optimizer=keras.optimizers.Adam(1e-3),
)
small = updp_tf.prune(
    model, calibration=x, train=(x, y), budget={"merged": 3}, forms=("conv3",), training=training,
    run_dir=sys.argv[1], verbose=False,
)
small.save(sys.argv[2])
"""


def run_until(folder, out, seconds):
    """Run the script, kill it after a time, and return whether it had finished."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), str(out)], env=environment, cwd=ROOT, stderr=subprocess.PIPE
    )
    try:
        _, errors = process.communicate(timeout=seconds)
        assert process.returncode == 0, errors.decode()[-3000:]
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False


def kill_and_compare(tmp_path, kills):
    began = time.monotonic()
    assert run_until(tmp_path / "whole", tmp_path / "whole.keras", 600)
    unbroken = time.monotonic() - began
    draws = random.Random(0)
    killed = 0
    for _ in range(kills):
        # later and later, so that kills meet every stage: a fresh process spends half its time on imports
        killed += not run_until(tmp_path / "run", tmp_path / "run.keras", unbroken * draws.uniform(0.3, 0.9))
    assert run_until(tmp_path / "run", tmp_path / "run.keras", 600)
    assert killed >= 1
    nets = [keras.models.load_model(tmp_path / name) for name in ("whole.keras", "run.keras")]
    for have, want in zip(nets[1].get_weights(), nets[0].get_weights(), strict=True):
        np.testing.assert_array_equal(have, want)
    plans = [(tmp_path / name / "start" / "plan.json").read_bytes() for name in ("whole", "run")]
    assert plans[0] == plans[1]
    logs = [
        [(tmp_path / n / f"training_{stage}.csv").read_text() for stage in ("student", "merged")]
        for n in ("whole", "run")
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_killed_twenty_times_a_run_ends_as_an_unbroken_one(tmp_path):
    kill_and_compare(tmp_path, 20)


def test_killed_once_a_run_ends_as_an_unbroken_one(tmp_path):
    kill_and_compare(tmp_path, 1)


def test_the_usual_optimizer_does_not_throw_a_network_without_norms_off():
    """At the same rate, without clipped gradients, the network dies: it says the same of every image."""
    model = zoo.residual_without_norms()
    kernel = model.layers[-1].kernel
    kernel.assign(0.6 * kernel)
    x = 20 * zoo.inputs_of(model, n=96)
    y = outputs(model, x).argmax(-1)
    rate = 0.03
    unclipped = keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(rate, 18), momentum=0.9, nesterov=True)

    def away(**options) -> float:
        return divergence(outputs(model, x), outputs(pruned(model, x, **options), x))

    recipe = {"epochs": 3, "batch_size": 16}
    before = away(train=None)
    assert away(train=(x, y), training=Training(learning_rate=rate, **recipe)) < 0.5 * before
    assert away(train=(x, y), training=Training(optimizer=unclipped, **recipe)) > 10 * before


def test_xla_compiles_where_it_is_faster(monkeypatch):
    assert jit_compile() is False
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["GPU:0"])
    assert jit_compile() == "auto"
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["CPU:0", "CPU:1"])
    assert jit_compile() is False
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert jit_compile() == "auto"


def test_data_that_do_not_fit_are_refused():
    model = zoo.build("residual")
    x = images(model, n=40)
    quick = Training(**QUICK)
    with pytest.raises(TrainingError, match="go from .* calibration images from"):
        pruned(model, x, train=255 * x, training=quick)
    with pytest.raises(TrainingError, match="shape"):
        pruned(model, x, train=x[:, ::2], training=quick)
    with pytest.raises(TrainingError, match="less than one batch"):
        pruned(model, x, train=x[:4], training=quick)
    with pytest.raises(TrainingError, match="steps_per_epoch"):
        pruned(model, x, train=(x[i : i + 8] for i in range(0, 40, 8)), training=quick)
    with pytest.raises(TrainingError, match="give `train` as well"):
        updp_tf.prune(model, calibration=x, budget={"merged": 1}, run_dir="somewhere")


def test_a_loss_that_is_no_number_says_where(tmp_path):
    model = zoo.build("residual")
    x = images(model, n=64)
    training = Training(mode="whole", epochs=6, batch_size=16, learning_rate=1e12)
    with pytest.raises(TrainingError, match=r"no number at step \d+"):
        pruned(model, x, training=training, run_dir=tmp_path / "run")


JAX = """
import keras, numpy as np, updp_tf
from tests import zoo
from updp_tf.judging import divergence
model = zoo.build("residual")
x = zoo.inputs_of(model, n=96)
model = updp_tf.reestimate_norms(model, x)
model.layers[-1].kernel.assign(12 * model.layers[-1].kernel)
options = updp_tf.Options(start="gaussian", refit=False, reestimate=False)
ask = {"calibration": x, "budget": {"merged": 3}, "forms": ("conv3",), "verbose": False, "options": options}
start = updp_tf.prune(model, **ask)
adam = keras.optimizers.Adam(3e-4)
training = updp_tf.Training(mode="expanded", epochs=8, batch_size=16, optimizer=adam)
small = updp_tf.prune(model, train=x, training=training, **ask)
want, before, after = (np.asarray(net(x, training=False)) for net in (model, start, small))
assert divergence(want, after) < 0.8 * divergence(want, before)
print("ok")
"""


def test_training_on_jax():
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", JAX], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.endswith("ok\n"), done.stderr[-3000:]
