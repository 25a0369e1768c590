"""Merge merged blocks again: two that read one another with nothing in between, or whose sum is all that is read.

A merged block is one or two linear layers, with an Add where it kept its skip. Behind another one it composes with it,
exactly, as long as its padding shows it what the first would have written there. Worth it where the composed layer
multiplies less: two pointwise maps with their skips become one. Two that read the same tensor and are added are one
map too, their sum.
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
    name: str


def rejoined(merged: Merged) -> tuple[Merged, tuple[str, ...]]:
    """Return a merge whose neighbouring blocks are single layers where that costs less, and the names of those layers.

    Raises:
        MergeError: the network that was built does not compute what its graph says.
    """
    graph = read_graph(merged.model)
    blocks = {block.name for block in merged.blocks}
    made: list[str] = []
    while (both := _cheaper(graph, blocks)) is not None:
        graph, name = _joined(graph, both)
        blocks.add(name.removesuffix(MERGED))
        made.append(name)
    left = tuple(name for name in made if name in graph.by_name)
    if not left:
        return merged, ()
    model = build_model(graph, name=merged.model.name)
    return replace(merged, model=model, error=max(merged.error, require_equal(merged.model, model))), left


def _cheaper(graph: ModelGraph, blocks: set[str]) -> _Linear | None:
    """Return the first two merged blocks that are one map which multiplies less than they do, as that."""
    found = (*_sums(graph, blocks), *_neighbours(graph, blocks))
    return next((both for both in found if _macs(graph, both.map, both.exit) < both.macs), None)


def _sums(graph: ModelGraph, blocks: set[str]) -> Iterable[_Linear]:
    """Yield merged blocks that read the same tensor and that nobody reads but the Add of the two."""
    for node in graph:
        if node.kind != "Add" or len(set(node.inputs)) != 2 or len(node.inputs) != 2:
            continue
        if any(graph.readers[ref] != (node.name,) or ref in graph.output_refs for ref in node.inputs):
            continue
        paths = [_path(graph, ref, None, blocks) for ref in node.inputs]
        if not all(paths):
            continue
        first, second = (_unit(graph, path, (), ref) for path, ref in zip(paths, node.inputs, strict=True))
        if first.entry != second.entry:
            continue
        try:
            map = affine.add(first.map, second.map)
        except ShapeError:
            continue
        nodes = (*first.nodes, *second.nodes, node.name)
        name = f"{first.name}_and_{second.name}"
        yield _Linear(nodes, first.entry, Ref(node.name), map, first.macs + second.macs, name)


def _neighbours(graph: ModelGraph, blocks: set[str]) -> Iterable[_Linear]:
    """Yield merged blocks of which one reads what the other writes, and nobody else does."""
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
        map = affine.compose(first.map, second.map)
        name = f"{first.name.partition('_to_')[0]}_to_{second.name.rpartition('_to_')[2]}"
        nodes = (*first.nodes, *second.nodes)
        yield _Linear(nodes, first.entry, second.exit, map, first.macs + second.macs, name)


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
    return _Linear((*path, *join), entry, exit, map, macs, _block(path[0]) or path[0])


def _macs(graph: ModelGraph, map: AffineConv, exit: Ref) -> int:
    height, width = image_size(graph.shape(exit))
    return map.kernel.size * (height or 1) * (width or 1)


def _joined(graph: ModelGraph, both: _Linear) -> tuple[ModelGraph, str]:
    name = f"{both.name}{MERGED}"
    ref, shape = both.entry, graph.shape(both.entry)
    policy = graph.by_name[both.nodes[0]].layer.dtype_policy
    nodes: list[Node] = []
    for spec in layer_specs(both.map, name, rank=len(shape)):
        nodes.append(new_node(spec, ref, shape, policy, graph.dtype(both.exit)))
        ref, shape = Ref(nodes[-1].name), nodes[-1].shapes[0]
    if shape != graph.shape(both.exit):
        raise ShapeError(f"'{name}' writes {shape}, not {graph.shape(both.exit)}.")
    return graph.replace_site(both.nodes, nodes, both.exit, ref), name
