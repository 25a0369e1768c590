"""`narrow`: what is cut, what is kept, what is refused, and what images mend."""

from __future__ import annotations

import bisect
import itertools
import os

import keras
import numpy as np
import pytest

import tflite_export
import updp_tf
from tests import zoo
from tests.isomorphic.test_dependency import model_of
from updp_tf.blocks import network_cost, prepared_graph
from updp_tf.cost import Budget
from updp_tf.errors import BudgetError, CalibrationError, ModelError
from updp_tf.graph import build_model, read_graph
from updp_tf.isomorphic.gradients import gradient_statistics
from updp_tf.isomorphic.ranking import Ranking, Width
from updp_tf.isomorphic.ratios import PER_VISIT, VISITS, measured_ratio
from updp_tf.narrowing import narrow


def outputs(model, x) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(x, training=False))


def test_a_narrowed_model_trains_saves_loads_merges_and_narrows_again(tmp_path):
    model = zoo.build("inverted_residuals")
    x = zoo.inputs_of(model, n=8)
    small = narrow(model, ratio=0.3, round_to=2, streams=True)
    small.compile("sgd", "sparse_categorical_crossentropy")
    small.train_on_batch(x, np.zeros(8, dtype=int))
    small.save(tmp_path / "small.keras")
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(outputs(loaded, x), outputs(small, x), atol=1e-6)
    again = narrow(loaded, ratio=0.3, round_to=2)
    assert again.count_params() < loaded.count_params()
    merged = updp_tf.prune(again, calibration=x, budget={"merged": 1})
    assert merged.count_params() != again.count_params()


def test_a_budget_is_met_and_not_by_far():
    model = zoo.build("residual")
    small = narrow(model, budget={"macs": 0.6, "params": 0.8}, round_to=1)
    report = small.narrowing
    assert report.after == network_cost(read_graph(small))
    assert report.after.macs <= 0.6 * report.before.macs
    assert report.after.params <= 0.8 * report.before.params
    assert min(0.6 - report.after.macs / report.before.macs, 0.8 - report.after.params / report.before.params) < 0.06


class Scales:
    """Weighs networks instead of timing them: parameters as nanoseconds, in every visit on scales of another unit."""

    def __init__(self, original):
        self.original = original
        self.visits = []

    def __call__(self, models):
        self.visits.append(sorted(models))
        unit = 10 ** len(self.visits)
        weighed = {"original": self.original, **models}
        return {key: (unit * model.count_params(), model.count_params()) for key, model in weighed.items()}


def test_the_smallest_ratio_within_a_measured_budget_is_found_in_few_visits():
    graph = prepared_graph(zoo.build("residual"))
    ranking = Ranking(Width(round_to=1), None)
    ranked = ranking.ranked(ranking.cuttable(graph))
    scales = Scales(build_model(graph))
    ratio, before, after = measured_ratio(ranked, Budget.parse({"latency": 0.7}), scales, graph)
    steps = (PER_VISIT + 1) ** VISITS
    bound = 0.7 * network_cost(graph).params
    least = bisect.bisect_left(
        range(steps), True, key=lambda number: network_cost(ranked.outline(number / steps)).params <= bound
    )
    assert ranked.cut(ratio) == ranked.cut(least / steps)
    assert after.latency_ns <= 0.7 * before.latency_ns
    timed = list(itertools.chain.from_iterable(scales.visits))
    assert len(scales.visits) <= VISITS
    assert len(timed) == len(set(timed)) <= PER_VISIT * VISITS + 2
    with pytest.raises(BudgetError, match=r"cannot come down to latency 0\.0001: with every group at its least it has"):
        measured_ratio(ranked, Budget.parse({"latency": 0.0001}), scales, graph)


@pytest.mark.slow
def test_a_budget_in_bytes_and_time_holds_for_the_file(tmp_path):
    model = zoo.build("plain")
    target = updp_tf.Target(precision="float32", min_seconds=0.05)
    budget = {"bytes": 0.75, "latency_ms": 1000.0}
    small = narrow(model, budget=budget, round_to=1, target=target, verbose=False)
    sizes = [
        tflite_export.export(one, tmp_path / f"{number}.tflite", quantize="float32").size_bytes
        for number, one in enumerate((model, small))
    ]
    assert sizes[1] <= 0.75 * sizes[0]
    assert (small.narrowing.before.file_bytes, small.narrowing.after.file_bytes) == tuple(sizes)
    assert 0 < small.narrowing.after.latency_ns < 10**9
    assert "measured: latency ns" in str(small.narrowing)


def test_steps_end_where_one_step_does():
    model = zoo.build("residual")
    once, thrice = (narrow(model, ratio=0.5, scope="local", round_to=1, streams=True, steps=n) for n in (1, 3))
    widths = [[group.after for group in one.narrowing.groups] for one in (once, thrice)]
    assert widths[0] == widths[1]
    assert (
        narrow(model, budget={"macs": 0.5}, round_to=1, steps=2).narrowing.after.macs
        <= 0.5 * network_cost(prepared_graph(model)).macs
    )


def test_streams_and_ignored_layers_are_left_whole_and_said_so():
    model = zoo.build("inverted_residuals")
    small = narrow(model, ratio=0.5, round_to=1, ignore=["conv2d"])
    rules = {refusal.site: refusal.rule for refusal in small.narrowing.kept}
    assert rules["conv2d"] == "ignore"
    assert "stream" in rules.values()
    assert small.get_layer("conv2d").filters == model.get_layer("conv2d").filters
    assert "stream" in str(small.narrowing)


def test_channels_are_ranked_by_the_hessian_where_there_are_images():
    model = zoo.build("residual")
    x = zoo.inputs_of(model, n=24)
    usual, hessian, l2 = (
        narrow(model, ratio=0.4, round_to=1, calibration=x, refit=False, verbose=False, **options)
        for options in ({}, {"importance": "hessian"}, {"importance": "l2"})
    )
    assert usual.narrowing.importance == "hessian"
    for have, want in zip(usual.get_weights(), hessian.get_weights(), strict=True):
        np.testing.assert_array_equal(have, want)
    assert any(
        (a.shape != b.shape) or (a != b).any() for a, b in zip(usual.get_weights(), l2.get_weights(), strict=True)
    )
    assert narrow(model, ratio=0.4, round_to=1, verbose=False).narrowing.importance == "l2"
    twice = keras.Model(model.inputs, [model.outputs[0], keras.layers.Dense(3)(model.outputs[0])])
    images = {"calibration": x, "refit": False, "verbose": False}
    assert narrow(twice, ratio=0.4, round_to=1, **images).narrowing.importance == "l2"


def test_scopes_and_importances_choose_differently():
    model = zoo.build("bottlenecks")
    x = zoo.inputs_of(model, n=4)
    kinds = [("isomorphic", "l2"), ("global", "l1"), ("local", "random"), ("isomorphic", "activation")]
    for scope, importance in kinds:
        images = x if importance == "activation" else None
        report = narrow(
            model, ratio=0.4, scope=scope, importance=importance, round_to=1, streams=True, calibration=images
        ).narrowing
        assert report.after.params < 0.75 * report.before.params


def test_norms_and_closing_layers_are_mended_with_images():
    """Mended, the narrowed network is nearer to the original, on images that mended nothing."""
    model = zoo.build("residual")
    model.layers[-1].activation = keras.activations.linear
    rng = np.random.default_rng(0)
    shape = tuple(model.inputs[0].shape[1:])
    images, unseen = (rng.normal(size=(n, *shape)).astype("float32") for n in (160, 64))
    model = updp_tf.reestimate_norms(model, images)  # random statistics are none that images have
    wanted = outputs(model, unseen)

    def error(small) -> float:
        return float(np.square(outputs(small, unseen) - wanted).mean())

    ways = {"none": {}, "norms": {"calibration": images, "refit": False}, "refit": {"calibration": images}}
    cut = {"ratio": 0.3, "round_to": 1, "importance": "l2"}  # `hessian` finds channels that nothing depends on
    errors = {way: error(narrow(model, **cut, **options)) for way, options in ways.items()}
    assert errors["refit"] < 0.7 * errors["norms"]
    assert errors["refit"] < 0.5 * errors["none"]


def test_single_images_are_copied_where_onednn_would_write_past_its_memory(monkeypatch):
    """Without the copies this very call ends in a segmentation fault, on two threads or more."""
    model = zoo.build("residual")  # its projections are strided 1x1 convolutions of 6 and 8 channels
    sizes = []
    train_on_batch = keras.Model.train_on_batch

    def spy(self, x, *args, **kwargs):
        sizes.append(len(x))
        return train_on_batch(self, x, *args, **kwargs)

    monkeypatch.setattr(keras.Model, "train_on_batch", spy)
    narrow(model, ratio=0.4, round_to=1, calibration=zoo.inputs_of(model, n=5), refit=False, verbose=False)
    assert sizes == [os.cpu_count()] * 5
    sizes.clear()
    model = zoo.build("squeeze_excite")  # has none
    graph, x = read_graph(model), zoo.inputs_of(model, n=3)
    single = gradient_statistics(graph, "hessian", x, None, None, seed=0)
    monkeypatch.setattr("updp_tf.isomorphic.gradients._least_batch", lambda model: 4)
    told = []
    copied = gradient_statistics(graph, "hessian", x, None, None, seed=0, progress=lambda *one: told.append(one))
    assert sizes == [1] * 3 + [4] * 3
    assert told == [(number, 3, "gradients") for number in (1, 2, 3)]
    for key, by_index in single.items():
        for index, squares in by_index.items():
            np.testing.assert_allclose(copied[key][index], squares, rtol=1e-3, atol=1e-4 * squares.max())


def test_gradients_are_those_of_tensorflow():
    tf = pytest.importorskip("tensorflow")
    model = zoo.build("squeeze_excite")
    x = zoo.inputs_of(model, n=6)
    y = np.arange(6) % model.output_shape[-1]
    graph = read_graph(model)
    found = gradient_statistics(graph, "taylor", x, y, "sparse_categorical_crossentropy", seed=0)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, model(x, training=False)))
    wanted = tape.gradient(loss, [one.value for one in model.trainable_variables])
    by_path = {one.path: g for one, g in zip(model.trainable_variables, wanted, strict=True)}
    n = 0
    for node in graph:
        for index, gradient in found.get(id(node.layer), {}).items():
            want = by_path[node.layer.variables[index].path].numpy()
            np.testing.assert_allclose(gradient, want, atol=1e-4 * max(np.abs(want).max(), 1e-3))
            n += 1
    assert n == len(wanted)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, BudgetError, "Give either `ratio`"),
        ({"ratio": 0.5, "budget": {"macs": 0.5}}, BudgetError, "Give either `ratio`"),
        ({"ratio": 1.0}, BudgetError, "above 0 and below 1. Received: 1.0"),
        ({"ratio": 0}, BudgetError, "above 0 and below 1"),
        ({"ratio": 0.5, "scope": "everything"}, BudgetError, "`scope` is one of isomorphic, global, local"),
        ({"ratio": 0.5, "importance": "l3"}, BudgetError, "`importance` is one of"),
        ({"ratio": 0.5, "round_to": 0}, BudgetError, "`round_to` is a whole number"),
        ({"budget": {"merged": 2}}, BudgetError, "merges no blocks"),
        ({"budget": {"latency": 0.5}}, BudgetError, r"'latency' is measured: say on what, with target=updp_tf.Target"),
        ({"budget": {"macs": 0.0001}}, BudgetError, "cannot come down to macs 0.0001"),
        ({"ratio": 0.5, "ignore": ["nothing"]}, ModelError, "no layer named 'nothing'"),
        ({"ratio": 0.5, "importance": "taylor"}, CalibrationError, "needs calibration images"),
        ({"ratio": 0.5, "importance": "activation"}, CalibrationError, "needs calibration images"),
    ],
)
def test_bad_calls_are_refused_in_one_sentence(options, error, message):
    with pytest.raises(error, match=message):
        narrow(zoo.shared("residual"), **options)


def test_gradients_that_are_nan_name_the_layer():
    model = model_of("plain")
    layer = next(one for one in model.layers if isinstance(one, keras.layers.Conv2D))
    layer.kernel.assign(np.full(layer.kernel.shape, np.nan))
    x = zoo.inputs_of(model)
    with pytest.raises(ModelError, match="NaN or infinite"):
        gradient_statistics(read_graph(model), "taylor", x, np.zeros((3, 5)), "mean_squared_error", seed=0)
    with pytest.raises(ModelError, match="'conv2d' is NaN or infinite"):
        narrow(model, ratio=0.5)


def test_a_model_without_channels_to_cut_says_why():
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(3, name="dense")(inputs))
    with pytest.raises(ModelError, match="no channels that can be cut: dense: group: 'dense' is an output"):
        narrow(model, ratio=0.5)
