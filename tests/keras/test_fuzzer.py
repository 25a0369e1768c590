"""Random block graphs: read and rebuilt they are equal bit for bit, merged they equal their linearised layers.

A differential test: the other side is Keras itself, running the same graph layer by layer in float32, and NumPy where
paddings are moved. 200 examples by default (about a quarter of a CPU second each), 2,000 with `-m slow`, in ten parts
with seeds of their own. Failures that were found this way have tests of their own at the end.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from keras import layers

from tests import zoo
from updp_tf import affine, rules
from updp_tf.blocks import Blocks, find_blocks, read_stages
from updp_tf.forms import ConvForm, Fitted
from updp_tf.graph import build_model, read_graph, run_nodes
from updp_tf.merging import assemble, build_edit, relative_error
from updp_tf.starts import identity_start
from updp_tf.structure import Block, Ref, Refusal

MERGE_TOLERANCE = 1e-4  # float32 sums over composed kernels of up to 11 x 11 taps, relative to the largest output

ACTIVATIONS = {
    "none": None,
    "layer": lambda: layers.ReLU(),
    "capped": lambda: layers.ReLU(6.0),
    "leaky": lambda: layers.LeakyReLU(negative_slope=0.1),
    "named": lambda: layers.Activation("silu"),
    "operation": lambda: keras.ops.relu,
    "gelu": lambda: keras.ops.gelu,
    "own": None,  # the convolution applies it itself
}


@dataclass(frozen=True)
class Step:
    """One convolution, with what stands around it."""

    kind: str
    kernel: int
    shape: str
    stride: int
    padding: str
    dilation: int
    groups: int
    channels: int
    use_bias: bool
    norm: bool
    activation: str
    passive: bool


@dataclass(frozen=True)
class Part:
    """A run of steps, with or without a skip around them, squeeze-excite, a tap inside, or a model around it."""

    steps: tuple[Step, ...]
    skip: str
    preactivated: bool
    excite: bool
    tail: bool
    nested: str
    tapped: bool


@dataclass(frozen=True)
class Network:
    """Parts in a row on images of one size."""

    size: tuple[int, int]
    channels: int
    parts: tuple[Part, ...]
    seed: int


STEPS = st.builds(
    Step,
    kind=st.sampled_from(["conv", "conv", "pointwise", "depthwise", "separable"]),
    kernel=st.sampled_from([1, 2, 3, 3, 5]),
    shape=st.sampled_from(["square"] * 4 + ["tall", "wide"]),
    stride=st.sampled_from([1, 1, 1, 2]),
    padding=st.sampled_from(["same", "same", "valid", "explicit"]),
    dilation=st.sampled_from([1, 1, 2]),
    groups=st.sampled_from([1] * 7 + [2]),  # each shape of a grouped convolution is compiled, at some 0.3 s
    channels=st.sampled_from([4, 8]),
    use_bias=st.booleans(),
    norm=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    passive=st.sampled_from([False, False, True]),
)
PARTS = st.builds(
    Part,
    steps=st.lists(STEPS, min_size=1, max_size=3).map(tuple),
    skip=st.sampled_from(["none", "identity", "identity", "projection"]),
    preactivated=st.booleans(),
    excite=st.sampled_from([False, False, True]),
    tail=st.booleans(),
    nested=st.sampled_from(["no", "no", "functional", "sequential"]),
    tapped=st.sampled_from([False, False, False, True]),
)
NETWORKS = st.builds(
    Network,
    size=st.tuples(st.integers(7, 12), st.integers(7, 12)),
    channels=st.sampled_from([4, 8]),
    parts=st.lists(PARTS, min_size=1, max_size=2).map(tuple),
    seed=st.integers(0, 2**31),
)


def build(network: Network) -> keras.Model:
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((*network.size, network.channels))
    x, taps = inputs, []
    for number, part in enumerate(network.parts):
        x = add_part(x, part, f"part{number}", taps)
    return zoo.randomise(keras.Model(inputs, [x, *taps], name="fuzzed"), seed=network.seed)


def add_part(x: Any, part: Part, name: str, taps: list) -> Any:
    entry = x
    if part.preactivated:
        x = layers.ReLU()(layers.BatchNormalization()(x))
    if part.nested == "no":
        for step in part.steps:
            x = add_step(x, step)
    elif part.nested == "functional":
        inner = keras.Input(x.shape[1:])
        y = inner
        for step in part.steps:
            y = add_step(y, step)
        x = keras.Model(inner, y, name=f"{name}_inner")(x)
    else:
        made, shape = [], x.shape
        for step in part.steps:
            for layer in layers_of(step, shape):
                made.append(layer)
                shape = layer.compute_output_shape(shape)
        x = keras.Sequential([keras.Input(x.shape[1:]), *made], name=f"{name}_inner")(x)
    if part.tapped:
        taps.append(x)
    if part.excite:
        gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
        gate = layers.Conv2D(x.shape[-1], 1, activation="sigmoid")(layers.Conv2D(3, 1, activation="relu")(gate))
        x = layers.Multiply()([x, gate])
    x = add_skip(x, entry, part.skip, name)
    return layers.ReLU()(x) if part.tail else x


def add_skip(x: Any, entry: Any, kind: str, name: str) -> Any:
    if kind == "none":
        return x
    skip = entry
    if kind == "projection" or entry.shape != x.shape:
        stride = -(-entry.shape[1] // x.shape[1])
        skip = layers.BatchNormalization()(layers.Conv2D(x.shape[-1], 1, strides=stride, use_bias=False)(entry))
    return layers.Add(name=f"{name}_add")([x, skip]) if skip.shape == x.shape else x


def add_step(x: Any, step: Step) -> Any:
    for layer in layers_of(step, x.shape):
        x = layer(x)
    function = ACTIVATIONS[step.activation]
    return function()(x) if step.activation in ("operation", "gelu") else x


def layers_of(step: Step, shape: tuple) -> list[layers.Layer]:
    """A step as layers for an input of some shape; what the shape does not allow is left out."""
    size, c_in = min(shape[1:3]), shape[-1]
    long = 1 if step.kind == "pointwise" else step.kernel
    kernel = (1 if step.shape == "wide" else long, 1 if step.shape == "tall" else long)
    # Keras refuses strides together with dilation.
    dilation = 1 if step.stride > 1 or step.kind == "separable" else step.dilation
    extents = [(k - 1) * dilation + 1 for k in kernel]
    padding = "same" if step.padding == "valid" and size < max(extents) + 2 else step.padding
    stride = step.stride if size >= 4 and step.kind != "pointwise" else 1
    options = {
        "strides": stride,
        "padding": "valid" if padding == "explicit" else padding,
        "use_bias": step.use_bias,
        "activation": "relu" if step.activation == "own" else None,
    }
    if step.kind != "separable":
        options["dilation_rate"] = dilation
    made: list[layers.Layer] = []
    if padding == "explicit" and max(extents) > 1:
        made.append(layers.ZeroPadding2D(tuple(((extent - 1) // 2, extent // 2) for extent in extents)))
    # Weights are given later: drawing others first costs time.
    if step.kind == "depthwise":
        made.append(layers.DepthwiseConv2D(kernel, depthwise_initializer="zeros", **options))
    elif step.kind == "separable":
        drawn = {"depthwise_initializer": "zeros", "pointwise_initializer": "zeros"}
        made.append(layers.SeparableConv2D(step.channels, kernel, **drawn, **options))
    else:
        groups = step.groups if c_in % step.groups == 0 else 1
        made.append(layers.Conv2D(step.channels, kernel, groups=groups, kernel_initializer="zeros", **options))
    if step.norm:
        made.append(layers.BatchNormalization())
    if step.activation not in ("none", "own", "operation", "gelu"):
        made.append(ACTIVATIONS[step.activation]())
    if step.passive:
        made.append(layers.Dropout(0.3))
    return made


# What must hold


def check(network: Network) -> None:
    model = build(network)
    x = np.random.default_rng(network.seed).normal(size=(2, *model.input_shape[1:])).astype("float32")
    want = outputs(model, x)
    tame = all(np.isfinite(y).all() and np.abs(y).max() < 1e6 for y in want)
    if hypothesis.currently_in_test_context():
        hypothesis.assume(tame)
    assert tame
    for have, y in zip(outputs(build_model(read_graph(model)), x), want, strict=True):
        np.testing.assert_array_equal(have, y)
    blocks = find_blocks(model)
    assert_same(run(blocks.graph, x), want)
    check_what_was_found(network, blocks)
    check_merges(blocks, x)


def outputs(model: keras.Model, x: np.ndarray) -> list[np.ndarray]:
    return zoo.outputs_of(model, x)


def run(graph, x: np.ndarray) -> list[np.ndarray]:
    values = {graph.input_refs[0]: keras.ops.convert_to_tensor(x)}
    run_nodes(graph, values)
    return [keras.ops.convert_to_numpy(values[ref]) for ref in graph.output_refs]


def assert_same(have: list[np.ndarray], want: list[np.ndarray]) -> None:
    for a, b in zip(have, want, strict=True):
        np.testing.assert_array_equal(a, b)


def check_what_was_found(network: Network, blocks: Blocks) -> None:
    """Every Add is a block or refused by name; no block swallows what others read."""
    told = {block.join for block in blocks} | {refusal.site for refusal in blocks.skipped}
    graph = blocks.graph
    assert {node.name for node in graph if node.kind == "Add"} <= told
    for block in blocks:
        for name in set(block.nodes) - {block.exit.node}:
            assert Ref(name) not in graph.output_refs
            assert set(graph.readers[Ref(name)]) <= set(block.nodes)


def check_merges(blocks: Blocks, x: np.ndarray) -> None:
    """Blocks whose activations are the identity equal one convolution: the whole graph where borders are exact."""
    edits, linear = {}, {}
    for block in blocks:
        if block.linear_refusal is not None:
            continue
        maps = identity_start(read_stages(blocks.graph, block)).maps
        form = ConvForm(max(affine.composed_geometry(maps).kernel_size))
        modes = [mode for mode in ("kept", "folded") if mode == "folded" or block.join is not None]
        refusals = {mode: form.refuses(block, skip=mode) for mode in modes}
        assert all(refusal is None or refusal.reason for refusal in refusals.values())
        modes = [mode for mode in modes if refusals[mode] is None]
        check_front_padded(blocks, block, maps, [form.from_maps(block, maps, skip=mode) for mode in modes])
        for mode in modes[-1:]:
            fitted = form.from_maps(block, maps, skip=mode, exact_border=True)
            if isinstance(fitted, Fitted):
                edits[block.name] = build_edit(blocks.graph, block, fitted)
                linear |= {name: linearised(blocks.graph.by_name[name]) for name in block.nodes}
    if not edits:
        return
    graph = blocks.graph
    want = run(replace(graph, nodes=tuple(linear.get(node.name, node) for node in graph)), x)
    for have, y in zip(run(assemble(blocks, edits, {}), x), want, strict=True):
        assert have.shape == y.shape and relative_error(have, y) <= MERGE_TOLERANCE


def linearised(node):
    if rules.is_passive(node) or rules.activation(node) is None:
        return node
    return replace(node, layer=layers.Activation("linear"), kind="Activation", kwargs={})


def check_front_padded(blocks: Blocks, block: Block, maps, found: list[Fitted | Refusal]) -> None:
    """With its padding moved to the front a linear block merges exactly, whatever its biases and its skip mode."""
    assert all(one.reason for one in found if isinstance(one, Refusal))
    edits = [build_edit(blocks.graph, block, one) for one in found if isinstance(one, Fitted)]
    if not edits:
        return
    x = np.random.default_rng(1).normal(size=(2, *block.entry_shape[1:])).astype("float32")
    values: dict = {block.entry: keras.ops.convert_to_tensor(x)}
    y = x.astype("float64")
    for one in affine.move_padding_to_front(maps):
        y = affine.apply(one, y)
    if block.join is not None:
        run_nodes([blocks.graph.by_name[name] for name in block.skip_nodes], values)
        skip = Ref(block.skip_nodes[-1]) if block.skip_nodes else block.entry
        y = y + keras.ops.convert_to_numpy(values[skip])
    for edit in edits:
        values = {block.entry: keras.ops.convert_to_tensor(x)}
        run_nodes(edit.nodes, values)
        assert relative_error(keras.ops.convert_to_numpy(values[edit.exit]), y) <= MERGE_TOLERANCE


@pytest.fixture(autouse=True, scope="module")
def rare_collections() -> Iterator[None]:
    """Collect garbage rarely: networks are cycles of thousands of objects, and looking took a fifth of the time."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


QUIET = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]


@hypothesis.settings(max_examples=200, suppress_health_check=QUIET)
@hypothesis.given(network=NETWORKS)
def test_random_networks(network: Network) -> None:
    check(network)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_random_networks(part: int) -> None:
    """2,000 networks, all but a few of them others than above; `-k "many and [3]"` runs one part."""

    @hypothesis.seed(2026 + part)
    @hypothesis.settings(max_examples=200, suppress_health_check=QUIET, derandomize=False)
    @hypothesis.given(network=NETWORKS)
    def check_some(network: Network) -> None:
        check(network)

    check_some()


# Found this way


def step(**changes: Any) -> Step:
    plain = Step("conv", 3, "square", 1, "same", 1, 1, 4, use_bias=True, norm=True, activation="layer", passive=False)
    return replace(plain, **changes)


def part(*steps: Step, **changes: Any) -> Part:
    plain = Part(steps, "identity", preactivated=False, excite=False, tail=False, nested="no", tapped=False)
    return replace(plain, **changes)


def test_a_skip_of_other_strides_is_refused() -> None:
    """On 7 pixels a stride of 2 without padding and one of 3 write as many: shapes agree, places do not."""
    strided = step(stride=2, padding="valid")
    network = Network((7, 7), 4, (part(strided, step(kernel=1)),), seed=0)
    (block,) = find_blocks(build(network))
    assert block.skip.strides == (3, 3) and block.geometry.strides == (2, 2)
    assert ConvForm(3).refuses(block, skip="folded").reason == "its skip has strides (3, 3), not (2, 2)"
    check(network)
