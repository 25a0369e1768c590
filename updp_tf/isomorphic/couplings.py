"""What is known of each kind of call about channels: one readable table.

A rule says which labels stand on the axes of what a call writes, given those on the axes of what it reads, and ties
the axes of the layer's weights to them. A second, smaller function says which configuration entries and arguments
change when axes get shorter. A kind without a rule is a boundary: what it reads keeps its channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import keras
import numpy as np

from updp_tf import _keras
from updp_tf.errors import RuleError
from updp_tf.isomorphic.units import Labels, Units
from updp_tf.structure import Node, Ref, Shape

Axes = tuple[Labels | None, ...]
"""Labels of every axis of a tensor, batch first; None for an axis that is never cut."""


class NotCovered(Exception):
    """A call whose rule does not cover this configuration; the message is the reason. Never leaves this package."""


class Ledger(Protocol):
    """Where rules write which axes of which weights carry which labels; `dependency` has the one there is."""

    units: Units

    def tie(
        self, node: Node, role: str, variable: Any, axis: int, labels: Labels | None, *, fresh: bool, scored: bool
    ) -> Labels | None:
        """Tie an axis of a variable to labels, and return those that stand for it now."""


@dataclass(frozen=True, eq=False)
class Site:
    """One call, as a rule sees it.

    Attributes:
        node: the call.
        shapes: of the tensors it reads, batch axis first.
        axes: labels of those tensors.
        ledger: where the axes of weights are tied to labels.
    """

    node: Node
    shapes: tuple[Shape, ...]
    axes: tuple[Axes, ...]
    ledger: Ledger

    @property
    def layer(self) -> Any:
        """The Keras layer or operation."""
        return self.node.layer

    @property
    def units(self) -> Units:
        """All units of the network."""
        return self.ledger.units

    def last(self, number: int = 0) -> Labels | None:
        """Labels of the last axis of a tensor that is read."""
        return self.axes[number][-1]

    def reads(self, variable: Any, axis: int, labels: Labels | None, *, role: str = "in") -> None:
        """Say that an axis of a weight is summed over channels that are read."""
        self.ledger.tie(self.node, role, variable, axis, labels, fresh=False, scored=True)

    def writes(self, variable: Any, axis: int, *, role: str = "out") -> Labels | None:
        """Say that an axis of a weight makes channels of its own, and return their labels."""
        return self.ledger.tie(self.node, role, variable, axis, None, fresh=True, scored=True)

    def follows(
        self, variable: Any, axis: int, labels: Labels | None, *, role: str = "through", scored: bool = False
    ) -> None:
        """Say that an axis of a weight has one index per channel that passes."""
        if variable is not None:
            self.ledger.tie(self.node, role, variable, axis, labels, fresh=False, scored=scored)

    def only_last(self, number: int = 0) -> Labels | None:
        """Labels of the last axis of a tensor; those of all other axes are fixed."""
        *others, last = self.axes[number]
        for labels in others:
            self.fix(labels, "is read by a layer that works along this axis")
        return last

    def fix(self, labels: Labels | None, reason: str) -> None:
        """Say that channels are never cut."""
        if labels is not None:
            self.units.fix(labels, f"'{self.node.name}' ({self.node.kind}) {reason}")

    def equal_parts(self, labels: Labels | None, n: int) -> Labels | None:
        """Tie the same places of `n` equal parts of an axis together, and return the labels of one part."""
        if labels is None:
            return None
        parts = labels.reshape(n, -1)
        self.units.unite(parts, parts[:1])
        return parts[0]


@dataclass(frozen=True, eq=False)
class Resized:
    """What changes in a call when axes get shorter.

    Attributes:
        config: entries of the layer's configuration.
        args: positional arguments, where they change.
        scaled: factors that some variables are multiplied with, by index in the layer's variables.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] | None = None
    scaled: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Cut:
    """One call and which indices of every axis are kept.

    Attributes:
        node: the call.
        kept: of every axis of every tensor that is read: a mask, or None where all are kept.
        written: the same of what is written.
        shapes: new shapes of what is written.
        masks: which indices of a variable's axis are kept, by (index in the layer's variables, axis).
    """

    node: Node
    kept: tuple[tuple[np.ndarray | None, ...], ...]
    written: tuple[tuple[np.ndarray | None, ...], ...]
    shapes: tuple[Shape, ...]
    masks: Mapping[tuple[int, int], np.ndarray]

    @property
    def layer(self) -> Any:
        """The Keras layer or operation, as it was."""
        return self.node.layer

    def size(self, variable: Any, axis: int) -> int:
        """New size of an axis of a variable."""
        index = variable_index(self.layer, variable)
        axis %= len(variable.shape)
        mask = self.masks.get((index, axis))
        return int(variable.shape[axis] if mask is None else mask.sum())


@dataclass(frozen=True)
class Coupling:
    """The rule of one kind of call.

    Attributes:
        connect: returns the labels of every tensor that the call writes, and ties weights on the way.
        resize: returns what changes in the call when axes get shorter; nothing by default.
    """

    connect: Callable[[Site], Sequence[Axes]]
    resize: Callable[[Cut], Resized] = lambda cut: Resized()


def register_coupling(layer_type: type, coupling: Coupling) -> None:
    """Teach this package how channels pass through a layer of your own.

    Args:
        layer_type: class of the layer.
        coupling: its rule; `per_channel(...)` and `ELEMENTWISE` cover most layers.

    Raises:
        RuleError: `layer_type` is Keras' own or has a rule already, or `coupling` is no `Coupling`.
    """
    if not isinstance(layer_type, type):
        raise RuleError(f"A rule is registered for a class of layers. Received: {layer_type!r}.")
    kind = _keras.kind_of(layer_type)
    if not isinstance(coupling, Coupling):
        raise RuleError(f"The rule of '{kind}' is a Coupling. Received: {type(coupling).__name__}.")
    if kind in COUPLINGS:
        raise RuleError(f"'{kind}' has a rule already.")
    COUPLINGS[kind] = coupling


def per_channel(*variables: str, scored: Sequence[str] = (), config: Sequence[str] = (), axis: int = -1) -> Coupling:
    """Return the rule of a layer that treats every channel alone.

    Args:
        variables: attributes of the layer that hold weights whose last axis has one index per channel; those that are
            None are left out.
        scored: of these, the ones that count for the importance of a channel.
        config: entries of the layer's configuration that hold the number of channels.
        axis: of the channels in what is read and written.
    """

    def connect(site: Site) -> Sequence[Axes]:
        for name in variables:
            site.follows(getattr(site.layer, name, None), -1, site.axes[0][axis], scored=name in scored)
        return (site.axes[0],)

    def resize(cut: Cut) -> Resized:
        return Resized({name: cut.shapes[0][axis] for name in config})

    return Coupling(connect, resize)


def variable_index(layer: Any, variable: Any) -> int:
    """Place of a variable among a layer's variables."""
    for index, one in enumerate(layer.variables):
        if one is variable:
            return index
    raise NotCovered(f"holds a weight '{getattr(variable, 'path', variable)}' that is none of its variables")


def variable_named(layer: Any, ending: str) -> Any | None:
    """The variable of a layer whose path ends so, or None."""
    return next((one for one in layer.variables if one.path.endswith("/" + ending)), None)


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


_ALONG_CHANNELS = frozenset({"softmax", "log_softmax", "sparsemax", "glu"})


def _written(site: Site, labels: Labels | None, *, spatial: int | None = None) -> Sequence[Axes]:
    """Axes of what a layer writes, with labels on the last one."""
    if _function_name(getattr(site.layer, "activation", None)) in _ALONG_CHANNELS:
        site.fix(labels, "applies an activation along its channels")
    rank = len(site.node.shapes[0]) if spatial is None else spatial
    return ((*(None,) * (rank - 1), labels),)


def _function_name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__.lower())


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


def _einsum_letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Letters of every operand's axes and of the result's, an ellipsis written out in capitals."""
    reads, written = equation.replace(" ", "").split("->")
    operands = reads.split(",")
    n_more = max((rank - len(one.replace("...", "")) for one, rank in zip(operands, ranks, strict=True)), default=0)
    more = "ABCDEFGH"[:n_more]
    return [one.replace("...", more) for one in operands], written.replace("...", more)


def _einsum_dense(site: Site) -> Sequence[Axes]:
    _require_plain(site)
    layer, read = site.layer, site.axes[0]
    (inner, weights), outer = _einsum_letters(layer.equation, (len(read), len(layer.kernel.shape)))
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
    if _function_name(layer.activation) in _ALONG_CHANNELS:
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


# --- element by element --------------------------------------------------------------------------------------------


def _passes(site: Site) -> Sequence[Axes]:
    return (site.axes[0],)


def _activation(site: Site) -> Sequence[Axes]:
    function = site.layer.activation
    if isinstance(function, keras.Layer) and function.variables:
        raise NotCovered("applies a layer with weights as its activation")
    if _function_name(function) in _ALONG_CHANNELS:
        site.fix(site.last(), "works along the channels")
    return (site.axes[0],)


def _along_axis(site: Site) -> Sequence[Axes]:
    """Softmax and the like: what is cut would change the others."""
    axis = getattr(site.layer, "axis", -1)
    for one in axis if isinstance(axis, list | tuple) else (axis,):
        site.fix(site.axes[0][-1 if one is None else one], "works along the channels")
    return (site.axes[0],)


def _operands(node: Node) -> list[Any]:
    """Operands of an element-wise call: refs, arrays and numbers."""
    items = [*node.args, *node.kwargs.values()]
    flat: list[Any] = []
    for item in items:
        flat += item if isinstance(item, list | tuple) else [item]
    return flat


def _elementwise(site: Site) -> Sequence[Axes]:
    return (_united(site, is_sum=False),)


def _summed(site: Site) -> Sequence[Axes]:
    return (_united(site, is_sum=True),)


def _united(site: Site, *, is_sum: bool) -> Axes:
    """Tie the axes of all operands, as they broadcast."""
    shape = site.node.shapes[0]
    axes_of = dict(zip(site.node.inputs, site.axes, strict=True)) if len(set(site.node.inputs)) else {}
    shapes = dict(zip(site.node.inputs, site.shapes, strict=True))
    result: list[Labels | None] = []
    for back in range(len(shape), 0, -1):
        size = shape[-back]
        at = [
            axes_of[ref][-back]
            for ref in dict.fromkeys(site.node.inputs)
            if len(shapes[ref]) >= back and (shapes[ref][-back] == size and size != 1)
        ]
        labelled = [labels for labels in at if labels is not None]
        if not labelled:
            result.append(None)
            continue
        if len(labelled) < len(at):
            for labels in labelled:
                site.fix(labels, "meets an axis that cannot be cut")
        if is_sum and len(labelled) > 1:
            different = any(
                not np.array_equal(site.units.find(one), site.units.find(labelled[0])) for one in labelled[1:]
            )
            if different:
                for labels in labelled:
                    site.units.mark_stream(labels)
        for labels in labelled[1:]:
            site.units.unite(labelled[0], labels)
        result.append(labelled[0])
    return tuple(result)


def _elementwise_size(cut: Cut) -> Resized:
    """Constants among the operands lose what the result loses."""
    written = cut.written[0]

    def shorten(item: Any) -> Any:
        if isinstance(item, Ref) or not hasattr(item, "shape") or not len(item.shape):
            return item
        array = keras.ops.convert_to_numpy(item)
        for back in range(1, array.ndim + 1):
            mask = written[-back]
            if mask is not None and array.shape[-back] > 1:
                array = np.compress(mask, array, axis=array.ndim - back)
        return array

    args = tuple(
        type(item)(shorten(one) for one in item) if isinstance(item, list | tuple) else shorten(item)
        for item in cut.node.args
    )
    return Resized(args=args)


def _rescaling_size(cut: Cut) -> Resized:
    config = {}
    for name in ("scale", "offset"):
        value = np.asarray(getattr(cut.layer, name), dtype="float32")
        for back in range(1, value.ndim + 1):
            mask = cut.written[0][-back]
            if mask is not None and value.shape[-back] > 1:
                value = np.compress(mask, value, axis=value.ndim - back)
        if value.ndim:
            config[name] = value
    return Resized(config)


# --- shapes --------------------------------------------------------------------------------------------------------


def _spatial(site: Site) -> Sequence[Axes]:
    """Pooling, padding, resizing: works along the middle axes of a channels-last tensor."""
    if getattr(site.layer, "data_format", "channels_last") not in (None, "channels_last"):
        raise NotCovered("is channels_first")
    labels = site.only_last()
    rank = len(site.node.shapes[0])
    return ((*(None,) * (rank - 1), labels),)


def _concatenate(site: Site) -> Sequence[Axes]:
    rank = len(site.node.shapes[0])
    along = site.layer.axis % rank
    refs = site.node.inputs
    result: list[Labels | None] = []
    for axis in range(rank):
        parts = [axes[axis] for axes in site.axes]
        if axis == along:
            if all(part is None for part in parts):
                result.append(None)
                continue
            whole = []
            for part, shape in zip(parts, site.shapes, strict=True):
                if part is None:
                    part = site.units.fresh(int(shape[axis] or 0))
                    site.fix(part, "joins channels with some that cannot be cut")
                whole.append(part)
            result.append(np.concatenate(whole))
            continue
        labelled = [part for part in parts if part is not None]
        for labels in labelled:
            if len(labelled) < len(refs):
                site.fix(labels, "meets an axis that cannot be cut")
            site.units.unite(labelled[0], labels)
        result.append(labelled[0] if labelled else None)
    return (tuple(result),)


def _split_points(layer: Any, size: int) -> list[int]:
    sections = layer.indices_or_sections
    if isinstance(sections, int):
        return [size // sections * number for number in range(1, sections)]
    return [int(one) for one in np.asarray(sections).ravel()]


def _split(site: Site) -> Sequence[Axes]:
    axes = site.axes[0]
    along = site.layer.axis % len(axes)
    labels = axes[along]
    if labels is None:
        return [axes for _ in site.node.shapes]
    parts = np.split(labels, _split_points(site.layer, len(labels)))
    return [(*axes[:along], part, *axes[along + 1 :]) for part in parts]


def _split_size(cut: Cut) -> Resized:
    along = cut.layer.axis % len(cut.kept[0])
    mask = cut.kept[0][along]
    if mask is None:
        return Resized()
    points = _split_points(cut.layer, len(mask))
    return Resized({"indices_or_sections": tuple(int(mask[:point].sum()) for point in points)})


def _full_key(key: Any, rank: int) -> list[Any]:
    """A key of `tensor[key]` with one entry per axis of the tensor (new axes apart)."""
    items = list(key) if isinstance(key, tuple) else [key]
    n_axes = sum(item is not None and item is not Ellipsis for item in items)
    missing = [slice(None)] * (rank - n_axes)
    if any(item is Ellipsis for item in items):
        place = next(i for i, item in enumerate(items) if item is Ellipsis)
        return [*items[:place], *missing, *items[place + 1 :]]
    return [*items, *missing]


def _get_item(site: Site) -> Sequence[Axes]:
    axes = iter(site.axes[0])
    result: list[Labels | None] = []
    for item in _full_key(_key_of(site.node), len(site.axes[0])):
        if item is None:
            result.append(None)
            continue
        labels = next(axes)
        if isinstance(item, slice):
            if labels is None:
                result.append(None)
            elif item.step in (None, 1) and all(one is None or isinstance(one, int) for one in (item.start, item.stop)):
                result.append(labels[item])
            else:
                raise NotCovered(f"takes every {item.step} channels")
        elif isinstance(item, int | np.integer):
            site.fix(labels, "takes one index of this axis")
        else:
            raise NotCovered("is indexed by a tensor")
    return (tuple(result),)


def _key_of(node: Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs["key"]


def _get_item_size(cut: Cut) -> Resized:
    masks = iter(cut.kept[0])
    key: list[Any] = []
    for item in _full_key(_key_of(cut.node), len(cut.kept[0])):
        mask = None if item is None else next(masks)
        if mask is not None and isinstance(item, slice):
            start, stop, _ = item.indices(len(mask))
            item = slice(int(mask[:start].sum()), int(mask[:stop].sum()), None)
        key.append(item)
    return Resized(args=(cut.node.args[0], tuple(key)))


def _transposed(order: Callable[[Site], Sequence[int]]) -> Callable[[Site], Sequence[Axes]]:
    def connect(site: Site) -> Sequence[Axes]:
        axes = site.axes[0]
        return (tuple(axes[one] for one in order(site)),)

    return connect


def _permute_order(site: Site) -> Sequence[int]:
    return (0, *site.layer.dims)


def _transpose_order(site: Site) -> Sequence[int]:
    rank = len(site.axes[0])
    return tuple(range(rank))[::-1] if site.layer.axes is None else [one % rank for one in site.layer.axes]


def _swap_order(site: Site) -> Sequence[int]:
    order = list(range(len(site.axes[0])))
    first, second = site.layer.axis1, site.layer.axis2
    order[first], order[second] = order[second], order[first]
    return order


def _move_order(site: Site) -> Sequence[int]:
    rank = len(site.axes[0])
    listed = [value if isinstance(value, list | tuple) else (value,) for value in _moves(site.layer)]
    sources, targets = ([one % rank for one in value] for value in listed)
    order = [one for one in range(rank) if one not in sources]
    for target, source in sorted(zip(targets, sources, strict=True)):
        order.insert(target, source)
    return order


def _moves(layer: Any) -> tuple[Any, Any]:
    return layer.source, layer.destination


def _expand_dims(site: Site) -> Sequence[Axes]:
    axes, rank = list(site.axes[0]), len(site.node.shapes[0])
    axis = site.layer.axis
    for one in sorted(place % rank for place in (axis if isinstance(axis, list | tuple) else (axis,))):
        axes.insert(one, None)
    return (tuple(axes),)


def _squeeze(site: Site) -> Sequence[Axes]:
    shape, axis = site.shapes[0], site.layer.axis
    if axis is None:
        gone = {index for index, size in enumerate(shape) if size == 1}
    else:
        gone = {one % len(shape) for one in (axis if isinstance(axis, list | tuple) else (axis,))}
    return (tuple(labels for index, labels in enumerate(site.axes[0]) if index not in gone),)


def _reshape(site: Site) -> Sequence[Axes]:
    return (reshaped(site, site.axes[0], site.shapes[0], site.node.shapes[0]),)


def reshaped(site: Site, axes: Axes, old: Shape, new: Shape) -> Axes:
    """Labels after a reshape: blocks of axes of equal products are matched from the last axis on."""
    result: list[Labels | None] = [None] * len(new)
    i, j = len(old), len(new)
    while i > 0 and j > 0:
        first_i, first_j = i - 1, j - 1
        have, want = old[first_i], new[first_j]
        while have is not None and want is not None and have != want and min(first_i, first_j) >= 0:
            if have < want:
                first_i -= 1
                have = None if first_i < 0 or old[first_i] is None else have * int(old[first_i] or 0)
            else:
                first_j -= 1
                want = None if first_j < 0 or new[first_j] is None else want * int(new[first_j] or 0)
        if have is None or want is None:
            break
        block = _reblocked(site, axes[first_i:i], old[first_i:i], new[first_j:j])
        result[first_j:j] = block
        i, j = first_i, first_j
    for labels in axes[:i]:
        site.fix(labels, f"reshapes {old} to {new}, whose axes cannot be followed")
    return tuple(result)


def _reblocked(site: Site, axes: Sequence[Labels | None], old: Shape, new: Shape) -> list[Labels | None]:
    """Labels of one block of axes: flattened first, then divided."""
    if all(labels is None for labels in axes):
        return [None] * len(new)
    if len(axes) == 1 and len(new) == 1:
        return [axes[0]]
    sizes = [int(size or 0) for size in old]
    labelled = [labels for labels in axes if labels is not None]
    flat = labelled[0] if len(labelled) == 1 else site.units.product(labelled)
    # axes without labels repeat what the labelled ones say
    shape = [size if labels is not None else 1 for size, labels in zip(sizes, axes, strict=True)]
    grid = np.broadcast_to(flat.reshape(shape), sizes).reshape([int(size or 0) for size in new])
    grid = site.units.find(grid)
    result: list[Labels | None] = [None] * len(new)
    along = [axis for axis in range(grid.ndim) if (grid != grid.take([0], axis=axis)).any()]
    if not along:
        site.fix(grid.ravel(), f"reshapes {old} to {new}, whose axes cannot be followed")
        return result
    index = tuple(slice(None) if axis in along else 0 for axis in range(grid.ndim))
    inner = grid[index]
    if inner.ndim == 1:
        result[along[0]] = inner
        return result
    divided = site.units.divide(inner)
    if divided is None:
        site.fix(grid.ravel(), f"reshapes {old} to {new}, whose axes cannot be followed")
        return result
    for axis, labels in zip(along, divided[0], strict=True):
        result[axis] = labels
    return result


def _reshape_size(name: str) -> Callable[[Cut], Resized]:
    """The target shape with the new sizes; a -1 stays where it was."""

    def resize(cut: Cut) -> Resized:
        old = tuple(getattr(cut.layer, name))
        new = cut.shapes[0][-len(old) :]
        return Resized({name: tuple(one if one in (-1, None) else size for one, size in zip(old, new, strict=True))})

    return resize


def _reduced(site: Site) -> Sequence[Axes]:
    axes, axis = site.axes[0], site.layer.axis
    rank = len(axes)
    listed = range(rank) if axis is None else (axis if isinstance(axis, list | tuple) else (axis,))
    gone = {one % rank for one in listed}
    for one in gone:
        if site.node.kind != "Sum":  # a sum over channels reads them, as a kernel does
            site.fix(axes[one], "reduces this axis")
    if site.layer.keepdims:
        return (tuple(None if index in gone else labels for index, labels in enumerate(axes)),)
    return (tuple(labels for index, labels in enumerate(axes) if index not in gone),)


def _matmul(site: Site) -> Sequence[Axes]:
    rank = len(site.node.shapes[0])
    if any(len(axes) != rank for axes in site.axes) or len(site.axes) != 2:
        raise NotCovered("multiplies matrices of different ranks")
    batch = "ABCDEFGH"[: rank - 2]
    return (_contracted(site, [f"{batch}ij", f"{batch}jk"], f"{batch}ik"),)


def _einsum(site: Site) -> Sequence[Axes]:
    if len(site.axes) != len(_operands(site.node)):
        raise NotCovered("multiplies by a constant")
    letters, written = _einsum_letters(site.layer.subscripts, [len(axes) for axes in site.axes])
    return (_contracted(site, letters, written),)


def _contracted(site: Site, operands: Sequence[str], written: str) -> Axes:
    known: dict[str, Labels | None] = {}
    for letters, axes, shape in zip(operands, site.axes, site.shapes, strict=True):
        for letter, labels, size in zip(letters, axes, shape, strict=True):
            if size == 1:
                continue
            if letter not in known:
                known[letter] = labels
            elif labels is None or known[letter] is None:
                site.fix(labels if known[letter] is None else known[letter], "meets an axis that cannot be cut")
                known[letter] = None
            else:
                site.units.unite(known[letter], labels)  # type: ignore[arg-type]
    for letter in known:
        if letter not in written and sum(letter in letters for letters in operands) == 1:
            site.fix(known[letter], "sums over this axis")
    return tuple(known.get(letter) for letter in written)


def _broadcast_to(site: Site) -> Sequence[Axes]:
    axes, old, new = site.axes[0], site.shapes[0], site.node.shapes[0]
    more = len(new) - len(old)
    for labels, have, want in zip(axes, old, new[more:], strict=True):
        if have != want:
            site.fix(labels, "broadcasts this axis")
    return ((*(None,) * more, *(None if a != b else c for c, a, b in zip(axes, old, new[more:], strict=True))),)


def _pad(site: Site) -> Sequence[Axes]:
    for labels, width in zip(site.axes[0], site.layer.pad_width, strict=True):
        if tuple(width) != (0, 0):
            site.fix(labels, "pads this axis")
    return (site.axes[0],)


def _repeat_vector(site: Site) -> Sequence[Axes]:
    return ((site.axes[0][0], None, site.axes[0][1]),)


ELEMENTWISE = Coupling(_passes)
"""The rule of a call with one input that treats every element alone."""

_ELEMENTWISE_KINDS = (
    "Abs Absolute ActivityRegularization AlphaDropout Cast Celu Clip Dropout ELU Elu Erf Exp Expm1 GaussianDropout "
    "GaussianNoise Gelu HardSigmoid HardSilu HardTanh Identity LeakyReLU LeakyRelu Log Log1p LogSigmoid Negative ReLU "
    "Reciprocal Relu Relu6 Round Rsqrt Selu Sigmoid Sign Silu SoftShrink Softplus Softsign SpatialDropout1D "
    "SpatialDropout2D Sqrt Square StochasticDepth StopGradient Tanh TanhShrink Threshold"
).split()
_SPATIAL_KINDS = (
    "AveragePooling1D AveragePooling2D Cropping1D Cropping2D GlobalAveragePooling1D GlobalAveragePooling2D "
    "GlobalMaxPooling1D GlobalMaxPooling2D MaxPooling1D MaxPooling2D Resizing UpSampling1D UpSampling2D ZeroPadding1D "
    "ZeroPadding2D AveragePool MaxPool Resize"
).split()
_CONV = Coupling(_conv, _conv_size)
_REDUCED = Coupling(_reduced)

COUPLINGS: dict[str, Coupling] = {
    **dict.fromkeys(_ELEMENTWISE_KINDS, ELEMENTWISE),
    **dict.fromkeys(_SPATIAL_KINDS, Coupling(_spatial)),
    "Conv1D": _CONV,
    "Conv2D": _CONV,
    "DepthwiseConv1D": Coupling(_depthwise),
    "DepthwiseConv2D": Coupling(_depthwise),
    "SeparableConv1D": Coupling(_separable, lambda cut: Resized({"filters": cut.size(cut.layer.pointwise_kernel, -1)})),
    "SeparableConv2D": Coupling(_separable, lambda cut: Resized({"filters": cut.size(cut.layer.pointwise_kernel, -1)})),
    "Conv2DTranspose": Coupling(_conv_transpose, lambda cut: Resized({"filters": cut.size(cut.layer.kernel, -2)})),
    "Dense": Coupling(_dense, lambda cut: Resized({"units": cut.size(cut.layer.kernel, 1)})),
    "EinsumDense": Coupling(_einsum_dense, _einsum_dense_size),
    "MultiHeadAttention": Coupling(_attention, _attention_size),
    "Embedding": Coupling(_embedding, lambda cut: Resized({"output_dim": cut.size(cut.layer.embeddings, 1)})),
    "BatchNormalization": Coupling(_batch_norm),
    "LayerNormalization": Coupling(_layer_norm),
    "RMSNormalization": Coupling(_layer_norm),
    "GroupNormalization": Coupling(_group_norm),
    "UnitNormalization": ELEMENTWISE,
    "PReLU": Coupling(_prelu),
    "LayerScale": per_channel("gamma", scored=("gamma",), config=("projection_dim",)),
    "Activation": Coupling(_activation),
    "Softmax": Coupling(_along_axis),
    "LogSoftmax": Coupling(_along_axis),
    "Add": Coupling(_summed, _elementwise_size),
    "Subtract": Coupling(_summed, _elementwise_size),
    "Average": Coupling(_summed, _elementwise_size),
    "CustomScaleLayer": Coupling(_summed, _elementwise_size),
    "Maximum": Coupling(_elementwise, _elementwise_size),
    "Minimum": Coupling(_elementwise, _elementwise_size),
    "Multiply": Coupling(_elementwise, _elementwise_size),
    "TrueDivide": Coupling(_elementwise, _elementwise_size),
    "Divide": Coupling(_elementwise, _elementwise_size),
    "Power": Coupling(_elementwise, _elementwise_size),
    "Rescaling": Coupling(_passes, _rescaling_size),
    "Concatenate": Coupling(_concatenate),
    "Split": Coupling(_split, _split_size),
    "GetItem": Coupling(_get_item, _get_item_size),
    "Permute": Coupling(_transposed(_permute_order)),
    "Transpose": Coupling(_transposed(_transpose_order)),
    "Swapaxes": Coupling(_transposed(_swap_order)),
    "Moveaxis": Coupling(_transposed(_move_order)),
    "ExpandDims": Coupling(_expand_dims),
    "Squeeze": Coupling(_squeeze),
    "Flatten": Coupling(_reshape),
    "RepeatVector": Coupling(_repeat_vector),
    "BroadcastTo": Coupling(_broadcast_to, _reshape_size("shape")),
    "Pad": Coupling(_pad),
    "Matmul": Coupling(_matmul),
    "Einsum": Coupling(_einsum),
    **dict.fromkeys(("Mean", "Sum", "Max", "Min", "Var", "Std"), _REDUCED),
}
"""Rules by class name; `Reshape`, which is a layer and an operation, is added below with both of its spellings."""


def _any_reshape_size(cut: Cut) -> Resized:
    return _reshape_size("target_shape" if hasattr(cut.layer, "target_shape") else "newshape")(cut)


COUPLINGS["Reshape"] = Coupling(_reshape, _any_reshape_size)
