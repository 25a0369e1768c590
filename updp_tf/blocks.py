"""Find the blocks of a graph by structure, or say why a place is none.

Two patterns are looked for, and no name is ever read. A *residual* block is everything between a tensor and the Add
where the two paths from it meet again, whatever is inside: one tensor in, one out. A *chain* block is a run of linear
layers with activations between them, cut where one linear layer follows another (a linear bottleneck), after a
depthwise layer's pointwise, or after two dense ones; a gate (a tensor times what is computed from it) counts as an
activation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

from updp_tf import affine, rules
from updp_tf.affine import AffineConv, Geometry
from updp_tf.errors import ModelError
from updp_tf.expansions import expand
from updp_tf.graph import n_elements, read_graph, split_activations
from updp_tf.reach import ELEMENTWISE, NoWindow, special_tokens, window_of
from updp_tf.structure import Block, Cost, ModelGraph, Node, Ref, Refusal, Stage, block_name, image_shape, refs_in

JOINS = frozenset({"Add"})
"""Kinds whose two inputs are summed: layers.Add and the `+` of two tensors."""

GATES = frozenset({"Multiply"})
"""Kinds that close a gate: layers.Multiply and the `*` of two tensors."""


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

    def spans(self, max_length: int = 3) -> tuple[Block, ...]:
        """Return every run of two or more consecutive blocks as one block that a single form might replace.

        Blocks are consecutive where one reads what the other writes, with norms and activations between them at most,
        and nobody else reads what lies inside. A span of blocks with identity skips has one too; it is never
        linearizable, so it is only fitted.

        Args:
            max_length: of a span, in blocks.
        """
        found: list[Block] = []
        links = {link.first: link for link in self._links}
        for block in self._blocks:
            run: list[Block] = [block]
            between: list[str] = []
            while len(run) < max_length and (link := links.get(run[-1].name)) is not None:
                run.append(self[link.second])
                between += link.between
                found.append(_span(self.graph, run, between, self._liveness))
        return tuple(found)

    def joined(self, members: Iterable[Sequence[str]]) -> Blocks:
        """Return the blocks with spans in the place of their members.

        Args:
            members: names of each span's blocks; a single name leaves that block as it is.

        Raises:
            ModelError: names that are no consecutive blocks, or one that is in two spans.
        """
        wanted = [tuple(names) for names in members if len(names) > 1]
        if not wanted:
            return self
        known = {span.members: span for span in self.spans(max_length=max(map(len, wanted)))}
        gone: set[str] = set()
        for names in wanted:
            if names not in known or gone & set(names):
                raise ModelError(f"{', '.join(names)} are no consecutive blocks of '{self.graph.name}', each once.")
            gone |= set(names)
        left = [block for block in self._blocks if block.name not in gone] + [known[names] for names in wanted]
        left.sort(key=lambda block: self.graph.position[block.nodes[-1]])
        return Blocks(self.graph, left, self.skipped)

    def in_parts(self, having: Iterable[str] | None = None) -> Blocks:
        """Return the blocks with their linear layers in the place of those that have two or more.

        A part is one linear layer with the norm behind it, so that one convolution of a block can be dropped while the
        activations and the skip stay, as LayerMerge does; `spans` puts neighbouring parts together again. Layers that
        only a gate or an attention reads are no parts.

        Args:
            having: take only blocks apart that have a part of one of these names; all where None.
        """
        wanted = None if having is None else set(having) - {block.name for block in self._blocks}
        if wanted is not None and not wanted:
            return self
        finder = _Finder(self.graph)
        found: list[Block] = []
        for block in self._blocks:
            parts = finder.parts(block)
            taken = wanted is None or any(part.name in wanted for part in parts)
            found += parts if taken and len(parts) > 1 else [block]
        return Blocks(self.graph, found, self.skipped)

    @cached_property
    def network_cost(self) -> Cost:
        """What the whole network costs as it is."""
        return network_cost(self.graph)

    @property
    def rest_cost(self) -> Cost:
        """What the network costs outside its blocks; of its activations, the most while a node outside runs."""
        whole = self.network_cost
        inside = {name for block in self for name in block.nodes}
        live = [size for name, size in self._liveness.total.items() if name not in inside]
        return Cost(
            macs=whole.macs - sum(block.cost.macs for block in self),
            params=whole.params - sum(block.cost.params for block in self),
            activation_bytes=max(live, default=0),
            latency_ns=whole.latency_ns - sum(block.cost.latency_ns for block in self),
            file_bytes=whole.file_bytes - sum(block.cost.file_bytes for block in self),
        )

    def with_costs(self, costs: Mapping[str, Cost], network: Cost) -> Blocks:
        """Return the blocks with other costs: those that a latency table adds to.

        Args:
            costs: of every block, by name.
            network: of the whole network.
        """
        timed = Blocks(self.graph, [replace(one, cost=costs[one.name]) for one in self._blocks], self.skipped)
        timed.network_cost = network
        return timed

    @cached_property
    def _liveness(self) -> Liveness:
        return liveness(self.graph)

    @cached_property
    def _links(self) -> tuple[_Pair, ...]:
        block_by_exit = {block.exit: block for block in self._blocks}
        pairs = (_pair(self.graph, block_by_exit, block) for block in self._blocks)
        return tuple(pair for pair in pairs if pair is not None)

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


@dataclass(frozen=True)
class _Pair:
    """Two consecutive blocks, and the calls between them."""

    first: str
    second: str
    between: tuple[str, ...]


def _pair(graph: ModelGraph, block_by_exit: Mapping[Ref, Block], second: Block) -> _Pair | None:
    """Return the block in front of another one, None where there is none or where others read what it writes."""
    between: list[str] = []
    ref = second.entry
    while (first := block_by_exit.get(ref)) is None:
        node = graph.by_name[ref.node]
        plain = node.kind in rules.ACTIVATIONS or node.kind in rules.NORMS or rules.is_passive(node)
        if not plain or len(node.inputs) != 1:
            return None
        between.append(node.name)
        (ref,) = node.inputs
    inside = {*between, *second.nodes}
    for name in (first.exit.node, *between):
        if Ref(name) in graph.output_refs or not set(graph.readers[Ref(name)]) <= inside:
            return None
    return _Pair(first.name, second.name, tuple(reversed(between)))


def _span(graph: ModelGraph, run: Sequence[Block], between: Sequence[str], live: Liveness) -> Block:
    first, last = run[0], run[-1]
    inside = {*between, *(name for block in run for name in block.nodes)}
    nodes = tuple(sorted(inside, key=graph.position.__getitem__))
    name = block_name([block.name for block in run])
    has_skip = all(block.skip_kind == "identity" for block in run)
    geometry, refusal = _window(graph, name, nodes, first.entry, last.exit)
    return Block(
        name=name,
        nodes=nodes,
        body=tuple(one for one in nodes if not has_skip or one != last.join),
        entry=first.entry,
        exit=last.exit,
        entry_shape=first.entry_shape,
        exit_shape=last.exit_shape,
        skip=first.skip if has_skip else None,
        skip_nodes=(),
        join=last.join if has_skip else None,
        geometry=geometry,
        linear_refusal=Refusal(name, "linear", "it is more than one block, which is only fitted"),
        cost=replace(
            cost_of(graph, nodes),
            activation_bytes=max(live.total[one] for one in nodes),
            latency_ns=sum(block.cost.latency_ns for block in run),
            file_bytes=sum(block.cost.file_bytes for block in run),
        ),
        skip_cost=Cost(),
        live_bytes=max(live.total[one] - live.of(one, inside) for one in nodes),
        geometry_refusal=refusal,
        skip_exit=last.skip_exit if has_skip else None,
        special_tokens=first.special_tokens,
        members=tuple(block.name for block in run),
    )


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
    """Read a model the way blocks are found in it.

    Composite layers are replaced by what they are made of, and activations that layers apply themselves are calls of
    their own.
    """
    return split_activations(expand(read_graph(model)), kinds=rules.SPLITTABLE)


def find_blocks_in(graph: ModelGraph) -> Blocks:
    """Return the blocks of a prepared graph."""
    finder = _Finder(graph)
    return Blocks(graph, *finder.find())


def block_of(
    graph: ModelGraph,
    nodes: tuple[str, ...],
    body: tuple[str, ...],
    entry: Ref,
    body_exit: Ref,
    *,
    skip_nodes: tuple[str, ...] = (),
    skip_exit: Ref | None = None,
    join: str | None = None,
) -> Block:
    """Describe a part of a graph that is known to be a block; the arguments are the attributes of `Block`."""
    finder = _Finder(graph)
    return finder._block(nodes, body, entry, body_exit, skip_nodes=skip_nodes, skip_exit=skip_exit, join=join)


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
            reason = f"reads {len(node.inputs)} tensors" if len(node.inputs) != 1 else "is on another branch"
            raise _NotLinear(f"'{name}' {reason}")
        shape = graph.shape(read)
        read = Ref(name)
        try:
            if rules.is_passive(node):
                continue
            if (linear := _subsampling(node) or rules.linear_maps(node, shape)) is not None:
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
                raise _NotLinear(f"'{name}' {rules.why_unknown(node)}")
        except rules.Unsupported as error:
            raise _NotLinear(f"'{name}' {error}") from error
    if maps:
        stages.append(Stage(tuple(maps)))
    return tuple(stages)


def _after(maps: list[AffineConv], norm: rules.Norm) -> list[AffineConv]:
    if maps:
        return [affine.fold_norm_after(maps[0], norm.scale, norm.shift)]
    return [affine.from_scale(norm.scale, norm.shift)]


def _subsampling(node: Node) -> tuple[AffineConv, ...] | None:
    """Pooling of single pixels with strides, as a skip of ResNetV2 has it: it takes each n-th pixel."""
    if node.kind not in ("MaxPooling2D", "AveragePooling2D") or tuple(node.layer.pool_size) != (1, 1):
        return None
    if node.layer.data_format != "channels_last":
        return None
    return (replace(affine.identity(int(node.shapes[0][-1] or 0)), strides=tuple(node.layer.strides)),)


@dataclass(frozen=True)
class _Piece:
    """A call of a chain, or a gate: the nodes from the tensor it multiplies to the product.

    `kind`: depthwise, separable, pointwise, dense (k x k); empty for what has no kernel (norms, padding, activations).
    """

    nodes: tuple[str, ...]
    kind: str = ""
    active: bool = False
    passive: bool = False


@dataclass(frozen=True)
class _Link:
    """One linear layer of a chain with what follows it up to the next one."""

    nodes: tuple[str, ...]
    kind: str  # depthwise, pointwise, dense (k x k), scale (a norm or padding alone)
    activation: tuple[str, ...]  # nodes from the activation on; empty: the link is linear to its end


class _Finder:
    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.skipped: list[Refusal] = list(graph.refused)
        self.claimed: set[str] = set()
        self.live = liveness(graph)
        self._outputs = set(graph.output_refs)
        self._depth: dict[str, int] = {}
        self._dominator: dict[str, str | None] = {}
        self._gates: dict[str, list[Node]] = {}
        for node in graph:
            self._add_to_dominator_tree(node)
            if node.kind in GATES and len(set(node.inputs)) == 2:
                self._gates.setdefault(self._dominator[node.name] or "", []).append(node)

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
                elif found is not None:
                    self.claimed.update(found.nodes)
                    yield found

    def _residual_block(self, join: Node) -> Block | Refusal | None:
        """Return the block that an Add closes, why there is none, or None where there is nothing to replace."""

        def refuse(rule: str, reason: str) -> Refusal:
            return Refusal(join.name, rule, reason)

        entry_name = self._dominator[join.name]
        if entry_name is None:
            return refuse("single_entry", "its two paths start at different inputs of the model")
        members = self._members(join.inputs, entry_name)
        inside = {*members, join.name}
        starts = {ref for name in inside for ref in self.graph.by_name[name].inputs if ref.node == entry_name}
        if len(starts) > 1:
            return refuse("single_entry", f"its paths start at different outputs of '{entry_name}'")
        (entry,) = starts
        if (leak := self._leak(members, inside)) is not None:
            return refuse("single_exit", leak)
        shapes = [self.graph.shape(ref) for ref in join.inputs]
        if shapes[0] != shapes[1]:
            return refuse("same_shape", f"it adds tensors of shapes {_size(shapes[0])} and {_size(shapes[1])}")
        if taken := [name for name in members if name in self.claimed]:
            return refuse("nested", f"'{taken[-1]}' inside it belongs to another block")
        body_exit, skip = self._body_and_skip(join, entry)
        if skip is None:
            return refuse("linear_skip", "neither of its two paths is an identity or a linear projection")
        body = tuple(name for name in members if name not in skip)
        if not any(self._has_work(name) for name in body):
            return None  # arithmetic: a part of an activation, not a place for a layer
        (skip_exit,) = (ref for ref in join.inputs if ref != body_exit)
        nodes = (*(name for name in self.graph.position if name in inside),)
        return self._block(nodes, body, entry, body_exit, skip_nodes=skip, skip_exit=skip_exit, join=join.name)

    def _has_work(self, name: str) -> bool:
        """True for a call with weights of its own that is no norm."""
        node = self.graph.by_name[name]
        return bool(getattr(node.layer, "weights", None)) and node.kind not in rules.NORMS

    def _leak(self, members: Sequence[str], inside: set[str]) -> str | None:
        """Say which member is read from outside, or None."""
        for name in members:
            for ref in self._written(name):
                readers = [reader for reader in self.graph.readers.get(ref, ()) if reader not in inside]
                if readers or ref in self._outputs:
                    where = f"by '{readers[0]}'" if readers else "as an output of the model"
                    return f"'{name}' inside it is read outside, {where}"
        return None

    def _members(self, refs: Sequence[Ref], entry: str) -> list[str]:
        """Nodes behind the entry that tensors depend on, in topological order."""
        found: set[str] = set()
        waiting = [ref.node for ref in refs]
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

    def _body_and_skip(self, join: Node, entry: Ref) -> tuple[Ref, tuple[str, ...] | None]:
        """Return the tensor that the body writes, and the nodes of the skip, None where no path is linear.

        The skip is empty, or a linear projection that the body does not read; the shorter path is tried first.
        """
        first, second = join.inputs
        behind = {ref: self._members([ref], entry.node) for ref in join.inputs}
        longer, shorter = (first, second) if len(behind[first]) >= len(behind[second]) else (second, first)
        for body, skip in ((longer, shorter), (shorter, longer)):
            names = self._path(skip, entry)
            if names is None or set(names) & set(behind[body]):
                continue
            if not names or self._is_projection(names, entry):
                return body, names
        return longer, None

    def _is_projection(self, names: tuple[str, ...], entry: Ref) -> bool:
        if all(rules.is_passive(self.graph.by_name[name]) for name in names):
            return True  # only calls that do nothing at inference
        try:
            stages = _parse(self.graph, names, entry)
        except _NotLinear:
            return False
        if len(stages) != 1 or stages[0].activation is not None:
            return False
        geometry = affine.composed_geometry(stages[0].maps)
        return geometry.kernel_size == (1, 1) and geometry.padding == (0, 0, 0, 0)

    # Chain blocks

    def _chain_blocks(self) -> Iterator[Block]:
        for chain in self._chains():
            for names in _cut(_links(chain)):
                entry = self.graph.by_name[names[0]].inputs[0]
                yield self._block(names, names, entry, Ref(names[-1]), skip_nodes=(), skip_exit=None, join=None)

    def _chains(self) -> Iterator[list[_Piece]]:
        """Longest runs of unclaimed pieces, each read by the next alone."""
        done: set[str] = set()
        for start in self.graph:
            if start.name in done or (piece := self._piece(start)) is None:
                continue
            chain = [piece]
            while (after := self._piece_after(chain[-1].nodes[-1])) is not None:
                chain.append(after)
            done.update(name for piece in chain for name in piece.nodes)
            yield chain

    def _piece(self, node: Node) -> _Piece | None:
        """Return a call as a piece of a chain: linear, norm, activation or passive; None for anything else."""
        if node.name in self.claimed or len(node.inputs) != 1 or len(node.shapes) != 1:
            return None
        shape = self.graph.shape(node.inputs[0])
        if len(node.shapes[0]) != 4 or len(shape) != 4:
            return None
        names = (node.name,)
        if rules.is_passive(node):
            return _Piece(names, passive=True)
        try:
            if (maps := rules.linear_maps(node, shape)) is not None:
                return _Piece(names, _kind(maps), passive=not maps)
            if rules.norm(node, shape) is not None:
                return _Piece(names)
            if rules.activation(node) is not None:
                return _Piece(names, active=True)
        except rules.Unsupported as error:
            if node.kind in rules.LINEAR:
                refusal = Refusal(node.name, "linear", f"'{node.name}' {error}")
                self.skipped += [refusal] if refusal not in self.skipped else []
                return None
        is_active = node.kind in ELEMENTWISE or node.kind in rules.NORMS or node.kind in rules.ACTIVATIONS
        if (is_active or node.kind == "PReLU") and node.shapes[0] == shape:
            return _Piece(names, active=True)  # not linear, and nothing between two pixels: fits see through it
        return None

    def _piece_after(self, name: str) -> _Piece | None:
        """Return the only piece that reads what a call writes: one more call, or a gate on it."""
        ref = Ref(name)
        readers = self.graph.readers.get(ref, ())
        if ref in self._outputs or not readers:
            return None
        if len(readers) == 1:
            return self._piece(self.graph.by_name[readers[0]])
        for gate in self._gates.get(name, ()):
            members = self._members(gate.inputs, name)
            inside = {*members, gate.name}
            same = gate.shapes[0] == self.graph.shape(ref) and len(gate.shapes[0]) == 4
            if same and set(readers) <= inside and not inside & self.claimed and self._leak(members, inside) is None:
                return _Piece((*members, gate.name), active=True)
        return None

    # Parts

    def parts(self, block: Block) -> list[Block]:
        """Return the linear layers that all of a block's body goes through, each a block of its own."""
        found: list[Block] = []
        for name in block.body:
            node = self.graph.by_name[name]
            if not self._has_kernel(node) or not self._is_passed(block, name):
                continue
            first, last = self._padding_before(block, node), self._norms_behind(block, node)
            nodes = (*first, name, *last)
            entry = self.graph.by_name[nodes[0]].inputs[0]
            part = self._block(nodes, nodes, entry, Ref(nodes[-1]), skip_nodes=(), skip_exit=None, join=None)
            found.append(replace(part, name=f"{name}_part", part_of=block.name))
        return found

    def _has_kernel(self, node: Node) -> bool:
        if len(node.inputs) != 1 or len(node.shapes) != 1:
            return False
        try:
            maps = rules.linear_maps(node, image_shape(self.graph.shape(node.inputs[0])))
        except rules.Unsupported:
            return False
        return maps is not None and _kind(maps) != ""

    def _is_passed(self, block: Block, name: str) -> bool:
        """True where no path from the entry to what the body writes goes around a call."""
        body = set(block.body)
        body_exit = block.exit.node
        if block.join is not None:
            (body_exit,) = (ref.node for ref in self.graph.by_name[block.join].inputs if ref.node in body)
        waiting, seen = [body_exit], {name}
        while waiting:
            if (one := waiting.pop()) in seen:
                continue
            seen.add(one)
            if one not in body:
                return False
            waiting += [ref.node for ref in self.graph.by_name[one].inputs]
        return True

    def _padding_before(self, block: Block, node: Node) -> tuple[str, ...]:
        before = self.graph.by_name[node.inputs[0].node]
        alone = before.name in block.body and self.graph.readers[Ref(before.name)] == (node.name,)
        return (before.name,) if alone and before.kind == "ZeroPadding2D" else ()

    def _norms_behind(self, block: Block, node: Node) -> tuple[str, ...]:
        names: list[str] = []
        while True:
            ref = Ref(names[-1] if names else node.name)
            readers = self.graph.readers.get(ref, ())
            if len(readers) != 1 or readers[0] not in block.body or ref in self._outputs:
                return tuple(names)
            after = self.graph.by_name[readers[0]]
            if after.kind != "BatchNormalization" or rules.norm(after, self.graph.shape(ref)) is None:
                return tuple(names)
            names.append(after.name)

    # Both

    def _block(
        self,
        nodes: tuple[str, ...],
        body: tuple[str, ...],
        entry: Ref,
        body_exit: Ref,
        *,
        skip_nodes: tuple[str, ...],
        skip_exit: Ref | None,
        join: str | None,
    ) -> Block:
        graph = self.graph
        name = nodes[-1]
        skip: AffineConv | None = None
        if join is not None:
            passive = all(rules.is_passive(graph.by_name[one]) for one in skip_nodes)
            stages = () if passive else _parse(graph, skip_nodes, entry)
            skip = affine.compose_all(stages[0].maps) if stages else affine.identity(int(graph.shape(entry)[-1] or 0))
        geometry, no_geometry = _window(graph, name, body, entry, body_exit)
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
            linear_refusal=_linear_refusal(graph, name, body, entry),
            cost=replace(cost_of(graph, nodes), activation_bytes=max(self.live.total[n] for n in nodes)),
            skip_cost=cost_of(graph, skip_nodes),
            live_bytes=max(self.live.total[n] - self.live.of(n, inside) for n in nodes),
            geometry_refusal=no_geometry,
            skip_exit=skip_exit,
            special_tokens=special_tokens(graph, entry),
        )


def _linear_refusal(graph: ModelGraph, name: str, body: Sequence[str], entry: Ref) -> Refusal | None:
    try:
        _parse(graph, body, entry)
    except _NotLinear as error:
        return Refusal(name, "linear", str(error))
    return None


def _window(
    graph: ModelGraph, name: str, body: Sequence[str], entry: Ref, exit: Ref
) -> tuple[Geometry | None, Refusal | None]:
    try:
        return window_of(graph, body, entry, exit), None
    except NoWindow as error:
        return None, Refusal(name, "window", str(error))


def _links(chain: Sequence[_Piece]) -> list[_Link]:
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

    for piece in chain:
        if (active and not piece.passive and not piece.active) or (piece.kind and kind):
            close()
        if piece.kind or (not active and not piece.active):
            linear += piece.nodes
            kind = piece.kind or kind
        else:
            active += piece.nodes
    close()
    return links


def _kind(maps: Sequence[AffineConv]) -> str:
    if not maps:
        return ""
    last = maps[-1]
    if len(maps) > 1:
        return "separable"
    if last.kernel_size == (1, 1) and (any(last.padding) or last.groups == last.c_in == last.c_out > 1):
        return ""  # padding and scales belong to the convolution beside them
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
