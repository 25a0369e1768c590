"""Blocks are found by structure: which, where, and why not."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import keras
import numpy as np
import pytest
from keras import layers

from tests import zoo
from updp_tf import affine, rules
from updp_tf.affine import AffineConv
from updp_tf.blocks import (
    Blocks,
    cost_of,
    find_blocks,
    find_blocks_in,
    liveness,
    network_cost,
    prepared_graph,
    read_stages,
    require_blocks,
)
from updp_tf.errors import ModelError
from updp_tf.graph import build_model, run_nodes
from updp_tf.structure import Block, ModelGraph, Ref, Refusal, map_refs

FOUND = {
    # name of the model: blocks as (name, skip, kernel size, strides), refusals as {site: rule}
    "plain": ([("conv2d_1", "none", 5, 1)], {}),
    "sequential": ([("conv2d_1", "none", 5, 2)], {}),
    "nested": ([("inner_add", "identity", 5, 1)], {}),
    "doubly_nested": (
        [("backbone_middle_innermost_add", "identity", 5, 1), ("backbone_conv2d_4", "none", 3, 1)],
        {},
    ),
    "nested_twice": ([("inner_add", "identity", 5, 1), ("inner_add_call1", "identity", 5, 1)], {}),
    "nested_many_outputs": ([("inner_conv2d_1", "none", 1, 1)], {}),
    "nested_operations": ([("one_add", "identity", 3, 1), ("two_add", "identity", 3, 1)], {}),
    "shared_layer": ([("add", "identity", 3, 1), ("add_1", "identity", 3, 1)], {}),
    "shared_classifier": ([], {"conv2d_1": "linear", "conv2d_1_call1": "linear"}),
    "residual": (
        [
            ("add", "identity", 5, 1),
            ("add_1", "projection", 7, 2),
            ("add_2", "identity", 5, 1),
            ("add_3", "projection", 7, 2),
        ],
        {},
    ),
    "bottlenecks": (
        [("add", "projection", 3, 1), ("add_1", "identity", 3, 1), ("add_2", "projection", 5, 2)],
        {},
    ),
    "inverted_residuals": (
        [
            ("batch_normalization_2", "none", 3, 1),
            ("batch_normalization_5", "none", 3, 2),
            ("add", "identity", 3, 1),
            ("batch_normalization_11", "none", 3, 1),
        ],
        {},
    ),
    "mobilenet_v1": (
        [
            ("batch_normalization_2", "none", 3, 1),
            ("batch_normalization_4", "none", 3, 2),
            ("batch_normalization_6", "none", 3, 1),
        ],
        {},
    ),
    "vgg": ([("conv2d_1", "none", 5, 1), ("conv2d_3", "none", 5, 1)], {}),
    "separable": ([("add", "identity", 5, 1)], {}),
    "concatenation": ([("conv2d_2", "none", 3, 1), ("conv2d_4", "none", 3, 1)], {}),
    "two_inputs_outputs": ([("add_1", "identity", 5, 1)], {"add": "single_entry"}),
    "tap_inside": ([("add", "identity", 5, 1)], {"tapped_add": "single_exit", "shown_add": "single_exit"}),
    "operations": ([("add", "identity", 5, 1)], {}),
    "dropout_and_noise": ([("add", "identity", 5, 1)], {}),
    "squeeze_excite": (
        [("gated", "identity", 3, 1), ("add", "identity", 5, 1)],
        {},
    ),
    "layer_norm": ([("convnext", "identity", 7, 1), ("mlp", "identity", 1, 1)], {}),
    "dilated": ([("add", "identity", 9, 1)], {}),
    "grouped": ([("add", "identity", 3, 1)], {}),
    "preactivation": (
        [
            ("plain_add", "identity", 5, 1),
            ("projected_add", "projection", 5, 1),
            ("batch_normalization_5", "none", 5, 2),
        ],
        {"pooled_add": "linear_skip"},
    ),
    "parallel": (
        [("norm_on_skip", "projection", 3, 1), ("skip_first", "projection", 3, 1), ("passive", "identity", 3, 1)],
        {},
    ),
    "two_branches": ([("add_1", "identity", 5, 1), ("add", "identity", 5, 1)], {}),
    "broadcast_add": (
        [("batch_normalization_1", "none", 5, 1), ("conv2d_3", "none", 17, 1)],
        {"one_channel": "same_shape", "one_pixel": "same_shape"},
    ),
    "split_channels": ([("first_add", "identity", 5, 1), ("second_add", "identity", 5, 1)], {}),
    "tokens": ([("rank3", "identity", 1, 1), ("rank2", "identity", 1, 1)], {}),
    "training_flags": (
        [
            ("batch_add", "identity", 5, 1),
            ("frozen_add", "identity", 5, 1),
            ("frozen_add_call1", "identity", 5, 1),
        ],
        {},
    ),
    "dynamic": (
        [("add", "identity", 5, 1), ("add_1", "projection", None, None), ("add_2", "identity", 3, 1)],
        {},
    ),
    "half": ([("add", "identity", 5, 1), ("add_1", "identity", 3, 1)], {}),
    "fused_names": ([("conv_activation", "none", 5, 1)], {}),
    "whole_numbers": ([("add", "identity", 5, 1)], {}),
    "fixed_batch": ([("add", "identity", 5, 1)], {}),
}


def as_row(block: Block) -> tuple:
    geometry = block.geometry
    kernel, strides = (None, None) if geometry is None else (geometry.kernel_size[0], geometry.strides[0])
    return block.name, block.skip_kind, kernel, strides


def test_the_table_holds_the_whole_zoo() -> None:
    assert set(FOUND) == set(zoo.ZOO)


@pytest.mark.parametrize("name", FOUND)
def test_blocks_and_refusals(name: str) -> None:
    blocks = find_blocks(zoo.shared(name))
    wanted, refused = FOUND[name]
    # Parallel towers come in Keras' order, which is not the order they were written in.
    assert [as_row(block) for block in blocks] == wanted
    assert {refusal.site: refusal.rule for refusal in blocks.skipped} == refused
    assert len(blocks.skipped) == len(refused), "a refusal is told twice"


@pytest.mark.parametrize("name", FOUND)
def test_a_block_has_one_entry_and_one_exit(name: str) -> None:
    blocks = find_blocks(zoo.shared(name))
    graph = blocks.graph
    outputs = set(graph.output_refs)
    claimed: set[str] = set()
    for block in blocks:
        inside = set(block.nodes)
        assert not inside & claimed, "blocks overlap"
        claimed |= inside
        assert block.nodes == tuple(sorted(block.nodes, key=graph.position.__getitem__))
        assert block.name == block.nodes[-1] == block.exit.node
        assert block.entry.node not in inside
        assert set(block.body) | set(block.skip_nodes) | ({block.join} - {None}) == inside
        assert block.entry_shape == graph.shape(block.entry) and block.exit_shape == graph.shape(block.exit)
        for member in block.nodes:
            node = graph.by_name[member]
            assert {ref.node for ref in node.inputs} <= inside | {block.entry.node}
            if member != block.name:
                assert all(reader in inside for reader in graph.readers[Ref(member)])
                assert Ref(member) not in outputs, "a tap was swallowed"


@pytest.mark.parametrize("name", FOUND)
def test_a_blocks_stages_compute_the_block(name: str) -> None:
    """Linear maps, activations and skip as NumPy say what Keras says, borders included."""
    model = zoo.shared(name)
    blocks = find_blocks(model)
    values: dict = {}
    arrays = keras.tree.flatten(zoo.inputs_of(model, n=2))
    for ref, array in zip(blocks.graph.input_refs, arrays, strict=True):
        values[ref] = keras.ops.convert_to_tensor(array)
    run_nodes(blocks.graph, values)
    for block in blocks:
        if block.linear_refusal is not None:
            assert not block.linearizable and block.linear_refusal.site == block.name
            with pytest.raises(ModelError, match=f"'{block.name}' has no linear map"):
                read_stages(blocks.graph, block)
            continue
        x = np.asarray(keras.ops.convert_to_numpy(values[block.entry]), "float64")
        want = np.asarray(keras.ops.convert_to_numpy(values[block.exit]), "float64")
        y = x
        stages = read_stages(blocks.graph, block)
        for stage in stages:
            for one in stage.maps:
                y = affine.apply(one, y)
            y = y if stage.activation is None else stage.activation(y)
        if block.skip is not None:
            y = y + affine.apply(block.skip, x)
        tolerance = 5e-3 if name == "half" else 1e-5
        assert np.abs(y - want).max() <= tolerance * np.abs(want).max(), block.name
        assert stages[-1].activation is None or block.join is not None
        composed = affine.composed_geometry([one for stage in stages for one in stage.maps])
        assert block.geometry == composed
        if None not in block.entry_size:
            inner = affine.output_size(
                AffineConv(
                    np.zeros((*composed.kernel_size, 1, 1)), np.zeros(1), composed.strides, padding=composed.padding
                ),
                *block.entry_size,
            )
            assert inner == block.exit_size


def test_stages_know_what_the_norms_tell() -> None:
    model = zoo.shared("residual")
    blocks = find_blocks(model)
    first, last = read_stages(blocks.graph, blocks["add"])
    norm = model.get_layer("batch_normalization_1")
    mean, variance, gamma = (rules.as_array(v) for v in (norm.beta, norm.moving_variance, norm.gamma))
    np.testing.assert_allclose(first.mean, mean)
    np.testing.assert_allclose(first.std, np.abs(gamma) * np.sqrt(variance / (variance + 1e-3)))
    assert last.activation is None and last.mean is None
    # Fused activations without a norm know nothing.
    blocks = find_blocks(zoo.shared("vgg"))
    assert read_stages(blocks.graph, blocks[0])[0].mean is None


# Refusals


def _model(build, size: int = 9, channels: int = 4) -> Blocks:
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((size, size, channels))
    return find_blocks(keras.Model(inputs, build(inputs)))


def _conv(x, filters: int = 4, **options):
    return layers.Conv2D(filters, 3, padding="same", **options)(x)


def _nested(x):
    y = layers.Add(name="inside")([x, _conv(layers.ReLU()(_conv(x)))])
    return layers.Add(name="site")([x, _conv(layers.ReLU()(y))])


def _split(x):
    first, second = keras.ops.split(x, 2, axis=-1)
    return layers.Add(name="site")([first, _conv(second, 2)])


def _tapped(x):
    y = layers.ReLU(name="tap")(_conv(x))
    return [layers.Add(name="site")([x, _conv(y)]), y]


REFUSED = {
    "nested": (_nested, "nested", "'inside' inside it belongs to another block"),
    "two outputs": (_split, "single_entry", "its paths start at different outputs of 'split'"),
    "tap": (_tapped, "single_exit", "'tap' inside it is read outside, as an output of the model"),
    "skip": (
        lambda x: layers.Add(name="site")([layers.MaxPooling2D(3, 1, "same")(x), layers.ReLU()(_conv(x))]),
        "linear_skip",
        "neither of its two paths is an identity or a linear projection",
    ),
    "shape": (
        lambda x: layers.Add(name="site")([x, layers.GlobalAveragePooling2D(keepdims=True)(x)]),
        "same_shape",
        "it adds tensors of shapes 9x9x4 and 1x1x4",
    ),
}


@pytest.mark.parametrize(("build", "rule", "reason"), REFUSED.values(), ids=REFUSED)
def test_each_refusal_has_its_reason(build, rule: str, reason: str) -> None:
    blocks = _model(build)
    assert Refusal("site", rule, reason) in blocks.skipped
    assert "site" not in [block.name for block in blocks]


def test_two_inputs_are_no_entry() -> None:
    (refusal,) = find_blocks(zoo.shared("two_inputs_outputs")).skipped
    assert refusal.reason == "its two paths start at different inputs of the model"


def test_an_activation_on_the_skip_makes_it_no_skip() -> None:
    blocks = _model(lambda x: layers.Add(name="site")([layers.ReLU()(layers.Conv2D(4, 1)(x)), layers.ReLU()(_conv(x))]))
    assert [refusal.rule for refusal in blocks.skipped] == ["linear_skip"]


def test_a_padded_1x1_is_no_projection() -> None:
    def build(x):
        y = layers.ReLU()(layers.Conv2D(4, 3, padding="same")(x))
        y = layers.ZeroPadding2D(1)(y)
        return layers.Add(name="site")([y, layers.Conv2D(4, 1)(layers.ZeroPadding2D(1)(x))])

    assert [refusal.rule for refusal in _model(build).skipped] == ["linear_skip"]


def test_why_a_body_is_not_linear() -> None:
    reasons = {
        "convnext": "'layer_normalization' normalizes by the statistics of each image, which is not linear",
        "batch_add": "'batch_norm' normalizes by the statistics of each batch: it is called with training=True",
        "rank3": "'dense_1' reads a tensor of rank 3, not images (batch, height, width, channels)",
        "add_1": "'conv2d_4' pads 'same' with strides on a dynamic size; give the input a fixed size",
    }
    for name, block in (
        ("layer_norm", "convnext"),
        ("training_flags", "batch_add"),
        ("tokens", "rank3"),
        ("dynamic", "add_1"),
    ):
        assert find_blocks(zoo.shared(name))[block].linear_refusal.reason == reasons[block]


def test_a_body_with_a_gate_inside_says_which_layer_is_not_linear() -> None:
    blocks = _model(lambda x: layers.Add(name="site")([x, layers.Softmax()(_conv(x))]))
    assert blocks["site"].linear_refusal.reason == "'softmax' is a Softmax, which has no linear rule"


def test_a_model_without_blocks_says_why() -> None:
    blocks = find_blocks(zoo.shared("shared_classifier"))
    with pytest.raises(ModelError, match="has no block that could be pruned: conv2d_1: linear: 'conv2d_1' applies an"):
        require_blocks(blocks)
    blocks = _model(lambda x: layers.Flatten()(layers.MaxPooling2D()(x)))
    with pytest.raises(ModelError, match="no residual and no chain of linear layers was found"):
        require_blocks(blocks)
    require_blocks(find_blocks(zoo.shared("plain")))


# Chains


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        # one layer is nothing to merge; two without an activation between them neither
        (lambda x: layers.ReLU()(_conv(x)), []),
        (lambda x: _conv(_conv(x)), []),
        (lambda x: _conv(layers.ReLU()(_conv(x))), ["conv2d_1"]),
        (lambda x: _conv(layers.ReLU()(_conv(layers.ReLU()(_conv(x))))), ["conv2d_1"]),
        (
            lambda x: _conv(layers.ReLU()(_conv(layers.ReLU()(_conv(layers.ReLU()(_conv(x))))))),
            ["conv2d_1", "conv2d_3"],
        ),
        # a bottleneck's end is linear: the next layer starts a block of its own
        (lambda x: zoo.inverted(zoo.inverted(x, 6), 8), ["batch_normalization_2", "batch_normalization_5"]),
        # a pool between them cuts
        (lambda x: _conv(layers.MaxPooling2D()(layers.ReLU()(_conv(x)))), []),
    ],
)
def test_chains_are_cut_at_linear_ends_and_in_pairs(build, wanted: list[str]) -> None:
    blocks = _model(build)
    assert [block.name for block in blocks] == wanted
    assert blocks.skipped == ()


def test_the_activation_behind_a_chain_stays_outside() -> None:
    for name in ("plain", "vgg", "mobilenet_v1", "inverted_residuals"):
        blocks = find_blocks(zoo.shared(name))
        for block in blocks:
            assert rules.activation(blocks.graph.by_name[block.name]) is None


# Well-known networks, with all names made meaningless


@functools.cache
def _graph_of(name: str) -> ModelGraph:
    keras.utils.clear_session(free_memory=False)
    make = {
        "MobileNetV2": lambda: keras.applications.MobileNetV2(weights=None),
        "MobileNetV2, odd": lambda: keras.applications.MobileNetV2(
            weights=None, alpha=0.35, input_shape=(33, 47, 3), include_top=False
        ),
        "MobileNet": lambda: keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(64, 64, 3), classes=7),
        "ResNet50": lambda: keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3), include_top=False),
        "ResNet50V2": lambda: keras.applications.ResNet50V2(weights=None, input_shape=(64, 64, 3), include_top=False),
        "VGG16": lambda: keras.applications.VGG16(weights=None, input_shape=(32, 32, 3), include_top=False),
        "ResNet-56": zoo.cifar_resnet,
    }
    return prepared_graph(make[name]())


FAMILIES = {
    "MobileNetV2": {("identity", 3, 1): 10, ("none", 3, 1): 3, ("none", 3, 2): 4},
    "MobileNetV2, odd": {("identity", 3, 1): 10, ("none", 3, 1): 3, ("none", 3, 2): 4},
    "MobileNet": {("none", 3, 1): 9, ("none", 3, 2): 4},
    "ResNet50": {("identity", 3, 1): 12, ("projection", 3, 1): 1, ("projection", 5, 2): 3},
    # three of its skips take each second pixel, by pooling
    "ResNet50V2": {("identity", 3, 1): 9, ("projection", 3, 1): 4, ("projection", 3, 2): 3},
    "VGG16": {("none", 5, 1): 5},
    "ResNet-56": {("identity", 5, 1): 25, ("projection", 7, 2): 2},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_well_known_networks(name: str) -> None:
    blocks = find_blocks_in(_graph_of(name))
    assert Counter(as_row(block)[1:] for block in blocks) == FAMILIES[name]
    assert all(block.linear_refusal is None for block in blocks)
    if name != "ResNet50V2":
        assert blocks.skipped == ()


@pytest.mark.parametrize("name", ["MobileNetV2, odd", "ResNet50", "ResNet-56", "VGG16"])
def test_names_do_not_matter(name: str) -> None:
    graph = _graph_of(name)
    order = np.random.default_rng(0).permutation(len(graph.nodes))
    new = {node.name: f"n{number}" for node, number in zip(graph, order, strict=True)}

    def rename(data):
        return map_refs(data, lambda ref: Ref(new[ref.node], ref.index))

    nodes = [
        replace(node, name=new[node.name], args=rename(node.args), kwargs=rename(dict(node.kwargs))) for node in graph
    ]
    renamed = ModelGraph("m", tuple(nodes), rename(graph.inputs), rename(graph.outputs))
    blocks, others = find_blocks_in(graph), find_blocks_in(renamed)
    assert [tuple(new[n] for n in block.nodes) for block in blocks] == [block.nodes for block in others]
    assert [as_row(block)[1:] for block in blocks] == [as_row(block)[1:] for block in others]


def test_names_of_layers_do_not_matter() -> None:
    graph = prepared_graph(zoo.shared("inverted_residuals"))
    new = {node.name: f"{chr(122 - i % 25)}{i}" for i, node in enumerate(graph)}
    model = zoo.shared("inverted_residuals")
    renamed = keras.models.clone_model(
        model, clone_function=lambda layer: type(layer).from_config({**layer.get_config(), "name": new[layer.name]})
    )
    assert [as_row(b)[1:] for b in find_blocks(renamed)] == [as_row(b)[1:] for b in find_blocks(model)]


# Costs


@pytest.mark.parametrize("name", FOUND)
def test_parameters_are_those_keras_counts(name: str) -> None:
    model = zoo.shared(name)
    blocks = find_blocks(model)
    whole = network_cost(blocks.graph)
    assert whole.params == model.count_params()
    assert sum(block.cost.params for block in blocks) <= whole.params
    assert sum(block.cost.macs for block in blocks) <= whole.macs
    assert all(block.cost.activation_bytes <= whole.activation_bytes for block in blocks)


def test_a_layer_that_is_called_elsewhere_is_no_cost_of_a_block() -> None:
    """Merging the block away does not make it disappear."""
    model = zoo.shared("shared_layer")
    graph = prepared_graph(model)
    for block in find_blocks_in(graph):
        inside = {graph.by_name[name].layer for name in block.nodes}
        alone = [layer for layer in inside if layer.name not in ("conv2d_1", "batch_normalization_1")]
        assert block.cost.params == sum(layer.count_params() for layer in alone)
    assert cost_of(graph, [node.name for node in graph]).params == model.count_params()


def test_macs_of_mobilenet_v2() -> None:
    # 300.8 M: the number its authors give for 224 x 224
    cost = network_cost(_graph_of("MobileNetV2"))
    assert cost.macs == 300_774_272
    assert cost.params == 3_538_984


def test_macs_of_a_residual_block_by_hand() -> None:
    blocks = find_blocks(zoo.shared("residual"))
    identity, projection = blocks["add"], blocks["add_1"]
    assert identity.cost.macs == 2 * 18 * 18 * 9 * 6 * 6
    assert identity.cost.params == 2 * (9 * 6 * 6 + 4 * 6)
    assert identity.skip_cost == cost_of(blocks.graph, ())
    body = 9 * 9 * (9 * 6 * 8 + 9 * 8 * 8)
    assert projection.skip_cost.macs == 9 * 9 * 6 * 8
    assert projection.cost.macs == body + projection.skip_cost.macs
    assert projection.skip_cost.params == 6 * 8 + 4 * 8


def test_liveness_by_hand() -> None:
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((4, 4, 2), name="in")  # 128 bytes
    x = layers.Conv2D(3, 1, name="a")(inputs)  # 192
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))  # in place
    x = layers.Conv2D(2, 1, name="b")(x)  # 128
    x = layers.Add(name="add")([x, inputs])  # 128
    y = layers.MaxPooling2D(name="pool")(x)  # 32
    z = layers.Conv2D(5, 1, name="c")(y)  # 80
    graph = prepared_graph(keras.Model(inputs, [z, x]))
    live = liveness(graph)
    assert live.total == {
        "in": 128,
        "a": 128 + 192,
        "norm": 128 + 192,
        "relu": 128 + 192,
        "b": 128 + 192 + 128,
        "add": 128 + 128 + 128,
        "pool": 128 + 32,  # `add` is an output and stays
        "c": 128 + 32 + 80,
    }
    assert network_cost(graph).activation_bytes == 448
    assert live.of("b", {"in"}) == 128 and live.of("b", {"a", "b"}) == 320
    (block,) = find_blocks_in(graph)
    assert (block.name, block.cost.activation_bytes, block.live_bytes) == ("add", 448, 128)


def test_an_activation_of_a_tensor_others_read_is_not_in_place() -> None:
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((4, 4, 2), name="in")
    x = layers.Conv2D(2, 1, name="a")(inputs)
    y = layers.ReLU(name="relu")(x)
    live = liveness(prepared_graph(keras.Model(inputs, layers.Add(name="add")([x, y]))))
    assert live.total == {"in": 128, "a": 256, "relu": 256, "add": 384}
    shown = liveness(prepared_graph(keras.Model(inputs, [x, y])))  # an output is read by the user
    assert shown.total == {"in": 128, "a": 256, "relu": 256}


# The collection


def test_blocks_are_a_sequence_with_names() -> None:
    blocks = find_blocks(zoo.shared("residual"))
    assert len(blocks) == 4 and blocks[0].name == "add" and blocks["add_2"] is blocks[2]
    assert blocks[1:3] == (blocks[1], blocks[2]) and list(blocks) == list(blocks[:])
    with pytest.raises(KeyError, match="No block is named 'nothing'; the blocks are: add, add_1, add_2, add_3"):
        blocks["nothing"]


def test_blocks_print_as_a_table() -> None:
    text = str(find_blocks(zoo.shared("tap_inside"))) + "\n" + str(find_blocks(zoo.shared("layer_norm")))
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["block", "shape"]
    assert lines[1].split() == ["add", "17x17x6", "->", "17x17x6", "identity", "5x5", "6", "0.19"]
    assert "skipped  tapped_add: single_exit: 'tapped' inside it is read outside, by 'average'" in lines
    assert any(line.split()[0] == "convnext" and " 7x7 " in line for line in lines)


def test_finding_blocks_changes_nothing() -> None:
    model = zoo.shared("inverted_residuals")
    before = [(layer.name, len(layer._inbound_nodes)) for layer in model.layers]
    first, second = find_blocks(model), find_blocks(model)
    assert [as_row(block) for block in first] == [as_row(block) for block in second]
    assert before == [(layer.name, len(layer._inbound_nodes)) for layer in model.layers]
    build_model(first.graph)  # the prepared graph is a model as well
