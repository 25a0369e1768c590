"""Depth and width under one budget: what is merged, what is cut, what is measured, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import keras
import numpy as np
import pytest
from keras import layers

import tflite_export
import updp_tf
from tests import zoo
from tests.isomorphic.test_narrowing import outputs
from tests.keras.test_merging import images_for
from updp_tf.blocks import find_blocks_in, network_cost, prepared_graph
from updp_tf.errors import BudgetError, ModelError, TrainingError
from updp_tf.graph import build_model
from updp_tf.isomorphic.ranking import Ranking, Width
from updp_tf.narrowing import narrow, narrow_graph
from updp_tf.reporting import PruningReport
from updp_tf.training import Training

pytestmark = pytest.mark.filterwarnings("ignore::updp_tf.scoring.CalibrationWarning")

FINE = Width(round_to=1)


def model_and_images(name: str = "residual", n: int = 120):
    """Norms with the statistics of the images: random ones belong to no images."""
    model = zoo.build(name)
    images = images_for(model, n)
    return updp_tf.reestimate_norms(model, images, verbose=False), images


def prune(model, **options):
    return updp_tf.prune(model, verbose=False, **options)


@pytest.fixture(scope="module")
def residual():
    return model_and_images()


@pytest.fixture(scope="module")
def both(residual):
    model, images = residual
    return prune(model, calibration=images, budget={"macs": 0.5}, width=FINE)


def test_the_best_of_several_splits_is_taken_and_all_are_told(residual, both):
    model, _ = residual
    report = both.pruning
    assert report.after == network_cost(prepared_graph(both))
    assert report.after.macs <= 0.5 * report.before.macs
    losses = [float(note.rsplit(" ", 1)[1]) for note in report.notes if "loss" in note]
    assert report.notes[0].startswith("taken: ")
    assert len(losses) >= 3
    assert losses[0] == min(losses)
    merged = {int(note.split()[1]) for note in report.notes}
    assert 0 in merged and len(merged) > 1, "neither width alone nor depth was tried"


def test_the_result_saves_loads_and_its_report_is_read_back(both, residual, tmp_path):
    _, images = residual
    both.save(tmp_path / "both.keras")
    loaded = keras.saving.load_model(tmp_path / "both.keras")
    np.testing.assert_allclose(outputs(loaded, images[:4]), outputs(both, images[:4]), atol=1e-6)
    again = PruningReport.from_json(both.pruning.to_json())
    assert again.as_json() == json.loads(json.dumps(both.pruning.as_json()))


def test_depth_alone_is_among_the_splits(residual, both):
    model, images = residual
    alone = prune(model, calibration=images, budget={"macs": 0.5}).pruning
    assert [note for note in both.pruning.notes if f"{len(alone.blocks)} blocks merged and 0 %" in note]


def test_a_number_of_blocks_says_what_depth_gives(residual):
    model, images = residual
    small = prune(model, calibration=images, budget={"merged": 1, "macs": 0.6}, width=FINE)
    assert len(small.pruning.blocks) == 1
    assert small.pruning.narrowing.after.macs <= 0.6 * small.pruning.before.macs
    assert len(small.pruning.notes) == 1


def test_without_images_half_of_the_way_is_depth():
    model = zoo.build("residual")
    small = prune(model, budget={"macs": 0.4}, width=FINE)
    report = small.pruning
    assert report.after.macs <= 0.4 * report.before.macs
    assert report.blocks and report.narrowing is not None
    assert "loss" not in " ".join(report.notes)


@pytest.mark.slow
def test_a_budget_in_time_and_bytes_is_met_by_files_that_were_timed(residual, tmp_path):
    model, images = residual
    target = updp_tf.Target(precision="float32", min_seconds=0.05)
    table = updp_tf.measure_latency(model, forms=["conv3"], networks=0, max_seconds=20, verbose=False)
    budget = {"bytes": 0.6, "latency_ms": 1000.0}
    with pytest.raises(BudgetError, match="in int8 with 1 threads; the latency table holds times in float32"):
        prune(model, calibration=images, budget=budget, latency=table, target=updp_tf.Target(), width=FINE)
    small = prune(model, calibration=images, budget=budget, latency=table, target=target, forms=["conv3"], width=FINE)
    report = small.pruning
    sizes = [
        tflite_export.export(one, tmp_path / f"{number}.tflite", quantize="float32").size_bytes
        for number, one in enumerate((model, small))
    ]
    assert sizes[1] <= 0.6 * sizes[0]
    assert (report.before.file_bytes, report.after.file_bytes) == tuple(sizes)
    assert report.before.latency_ns > 0 and report.after.latency_ns > 0
    assert all("of the time" in note for note in report.notes)
    merged = {int(note.split()[1]) for note in report.notes}
    assert 0 in merged and len(merged) > 1, "neither width alone nor depth was tried"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inverted_residuals", "vgg"])
def test_streams_and_chains_may_be_cut_behind_merged_blocks(name):
    model, images = model_and_images(name, 40)
    small = prune(model, calibration=images, budget={"macs": 0.5, "merged": 1}, width=Width(round_to=1, streams=True))
    assert small.pruning.after.macs <= 0.5 * small.pruning.before.macs


def test_a_narrowed_network_is_refitted_to_the_original_not_to_the_merged_one(residual):
    """What the last kept block writes is nearer to the original's; tensors of kept blocks have their old names."""
    model, images = residual
    graph = prepared_graph(model)
    late = [block.name for block in updp_tf.find_blocks(model)][2:]
    merged = prune(model, calibration=images, budget={"merged": 2}, keep=late, options=updp_tf.Options(refit=False))
    cut = prepared_graph(merged)
    last = [block.exit for block in find_blocks_in(cut) if block.exit.node in graph.by_name][-1]

    def written(one) -> np.ndarray:
        return outputs(build_model(replace(one, outputs=last)), images)

    errors = {}
    for way, teacher in (("original", graph), ("merged", None)):
        narrowed, report = narrow_graph(cut, 0.4, Ranking(FINE, images), teacher=teacher)
        assert report.refitted
        errors[way] = np.square(written(narrowed) - written(graph)).mean()
    assert errors["original"] < 0.95 * errors["merged"]


def two_scopes() -> keras.Model:
    """One group of channels that costs MACs, and one that costs parameters."""
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(24, 3, padding="same", activation="relu", name="dear")(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.Conv2D(4, 3, padding="same", name="read")(x)
    x = layers.Dense(24, activation="relu", name="stored")(layers.Flatten()(x))
    return zoo.randomise(keras.Model(inputs, layers.Dense(5)(x)))


def test_channels_go_where_they_save_most_for_their_score():
    def left(**options) -> dict[str, float]:
        groups = narrow(two_scopes(), round_to=1, ignore=["read"], verbose=False, **options).narrowing.groups
        return {group.name: group.after / group.before for group in groups}

    even = left(budget={"macs": 0.6})
    assert abs(even["dear"] - even["stored"]) < 0.1
    by_macs = left(budget={"macs": 0.6}, allocation="score")
    assert by_macs["dear"] < by_macs["stored"] == 1.0
    by_params = left(budget={"params": 0.6}, allocation="score")
    assert by_params["stored"] < by_params["dear"] == 1.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": {"merged": 1}}, BudgetError, "limits a cost"),
        ({"budget": {"macs": 1.0}}, BudgetError, "meets the budget as it is"),
        ({"budget": {"macs": 0.001}}, BudgetError, "Neither merged blocks nor narrower layers nor both"),
        ({"max_drop": {"agreement": 0.1}}, BudgetError, "give a `budget`"),
        ({"budget": {"macs": 0.5}, "method": "exact"}, BudgetError, "by the `additive` method"),
        ({"budget": {"latency": 0.5}}, BudgetError, "'latency' is measured; say on what, with target=updp_tf.Target"),
        ({"budget": {"bytes": 0.5}, "target": updp_tf.Target()}, BudgetError, "'bytes' needs a latency table"),
        ({"budget": {"macs": 0.5}, "target": updp_tf.Target()}, BudgetError, "`target` is for a budget in time"),
        ({"budget": {"macs": 0.5}, "options": updp_tf.Options(reconstruct_steps=5)}, BudgetError, "reconstruct_steps"),
        ({"budget": {"macs": 0.5}, "options": updp_tf.Options(rejoin=True)}, BudgetError, "leave `rejoin` as it is"),
        (
            {"budget": {"macs": 0.5}, "train": np.zeros((4, 18, 18, 3)), "training": Training(mode="whole")},
            TrainingError,
            "mode='direct', not 'whole'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(residual, options, error, message):
    model, images = residual
    with pytest.raises(error, match=message):
        prune(model, calibration=images, width=True, **options)


def test_a_width_is_checked_when_it_is_made():
    with pytest.raises(BudgetError, match="`allocation` is one of ratio, score"):
        Width(allocation="even")
    with pytest.raises(BudgetError, match="every scope gives the same part"):
        narrow(zoo.shared("residual"), ratio=0.5, allocation="score")
    with pytest.raises(ModelError, match="no channels that can be cut"):
        prune(
            zoo.shared("residual"),
            budget={"macs": 0.5},
            width=Width(ignore=[n.name for n in zoo.shared("residual").layers]),
        )
