"""The rules of `updp_tf.rules` against the layers themselves."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
from keras import layers

from tests import zoo
from updp_tf import affine, rules
from updp_tf.graph import read_graph
from updp_tf.structure import Node, Ref

TOLERANCE = 1e-5  # float32 sums of up to some hundred terms, relative to the largest output
SIZES = ((9, 9), (10, 10), (8, 11), (7, 6))


def node_of(layer, shape, **kwargs) -> Node:
    """One call of a layer, as a graph would hold it."""
    layer.build(shape)
    zoo.randomise_weights(layer, np.random.default_rng(0))
    written = tuple(layer.compute_output_shape(shape))
    return Node(layer.name, layer, type(layer).__name__, (Ref("x"),), kwargs, (written,), ("float32",))


def assert_same(node: Node, shape, function) -> None:
    x = np.random.default_rng(1).normal(size=(2, *shape[1:]))
    want = keras.ops.convert_to_numpy(node.layer(x.astype("float32")))
    have = function(x)
    assert have.shape == want.shape
    assert np.abs(have - want).max() <= TOLERANCE * np.abs(want).max()


CONVOLUTIONS = {
    "plain": {},
    "strides 2": {"strides": 2},
    "strides 3": {"strides": 3},
    "different strides": {"strides": (1, 2)},
    "dilation 2": {"dilation_rate": 2},
    "different dilations": {"dilation_rate": (1, 2)},
    "no bias": {"use_bias": False},
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(options: dict, padding: str, size) -> None:
    shape = (None, *size, 4)
    for kernel_size, groups in itertools.product((1, 2, 3, (3, 2)), (1, 2, 4)):
        layer = layers.Conv2D(8, kernel_size, padding=padding, groups=groups, **options)
        node = node_of(layer, shape)
        (one,) = rules.linear_maps(node, shape)
        assert one.groups == groups
        assert_same(node, shape, lambda x, one=one: affine.apply(one, x))
        assert rules.macs(node, (shape,)) == affine.macs(one, *size)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("options", [one for name, one in CONVOLUTIONS.items() if "different" not in name], ids=str)
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolutions(multiplier: int, options: dict, padding: str, size) -> None:
    shape = (None, *size, 3)
    for kernel_size in (1, 2, 3):
        layer = layers.DepthwiseConv2D(kernel_size, padding=padding, depth_multiplier=multiplier, **options)
        node = node_of(layer, shape)
        (one,) = rules.linear_maps(node, shape)
        assert_same(node, shape, lambda x, one=one: affine.apply(one, x))
        assert rules.macs(node, (shape,)) == affine.macs(one, *size)


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("options", [{}, {"strides": 2}, {"dilation_rate": 2}, {"use_bias": False}], ids=str)
@pytest.mark.parametrize("multiplier", [1, 2])
def test_separable_convolutions(multiplier: int, options: dict, padding: str, size) -> None:
    shape = (None, *size, 3)
    layer = layers.SeparableConv2D(5, 3, padding=padding, depth_multiplier=multiplier, **options)
    node = node_of(layer, shape)
    maps = rules.linear_maps(node, shape)
    assert len(maps) == 2
    assert_same(node, shape, lambda x: affine.apply(maps[1], affine.apply(maps[0], x)))
    inner = affine.output_size(maps[0], *size)
    assert rules.macs(node, (shape,)) == affine.macs(maps[0], *size) + affine.macs(maps[1], *inner)


@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_on_images(use_bias: bool) -> None:
    shape = (None, 5, 6, 4)
    node = node_of(layers.Dense(7, use_bias=use_bias), shape)
    (one,) = rules.linear_maps(node, shape)
    assert_same(node, shape, lambda x: affine.apply(one, x))
    assert rules.macs(node, (shape,)) == 5 * 6 * 4 * 7


def test_layer_scale() -> None:
    from keras.src.applications.convnext import LayerScale

    shape = (None, 5, 6, 4)
    inputs = keras.Input(shape[1:])
    node = read_graph(zoo.randomise(keras.Model(inputs, LayerScale(1e-6, 4)(inputs)))).nodes[-1]
    (one,) = rules.linear_maps(node, shape)
    assert_same(node, shape, lambda x: affine.apply(one, x))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Rescaling(1 / 127.5, -1.0),
        lambda: layers.Rescaling([0.5, 2.0, 3.0], [1.0, -1.0, 0.0]),
        lambda: layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[0.5, 2.0, 1e-16]),
        lambda: layers.Normalization(mean=2.0, variance=4.0, axis=None),
        lambda: layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[0.5, 2.0, 4.0], invert=True),
    ],
)
def test_preprocessing(layer) -> None:
    shape = (None, 5, 6, 3)
    node = node_of(layer(), shape)
    scale, shift = rules.preprocessing(node, 3)
    assert_same(node, shape, lambda x: scale * x + shift)


def test_preprocessing_that_treats_pixels_differently() -> None:
    shape = (None, 5, 6, 3)
    for layer in (
        layers.Rescaling(1.0, np.zeros((5, 6, 3))),
        layers.Normalization(mean=[0.0] * 5, variance=[1.0] * 5, axis=1),
    ):
        with pytest.raises(rules.Unsupported, match="does not treat all pixels alike"):
            rules.preprocessing(node_of(layer, shape), 3)
    assert rules.preprocessing(node_of(layers.ReLU(), shape), 3) is None


@pytest.mark.parametrize("padding", [1, (2, 0), ((0, 1), (2, 3))], ids=str)
def test_zero_padding(padding) -> None:
    shape = (None, 5, 6, 3)
    node = node_of(layers.ZeroPadding2D(padding), shape)
    (one,) = rules.linear_maps(node, shape)
    assert_same(node, shape, lambda x: affine.apply(one, x))


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"epsilon": 0.5}, {"axis": 3}], ids=str)
def test_batch_normalization(options: dict) -> None:
    shape = (None, 5, 6, 4)
    node = node_of(layers.BatchNormalization(**options), shape)
    norm = rules.norm(node, shape)
    assert_same(node, shape, lambda x: norm.scale * x + norm.shift)
    # Moments: inputs with the moving statistics leave with these.
    rng = np.random.default_rng(0)
    mean, variance = (rules.as_array(v) for v in (node.layer.moving_mean, node.layer.moving_variance))
    z = norm.scale * (mean + np.sqrt(variance) * rng.normal(size=(400_000, 4))) + norm.shift
    np.testing.assert_allclose(z.mean(axis=0), norm.mean, atol=0.01)
    np.testing.assert_allclose(z.std(axis=0), norm.std, rtol=0.01)


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (lambda: layers.BatchNormalization(axis=1), (None, 5, 6, 4), "normalizes axis 1, not the channels"),
        (layers.LayerNormalization, (None, 5, 6, 4), "statistics of each image, which is not linear"),
        (lambda: layers.GroupNormalization(2), (None, 5, 6, 4), "statistics of each image, which is not linear"),
    ],
)
def test_norms_that_are_not_linear(layer, shape, reason: str) -> None:
    with pytest.raises(rules.Unsupported, match=reason):
        rules.norm(node_of(layer(), shape), shape)


def test_a_norm_called_in_training_is_not_linear() -> None:
    shape = (None, 5, 6, 4)
    assert rules.norm(node_of(layers.BatchNormalization(), shape, training=False), shape) is not None
    with pytest.raises(rules.Unsupported, match="it is called with training=True"):
        rules.norm(node_of(layers.BatchNormalization(), shape, training=True), shape)


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (lambda: layers.Conv2D(4, 3, activation="relu"), (None, 8, 8, 3), "applies an activation of its own"),
        (lambda: layers.Dense(4), (None, 8), "reads a tensor of rank 2, not images"),
        (
            lambda: layers.Conv2D(4, 3, padding="same", strides=2),
            (None, None, 8, 3),
            "pads 'same' with strides on a dynamic",
        ),
    ],
)
def test_linear_layers_that_are_not_covered(layer, shape, reason: str) -> None:
    with pytest.raises(rules.Unsupported, match=reason):
        rules.linear_maps(node_of(layer(), shape), shape)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Conv2D(4, 3, padding="same"),
        lambda: layers.Conv2D(4, 3, strides=2),
        lambda: layers.Conv2D(4, 1, strides=2, padding="same"),
    ],
)
def test_dynamic_sizes_where_padding_does_not_depend_on_them(layer) -> None:
    node = node_of(layer(), (None, None, None, 3))
    (one,) = rules.linear_maps(node, (None, None, None, 3))
    for size in (8, 9):
        assert_same(node, (None, size, size, 3), lambda x: affine.apply(one, x))


def test_other_layers_have_no_rule() -> None:
    shape = (None, 8, 8, 3)
    for layer in (layers.MaxPooling2D(), layers.GlobalAveragePooling2D(), layers.Rescaling(2.0), layers.UpSampling2D()):
        node = node_of(layer, shape)
        assert rules.linear_maps(node, shape) is None
        assert rules.norm(node, shape) is None
        assert rules.activation(node) is None
        assert rules.macs(node, (shape,)) == 0 and not rules.is_passive(node)


ACTIVATIONS = {
    "relu": lambda: layers.Activation("relu"),
    "silu": lambda: layers.Activation("silu"),
    "swish": lambda: layers.Activation(keras.activations.swish),
    "gelu": lambda: layers.Activation("gelu"),
    "hard_silu": lambda: layers.Activation("hard_silu"),
    "tanh": lambda: layers.Activation("tanh"),
    "sigmoid": lambda: layers.Activation("sigmoid"),
    "elu": lambda: layers.Activation("elu"),
    "ReLU": lambda: layers.ReLU(),
    "ReLU6": lambda: layers.ReLU(6.0),
    "ReLU, all parameters": lambda: layers.ReLU(3.0, negative_slope=0.1, threshold=0.5),
    "LeakyReLU": lambda: layers.LeakyReLU(negative_slope=0.2),
    "ELU": lambda: layers.ELU(alpha=0.7),
    "a layer as activation": lambda: layers.Activation(layers.LeakyReLU(negative_slope=0.2)),
}


@pytest.mark.parametrize("layer", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activation_layers(layer) -> None:
    shape = (None, 5, 6, 4)
    node = node_of(layer(), shape)
    function = rules.activation(node)
    x = 4 * np.random.default_rng(1).normal(size=(2, 5, 6, 4))
    np.testing.assert_allclose(function(x), keras.ops.convert_to_numpy(node.layer(x.astype("float32"))), atol=2e-6)


@pytest.mark.parametrize("name", ["relu", "relu6", "silu", "sigmoid", "tanh", "hard_sigmoid", "hard_silu", "gelu"])
def test_activation_operations(name: str) -> None:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, getattr(keras.ops, name)(inputs))
    node = read_graph(model).nodes[-1]
    x = 4 * np.random.default_rng(1).normal(size=(9, 4)).astype("float32")
    np.testing.assert_allclose(rules.activation(node)(x), model(x), atol=2e-6)


def test_gelu_operation_knows_its_kind() -> None:
    inputs = keras.Input((4,))
    x = 4 * np.random.default_rng(1).normal(size=(9, 4)).astype("float32")
    for approximate in (True, False):
        model = keras.Model(inputs, keras.ops.gelu(inputs, approximate=approximate))
        node = read_graph(model).nodes[-1]
        np.testing.assert_allclose(rules.activation(node)(x), model(x), atol=2e-6)


@pytest.mark.parametrize("function", ["softmax", lambda x: x**2])
def test_unknown_activations_are_refused_by_name(function) -> None:
    with pytest.raises(rules.Unsupported, match="applies '(softmax|<lambda>)', which has no rule"):
        rules.activation(node_of(layers.Activation(function), (None, 4)))


def test_what_does_nothing_at_inference_does_nothing() -> None:
    shape = (None, 5, 6, 4)
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 4)).astype("float32")
    made = [
        layers.Dropout(0.5),
        layers.SpatialDropout2D(0.5),
        layers.GaussianNoise(0.5),
        layers.GaussianDropout(0.5),
        layers.AlphaDropout(0.5),
        layers.ActivityRegularization(l2=0.1),
        layers.Identity(),
        layers.Activation("linear"),
    ]
    for layer in made:
        node = node_of(layer, shape)
        assert rules.is_passive(node)
        np.testing.assert_array_equal(layer(x), x)
        assert not rules.is_passive(node_of(type(layer).from_config(layer.get_config()), shape, training=True))
    # Augmentations, and stochastic depth in its block: test_graph_coverage.py
    of_keras = {kind for kind in rules.PASSIVE - rules.AUGMENTATIONS if "." not in kind}
    assert {type(layer).__name__ for layer in made} == {*of_keras, "Activation"} - {
        "SpatialDropout1D",
        "StochasticDepth",
    }


def test_macs_of_other_layers() -> None:
    def macs(layer, *shapes) -> int:
        layer.build(*shapes)
        written = tuple(layer.compute_output_shape(*shapes))
        node = Node("n", layer, type(layer).__name__, (), {}, (written,), ("float32",))
        return rules.macs(node, tuple(shapes))

    assert macs(layers.Dense(7), (None, 4)) == 28
    assert macs(layers.Dense(7), (None, 10, 4)) == 280
    assert macs(layers.Conv2DTranspose(5, 3, strides=2, padding="same"), (None, 4, 6, 2)) == 4 * 6 * 9 * 2 * 5
    query, key = keras.Input((2, 10, 3)), keras.Input((2, 3, 7))
    product = read_graph(keras.Model([query, key], keras.ops.matmul(query, key))).nodes[-1]
    assert rules.macs(product, ((None, 2, 10, 3), (None, 2, 3, 7))) == 2 * 10 * 3 * 7
    # 2 heads of 3: query, key, value and output of 8 -> 6, then scores and values over 10 x 10 tokens
    attention = layers.MultiHeadAttention(2, 3)
    shape = (None, 10, 8)
    attention.build(shape, shape)
    node = Node("n", attention, "MultiHeadAttention", (), {}, (shape,), ("float32",))
    assert rules.macs(node, (shape,)) == 4 * 10 * 8 * 6 + 2 * (2 * 10 * 10 * 3)
    # 2 x 5 key and value tokens of 7 channels: only the query's and the output's projections see all 10 positions
    other = (None, 5, 7)
    attention = layers.MultiHeadAttention(2, 3, value_dim=4)
    attention.build(shape, other)
    node = Node("n", attention, "MultiHeadAttention", (), {}, (shape,), ("float32",))
    assert rules.macs(node, (shape, other)) == 10 * 8 * (6 + 8) + 5 * 7 * (6 + 8) + 2 * 10 * 5 * (3 + 4)


class Counted:
    """A number that counts how often numbers are multiplied."""

    n = 0

    def __mul__(self, other: Counted) -> Counted:
        Counted.n += 1
        return self

    def __add__(self, other: Counted) -> Counted:
        return self

    __radd__ = __add__


def multiplications(equation: str, *shapes: tuple[int, ...]) -> int:
    Counted.n = 0
    np.einsum(equation, *(np.full(shape, Counted(), dtype=object) for shape in shapes))
    return Counted.n


@pytest.mark.parametrize(
    ("equation", "output", "shape"),
    [
        ("abc,cde->abde", (None, 2, 3), (4, 5)),  # a query's projection: heads and their dimensions are the kernel's
        ("abde,dec->abc", (None, 7), (4, 2, 3)),
        ("abc,cd->abd", (None, 6), (4, 5)),
        ("...x,xy->...y", 6, (2, 4, 5)),
        ("abc,bd->adc", (6, None), (4, 5)),  # mixes tokens
        ("abcd,bd->abc", (3, None), (3, 4, 5)),
    ],
)
def test_macs_of_einsum_are_its_multiplications(equation: str, output, shape: tuple[int, ...]) -> None:
    layer = layers.EinsumDense(equation, output)
    model = keras.Sequential([keras.Input(shape), layer])
    node = read_graph(model).nodes[-1]
    want = multiplications(equation, (1, *shape), tuple(layer.kernel.shape))
    assert rules.macs(node, ((None, *shape),)) == want > 0


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("aecd,abcd->acbe", ((4, 2, 3), (5, 2, 3))),
        ("acbe,aecd->abcd", ((2, 3, 4), (4, 2, 6))),
        ("...ij,...jk->...ik", ((2, 3, 4), (2, 4, 5))),
        ("abc,acd", ((3, 4), (4, 5))),
    ],
)
def test_macs_of_einsum_operations(equation: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    inputs = [keras.Input(shape) for shape in shapes]
    node = read_graph(keras.Model(inputs, keras.ops.einsum(equation, *inputs))).nodes[-1]
    want = multiplications(equation, *((1, *shape) for shape in shapes))
    assert rules.macs(node, tuple((None, *shape) for shape in shapes)) == want


def test_macs_of_einsum_with_a_constant() -> None:
    source = keras.Input((3, 4))
    constant = np.ones((5, 2, 3), "float32")  # the ellipsis has one axis less
    node = read_graph(keras.Model(source, keras.ops.einsum("...ij,kli->...kl", source, constant))).nodes[-1]
    assert rules.macs(node, ((None, 3, 4),)) == multiplications("...ij,kli->...kl", (1, 3, 4), (5, 2, 3))
