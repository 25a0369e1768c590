"""Merge merged blocks again: two that read one another with nothing in between are one linear map.

A merged block is one or two linear layers, with an Add where it kept its skip. Behind another one it composes with it,
exactly, as long as its padding shows it what the first would have written there. Worth it where the composed layer
multiplies less: two pointwise maps with their skips become one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from updp_tf import affine, rules
from updp_tf.affine import AffineConv
from updp_tf.errors import ShapeError
from updp_tf.forms import fold_skip, layer_specs
from updp_tf.graph import build_model, read_graph
from updp_tf.merging import Merged, new_node
from updp_tf.settling import require_equal
from updp_tf.structure import ModelGraph, Node, Ref, image_shape, image_size

MERGED = "_merged"
"""What the names of layers end in, but for a number, that stand for a block."""


@dataclass(frozen=True)
class _Linear:
    """Calls that are one linear map, skip included."""

    nodes: tuple[str, ...]
    entry: Ref
    exit: Ref
    map: AffineConv
    macs: int


def rejoined(merged: Merged) -> tuple[Merged, tuple[str, ...]]:
    """Return a merge whose neighbouring blocks are single layers where that costs less, and the names of those layers.

    Raises:
        MergeError: the network that was built does not compute what its graph says.
    """
    graph = read_graph(merged.model)
    blocks = {block.name for block in merged.blocks}
    made: list[str] = []
    while (pair := _cheaper_pair(graph, blocks)) is not None:
        graph, name = _joined(graph, *pair)
        blocks.add(name.removesuffix(MERGED))
        made.append(name)
    left = tuple(name for name in made if name in graph.by_name)
    if not left:
        return merged, ()
    model = build_model(graph, name=merged.model.name)
    return replace(merged, model=model, error=max(merged.error, require_equal(merged.model, model))), left


def _cheaper_pair(graph: ModelGraph, blocks: set[str]) -> tuple[_Linear, _Linear, AffineConv] | None:
    """Return the first two neighbours whose composition multiplies less than they do, and that."""
    linear = {one.exit: one for node in graph for one in _linear(graph, node, blocks)}
    for second in linear.values():
        first = linear.get(second.entry)
        if first is None or second.entry in graph.output_refs:
            continue
        if not set(graph.readers[second.entry]) <= set(second.nodes):
            continue
        height, width = image_size(graph.shape(first.entry))
        if not affine.padding_is_exact(first.map, second.map, height=height, width=width):
            continue
        both = affine.compose(first.map, second.map)
        if _macs(graph, both, second.exit) < first.macs + second.macs:
            return first, second, both
    return None


def _linear(graph: ModelGraph, node: Node, blocks: set[str]) -> Iterable[_Linear]:
    """Yield the merged block that ends in a call, if one does."""
    exit = Ref(node.name)
    if node.kind != "Add":
        path = _path(graph, exit, None, blocks)
        if path:
            yield _unit(graph, path, (), exit)
    elif len(node.inputs) == 2:
        for body, skip in (node.inputs, node.inputs[::-1]):
            path = _path(graph, body, skip, blocks)
            if path:
                yield _unit(graph, path, (node.name,), exit)
                return


def _path(graph: ModelGraph, exit: Ref, entry: Ref | None, blocks: set[str]) -> tuple[str, ...]:
    """Return the linear layers of one merged block that lead from a tensor, or from wherever they start, to another."""
    path: list[str] = []
    ref = exit
    while ref != entry:
        node = graph.by_name[ref.node]
        if _block(node.name) not in blocks or len(node.inputs) != 1:
            break
        if path and (_block(node.name) != _block(path[-1]) or graph.readers[ref] != (path[-1],)):
            break
        try:
            if rules.linear_maps(node, image_shape(graph.shape(node.inputs[0]))) is None:
                break
        except rules.Unsupported:
            break
        path.append(node.name)
        (ref,) = node.inputs
    return tuple(reversed(path)) if entry is None or ref == entry else ()


def _block(layer: str) -> str | None:
    """Return the block that a layer stands for, by the name that merging gave it."""
    block, merged, number = layer.removesuffix("_pad").rpartition(MERGED)
    return block if merged and (not number or number.isdigit()) else None


def _unit(graph: ModelGraph, path: tuple[str, ...], join: tuple[str, ...], exit: Ref) -> _Linear:
    (entry,) = graph.by_name[path[0]].inputs
    maps: list[AffineConv] = []
    macs = 0
    for name in path:
        node = graph.by_name[name]
        for one in rules.linear_maps(node, image_shape(graph.shape(node.inputs[0]))) or ():
            maps.append(one)
            macs += 0 if node.kind == "ZeroPadding2D" else _macs(graph, one, Ref(name))
    map = affine.compose_all(affine.move_padding_to_front(maps))
    if join:
        map = fold_skip(map, affine.identity(map.c_in))
    return _Linear((*path, *join), entry, exit, map, macs)


def _macs(graph: ModelGraph, map: AffineConv, exit: Ref) -> int:
    height, width = image_size(graph.shape(exit))
    return map.kernel.size * (height or 1) * (width or 1)


def _joined(graph: ModelGraph, first: _Linear, second: _Linear, map: AffineConv) -> tuple[ModelGraph, str]:
    start, end = (_block(one.nodes[0]) or "" for one in (first, second))
    name = f"{start.partition('_to_')[0]}_to_{end.rpartition('_to_')[2]}{MERGED}"
    ref, shape = first.entry, graph.shape(first.entry)
    policy = graph.by_name[first.nodes[0]].layer.dtype_policy
    nodes: list[Node] = []
    for spec in layer_specs(map, name, rank=len(shape)):
        nodes.append(new_node(spec, ref, shape, policy, graph.dtype(second.exit)))
        ref, shape = Ref(nodes[-1].name), nodes[-1].shapes[0]
    if shape != graph.shape(second.exit):
        raise ShapeError(f"'{name}' writes {shape}, not {graph.shape(second.exit)}.")
    return graph.replace_site((*first.nodes, *second.nodes), nodes, second.exit, ref), name
