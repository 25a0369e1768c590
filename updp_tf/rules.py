"""What this package knows of each Keras layer kind: one readable table per concern.

`LINEAR` turns a layer into linear maps, `NORMS` tells what a normalization does at inference, `ACTIVATIONS` names
element-wise functions, `PASSIVE` lists what does nothing at inference, `MACS` counts multiplications.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from updp_tf import affine
from updp_tf.activations import Activation, make_activation
from updp_tf.affine import AffineConv
from updp_tf.structure import Node, Shape


class Unsupported(Exception):
    """A layer whose rule does not cover this configuration; the message is the reason. Never leaves this package."""


@dataclass(frozen=True, eq=False)
class Norm:
    """What a normalization does at inference: `scale * x + shift`, and the moments of what it writes."""

    scale: np.ndarray
    shift: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def as_array(variable: Any) -> np.ndarray:
    """Return a Keras variable as a float64 array."""
    return np.asarray(keras.ops.convert_to_numpy(variable), dtype=np.float64)


def linear_maps(node: Node, input_shape: Shape) -> tuple[AffineConv, ...] | None:
    """Return the linear maps of a call on an NHWC tensor, or None if its kind is not linear.

    Raises:
        Unsupported: the kind is linear but this configuration is not covered.
    """
    rule = LINEAR.get(node.kind)
    if rule is None:
        return None
    if len(input_shape) != 4:
        raise Unsupported(f"reads a tensor of rank {len(input_shape)}, not images (batch, height, width, channels)")
    if getattr(node.layer, "activation", None) not in (None, keras.activations.linear):
        raise Unsupported("applies an activation of its own")
    if getattr(node.layer, "data_format", "channels_last") != "channels_last":
        raise Unsupported("is channels_first")
    if getattr(node.layer, "lora_enabled", False) or getattr(node.layer, "quantization_mode", None):
        raise Unsupported("has quantized or LoRA weights")
    return rule(node.layer, input_shape)


def _same_padding(layer: Any, shape: Shape) -> tuple[int, int, int, int]:
    pads: list[int] = []
    for axis in (0, 1):
        extent = layer.dilation_rate[axis] * (layer.kernel_size[axis] - 1) + 1
        stride, size = layer.strides[axis], shape[1 + axis]
        if stride == 1 or extent == 1:
            total = extent - 1
        elif size is None:
            # How much 'same' pads before the image depends on its size.
            raise Unsupported("pads 'same' with strides on a dynamic size; give the input a fixed size")
        else:
            total = max((-(-size // stride) - 1) * stride + extent - size, 0)
        pads += [total // 2, total - total // 2]
    return pads[0], pads[1], pads[2], pads[3]


def _padding(layer: Any, shape: Shape) -> tuple[int, int, int, int]:
    if layer.padding == "same":
        return _same_padding(layer, shape)
    if layer.padding == "valid":
        return (0, 0, 0, 0)
    raise Unsupported(f"has padding '{layer.padding}'")


def _bias(layer: Any, channels: int) -> np.ndarray:
    return as_array(layer.bias) if layer.use_bias else np.zeros(channels)


def _conv2d(layer: Any, shape: Shape) -> tuple[AffineConv, ...]:
    return (
        AffineConv(
            as_array(layer.kernel),
            _bias(layer, layer.filters),
            strides=tuple(layer.strides),
            dilation_rate=tuple(layer.dilation_rate),
            groups=layer.groups,
            padding=_padding(layer, shape),
        ),
    )


def _depthwise(layer: Any, shape: Shape, kernel: np.ndarray, bias: np.ndarray) -> AffineConv:
    return affine.from_depthwise(
        kernel,
        bias,
        strides=tuple(layer.strides),
        dilation_rate=tuple(layer.dilation_rate),
        padding=_padding(layer, shape),
    )


def _depthwise_conv2d(layer: Any, shape: Shape) -> tuple[AffineConv, ...]:
    kernel = as_array(layer.kernel)
    return (_depthwise(layer, shape, kernel, _bias(layer, kernel.shape[2] * kernel.shape[3])),)


def _separable_conv2d(layer: Any, shape: Shape) -> tuple[AffineConv, ...]:
    kernel = as_array(layer.depthwise_kernel)
    depthwise = _depthwise(layer, shape, kernel, np.zeros(kernel.shape[2] * kernel.shape[3]))
    return depthwise, AffineConv(as_array(layer.pointwise_kernel), _bias(layer, layer.filters))


def _dense(layer: Any, shape: Shape) -> tuple[AffineConv, ...]:
    return (affine.from_dense(as_array(layer.kernel), _bias(layer, layer.units)),)


def _zero_padding2d(layer: Any, shape: Shape) -> tuple[AffineConv, ...]:
    (top, bottom), (left, right) = layer.padding
    return (affine.from_padding(int(shape[-1] or 0), (top, bottom, left, right)),)


LINEAR: dict[str, Callable[[Any, Shape], tuple[AffineConv, ...]]] = {
    "Conv2D": _conv2d,
    "DepthwiseConv2D": _depthwise_conv2d,
    "SeparableConv2D": _separable_conv2d,
    "Dense": _dense,
    "ZeroPadding2D": _zero_padding2d,
}


def norm(node: Node, input_shape: Shape) -> Norm | None:
    """Return what a normalization call does at inference, or None if its kind is none.

    Raises:
        Unsupported: a normalization that is not affine at inference.
    """
    rule = NORMS.get(node.kind)
    if rule is not None and node.kwargs.get("training"):
        raise Unsupported("normalizes by the statistics of each batch: it is called with training=True")
    return None if rule is None else rule(node.layer, input_shape)


def _batch_norm(layer: Any, shape: Shape) -> Norm:
    if layer.axis not in (-1, len(shape) - 1):
        raise Unsupported(f"normalizes axis {layer.axis}, not the channels")
    mean, variance = as_array(layer.moving_mean), as_array(layer.moving_variance)
    gamma = as_array(layer.gamma) if layer.scale else np.ones_like(mean)
    beta = as_array(layer.beta) if layer.center else np.zeros_like(mean)
    scale = gamma / np.sqrt(variance + layer.epsilon)
    return Norm(
        scale=scale,
        shift=beta - scale * mean,
        mean=beta,
        std=np.abs(gamma) * np.sqrt(variance / (variance + layer.epsilon)),
    )


def _not_affine(layer: Any, shape: Shape) -> Norm:
    raise Unsupported("normalizes by the statistics of each image, which is not linear")


NORMS: dict[str, Callable[[Any, Shape], Norm]] = {
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _not_affine,
    "GroupNormalization": _not_affine,
    "RMSNormalization": _not_affine,
    "UnitNormalization": _not_affine,
}


def activation(node: Node) -> Activation | None:
    """Return the element-wise function a call applies, or None if its kind is no activation.

    Raises:
        Unsupported: an activation this package has no description of.
    """
    rule = ACTIVATIONS.get(node.kind)
    return None if rule is None else rule(node.layer)


def _named(name: str, **parameters: float) -> Activation:
    known = make_activation(name, **parameters)
    if known is None:
        raise Unsupported(f"applies '{name}', which has no rule")
    return known


def _activation_layer(layer: Any) -> Activation:
    function = layer.activation
    if (rule := ACTIVATIONS.get(type(function).__name__)) is not None:
        return rule(function)  # a layer given as activation: Conv2D(..., activation=LeakyReLU())
    return _named(getattr(function, "__name__", type(function).__name__))


def _relu(layer: Any) -> Activation:
    parameters = {
        "negative_slope": float(layer.negative_slope),
        "threshold": float(layer.threshold),
        "max_value": float("inf") if layer.max_value is None else float(layer.max_value),
    }
    return _named("relu", **parameters)


ACTIVATIONS: dict[str, Callable[[Any], Activation]] = {
    "Activation": _activation_layer,
    "ReLU": _relu,
    "LeakyReLU": lambda layer: _named("leaky_relu", negative_slope=float(layer.negative_slope)),
    "ELU": lambda layer: _named("elu", alpha=float(layer.alpha)),
    "Relu": lambda layer: _named("relu"),
    "Relu6": lambda layer: _named("relu6"),
    "Silu": lambda layer: _named("silu"),
    "Sigmoid": lambda layer: _named("sigmoid"),
    "Tanh": lambda layer: _named("tanh"),
    "HardSigmoid": lambda layer: _named("hard_sigmoid"),
    "HardSilu": lambda layer: _named("hard_silu"),
    "Gelu": lambda layer: _named("gelu", approximate=float(layer.approximate)),
}

PASSIVE = frozenset(
    {
        "ActivityRegularization",
        "AlphaDropout",
        "Dropout",
        "GaussianDropout",
        "GaussianNoise",
        "Identity",
        "SpatialDropout2D",
    }
)
"""Kinds that return their input unchanged at inference."""

SPLITTABLE = frozenset({"Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense"})
"""Linear kinds that may apply an activation of their own."""


def is_passive(node: Node) -> bool:
    """True if the call returns its input unchanged at inference."""
    if node.kwargs.get("training"):
        return False
    return node.kind in PASSIVE or (node.kind == "Activation" and node.layer.activation is keras.activations.linear)


def macs(node: Node, input_shapes: tuple[Shape, ...]) -> int:
    """Multiply-accumulates of one call for one image; element-wise work and pooling count as none.

    Dynamic axes count as 1.
    """
    rule = MACS.get(node.kind)
    return 0 if rule is None else rule(node.layer, input_shapes[0], node.shapes[0])


def _positions(shape: Shape) -> int:
    return int(np.prod([axis or 1 for axis in shape[1:-1]], dtype=np.int64))


def _weight_macs(layer: Any, read: Shape, written: Shape) -> int:
    return int(np.prod(layer.kernel.shape)) * _positions(written)


def _separable_macs(layer: Any, read: Shape, written: Shape) -> int:
    weights = int(np.prod(layer.depthwise_kernel.shape)) + int(np.prod(layer.pointwise_kernel.shape))
    return weights * _positions(written)


def _transpose_macs(layer: Any, read: Shape, written: Shape) -> int:
    return int(np.prod(layer.kernel.shape)) * _positions(read)


def _attention_macs(layer: Any, read: Shape, written: Shape) -> int:
    tokens = _positions(written)
    projections = sum(int(np.prod(w.shape)) for w in layer.weights if len(w.shape) == 3) * tokens
    head_dims = int(layer.key_dim) + int(layer.value_dim)
    return projections + int(layer.num_heads) * head_dims * tokens * tokens


MACS: dict[str, Callable[[Any, Shape, Shape], int]] = {
    "Conv2D": _weight_macs,
    "DepthwiseConv2D": _weight_macs,
    "SeparableConv2D": _separable_macs,
    "Conv2DTranspose": _transpose_macs,
    "Dense": _weight_macs,
    "EinsumDense": _weight_macs,
    "MultiHeadAttention": _attention_macs,
}
