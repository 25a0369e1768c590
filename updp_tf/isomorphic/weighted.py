"""Rules about the channels of layers that hold weights: convolutions, dense layers, attention, norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import keras
import numpy as np

from updp_tf.isomorphic.coupling import (
    ALONG_CHANNELS,
    Axes,
    Coupling,
    Cut,
    NotCovered,
    Resized,
    Site,
    function_name,
    per_channel,
    variable_index,
    variable_named,
)
from updp_tf.isomorphic.units import Labels
from updp_tf.rules import einsum_letters
from updp_tf.structure import Ref

# --- convolutions and dense layers -------------------------------------------------------------------------------


def _require_plain(site: Site) -> None:
    layer = site.layer
    if getattr(layer, "data_format", None) == "channels_first":
        raise NotCovered("is channels_first")
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        raise NotCovered("has quantized or LoRA weights")
    activation = getattr(layer, "activation", None)
    if isinstance(activation, keras.Layer) and activation.variables:
        raise NotCovered("applies a layer with weights as its activation")


def _written(site: Site, labels: Labels | None, *, spatial: int | None = None) -> Sequence[Axes]:
    """Axes of what a layer writes, with labels on the last one."""
    if function_name(getattr(site.layer, "activation", None)) in ALONG_CHANNELS:
        site.fix(labels, "applies an activation along its channels")
    rank = len(site.node.shapes[0]) if spatial is None else spatial
    return ((*(None,) * (rank - 1), labels),)


def _is_depthwise(layer: Any) -> bool:
    return layer.groups > 1 and layer.kernel.shape[-2] == 1


def _conv(site: Site) -> Sequence[Axes]:
    _require_plain(site)
    layer, read = site.layer, site.only_last()
    if _is_depthwise(layer):
        return _depthwise_as_conv(site, read)
    site.reads(layer.kernel, -2, site.equal_parts(read, layer.groups))
    written = site.writes(layer.kernel, -1)
    site.equal_parts(written, layer.groups)
    site.follows(layer.bias, 0, written, role="out")
    return _written(site, written)


def _depthwise_as_conv(site: Site, read: Labels | None) -> Sequence[Axes]:
    """A convolution with as many groups as channels: an output goes with the one input it reads."""
    layer = site.layer
    written = None if read is None else np.repeat(read, layer.filters // layer.groups)
    site.follows(layer.kernel, -1, written, scored=True)
    site.follows(layer.bias, 0, written)
    return _written(site, written)


def _conv_size(cut: Cut) -> Resized:
    layer = cut.layer
    filters = cut.size(layer.kernel, -1)
    if _is_depthwise(layer):
        return Resized({"filters": filters, "groups": filters * layer.groups // layer.filters})
    return Resized({"filters": filters})


def _depthwise(site: Site) -> Sequence[Axes]:
    _require_plain(site)
    layer, read = site.layer, site.only_last()
    written = None if read is None else np.repeat(read, layer.depth_multiplier)
    site.follows(layer.kernel, -2, read, scored=True)
    site.follows(layer.bias, 0, written)
    return _written(site, written)


def _separable(site: Site) -> Sequence[Axes]:
    _require_plain(site)
    layer, read = site.layer, site.only_last()
    between = None if read is None else np.repeat(read, layer.depth_multiplier)
    site.follows(layer.depthwise_kernel, -2, read, scored=True)
    site.reads(layer.pointwise_kernel, -2, between)
    written = site.writes(layer.pointwise_kernel, -1)
    site.follows(layer.bias, 0, written, role="out")
    return _written(site, written)


def _conv_transpose(site: Site) -> Sequence[Axes]:
    _require_plain(site)
    layer = site.layer
    site.reads(layer.kernel, -1, site.only_last())
    written = site.writes(layer.kernel, -2)
    site.follows(layer.bias, 0, written, role="out")
    return _written(site, written)


def _dense(site: Site) -> Sequence[Axes]:
    _require_plain(site)
    layer = site.layer
    *others, read = site.axes[0]
    site.reads(layer.kernel, 0, read)
    written = site.writes(layer.kernel, 1)
    site.follows(layer.bias, 0, written, role="out")
    return ((*others, _written(site, written)[0][-1]),)


def _einsum_dense(site: Site) -> Sequence[Axes]:
    _require_plain(site)
    layer, read = site.layer, site.axes[0]
    (inner, weights), outer = einsum_letters(layer.equation, (len(read), len(layer.kernel.shape)))
    labels = dict(zip(inner, read, strict=True))
    made = [letter for letter in weights if letter in outer and letter not in inner]
    for axis, letter in enumerate(weights):
        if letter in labels and letter in outer:
            site.follows(layer.kernel, axis, labels[letter], scored=True)
        elif letter in labels:
            site.reads(layer.kernel, axis, labels[letter], role=f"in {axis}")
        elif letter in outer:
            role = "out" if len(made) == 1 else "head dims" if letter == outer[-1] else "heads"
            labels[letter] = site.writes(layer.kernel, axis, role=role)
    for letter in inner:
        if letter not in outer and letter not in weights:
            site.fix(labels[letter], "sums over this axis")
    written = tuple(labels.get(letter) for letter in outer)
    if layer.bias is not None:
        first = len(written) - len(layer.bias.shape)
        for axis, size in enumerate(layer.bias.shape):
            if size > 1:
                site.follows(layer.bias, axis, written[first + axis], role="out")
    if function_name(layer.activation) in ALONG_CHANNELS:
        site.fix(written[-1], "applies an activation along its channels")
    return (written,)


def _einsum_dense_size(cut: Cut) -> Resized:
    shape = cut.layer.get_config()["output_shape"]
    old = (shape,) if isinstance(shape, int) else tuple(shape)
    new = cut.shapes[0][-len(old) :]
    return Resized({"output_shape": [None if one is None else size for one, size in zip(old, new, strict=True)]})


# --- attention -----------------------------------------------------------------------------------------------------


def _attention(site: Site) -> Sequence[Axes]:
    """`MultiHeadAttention`: heads, query/key dimensions and value dimensions are three axes of their own."""
    layer = site.layer
    if getattr(layer, "use_gate", False) or site.node.kind != "MultiHeadAttention":
        raise NotCovered("is an attention layer with more than query, key, value and output projections")
    parts = {name: variable_named(layer, f"{name}/kernel") for name in ("query", "key", "value", "attention_output")}
    if any(one is None for one in parts.values()):
        raise NotCovered("has quantized or LoRA weights")
    config = layer.get_config()
    if len(config.get("attention_axes") or ()) != 1 or len(site.shapes[0]) != 3:
        raise NotCovered("attends over more than one axis")
    given = dict(zip(("query", "value", "key"), site.node.args, strict=False)) | dict(site.node.kwargs)
    given["key"] = given.get("key") if isinstance(given.get("key"), Ref) else given["value"]
    sources = {name: site.node.inputs.index(given[name]) for name in ("query", "key", "value")}
    for name, number in sources.items():
        site.reads(parts[name], 0, site.only_last(number), role=f"in {name}")
    heads = site.writes(parts["query"], 1, role="heads")
    dims = site.writes(parts["query"], 2, role="head dims")
    values = site.writes(parts["value"], 2, role="value dims")
    for name in ("key", "value"):
        site.follows(parts[name], 1, heads, role="heads", scored=True)
    site.follows(parts["key"], 2, dims, role="head dims", scored=True)
    site.reads(parts["attention_output"], 0, heads, role="heads")
    site.reads(parts["attention_output"], 1, values, role="value dims")
    written = site.writes(parts["attention_output"], 2)
    for name, last in (("query", dims), ("key", dims), ("value", values)):
        bias = variable_named(layer, f"{name}/bias")
        if bias is not None:
            site.follows(bias, 0, heads, role="heads")
            site.follows(bias, 1, last, role="value dims" if name == "value" else "head dims")
    site.follows(variable_named(layer, "attention_output/bias"), 0, written, role="out")
    tokens = len(site.node.shapes[0]) - 1
    first = (*(None,) * tokens, written)
    return (first, *((None,) * len(shape) for shape in site.node.shapes[1:]))


def _attention_size(cut: Cut) -> Resized:
    layer = cut.layer
    # `_attention` has seen that all of them are there
    query, value, output = (
        cast(Any, variable_named(layer, f"{name}/kernel")) for name in ("query", "value", "attention_output")
    )
    key_dim = cut.size(query, 2)
    # the layer divides by the root of its new key_dim: the query makes up for it
    factor = float(np.sqrt(key_dim / query.shape[2]))
    scaled = {variable_index(layer, query): factor}
    if (bias := variable_named(layer, "query/bias")) is not None:
        scaled[variable_index(layer, bias)] = factor
    config: dict[str, Any] = {
        "num_heads": cut.size(query, 1),
        "key_dim": key_dim,
        "value_dim": cut.size(value, 2),
        "output_shape": (cut.size(output, 2),),
    }
    return Resized(config, scaled=scaled if factor != 1.0 else {})


def _embedding(site: Site) -> Sequence[Axes]:
    if getattr(site.layer, "quantization_mode", None):
        raise NotCovered("has quantized weights")
    written = site.writes(site.layer.embeddings, 1)
    return ((*site.axes[0], written),)


# --- norms ---------------------------------------------------------------------------------------------------------


def _batch_norm(site: Site) -> Sequence[Axes]:
    layer, axes = site.layer, site.axes[0]
    labels = axes[layer.axis]
    site.follows(layer.gamma, 0, labels, scored=True)
    for variable in (layer.beta, layer.moving_mean, layer.moving_variance):
        site.follows(variable, 0, labels)
    return (axes,)


def _layer_norm(site: Site) -> Sequence[Axes]:
    """A norm whose statistics run over its axes: with some cut, they run over what is kept."""
    layer, axes = site.layer, site.axes[0]
    along = layer.axis if isinstance(layer.axis, list | tuple) else (layer.axis,)
    for variable in layer.variables:
        for position, axis in enumerate(along):
            site.follows(variable, position, axes[axis], scored="beta" not in variable.path.rsplit("/", 1)[-1])
    return (axes,)


def _group_norm(site: Site) -> Sequence[Axes]:
    layer, axes = site.layer, site.axes[0]
    axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
    labels, size = axes[axis], site.shapes[0][axis]
    if labels is not None and size is not None:
        groups = size if layer.groups == -1 else layer.groups
        if groups == size:
            raise NotCovered("normalizes every channel alone by a number of groups")
        site.equal_parts(labels, groups)
    site.follows(layer.gamma, 0, labels, scored=True)
    site.follows(layer.beta, 0, labels)
    return (axes,)


def _prelu(site: Site) -> Sequence[Axes]:
    axes = site.axes[0]
    for axis, size in enumerate(site.layer.alpha.shape, start=1):
        if size > 1:
            site.follows(site.layer.alpha, axis - 1, axes[axis])
    return (axes,)


_CONV = Coupling(_conv, _conv_size)
_SEPARABLE = Coupling(_separable, lambda cut: Resized({"filters": cut.size(cut.layer.pointwise_kernel, -1)}))

WEIGHTED: dict[str, Coupling] = {
    "Conv1D": _CONV,
    "Conv2D": _CONV,
    "DepthwiseConv1D": Coupling(_depthwise),
    "DepthwiseConv2D": Coupling(_depthwise),
    "SeparableConv1D": _SEPARABLE,
    "SeparableConv2D": _SEPARABLE,
    "Conv2DTranspose": Coupling(_conv_transpose, lambda cut: Resized({"filters": cut.size(cut.layer.kernel, -2)})),
    "Dense": Coupling(_dense, lambda cut: Resized({"units": cut.size(cut.layer.kernel, 1)})),
    "EinsumDense": Coupling(_einsum_dense, _einsum_dense_size),
    "MultiHeadAttention": Coupling(_attention, _attention_size),
    "Embedding": Coupling(_embedding, lambda cut: Resized({"output_dim": cut.size(cut.layer.embeddings, 1)})),
    "BatchNormalization": Coupling(_batch_norm),
    "LayerNormalization": Coupling(_layer_norm),
    "RMSNormalization": Coupling(_layer_norm),
    "GroupNormalization": Coupling(_group_norm),
    "PReLU": Coupling(_prelu),
    "LayerScale": per_channel("gamma", scored=("gamma",), config=("projection_dim",)),
}
"""Rules by class name."""
