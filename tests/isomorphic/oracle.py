"""What a narrowed model has to compute: the original, with the kernels that read cut channels zeroed.

Nothing here uses the package's rules for layers: only the labels of tensors, to know which channels a cut takes. Where
a norm runs across a cut axis, its statistics are taken over the kept channels alone.
"""

from __future__ import annotations

import keras
import numpy as np

from updp_tf.graph import build_model, read_graph, run_nodes
from updp_tf.isomorphic.cutting import cut_units
from updp_tf.isomorphic.dependency import find_dependencies
from updp_tf.isomorphic.importance import group_scores
from updp_tf.isomorphic.scopes import choose_units
from updp_tf.structure import Ref

TOLERANCE = 1e-4
"""Float32 through a whole network; METHOD's bound for networks."""

ACROSS = {"LayerNormalization", "GroupNormalization", "RMSNormalization", "UnitNormalization"}
CONTRACTIONS = {"Matmul", "Einsum", "Sum"}


def cut_at(model, ratio, *, round_to=1, scope="isomorphic", importance="l2", seed=0):
    """Dependencies of a model, a choice of units, and the narrowed model."""
    dependencies = find_dependencies(read_graph(model))
    scores = group_scores(dependencies, importance, seed=seed)
    cut = choose_units(dependencies.groups, scores, ratio, scope=scope, round_to=round_to)
    return dependencies, cut, build_model(cut_units(dependencies, cut))


def check_against_oracle(dependencies, cut, narrowed, inputs, *, spend=False):
    """Compare a narrowed model with the oracle; returns the largest relative error.

    `spend` zeroes kernels of the original itself, where nobody needs it afterwards, instead of a copy's.
    """
    error = largest_error(dependencies, cut, narrowed, inputs, spend=spend)
    assert error < TOLERANCE, error
    return error


def largest_error(dependencies, cut, narrowed, inputs, *, spend=False) -> float:
    """Largest difference of a narrowed model from the oracle, relative to the largest output."""
    wanted = oracle_outputs(dependencies, cut, inputs, spend=spend)
    have = [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(narrowed(inputs, training=False))]
    errors = []
    for one, want in zip(have, wanted, strict=True):
        assert one.shape == want.shape
        assert np.isfinite(want).all()
        errors.append(np.abs(one - want).max() / (np.abs(want).max() or 1.0))
    return max(errors)


def oracle_outputs(dependencies, cut, inputs, *, spend=False):
    graph = dependencies.graph if spend else read_graph(build_model(dependencies.graph))
    masks = {
        ref: [None if labels is None else dependencies.units.kept(labels, cut) for labels in axes]
        for ref, axes in dependencies.axes.items()
    }
    done = set()
    for node in graph:
        if not node.is_input and id(node.layer) not in done:
            done.add(id(node.layer))
            zero_what_reads(node, [masks[ref] for ref in node.inputs], dependencies, cut)
    flat = keras.tree.flatten(inputs)
    values = {ref: keras.ops.convert_to_tensor(x) for ref, x in zip(graph.input_refs, flat, strict=True)}
    for node in graph:
        if node.is_input:
            continue
        if node.kind in ACROSS and any(mask is not None for mask in masks[node.inputs[0]]):
            values[Ref(node.name)] = normalised(node, values[node.inputs[0]], masks[node.inputs[0]])
        elif node.kind in CONTRACTIONS:
            masked = dict(values)
            for ref in node.inputs:
                masked[ref] = masked_tensor(values[ref], masks[ref])
            run_nodes([node], masked)
            values[Ref(node.name)] = masked[Ref(node.name)]
        else:
            run_nodes([node], values)
    return [keras.ops.convert_to_numpy(values[ref]) for ref in graph.output_refs]


def masked_tensor(tensor, masks):
    array = np.array(keras.ops.convert_to_numpy(tensor))
    for axis, mask in enumerate(masks):
        if mask is not None:
            shape = [1] * array.ndim
            shape[axis] = -1
            array = array * mask.reshape(shape).astype(array.dtype)
    return keras.ops.convert_to_tensor(array)


def zero_what_reads(node, masks, dependencies, cut):
    layer, mask = node.layer, masks[0][-1] if masks else None

    def zero(variable, change):
        array = np.array(keras.ops.convert_to_numpy(variable))
        change(array)
        variable.assign(array)

    def rows(axis, gone):
        def change(array):
            index = [slice(None)] * array.ndim
            index[axis] = gone
            array[tuple(index)] = 0.0

        return change

    if node.kind == "MultiHeadAttention":
        original = dependencies.graph.by_name[node.name].layer
        for one in dependencies.slices.get(id(original), ()):
            gone = ~dependencies.units.kept(one.labels, cut)
            name = original.variables[one.variable].path
            reads = name.endswith("attention_output/kernel") and one.axis < 2
            reads = reads or (name.endswith(("query/kernel", "key/kernel", "value/kernel")) and one.axis == 0)
            # what the key lacks, the query cannot meet
            reads = reads or (name.endswith("key/kernel") and one.axis == 2)
            reads = reads or (name.endswith("key/bias") and one.axis == 1)
            if reads:
                zero(layer.variables[one.variable], rows(one.axis, gone))
        return
    if node.kind == "EinsumDense":
        reads, written = layer.equation.split("->")
        inner, weights = reads.replace("...", "").split(",")
        written = written.replace("...", "")
        for letter in inner:
            one = masks[0][-(len(inner) - inner.index(letter))]
            if one is not None and letter in weights and letter not in written:
                zero(layer.kernel, rows(weights.index(letter), ~one))
        return
    if mask is None:
        return
    if node.kind in ("Conv2D", "Conv1D"):
        per_group = layer.kernel.shape[-2]
        if layer.groups > 1 and per_group == 1:
            return  # depthwise: passes channels on
        outs = layer.filters // layer.groups

        def by_group(array):
            for group in range(layer.groups):
                gone = np.flatnonzero(~mask[group * per_group : (group + 1) * per_group])
                array[..., gone, group * outs : (group + 1) * outs] = 0.0

        zero(layer.kernel, by_group)
    elif node.kind == "Conv2DTranspose":
        zero(layer.kernel, rows(-1, ~mask))
    elif node.kind == "Dense":
        zero(layer.kernel, rows(0, ~mask))
    elif node.kind in ("SeparableConv2D", "SeparableConv1D"):
        zero(layer.pointwise_kernel, rows(-2, np.repeat(~mask, layer.depth_multiplier)))


def normalised(node, tensor, masks):
    """A norm with the statistics of what is kept; what is cut becomes 0."""
    layer, x = node.layer, keras.ops.convert_to_numpy(tensor).astype("float64")
    mask = masks[-1]
    kept = x[..., mask]
    if node.kind == "UnitNormalization":
        y = kept / np.sqrt(np.maximum((kept**2).sum(axis=-1, keepdims=True), 1e-12))
    elif node.kind == "GroupNormalization":
        groups = layer.groups
        parts = kept.reshape(len(kept), -1, groups, kept.shape[-1] // groups)
        mean, variance = parts.mean(axis=(1, 3), keepdims=True), parts.var(axis=(1, 3), keepdims=True)
        y = ((parts - mean) / np.sqrt(variance + layer.epsilon)).reshape(kept.shape)
    elif node.kind == "RMSNormalization":
        y = kept / np.sqrt((kept**2).mean(axis=-1, keepdims=True) + layer.epsilon)
    else:
        mean, variance = kept.mean(axis=-1, keepdims=True), kept.var(axis=-1, keepdims=True)
        y = (kept - mean) / np.sqrt(variance + layer.epsilon)
    for variable in layer.variables:
        value = keras.ops.convert_to_numpy(variable)[mask]
        y = y + value if "beta" in variable.path else y * value
    out = np.zeros_like(x)
    out[..., mask] = y
    return keras.ops.convert_to_tensor(out.astype("float32"))
