"""Small models, one per way in which channels can go together; weights are random as in `tests.zoo`."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops

from tests import zoo
from updp_tf.isomorphic.coupling import per_channel
from updp_tf.isomorphic.couplings import register_coupling

ZOO: dict[str, Callable[[], keras.Model]] = {}


def in_zoo(function: Callable[[], keras.Model]) -> Callable[[], keras.Model]:
    ZOO[function.__name__] = function
    return function


def build(name: str, *, seed: int = 0) -> keras.Model:
    keras.utils.clear_session(free_memory=False)
    return zoo.randomise(ZOO[name](), seed=seed)


def logits_of(model: keras.Model) -> keras.Model:
    """The model without the softmax of its last layer: on saturated probabilities every error looks small."""
    for layer in zoo.all_layers(model):
        if getattr(layer, "activation", None) is keras.activations.softmax:
            layer.activation = keras.activations.linear
    return model


def image(size: int = 9, channels: int = 3):
    return keras.Input((size, size, channels))


def to_logits(inputs, x) -> keras.Model:
    return keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)))


def conv(x, filters: int, kernel_size: int = 3, **options):
    x = layers.Conv2D(filters, kernel_size, padding="same", **options)(x)
    return layers.ReLU()(layers.BatchNormalization()(x))


@in_zoo
def depth_multiplier() -> keras.Model:
    inputs = image()
    x = conv(inputs, 6)
    x = layers.DepthwiseConv2D(3, depth_multiplier=3, padding="same")(x)
    x = layers.SeparableConv2D(10, 3, depth_multiplier=2)(layers.PReLU(shared_axes=[1, 2])(x))
    return to_logits(inputs, layers.Conv2D(7, 1)(x))


@in_zoo
def grouped_and_depthwise() -> keras.Model:
    inputs = image()
    x = conv(inputs, 12)
    x = layers.Conv2D(18, 3, groups=3)(x)
    x = layers.Conv2D(36, 3, groups=18, padding="same")(x)  # as many groups as channels, two outputs each
    return to_logits(inputs, layers.Conv2D(8, 1)(x))


@in_zoo
def transposed() -> keras.Model:
    inputs = image()
    x = layers.Conv2DTranspose(7, 3, strides=2)(conv(inputs, 6))
    x = layers.UpSampling2D(2)(layers.GroupNormalization(1)(x))
    return to_logits(inputs, conv(layers.Cropping2D(3)(x), 5))


@in_zoo
def group_norm() -> keras.Model:
    inputs = image()
    x = layers.GroupNormalization(3)(layers.Conv2D(12, 3)(inputs))
    x = layers.GroupNormalization(2)(layers.Conv2D(8, 3)(ops.silu(x)))
    return to_logits(inputs, layers.Conv2D(8, 1)(x))


@in_zoo
def across_norms() -> keras.Model:
    inputs = image()
    x = layers.RMSNormalization()(layers.Conv2D(10, 3)(inputs))
    x = layers.UnitNormalization()(layers.Conv2D(9, 3)(ops.gelu(x)))
    x = layers.LayerNormalization(epsilon=1e-3)(layers.Dense(8)(x))
    return to_logits(inputs, layers.Dense(6, activation="relu")(x))


@in_zoo
def squeeze_excite() -> keras.Model:
    inputs = image()
    x = conv(inputs, 12)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(12, 1, activation="sigmoid")(layers.Conv2D(4, 1, activation="relu")(gate))
    x = layers.Multiply()([x, gate])
    flat = layers.Reshape((1, 1, 12))(layers.GlobalAveragePooling2D()(x))
    x = x * layers.Dense(12, activation="hard_sigmoid")(layers.Dense(3)(flat))
    return to_logits(inputs, conv(x, 6))


@in_zoo
def broadcast_multiply() -> keras.Model:
    """A spatial gate of one channel says nothing about how many there are."""
    inputs = image()
    x = conv(inputs, 10)
    gate = layers.Conv2D(1, 1, activation="sigmoid")(x)
    return to_logits(inputs, conv(layers.Multiply()([gate, x]), 6))


@in_zoo
def concat_and_split() -> keras.Model:
    inputs = image()
    a, b = conv(inputs, 6), conv(inputs, 9)
    x = layers.BatchNormalization()(layers.Concatenate()([a, b, a]))
    left, middle, right = ops.split(x, [7, 12], axis=-1)
    y = ops.concatenate([conv(left, 5), middle, conv(right, 6)], axis=-1)
    return to_logits(inputs, layers.Conv2D(8, 1)(y))


@in_zoo
def slices() -> keras.Model:
    inputs = image()
    x = conv(inputs, 12)
    y = x[..., :8] + conv(inputs, 8)
    z = x[:, 1:, :, 5:]
    return to_logits(inputs, ops.concatenate([conv(y, 5)[:, 1:], z], axis=-1) * np.linspace(-1, 2, 12, dtype="float32"))


@in_zoo
def cross_stage() -> keras.Model:
    inputs = image()
    x = conv(inputs, 16)
    a, b = ops.split(x, 2, axis=-1)
    b = b + conv(conv(b, 6), 8)
    return to_logits(inputs, conv(ops.concatenate([a, b], axis=-1), 10))


@in_zoo
def shuffle() -> keras.Model:
    inputs = image()
    x = layers.Conv2D(12, 1, groups=3)(conv(inputs, 12))
    x = ops.reshape(x, (-1, 9, 9, 3, 4))
    x = layers.Reshape((9, 9, 12))(ops.transpose(x, (0, 1, 2, 4, 3)))
    return to_logits(inputs, layers.Conv2D(12, 3, groups=3)(x))


@in_zoo
def shuffle_plain() -> keras.Model:
    """Channels shuffled between convolutions without groups: rows and columns of the shuffle may go."""
    inputs = image()
    x = ops.reshape(conv(inputs, 12), (-1, 9, 9, 3, 4))
    x = ops.reshape(ops.swapaxes(x, 3, 4), (-1, 9, 9, 12))
    return to_logits(inputs, conv(x, 8))


@in_zoo
def flatten() -> keras.Model:
    inputs = image(7)
    x = layers.Flatten()(layers.MaxPooling2D(2)(conv(inputs, 10)))
    x = layers.Dense(9, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(4)(x))


@in_zoo
def permuted() -> keras.Model:
    inputs = image(5)
    x = layers.Permute((3, 1, 2))(conv(inputs, 8))
    x = layers.Dense(6)(layers.Reshape((8, 25))(x))  # works on the pixels: channels stay
    x = layers.Permute((2, 1))(x)
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling1D()(layers.Dense(7)(x))))


@in_zoo
def mixer() -> keras.Model:
    inputs = image(8)
    x = layers.Reshape((16, 10))(layers.Conv2D(10, 2, strides=2)(inputs))
    y = layers.Permute((2, 1))(layers.LayerNormalization()(x))
    y = layers.Permute((2, 1))(layers.Dense(16)(layers.Dense(6, activation="gelu")(y)))
    x = x + y
    x = x + layers.Dense(10)(layers.Dense(14, activation="gelu")(layers.LayerNormalization()(x)))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling1D()(x)))


@in_zoo
def shared() -> keras.Model:
    inputs = image()
    a, b = conv(inputs, 8), conv(inputs, 8)
    once = layers.Conv2D(6, 3, padding="same", activation="relu")
    return to_logits(inputs, conv(ops.concatenate([once(a), once(b)], axis=-1), 5))


@in_zoo
def shared_with_input() -> keras.Model:
    """A layer that also reads what cannot be cut."""
    inputs = image(channels=8)
    once = layers.Conv2D(8, 3, padding="same", activation="relu")
    return to_logits(inputs, conv(once(once(inputs)), 5))


def transformer(attention) -> keras.Model:
    inputs = image(8)
    x = layers.Reshape((16, 12))(layers.Conv2D(12, 2, strides=2)(inputs))
    x = x + attention(layers.LayerNormalization()(x))
    x = x + layers.Dense(12)(layers.Dense(20, activation="gelu")(layers.LayerNormalization()(x)))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling1D()(x)))


@in_zoo
def attention() -> keras.Model:
    return transformer(lambda x: layers.MultiHeadAttention(4, 6, value_dim=5)(x, x))


@in_zoo
def cross_attention() -> keras.Model:
    inputs = image(8)
    x = layers.Reshape((16, 12))(layers.Conv2D(12, 2, strides=2)(inputs))
    y = layers.Reshape((16, 9))(layers.Conv2D(9, 2, strides=2)(inputs))
    z = layers.MultiHeadAttention(3, 4, use_bias=False, output_shape=7)(query=x, value=y, key=layers.Dense(11)(y))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling1D()(z)))


@in_zoo
def attention_by_einsum() -> keras.Model:
    def attend(x):
        q, k = (layers.EinsumDense("btd,dhe->bthe", (None, 3, 4), bias_axes="he")(x) for _ in range(2))
        v = layers.EinsumDense("btd,dhe->bthe", (None, 3, 5), bias_axes="he")(x)
        scores = ops.softmax(ops.einsum("bthe,bshe->bhts", q, k) * 0.3)
        x = ops.einsum("bhts,bshe->bthe", scores, v)
        return layers.EinsumDense("bthe,hed->btd", (None, 12), bias_axes="d")(x)

    return transformer(attend)


@in_zoo
def attention_written_out() -> keras.Model:
    """Dense layers whose channels are divided into heads: heads and their dimensions are axes of their own."""

    def attend(x):
        q, k, v = (ops.transpose(ops.reshape(layers.Dense(12)(x), (-1, 16, 3, 4)), (0, 2, 1, 3)) for _ in range(3))
        scores = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) * 0.4)
        x = ops.reshape(ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3)), (-1, 16, 12))
        return layers.Dense(12)(x)

    return transformer(attend)


@in_zoo
def attention_fused() -> keras.Model:
    def attend(x):
        qkv = ops.transpose(ops.reshape(layers.Dense(36)(x), (-1, 16, 3, 3, 4)), (2, 0, 3, 1, 4))
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = ops.softmax(ops.matmul(q, ops.swapaxes(k, -1, -2)) * 0.4)
        x = ops.reshape(ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3)), (-1, 16, 12))
        return layers.Dense(12)(x)

    return transformer(attend)


@keras.saving.register_keras_serializable("updp_tests")
class ClassToken(layers.Layer):
    """A token in front of all others, and an embedding of the places."""

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="normal", name="token")
        self.places = self.add_weight(shape=(shape[1] + 1, shape[-1]), initializer="normal", name="places")

    def call(self, x):
        token = ops.broadcast_to(self.token, (ops.shape(x)[0], 1, self.token.shape[-1]))
        return ops.concatenate([token, x], axis=1) + self.places

    def compute_output_shape(self, shape):
        return (shape[0], shape[1] + 1, shape[2])


register_coupling(ClassToken, per_channel("token", "places"))


@in_zoo
def vision_transformer() -> keras.Model:
    inputs = image(8)
    x = layers.Reshape((16, 12))(layers.Conv2D(12, 2, strides=2)(inputs))
    x = ClassToken()(x)
    for _ in range(2):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        x = x + layers.MultiHeadAttention(3, 4)(y, y)
        y = layers.Dense(24, activation="gelu")(layers.LayerNormalization(epsilon=1e-6)(x))
        x = x + layers.Dropout(0.1)(layers.Dense(12)(y))
    return keras.Model(inputs, layers.Dense(4)(layers.LayerNormalization()(x)[:, 0]))


@in_zoo
def embeddings() -> keras.Model:
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(256, 10)(inputs) + layers.Embedding(7, 10)(np.arange(7)[None])
    x = layers.Dense(9, activation="relu")(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling1D()(x)))


@in_zoo
def reductions() -> keras.Model:
    inputs = image()
    x = conv(inputs, 8)
    mean = ops.mean(x, axis=[1, 2], keepdims=True)
    y = conv(x - mean, 6)
    total = ops.sum(y, axis=-1, keepdims=True)
    top = ops.max(conv(x, 5), axis=-1, keepdims=True)
    return to_logits(inputs, ops.concatenate([conv(x, 7), total, top], axis=-1))


@in_zoo
def output_in_the_middle() -> keras.Model:
    inputs = image()
    x = conv(inputs, 8)
    a, b = ops.split(conv(x, 10), 2, axis=-1)
    return keras.Model(inputs, [layers.Dense(4)(layers.GlobalMaxPooling2D()(conv(a, 6))), b])


@keras.saving.register_keras_serializable("updp_tests")
class Unknown(layers.Layer):
    """A layer that this package knows nothing of."""

    def build(self, shape):
        self.mix = self.add_weight(shape=(shape[-1], shape[-1]), initializer="normal", name="mix")

    def call(self, x):
        return ops.matmul(x, self.mix)


@in_zoo
def unknown_layer() -> keras.Model:
    inputs = image()
    return to_logits(inputs, conv(Unknown()(conv(conv(inputs, 8), 6)), 7))
