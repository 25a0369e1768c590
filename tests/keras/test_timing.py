"""Keys, sketches and budgets in measured time. Tables hold made-up numbers: what is tested is who reads them."""

from __future__ import annotations

import hashlib

import keras
import numpy as np
import pytest
from keras import layers

import updp_tf
from tests import zoo
from tests.keras.test_merging import images_for
from tflite_export import LatencyTable
from tflite_export.latency_rows import Conditions, LatencyRow
from updp_tf.blocks import find_blocks, network_cost, prepared_graph
from updp_tf.errors import BudgetError, MissingLatencyError, ModelError
from updp_tf.forms import all_forms
from updp_tf.structure import Cost
from updp_tf.timing import NOTHING, block_key, form_key, latency_items, network_key, rest_key, with_latencies

CONDITIONS = Conditions("measured", "a board", "Linux", "litert 2", "cpu", "int8", 1)


def table_of(times: dict[str, float], parts: dict[str, tuple[str, ...]]) -> LatencyTable:
    return LatencyTable(
        tuple(
            LatencyRow(
                key, parts.get(key, ()), us, us, us, False, 5, 1, int(10 * us), "", "", "adb", "", "", "", CONDITIONS
            )
            for key, us in times.items()
        )
    )


def made_up(model: keras.Model, spans: int = 1, **change: float) -> LatencyTable:
    """A table with a time of its own for every key: MACs do not predict it."""
    blocks = find_blocks(model)
    parts = {key: names for key, _, names in latency_items(blocks, forms=all_forms(), spans=spans, networks=0)}
    times = {key: 20.0 + int(hashlib.sha256(key.encode()).hexdigest()[:4], 16) / 1000 for key in parts}
    (whole,) = [key for key in parts if key.startswith("network:")]
    times[whole] = 25.0 + sum(times[part] for part in parts[whole])
    return table_of(times | change, parts)


def prune(model, **options):
    return updp_tf.prune(model, verbose=False, **options)


# Keys


def two_equal_blocks(prefix: str) -> keras.Model:
    image = keras.Input((12, 12, 6), name=f"{prefix}_image")
    x = image
    for number in range(2):
        y = layers.Conv2D(6, 3, padding="same", name=f"{prefix}_a{number}")(x)
        y = layers.ReLU(name=f"{prefix}_b{number}")(layers.BatchNormalization(name=f"{prefix}_n{number}")(y))
        x = layers.Add(name=f"{prefix}_c{number}")(
            [layers.Conv2D(6, 3, padding="same", name=f"{prefix}_d{number}")(y), x]
        )
    return zoo.randomise(keras.Model(image, layers.GlobalAveragePooling2D(name=f"{prefix}_p")(x), name=prefix))


def test_equal_blocks_share_a_key_in_one_network_and_across_networks():
    first, second = (find_blocks(two_equal_blocks(name)) for name in ("one", "other"))
    keys = [block_key(blocks.graph, block) for blocks in (first, second) for block in blocks]
    assert len(keys) == 4 and len(set(keys)) == 1
    assert network_key(first.graph) == network_key(second.graph)
    items = [key for key, _, _ in latency_items(first, forms=all_forms(), networks=0)]
    assert len(items) == len(set(items)) and sum(key.startswith("keep:") for key in items) == 1


@pytest.mark.parametrize("change", ["stride", "filters", "size", "activation", "dilation", "skip"])
def test_blocks_that_do_other_work_have_other_keys(change):
    def model(changed: bool) -> keras.Model:
        def value(name, plain, other):
            return other if changed and name == change else plain

        image = keras.Input((value("size", 12, 14),) * 2 + (6,))
        y = layers.Conv2D(value("filters", 8, 9), 3, strides=value("stride", 1, 2), padding="same", use_bias=False)(
            image
        )
        y = layers.Activation(value("activation", "relu", "gelu"))(layers.BatchNormalization()(y))
        y = layers.Conv2D(6, 3, dilation_rate=value("dilation", 1, 2), padding="same")(y)
        if change == "stride" and changed:
            return keras.Model(image, layers.Add()([y, layers.Conv2D(6, 1, strides=2)(image)]))
        skip = layers.Conv2D(6, 1)(image) if change == "skip" and changed else image
        return keras.Model(image, layers.Add()([y, skip]))

    keys = [[block_key(b.graph, block) for block in b] for b in (find_blocks(model(False)), find_blocks(model(True)))]
    assert len(keys[0]) == len(keys[1]) == 1
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    "name", ["residual", "bottlenecks", "inverted_residuals", "tokens", "squeeze_excite", "split_channels"]
)
def test_what_is_timed_is_what_would_be_merged(name):
    """A sketch has the shapes, MACs and parameters that its form says, and a kept block those of the block."""
    blocks = find_blocks(zoo.shared(name))
    items = {key: model for key, model, _ in latency_items(blocks, forms=all_forms(), networks=2)}
    checked = 0
    for block in blocks:
        kept = items[block_key(blocks.graph, block)]
        assert network_cost(prepared_graph(kept)).macs == block.cost.macs
        assert tuple(kept.output_shape[1:]) == tuple(block.exit_shape[1:])
        x = np.random.default_rng(0).normal(size=(1, *block.entry_shape[1:])).astype("float32")
        assert np.isfinite(kept(x)).all()
        for form in all_forms():
            mode = "kept" if block.skip_kind == "identity" else "folded"
            if form.refuses(block, skip=mode) is not None:
                continue
            key = form_key(blocks.graph, form, block, mode)
            if key == NOTHING:
                assert form.cost(block, skip=mode).macs == 0
                continue
            found = network_cost(prepared_graph(items[key]))
            assert (found.macs, found.params) == (form.cost(block, skip=mode).macs, form.cost(block, skip=mode).params)
            assert tuple(items[key].output_shape[1:]) == tuple(block.exit_shape[1:])
            checked += 1
    assert checked >= len(blocks)


def test_a_block_that_is_timed_computes_what_it_does_in_the_network():
    model = zoo.shared("residual")
    blocks = find_blocks(model)
    items = {key: one for key, one, _ in latency_items(blocks, forms=(), networks=0)}
    block = blocks[0]
    whole = keras.Model(
        model.input, [model.get_layer(block.entry.node).output, model.get_layer(block.exit.node).output]
    )
    entry, exit = whole(zoo.inputs_of(model), training=False)
    np.testing.assert_allclose(items[block_key(blocks.graph, block)](entry), exit, rtol=1e-5, atol=1e-5)


def test_random_networks_add_up_from_their_parts():
    blocks = find_blocks(zoo.shared("residual"))
    items = list(latency_items(blocks, forms=all_forms(), networks=3))
    keys = {key for key, _, _ in items}
    for _, model, parts in items[-3:]:
        assert parts[0] == rest_key(blocks.graph) and set(parts[1:]) <= keys
        assert network_cost(prepared_graph(model)).macs <= blocks.network_cost.macs
    assert len({key for key, _, _ in items[-3:]}) == 3


def test_a_model_of_any_size_has_no_latency():
    with pytest.raises(ModelError, match="takes images of any size .*build it again with a fixed input shape"):
        list(latency_items(find_blocks(zoo.shared("dynamic")), forms=all_forms()))


# Budgets in time


@pytest.mark.parametrize("name", ["residual", "inverted_residuals"])
@pytest.mark.parametrize("budget", [{"latency": 0.8}, {"bytes": 0.9, "latency": 0.9}, {"macs": 0.97}], ids=str)
def test_no_plan_holds_a_form_that_is_slower_than_its_block(name, budget):
    model, table = zoo.shared(name), made_up(zoo.shared(name))
    small = prune(model, calibration=images_for(model), budget=budget, latency=table)
    blocks = find_blocks(model)
    before, after = small.pruning.before, small.pruning.after
    spent_us = table.latency_us(rest_key(blocks.graph))
    edits = {edit.name: edit for edit in small.pruning.plan.edits}
    for block in blocks:
        kept_us = table.latency_us(block_key(blocks.graph, block))
        if block.name not in edits:
            spent_us += kept_us
            continue
        form = next(form for form in all_forms() if form.name == edits[block.name].form)
        key = form_key(blocks.graph, form, block, edits[block.name].options["skip"])
        form_us = 0.0 if key == NOTHING else table.latency_us(key)
        assert form_us <= kept_us
        spent_us += form_us
    assert after.latency_ns == pytest.approx(1000 * spent_us, abs=50)
    assert before.latency_ns == pytest.approx(1000 * table.latency_us(network_key(blocks.graph)), abs=50)
    for key, part in budget.items():
        unit = {"latency": "latency_ns", "bytes": "file_bytes", "macs": "macs"}[key]
        assert getattr(after, unit) <= part * getattr(before, unit)
    assert small.pruning.as_json()["after"]["latency_ns"] == after.latency_ns


def test_spans_are_timed_too():
    model = two_equal_blocks("spanned")
    table = made_up(model, spans=2)
    options = updp_tf.Options(spans=2)
    blocks, cost_of = with_latencies(find_blocks(model), table, forms=all_forms(), skip="auto", spans=2)
    (span,) = blocks.spans(max_length=2)
    assert span.cost.latency_ns == sum(block.cost.latency_ns for block in blocks) > 0
    assert cost_of(all_forms()[0], span, "kept").latency_ns > 0
    plan = updp_tf.search(
        model, calibration=images_for(model), budget={"latency": 0.7}, latency=table, options=options, verbose=False
    )
    assert plan.edits


def test_a_budget_below_the_fastest_network_says_what_the_fastest_is():
    model = zoo.shared("residual")
    with pytest.raises(
        BudgetError, match=r"latency_ms 0.001 cannot be met: the fastest plan takes [\d.]+ \([\d.]+ ms of"
    ):
        prune(model, calibration=images_for(model), budget={"latency_ms": 0.001}, latency=made_up(model))


def test_time_without_a_table_and_a_table_without_a_row(tmp_path):
    model = zoo.shared("residual")
    for budget in ({"latency": 0.5}, {"bytes_max": 1000}):
        with pytest.raises(BudgetError, match=f"in '{next(iter(budget))}' needs a latency table"):
            prune(model, calibration=images_for(model), budget=budget)
    table = made_up(model)
    gone = next(one.key for one in table.rows if one.key.startswith("conv3"))
    LatencyTable(tuple(one for one in table.rows if one.key != gone)).save(tmp_path / "t.csv")
    with pytest.raises(
        MissingLatencyError, match=rf"t.csv' \(int8 on a board.*lacks 1 of the .*conv3 for .*\({gone}\)"
    ):
        prune(model, calibration=images_for(model), budget={"latency": 0.8}, latency=tmp_path / "t.csv")


def test_the_accuracy_side_bisects_time_where_it_was_measured():
    model = zoo.shared("residual")
    small = prune(
        model,
        calibration=images_for(model, 40),
        max_drop={"score": 1.0},
        score_fn=lambda original, pruned: 0.0,
        latency=made_up(model),
    )
    by_time = small.pruning.after.latency_ns
    fastest = prune(model, calibration=images_for(model, 40), budget={"merged": 3}, latency=made_up(model))
    assert by_time <= fastest.pruning.after.latency_ns


def test_costs_without_a_table_say_nothing_of_time():
    assert "latency_ns" not in Cost(1, 2, 3).as_json()
