"""Scale channels so that they share a range, exactly: what one layer writes smaller, the next weighs more.

An int8 tensor has one step for all its channels. Where positively homogeneous operators alone (ReLU, Add, pooling,
zero padding) stand between the layers that write a channel and those that read it, dividing the one and multiplying
the other changes nothing but the ranges. Tensors that such operators tie together are scaled as one: a whole residual
stream, with all that write and read it.

How far is decided for each set of tensors by the noise it is expected to add, no scaling included: fuller activations
make weights uneven, which have one step for each output.

Source: cross-layer equalization as in Nagel et al. (arXiv:1906.04721), with the ranges of activations in place of those
of the weights that write them, which have a step for each channel here; the choice of the power is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np

from tflite_export.post_training import EQUALIZE
from tflite_export.steps import Step
from updp_tf import rules
from updp_tf.errors import UpdpError
from updp_tf.graph import build_model, clone_layer, read_graph, run_nodes
from updp_tf.structure import ModelGraph, Node, Ref

LARGEST_SCALE = 32.0
_POWERS = ((0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0), (0.25, 0.25), (0.5, 0.5))
_LEAST_GAIN_DB = 0.5
_BATCH = 8
_N_IMAGES = 100
# What a saturating ReLU6 may reach on other images than these, over what it reached here.
_HEADROOM = 1.1
_LINEAR = ("Conv2D", "DepthwiseConv2D", "Dense")
_HOMOGENEOUS = frozenset(
    {
        "Add",
        "AveragePooling2D",
        "Cropping2D",
        "GlobalAveragePooling2D",
        "GlobalMaxPooling2D",
        "MaxPooling2D",
        "UpSampling2D",
        "ZeroPadding2D",
    }
)


@dataclass
class _Group:
    """Tensors with the same channels, and who writes and reads them."""

    refs: set[Ref] = field(default_factory=set)
    writers: list[Node] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    ceiling: float = np.inf  # what an activation in it is clipped at
    reason: str = ""


def equalize(model: Any, images: Sequence[np.ndarray]) -> tuple[Any, Step]:
    """Return the model with equal ranges of channels wherever that is exact, and what was done.

    Args:
        model: a Functional or Sequential Keras 3 model with its norms folded; it is not changed.
        images: one array of shape (n, ...) for each input, in the order of `model.inputs`.

    Returns:
        A model that computes the same up to rounding (through ReLU6: on these images), and the record.
    """
    try:
        graph = read_graph(model)
    except UpdpError as error:
        return model, Step(EQUALIZE, refused=((model.name, str(error)),))
    groups = _groups(graph)
    able = [group for group in groups if not group.reason and group.writers and group.readers]
    refused = tuple((one.writers[0].name, one.reason) for one in groups if one.reason and one.writers and one.readers)
    if not able:
        return model, Step(EQUALIZE, refused=refused)
    seen = _watch(graph, images, {ref for group in able for ref in group.refs})
    own: dict[str, Any] = {}
    done, gains = [], []
    for group in able:
        scale, gain = _scale(graph, group, seen)
        if gain < _LEAST_GAIN_DB:
            continue
        for node in dict.fromkeys(one.name for one in (*group.writers, *group.readers)):
            own.setdefault(node, _own_layer(graph, graph.by_name[node]))
        for writer in group.writers:
            _divide_output(writer.kind, own[writer.name], scale)
        for reader in group.readers:
            _multiply_input(reader.kind, own[reader.name], scale)
        done.append(group.writers[0].name)
        gains.append(gain)
    nodes = tuple(replace(node, layer=own.get(node.name, node.layer)) for node in graph)
    detail = f"{np.mean(gains):.1f} dB less noise expected at the layers behind, on average" if gains else ""
    return (build_model(replace(graph, nodes=nodes)) if done else model), Step(EQUALIZE, tuple(done), refused, detail)


def _own_layer(graph: ModelGraph, node: Node) -> Any:
    return clone_layer(node.layer, node.layer.name, input_shape=graph.shape(node.inputs[0]))


def _groups(graph: ModelGraph) -> list[_Group]:
    """Return the tensors that have to be scaled together, each set with the layers around it."""
    root: dict[Ref, Ref] = {}

    def find(ref: Ref) -> Ref:
        while root.setdefault(ref, ref) != ref:
            ref = root[ref]
        return ref

    ceilings: dict[str, float] = {}
    blocked: dict[Ref, str] = {}
    for ref in graph.input_refs:
        blocked[ref] = "it is an input of the model"
    for ref in graph.output_refs:
        blocked[ref] = "it is an output of the model"
    for node in graph:
        if node.is_input:
            continue
        out = Ref(node.name)
        ceiling = _ceiling(node)
        if node.kind in _LINEAR and _is_plain(node):
            if node.name not in graph.called_once:
                blocked |= dict.fromkeys((out, *node.inputs), f"'{node.name}' is called more than once")
            elif ceiling is None:
                blocked[out] = f"'{node.name}' applies an activation of its own that is not homogeneous"
            else:
                ceilings[node.name] = ceiling
        elif ceiling is not None and _keeps_channels(graph, node):
            ceilings[node.name] = ceiling
            for ref in node.inputs:
                root[find(ref)] = find(out)
        else:
            outputs = [Ref(node.name, index) for index in range(len(node.shapes))]
            blocked |= dict.fromkeys((*outputs, *node.inputs), f"'{node.name}' is a {node.kind}")
    groups: dict[Ref, _Group] = {}
    for node in graph:
        for ref in (*node.inputs, *(Ref(node.name, index) for index in range(len(node.shapes)))):
            group = groups.setdefault(find(ref), _Group())
            group.refs.add(ref)
            group.reason = group.reason or blocked.get(ref, "")
        if node.name in ceilings:
            written = groups[find(Ref(node.name))]
            written.ceiling = min(written.ceiling, ceilings[node.name])
            written.writers += [node] if node.kind in _LINEAR else []
        if node.kind in _LINEAR:
            groups[find(node.inputs[0])].readers.append(node)
    return list(groups.values())


def _is_plain(node: Node) -> bool:
    return getattr(node.layer, "data_format", "channels_last") == "channels_last" and len(node.inputs) == 1


def _keeps_channels(graph: ModelGraph, node: Node) -> bool:
    """Whether a call without weights treats each channel alone, and all its inputs alike."""
    if getattr(node.layer, "data_format", "channels_last") != "channels_last" or not node.inputs:
        return False
    if node.kind == "Add" and len(node.inputs) < 2:
        return False  # a constant is added
    channels = {graph.shape(ref)[-1] for ref in node.inputs} | {shape[-1] for shape in node.shapes}
    return len(channels) == 1 and len(node.shapes) == 1


def _ceiling(node: Node) -> float | None:
    """Return where a call clips positive values (infinity: nowhere), or None where it is not homogeneous below that."""
    if node.kind in _HOMOGENEOUS or rules.is_passive(node):
        return np.inf
    if node.kind in _LINEAR and getattr(node.layer, "activation", None) in (None, keras.activations.linear):
        return np.inf
    name = getattr(getattr(node.layer, "activation", None), "__name__", None)
    if node.kind in (*_LINEAR, "Activation"):
        return {"relu": np.inf, "relu6": 6.0, "linear": np.inf}.get(name or "")
    if node.kind in ("Relu", "Relu6", "LeakyReLU"):
        return 6.0 if node.kind == "Relu6" else np.inf
    if node.kind == "ReLU" and not node.layer.threshold:
        return np.inf if node.layer.max_value is None else float(node.layer.max_value)
    return None


@dataclass(frozen=True)
class _Seen:
    """What the channels of one tensor held over some images, each of shape (channels,)."""

    low: np.ndarray
    high: np.ndarray
    square: np.ndarray

    def joined(self, other: _Seen) -> _Seen:
        """Of as many images again."""
        return _Seen(
            np.minimum(self.low, other.low), np.maximum(self.high, other.high), (self.square + other.square) / 2
        )


def _watch(graph: ModelGraph, images: Sequence[np.ndarray], wanted: set[Ref]) -> dict[Ref, _Seen]:
    """Return what some tensors held, over some of the images."""
    n = len(images[0])
    chosen = np.unique(np.linspace(0, n - 1, min(n, _N_IMAGES)).astype(int))
    last_use = {ref: number for number, node in enumerate(graph) for ref in node.inputs}
    seen: dict[Ref, _Seen] = {}
    for start in range(0, len(chosen), _BATCH):
        batch = chosen[start : start + _BATCH]
        values: dict[Ref, Any] = {
            ref: keras.ops.convert_to_tensor(np.asarray(array[batch], graph.dtype(ref)))
            for ref, array in zip(graph.input_refs, images, strict=True)
        }
        for number, node in enumerate(graph):
            run_nodes([node], values)
            ref = Ref(node.name)
            if ref in wanted and ref in values:
                flat = keras.ops.convert_to_numpy(values[ref]).reshape(-1, int(node.shapes[0][-1] or 0))
                now = _Seen(flat.min(axis=0), flat.max(axis=0), np.square(flat).mean(axis=0, dtype=np.float64))
                seen[ref] = seen[ref].joined(now) if ref in seen else now
            for gone in [one for one in values if last_use.get(one, -1) <= number and one not in graph.output_refs]:
                del values[gone]
    return seen


def _scale(graph: ModelGraph, group: _Group, seen: Mapping[Ref, _Seen]) -> tuple[np.ndarray, float]:
    """Return what to divide each channel by, and by how many dB that lowers the noise at the layers that read it.

    The scales that were tried are powers of how far a channel fills its tensor's range, over powers of the weights that
    read it. The first alone serves the activations, the second alone the weights.
    """
    tensors = [seen[ref] for ref in group.refs if ref in seen and not _is_fused(graph, ref)]
    sizes = [np.maximum(np.abs(one.low), np.abs(one.high)) for one in tensors]
    fills = np.max([one / one.max() for one in sizes if one.max() > 0] or [np.zeros(1)], axis=0)
    weights = np.max([_weight_ranges(node) for node in group.readers], axis=0)
    used = (fills > 0) & (weights > 0)
    best, same = np.ones_like(weights), np.ones_like(weights)
    if not used.any():
        return same, 0.0
    before = least = _noise(group, seen, same)
    for of_fill, of_weight in _POWERS:
        scale = np.ones_like(weights)
        scale[used] = fills[used] ** of_fill / weights[used] ** of_weight
        scale[used] *= np.max(fills[used] / scale[used])  # the fullest channel stays as full as it was
        scale = np.clip(scale, 1 / LARGEST_SCALE, LARGEST_SCALE)
        if np.isfinite(group.ceiling):
            # A channel that is clipped somewhere stays as it is; others may grow up to where they would be.
            reached = np.max(sizes, axis=0) * _HEADROOM
            scale = np.where(reached >= group.ceiling, 1.0, np.maximum(scale, reached / group.ceiling))
        scale[~used] = 1.0
        if (noise := _noise(group, seen, scale)) < least:
            best, least = scale, noise
    return best, 10 * float(np.log10(before / least))


def _noise(group: _Group, seen: Mapping[Ref, _Seen], scale: np.ndarray) -> float:
    """Return the noise that int8 adds to the outputs of a group's readers, in parts of their signals; the sum.

    Each value is off by a twelfth of its squared step: activations have one step for a tensor, weights one for an
    output. Channels count as independent of each other.
    """
    total = 0.0
    for node in group.readers:
        one = seen[node.inputs[0]]
        span = max(float((one.high / scale).max()), 0.0) - min(float((one.low / scale).min()), 0.0)
        of_activation = (span / 255) ** 2 / 12
        kernel, square = _spread(node, scale), one.square / scale**2
        if node.kind == "DepthwiseConv2D":
            taps = np.square(kernel)  # (taps, channels, multiplier)
            step = np.abs(kernel).max(axis=0) / 127
            noise = of_activation * taps.sum(axis=0) + len(kernel) * step**2 / 12 * square[:, None]
            signal = taps.sum(axis=0) * square[:, None]
        else:
            step = np.abs(kernel).max(axis=(0, 1)) / 127
            n_taps = len(kernel)
            connected = np.any(kernel != 0, axis=0)  # groups leave most pairs of channels out
            noise = of_activation * np.square(kernel).sum(axis=(0, 1)) + n_taps * step**2 / 12 * (square @ connected)
            signal = np.einsum("tco,c->o", np.square(kernel), square)
        total += float(np.sum(noise / np.maximum(signal, 1e-6 * signal.max() + 1e-30)) / noise.size)
    return total


def _spread(node: Node, scale: np.ndarray) -> np.ndarray:
    """Return a reader's scaled kernel as (taps, channels, outputs), zeros between groups."""
    kernel = rules.as_array(node.layer.kernel)
    if node.kind == "DepthwiseConv2D":
        return kernel.reshape(-1, *kernel.shape[2:]) * scale[:, None]
    if node.kind == "Dense":
        return (kernel * scale[:, None])[None]
    groups = node.layer.groups
    taps = kernel.reshape(-1, *kernel.shape[2:])
    if groups > 1:
        full = np.zeros((len(taps), len(scale), taps.shape[2]))
        for group, outputs in enumerate(np.split(np.arange(taps.shape[2]), groups)):
            rows = slice(group * taps.shape[1], (group + 1) * taps.shape[1])
            full[:, rows, outputs] = taps[:, :, outputs]
        taps = full
    return taps * scale[:, None]


def _is_fused(graph: ModelGraph, ref: Ref) -> bool:
    """Whether a tensor is no tensor of the file: an activation alone reads it."""
    readers = [graph.by_name[name] for name in graph.readers.get(ref, ())]
    return len(readers) == 1 and readers[0].kind in ("ReLU", "Relu", "Relu6", "Activation")


def _weight_ranges(node: Node) -> np.ndarray:
    """Return, for each channel read, the largest weight on it in parts of the largest of that output."""
    kernel = np.abs(rules.as_array(node.layer.kernel))
    if node.kind == "DepthwiseConv2D":
        return (kernel.max(axis=(0, 1, 3)) > 0).astype(float)
    per_output = kernel.reshape(-1, kernel.shape[-1]).max(axis=0)
    relative = kernel / np.maximum(per_output, 1e-30)
    relative = relative.reshape(-1, *relative.shape[-2:]).max(axis=0)  # (c_in of a group, outputs)
    groups = getattr(node.layer, "groups", 1)
    return np.concatenate([part.max(axis=1) for part in np.split(relative, groups, axis=1)])


def _divide_output(kind: str, layer: Any, scale: np.ndarray) -> None:
    kernel = rules.as_array(layer.kernel)
    layer.kernel.assign(kernel / (scale.reshape(kernel.shape[2:]) if kind == "DepthwiseConv2D" else scale))
    if layer.use_bias:
        layer.bias.assign(rules.as_array(layer.bias) / scale)


def _multiply_input(kind: str, layer: Any, scale: np.ndarray) -> None:
    kernel = rules.as_array(layer.kernel)
    if kind == "Conv2D":
        per_group = scale.reshape(layer.groups, -1).T
        layer.kernel.assign(kernel * np.repeat(per_group, kernel.shape[3] // layer.groups, axis=1))
    else:
        layer.kernel.assign(kernel * scale[:, None])
