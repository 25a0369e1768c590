"""Fold BatchNormalization into the layer in front of it, and preprocessing into the layer behind it, where exact."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from updp_tf import affine, rules
from updp_tf.affine import AffineConv
from updp_tf.structure import ModelGraph, Node, Ref, Refusal, Shape, image_shape

_SCALE_OUTPUT: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Conv2D": lambda kernel, scale: kernel * scale,
    "Dense": lambda kernel, scale: kernel * scale,
    "DepthwiseConv2D": lambda kernel, scale: kernel * scale.reshape(kernel.shape[2:]),
    "Conv2DTranspose": lambda kernel, scale: kernel * scale[:, None],
}
"""How the kernel of each kind is scaled along its output channels."""


def fold_norms_in(graph: ModelGraph) -> tuple[ModelGraph, tuple[str, ...]]:
    """Return the graph with every norm folded that directly follows a linear layer nobody else reads.

    Returns:
        The graph, and the names of the folded norms. Outputs are equal up to rounding.
    """
    folded: list[str] = []
    once = graph.called_once
    for name in [node.name for node in graph]:
        node = graph.by_name[name]  # as earlier folds have left it
        if node.kind != "BatchNormalization" or node.kwargs.get("training"):
            continue
        (read,) = node.inputs
        writer = graph.by_name[read.node]
        alone = graph.readers[read] == (node.name,) and read not in graph.output_refs
        if alone and {writer.name, node.name} <= once and (layer := folded_layer(writer, node)) is not None:
            merged = replace(writer, layer=layer)
            graph = graph.replace_site((writer.name, node.name), (merged,), Ref(node.name), Ref(writer.name))
            folded.append(node.name)
    return graph, tuple(folded)


def folded_layer(writer: Node, norm_node: Node) -> Any | None:
    """Return the writer's layer with the norm folded in, or None where it has no rule for that."""
    scale_output = _SCALE_OUTPUT.get(writer.kind)
    layer = writer.layer
    if scale_output is None or getattr(layer, "activation", None) not in (None, keras.activations.linear):
        return None
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    try:
        norm = rules.norm(norm_node, writer.shapes[0])
    except rules.Unsupported:
        return None
    if norm is None:
        return None
    kernel = rules.as_array(layer.kernel)
    bias = rules.as_array(layer.bias) if layer.use_bias else np.zeros_like(norm.shift)
    config = layer.get_config()
    config["use_bias"] = True
    clone = type(layer).from_config(config)
    clone.build(layer.get_build_config()["input_shape"])
    clone.kernel.assign(scale_output(kernel, norm.scale))
    clone.bias.assign(bias * norm.scale + norm.shift)
    return clone


_KERNEL_OF: dict[str, Callable[[AffineConv, np.ndarray], np.ndarray]] = {
    "Conv2D": lambda one, kernel: one.kernel,
    "Dense": lambda one, kernel: one.kernel[0, 0],
    "DepthwiseConv2D": lambda one, kernel: one.kernel.reshape(kernel.shape),
}
"""How a map is written as the kernel of each kind; the second argument is the kernel it had."""


def fold_preprocessing_in(graph: ModelGraph) -> tuple[ModelGraph, tuple[str, ...]]:
    """Return the graph with `Rescaling` and `Normalization` folded into the layer that reads them, where exact.

    Returns:
        The graph, and the names of the folded calls. Outputs are equal up to rounding.
    """
    graph, folded, _ = fold_into_readers(graph, rules.PREPROCESSING)
    return graph, folded


def fold_into_readers(
    graph: ModelGraph, kinds: Collection[str]
) -> tuple[ModelGraph, tuple[str, ...], tuple[Refusal, ...]]:
    """Return the graph with preprocessing or norms of some kinds folded into the layer behind them, where exact.

    A scale passes zero padding, a shift does not: the layer would be shown zeros where the network shows it shifts.

    Args:
        graph: is not changed.
        kinds: of those in `rules.PREPROCESSING` and "BatchNormalization".

    Returns:
        The graph, the names of the folded calls, and why the others stay. Outputs are equal up to rounding.
    """
    folded: list[str] = []
    refused: list[Refusal] = []
    # From the back: what is folded first makes way for the one in front of it.
    for name in [node.name for node in reversed(graph.nodes) if node.kind in kinds]:
        found = _read_scaled(graph, graph.by_name[name])
        if isinstance(found, str):
            refused.append(Refusal(name, "fold_into_reader", found))
            continue
        reader, layer = found
        nodes = tuple(replace(node, layer=layer) if node.name == reader else node for node in graph)
        (source,) = graph.by_name[name].inputs
        graph = replace(graph, nodes=nodes).replace_site((name,), (), Ref(name), source)
        folded.append(name)
    return graph, tuple(folded), tuple(reversed(refused))


def _read_scaled(graph: ModelGraph, node: Node) -> tuple[str, Any] | str:
    """Return the call that alone reads a scale and a shift, and its layer with them folded in; or why not."""
    (source,) = node.inputs
    if "float" not in graph.dtype(source):
        return "it also turns whole numbers into fractions"
    channels = int(node.shapes[0][-1] or 0)
    padded = False
    reader = node
    while True:
        ref = Ref(reader.name)
        readers = graph.readers.get(ref, ())
        if len(readers) != 1 or ref in graph.output_refs:
            return f"'{reader.name}' is read by {len(readers)} layers" if readers else "it is an output of the model"
        reader = graph.by_name[readers[0]]
        if reader.kind == "ZeroPadding2D" and getattr(reader.layer, "data_format", "") == "channels_last":
            padded = True
        elif not rules.is_passive(reader):
            break
    if reader.kind not in _KERNEL_OF:
        return f"'{reader.name}', which reads it, is a {reader.kind}"
    if reader.name not in graph.called_once:
        return f"'{reader.name}', which reads it, is called more than once"
    if getattr(reader.layer, "data_format", "channels_last") != "channels_last":
        return f"'{reader.name}' is channels_first"
    try:
        scale_and_shift = _scale_and_shift(node, channels, graph.shape(source))
        (one,) = rules.LINEAR[reader.kind](reader.layer, image_shape(graph.shape(reader.inputs[0])))
    except rules.Unsupported as error:
        return str(error)
    if scale_and_shift is None or one.c_in != channels:
        return f"'{reader.name}' reads other channels"
    scale, shift = scale_and_shift
    if shift.any() and (padded or one.pads):
        return f"'{reader.name}' pads with 0, which its shift would turn into something else"
    one = affine.fold_norm_before(one, scale, shift)
    return reader.name, _holding(reader.layer, one)


def absorbed(graph: ModelGraph, name: str, map: AffineConv) -> ModelGraph | None:
    """Return the graph with a call taken out and its 1x1 map composed into the only layer that reads it, where exact.

    Args:
        graph: holds the call.
        name: of the call.
        map: what it computes; 1x1, it may mix channels.
    """
    reader = graph.by_name[name]
    while True:
        readers = graph.readers.get(Ref(reader.name), ())
        if len(readers) != 1 or Ref(reader.name) in graph.output_refs:
            return None
        reader = graph.by_name[readers[0]]
        if not rules.is_passive(reader):
            break
    if reader.kind not in ("Conv2D", "Dense") or reader.name not in graph.called_once:
        return None
    if getattr(reader.layer, "data_format", "channels_last") != "channels_last":
        return None
    try:
        (one,) = rules.LINEAR[reader.kind](reader.layer, image_shape(graph.shape(reader.inputs[0])))
    except rules.Unsupported:
        return None
    if one.groups > 1 or not affine.padding_is_exact(map, one):
        return None
    layer = _holding(reader.layer, affine.regroup(affine.compose(map, one), 1))
    nodes = tuple(replace(node, layer=layer) if node.name == reader.name else node for node in graph)
    (source,) = graph.by_name[name].inputs
    return replace(graph, nodes=nodes).replace_site((name,), (), Ref(name), source)


def _holding(layer: Any, one: AffineConv) -> Any:
    """Return a layer's clone that holds a map of its own geometry, with a bias."""
    config = layer.get_config()
    config["use_bias"] = True
    clone = type(layer).from_config(config)
    clone.build(layer.get_build_config()["input_shape"])
    clone.kernel.assign(_KERNEL_OF[rules.kind_of(layer)](one, rules.as_array(layer.kernel)))
    clone.bias.assign(one.bias)
    return clone


def _scale_and_shift(node: Node, channels: int, shape: Shape) -> tuple[np.ndarray, np.ndarray] | None:
    if node.kind in rules.PREPROCESSING:
        return rules.preprocessing(node, channels)
    norm = rules.norm(node, shape)
    return None if norm is None else (norm.scale, norm.shift)
