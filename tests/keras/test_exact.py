"""Composed blocks against the unmerged, linearised ones in float32: every block, odd and even sizes, borders too."""

from dataclasses import replace

import keras
import numpy as np
import pytest

from updp_tf import affine
from updp_tf.blocks import find_blocks, read_stages
from updp_tf.forms import ConvForm, Fitted, layer_specs
from updp_tf.graph import run_nodes
from updp_tf.merging import build_edit, relative_error
from updp_tf.starts import identity_start
from updp_tf.structure import Ref, Refusal


def randomise_norms(model, seed=0):
    """Trained-looking norms: gammas of both signs, tiny variances, shifts everywhere."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            n = layer.gamma.shape[0]
            layer.gamma.assign(rng.normal(0.3, 0.6, n))
            layer.beta.assign(rng.normal(0, 0.5, n))
            layer.moving_mean.assign(rng.normal(0, 0.3, n))
            layer.moving_variance.assign(rng.uniform(0.01, 2, n))
    return model


def linearised(graph, block):
    """The block's own calls with every activation as the identity, in place of nobody."""
    nodes = []
    for name in block.nodes:
        node = graph.by_name[name]
        if node.kind in ("ReLU", "Activation"):
            node = replace(node, layer=keras.layers.Activation("linear"), kind="Activation")
        nodes.append(node)
    return nodes


def run(nodes, entry, exit, x):
    values = {entry: keras.ops.convert_to_tensor(x)}
    run_nodes(nodes, values)
    return keras.ops.convert_to_numpy(values[exit])


@pytest.fixture(scope="module", params=[(64, 64), (97, 65)], ids=["even", "odd"])
def mobilenet(request):
    keras.utils.set_random_seed(1)
    model = keras.applications.MobileNetV2((*request.param, 3), alpha=0.35, weights=None, include_top=False)
    return find_blocks(randomise_norms(model))


def test_mobilenet_v2_merges_exactly_borders_included(mobilenet):
    rng = np.random.default_rng(0)
    assert len(mobilenet) == 17
    for block in mobilenet:
        maps = identity_start(read_stages(mobilenet.graph, block)).maps
        x = rng.normal(size=(2, *block.entry_shape[1:])).astype("float32")
        want = run(linearised(mobilenet.graph, block), block.entry, block.exit, x)
        for skip in ("kept", "folded"):
            fitted = ConvForm(block.geometry.kernel_size[0]).from_maps(block, maps, skip=skip, exact_border=True)
            assert isinstance(fitted, Fitted), fitted
            edit = build_edit(mobilenet.graph, block, fitted)
            assert relative_error(run(edit.nodes, block.entry, edit.exit, x), want) <= 1e-5, (block.name, skip)


def test_the_border_map_is_what_makes_it_exact(mobilenet):
    block = mobilenet[2]
    maps = identity_start(read_stages(mobilenet.graph, block)).maps
    x = np.random.default_rng(0).normal(size=(2, *block.entry_shape[1:])).astype("float32")
    want = run(linearised(mobilenet.graph, block), block.entry, block.exit, x)
    edit = build_edit(mobilenet.graph, block, ConvForm(3).from_maps(block, maps, skip="kept"))
    have = run(edit.nodes, block.entry, edit.exit, x)
    assert relative_error(have[:, 1:-1, 1:-1], want[:, 1:-1, 1:-1]) <= 1e-5
    assert relative_error(have, want) > 1e-2


def residual_network(size):
    """27 basic blocks as in the CIFAR ResNet-56: explicit padding before strides, a projection where shapes change."""
    layers = keras.layers

    def conv_norm(x, filters, strides):
        padding = "same" if strides == 1 else "valid"
        x = layers.ZeroPadding2D(1)(x) if strides == 2 else x
        return layers.BatchNormalization()(layers.Conv2D(filters, 3, strides, padding, use_bias=False)(x))

    inputs = keras.Input((*size, 3))
    x = layers.ReLU()(conv_norm(inputs, 4, 1))
    for stage, filters in enumerate((4, 8, 12)):
        for index in range(9):
            strides = 2 if stage and not index else 1
            skip = layers.Conv2D(filters, 1, 2, use_bias=False)(x) if strides == 2 else x
            y = conv_norm(layers.ReLU()(conv_norm(x, filters, strides)), filters, 1)
            x = layers.ReLU()(layers.Add()([y, skip]))
    return keras.Model(inputs, x)


@pytest.mark.parametrize("size", [(32, 32), (33, 19)], ids=["even", "odd"])
def test_resnet_56_merges_exactly_with_padding_in_front(size):
    """METHOD section 1 (b): with its padding moved to the front the linearised block merges exactly."""
    keras.utils.set_random_seed(2)
    blocks = find_blocks(randomise_norms(residual_network(size)))
    rng = np.random.default_rng(0)
    assert len(blocks) == 27
    for block in blocks:
        maps = identity_start(read_stages(blocks.graph, block)).maps
        x = rng.normal(size=(2, *block.entry_shape[1:])).astype("float32")
        want = front_padded(blocks.graph, block, maps, x)
        form = ConvForm(block.geometry.kernel_size[0])
        for skip in ("kept", "folded"):
            edit = build_edit(blocks.graph, block, form.from_maps(block, maps, skip=skip))
            assert relative_error(run(edit.nodes, block.entry, edit.exit, x), want) <= 1e-5, (block.name, skip)


def front_padded(graph, block, maps, x):
    """Unmerged Keras layers in float32: one per map, all padding in front, and the block's own skip."""
    y = keras.ops.convert_to_tensor(x)
    for index, one in enumerate(affine.move_padding_to_front(maps)):
        for spec in layer_specs(one, f"layer{index}"):
            layer = getattr(keras.layers, spec.class_name)(**spec.config)
            layer.build(y.shape)
            layer.set_weights(list(spec.weights))
            y = layer(y)
    values = {block.entry: keras.ops.convert_to_tensor(x)}
    run_nodes([graph.by_name[name] for name in block.skip_nodes], values)
    skip = values[Ref(block.skip_nodes[-1])] if block.skip_nodes else values[block.entry]
    return keras.ops.convert_to_numpy(y + skip)


def test_refused_with_a_reason_where_no_border_map_exists():
    keras.utils.set_random_seed(3)
    blocks = find_blocks(randomise_norms(residual_network((16, 16))))
    maps = identity_start(read_stages(blocks.graph, blocks[0])).maps
    refusal = ConvForm(5).from_maps(blocks[0], maps, skip="kept", exact_border=True)
    assert isinstance(refusal, Refusal) and refusal.reason
    dynamic = keras.applications.MobileNetV2((None, None, 3), alpha=0.35, weights=None, include_top=False)
    blocks = find_blocks(randomise_norms(dynamic))
    block = next(block for block in blocks if block.skip_kind == "identity")
    maps = identity_start(read_stages(blocks.graph, block)).maps
    refusal = ConvForm(3).from_maps(block, maps, skip="kept", exact_border=True)
    assert isinstance(refusal, Refusal) and "dynamic" in refusal.reason
    assert isinstance(ConvForm(3).from_maps(block, maps, skip="kept"), Fitted)


def test_a_border_map_survives_saving(mobilenet, tmp_path):
    """The border is a Rescaling layer by 1: a stock layer, so the file loads anywhere."""
    layer = keras.layers.Rescaling(1.0, offset=np.arange(24.0, dtype="float32").reshape(2, 3, 4))
    model = keras.Sequential([keras.Input((2, 3, 4)), layer])
    model.save(tmp_path / "border.keras")
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype("float32")
    again = keras.models.load_model(tmp_path / "border.keras")
    assert np.array_equal(again(x), x + layer.offset)
