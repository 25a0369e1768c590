"""What this package knows of each Keras layer kind: one readable table per concern.

`LINEAR` turns a layer into linear maps, `NORMS` tells what a normalization does at inference, `ACTIVATIONS` names
element-wise functions, `PASSIVE` lists what does nothing at inference, `MACS` counts multiplications. Tables are read
by `Node.kind`: the class name of a stock Keras layer, the full name of any other.

`register_linear` and `register_activation` add rules for layers of one's own. What such a rule says is compared with
what the layer does, when a model with one is read for the first time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np

from updp_tf import _keras, affine
from updp_tf.activations import Activation, OwnActivation, make_activation
from updp_tf.affine import AffineConv
from updp_tf.errors import RuleError, ShapeError
from updp_tf.structure import Node, Ref, Shape, map_refs


class Unsupported(Exception):
    """What a rule raises for a layer whose configuration it does not cover; the message is the reason.

    It reads on from the layer's name: "pads with reflections". The layer then counts as unknown.
    """


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
    """Return the linear maps of a call on an NHWC tensor, in order, or None if its kind is not linear.

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
    maps = rule(node.layer, input_shape)
    if node.kind in _own:
        _check_linear(node, input_shape, maps)
    return maps


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


def _layer_scale(layer: Any, shape: Shape) -> tuple[AffineConv, ...]:
    scale = as_array(layer.gamma)
    return (affine.from_scale(scale, np.zeros_like(scale)),)


def _zero_padding2d(layer: Any, shape: Shape) -> tuple[AffineConv, ...]:
    (top, bottom), (left, right) = layer.padding
    return (affine.from_padding(int(shape[-1] or 0), (top, bottom, left, right)),)


LINEAR: dict[str, Callable[[Any, Shape], tuple[AffineConv, ...]]] = {
    "Conv2D": _conv2d,
    "DepthwiseConv2D": _depthwise_conv2d,
    "SeparableConv2D": _separable_conv2d,
    "Dense": _dense,
    "LayerScale": _layer_scale,  # of the ConvNeXts in keras.applications
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


def preprocessing(node: Node, channels: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return scale and shift, each of shape (channels,), of a call that prepares images, or None if it is none.

    Raises:
        Unsupported: it does not treat all pixels alike.
    """
    rule = PREPROCESSING.get(node.kind)
    if rule is None:
        return None
    parts = [np.asarray(part, dtype=np.float64) for part in rule(node.layer)]
    if any(part.size not in (1, part.shape[-1] if part.ndim else 1) for part in parts):
        raise Unsupported("does not treat all pixels alike")
    scale, shift = (np.broadcast_to(part.reshape(-1), (channels,)) for part in parts)
    return scale, shift


def _rescaling(layer: Any) -> tuple[Any, Any]:
    return layer.scale, layer.offset


def _normalization(layer: Any) -> tuple[Any, Any]:
    mean, std = as_array(layer.mean), np.maximum(np.sqrt(as_array(layer.variance)), keras.config.epsilon())
    return (std, mean) if layer.invert else (1.0 / std, -mean / std)


PREPROCESSING: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "Rescaling": _rescaling,
    "Normalization": _normalization,
}


def activation(node: Node) -> Activation | None:
    """Return the element-wise function a call applies, or None if its kind is no activation.

    Raises:
        Unsupported: an activation this package has no description of.
    """
    rule = ACTIVATIONS.get(node.kind)
    if rule is None:
        return None
    found = rule(node.layer)
    applied = getattr(node.layer, "activation", None)
    if node.kind in _own or is_own_activation(applied):
        _check_activation(node, found)
    return found


def activation_of(layer: Any) -> Activation | None:
    """Return the element-wise function of an activation layer, None if it has no rule."""
    rule = ACTIVATIONS.get(kind_of(layer))
    return None if rule is None else rule(layer)


def kind_of(layer: Any) -> str:
    """Return the kind that a node of a layer has."""
    return _keras.kind_of(type(layer))


def named(name: str, **parameters: float) -> Activation:
    """Return a function by its name in `keras.activations`.

    Raises:
        Unsupported: there is no rule for it.
    """
    known = make_activation(name, **parameters)
    if known is None:
        raise Unsupported(f"applies '{name}', which has no rule")
    return known


def _activation_layer(layer: Any) -> Activation:
    function = layer.activation
    if is_own_activation(function):
        return _own_functions[function](function)
    if (rule := ACTIVATIONS.get(_keras.kind_of(type(function)))) is not None:
        return rule(function)  # a layer given as activation: Conv2D(..., activation=LeakyReLU())
    return named(getattr(function, "__name__", type(function).__name__))


def _relu(layer: Any) -> Activation:
    parameters = {
        "negative_slope": float(layer.negative_slope),
        "threshold": float(layer.threshold),
        "max_value": float("inf") if layer.max_value is None else float(layer.max_value),
    }
    return named("relu", **parameters)


ACTIVATIONS: dict[str, Callable[[Any], Activation]] = {
    "Activation": _activation_layer,
    "ReLU": _relu,
    "LeakyReLU": lambda layer: named("leaky_relu", negative_slope=float(layer.negative_slope)),
    "ELU": lambda layer: named("elu", alpha=float(layer.alpha)),
    "Relu": lambda layer: named("relu"),
    "Relu6": lambda layer: named("relu6"),
    "Silu": lambda layer: named("silu"),
    "Sigmoid": lambda layer: named("sigmoid"),
    "Tanh": lambda layer: named("tanh"),
    "HardSigmoid": lambda layer: named("hard_sigmoid"),
    "HardSilu": lambda layer: named("hard_silu"),
    "Gelu": lambda layer: named("gelu", approximate=float(layer.approximate)),
}

AUGMENTATIONS = frozenset(
    {
        "AugMix",
        "CutMix",
        "MixUp",
        "RandAugment",
        "RandomBrightness",
        "RandomColorDegeneration",
        "RandomColorJitter",
        "RandomContrast",
        "RandomElasticTransform",
        "RandomErasing",
        "RandomFlip",
        "RandomGaussianBlur",
        "RandomGrayscale",
        "RandomHue",
        "RandomInvert",
        "RandomPerspective",
        "RandomPosterization",
        "RandomRotation",
        "RandomSaturation",
        "RandomSharpness",
        "RandomShear",
        "RandomTranslation",
        "RandomZoom",
        "Solarization",
    }
)
"""Passive kinds that take it for granted that they are in training: Keras records so on each of their calls."""

PASSIVE = AUGMENTATIONS | {
    "ActivityRegularization",
    "AlphaDropout",
    "Dropout",
    "GaussianDropout",
    "GaussianNoise",
    "Identity",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "StochasticDepth",  # of the ConvNeXts in keras.applications
    "keras_cv.src.layers.regularization.drop_path.DropPath",
    "keras_cv.src.layers.regularization.dropblock_2d.DropBlock2D",
    "keras_hub.src.models.mit.mit_layers.DropPath",
    "keras_hub.src.models.swin_transformer.swin_transformer_layers.DropPath",
}
"""Kinds that return their input unchanged at inference."""

# Rules of the user's

LinearRule = Callable[[Any, Shape], tuple[AffineConv, ...]]
ActivationRule = Callable[[Any], "Activation | str | Callable[[np.ndarray], np.ndarray]"]

_own: dict[str, str] = {}
"""Name of the rule by the kind it was registered for."""

_own_functions: dict[Callable[..., Any], Callable[[Any], Activation]] = {}

_checked: WeakKeyDictionary[Any, set[tuple[str, Shape]]] = WeakKeyDictionary()
"""Layers whose rules were compared with what they do, with the kinds and shapes that were."""

RULE_TOLERANCE = 1e-4
"""Largest difference of a rule from its float32 layer, relative to the largest output."""


def register_linear(layer_type: type, rule: LinearRule) -> None:
    """Tell what linear map a layer of one's own is, so that blocks with one inside can be merged.

    Args:
        layer_type: the layer's class; a stock Keras layer has its rule already.
        rule: called as `rule(layer, input_shape)` with a built layer and (batch, height, width, channels), `None`
            where dynamic. Returns the maps in order, `()` for a layer that does nothing at inference; raises
            `updp_tf.Unsupported("why")` for a configuration it does not cover.

    Raises:
        RuleError: `layer_type` is no class of layers or has a rule, or `rule` cannot be called with two arguments.
            Also when a model is read where the rule does not return what the layer computes.

    Example:
        >>> def scaled_dense(layer, input_shape):
        ...     kernel = keras.ops.convert_to_numpy(layer.kernel) * layer.factor
        ...     return (updp_tf.AffineConv(kernel[None, None], np.zeros(kernel.shape[1])),)
        >>> updp_tf.register_linear(ScaledDense, scaled_dense)
    """
    kind = _new_kind(layer_type, rule, n_arguments=2)
    _own[kind] = rule_name(rule)
    LINEAR[kind] = rule
    MACS[kind] = lambda node, read: (
        sum(one.kernel.size for one in rule(node.layer, read[0])) * _positions(node.shapes[0])
    )


def register_activation(target: Any, rule: ActivationRule) -> None:
    """Tell what element-wise function a layer or a function of one's own is.

    Args:
        target: a layer's class, or the function given to layers as `activation`.
        rule: called as `rule(layer)` or `rule(function)`. Returns the name of a function in `keras.activations`, an
            `updp_tf.activations.Activation`, or a NumPy function of float64 arrays; raises `updp_tf.Unsupported("why")`
            for a configuration it does not cover.

    Raises:
        RuleError: `target` is neither, or has a rule, or `rule` cannot be called with one argument. Also when a model
            is read where the rule does not return what the layer computes.

    Example:
        >>> updp_tf.register_activation(my_squared_relu, lambda function: lambda z: np.maximum(z, 0) ** 2)
        >>> updp_tf.register_activation(Shrink, lambda layer: "hard_tanh")
    """
    if isinstance(target, type):
        kind = _new_kind(target, rule, n_arguments=1)
        _own[kind] = rule_name(rule)
        ACTIVATIONS[kind] = lambda layer: _as_activation(rule(layer), kind, rule)
        return
    if not callable(target) or isinstance(target, keras.layers.Layer):
        raise RuleError(f"An activation is a class of layers or a function. Received: {target!r}")
    if target in _own_functions or make_activation(getattr(target, "__name__", "")) is not None:
        raise RuleError(f"The activation '{rule_name(target)}' has a rule already.")
    check_callable(rule, n_arguments=1)
    _own_functions[target] = lambda function: _as_activation(rule(function), rule_name(target), rule)


def is_own_activation(function: Any) -> bool:
    """True for a function that `register_activation` was given."""
    return any(function is one for one in _own_functions)


def is_known(node: Node) -> bool:
    """True for stock Keras layers, and for others that have a rule."""
    tables: tuple[Any, ...] = (LINEAR, NORMS, ACTIVATIONS, PASSIVE)
    return "." not in node.kind or any(node.kind in table for table in tables)


def why_unknown(node: Node) -> str:
    """Return why a call has no linear rule, to be read on from the layer's name."""
    if "." not in node.kind:
        return f"is a {node.kind}, which has no linear rule"
    return (
        f"is a {node.kind}, a layer that is not Keras' own; say what it does with updp_tf.register_linear, "
        "register_activation or register_expansion"
    )


def _new_kind(layer_type: Any, rule: Any, *, n_arguments: int) -> str:
    if not (isinstance(layer_type, type) and issubclass(layer_type, keras.Operation)):
        raise RuleError(f"A rule is registered for a class of Keras layers. Received: {layer_type!r}")
    kind = _keras.kind_of(layer_type)
    if "." not in kind:
        raise RuleError(f"'{kind}' is Keras' own; rules are registered for other classes.")
    if any(kind in table for table in (LINEAR, ACTIVATIONS, NORMS, PASSIVE)):
        raise RuleError(f"'{kind}' has a rule already.")
    check_callable(rule, n_arguments=n_arguments)
    return kind


def check_callable(rule: Any, *, n_arguments: int) -> None:
    """Raise a `RuleError` if a rule cannot be called with that many positional arguments."""
    try:
        inspect.signature(rule).bind(*range(n_arguments))
    except (TypeError, ValueError) as error:
        raise RuleError(
            f"The rule {rule!r} must be callable with {n_arguments} positional argument(s): {error}"
        ) from error


def rule_name(rule: Any) -> str:
    """Name of a rule or function for messages."""
    return getattr(rule, "__qualname__", None) or repr(rule)


def _as_activation(found: Any, name: str, rule: Any) -> Activation:
    if isinstance(found, Activation):
        return found
    if isinstance(found, str):
        return named(found)
    if callable(found):
        return OwnActivation(name, own=found)
    raise RuleError(
        f"The rule '{rule_name(rule)}' of '{name}' must return a name, an Activation or a function of arrays. "
        f"Received: {found!r}"
    )


def _check_linear(node: Node, shape: Shape, maps: Any) -> None:
    """Raise if the maps of a user's rule are not what the layer computes; each layer and shape is compared once."""

    def wrong(why: str) -> RuleError:
        return RuleError(f"The rule '{_own[node.kind]}' of '{node.kind}' is wrong for '{node.name}': {why}")

    if not isinstance(maps, tuple) or not all(isinstance(one, AffineConv) for one in maps):
        raise wrong(f"it must return a tuple of AffineConv. Received: {maps!r}")

    def predict(x: np.ndarray) -> np.ndarray:
        for one in maps:
            try:
                x = affine.apply(one, x)
            except ShapeError as error:
                raise wrong(str(error)) from error
        return x

    _compare(node, shape, predict, wrong)


def _check_activation(node: Node, function: Activation) -> None:
    name = _own.get(node.kind) or rule_name(node.layer.activation)

    def wrong(why: str) -> RuleError:
        return RuleError(f"The rule '{name}' of '{node.kind}' is wrong for '{node.name}': {why}")

    _compare(node, node.shapes[0], function, wrong)


def _compare(
    node: Node, shape: Shape, predict: Callable[[np.ndarray], np.ndarray], wrong: Callable[[str], RuleError]
) -> None:
    done = _checked.setdefault(node.layer, set())
    if (node.kind, shape) in done:
        return
    # Odd and even sizes where they are dynamic; wide enough for the kinks of any activation.
    sizes = [axis or (16 + index) for index, axis in enumerate(shape[1:])]
    x = 3 * np.random.default_rng(0).normal(size=(1, *sizes))
    x = x.astype("float32")
    args, kwargs = (map_refs(data, lambda _: x) for data in (node.args, dict(node.kwargs)))
    want = as_array(node.layer(*args, **kwargs))
    have = np.asarray(predict(x.astype(np.float64)))
    if have.shape != want.shape:
        raise wrong(f"it returns a tensor of shape {have.shape}, the layer one of {want.shape}.")
    error = np.abs(have - want).max() / max(np.abs(want).max(), np.finfo(np.float32).tiny)
    half = "16" in str(getattr(node.layer, "compute_dtype", "float32"))
    if not error <= (2e-2 if half else RULE_TOLERANCE):
        raise wrong(f"its values differ from the layer's by {error:.1e}, relative to the largest.")
    done.add((node.kind, shape))


SPLITTABLE = frozenset({"Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense"})
"""Linear kinds that may apply an activation of their own."""


def is_passive(node: Node) -> bool:
    """True if the call returns its input unchanged at inference."""
    if node.kwargs.get("training") and node.kind not in AUGMENTATIONS:
        return False
    return node.kind in PASSIVE or (node.kind == "Activation" and node.layer.activation is keras.activations.linear)


def macs(node: Node, input_shapes: tuple[Shape, ...]) -> int:
    """Multiply-accumulates of one call for one image; element-wise work and pooling count as none.

    Dynamic axes count as 1.
    """
    rule = MACS.get(node.kind)
    return 0 if rule is None else rule(node, input_shapes)


def _size(axes: Iterable[int | None]) -> int:
    return int(np.prod([axis or 1 for axis in axes], dtype=np.int64))


def _positions(shape: Shape) -> int:
    return _size(shape[1:-1])


def _weight_macs(node: Node, read: Sequence[Shape]) -> int:
    return _size(node.layer.kernel.shape) * _positions(node.shapes[0])


def _separable_macs(node: Node, read: Sequence[Shape]) -> int:
    weights = _size(node.layer.depthwise_kernel.shape) + _size(node.layer.pointwise_kernel.shape)
    return weights * _positions(node.shapes[0])


def _transpose_macs(node: Node, read: Sequence[Shape]) -> int:
    return _size(node.layer.kernel.shape) * _positions(read[0])


def _matmul_macs(node: Node, read: Sequence[Shape]) -> int:
    return _size(node.shapes[0][1:]) * int(read[0][-1] or 1)


def _einsum_dense_macs(node: Node, read: Sequence[Shape]) -> int:
    return _combinations(node.layer.equation, (read[0], tuple(node.layer.kernel.shape)))


def _einsum_macs(node: Node, read: Sequence[Shape]) -> int:
    shapes = dict(zip(node.inputs, read, strict=True))
    operands = [shapes[one] if isinstance(one, Ref) else tuple(np.shape(one)) for one in node.args]
    return _combinations(node.layer.subscripts, operands)


def _combinations(equation: str, shapes: Sequence[Shape]) -> int:
    """How often an einsum multiplies: once for every combination of its indices, but for the batch's."""
    operands, _ = einsum_letters(equation, [len(shape) for shape in shapes])
    sizes: dict[str, int] = {}
    for letters, shape in zip(operands, shapes, strict=True):
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = max(size or 1, sizes.get(letter, 1))
    sizes.pop(operands[0][0])
    return _size(sizes.values())


def einsum_letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Return the letters of every operand's axes and of the result's, an ellipsis written out in capitals."""
    reads, arrow, written = equation.replace(" ", "").partition("->")
    operands = reads.split(",")
    if not arrow:
        letters = reads.replace("...", "").replace(",", "")
        written = "..." * ("..." in reads) + "".join(sorted(one for one in letters if letters.count(one) == 1))
    n_more = [rank - len(one.replace("...", "")) for one, rank in zip(operands, ranks, strict=True)]
    more = "ABCDEFGH"[: max(n_more)]
    # the axes of an ellipsis broadcast from the last one on
    written_out = [one.replace("...", more[len(more) - n :]) for one, n in zip(operands, n_more, strict=True)]
    return written_out, written.replace("...", more)


def _attention_macs(node: Node, read: Sequence[Shape]) -> int:
    """Projections of queries and of keys, then a score and a share of the value for each pair of them."""
    layer = node.layer
    queries, keys = _positions(read[0]), _positions(read[min(1, len(read) - 1)])
    by_query = _size(layer.query_dense.kernel.shape) + _size(layer.output_dense.kernel.shape)
    by_key = _size(layer.key_dense.kernel.shape) + _size(layer.value_dense.kernel.shape)
    head_dims = int(layer.key_dim) + int(layer.value_dim)
    return by_query * queries + by_key * keys + int(layer.num_heads) * head_dims * queries * keys


MACS: dict[str, Callable[[Node, Sequence[Shape]], int]] = {
    "Conv1D": _weight_macs,
    "Conv2D": _weight_macs,
    "Conv2DTranspose": _transpose_macs,
    "Dense": _weight_macs,
    "DepthwiseConv1D": _weight_macs,
    "DepthwiseConv2D": _weight_macs,
    "Einsum": _einsum_macs,
    "EinsumDense": _einsum_dense_macs,
    "Matmul": _matmul_macs,
    "MultiHeadAttention": _attention_macs,
    "SeparableConv1D": _separable_macs,
    "SeparableConv2D": _separable_macs,
}
