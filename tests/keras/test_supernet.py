"""The supernet: its networks are those that merging gives, it trains, switches without tracing, and judges plans."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import updp_tf
from tests import zoo
from tests.keras.test_choosing import kl, merged_with_fits
from tests.keras.test_merging import images_for, relative_error, stock_only
from updp_tf import Genetic, Supernet
from updp_tf.blocks import find_blocks
from updp_tf.errors import CalibrationError, PlanError
from updp_tf.forms import form_by_name
from updp_tf.scoring import score
from updp_tf.structure import Candidate, Cost
from updp_tf.supernet import Switch

ROOT = Path(__file__).resolve().parents[2]
FORMS = ["conv3", "remove"]


def predict(model, images):
    return np.asarray(model(images, training=False))


@pytest.fixture(scope="module")
def trained():
    model = zoo.build("residual")
    images = images_for(model, 32)
    net = Supernet(model, images, forms=FORMS, spans=2, verbose=False)
    old = [np.array(weight) for weight in net.core.trainable_weights]
    net.compile(keras.optimizers.Adam(1e-3), steps_per_execution=2)  # each step is traced with four networks
    history = net.fit(images, epochs=7, batch_size=8, verbose=0).history
    return model, images, net, old, history


@pytest.mark.parametrize("name", ["inverted_residuals", pytest.param("residual", marks=pytest.mark.slow)])
def test_its_networks_are_those_that_merging_gives(name: str) -> None:
    model = zoo.build(name)
    images = images_for(model, 24)
    net = Supernet(model, images, forms=["conv3", "remove"], spans=2, verbose=False)
    assert relative_error(predict(net, images), predict(model, images)) < 1e-5
    blocks = find_blocks(model)
    scores = score(blocks, images, forms=[form_by_name("conv3"), form_by_name("remove")], spans=2)
    scores_by_key = {one.key: one for one in scores.candidates}
    spans = [one for one in net.candidates if len(one.blocks) > 1]
    single = [one for one in net.candidates if len(one.blocks) == 1]
    # two neighbours, every other form alone, and a span
    for chosen in ([single[0], single[-1]], single[1:2], spans[-1:]):
        net.choose(chosen)
        want = merged_with_fits(blocks, scores, [scores_by_key[one.key] for one in chosen])
        assert relative_error(predict(net, images), predict(want, images)) < 1e-4
        small = net.subnet(chosen)
        assert relative_error(predict(small, images), predict(want, images)) < 1e-4
        assert small.count_params() == want.count_params() and small.name == model.name
        assert stock_only(small)
    net.choose(())
    assert relative_error(predict(net, images), predict(model, images)) < 1e-5


def test_training_teaches_every_form_without_labels(trained) -> None:
    _, _, net, old, history = trained
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    still = [w.path for w, a in zip(net.core.trainable_weights, old, strict=True) if np.array_equal(np.array(w), a)]
    assert not still, "with two random networks in each step, every form has its turn"


def test_the_original_is_not_changed(trained) -> None:
    model, images, net, *_ = trained
    fresh = zoo.build("residual")
    for a, b, c in zip(fresh.weights, model.weights, net.teacher.weights, strict=True):
        np.testing.assert_array_equal(np.array(a), np.array(b))
        np.testing.assert_array_equal(np.array(a), np.array(c))


def test_after_training_a_network_is_what_the_switches_choose(trained) -> None:
    _, images, net, *_ = trained
    for chosen in (net.candidates[:1], net.candidates[-1:]):
        net.choose(chosen)
        assert relative_error(predict(net.subnet(chosen), images), predict(net, images)) < 1e-5
    net.choose(())


def test_switching_traces_nothing_again(trained, monkeypatch) -> None:
    _, images, net, *_ = trained
    net.predict(images, verbose=0, batch_size=8)
    calls = []
    call = Switch.call
    monkeypatch.setattr(Switch, "call", lambda self, inputs: calls.append(self.name) or call(self, inputs))
    outputs = []
    for chosen in (net.candidates[:1], net.candidates[-1:]):
        net.choose(chosen)
        outputs.append(net.predict(images, verbose=0, batch_size=8))
        net.fit(images[:32], batch_size=8, verbose=0)
    assert not calls and np.abs(outputs[0] - outputs[1]).max() > 1e-4
    net.choose(())


@pytest.mark.slow
def test_labels_teach_the_largest_network_and_evaluate_the_chosen_one() -> None:
    model = zoo.build("residual")
    images = images_for(model, 32)
    labels = np.arange(32) % 5
    net = Supernet(model, images, forms=["remove"], verbose=False)
    net.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    first = net.evaluate(images, labels, verbose=0, return_dict=True)
    assert first["loss"] == pytest.approx(
        float(np.mean(-np.log(predict(model, images)[np.arange(32), labels]))), rel=1e-3
    )
    net.fit(images, labels, epochs=3, batch_size=8, verbose=0)
    net.choose(net.candidates[:1])
    told = net.evaluate(images, labels, verbose=0, return_dict=True)["accuracy"]
    small = net.subnet(net.candidates[:1])
    assert told == pytest.approx(float((predict(small, images).argmax(-1) == labels).mean()))


def test_plans_are_judged_by_its_networks(trained) -> None:
    model, images, net, *_ = trained
    unseen = images_for(model, 20, seed=9)
    labels = predict(model, unseen).argmax(-1)
    labels[:7] = (labels[:7] + 1) % 5  # a third of them wrong
    chosen = net.candidates[1:2]
    small = updp_tf.reestimate_norms(net.subnet(chosen), images, verbose=False)
    by_error, by_divergence = net.judge(unseen, labels, norms=images), net.judge(unseen, norms=images)
    assert by_error.loss(chosen) == pytest.approx(float((predict(small, unseen).argmax(-1) != labels).mean()))
    assert by_divergence.loss(chosen) == pytest.approx(kl(predict(model, unseen), predict(small, unseen)), rel=1e-3)
    assert (by_error.measure, by_divergence.measure, by_error.n_images) == ("error", "divergence", 20)
    plan = updp_tf.search(
        model,
        calibration=images,
        budget={"macs": 0.9},
        forms=FORMS,
        method=Genetic(trials=2, population=2),
        judge=by_divergence,
        verbose=False,
    )
    assert "plans measured on 20 images, divergence" in plan.notes[0]
    assert stock_only(net.subnet(plan))


def test_what_it_does_not_have_is_refused(trained) -> None:
    _, _, net, *_ = trained
    with pytest.raises(PlanError, match="The supernet of 'residual' has no 'add=conv9'; it has add=conv3, add=remove"):
        net.choose([Candidate(("add",), "conv9", 0.0, Cost())])
    with pytest.raises(CalibrationError, match="has 2 inputs; a supernet takes one"):
        Supernet(zoo.shared("two_inputs_outputs"), np.zeros((20, 17, 17, 3)), verbose=False)


OTHER_BACKEND = """
import keras, numpy as np
from tests import zoo
from tests.keras.test_merging import images_for
from updp_tf import Supernet
assert keras.backend.backend() == "{backend}"
model = zoo.build("residual")
images = images_for(model, 32)
net = Supernet(model, images, forms=["conv3", "remove"], verbose=False)
net.compile(keras.optimizers.Adam(1e-3), steps_per_execution=4)
losses = net.fit(images, epochs=4, batch_size=8, verbose=0).history["loss"]
assert losses[-1] < 0.8 * losses[0], losses
chosen = net.candidates[1:2]
net.choose(chosen)
a, b = net.predict(images, verbose=0), net.subnet(chosen).predict(images, verbose=0)
np.testing.assert_allclose(a, b, atol=1e-5)
net.choose(())
assert np.abs(net.predict(images, verbose=0) - a).max() > 1e-4
"""


@pytest.mark.slow
def test_it_trains_and_switches_on_jax() -> None:
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OTHER_BACKEND.format(backend="jax")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
