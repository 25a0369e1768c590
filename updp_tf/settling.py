"""Settle a student: write what each blend is at 0 as stock layers, and each expanded block as a single one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from updp_tf import affine, rules
from updp_tf.affine import AffineConv
from updp_tf.blocks import block_of
from updp_tf.errors import MergeError
from updp_tf.folding import absorbed
from updp_tf.forms import Fitted, SeparableForm, form_by_name, kernel_within, layer_specs, scale_spec
from updp_tf.graph import build_model, read_graph
from updp_tf.layers import (
    ActivationBlend,
    Blend,
    BlockBlend,
    BorderRing,
    GateBlend,
    NormBlend,
    NormToBatch,
    TailBlend,
    TapsBlend,
    gamma_and_beta_arrays,
)
from updp_tf.merging import NETWORK_TOLERANCE, build_edit, new_node, relative_error
from updp_tf.structure import LayerSpec, ModelGraph, Node, Ref, Refusal, image_shape, map_refs
from updp_tf.walking import as_float32


def blends_of(graph: ModelGraph) -> list[Node]:
    """Return the calls of blend layers."""
    return [node for node in graph if isinstance(node.layer, Blend)]


def merged_student(student: Any) -> tuple[Any, float]:
    """Return the plain model that a student has become, and its largest relative error against the student.

    Raises:
        MergeError: the model holds no blends, one that is not 0 (the message names its block), or the merged model
            does not compute what the student does.
    """
    graph = read_graph(student)
    blends = blends_of(graph)
    if not blends:
        raise MergeError(f"'{student.name}' holds no blend layers, so there is nothing to merge; give a plan.")
    for node in blends:
        if (blend := node.layer.blend) != 0.0:
            raise MergeError(
                f"The blend of '{node.layer.block or node.name}' is {blend:.3g}, not 0: train on until its schedule "
                f"ends (step {int(keras.ops.convert_to_numpy(node.layer.step))} now)."
            )
    for node in blends:
        if node.layer.site is not None:
            graph = _composed(graph, node.layer)
    for node in blends_of(graph):
        graph = _settled(graph, node.name)
    model = build_model(_alive(_renamed(graph)), name=student.name)
    return model, require_equal(student, model)


def _composed(graph: ModelGraph, layer: Blend) -> ModelGraph:
    """Write an expanded block as the single layer that it is."""
    site = layer.site or {}
    names = tuple(site["nodes"])
    join = site["join"]
    skip_nodes = tuple(site["skip_nodes"])
    beside = {*skip_nodes, join}
    exit = Ref(names[-1])
    body_exit = exit
    skip_exit = Ref(skip_nodes[-1]) if skip_nodes else None
    if join is not None:
        (body_exit,) = [ref for ref in graph.by_name[join].inputs if ref.node in set(names) - beside]
        skip_exit = next(ref for ref in graph.by_name[join].inputs if ref != body_exit)
    body: list[str] = []
    ref = body_exit
    while ref.node in names:
        body.append(ref.node)
        ref = graph.by_name[ref.node].inputs[0]
    maps = [one for name in reversed(body) for one in _maps_at_zero(graph, graph.by_name[name])]
    block = block_of(
        graph,
        names,
        tuple(name for name in names if name not in beside),
        ref,
        body_exit,
        skip_nodes=skip_nodes,
        skip_exit=skip_exit,
        join=join,
    )
    form = form_by_name(site["form"])
    found: Fitted | Refusal
    if isinstance(form, SeparableForm):
        found = _separable(form, maps)
    else:
        found = form.from_maps(block, maps, skip=site["skip"])
    if isinstance(found, Refusal):
        raise MergeError(f"'{layer.block}' cannot become {form.name}: {found.reason}.")
    edit = build_edit(graph, block, found)
    return graph.replace_site(names, edit.nodes, exit, edit.exit)


def _separable(form: SeparableForm, maps: Sequence[AffineConv]) -> Fitted:
    """Compose channelwise maps into one depthwise convolution, and the rest into one pointwise."""
    maps = affine.move_padding_to_front(maps)
    last = max(i for i, one in enumerate(maps) if max(one.kernel_size) > 1)
    first, rest = affine.compose_all(maps[: last + 1]), affine.compose_all(maps[last + 1 :])
    cropped, _ = affine.crop_kernel(first, kernel_within(form.kernel_size, first.kernel_size))
    return Fitted((cropped, affine.regroup(rest, 1)), keeps_skip=True)


def _maps_at_zero(graph: ModelGraph, node: Node) -> tuple[AffineConv, ...]:
    """Return what a call of an expanded block computes at blend 0."""
    layer = node.layer
    shape = graph.shape(node.inputs[0])
    channels = int(shape[-1] or 0)
    if isinstance(layer, BorderRing):
        return ()
    if isinstance(layer, ActivationBlend):
        return (affine.from_scale(rules.as_array(layer.slope), rules.as_array(layer.offset)),)
    if isinstance(layer, GateBlend):
        return (affine.from_scale(rules.as_array(layer.mean), np.zeros(channels)),)
    if isinstance(layer, NormBlend):
        return (_norm_at_zero(layer, channels),)
    if isinstance(layer, NormToBatch):
        layer = layer.target
    if isinstance(layer, keras.layers.BatchNormalization):
        norm = rules.NORMS["BatchNormalization"](layer, shape)
        return (affine.from_scale(norm.scale, norm.shift),)
    if isinstance(layer, TapsBlend):
        inner = replace(node, layer=layer.layer, kind=rules.kind_of(layer.layer))
        (one,) = rules.linear_maps(inner, image_shape(shape)) or ()
        return (_centre_alone(one),)
    maps = rules.linear_maps(node, image_shape(shape))
    if maps is None:
        raise MergeError(f"'{node.name}' {rules.why_unknown(node)}")
    return maps


def _centre_alone(one: AffineConv) -> AffineConv:
    """Return a convolution with zeros in the place of all taps but the centre one."""
    kernel = np.zeros_like(one.kernel)
    centre = tuple(size // 2 for size in one.kernel_size)
    kernel[centre] = one.kernel[centre]
    return replace(one, kernel=kernel)


def _norm_at_zero(layer: NormBlend, channels: int) -> AffineConv:
    gamma, beta = gamma_and_beta_arrays(layer.layer, channels)
    rate = rules.as_array(layer.rate) * gamma
    if layer.has_centre:
        return affine.from_scale(rate, beta - rules.as_array(layer.centre) * rate)
    if isinstance(layer.layer, keras.layers.LayerNormalization):
        centring = np.eye(channels) - 1.0 / channels
        return affine.from_dense(centring * rate, beta)
    return affine.from_scale(rate, beta)


def _settled(graph: ModelGraph, name: str) -> ModelGraph:
    """Take one blend out of a graph, which keeps what it is at 0."""
    node = graph.by_name[name]
    layer = node.layer
    if isinstance(layer, BlockBlend):
        return graph.replace_site((name,), (), Ref(name), node.inputs[1])
    if isinstance(layer, TailBlend):
        return _exchanged(graph, node, layer.layer)
    if isinstance(layer, ActivationBlend) and layer.target is not None:
        return _exchanged(graph, node, layer.target)
    if isinstance(layer, NormToBatch):
        return _exchanged(graph, node, layer.target)
    if isinstance(layer, NormBlend):
        map = _norm_at_zero(layer, int(node.shapes[0][-1] or 0))
        if (folded := absorbed(graph, name, map)) is not None:
            return folded
        return _with_map(graph, node, map)
    raise MergeError(f"'{name}' is a {type(layer).__name__} outside of any pruned block; nothing says what it becomes.")


def _exchanged(graph: ModelGraph, node: Node, layer: Any) -> ModelGraph:
    new = replace(node, name=layer.name, layer=layer, kind=rules.kind_of(layer))
    return graph.replace_site((node.name,), (new,), Ref(node.name), Ref(new.name))


def _with_map(graph: ModelGraph, node: Node, map: AffineConv) -> ModelGraph:
    """Put the layers of a 1x1 map in the place of a call."""
    (ref,) = node.inputs
    shape, dtype = node.shapes[0], node.dtypes[0]
    name = node.layer.layer.name
    specs: list[LayerSpec]
    specs = [scale_spec(map, name, None)] if map.groups == map.c_in > 1 else [*layer_specs(map, name, rank=len(shape))]
    nodes: list[Node] = []
    for spec in specs:
        nodes.append(new_node(spec, ref, shape, node.layer.dtype_policy, dtype))
        ref, shape = Ref(nodes[-1].name), nodes[-1].shapes[0]
    return graph.replace_site((node.name,), nodes, Ref(node.name), ref)


def _renamed(graph: ModelGraph) -> ModelGraph:
    """Return the graph with the Add of each merged block called as its block was."""
    alive = {node.name for node in _alive(graph)}
    names = {name: name.removesuffix("_merged_add") for name in alive if name.endswith("_merged_add")}
    names = {old: new for old, new in names.items() if new not in alive}
    swap = lambda ref: replace(ref, node=names.get(ref.node, ref.node))  # noqa: E731
    nodes = [
        replace(
            node,
            name=names.get(node.name, node.name),
            args=map_refs(node.args, swap),
            kwargs=map_refs(dict(node.kwargs), swap),
        )
        for node in _alive(graph)
    ]
    return replace(graph, nodes=tuple(nodes), outputs=map_refs(graph.outputs, swap))


def _alive(graph: ModelGraph) -> ModelGraph:
    """Return the graph without calls that no output depends on; inputs stay."""
    needed = {ref.node for ref in graph.output_refs}
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed |= {ref.node for ref in node.inputs}
    return replace(graph, nodes=tuple(node for node in graph if node.name in needed or node.is_input))


def require_equal(before: Any, model: Any) -> float:
    """Return the largest relative error of a merged model against what it was merged from, on probe inputs.

    Raises:
        MergeError: it does not compute the same.
    """
    rng = np.random.default_rng(0)
    inputs = []
    for tensor in before.inputs:
        shape = (2, *(axis or 32 for axis in tensor.shape[1:]))
        made = rng.normal(size=shape) if "float" in tensor.dtype else rng.integers(0, 256, size=shape)
        inputs.append(made.astype(tensor.dtype))
    wanted, have = (
        [as_float32(one) for one in keras.tree.flatten(net(inputs if len(inputs) > 1 else inputs[0], training=False))]
        for net in (before, model)
    )
    error = max(relative_error(one, other) for one, other in zip(have, wanted, strict=True))
    half = any("16" in str(getattr(layer, "compute_dtype", "")) for layer in before.layers)
    if not error <= (2e-2 if half else NETWORK_TOLERANCE):
        raise MergeError(f"The merged '{before.name}' differs from what it was merged from by {error:.1e} (relative).")
    return error
