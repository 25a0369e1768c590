"""Rewrite a network, before its conversion, into what a `.tflite` runtime runs best. Runs in the worker process.

Each pass is named, exact up to rounding, and tells what it did. The graph is `updp_tf`'s, so that there is one reader
of Keras models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras
import numpy as np

from tflite_export.steps import Step
from updp_tf import rules
from updp_tf.affine import regroup
from updp_tf.errors import UpdpError
from updp_tf.folding import fold_into_readers, fold_norms_in
from updp_tf.graph import build_model, read_calls, read_graph
from updp_tf.structure import ModelGraph, Node, Ref, Refusal

Passed = tuple[ModelGraph, Sequence[str], Sequence[Refusal]]


@dataclass(frozen=True)
class Purpose:
    """What the file is for.

    Attributes:
        integer: whether activations will be integers.
        edgetpu: whether the Edge TPU's compiler has to take it.
        fold_input: whether input normalization is folded into the first layer.
    """

    integer: bool = False
    edgetpu: bool = False
    fold_input: bool = True


@dataclass(frozen=True)
class Pass:
    """A rewrite of the graph: what it is called, what it is for, and when it is run."""

    name: str
    run: Callable[[ModelGraph], Passed]
    wanted: Callable[[Purpose], bool] = lambda _: True


def clean_model(model: Any, purpose: Purpose) -> tuple[Any, tuple[Step, ...]]:
    """Return the rewritten model, or the model itself where nothing was to be done, and a record of each pass.

    Args:
        model: a Functional or Sequential Keras 3 model; it is not changed.
        purpose: what the file is for.
    """
    try:
        graph, steps = clean_graph(read_graph(model), purpose)
        return (build_model(graph) if any(step.done for step in steps) else model), steps
    except UpdpError as error:  # a layer that only loads whole, a nested subclassed model: converted as it is
        return model, (Step("clean", refused=((model.name, str(error)),)),)


def clean_graph(graph: ModelGraph, purpose: Purpose) -> tuple[ModelGraph, tuple[Step, ...]]:
    """Run the passes that a purpose wants; return the graph, and a record of each that found something."""
    steps: list[Step] = []
    for one in PASSES:
        if one.wanted(purpose):
            graph, done, refused = one.run(graph)
            if done or refused:
                steps.append(Step(one.name, tuple(done), tuple((item.site, item.reason) for item in refused)))
    return graph, tuple(steps)


# --- the passes -------------------------------------------------------------------------------------------------------


def _fold_norms(graph: ModelGraph) -> Passed:
    graph, folded = fold_norms_in(graph)
    return graph, folded, ()


def _fold_norms_before(graph: ModelGraph) -> Passed:
    """Norms in front of a layer that does not pad: the converter leaves a MUL and an ADD."""
    return fold_into_readers(graph, {"BatchNormalization"})


def _fold_input(graph: ModelGraph) -> Passed:
    return fold_into_readers(graph, rules.PREPROCESSING)


def _padding(graph: ModelGraph) -> Passed:
    """ZeroPadding2D in front of a 'valid' layer, where 'same' pads as much."""
    done, refused = [], []
    for name in [node.name for node in graph if node.kind == "ZeroPadding2D"]:
        node = graph.by_name[name]
        reason = _same_reader(graph, node)
        if isinstance(reason, str):
            refused.append(Refusal(name, "padding", reason))
            continue
        reader = reason
        config = reader.layer.get_config() | {"padding": "same"}
        layer = _rebuilt(type(reader.layer), config, graph.shape(node.inputs[0]), reader.layer.get_weights())
        merged = replace(reader, layer=layer, args=node.args, kwargs={})
        graph = graph.replace_site((name, reader.name), (merged,), Ref(reader.name), Ref(reader.name))
        done.append(name)
    return graph, done, refused


def _same_reader(graph: ModelGraph, node: Node) -> Node | str:
    """Return the only reader of a padding that 'same' stands for, or why there is none."""
    readers = graph.readers.get(Ref(node.name), ())
    if len(readers) != 1 or Ref(node.name) in graph.output_refs:
        return f"{len(readers)} layers read it"
    reader = graph.by_name[readers[0]]
    if reader.kind not in ("Conv2D", "DepthwiseConv2D", "SeparableConv2D"):
        return f"'{reader.name}', which reads it, is a {reader.kind}"
    if reader.layer.padding != "valid" or reader.name not in graph.called_once:
        return f"'{reader.name}' pads on its own, or is called more than once"
    if "channels_first" in (node.layer.data_format, reader.layer.data_format):
        return "it is channels_first"
    for axis, (before, after) in enumerate(node.layer.padding):
        size, stride = graph.shape(node.inputs[0])[1 + axis], reader.layer.strides[axis]
        extent = reader.layer.dilation_rate[axis] * (reader.layer.kernel_size[axis] - 1) + 1
        if size is None:
            return "its size is dynamic"
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
        # With as many outputs and as many zeros in front, the zeros behind are those that are read.
        if (size + before + after - extent) // stride + 1 != -(-size // stride) or before != total // 2:
            return f"'same' pads {(total // 2, total - total // 2)} on axis {axis}, this {(before, after)}"
    return reader


def _grouped_to_depthwise(graph: ModelGraph) -> Passed:
    """Conv2D(groups=channels): the same operator on some runtimes, and none at all on others."""
    done, refused = [], []
    for name in [one.name for one in graph]:
        node = graph.by_name[name]  # as a shared layer's first call has left it
        layer = node.layer
        if node.kind != "Conv2D" or layer.groups == 1 or layer.groups != graph.shape(node.inputs[0])[-1]:
            continue
        if layer.data_format != "channels_last" or len(set(layer.strides)) > 1:
            refused.append(Refusal(node.name, "grouped_to_depthwise", "its strides differ or it is channels_first"))
            continue
        config = _kept(layer, "strides", "padding", "data_format", "dilation_rate", "activation", "use_bias")
        height, width, _, filters = layer.kernel.shape
        shape = (height, width, layer.groups, filters // layer.groups)
        config |= {"kernel_size": layer.kernel_size, "depth_multiplier": shape[-1], "name": layer.name}
        kernel, *bias = layer.get_weights()
        made = _rebuilt(
            keras.layers.DepthwiseConv2D, config, graph.shape(node.inputs[0]), [kernel.reshape(shape), *bias]
        )
        graph = _with_layer(graph, node, made, "DepthwiseConv2D")
        done.append(node.name)
    return graph, done, refused


def _ungroup(graph: ModelGraph) -> Passed:
    """Other groups: the Edge TPU has none, so zeros connect the channels that did not meet."""
    done = []
    for name in [one.name for one in graph]:
        node = graph.by_name[name]  # as a shared layer's first call has left it
        layer = node.layer
        if node.kind != "Conv2D" or layer.groups == 1 or layer.data_format != "channels_last":
            continue
        (one,) = rules.LINEAR["Conv2D"](layer, graph.shape(node.inputs[0]))
        kernel, *bias = layer.get_weights()
        made = _rebuilt(
            type(layer),
            layer.get_config() | {"groups": 1},
            graph.shape(node.inputs[0]),
            [regroup(one, 1).kernel.astype(kernel.dtype), *bias],
        )
        graph = _with_layer(graph, node, made, "Conv2D")
        done.append(node.name)
    return graph, done, ()


def _dense_to_conv(graph: ModelGraph) -> Passed:
    """Dense on an image: a newer version of FULLY_CONNECTED than the Edge TPU's compiler reads."""
    done = []
    for name in [one.name for one in graph]:
        node = graph.by_name[name]  # as a shared layer's first call has left it
        layer = node.layer
        if node.kind != "Dense" or len(graph.shape(node.inputs[0])) != 4:
            continue
        config = _kept(layer, "activation", "use_bias")
        config |= {"filters": layer.units, "kernel_size": 1, "name": layer.name}
        kernel, *bias = layer.get_weights()
        made = _rebuilt(keras.layers.Conv2D, config, graph.shape(node.inputs[0]), [kernel[None, None], *bias])
        graph = _with_layer(graph, node, made, "Conv2D")
        done.append(node.name)
    return graph, done, ()


def _upsampling(graph: ModelGraph) -> Passed:
    """UpSampling2D of nearest pixels: five operators, where one resizes."""
    done, refused = [], []
    for name in [one.name for one in graph]:
        node = graph.by_name[name]  # what it reads may have been rewritten
        if node.kind != "UpSampling2D" or node.layer.interpolation != "nearest":
            continue
        _, height, width, _ = node.shapes[0]
        if None in (height, width) or node.layer.data_format != "channels_last":
            refused.append(Refusal(node.name, "upsampling", "its size is dynamic or it is channels_first"))
            continue
        graph = _traced(graph, node, partial(keras.ops.image.resize, size=(height, width), interpolation="nearest"))
        done.append(node.name)
    return graph, done, refused


def _layer_norms(graph: ModelGraph) -> Passed:
    """Norms over each image's own statistics, in operators that have integer kernels.

    As Keras writes them, NEG (LayerNormalization, GroupNormalization) and SQUARE (RMSNormalization) stay in float.
    """
    done, refused = [], []
    for name in [one.name for one in graph]:
        node = graph.by_name[name]  # what it reads may have been rewritten
        rule = _NORM_AS_OPERATORS.get(node.kind)
        if rule is None:
            continue
        try:
            graph = _traced(graph, node, rule(node.layer, graph.shape(node.inputs[0])))
        except rules.Unsupported as error:
            refused.append(Refusal(node.name, "layer_norms", str(error)))
        else:
            done.append(node.name)
    return graph, done, refused


Rewritten = Callable[[Any], Any]


def _last_axis(layer: Any, shape: tuple[int | None, ...]) -> None:
    axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    if [axis % len(shape) for axis in axes] != [len(shape) - 1]:
        raise rules.Unsupported(f"it normalizes the axes {list(axes)}, not the channels")


def _scaled(x: Any, gamma: Any, beta: Any) -> Any:
    x = x if gamma is None else x * np.asarray(gamma, np.float32)
    return x if beta is None else x + np.asarray(beta, np.float32)


def _layer_normalization(layer: Any, shape: tuple[int | None, ...]) -> Rewritten:
    _last_axis(layer, shape)
    if layer.rms_scaling:
        raise rules.Unsupported("it has rms_scaling, which Keras has given up")

    def norm(x: Any) -> Any:
        centred = x - keras.ops.mean(x, axis=-1, keepdims=True)
        variance = keras.ops.mean(centred * centred, axis=-1, keepdims=True)
        return _scaled(centred * keras.ops.rsqrt(variance + layer.epsilon), layer.gamma, layer.beta)

    return norm


def _rms_normalization(layer: Any, shape: tuple[int | None, ...]) -> Rewritten:
    _last_axis(layer, shape)

    def norm(x: Any) -> Any:
        square = keras.ops.mean(x * x, axis=-1, keepdims=True)
        return _scaled(x * keras.ops.rsqrt(square + layer.epsilon), layer.scale, None)

    return norm


def _group_normalization(layer: Any, shape: tuple[int | None, ...]) -> Rewritten:
    if layer.axis % len(shape) != len(shape) - 1 or None in shape[1:]:
        raise rules.Unsupported("it normalizes another axis than the channels, or its size is dynamic")
    channels = int(shape[-1] or 0)
    # One position axis instead of two: kernels for images have four axes at most.
    grouped = (-1, int(np.prod([size or 1 for size in shape[1:-1]])), layer.groups, channels // layer.groups)
    gamma = layer.gamma if layer.scale else None
    beta = layer.beta if layer.center else None

    def norm(x: Any) -> Any:
        parts = keras.ops.reshape(x, grouped)
        centred = parts - keras.ops.mean(parts, axis=(1, 3), keepdims=True)
        variance = keras.ops.mean(centred * centred, axis=(1, 3), keepdims=True)
        scaled = keras.ops.reshape(centred * keras.ops.rsqrt(variance + layer.epsilon), (-1, *shape[1:]))
        return _scaled(scaled, gamma, beta)

    return norm


_NORM_AS_OPERATORS: dict[str, Callable[[Any, tuple[int | None, ...]], Rewritten]] = {
    "LayerNormalization": _layer_normalization,
    "RMSNormalization": _rms_normalization,
    "GroupNormalization": _group_normalization,
}

PASSES = (
    Pass("fold_norms", _fold_norms),
    Pass("fold_norms_before", _fold_norms_before),
    Pass("fold_input", _fold_input, lambda purpose: purpose.fold_input),
    Pass("fold_padding", _padding),
    Pass("grouped_to_depthwise", _grouped_to_depthwise),
    Pass("ungroup", _ungroup, lambda purpose: purpose.edgetpu),
    Pass("dense_to_conv", _dense_to_conv, lambda purpose: purpose.edgetpu),
    Pass("upsampling", _upsampling),
    Pass("layer_norms", _layer_norms, lambda purpose: purpose.integer),
)
"""In this order: folded norms make way for folded padding."""


# --- tools of the passes ----------------------------------------------------------------------------------------------


def _kept(layer: Any, *names: str) -> dict[str, Any]:
    config = layer.get_config()
    return {name: config[name] for name in names}


def _rebuilt(kind: Any, config: dict[str, Any], shape: tuple[int | None, ...], weights: list[np.ndarray]) -> Any:
    layer = kind.from_config(config)
    layer.build(shape)
    layer.set_weights(weights)
    return layer


def _with_layer(graph: ModelGraph, node: Node, layer: Any, kind: str) -> ModelGraph:
    """Every call of a shared layer gets the new one: what is shared stays so."""
    nodes = tuple(replace(one, layer=layer, kind=kind) if one.layer is node.layer else one for one in graph)
    return replace(graph, nodes=nodes)


def _traced(graph: ModelGraph, node: Node, function: Rewritten) -> ModelGraph:
    """Return the graph with a call replaced by what a function makes of its input."""
    (source,) = node.inputs
    symbol = keras.Input(batch_shape=graph.shape(source), dtype=graph.dtype(source))
    output = function(symbol)
    taken = set(graph.by_name)
    made, (result,) = read_calls(
        [(symbol, source)], [output], name_of=lambda operation: f"{node.name}_{operation.name}", taken=taken
    )
    return graph.replace_site((node.name,), made, Ref(node.name), result)
