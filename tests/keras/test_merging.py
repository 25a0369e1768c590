"""Forms in the place of blocks: what a merged model computes, and that the original stays as it was."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from tests import zoo
from tests.keras.test_graph import assert_same_facts, facts
from tests.linear_blocks import output_of
from tests.strategies import random_map
from updp_tf import merging
from updp_tf.blocks import Blocks, find_blocks, read_stages
from updp_tf.errors import CalibrationError, MergeError
from updp_tf.forms import Fitted, all_forms, fold_skip, form_by_name
from updp_tf.graph import run_nodes
from updp_tf.memory import Memory
from updp_tf.merging import Choice, Merged, merge_fitted, merge_in_sequence
from updp_tf.scoring import score
from updp_tf.starts import identity_start
from updp_tf.structure import Block, Ref, as_images
from updp_tf.walking import Walk, units

NETWORK = 1e-4  # relative, METHOD section 3
BLOCK = 1e-5


def relative_error(have: np.ndarray, want: np.ndarray) -> float:
    assert have.shape == want.shape
    return float(np.abs(have - want).max() / np.abs(want).max())


def images_for(model: keras.Model, n: int = 24, seed: int = 3) -> np.ndarray:
    return zoo.inputs_of(model, n=n, seed=seed)


def random_fit(block: Block, rng: np.random.Generator, form: str = "conv3", *, keeps_skip: bool = True) -> Fitted:
    """Maps that belong to no fit, small enough to leave the network alive."""
    if form == "remove":
        return Fitted((), True)
    window = form_by_name(form).window(block)
    one = random_map(rng, window.kernel_size, block.c_in, block.c_out)
    one = replace(one, kernel=0.2 * one.kernel, strides=window.strides, padding=window.padding)
    if not keeps_skip and block.skip is not None:
        return Fitted((fold_skip(one, block.skip),), False)
    return Fitted((one,), keeps_skip and block.skip is not None)


def reference(blocks: Blocks, fitted: Mapping[str, Fitted], inputs) -> list[np.ndarray]:
    """Outputs of the original, run call by call, with what NumPy makes of the fitted maps in the place of blocks."""
    values: dict = {}
    for ref, array in zip(blocks.graph.input_refs, keras.tree.flatten(inputs), strict=True):
        values[ref] = keras.ops.convert_to_tensor(array)
    block_by_node = {name: blocks[one] for one in fitted for name in blocks[one].nodes}
    for node in blocks.graph:
        block = block_by_node.get(node.name)
        if block is None:
            run_nodes([node], values)
        elif node.name == block.exit.node:
            x = np.asarray(keras.ops.convert_to_numpy(values[block.entry]), "float64")
            one = fitted[block.name]
            skip = block.skip if one.keeps_skip else None
            y = x
            if one.maps or block.skip_nodes:
                y = output_of(one.maps, skip, as_images(x))
                y = y.reshape(*y.shape[: x.ndim - 1], -1)  # tokens again, where they were
            values[block.exit] = keras.ops.convert_to_tensor(y.astype(str(blocks.graph.dtype(block.exit))))
    return [np.asarray(keras.ops.convert_to_numpy(values[ref]), "float32") for ref in blocks.graph.output_refs]


def choices_for(fitted: Mapping[str, Fitted], form: str = "conv3") -> tuple[Choice, ...]:
    return tuple(
        Choice(name, form if one.maps else "remove", "kept" if one.keeps_skip else "folded")
        for name, one in fitted.items()
    )


def stock_only(model: keras.Model) -> bool:
    return all(
        type(layer).__module__.startswith("keras.src.layers") and getattr(keras.layers, type(layer).__name__)
        for layer in model.layers
        if isinstance(layer, keras.Layer)
    ) and not any(isinstance(layer, keras.Model) for layer in model.layers)


# Maps that are given


ALWAYS = ("residual", "inverted_residuals", "bottlenecks", "preactivation", "two_branches", "tokens")
"""Networks that take every form in the default run: a kernel of another size is the same code for the others."""


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=() if name in ALWAYS or form in ("conv3", "remove") else pytest.mark.slow)
        for name in zoo.ZOO
        if name not in ("shared_classifier", "fixed_batch")
        for form in ("pointwise", "conv3", "conv5", "remove")
    ],
)
def test_every_block_of_the_zoo_becomes_what_it_is_told(name: str, form: str) -> None:
    model = zoo.shared(name)
    before = facts(model)
    blocks = find_blocks(model)
    rng = np.random.default_rng(0)
    fitted = {
        block.name: random_fit(block, rng, form)
        for block in blocks
        if form_by_name(form).refuses(block, skip="kept") is None
    }
    if not fitted:
        return

    merged = merge_fitted(blocks, choices_for(fitted, form), fitted, kind="fitted")

    inputs = zoo.inputs_of(model, n=2)
    for have, want in zip(zoo.outputs_of(merged.model, inputs), reference(blocks, fitted, inputs), strict=True):
        assert relative_error(have, want) <= (2e-2 if name == "half" else NETWORK)
    assert merged.error <= NETWORK or name == "half"
    assert_same_facts(before, facts(model))
    assert stock_only(merged.model) or name in ("operations", "nested_operations", "two_inputs_outputs")
    assert [one.name for one in merged.blocks] == [block.name for block in blocks if block.name in fitted]
    own = {id(weight) for weight in model.weights}
    assert not own & {id(weight) for weight in merged.model.weights}


@pytest.mark.parametrize("name", ["residual", "bottlenecks", "inverted_residuals", "parallel"])
def test_kept_and_folded_skips_agree(name: str) -> None:
    model = zoo.shared(name)
    blocks = find_blocks(model)
    both = []
    for keeps_skip in (True, False):
        rng = np.random.default_rng(0)
        fitted = {b.name: random_fit(b, rng, keeps_skip=keeps_skip) for b in blocks if b.skip is not None}
        both.append(merge_fitted(blocks, choices_for(fitted), fitted, kind="fitted").model)
    inputs = images_for(model, 2)
    (kept,), (folded,) = (zoo.outputs_of(one, inputs) for one in both)
    assert relative_error(folded, kept) <= NETWORK
    n_adds = [sum(isinstance(layer, layers.Add) for layer in one.layers) for one in both]
    assert n_adds == [sum(block.skip is not None for block in blocks), 0]
    # A kept projection stays; a folded one is gone.
    n_norms = [sum(isinstance(layer, layers.BatchNormalization) for layer in one.layers) for one in both]
    assert n_norms[0] - n_norms[1] == sum(
        blocks.graph.by_name[node].kind == "BatchNormalization" for block in blocks for node in block.skip_nodes
    )


def test_removing_leaves_the_skip_alone() -> None:
    model = zoo.shared("residual")
    blocks = find_blocks(model)
    fitted = {"add": Fitted((), True), "add_1": Fitted((), True)}
    small = merge_fitted(blocks, choices_for(fitted), fitted, kind="fitted").model
    gone = sum(model.get_layer(n).count_params() for b in ("add", "add_1") for n in blocks[b].body if n in names(model))
    assert small.count_params() == model.count_params() - gone
    assert not {*blocks["add"].body, *blocks["add_1"].body} & names(small)
    assert set(blocks["add_1"].skip_nodes) <= names(small)


def names(model: keras.Model) -> set[str]:
    return {layer.name for layer in model.layers}


def test_an_output_of_the_model_may_be_a_merged_block() -> None:
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((9, 9, 4))
    x = layers.Add(name="one")([inputs, zoo.conv_norm(layers.ReLU()(zoo.conv_norm(inputs, 4)), 4)])
    y = layers.Add(name="two")([x, zoo.conv_norm(layers.ReLU()(zoo.conv_norm(x, 4)), 4)])
    model = zoo.randomise(keras.Model(inputs, {"y": y, "x": x}))
    blocks = find_blocks(model)
    for fitted in (
        {"one": Fitted((), True)},
        {"one": Fitted((), True), "two": Fitted((), True)},
        {b.name: random_fit(b, np.random.default_rng(0)) for b in blocks},
    ):
        small = merge_fitted(blocks, choices_for(fitted), fitted, kind="fitted").model
        x = images_for(model, 2)
        assert list(small(x)) == ["y", "x"]
        for have, want in zip(zoo.outputs_of(small, x), reference(blocks, fitted, x), strict=True):
            assert relative_error(have, want) <= NETWORK


def test_a_merged_model_can_be_merged_again(tmp_path: Path) -> None:
    model = zoo.shared("residual")
    rng = np.random.default_rng(0)
    for names_now in (("add",), ("add", "add_2"), ("add_1", "add_3")):
        blocks = find_blocks(model)
        fitted = {name: random_fit(blocks[name], rng, keeps_skip=name != "add_1") for name in names_now}
        inputs = images_for(model, 2)
        want = reference(blocks, fitted, inputs)
        model = merge_fitted(blocks, choices_for(fitted), fitted, kind="fitted").model
        assert relative_error(zoo.outputs_of(model, inputs)[0], want[0]) <= NETWORK
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(zoo.outputs_of(loaded, inputs)[0], zoo.outputs_of(model, inputs)[0])


# Exact or not


def _linear_model(*, bias: bool, kernel_size: int = 3, activation: bool = False) -> keras.Model:
    """A residual body without activations: 1x1, then k x k 'same', each with a norm."""
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((9, 10, 4))
    x = layers.ReLU()(zoo.conv_norm(inputs, 4))
    y = layers.Conv2D(7, 1, use_bias=bias)(x)
    y = layers.ReLU()(y) if activation else y
    y = zoo.conv_norm(y, 4, kernel_size)
    x = layers.ReLU()(layers.Add(name="linear")([x, y]))
    return zoo.randomise(keras.Model(inputs, zoo.head(x)))


def _merge_linear(model: keras.Model, form: str, skip: str) -> Merged:
    blocks = find_blocks(model)
    block = blocks["linear"]
    maps = identity_start(read_stages(blocks.graph, block)).maps
    fitted = {"linear": form_by_name(form).from_maps(block, maps, skip=skip)}
    return merge_fitted(blocks, [Choice("linear", form, skip)], fitted, kind="linearized")


@pytest.mark.parametrize("skip", ["kept", "folded"])
def test_a_linear_block_merges_exactly(skip: str) -> None:
    model = _linear_model(bias=False)
    merged = _merge_linear(model, "conv3", skip)
    assert [one.kind for one in merged.blocks] == ["exact"]
    x = images_for(model)
    (have,), (want,) = zoo.outputs_of(merged.model, x), zoo.outputs_of(model, x)
    assert relative_error(have, want) <= BLOCK


def test_a_bias_in_front_of_padding_is_not_called_exact() -> None:
    model = _linear_model(bias=True)
    merged = _merge_linear(model, "conv3", "kept")
    assert [one.kind for one in merged.blocks] == ["linearized"]
    x = images_for(model)
    assert relative_error(zoo.outputs_of(merged.model, x)[0], zoo.outputs_of(model, x)[0]) > 1e-4


def test_an_activation_is_not_called_exact() -> None:
    merged = _merge_linear(_linear_model(bias=False, activation=True), "conv3", "kept")
    assert [one.kind for one in merged.blocks] == ["linearized"]


def test_a_cropped_kernel_is_not_called_exact() -> None:
    model = _linear_model(bias=False, kernel_size=5)
    merged = _merge_linear(model, "conv3", "kept")
    assert merged.fitted["linear"].dropped > 0
    assert [one.kind for one in merged.blocks] == ["linearized"]
    assert [one.kind for one in _merge_linear(model, "conv5", "kept").blocks] == ["exact"]


def test_an_exact_border_makes_a_biased_block_exact() -> None:
    model = _linear_model(bias=True)
    blocks = find_blocks(model)
    block = blocks["linear"]
    maps = identity_start(read_stages(blocks.graph, block)).maps
    x = images_for(model)
    for skip in ("kept", "folded"):
        fitted = form_by_name("conv3").from_maps(block, maps, skip=skip, exact_border=True)
        merged = merge_fitted(blocks, [Choice("linear", "conv3", skip)], {"linear": fitted}, kind="linearized")
        assert relative_error(zoo.outputs_of(merged.model, x)[0], zoo.outputs_of(model, x)[0]) <= BLOCK
        assert stock_only(merged.model)
        assert [one.kind for one in merged.blocks] == ["exact"]


def test_layers_that_do_not_compute_their_map_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    original = merging.layer_specs

    def wrong(map, name, **options):
        for spec in original(map, name, **options):
            yield replace(spec, weights=tuple(1.01 * weight for weight in spec.weights))

    monkeypatch.setattr(merging, "layer_specs", wrong)
    with pytest.raises(MergeError, match="The merged 'linear' differs from its fitted map by 8.*more than 1e-05"):
        _merge_linear(_linear_model(bias=False), "conv3", "kept")


def test_weights_that_cancel_may_round_as_float32_does() -> None:
    """As fits to few images have them: the output is a thousandth of the products that it is the sum of."""
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((9, 10, 4))
    x = layers.Conv2D(4, 1, name="dependent")(inputs)
    x = layers.Add(name="cancelling")([x, zoo.conv_norm(layers.ReLU()(zoo.conv_norm(x, 4)), 4)])
    model = zoo.randomise(keras.Model(inputs, zoo.head(layers.ReLU()(x))))
    weights = model.get_layer("dependent").get_weights()
    for one in weights:
        one[..., 2] = one[..., 0] + one[..., 1]
    model.get_layer("dependent").set_weights(weights)
    blocks = find_blocks(model)
    block = blocks["cancelling"]
    fitted = random_fit(block, np.random.default_rng(0), "pointwise")
    (one,) = fitted.maps
    cancels = np.zeros(one.kernel.shape)
    cancels[:, :, :3] = 1e3 * np.array([1.0, 1.0, -1.0])[:, None]
    fitted = replace(fitted, maps=(replace(one, kernel=one.kernel + cancels),))
    choice = Choice("cancelling", "pointwise", "kept")
    merged = merge_in_sequence(blocks, [choice], images_for(model), fitted={"cancelling": fitted})
    assert merged.error <= NETWORK


def test_a_network_that_writes_nan_is_an_error() -> None:
    model = _linear_model(bias=False)
    model.layers[-1].bias.assign(np.full(5, np.nan))
    with pytest.raises(MergeError, match="writes NaN or infinite values on probe inputs"):
        _merge_linear(model, "conv3", "kept")


# In sequence


def in_sequence(model: keras.Model, chosen: Mapping[str, str], images, **options) -> Merged:
    blocks = find_blocks(model)
    return merge_in_sequence(blocks, [Choice(name, form, "kept") for name, form in chosen.items()], images, **options)


def inputs_of_norms(model: keras.Model, images: np.ndarray) -> dict[str, np.ndarray]:
    """What each BatchNormalization reads, over all images at once, float64."""
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    read = keras.Model(model.input, [norm.input for norm in norms])
    return {norm.name: y.astype("float64") for norm, y in zip(norms, zoo.outputs_of(read, images), strict=True)}


@pytest.mark.parametrize("name", ["residual", "inverted_residuals", "bottlenecks", "mobilenet_v1"])
def test_norms_behind_an_edit_have_the_statistics_of_the_images(name: str) -> None:
    model = zoo.build(name)
    before = facts(model)
    images = images_for(model)
    block = find_blocks(model)[1]
    chosen = block.name
    merged = in_sequence(model, {chosen: "conv3"}, images)
    small = merged.model

    assert_same_facts(before, facts(model))
    assert stock_only(small)
    assert [(one.name, one.form, one.kind) for one in merged.blocks] == [(chosen, "conv3", "fitted")]
    order = [layer.name for layer in small.layers]
    edit = order.index(f"{chosen}_merged")
    n = {True: 0, False: 0}
    for norm_name, x in inputs_of_norms(small, images).items():
        norm, old = small.get_layer(norm_name), model.get_layer(norm_name)
        # A kept projection belongs to the edit: the form was fitted next to it as it is.
        behind = order.index(norm_name) > edit and norm_name not in block.skip_nodes
        n[behind] += 1
        if behind:
            mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
            np.testing.assert_allclose(norm.moving_variance, variance, rtol=1e-4)
            np.testing.assert_allclose(norm.moving_mean, mean, atol=1e-4 * np.sqrt(variance).max())
            assert np.abs(norm.moving_mean - old.moving_mean).max() > 1e-3
        else:
            np.testing.assert_array_equal(norm.moving_mean, old.moving_mean)
            np.testing.assert_array_equal(norm.moving_variance, old.moving_variance)
        np.testing.assert_array_equal(norm.gamma, old.gamma)
    assert n[True] > 0 and n[False] > 0


def test_norms_stay_where_nothing_is_asked() -> None:
    model = zoo.shared("residual")
    small = in_sequence(model, {"add": "conv3"}, images_for(model), reestimate=False).model
    for layer in small.layers:
        if isinstance(layer, layers.BatchNormalization):
            np.testing.assert_array_equal(layer.moving_mean, model.get_layer(layer.name).moving_mean)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("edited", ["add", "add_1"])
def test_a_tower_without_an_edit_stays_as_it_is(edited: str, refit: bool) -> None:
    model = zoo.shared("two_branches")
    blocks = find_blocks(model)
    small = in_sequence(model, {edited: "pointwise"}, images_for(model), refit=refit).model
    other = next(block for block in blocks if block.name != edited)
    tower = [n for n in other.body if n in names(model) and model.get_layer(n).weights]
    assert len(tower) == 4
    for name in tower:
        for have, want in zip(small.get_layer(name).weights, model.get_layer(name).weights, strict=True):
            np.testing.assert_array_equal(have, want)


def test_the_fit_is_the_regression_of_the_teacher_on_the_students_input() -> None:
    """The second of two merged blocks: what NumPy makes of the student's entry and the teacher's exit."""
    model = zoo.build("residual")
    images = images_for(model, 3)  # few enough for all positions to be used
    ridge = 1e-3
    merged = in_sequence(model, {"add": "remove", "add_2": "conv3"}, images, ridge=ridge, reestimate=False)
    alone = in_sequence(
        model, {"add": "remove", "add_2": "conv3"}, images, ridge=ridge, reestimate=False, in_sequence=False
    )
    blocks = find_blocks(model)
    block = blocks["add_2"]
    entry = blocks.graph.by_name[block.entry.node].layer.name
    target = zoo.outputs_of(keras.Model(model.input, model.get_layer("add_2").output), images)[0].astype("float64")
    for one, source in ((merged, merged.model), (alone, model)):
        x = zoo.outputs_of(keras.Model(source.input, source.get_layer(entry).output), images)[0].astype("float64")
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        views = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
        patches = views.reshape(-1, 9 * 8)
        y = (target - x).reshape(-1, 8)
        a, b = patches - patches.mean(axis=0), y - y.mean(axis=0)
        strength = ridge * np.trace(a.T @ a) / len(a.T)
        kernel = np.linalg.solve(a.T @ a + strength * np.eye(len(a.T)), a.T @ b)
        (have,) = one.fitted["add_2"].maps
        np.testing.assert_allclose(have.kernel.reshape(-1, 8), kernel, atol=1e-5 * np.abs(kernel).max())
        bias = y.mean(axis=0) - patches.mean(axis=0) @ kernel
        np.testing.assert_allclose(have.bias, bias, atol=1e-5 * np.abs(bias).max())


def test_in_sequence_repairs_the_error_of_blocks_before() -> None:
    model = zoo.build("residual")
    images = images_for(model, 40)
    want = zoo.outputs_of(keras.Model(model.input, model.get_layer("add_2").output), images)[0]
    errors = []
    for in_sequence_ in (True, False):
        small = in_sequence(
            model, {"add": "remove", "add_2": "conv3"}, images, in_sequence=in_sequence_, reestimate=False
        ).model
        have = zoo.outputs_of(keras.Model(small.input, small.get_layer("add_2").output), images)[0]
        errors.append(float(np.square(have - want).sum() / np.square(want - want.mean(axis=(0, 1, 2))).sum()))
    assert errors[0] < 0.8 * errors[1]


def test_given_maps_are_put_in_as_they_are() -> None:
    model = zoo.shared("residual")
    blocks = find_blocks(model)
    fitted = {name: random_fit(blocks[name], np.random.default_rng(0)) for name in ("add", "add_2")}
    merged = merge_in_sequence(
        blocks, choices_for(fitted), images_for(model), fitted=fitted, reestimate=False, refit=False
    )
    x = images_for(model, 2, seed=9)
    assert relative_error(zoo.outputs_of(merged.model, x)[0], reference(blocks, fitted, x)[0]) <= NETWORK
    for name, one in fitted.items():
        assert merged.fitted[name].maps[0] is one.maps[0]


def weights_of(model: keras.Model) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(weight) for weight in model.weights]


@pytest.mark.parametrize("form", ["conv3", "separable3"])
def test_merging_twice_gives_equal_weights(form: str) -> None:
    model = zoo.shared("residual")
    images = images_for(model)
    first, second = (in_sequence(model, {"add": form, "add_2": form}, images, refit=True).model for _ in range(2))
    for a, b in zip(weights_of(first), weights_of(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["residual", "tap_inside", "inverted_residuals", "two_branches"])
def test_everything_on_disk_gives_the_same_result(name: str) -> None:
    model = zoo.shared(name)
    images = images_for(model)
    chosen = {block.name: "conv3" for block in find_blocks(model) if block.geometry.strides == (1, 1)}
    in_memory = in_sequence(model, chosen, images, refit=True)
    on_disk = in_sequence(model, chosen, (images[i : i + 5] for i in range(0, 24, 5)), refit=True, memory_bytes=0)
    # In memory, what norms write is held for what reads it next; on disk it is computed again, folded: other rounding.
    assert in_memory.refitted == on_disk.refitted
    new = images_for(model, 4, seed=9)
    assert relative_error(zoo.outputs_of(in_memory.model, new)[0], zoo.outputs_of(on_disk.model, new)[0]) <= 1e-4


def test_files_are_taken_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = zoo.shared("residual")
    most = 0

    def count(done: int, total: int, what: str) -> None:
        nonlocal most
        most = max(most, sum(1 for path in tmp_path.rglob("*.bin")))
        assert done <= total and what

    in_sequence(model, {"add_1": "conv3"}, iter([images_for(model)]), memory_bytes=0, progress=count)
    assert most > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="stop"):
        in_sequence(model, {"add_1": "conv3"}, iter([images_for(model)]), memory_bytes=0, progress=_stop)
    assert list(tmp_path.iterdir()) == []


def _stop(done: int, total: int, what: str) -> None:
    raise RuntimeError("stop")


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """NumPy's memory, traced: everything else of a batch is TensorFlow's and does not depend on it."""
    model = zoo.shared("residual")
    in_sequence(model, {"add": "conv3"}, images_for(model, 128))  # pay for what is made once

    def peak(n: int) -> int:
        stream = (images_for(model, 64, seed=seed) for seed in range(n // 64))
        tracemalloc.start()
        in_sequence(model, {"add": "conv3", "add_2": "conv3"}, stream, memory_bytes=0, refit=True)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    few, many = peak(256), peak(1024)
    # Held in memory, the 768 images more would be 3.0 MB as they are and 6.0 MB per tensor of the first stage.
    assert many - few < 1.0e6


# Refits


def test_a_refit_repairs_later_blocks_on_new_images() -> None:
    model = zoo.build("residual")
    images, unseen = images_for(model, 60), images_for(model, 20, seed=11)
    last = "re_lu_8"
    want = zoo.outputs_of(keras.Model(model.input, model.get_layer(last).output), unseen)[0]
    errors = {}
    for refit in (False, True):
        merged = in_sequence(model, {"add": "remove"}, images, refit=refit)
        have = zoo.outputs_of(keras.Model(merged.model.input, merged.model.get_layer(last).output), unseen)[0]
        errors[refit] = np.square(have - want).mean()
    assert merged.refitted and all(ridge > 0 for ridge in merged.refitted.values())
    kept = {name for block in find_blocks(model) if block.name != "add" for name in block.body}
    assert set(merged.refitted) <= kept
    assert errors[True] < 0.9 * errors[False]


def test_no_refit_where_nothing_is_wrong() -> None:
    """The edit changes nothing, so no later layer can gain on held-out images."""
    model = _two_blocks()
    blocks = find_blocks(model)
    maps = identity_start(read_stages(blocks.graph, blocks["linear"])).maps
    fitted = {"linear": form_by_name("conv3").from_maps(blocks["linear"], maps, skip="kept")}
    merged = merge_in_sequence(
        blocks, choices_for(fitted), images_for(model, 40), fitted=fitted, refit=True, reestimate=False
    )
    assert merged.refitted == {}
    x = images_for(model, 2)
    assert relative_error(zoo.outputs_of(merged.model, x)[0], zoo.outputs_of(model, x)[0]) <= NETWORK


def _two_blocks() -> keras.Model:
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((9, 10, 4))
    x = layers.ReLU()(zoo.conv_norm(inputs, 4))
    y = zoo.conv_norm(layers.Conv2D(7, 1, use_bias=False)(x), 4)
    x = layers.ReLU()(layers.Add(name="linear")([x, y]))
    return zoo.randomise(keras.Model(inputs, zoo.head(zoo.basic(x, 4))))


def test_too_few_images_are_not_refitted_to() -> None:
    model = zoo.shared("residual")
    assert in_sequence(model, {"add": "remove"}, images_for(model, 19), refit=True).refitted == {}


def test_a_shared_layer_is_not_refitted_and_stays_shared() -> None:
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((9, 10, 4))
    x = layers.ReLU()(zoo.conv_norm(inputs, 4))
    x = zoo.basic(x, 4)
    closing = layers.Conv2D(4, 3, padding="same", name="closing")
    for _ in range(2):
        x = layers.ReLU()(layers.Add()([x, closing(layers.ReLU()(zoo.conv_norm(x, 4)))]))
    model = zoo.randomise(keras.Model(inputs, zoo.head(x)))
    merged = in_sequence(model, {"add": "remove"}, images_for(model, 40), refit=True)
    assert not any("closing" in name for name in merged.refitted)
    gone = 2 * (9 * 4 * 4 + 4 * 4)
    assert merged.model.count_params() == model.count_params() - gone


def test_a_norm_that_is_called_twice_keeps_its_statistics() -> None:
    model = zoo.shared("shared_layer")
    small = in_sequence(model, {"add": "remove"}, images_for(model)).model
    shared = model.get_layer("batch_normalization_1")
    # Its other call is gone with the block; it still is not known to be alone.
    np.testing.assert_array_equal(small.get_layer("batch_normalization_1_call1").moving_mean, shared.moving_mean)


# Walks


def test_a_walk_gives_what_the_model_gives() -> None:
    for name in ("residual", "tap_inside", "doubly_nested", "two_branches", "half", "operations"):
        model = zoo.shared(name)
        blocks = find_blocks(model)
        images = images_for(model, 7)
        parts = units(blocks.graph, blocks)
        assert sorted(n for part in parts for n in part.nodes) == sorted(
            node.name for node in blocks.graph if not node.is_input
        )
        with Memory(0) as memory:
            walk = Walk(blocks.graph, images, memory, batch_size=3)
            tensors = walk.start()
            for index, part in enumerate(parts):
                nodes = [blocks.graph.by_name[n] for n in part.nodes]
                tensors |= walk.run(nodes, {ref: ref for ref in part.writes}, tensors)
                walk.release(parts[index + 1 :], tensors)
            have = [np.array(tensors[ref]) for ref in blocks.graph.output_refs]
            assert set(tensors) == {*blocks.graph.input_refs, *blocks.graph.output_refs}
        for one, want in zip(have, zoo.outputs_of(model, images), strict=True):
            assert relative_error(one, want) <= (1e-2 if name == "half" else NETWORK)


def test_images_of_any_size_can_be_walked() -> None:
    """A dynamic input, as uint8, a dataset or a list of batches."""
    model = zoo.shared("dynamic")
    graph = find_blocks(model).graph
    images = np.random.default_rng(0).integers(0, 255, (10, 12, 14, 3)).astype("uint8")
    for source in (images, [images[:6], images[6:]], iter([images])):
        with Memory(0) as memory:
            walk = Walk(graph, source, memory)
            np.testing.assert_array_equal(np.array(walk.images), images.astype("float32"))


def test_all_forms_can_be_merged_in_sequence() -> None:
    model = zoo.shared("residual")
    block = find_blocks(model)["add_2"]
    images = images_for(model, 30)
    for form in all_forms():
        if form.refuses(block, skip="kept") is None:
            merged = in_sequence(model, {"add_2": form.name}, images)
            (one,) = merged.blocks
            assert one.r2 is None or one.r2 <= 1.0
            assert one.macs_after == form.cost(block, skip="kept").macs
            assert stock_only(merged.model)


def test_r2_is_that_of_images_not_fitted_to() -> None:
    model = zoo.shared("residual")
    images = images_for(model, 40)
    merged = in_sequence(model, {"add_2": "conv3"}, images)
    blocks = find_blocks(model)
    block = blocks["add_2"]
    held_out = images[9::10]
    entry = blocks.graph.by_name[block.entry.node].layer.name
    x, y = (
        zoo.outputs_of(keras.Model(model.input, model.get_layer(name).output), held_out)[0].astype("float64")
        for name in (entry, "add_2")
    )
    have = output_of(merged.fitted["add_2"].maps, block.skip, x)
    direct = 1 - np.square(have - y).sum() / np.square(y - y.mean(axis=(0, 1, 2))).sum()
    assert merged.blocks[0].r2 == pytest.approx(direct, abs=0.02)  # a sample of the held-out positions


def test_new_layers_are_named_after_the_block() -> None:
    blocks = find_blocks(zoo.shared("residual"))
    fitted = {"add": random_fit(blocks["add"], np.random.default_rng(0))}
    edit = merging.build_edit(blocks.graph, blocks["add"], fitted["add"])
    assert [node.name for node in edit.nodes] == ["add_merged", "add"]
    assert edit.exit == Ref("add")
    edit = merging.build_edit(blocks.graph, blocks["add_1"], random_fit(blocks["add_1"], np.random.default_rng(0)))
    assert [node.name for node in edit.nodes][:2] == ["add_1_merged_pad", "add_1_merged"]


# Networks whose activations no fit can use


@pytest.mark.parametrize(
    ("gain", "told"),
    [(np.nan, "NaN or infinite values"), (1e38, "NaN or infinite values"), (1e17, r"values up to \d+e\+1[789]")],
    ids=["nan", "infinite", "huge"],
)
@pytest.mark.parametrize("how", ["merge", "score"])
def test_activations_that_are_no_numbers_are_told_with_the_layer(how, gain, told):
    """Ninety norms without gammas on variances of 1e-4 did this to an InceptionV3: a LinAlgError of SciPy's."""
    model = zoo.build("residual")
    blocks = find_blocks(model)
    wild = next(blocks.graph.by_name[name] for name in blocks[1].body if "conv" in name)
    kernel, *others = wild.layer.get_weights()
    wild.layer.set_weights([np.full_like(kernel, gain), *others])
    images = images_for(model)
    with pytest.raises(CalibrationError, match=f"^'{wild.name}' of '{model.name}' writes {told} on the calibration"):
        if how == "merge":
            merge_in_sequence(blocks, [Choice(block.name, "pointwise", "kept") for block in blocks], images)
        else:
            score(blocks, images)


def test_norms_without_gammas_keep_random_networks_finite():
    """What the tests call random weights, behind as many norms as an InceptionV3 has."""
    inputs = x = keras.Input((5, 5, 4))
    for _ in range(90):
        x = layers.ReLU()(layers.BatchNormalization(scale=False)(layers.Conv2D(4, 3, padding="same")(x)))
    model = zoo.randomise(keras.Model(inputs, x))
    assert np.abs(zoo.outputs_of(model, images_for(model))[0]).max() < 1e15
