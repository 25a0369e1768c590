"""Find the blocks of a graph by structure, or say why a place is none.

Two patterns are looked for, and no name is ever read. A *residual* block is everything between a tensor and the Add
where its two paths meet again. A *chain* block is a run of linear layers with activations between them, cut where
one linear layer follows another (a linear bottleneck), after a depthwise layer's pointwise, or after two dense ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from updp_tf import affine, rules
from updp_tf.affine import AffineConv, Geometry
from updp_tf.errors import ModelError
from updp_tf.graph import n_elements, read_graph, split_activations
from updp_tf.structure import Block, Cost, ModelGraph, Node, Ref, Refusal, Stage, refs_in

JOINS = frozenset({"Add"})
"""Kinds whose two inputs are summed: layers.Add and the `+` of two tensors."""


class Blocks(Sequence[Block]):
    """The blocks of a model in graph order, and what was refused.

    Attributes:
        graph: the graph the blocks were found in.
        skipped: places that looked like blocks and are none, with the reason.
    """

    def __init__(self, graph: ModelGraph, blocks: Sequence[Block], skipped: Sequence[Refusal]) -> None:
        self.graph = graph
        self.skipped = tuple(skipped)
        self._blocks = tuple(blocks)

    @overload
    def __getitem__(self, key: int | str) -> Block: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Block, ...]: ...
    def __getitem__(self, key: int | str | slice) -> Block | tuple[Block, ...]:
        if isinstance(key, str):
            for block in self._blocks:
                if block.name == key:
                    return block
            raise KeyError(f"No block is named '{key}'; the blocks are: {', '.join(b.name for b in self._blocks)}.")
        return self._blocks[key]

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def __str__(self) -> str:
        rows = [("block", "shape", "skip", "kernel", "layers", "MACs (M)")]
        for block in self._blocks:
            kernel = "-" if block.geometry is None else "x".join(map(str, block.geometry.kernel_size))
            shape = f"{_size(block.entry_shape)} -> {_size(block.exit_shape)}"
            macs = f"{block.cost.macs / 1e6:.2f}"
            rows.append((block.name, shape, block.skip_kind, kernel, str(len(block.nodes)), macs))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"skipped  {refusal}" for refusal in self.skipped)])

    __repr__ = __str__


def _size(shape: tuple[int | None, ...]) -> str:
    return "x".join("?" if axis is None else str(axis) for axis in shape[1:])


def find_blocks(model: Any) -> Blocks:
    """Return the blocks of a Keras model that a single layer might replace.

    Args:
        model: a built Functional or Sequential model; it is not changed.

    Returns:
        `Blocks`, in graph order; `blocks["name"]` finds one, `blocks.skipped` says what was refused and why.

    Raises:
        ModelError: the model cannot be read (subclassed, not built, of another Keras).
    """
    return find_blocks_in(prepared_graph(model))


def prepared_graph(model: Any) -> ModelGraph:
    """Read a model the way blocks are found in it: activations that layers apply themselves are calls of their own."""
    return split_activations(read_graph(model), kinds=rules.SPLITTABLE)


def find_blocks_in(graph: ModelGraph) -> Blocks:
    """Return the blocks of a prepared graph."""
    finder = _Finder(graph)
    return Blocks(graph, *finder.find())


def require_blocks(blocks: Blocks) -> None:
    """Raise a `ModelError` that says why, if there are no blocks."""
    if len(blocks) == 0:
        reasons = "; ".join(str(refusal) for refusal in blocks.skipped[:5])
        raise ModelError(
            f"'{blocks.graph.name}' has no block that could be pruned"
            + (f": {reasons}." if reasons else ": no residual and no chain of linear layers was found.")
        )


def read_stages(graph: ModelGraph, block: Block) -> tuple[Stage, ...]:
    """Return the linear maps and activations of a block's body, float64.

    Raises:
        ModelError: the body has no linear map; `block.linear_refusal` says why.
    """
    if block.linear_refusal is not None:
        raise ModelError(f"'{block.name}' has no linear map: {block.linear_refusal.reason}.")
    return _parse(graph, block.body, block.entry)


class _NotLinear(Exception):
    """A node of a body without a linear rule; the message names it."""


def _parse(graph: ModelGraph, names: Sequence[str], entry: Ref) -> tuple[Stage, ...]:
    """Read a path of calls, each reading only the one before, as stages."""
    stages: list[Stage] = []
    maps: list[AffineConv] = []
    last_norm: rules.Norm | None = None
    read = entry
    for name in names:
        node = graph.by_name[name]
        if node.inputs != (read,):
            raise _NotLinear(f"'{name}' reads {len(node.inputs)} tensors")
        shape = graph.shape(read)
        read = Ref(name)
        try:
            if rules.is_passive(node):
                continue
            if (linear := rules.linear_maps(node, shape)) is not None:
                maps += linear
                last_norm = None
            elif (norm := rules.norm(node, shape)) is not None:
                maps[-1:] = _after(maps[-1:], norm)
                last_norm = norm
            elif (function := rules.activation(node)) is not None:
                moments = (last_norm.mean, last_norm.std) if last_norm else (None, None)
                identity = affine.identity(int(shape[-1] or 0))
                stages.append(Stage(tuple(maps) or (identity,), function, *moments))
                maps, last_norm = [], None
            else:
                raise _NotLinear(f"'{name}' is a {node.kind}, which has no linear rule")
        except rules.Unsupported as error:
            raise _NotLinear(f"'{name}' {error}") from error
    if maps:
        stages.append(Stage(tuple(maps)))
    return tuple(stages)


def _after(maps: list[AffineConv], norm: rules.Norm) -> list[AffineConv]:
    if maps:
        return [affine.fold_norm_after(maps[0], norm.scale, norm.shift)]
    return [affine.from_scale(norm.scale, norm.shift)]


@dataclass(frozen=True)
class _Link:
    """One linear layer of a chain with what follows it up to the next one."""

    nodes: tuple[str, ...]
    kind: str  # depthwise, pointwise, dense (k x k), scale (a norm or padding alone)
    activation: tuple[str, ...]  # nodes from the activation on; empty: the link is linear to its end


class _Finder:
    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.skipped: list[Refusal] = []
        self.claimed: set[str] = set()
        self.live = liveness(graph)
        self._outputs = set(graph.output_refs)
        self._depth: dict[str, int] = {}
        self._dominator: dict[str, str | None] = {}
        for node in graph:
            self._add_to_dominator_tree(node)

    def find(self) -> tuple[list[Block], list[Refusal]]:
        blocks = [*self._residual_blocks(), *self._chain_blocks()]
        blocks.sort(key=lambda block: self.graph.position[block.nodes[-1]])
        return blocks, self.skipped

    # Residual blocks

    def _add_to_dominator_tree(self, node: Node) -> None:
        parents = [ref.node for ref in node.inputs]
        dominator: str | None = parents[0] if parents else None
        for parent in parents[1:]:
            dominator = self._common(dominator, parent)
        self._dominator[node.name] = dominator
        self._depth[node.name] = 0 if dominator is None else self._depth[dominator] + 1

    def _common(self, a: str | None, b: str | None) -> str | None:
        while a != b:
            if a is None or b is None:
                return None
            if self._depth[a] >= self._depth[b]:
                a = self._dominator[a]
            else:
                b = self._dominator[b]
        return a

    def _residual_blocks(self) -> Iterator[Block]:
        for node in self.graph:
            if node.kind in JOINS and len(set(node.inputs)) == 2 and len(node.inputs) == 2:
                found = self._residual_block(node)
                if isinstance(found, Refusal):
                    self.skipped.append(found)
                else:
                    self.claimed.update(found.nodes)
                    yield found

    def _residual_block(self, join: Node) -> Block | Refusal:
        def refuse(rule: str, reason: str) -> Refusal:
            return Refusal(join.name, rule, reason)

        entry_name = self._dominator[join.name]
        if entry_name is None:
            return refuse("single_entry", "its two paths start at different inputs of the model")
        if len(self.graph.by_name[entry_name].shapes) > 1:
            return refuse("single_entry", f"its paths start at different outputs of '{entry_name}'")
        entry = Ref(entry_name)
        members = self._members(join, entry_name)
        inside = set(members) | {join.name}
        for name in members:
            for ref in self._written(name):
                readers = [reader for reader in self.graph.readers.get(ref, ()) if reader not in inside]
                if readers or ref in self._outputs:
                    where = f"by '{readers[0]}'" if readers else "as an output of the model"
                    return refuse("single_exit", f"'{name}' inside it is read outside, {where}")
        shapes = [self.graph.shape(ref) for ref in join.inputs]
        if shapes[0] != shapes[1]:
            return refuse("same_shape", f"it adds tensors of shapes {_size(shapes[0])} and {_size(shapes[1])}")
        if taken := [name for name in members if name in self.claimed]:
            return refuse("nested", f"'{taken[-1]}' inside it belongs to another block")
        first, second = (self._path(ref, entry) for ref in join.inputs)
        if first is None or second is None:
            return refuse("two_paths", "one of its two paths branches again")
        body, skip = self._body_and_skip(first, second, entry)
        if skip is None:
            return refuse("linear_skip", "neither of its two paths is an identity or a linear projection")
        nodes = (*(name for name in self.graph.position if name in inside),)
        return self._block(nodes, body, entry, skip_nodes=skip, join=join.name)

    def _members(self, join: Node, entry: str) -> list[str]:
        """Nodes strictly between the entry and the join, in topological order."""
        found: set[str] = set()
        waiting = [ref.node for ref in join.inputs]
        while waiting:
            name = waiting.pop()
            if name != entry and name not in found:
                found.add(name)
                waiting += [ref.node for ref in self.graph.by_name[name].inputs]
        return sorted(found, key=self.graph.position.__getitem__)

    def _written(self, name: str) -> Iterator[Ref]:
        for index in range(len(self.graph.by_name[name].shapes)):
            yield Ref(name, index)

    def _path(self, ref: Ref, entry: Ref) -> tuple[str, ...] | None:
        """Names of the calls from the entry to a tensor, or None if they are no single path."""
        names: list[str] = []
        while ref != entry:
            node = self.graph.by_name[ref.node]
            if len(node.inputs) != 1:
                return None
            names.append(node.name)
            ref = node.inputs[0]
        return tuple(reversed(names))

    def _body_and_skip(
        self, first: tuple[str, ...], second: tuple[str, ...], entry: Ref
    ) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        """Tell the body from the skip: the skip is empty, or a linear projection; the shorter path is tried first."""
        longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
        for body, skip in ((longer, shorter), (shorter, longer)):
            if not skip or self._is_projection(skip, entry):
                return body, skip
        return longer, None

    def _is_projection(self, names: tuple[str, ...], entry: Ref) -> bool:
        try:
            stages = _parse(self.graph, names, entry)
        except _NotLinear:
            return False
        if not stages:
            return True  # only calls that do nothing at inference
        if len(stages) != 1 or stages[0].activation is not None:
            return False
        geometry = affine.composed_geometry(stages[0].maps)
        return geometry.kernel_size == (1, 1) and geometry.padding == (0, 0, 0, 0)

    # Chain blocks

    def _chain_blocks(self) -> Iterator[Block]:
        for chain in self._chains():
            for names in _cut(_links(self.graph, chain)):
                yield self._block(names, names, self.graph.by_name[names[0]].inputs[0], skip_nodes=(), join=None)

    def _chains(self) -> Iterator[list[str]]:
        """Longest runs of unclaimed linear, norm, activation and passive calls, each read by the next alone."""
        chain: list[str] = []
        done: set[str] = set()
        for start in self.graph:
            if start.name in done or not self._is_chain_node(start):
                continue
            chain, node = [start.name], start
            while (after := self._only_reader(node)) is not None and self._is_chain_node(after):
                chain.append(after.name)
                node = after
            done.update(chain)
            yield chain

    def _is_chain_node(self, node: Node) -> bool:
        if node.name in self.claimed or len(node.inputs) != 1 or len(node.shapes) != 1:
            return False
        if len(node.shapes[0]) != 4:
            return False
        if rules.is_passive(node):
            return True
        try:
            shape = self.graph.shape(node.inputs[0])
            return any(rule is not None for rule in (rules.linear_maps(node, shape), rules.norm(node, shape))) or (
                rules.activation(node) is not None
            )
        except rules.Unsupported as error:
            refusal = Refusal(node.name, "linear", f"'{node.name}' {error}")
            if node.kind in rules.LINEAR and refusal not in self.skipped:
                self.skipped.append(refusal)
            return False

    def _only_reader(self, node: Node) -> Node | None:
        ref = Ref(node.name)
        readers = self.graph.readers.get(ref, ())
        if len(readers) != 1 or ref in self._outputs:
            return None
        return self.graph.by_name[readers[0]]

    # Both

    def _block(
        self,
        nodes: tuple[str, ...],
        body: tuple[str, ...],
        entry: Ref,
        *,
        skip_nodes: tuple[str, ...],
        join: str | None,
    ) -> Block:
        graph = self.graph
        name = nodes[-1]
        geometry: Geometry | None = None
        refusal: Refusal | None = None
        try:
            maps = [one for stage in _parse(graph, body, entry) for one in stage.maps]
            geometry = affine.composed_geometry(maps)
        except _NotLinear as error:
            refusal = Refusal(name, "linear", str(error))
        skip: AffineConv | None = None
        if join is not None:
            channels = int(graph.shape(entry)[-1] or 0)
            stages = _parse(graph, skip_nodes, entry)
            skip = affine.compose_all(stages[0].maps) if stages else affine.identity(channels)
        inside = set(nodes)
        return Block(
            name=name,
            nodes=nodes,
            body=body,
            entry=entry,
            exit=Ref(name),
            entry_shape=graph.shape(entry),
            exit_shape=graph.shape(Ref(name)),
            skip=skip,
            skip_nodes=skip_nodes,
            join=join,
            geometry=geometry,
            linear_refusal=refusal,
            cost=replace(cost_of(graph, nodes), activation_bytes=max(self.live.total[n] for n in nodes)),
            skip_cost=cost_of(graph, skip_nodes),
            live_bytes=max(self.live.total[n] - self.live.of(n, inside) for n in nodes),
        )


def _links(graph: ModelGraph, chain: Sequence[str]) -> list[_Link]:
    """Group a chain into linear layers with the norms, paddings and activations around them."""
    links: list[_Link] = []
    linear: list[str] = []
    active: list[str] = []
    kind = ""

    def close() -> None:
        nonlocal linear, active, kind
        if linear or active:
            links.append(_Link(tuple(linear), kind or "scale", tuple(active)))
        linear, active, kind = [], [], ""

    for name in chain:
        node = graph.by_name[name]
        shape = graph.shape(node.inputs[0])
        is_linear = rules.linear_maps(node, shape) if not rules.is_passive(node) else None
        own_kind = _kind(is_linear) if is_linear else ""
        if active and not rules.is_passive(node) and rules.activation(node) is None:
            close()
        if own_kind and kind:
            close()
        if own_kind or (not active and rules.activation(node) is None):
            linear.append(name)
            kind = own_kind or kind
        else:
            active.append(name)
    close()
    return links


def _kind(maps: Sequence[AffineConv]) -> str:
    last = maps[-1]
    if len(maps) > 1:
        return "separable"
    if last.kernel_size == (1, 1) and any(last.padding):
        return ""  # a padding layer belongs to the convolution after it
    if last.groups > 1 and last.groups == last.c_in:
        return "depthwise"
    return "pointwise" if last.kernel_size == (1, 1) else "dense"


def _cut(links: Sequence[_Link]) -> Iterator[tuple[str, ...]]:
    """Yield the nodes of each block of a chain; the activation after a block stays outside it."""
    current: list[_Link] = []
    for index, link in enumerate(links):
        after = links[index + 1] if index + 1 < len(links) else None
        current.append(link)
        if after is not None and not _ends(current, after):
            continue
        if sum(one.kind != "scale" for one in current) >= 2 and any(one.activation for one in current[:-1]):
            inner = [name for one in current[:-1] for name in (*one.nodes, *one.activation)]
            yield (*inner, *current[-1].nodes)
        current = []


def _ends(current: Sequence[_Link], after: _Link) -> bool:
    last = current[-1]
    kinds = [one.kind for one in current if one.kind != "scale"]
    if not kinds:
        # Norms and activations in front of a block belong to it only where it starts with them.
        return False
    if last.kind == "pointwise" and "depthwise" in kinds:
        return True
    if after.kind == "depthwise":
        return kinds != ["pointwise"]
    if last.kind == "depthwise":
        return False
    if not last.activation and last.kind != "scale":
        return True
    return len(kinds) >= 2


@dataclass(frozen=True)
class Liveness:
    """Float32 bytes of the tensors alive while each node runs, for one image.

    Norms and activations work in place: a runtime fuses them into the layer before.
    """

    total: dict[str, int]
    by_writer: dict[str, dict[str, int]]

    def of(self, node: str, writers: set[str]) -> int:
        """Bytes alive while `node` runs that nodes of `writers` wrote."""
        return sum(size for writer, size in self.by_writer[node].items() if writer in writers)


def liveness(graph: ModelGraph) -> Liveness:
    """Return what is alive while each node of a graph runs."""
    outputs = set(graph.output_refs)
    writer: dict[Ref, str] = {}
    size: dict[str, int] = {}
    last_use: dict[str, int] = {}
    for index, node in enumerate(graph):
        in_place = (
            (rules.is_passive(node) or node.kind in rules.NORMS or node.kind in rules.ACTIVATIONS)
            and len(node.inputs) == 1
            and len(graph.readers[node.inputs[0]]) == 1
            and node.inputs[0] not in outputs
        )
        for ref in node.inputs:
            last_use[writer[ref]] = index
        for number in range(len(node.shapes)):
            root = writer[node.inputs[0]] if in_place else node.name
            writer[Ref(node.name, number)] = root
        if writer[Ref(node.name)] == node.name:
            size[node.name] = sum(4 * n_elements(shape) for shape in node.shapes)
            last_use[node.name] = index
    for ref in refs_in(graph.outputs):
        last_use[writer[ref]] = len(graph.nodes)
    alive: dict[str, int] = {}
    by_writer: dict[str, dict[str, int]] = {}
    for index, node in enumerate(graph):
        if node.name in size:
            alive[node.name] = size[node.name]
        by_writer[node.name] = dict(alive)
        alive = {name: n for name, n in alive.items() if last_use[name] > index}
    return Liveness({name: sum(sizes.values()) for name, sizes in by_writer.items()}, by_writer)


def cost_of(graph: ModelGraph, names: Sequence[str]) -> Cost:
    """MACs of the calls and parameters of the layers that only they call; no activation bytes.

    A layer that is called elsewhere too stays in the network whatever becomes of these calls.
    """
    nodes = [graph.by_name[name] for name in names]
    macs = sum(rules.macs(node, tuple(graph.shape(ref) for ref in node.inputs)) for node in nodes if node.inputs)
    inside = set(names)
    elsewhere = {id(node.layer) for node in graph if node.name not in inside}
    layers = {
        id(node.layer): node.layer
        for node in nodes
        if hasattr(node.layer, "count_params") and id(node.layer) not in elsewhere
    }
    return Cost(macs=macs, params=sum(int(layer.count_params()) for layer in layers.values()))


def network_cost(graph: ModelGraph) -> Cost:
    """Cost of a whole graph for one image."""
    cost = cost_of(graph, [node.name for node in graph])
    return replace(cost, activation_bytes=max(liveness(graph).total.values()))
