"""The smallest Functional model per feature: what "any Keras vision model" means in the tests.

Fresh Keras layers have zero bias and an identity BatchNormalization and hide every bug of the algebra, so all weights
are random: gammas of both signs, variances down to 1e-4, betas, biases and means far from 0. Sizes are odd, or even
and strided. Names are the same in every process (`build` resets Keras' counters).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import keras
import numpy as np
from keras import layers

ZOO: dict[str, Callable[[], keras.Model]] = {}


def in_zoo(function: Callable[[], keras.Model]) -> Callable[[], keras.Model]:
    assert function.__name__ not in ZOO
    ZOO[function.__name__] = function
    return function


def build(name: str, *, seed: int = 0) -> keras.Model:
    """A new model of the zoo with random weights; the same names and weights every time."""
    keras.utils.clear_session(free_memory=False)
    return randomise(ZOO[name](), seed=seed)


@cache
def shared(name: str) -> keras.Model:
    """A model of the zoo for tests that only read it."""
    return build(name)


def inputs_of(model: keras.Model, *, n: int = 3, seed: int = 1, size: int = 16):
    """Random inputs of a model, nested as it wants them; dynamic axes get `size`."""
    rng = np.random.default_rng(seed)

    def make(tensor) -> np.ndarray:
        shape = (n, *(axis or size for axis in tensor.shape[1:]))
        return rng.normal(size=shape).astype("float32") if "float" in tensor.dtype else rng.integers(0, 256, shape)

    return keras.tree.map_structure(
        make,
        model._inputs_struct if hasattr(model, "_inputs_struct") else model.inputs[0],
    )


def outputs_of(model: keras.Model, inputs) -> list[np.ndarray]:
    """Outputs at inference, flat."""
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(inputs, training=False))]


def all_layers(model: keras.Model) -> list[keras.Layer]:
    """Layers with weights, those of nested models too, each once."""
    found: dict[int, keras.Layer] = {}
    for layer in model._flatten_layers(include_self=False):
        if not isinstance(layer, keras.Model) and layer.weights:
            found[id(layer)] = layer
    return list(found.values())


def randomise(model: keras.Model, *, seed: int = 0) -> keras.Model:
    """Give every layer generic weights that keep activations near 1."""
    rng = np.random.default_rng(seed)
    for layer in all_layers(model):
        randomise_weights(layer, rng)
    return model


def randomise_weights(layer: keras.Layer, rng: np.random.Generator) -> None:
    """Give one built layer generic weights."""
    if isinstance(layer, layers.BatchNormalization):
        randomise_norm(layer, rng)
        return
    if isinstance(layer, layers.Normalization):
        randomise_adapted(layer, rng)
        return
    for weight in layer.weights:
        if "seed" in weight.path:
            continue
        shape = tuple(weight.shape)
        if len(shape) == 1:
            value = rng.normal(size=shape) * 0.4 + ("gamma" in weight.name)
        else:
            depthwise = isinstance(layer, layers.DepthwiseConv2D) or "depthwise" in weight.name
            fan_in = np.prod(shape[:2]) if depthwise else np.prod(shape[:-1])
            value = rng.normal(size=shape) * np.sqrt(1.5 / fan_in)
        weight.assign(value)


def randomise_norm(layer: layers.BatchNormalization, rng: np.random.Generator) -> None:
    n = layer.moving_mean.shape[0]
    variance = np.exp(rng.uniform(np.log(1e-4), np.log(3.0), size=n))
    if not layer.scale:
        variance = 1 / rng.uniform(0.6, 1.4, size=n) ** 2
    layer.moving_mean.assign(rng.normal(size=n) * 0.4)
    layer.moving_variance.assign(variance)
    # The scale at inference stays between 0.6 and 1.4: a gain of ten a layer is infinite behind ninety of them.
    if layer.scale:
        sign = rng.choice([-1.0, 1.0], size=n)
        layer.gamma.assign(sign * rng.uniform(0.6, 1.4, size=n) * np.sqrt(variance + layer.epsilon))
    if layer.center:
        layer.beta.assign(rng.normal(size=n) * 0.4)


def randomise_adapted(layer: layers.Normalization, rng: np.random.Generator) -> None:
    """Statistics as `adapt` would find them; a layer that was given its statistics has no weights."""
    for weight in layer.weights:
        n = tuple(weight.shape)
        if "variance" in weight.name:
            weight.assign(np.exp(rng.uniform(np.log(1e-2), np.log(3.0), size=n)))
        elif "mean" in weight.name:
            weight.assign(rng.normal(size=n) * 0.4)
    layer.finalize_state()


# Pieces


def conv_norm(x, filters: int, kernel_size: int = 3, *, strides: int = 1, padding: str = "same", **options):
    x = layers.Conv2D(filters, kernel_size, strides=strides, padding=padding, use_bias=False, **options)(x)
    return layers.BatchNormalization()(x)


def basic(x, filters: int, *, strides: int = 1, project: bool = False):
    skip = conv_norm(x, filters, 1, strides=strides) if project else x
    y = layers.ReLU()(conv_norm(x, filters, strides=strides))
    return layers.ReLU()(layers.Add()([conv_norm(y, filters), skip]))


def bottleneck(x, filters: int, *, strides: int = 1, project: bool = False):
    # Keras' ResNet50 gives the projection to the Add first, and has biases under its norms
    skip = x
    if project:
        skip = layers.BatchNormalization()(layers.Conv2D(4 * filters, 1, strides=strides)(x))
    y = layers.Activation("relu")(layers.BatchNormalization()(layers.Conv2D(filters, 1, strides=strides)(x)))
    y = layers.Activation("relu")(layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same")(y)))
    y = layers.BatchNormalization()(layers.Conv2D(4 * filters, 1)(y))
    return layers.Activation("relu")(layers.Add()([skip, y]))


def inverted(x, filters: int, *, strides: int = 1, expansion: int = 2):
    y = x
    if expansion > 1:
        y = layers.ReLU(6.0)(conv_norm(y, expansion * x.shape[-1], 1))
    if strides == 2:
        y = layers.ZeroPadding2D(((0, 1), (0, 1)) if x.shape[1] % 2 == 0 else ((1, 1), (1, 1)))(y)
    y = layers.DepthwiseConv2D(3, strides=strides, padding="same" if strides == 1 else "valid", use_bias=False)(y)
    y = layers.ReLU(6.0)(layers.BatchNormalization()(y))
    y = conv_norm(y, filters, 1)
    return layers.Add()([x, y]) if strides == 1 and x.shape[-1] == filters else y


def depthwise_separable(x, filters: int, *, strides: int = 1):
    x = layers.DepthwiseConv2D(3, strides=strides, padding="same", use_bias=False)(x)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    return layers.ReLU(6.0)(conv_norm(x, filters, 1))


def head(x, classes: int = 5):
    return layers.Dense(classes, activation="softmax")(layers.GlobalAveragePooling2D()(x))


def stem(filters: int = 6, size: int = 17):
    inputs = keras.Input((size, size, 3))
    return inputs, layers.ReLU()(conv_norm(inputs, filters))


# The zoo


@in_zoo
def plain() -> keras.Model:
    inputs = keras.Input((15, 17, 3))
    x = layers.ReLU()(conv_norm(inputs, 5))
    x = layers.ReLU()(layers.Conv2D(7, 3, padding="valid")(x))
    x = layers.LeakyReLU(negative_slope=0.2)(conv_norm(x, 6, 5))
    return keras.Model(inputs, head(x), name="plain")


@in_zoo
def sequential() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(4, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.Conv2D(6, 3, strides=2, padding="same"),
            layers.ReLU(),
            layers.Conv2D(6, 1),
            layers.Flatten(),
            layers.Dense(5),
        ],
        name="sequential",
    )


def _inner(channels: int, name: str) -> keras.Model:
    inputs = keras.Input((17, 17, channels))
    return keras.Model(inputs, basic(inputs, channels), name=name)


@in_zoo
def nested() -> keras.Model:
    inputs, x = stem()
    return keras.Model(inputs, head(_inner(6, "inner")(x)), name="nested")


@in_zoo
def doubly_nested() -> keras.Model:
    middle_inputs = keras.Input((17, 17, 6))
    x = layers.ReLU()(conv_norm(_inner(6, "innermost")(middle_inputs), 6))
    middle = keras.Model(middle_inputs, x, name="middle")
    inputs, x = stem()
    backbone = keras.Sequential([keras.Input((17, 17, 6)), middle, layers.Conv2D(4, 1)], name="backbone")
    return keras.Model(inputs, head(backbone(x)), name="doubly_nested")


@in_zoo
def nested_twice() -> keras.Model:
    inputs, x = stem()
    inner = _inner(6, "inner")
    return keras.Model(inputs, head(inner(inner(x))), name="nested_twice")


@in_zoo
def nested_many_outputs() -> keras.Model:
    """A nested model with inputs and outputs in a dict whose keys are not sorted."""
    first, second = keras.Input((17, 17, 6), name="z"), keras.Input((17, 17, 6), name="a")
    outputs = {"wide": layers.Conv2D(6, 3, padding="same")(first), "flat": layers.Conv2D(6, 1)(second)}
    inner = keras.Model({"z": first, "a": second}, outputs, name="inner")
    inputs, x = stem()
    found = inner({"z": x, "a": layers.ReLU()(conv_norm(x, 6, 1))})
    x = layers.Subtract()([found["wide"], found["flat"]])
    return keras.Model(inputs, head(x), name="nested_many_outputs")


@in_zoo
def nested_operations() -> keras.Model:
    """Two nested models whose operations have the same names."""
    parts = []
    for name in ("one", "two"):
        keras.utils.clear_session(free_memory=False)
        inputs = keras.Input((17, 17, 6), name=f"{name}_in")
        x = keras.ops.relu(layers.Conv2D(6, 3, padding="same", name="conv")(inputs)) + inputs
        parts.append(keras.Model(inputs, x, name=name))
    keras.utils.clear_session(free_memory=False)
    inputs, x = stem()
    return keras.Model(inputs, head(parts[1](parts[0](x))), name="nested_operations")


@in_zoo
def shared_layer() -> keras.Model:
    inputs, x = stem()
    conv, norm = layers.Conv2D(6, 3, padding="same"), layers.BatchNormalization()
    for _ in range(2):
        y = layers.ReLU()(norm(conv(x)))
        x = layers.ReLU()(layers.Add()([conv_norm(y, 6, 1), x]))
    return keras.Model(inputs, head(x), name="shared_layer")


@in_zoo
def shared_classifier() -> keras.Model:
    """A layer with an activation of its own that is called inside and writes an output."""
    inputs, x = stem()
    conv = layers.Conv2D(6, 1, activation="sigmoid")
    y = conv(x)
    z = conv(layers.ReLU()(conv_norm(y, 6)))
    return keras.Model(inputs, [z, head(y)], name="shared_classifier")


@in_zoo
def residual() -> keras.Model:
    """ResNet basic blocks: identity, projection with stride 2 on an odd and an even size."""
    inputs, x = stem(6, 18)
    x = basic(x, 6)
    x = basic(x, 8, strides=2, project=True)
    x = basic(x, 8)
    x = basic(x, 10, strides=2, project=True)
    return keras.Model(inputs, head(x), name="residual")


def residual_without_norms() -> keras.Model:
    """Trained alike on one device and on several: each replica takes batch statistics of its own part of a batch."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((9, 11, 3))
    x = layers.ReLU()(layers.Conv2D(6, 3, padding="same")(inputs))
    for _ in range(3):
        y = layers.Conv2D(6, 3, padding="same")(layers.ReLU()(layers.Conv2D(6, 3, padding="same")(x)))
        x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(4, activation="softmax")(layers.GlobalAveragePooling2D()(x)))


@in_zoo
def bottlenecks() -> keras.Model:
    inputs, x = stem(8)
    x = bottleneck(x, 3, project=True)
    x = bottleneck(x, 3)
    x = bottleneck(x, 4, strides=2, project=True)
    return keras.Model(inputs, head(x), name="bottlenecks")


@in_zoo
def inverted_residuals() -> keras.Model:
    """MobileNetV2: expansion 1, stride 2 with a padding of its own on an even size, a skip."""
    inputs, x = stem(6, 16)
    x = inverted(x, 4, expansion=1)
    x = inverted(x, 6, strides=2, expansion=3)
    x = inverted(x, 6, expansion=6)
    x = inverted(x, 8, expansion=2)
    x = layers.ReLU(6.0)(conv_norm(x, 12, 1))
    return keras.Model(inputs, head(x), name="inverted_residuals")


@in_zoo
def mobilenet_v1() -> keras.Model:
    inputs, x = stem(6, 18)
    x = depthwise_separable(x, 8)
    x = depthwise_separable(x, 10, strides=2)
    x = depthwise_separable(x, 10)
    return keras.Model(inputs, head(x), name="mobilenet_v1")


@in_zoo
def vgg() -> keras.Model:
    inputs = keras.Input((16, 16, 3))
    x = inputs
    for filters in (4, 6):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(8, activation="relu")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(5, activation="softmax")(x), name="vgg")


@in_zoo
def separable() -> keras.Model:
    """Xception-like: SeparableConv2D in a residual and alone."""
    inputs, x = stem(6)
    y = x
    for _ in range(2):
        y = layers.SeparableConv2D(6, 3, padding="same", use_bias=False)(layers.ReLU()(y))
        y = layers.BatchNormalization()(y)
    x = layers.Add()([y, x])
    x = layers.ReLU()(layers.SeparableConv2D(8, 3, depth_multiplier=2, strides=2, padding="same")(x))
    return keras.Model(inputs, head(x), name="separable")


@in_zoo
def concatenation() -> keras.Model:
    inputs, x = stem(6)
    for _ in range(2):
        y = layers.ReLU()(conv_norm(x, 8, 1))
        x = layers.Concatenate()([x, layers.Conv2D(4, 3, padding="same")(y)])
    return keras.Model(inputs, head(x), name="concatenation")


@in_zoo
def two_inputs_outputs() -> keras.Model:
    left, right = keras.Input((17, 17, 3), name="left"), keras.Input((17, 17, 3), name="right")
    conv = layers.Conv2D(6, 3, padding="same", name="both")
    x = layers.Add()([conv(left), conv(right)])
    x = basic(x, 6)
    return keras.Model(
        {"left": left, "right": right}, {"scores": head(x), "map": layers.Conv2D(2, 1)(x)}, name="two_inputs_outputs"
    )


@in_zoo
def tap_inside() -> keras.Model:
    """A feature pyramid reads the middle of a block, and another block's inside is an output."""
    inputs, x = stem(6)
    y = layers.ReLU(name="tapped")(conv_norm(x, 6))
    x = layers.ReLU()(layers.Add(name="tapped_add")([conv_norm(y, 6), x]))
    z = layers.ReLU(name="shown")(conv_norm(x, 6))
    x = layers.ReLU()(layers.Add(name="shown_add")([conv_norm(z, 6), x]))
    x = basic(x, 6)
    features = layers.Conv2D(2, 1)(layers.Average()([x, y]))
    return keras.Model(inputs, [head(x), features, z], name="tap_inside")


@in_zoo
def operations() -> keras.Model:
    """keras.ops and arithmetic instead of layers, with constants among them."""
    inputs = keras.Input((17, 17, 3))
    x = keras.ops.relu(conv_norm(inputs / 2.0 - 0.25, 6))
    y = keras.ops.silu(conv_norm(x, 6))
    x = x + conv_norm(y, 6)
    x = keras.ops.relu6(x * 0.5 + 1.0)
    x = keras.ops.concatenate([x, 1.0 - x], axis=-1)
    return keras.Model(inputs, layers.Dense(5)(keras.ops.mean(x, axis=(1, 2))), name="operations")


@in_zoo
def dropout_and_noise() -> keras.Model:
    inputs, x = stem(6)
    y = layers.GaussianNoise(0.1)(layers.ReLU()(conv_norm(x, 8)))
    y = layers.SpatialDropout2D(0.2)(layers.BatchNormalization()(layers.Conv2D(6, 3, padding="same")(y)))
    x = layers.Add()([x, layers.Identity()(layers.Dropout(0.5)(y))])
    return keras.Model(inputs, head(layers.Dropout(0.5)(x)), name="dropout_and_noise")


@in_zoo
def squeeze_excite() -> keras.Model:
    inputs, x = stem(6)
    y = layers.Activation("swish")(conv_norm(x, 12, 1))
    y = layers.Activation("swish")(layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(y)))
    gate = layers.Reshape((1, 1, 12))(layers.GlobalAveragePooling2D()(y))
    gate = layers.Conv2D(12, 1, activation="sigmoid")(layers.Conv2D(3, 1, activation="swish")(gate))
    x = layers.Add(name="gated")([conv_norm(layers.Multiply()([y, gate]), 6, 1), x])
    x = basic(x, 6)
    return keras.Model(inputs, head(x), name="squeeze_excite")


@in_zoo
def layer_norm() -> keras.Model:
    """A ConvNeXt block: depthwise 7x7, LayerNorm, an MLP of Dense layers on the channels."""
    inputs, x = stem(6)
    y = layers.LayerNormalization()(layers.DepthwiseConv2D(7, padding="same")(x))
    y = layers.Dense(6)(layers.Activation("gelu")(layers.Dense(12)(y)))
    x = layers.Add(name="convnext")([x, y])
    y = layers.Dense(6)(layers.Activation("gelu")(layers.Dense(12)(layers.BatchNormalization()(x))))
    x = layers.Add(name="mlp")([x, y])
    return keras.Model(inputs, head(x), name="layer_norm")


@in_zoo
def dilated() -> keras.Model:
    inputs, x = stem(6)
    y = layers.ReLU()(conv_norm(x, 6, dilation_rate=2))
    x = layers.Add()([conv_norm(y, 6, dilation_rate=2), x])
    return keras.Model(inputs, head(x), name="dilated")


@in_zoo
def grouped() -> keras.Model:
    """ResNeXt: a grouped convolution between two pointwise ones."""
    inputs, x = stem(8)
    y = layers.ReLU()(conv_norm(x, 8, 1))
    y = layers.ReLU()(conv_norm(y, 8, groups=4))
    x = layers.ReLU()(layers.Add()([conv_norm(y, 8, 1), x]))
    x = layers.ReLU()(conv_norm(x, 12, groups=2))
    return keras.Model(inputs, head(x), name="grouped")


@in_zoo
def preactivation() -> keras.Model:
    """ResNetV2: norm and activation first, a projection from inside, average pooling in a skip."""
    inputs = keras.Input((17, 17, 3))
    x = layers.Conv2D(6, 3, padding="same")(inputs)
    y = layers.ReLU()(layers.BatchNormalization()(x))
    y = layers.ReLU()(conv_norm(y, 6))
    x = layers.Add(name="plain_add")([x, layers.Conv2D(6, 3, padding="same")(y)])
    y = layers.ReLU()(layers.BatchNormalization()(x))
    skip = layers.Conv2D(8, 1)(y)
    y = layers.ReLU()(conv_norm(y, 6))
    x = layers.Add(name="projected_add")([skip, layers.Conv2D(8, 3, padding="same")(y)])
    skip = layers.AveragePooling2D(2, padding="same")(x)
    y = layers.ReLU()(conv_norm(x, 8))
    x = layers.Add(name="pooled_add")([skip, conv_norm(y, 8, strides=2)])
    return keras.Model(inputs, head(x), name="preactivation")


@in_zoo
def parallel() -> keras.Model:
    """RepVGG: the short path is the body, in both orders; a skip that only drops out."""
    inputs, x = stem(6)
    x = layers.ReLU()(layers.Add(name="norm_on_skip")([layers.Conv2D(6, 3, padding="same")(x), conv_norm(x, 6, 1)]))
    x = layers.ReLU()(layers.Add(name="skip_first")([conv_norm(x, 6, 1), conv_norm(x, 6)]))
    x = layers.ReLU()(layers.Add(name="passive")([layers.Dropout(0.1)(x), conv_norm(x, 6)]))
    return keras.Model(inputs, head(x), name="parallel")


@in_zoo
def two_branches() -> keras.Model:
    """Two towers with norms of their own; an edit in one leaves the other as it is."""
    inputs = keras.Input((17, 17, 3))
    towers = []
    for _ in range(2):
        x = layers.ReLU()(conv_norm(inputs, 6))
        towers.append(basic(x, 6))
    return keras.Model(inputs, head(layers.Concatenate()(towers)), name="two_branches")


@in_zoo
def broadcast_add() -> keras.Model:
    """Adds that are no residuals: one channel to many, one pixel to all."""
    inputs = keras.Input((17, 17, 1))
    x = layers.Add(name="one_channel")([inputs, conv_norm(layers.ReLU()(conv_norm(inputs, 6)), 6)])
    x = layers.ReLU()(x)
    y = layers.ReLU()(layers.Conv2D(6, 17)(x))
    x = layers.Add(name="one_pixel")([x, layers.Conv2D(6, 1)(y)])
    return keras.Model(inputs, head(x), name="broadcast_add")


@in_zoo
def split_channels() -> keras.Model:
    """A half of the channels passes by, the other one goes through residuals: the blocks of a YOLO detector."""
    inputs, x = stem(8)
    aside, x = keras.ops.split(x, 2, axis=-1)
    y = layers.Add(name="first_add")([x, conv_norm(layers.ReLU()(conv_norm(x, 4)), 4)])
    z = layers.Add(name="second_add")([y, conv_norm(layers.ReLU()(conv_norm(y, 4)), 4)])
    return keras.Model(inputs, head(layers.Concatenate()([aside, x, y, z])), name="split_channels")


@in_zoo
def tokens() -> keras.Model:
    """Residuals on tensors that are no images: of rank 3 and of rank 2."""
    inputs, x = stem(6)
    x = layers.Reshape((-1, 6))(layers.MaxPooling2D(4)(x))
    x = layers.Add(name="rank3")([x, layers.Dense(6)(layers.Activation("gelu")(layers.Dense(12)(x)))])
    x = layers.Flatten()(x)
    x = layers.Add(name="rank2")([x, layers.Dense(96)(layers.ReLU()(layers.Dense(4)(x)))])
    return keras.Model(inputs, layers.Dense(5, activation="softmax")(x), name="tokens")


@in_zoo
def training_flags() -> keras.Model:
    """Calls that fix `training`: a norm that always uses batch statistics is not linear."""
    inputs, x = stem(6)
    y = layers.BatchNormalization(name="batch_norm")(layers.Conv2D(6, 3, padding="same")(x), training=True)
    x = layers.Add(name="batch_add")([x, layers.Conv2D(6, 3, padding="same")(layers.ReLU()(y))])
    y = layers.BatchNormalization(name="frozen_norm")(layers.Conv2D(6, 3, padding="same")(x), training=False)
    x = layers.Add(name="frozen_add")([x, layers.Conv2D(6, 3, padding="same")(layers.ReLU()(y))])
    x = _inner(6, "frozen")(x, training=False)
    return keras.Model(inputs, head(x), name="training_flags")


@in_zoo
def dynamic() -> keras.Model:
    inputs = keras.Input((None, None, 3))
    x = layers.ReLU()(conv_norm(inputs, 6))
    x = basic(x, 6)
    x = basic(x, 8, strides=2, project=True)
    x = inverted(x, 8, expansion=6)
    return keras.Model(inputs, head(x), name="dynamic")


@in_zoo
def half() -> keras.Model:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        inputs, x = stem(6)
        x = basic(x, 6)
        x = inverted(x, 6, expansion=2)
        pooled = layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, layers.Dense(5, activation="softmax", dtype="float32")(pooled), name="half")
    finally:
        keras.config.set_dtype_policy("float32")


@in_zoo
def fused_names() -> keras.Model:
    """A layer named as the activation of another one would be, once that is a call of its own."""
    inputs = keras.Input((15, 15, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="conv")(inputs)
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="conv_activation")(x)
    return keras.Model(inputs, head(x), name="fused_names")


@in_zoo
def whole_numbers() -> keras.Model:
    """Reads bytes, and has a layer as activation of another one."""
    inputs = keras.Input((15, 15, 3), dtype="uint8")
    x = layers.Rescaling(1 / 127.5, offset=-1.0)(inputs)
    x = layers.Conv2D(6, 3, padding="same", activation=layers.LeakyReLU(negative_slope=0.2))(x)
    return keras.Model(inputs, head(basic(x, 6)), name="whole_numbers")


@in_zoo
def fixed_batch() -> keras.Model:
    inputs = keras.Input(batch_shape=(1, 15, 15, 3))
    x = layers.ReLU()(conv_norm(inputs, 6))
    return keras.Model(inputs, head(basic(x, 6)), name="fixed_batch")


def cifar_resnet(n: int = 9, *, size: int = 32) -> keras.Model:
    """A ResNet of 6n + 2 layers as in its paper: projections of stride 2 at the second and third stage."""
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((size, size, 3))
    x = layers.ReLU()(conv_norm(inputs, 4))
    for stage, filters in enumerate((4, 8, 12)):
        for index in range(n):
            down = stage > 0 and index == 0
            x = basic(x, filters, strides=2 if down else 1, project=down)
    return randomise(keras.Model(inputs, head(x, 10), name="cifar_resnet"))


def subclassed() -> keras.Model:
    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv = layers.Conv2D(4, 3)

        def call(self, x):
            return self.conv(x)

    model = Plain()
    model(np.zeros((1, 8, 8, 3), "float32"))
    return model
