"""The dependency graph: which channels of which layers go together, and which are never cut.

Labels are carried along the graph once, call by call. What ends up with equal labels is a unit; units that share an
axis of a weight which makes them are a group; groups whose members look alike are of one isomorphism class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from updp_tf.isomorphic.coupling import Axes, NotCovered, Site, variable_index
from updp_tf.isomorphic.couplings import COUPLINGS
from updp_tf.isomorphic.units import Labels, Units
from updp_tf.structure import ModelGraph, Node, Ref, Refusal

HEAD_ROLES = frozenset({"heads"})
"""Roles whose units are whole heads: they are counted one by one, and never rounded to a multiple."""


@dataclass(frozen=True, eq=False)
class Slice:
    """An axis of a variable, and the labels on it."""

    variable: int
    axis: int
    labels: Labels
    scored: bool


@dataclass(frozen=True, eq=False)
class Member:
    """What one layer loses together, in one role.

    Attributes:
        node: the first call of the layer.
        role: `in` (channels it reads), `out` (channels it makes), `through`, `heads`, `head dims`, ...
        slices: axes of its variables.
    """

    node: Node
    role: str
    slices: tuple[Slice, ...]

    @property
    def label(self) -> tuple[str, str]:
        """Kind and role: what the isomorphism class looks at."""
        return self.node.kind, self.role

    def __str__(self) -> str:
        return f"{self.node.name} {self.role}"


@dataclass(frozen=True)
class GroupSignature:
    """Kinds and roles of a group's members in topological order: equal for isomorphic groups."""

    members: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return ", ".join(f"{kind} {role}" for kind, role in self.members)


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are made by the same layers, and everything that goes with them.

    Attributes:
        name: of the first layer that makes them, and its role.
        units: that may be cut, in the order of that layer's axis.
        cells: number of the cell of each unit: units that every tensor has all of, or none. Each cell keeps some.
        channels_per_unit: indices of that axis that one unit stands for.
        role: of the axis: `out`, `heads`, `head dims`, ...
        is_stream: true where the units are summed into a residual stream.
        members: in topological order.
    """

    name: str
    units: tuple[int, ...]
    cells: np.ndarray
    channels_per_unit: int
    role: str
    is_stream: bool
    members: tuple[Member, ...]

    @cached_property
    def signature(self) -> GroupSignature:
        """What isomorphic groups have in common."""
        return GroupSignature(tuple(member.label for member in self.members))

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.units)

    def locate(self, units: Labels) -> np.ndarray:
        """Return the position in this group of each unit, -1 where it is none of it."""
        ordered = np.array(self.units)[self._order]
        found = np.minimum(np.searchsorted(ordered, units), len(ordered) - 1)
        return np.where(ordered[found] == units, self._order[found], -1)

    @property
    def size(self) -> int:
        """How many units may be cut."""
        return len(self.units)

    def step(self, round_to: int) -> int:
        """Units by which the group's size is rounded, so that its channels are a multiple of `round_to`."""
        if self.role in HEAD_ROLES:
            return 1
        return round_to // math.gcd(round_to, self.channels_per_unit)


@dataclass(frozen=True, eq=False)
class Dependencies:
    """What of a network can be cut, and what goes with it.

    Attributes:
        graph: that was read.
        groups: in topological order.
        boundaries: calls without a rule whose inputs keep their channels, and channels that are never cut.
        axes: labels of every tensor.
        slices: of every layer, by `id(layer)`.
        units: which labels are equal.
    """

    graph: ModelGraph
    groups: tuple[Group, ...]
    boundaries: tuple[Refusal, ...]
    axes: Mapping[Ref, Axes]
    slices: Mapping[int, tuple[Slice, ...]]
    units: Units

    def places(self, labels: Labels, group: Group) -> list[np.ndarray]:
        """Positions in a group of the units that each index is made of, -1 where it is made of others."""
        return [found for one in self.units.parts(labels) if ((found := group.locate(one)) >= 0).any()]


def find_dependencies(graph: ModelGraph) -> Dependencies:
    """Return which channels of a graph go together."""
    ledger = _Ledger()
    axes: dict[Ref, Axes] = {}
    boundaries: list[Refusal] = []
    for node in graph:
        if node.is_input:
            axes[Ref(node.name)] = (None,) * len(node.shapes[0])
            continue
        reads = tuple(axes[ref] for ref in node.inputs)
        written, refusal = _connect(ledger, graph, node, reads)
        axes |= {Ref(node.name, index): one for index, one in enumerate(written)}
        if refusal is not None:
            boundaries.append(refusal)
    for ref in graph.output_refs:
        for labels in axes[ref]:
            if labels is not None:
                ledger.units.fix(labels, f"'{ref}' is an output of the model")
    groups, fixed = _groups(ledger, graph)
    groups = _with_cells(
        groups, [*axes.values(), *((one.labels,) for m in ledger.members() for one in m.slices)], ledger
    )
    slices = {key: tuple(one) for key, one in ledger.slices_by_layer().items()}
    return Dependencies(graph, groups, (*boundaries, *fixed), axes, slices, ledger.units)


def _connect(
    ledger: _Ledger, graph: ModelGraph, node: Node, reads: tuple[Axes, ...]
) -> tuple[Sequence[Axes], Refusal | None]:
    site = Site(node, tuple(graph.shape(ref) for ref in node.inputs), reads, ledger)
    nothing = [(None,) * len(shape) for shape in node.shapes]
    rule = COUPLINGS.get(node.kind)
    reason = f"no rule says how channels pass through a {node.kind}; updp_tf.register_coupling adds one"
    if rule is not None:
        try:
            written = rule.connect(site)
        except NotCovered as error:
            reason = str(error)
        else:
            return [_checked(site, one, shape) for one, shape in zip(written, node.shapes, strict=True)], None
    ledger.freeze(node, reason)
    touched = [labels for axes in reads for labels in axes if labels is not None]
    for labels in touched:
        ledger.units.fix(labels, f"'{node.name}' ({node.kind}): {reason}")
    return nothing, Refusal(node.name, "coupling", reason) if touched else None


def _checked(site: Site, axes: Axes, shape: tuple[int | None, ...]) -> Axes:
    """Axes of size 1 carry no labels, since they stay; all others as many as the axis is long."""
    node = site.node
    sizes = [None if labels is None else len(labels) for labels in axes]
    if len(axes) != len(shape) or any(have not in (None, want) for have, want in zip(sizes, shape, strict=False)):
        raise RuntimeError(f"The rule of '{node.kind}' labels {sizes} for '{node.name}', which writes {shape}.")
    for labels, size in zip(axes, shape, strict=True):
        if size == 1:
            site.fix(labels, "takes one channel out, which has to stay")
    return tuple(None if size == 1 else labels for labels, size in zip(axes, shape, strict=True))


@dataclass(eq=False)
class _Source:
    """An axis of a weight that makes channels."""

    node: Node
    role: str
    labels: Labels


@dataclass(eq=False)
class _Ledger:
    """What rules have written: `coupling.Ledger` says how they do."""

    units: Units = field(default_factory=Units)
    sources: list[_Source] = field(default_factory=list)
    _ties: dict[tuple[int, int, int], Labels | None] = field(default_factory=dict)
    _members: dict[tuple[int, str], dict[tuple[int, int], bool]] = field(default_factory=dict)
    _nodes: dict[int, Node] = field(default_factory=dict)
    _frozen: dict[int, str] = field(default_factory=dict)

    def tie(
        self, node: Node, role: str, variable: Any, axis: int, labels: Labels | None, *, fresh: bool, scored: bool
    ) -> Labels | None:
        layer = node.layer
        place = (variable_index(layer, variable), axis % len(variable.shape))
        size = int(variable.shape[place[1]])
        if not fresh and labels is not None and len(labels) != size:
            raise RuntimeError(f"'{node.name}' ties {len(labels)} channels to an axis of {size} of {variable.path}.")
        key = (id(layer), *place)
        if key not in self._ties:
            if fresh and size > 1:
                labels = self.units.fresh(size)
                self.sources.append(_Source(node, role, labels))
            self._ties[key] = labels
            self._nodes.setdefault(id(layer), node)
            self._members.setdefault((id(layer), role), {})[place] = scored
            if labels is not None and id(layer) in self._frozen:
                self.units.fix(labels, self._frozen[id(layer)])
            return labels
        known = self._ties[key]
        if fresh:
            return known
        if known is not None and labels is not None:
            self.units.unite(known, labels)
        for one in (known, labels):
            if one is not None and (known is None or labels is None):
                self.units.fix(one, f"'{layer.name}' is called elsewhere with channels that cannot be cut")
        return known

    def freeze(self, node: Node, reason: str) -> None:
        """Keep all weights of a layer that is called in a way no rule covers."""
        self._frozen[id(node.layer)] = f"'{node.name}' ({node.kind}): {reason}"
        for (layer, _, _), labels in self._ties.items():
            if layer == id(node.layer) and labels is not None:
                self.units.fix(labels, self._frozen[layer])

    def members(self) -> Iterator[Member]:
        """Members in topological order."""
        for (layer, role), places in self._members.items():
            slices = [
                Slice(*place, labels, scored)
                for place, scored in places.items()
                if (labels := self._ties[layer, *place]) is not None
            ]
            if slices:
                yield Member(self._nodes[layer], role, tuple(slices))

    def slices_by_layer(self) -> dict[int, list[Slice]]:
        found: dict[int, list[Slice]] = {}
        for member in self.members():
            found.setdefault(id(member.node.layer), []).extend(member.slices)
        return found


def _groups(ledger: _Ledger, graph: ModelGraph) -> tuple[tuple[Group, ...], list[Refusal]]:
    units = ledger.units
    axes = [one for source in ledger.sources for one in _plain_axes(units, source)]
    component = _components([units.find(one.labels) for one in axes])
    members = sorted(ledger.members(), key=lambda member: graph.position[member.node.name])
    touched = [set(np.concatenate([units.atoms(s.labels) for s in member.slices]).tolist()) for member in members]
    by_component: dict[int, list[_Source]] = {}
    for axis, number in zip(axes, component, strict=True):
        by_component.setdefault(number, []).append(axis)
    groups: list[Group] = []
    fixed: list[Refusal] = []
    for sources in by_component.values():
        first = sources[0]
        name = first.node.name if first.role == "out" else f"{first.node.name} {first.role}"
        every = dict.fromkeys(unit for source in sources for unit in units.find(source.labels).tolist())
        free = [unit for unit in every if units.reason(unit) is None]
        if not free or len(every) < 2:
            reason = units.reason(next(iter(every))) or "all its channels depend on each other"
            fixed.append(Refusal(name, "group", reason))
            continue
        inside = set(free)
        counts = np.bincount(np.unique(units.find(first.labels), return_inverse=True)[1])
        groups.append(
            Group(
                name,
                tuple(free),
                np.zeros(len(free), dtype=np.int64),
                int(counts.max()),
                first.role,
                any(units.is_stream(unit) for unit in free),
                tuple(member for member, own in zip(members, touched, strict=True) if own & inside),
            )
        )
    return tuple(groups), fixed


def _with_cells(groups: Sequence[Group], every: Sequence[Axes], ledger: _Ledger) -> tuple[Group, ...]:
    """Tell groups which of their units always stand together: no axis may lose all that it has."""
    units = ledger.units
    owner = np.full(units.n, -1, dtype=np.int64)
    for number, group in enumerate(groups):
        owner[list(group.units)] = number
    subsets: dict[tuple[int, bytes], np.ndarray] = {}
    seen: set[bytes] = set()
    for labels in (labels for axes in every for labels in axes if labels is not None):
        if (key := labels.tobytes()) in seen:
            continue
        seen.add(key)
        for part in units.parts(labels):
            roots = np.unique(part)
            for number in np.unique(owner[roots]).tolist():
                inside = roots[owner[roots] == number]
                if number >= 0 and len(inside) < groups[number].size:
                    subsets[number, inside.tobytes()] = inside
    cells = [group.cells for group in groups]
    for (number, _), inside in subsets.items():
        marked = 2 * cells[number] + np.isin(groups[number].units, inside)
        cells[number] = np.unique(marked, return_inverse=True)[1]
    return tuple(replace(group, cells=cell) for group, cell in zip(groups, cells, strict=True))


def _plain_axes(units: Units, source: _Source) -> Iterator[_Source]:
    """The axis itself, or those that it is the product of."""
    factors = [units.factors_of(label) for label in source.labels.tolist()]
    lengths = {None if one is None else len(one) for one in factors}
    if lengths == {None}:
        yield source
        return
    if None in lengths or len(lengths) > 1:
        units.fix(source.labels, f"'{source.node.name}' makes an axis of which only a part is divided")
        return
    (depth,) = lengths
    for position in range(depth or 0):
        inner = np.array([one[position] for one in factors if one is not None], dtype=np.int64)
        role = "head dims" if position == (depth or 0) - 1 else "heads"
        yield from _plain_axes(units, _Source(source.node, role, np.unique(units.find(inner))))


def _components(axes: Sequence[np.ndarray]) -> list[int]:
    """Number the axes that share units alike, in order of appearance."""
    owner: dict[int, int] = {}
    parent = list(range(len(axes)))

    def top(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for number, roots in enumerate(axes):
        for unit in np.unique(roots).tolist():
            other = top(owner.setdefault(unit, number))
            here = top(number)
            parent[max(other, here)] = min(other, here)
    return [top(number) for number in range(len(axes))]
