"""Rules about the channels of calls without weights: element by element, shapes, products of two tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from updp_tf.isomorphic.coupling import (
    ALONG_CHANNELS,
    ELEMENTWISE,
    Axes,
    Coupling,
    Cut,
    NotCovered,
    Resized,
    Site,
    follows_elementwise,
    function_name,
)
from updp_tf.isomorphic.units import Labels
from updp_tf.rules import PASSIVE, einsum_letters
from updp_tf.structure import Node, Ref, Shape

# --- element by element --------------------------------------------------------------------------------------------


def _activation(site: Site) -> Sequence[Axes]:
    function = site.layer.activation
    if isinstance(function, keras.Layer) and function.variables:
        raise NotCovered("applies a layer with weights as its activation")
    if function_name(function) in ALONG_CHANNELS:
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
    letters, written = einsum_letters(site.layer.subscripts, [len(axes) for axes in site.axes])
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


def _any_reshape_size(cut: Cut) -> Resized:
    """`Reshape` is a layer and an operation, which spell the target in two ways."""
    return _reshape_size("target_shape" if hasattr(cut.layer, "target_shape") else "newshape")(cut)


_ELEMENTWISE_KINDS = (
    "Abs Absolute Cast Celu Clip ELU Elu Erf Exp Expm1 "
    "Gelu HardSigmoid HardSilu HardTanh LeakyReLU LeakyRelu Log Log1p LogSigmoid Negative ReLU "
    "Reciprocal Relu Relu6 Round Rsqrt Selu Sigmoid Sign Silu SoftShrink Softplus Softsign "
    "Sqrt Square StopGradient Tanh TanhShrink Threshold"
).split()
_SPATIAL_KINDS = (
    "AveragePooling1D AveragePooling2D Cropping1D Cropping2D GlobalAveragePooling1D GlobalAveragePooling2D "
    "GlobalMaxPooling1D GlobalMaxPooling2D MaxPooling1D MaxPooling2D Resizing UpSampling1D UpSampling2D ZeroPadding1D "
    "ZeroPadding2D AveragePool MaxPool Resize"
).split()

WEIGHTLESS: dict[str, Coupling] = {
    **dict.fromkeys((*_ELEMENTWISE_KINDS, *PASSIVE), ELEMENTWISE),
    **dict.fromkeys(_SPATIAL_KINDS, Coupling(_spatial)),
    "UnitNormalization": ELEMENTWISE,
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
    "Rescaling": Coupling(follows_elementwise, _rescaling_size),
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
    "Reshape": Coupling(_reshape, _any_reshape_size),
    "RepeatVector": Coupling(_repeat_vector),
    "BroadcastTo": Coupling(_broadcast_to, _reshape_size("shape")),
    "Pad": Coupling(_pad),
    "Matmul": Coupling(_matmul),
    "Einsum": Coupling(_einsum),
    **dict.fromkeys(("Mean", "Sum", "Max", "Min", "Var", "Std"), Coupling(_reduced)),
}
"""Rules by class name of the layer or operation."""
