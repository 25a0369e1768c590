"""Fold BatchNormalization into the layer in front of it or behind it, wherever that is exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from updp_tf import rules
from updp_tf.structure import ModelGraph, Node, Ref

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
