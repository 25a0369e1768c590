"""Which pixels of a block's entry an output pixel depends on, whatever calls are inside.

A fitted form needs no linear inside, but it needs to know where to look: kernel size, strides and padding of the
window that the block itself reads through. Convolutions and pooling compose; element-wise calls read what both of
their sides read; a gate (one value for the whole image) does not move anything; attention reads everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from updp_tf import affine, rules
from updp_tf.affine import Geometry
from updp_tf.structure import ModelGraph, Node, Ref, Shape, image_size

POINT = Geometry((1, 1), (1, 1), (0, 0, 0, 0))
"""The window of an element-wise call."""

ELEMENTWISE = frozenset(
    {"Add", "Average", "Concatenate", "Divide", "Maximum", "Minimum", "Multiply", "Power", "Subtract", "TrueDivide"}
)
"""Kinds that combine several tensors, or a tensor and a constant, pixel by pixel."""

POINTWISE = frozenset({"Dense", "EinsumDense", "PReLU", "Rescaling", "Softmax"})
"""Kinds that read one tensor pixel by pixel, besides norms, activations and what does nothing at inference."""

WINDOWED = frozenset(
    {"AveragePooling2D", "Conv2D", "DepthwiseConv2D", "MaxPooling2D", "SeparableConv2D", "ZeroPadding2D"}
)
"""Kinds that read a window of fixed size."""


class NoWindow(Exception):
    """No window of a block's entry is known; the message is the reason. Never leaves this package."""


@dataclass(frozen=True)
class _Reach:
    """What a tensor inside a block shows of the entry: a window, None where it has no place in the image.

    `everywhere`: besides, it depends on pixels anywhere.
    """

    window: Geometry | None
    everywhere: bool = False


def window_of(graph: ModelGraph, names: Sequence[str], entry: Ref, exit: Ref) -> Geometry:
    """Return the window of the entry that a pixel of the exit depends on.

    Where calls inside mix all pixels it is so large that it covers the image from everywhere.

    Args:
        graph: that the calls belong to.
        names: of the calls between, in topological order.
        entry: the tensor that they read.
        exit: the tensor that is asked for.

    Raises:
        NoWindow: the tensors are no images, tokens or vectors with channels last, or their sizes tell no strides.
    """
    read, written = graph.shape(entry), graph.shape(exit)
    if len(read) not in (2, 3, 4) or len(read) != len(written):
        raise NoWindow(f"it turns a tensor of rank {len(read)} into one of rank {len(written)}")
    found = {entry: _Reach(POINT)}
    for name in names:
        node = graph.by_name[name]
        if getattr(node.layer, "data_format", "channels_last") != "channels_last":
            raise NoWindow(f"'{name}' is channels_first")
        reach = _through(graph, node, [found[ref] for ref in node.inputs if ref in found])
        found |= {Ref(name, index): reach for index in range(len(node.shapes))}
    reach = found[exit]
    window = reach.window or _from_sizes(image_size(read), image_size(written))
    if reach.everywhere:
        window = _enlarged(window, image_size(read))
    for axis, (n, wanted) in enumerate(zip(image_size(read), image_size(written), strict=True)):
        if n is not None and wanted is not None and _n_outputs(window, axis, n) != wanted:
            raise NoWindow(f"a window of {window.kernel_size} gives another size than its exit has")
    return window


def _n_outputs(window: Geometry, axis: int, n: int) -> int:
    pads = sum(window.padding[2 * axis : 2 * axis + 2])
    return (n + pads - window.kernel_size[axis]) // window.strides[axis] + 1


def _from_sizes(read: tuple[int | None, int | None], written: tuple[int | None, int | None]) -> Geometry:
    strides: list[int] = []
    for n, wanted in zip(read, written, strict=True):
        if n is None or wanted is None or n % wanted:
            raise NoWindow(f"an entry of size {read} and an exit of size {written} tell no strides")
        strides.append(n // wanted)
    return replace(POINT, strides=(strides[0], strides[1]))


def _enlarged(window: Geometry, size: tuple[int | None, int | None]) -> Geometry:
    """Return the window grown by the image on every side; not at all where its size is dynamic."""
    rows, columns = ((n or 1) - 1 for n in size)
    height, width = window.kernel_size
    top, bottom, left, right = window.padding
    return Geometry(
        (height + 2 * rows, width + 2 * columns),
        window.strides,
        (top + rows, bottom + rows, left + columns, right + columns),
    )


def _through(graph: ModelGraph, node: Node, reads: Sequence[_Reach]) -> _Reach:
    everywhere = any(reach.everywhere for reach in reads)
    windows = [reach.window for reach in reads if reach.window is not None]
    if not windows or len({window.strides for window in windows}) > 1:
        return _Reach(None, everywhere or bool(windows))
    before = _union(windows)
    shape, written = graph.shape(node.inputs[0]), node.shapes[0]
    if node.kind in WINDOWED:
        return _Reach(affine.compose_geometry(before, _own_window(node, shape)), everywhere)
    if node.kind in ELEMENTWISE:
        return _Reach(before, everywhere)
    if node.kind in rules.LINEAR and node.kind not in POINTWISE and (own := _known_window(node, shape)) is not None:
        return _Reach(affine.compose_geometry(before, own), everywhere)
    if len(node.inputs) == 1 and image_size(written) == (1, 1) and image_size(shape) != (1, 1):
        return _Reach(None, everywhere)  # one value for the whole image: a gate
    if len(shape) != len(written) or image_size(shape) != image_size(written):
        return _Reach(None, True)
    return _Reach(before, everywhere or not _is_pointwise(node))


def _known_window(node: Node, shape: Shape) -> Geometry | None:
    """Return the window of a layer that a rule describes, None where the rule does not cover it."""
    try:
        maps = rules.linear_maps(node, shape)
    except rules.Unsupported:
        return None
    return None if maps is None else affine.composed_geometry(maps) if maps else POINT


def _is_pointwise(node: Node) -> bool:
    known = node.kind in POINTWISE or node.kind in rules.ACTIVATIONS or node.kind in rules.NORMS
    return known or rules.is_passive(node)


def _union(windows: Iterable[Geometry]) -> Geometry:
    """Return the smallest window that shows what windows of the same strides show, aligned with them."""
    first, *others = windows
    if not others:
        return first
    sizes: list[int] = []
    padding: list[int] = []
    for axis in (0, 1):
        before = max(window.padding[2 * axis] for window in (first, *others))
        behind = max(window.kernel_size[axis] - window.padding[2 * axis] for window in (first, *others))
        # As many outputs as the first one has: padding and kernel grow by the same.
        spare = sum(first.padding[2 * axis : 2 * axis + 2]) - first.kernel_size[axis]
        sizes.append(before + behind)
        padding += [before, max(spare + behind, 0)]
    return Geometry((sizes[0], sizes[1]), first.strides, (padding[0], padding[1], padding[2], padding[3]))


def _own_window(node: Node, shape: Shape) -> Geometry:
    layer = node.layer
    if node.kind == "ZeroPadding2D":
        (top, bottom), (left, right) = layer.padding
        return replace(POINT, padding=(top, bottom, left, right))
    size = tuple(layer.pool_size) if hasattr(layer, "pool_size") else tuple(layer.kernel_size)
    dilation = tuple(getattr(layer, "dilation_rate", (1, 1)))
    extent = ((size[0] - 1) * dilation[0] + 1, (size[1] - 1) * dilation[1] + 1)
    strides = tuple(layer.strides)
    pads = [pad for axis in (0, 1) for pad in _pads(node, layer, extent[axis], strides[axis], shape[1 + axis])]
    return Geometry(extent, (strides[0], strides[1]), (pads[0], pads[1], pads[2], pads[3]))


def _pads(node: Node, layer: Any, extent: int, stride: int, size: int | None) -> tuple[int, int]:
    if layer.padding == "valid":
        return 0, 0
    if stride == 1 or extent == 1:
        total = extent - 1
    elif size is None:
        raise NoWindow(f"'{node.name}' pads 'same' with strides on a dynamic size; give the input a fixed size")
    else:
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
    return total // 2, total - total // 2


def special_tokens(graph: ModelGraph, ref: Ref) -> tuple[int, ...]:
    """Return the numbers of a token tensor's class and distillation tokens; negative ones count from the end.

    They are the few that are concatenated to the many on the way to this tensor. Where a layer of its own does that,
    the tokens beyond the largest square are taken for them, at most two.
    """
    shape = graph.shape(ref)
    if len(shape) != 3 or shape[1] is None:
        return ()
    while True:
        node = graph.by_name[ref.node]
        sizes = [graph.shape(one)[1] if len(graph.shape(one)) == 3 else None for one in node.inputs]
        if node.kind == "Concatenate" and node.layer.axis in (1, -2):
            known = [size or 0 for size in sizes]
            largest = known.index(max(known))
            before, behind = sum(known[:largest]), sum(known[largest + 1 :])
            return (*range(before), *range(-behind, 0))
        same = [one for one in node.inputs if graph.shape(one) == shape]
        if not same:
            break
        ref = same[0]
    n = shape[1]
    spare = n - math.isqrt(n) ** 2
    return tuple(range(spare)) if n > 4 and spare in (1, 2) else ()
