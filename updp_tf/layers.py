"""Blend layers: what was there times `blend`, plus what takes its place times 1 - `blend`.

`blend` is 1 for the network as it was and 0 for its linear, mergeable form. It is *scheduled*: a step counter in the
layer advances with every call in training, and the blend is computed from it inside the graph, so that it is right
under `steps_per_execution` and on JAX, where a callback that sets variables is silently too late. Or it is *learned*: a
sigmoid of a trainable weight. Everything is `keras.ops`, so the layers train on every Keras backend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from updp_tf.errors import ScheduleError
from updp_tf.schedule import steps_of

PACKAGE = "updp_tf"

COLDEST = 0.05
"""Temperature of a learned blend's sigmoid at the end of its window; it starts at 1."""

NEVER = 2**30
"""Step at which a blend starts to change whose training has no known length."""

Pads = tuple[int, int, int, int]
"""Pixels at the top, at the bottom, left and right."""

NO_RING: Pads = (0, 0, 0, 0)


class Blend(keras.layers.Layer):
    """Base of the blend layers: where `blend` comes from.

    Args:
        begin: part of the training from which on the blend changes.
        end: part of the training from which on it is 0.
        shape: `cosine` or `linear`, as `Schedule`.
        start: blend before `begin`.
        total_steps: of the training. None has to be filled in before the first step, which `BlendSchedule` does.
        learned: make the blend a sigmoid of a trainable weight; its temperature falls from 1 to 0.05 in the window.
        per_channel: a learned weight for every channel instead of one.
        penalty: added to the loss times a learned blend: what keeping the block costs.
        block: name of the block that the layer belongs to, for messages and for merging.
        site: what `merge` has to know of the block, as plain data.
    """

    def __init__(
        self,
        *,
        begin: float = 0.0,
        end: float = 0.5,
        shape: str = "cosine",
        start: float = 1.0,
        total_steps: int | None = None,
        learned: bool = False,
        per_channel: bool = False,
        penalty: float = 0.0,
        block: str | None = None,
        site: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if per_channel and not learned:
            raise ScheduleError("Only learned blends can have one weight per channel; scheduled ones are one number.")
        self.begin, self.end, self.shape, self.start = begin, end, shape, start
        self.total_steps = total_steps
        self.learned, self.per_channel, self.penalty = learned, per_channel, penalty
        self.block, self.site = block, None if site is None else dict(site)

    def build(self, input_shape: Any) -> None:
        """Make the step counter, its window in steps and, where the blend is learned, its weight."""
        counters: dict[str, Any] = {"dtype": "int32", "trainable": False, "aggregation": "only_first_replica"}
        self.step = self.add_weight(name="step", shape=(), initializer="zeros", **counters)
        # A variable, not a number in the graph: functions that were traced before the window was known stay right.
        self.window = self.add_weight(name="window", shape=(2,), initializer=self._window, **counters)
        if self.learned:
            shapes = input_shape if isinstance(input_shape[0], list | tuple) else [input_shape]
            size = (int(shapes[0][-1]),) if self.per_channel else ()
            # sigmoid(3) = 0.95: close to what was there, and not so far out that its gradient is gone.
            self.theta = self.add_weight(
                name="theta", shape=size, dtype="float32", initializer=keras.initializers.Constant(3.0), autocast=False
            )
        self.built = True

    def set_total_steps(self, total_steps: int) -> None:
        """Say how many steps the training has; the layer must be built."""
        self.total_steps = total_steps
        self.window.assign(self._window((2,), "int32"))

    def _window(self, shape: Any, dtype: Any = None) -> Any:
        steps = (NEVER, NEVER + 1) if self.total_steps is None else steps_of((self.begin, self.end), self.total_steps)
        return ops.convert_to_tensor(steps, dtype="int32")

    def blend_in(self, training: Any) -> Any:
        """Return the blend of this call in the layer's compute dtype; advance the step in training.

        Raises:
            ScheduleError: in training, where `total_steps` is missing.
        """
        if training and self.total_steps is None:
            raise ScheduleError(
                f"'{self.name}' does not know how long the training is, so its blend has no schedule: give "
                "Schedule(total_steps=...), or fit with callbacks=[updp_tf.BlendSchedule()]."
            )
        blend = self._blend()
        if training:
            if self.learned and self.penalty:
                self.add_loss(self.penalty * ops.mean(blend))
            self.step.assign(self.step + 1)
        return ops.cast(blend, self.compute_dtype)

    def _blend(self) -> Any:
        step, begin, end = self.step + 0, self.window[0], self.window[1]
        length = ops.cast(ops.maximum(end - begin, 1), "float32")
        done = ops.clip(ops.cast(step - begin, "float32") / length, 0.0, 1.0)
        if self.learned:
            return ops.sigmoid(self.theta / ops.exp(done * math.log(COLDEST)))
        fallen = 1.0 - done if self.shape == "linear" else 0.5 * (1.0 + ops.cos(math.pi * done))
        # Exactly 0 and exactly `start` at the ends, whatever a cosine rounds to.
        return ops.where(step >= end, 0.0, ops.where(step <= begin, self.start, self.start * fallen))

    @property
    def blend(self) -> float:
        """The blend that the next call uses; the mean over channels where there is one for each."""
        return float(ops.convert_to_numpy(ops.mean(self._blend())))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape that is read; of several tensors, the first one's."""
        return input_shape[0] if isinstance(input_shape[0], list | tuple) else input_shape

    def get_config(self) -> dict[str, Any]:
        """Everything that the layer was made with."""
        names = ("begin", "end", "shape", "start", "total_steps", "learned", "per_channel", "penalty", "block", "site")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


class _Wrapping(Blend):
    """A blend layer that holds the stock layer whose place it takes."""

    def __init__(self, layer: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer = _restored(layer)

    def build(self, input_shape: Any) -> None:
        """Build the stock layer too."""
        super().build(input_shape)
        if not self.layer.built:
            self.layer.build(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "layer": keras.saving.serialize_keras_object(self.layer)}


def _restored(layer: Any) -> Any:
    """Return a layer as it is, or made from its serialized form."""
    return keras.saving.deserialize_keras_object(layer) if isinstance(layer, Mapping) else layer


def _mixed(blend: Any, old: Any, new: Any) -> Any:
    """Blend * old + (1 - blend) * new in the blend's dtype: at blend 1 exactly `old`, at 0 exactly `new`."""
    return blend * ops.cast(old, blend.dtype) + (1 - blend) * ops.cast(new, blend.dtype)


@keras.saving.register_keras_serializable(PACKAGE)
class ActivationBlend(_Wrapping):
    """An activation that becomes a line per channel, or another activation: y = blend f(x) + (1 - blend) (a x + c).

    Args:
        layer: the activation layer that was there.
        target: layer of the activation that it becomes; a line with trainable slope and offset where None.
    """

    def __init__(self, layer: Any, target: Any = None, **kwargs: Any) -> None:
        super().__init__(layer, **kwargs)
        self.target = _restored(target)

    def build(self, input_shape: Any) -> None:
        """Make slope (1) and offset (0) of every channel."""
        super().build(input_shape)
        if self.target is None:
            channels = int(input_shape[-1])
            self.slope = self.add_weight(name="slope", shape=(channels,), initializer="ones")
            self.offset = self.add_weight(name="offset", shape=(channels,), initializer="zeros")

    def call(self, x: Any, training: Any = None) -> Any:
        """Return the blend of the activation and what takes its place, element by element."""
        blend = self.blend_in(training)
        if self.target is not None:
            return _mixed(blend, self.layer(x), self.target(x))
        # Blended channel by channel first: one pass less over the tensor.
        slope, offset = ((1 - blend) * ops.cast(one, blend.dtype) for one in (self.slope, self.offset))
        return blend * ops.cast(self.layer(x), blend.dtype) + (slope * x + offset)

    def get_config(self) -> dict[str, Any]:
        """Everything that the layer was made with."""
        target = None if self.target is None else keras.saving.serialize_keras_object(self.target)
        return {**super().get_config(), "target": target}


@keras.saving.register_keras_serializable(PACKAGE)
class NormBlend(_Wrapping):
    """A per-image normalization that becomes affine: its 1 / sigma(x) is blended into a constant `rate` per channel.

    y = blend norm(x) + (1 - blend) (rate (x - mean(x)) gamma + beta), which is (blend / sigma + (1 - blend) rate) times
    what both share. The mean of a LayerNormalization over the channels is linear and stays; that of a
    GroupNormalization is over space too, so a constant `centre` per channel takes its place. An RMSNormalization has
    none.

    Args:
        layer: the LayerNormalization (over the last axis), GroupNormalization or RMSNormalization that was there.
    """

    @property
    def has_centre(self) -> bool:
        """True where a constant takes the place of the mean."""
        return isinstance(self.layer, keras.layers.GroupNormalization)

    def build(self, input_shape: Any) -> None:
        """Make the rate (1) of every channel, and the centre (0)."""
        super().build(input_shape)
        channels = int(input_shape[-1])
        self.rate = self.add_weight(name="rate", shape=(channels,), initializer="ones")
        if self.has_centre:
            self.centre = self.add_weight(name="centre", shape=(channels,), initializer="zeros")

    def call(self, x: Any, training: Any = None) -> Any:
        """Return the blend of the stock normalization and its affine stand-in."""
        blend = self.blend_in(training)
        gamma, beta = (ops.cast(part, self.compute_dtype) for part in gamma_and_beta(self.layer))
        return _mixed(blend, self.layer(x), self.rate * self.centred(x) * gamma + beta)

    def centred(self, x: Any) -> Any:
        """Return the input less what the affine stand-in takes as its mean."""
        if self.has_centre:
            return x - self.centre
        if isinstance(self.layer, keras.layers.LayerNormalization):
            return x - ops.mean(x, axis=-1, keepdims=True)
        return x


@keras.saving.register_keras_serializable(PACKAGE)
class NormToBatch(_Wrapping):
    """A per-image normalization that becomes a BatchNormalization: y = blend norm(x) + (1 - blend) BN(x).

    Args:
        layer: the normalization that was there.
        target: the BatchNormalization, its statistics, gamma and beta calibrated first.
    """

    def __init__(self, layer: Any, target: Any, **kwargs: Any) -> None:
        super().__init__(layer, **kwargs)
        self.target = _restored(target)

    def build(self, input_shape: Any) -> None:
        """Build both normalizations."""
        super().build(input_shape)
        if not self.target.built:
            self.target.build(input_shape)

    def call(self, x: Any, training: Any = None) -> Any:
        """Return the blend of both normalizations."""
        blend = self.blend_in(training)
        return _mixed(blend, self.layer(x), self.target(x, training=training))

    def get_config(self) -> dict[str, Any]:
        """Everything that the layer was made with."""
        return {**super().get_config(), "target": keras.saving.serialize_keras_object(self.target)}


@keras.saving.register_keras_serializable(PACKAGE)
class TapsBlend(_Wrapping):
    """A convolution whose off-centre taps are multiplied by blend, so that it becomes a 1x1 convolution.

    Two k x k kernels in a row then compose to one k x k kernel instead of a (2 k - 1) x (2 k - 1) one.

    Args:
        layer: a Conv2D or DepthwiseConv2D with odd kernel sizes and no activation.
    """

    def call(self, x: Any, training: Any = None) -> Any:
        """Return the convolution with the blended kernel."""
        blend = self.blend_in(training)
        kernel = ops.cast(self.layer.kernel, self.compute_dtype)
        height, width = kernel.shape[:2]
        centre = np.zeros((height, width, 1, 1), "float32")
        centre[height // 2, width // 2] = 1.0
        kernel = kernel * _mixed(blend, 1.0, ops.cast(centre, self.compute_dtype))
        is_depthwise = isinstance(self.layer, keras.layers.DepthwiseConv2D)
        y = (ops.depthwise_conv if is_depthwise else ops.conv)(
            x,
            kernel,
            strides=self.layer.strides,
            padding=self.layer.padding,
            data_format=self.layer.data_format,
            dilation_rate=self.layer.dilation_rate,
        )
        return y + ops.cast(self.layer.bias, self.compute_dtype) if self.layer.use_bias else y

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The convolution's."""
        return self.layer.compute_output_shape(input_shape)


@keras.saving.register_keras_serializable(PACKAGE)
class TailBlend(_Wrapping):
    """An activation put in behind a merged block, which starts as the identity: y = blend x + (1 - blend) f(x).

    Args:
        layer: the activation.
    """

    def call(self, x: Any, training: Any = None) -> Any:
        """Return the blend of the identity and the activation."""
        return _mixed(self.blend_in(training), x, self.layer(x))


@keras.saving.register_keras_serializable(PACKAGE)
class GateBlend(Blend):
    """A gate on channels (squeeze-excite) that becomes constant: y = x (blend gate + (1 - blend) mean).

    Reads [x, gate]; `mean` is a trainable number per channel.
    """

    def build(self, input_shape: Any) -> None:
        """Make the mean gate (1) of every channel."""
        super().build(input_shape)
        self.mean = self.add_weight(name="mean", shape=(int(input_shape[0][-1]),), initializer="ones")

    def call(self, inputs: Any, training: Any = None) -> Any:
        """Return the gated tensor."""
        x, gate = inputs
        return x * _mixed(self.blend_in(training), gate, self.mean)


@keras.saving.register_keras_serializable(PACKAGE)
class BorderRing(Blend):
    """The pixels around an image that linear padding will show to the next layer, times 1 - blend.

    Where all padding is moved to the front of a block, tensors inside are larger by a ring. At blend 1 the ring is 0,
    as the next layer's own padding was; at blend 0 it is what the linear map writes there: the block merges exactly.

    Args:
        ring: width of the ring in pixels: top, bottom, left, right.

    Source: METHOD section 1, borders, (b).
    """

    def __init__(self, ring: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ring = _four(ring)

    def call(self, x: Any, training: Any = None) -> Any:
        """Return the tensor with its ring faded in."""
        inside = _ringed(ops.ones_like(_interior(x, self.ring)[:1, ..., :1]), self.ring)
        # 1 inside, 1 - blend in the ring: one pass over the tensor.
        return x * (1 - self.blend_in(training) * (1 - inside))

    def get_config(self) -> dict[str, Any]:
        """Everything that the layer was made with."""
        return {**super().get_config(), "ring": list(self.ring)}


@keras.saving.register_keras_serializable(PACKAGE)
class InteriorNormalization(keras.layers.BatchNormalization):
    """A BatchNormalization that takes its statistics from the pixels inside a ring, and normalizes all.

    Args:
        ring: width of the ring in pixels: top, bottom, left, right.
    """

    def __init__(self, ring: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ring = _four(ring)

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        """Normalize; in training by the statistics of the interior."""
        if not (training and self.trainable):
            return super().call(inputs, training=training)
        if self.renorm:
            inside = ops.ones_like(_interior(inputs, self.ring)[..., :1], dtype="float32")
            return super().call(inputs, training=training, mask=_ringed(inside, self.ring)[..., 0] > 0)
        # A mask would take Keras five passes over the tensor, and as many back; sums with weights are products.
        x = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
        inside = _ringed(ops.ones_like(_interior(x, self.ring)[:1, ..., :1]), self.ring)
        weights = ops.reshape(inside, (1, -1)) / (ops.sum(inside) * ops.cast(ops.shape(x)[0], x.dtype))

        def mean_of(y: Any) -> Any:
            return ops.sum(ops.matmul(weights, ops.reshape(y, (ops.shape(y)[0], -1, y.shape[-1]))), axis=(0, 1))

        mean = mean_of(x)
        centred = x - mean
        variance = mean_of(ops.square(centred))
        for moving, now in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(ops.cast(moving, x.dtype) * self.momentum + now * (1.0 - self.momentum))
        rate = ops.rsqrt(variance + self.epsilon)
        normalized = centred * (rate * ops.cast(self.gamma, x.dtype) if self.scale else rate)
        normalized = normalized + ops.cast(self.beta, x.dtype) if self.center else normalized
        return ops.cast(normalized, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Everything that the layer was made with."""
        return {**super().get_config(), "ring": list(self.ring)}


@keras.saving.register_keras_serializable(PACKAGE)
class BlockBlend(Blend):
    """A whole block and the form that takes its place: y = blend block(x) + (1 - blend) form(x).

    Reads [what the block writes, what the form writes].
    """

    def call(self, inputs: Any, training: Any = None) -> Any:
        """Return the blend of both."""
        old, new = inputs
        return _mixed(self.blend_in(training), old, new)


def gamma_and_beta(norm: Any) -> tuple[Any, Any]:
    """Return scale and offset of a per-image normalization, 1 and 0 where it has none."""
    if isinstance(norm, keras.layers.RMSNormalization):
        return norm.scale, 0.0
    return norm.gamma if norm.scale else 1.0, norm.beta if norm.center else 0.0


def gamma_and_beta_arrays(norm: Any, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the same as float64 arrays, one number for each channel."""
    gamma, beta = (np.asarray(ops.convert_to_numpy(one), np.float64) for one in gamma_and_beta(norm))
    return np.broadcast_to(gamma, (channels,)), np.broadcast_to(beta, (channels,))


def _four(values: Sequence[int]) -> Pads:
    top, bottom, left, right = (int(one) for one in values)
    return top, bottom, left, right


def _interior(x: Any, ring: Pads) -> Any:
    top, bottom, left, right = ring
    return x[:, top : -bottom or None, left : -right or None]


def _ringed(x: Any, ring: Pads) -> Any:
    top, bottom, left, right = ring
    return ops.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
