"""What ranks the channels of a network, and how a ratio turns into a cut."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from updp_tf.blocks import network_cost
from updp_tf.errors import BudgetError, ModelError
from updp_tf.isomorphic.cutting import resized_graph
from updp_tf.isomorphic.dependency import Dependencies, Group, find_dependencies
from updp_tf.isomorphic.gradients import gradient_statistics
from updp_tf.isomorphic.importance import IMPORTANCES, Importance, group_scores
from updp_tf.isomorphic.scopes import SCOPES, Scope, choose_units, scope_key
from updp_tf.structure import ModelGraph, Refusal
from updp_tf.walking import Progress

Allocation = Literal["ratio", "score"]

ALLOCATIONS: tuple[Allocation, ...] = ("ratio", "score")


@dataclass(frozen=True)
class Width:
    """Which channels may go, and what ranks them.

    Attributes:
        scope: which channels share a ranking: those of `isomorphic` groups, `global` all, `local` those of a group.
        importance: `l1`, `l2`, `activation`, `taylor`, `hessian` or `random`; where None, `hessian` with images and one
            output, else `l2`.
        allocation: under a budget, every scope gives the same part of its channels (`ratio`), or those go first
            whose score is least for what they save (`score`).
        round_to: every group keeps a multiple of so many channels, and at least so many; heads are not rounded.
        streams: cut residual streams, too.
        ignore: names of layers whose own channels are kept.
    """

    scope: Scope = "isomorphic"
    importance: Importance | None = None
    allocation: Allocation = "ratio"
    round_to: int = 8
    streams: bool = False
    ignore: Collection[str] = ()

    def __post_init__(self) -> None:
        for name, value, known in (
            ("scope", self.scope, SCOPES),
            ("importance", self.importance, (None, *IMPORTANCES)),
            ("allocation", self.allocation, ALLOCATIONS),
        ):
            if value not in known:
                raise BudgetError(f"`{name}` is one of {', '.join(filter(None, known))}. Received: {value!r}.")
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise BudgetError(f"`round_to` is a whole number, 1 or more. Received: {self.round_to!r}.")


@dataclass(frozen=True, eq=False)
class Ranking:
    """What ranks the channels of a network.

    Attributes:
        width: which channels may go, and by what they are ranked.
        images: calibration images, or None.
        labels: of the images, or None.
        loss: that goes with the labels, or None.
        seed: of what is drawn.
    """

    width: Width
    images: np.ndarray | None
    labels: Any = None
    loss: Any = None
    seed: int = 0

    def importance(self, graph: ModelGraph) -> Importance:
        """Return what ranks the channels of a graph."""
        if self.width.importance is not None:
            return self.width.importance
        has_gradients = self.images is not None and len(graph.input_refs) == len(graph.output_refs) == 1
        return "hessian" if has_gradients else "l2"

    def cuttable(self, graph: ModelGraph) -> Dependencies:
        """Return which channels of a graph go together, those that are left whole among the refusals."""
        return _cuttable(find_dependencies(graph), self.width.streams, self.width.ignore)

    def ranked(
        self,
        dependencies: Dependencies,
        *,
        counts: Mapping[str, int] | None = None,
        step: int = 1,
        progress: Progress | None = None,
    ) -> Ranked:
        """Score the channels of a network.

        Args:
            dependencies: of the network.
            counts: channels that each group had before earlier steps, by name.
            step: number of the step, from 1.
            progress: called after each gradient.
        """
        importance, gradients = self.importance(dependencies.graph), None
        if importance in ("taylor", "hessian"):
            gradients = gradient_statistics(
                dependencies.graph, importance, self.images, self.labels, self.loss, seed=self.seed, progress=progress
            )
        scores = group_scores(
            dependencies, importance, images=self.images, gradients=gradients, seed=self.seed + step - 1
        )
        counts = counts or {group.name: group.size for group in dependencies.groups}
        return Ranked(dependencies, scores, self.width, counts)


@dataclass(frozen=True, eq=False)
class Ranked:
    """A network whose channels are ranked: how a ratio turns into a cut, and what the cut leaves.

    Attributes:
        dependencies: of the network.
        scores: of the units of each group.
        width: which channels share a ranking.
        counts: units that each group had before earlier steps.
        rates: of the scopes, as in `choose_units`.
    """

    dependencies: Dependencies
    scores: Mapping[str, np.ndarray]
    width: Width
    counts: Mapping[str, int]
    rates: Mapping[Hashable, float] | None = None

    def cut(self, ratio: float) -> frozenset[int]:
        """Return the units that go."""
        return choose_units(
            self.dependencies.groups,
            self.scores,
            ratio,
            scope=self.width.scope,
            round_to=self.width.round_to,
            counts=self.counts,
            rates=self.rates,
        )

    def outline(self, ratio: float) -> ModelGraph:
        """Return a graph of the shapes that are left, to be counted and never run."""
        return resized_graph(self.dependencies, self.cut(ratio))

    def allocated(self, unit: str) -> Ranked:
        """Return the same with one ranking for all scopes: by score over what is saved of a unit of `Cost`.

        In a scope, units stay in the order of their scores. What a score of 1 is worth in it is the part of a group
        that such a unit is, over what a unit of the scope saves on average.
        """
        groups = self.dependencies.groups
        before = getattr(network_cost(self.dependencies.graph), unit)
        by_scope: dict[Hashable, list[Group]] = {}
        for group in groups:
            by_scope.setdefault(scope_key(group, self.width.scope), []).append(group)
        rates: dict[Hashable, float] = {}
        for key, members in by_scope.items():
            whole = choose_units(members, self.scores, 1.0, scope=self.width.scope, round_to=self.width.round_to)
            saved = before - getattr(network_cost(resized_graph(self.dependencies, whole)), unit)
            size = np.mean([group.size for group in members])
            # what saves nothing goes last
            rates[key] = float(len(whole) / (max(saved, 1) * size))
        return replace(self, rates=rates)


def nothing_to_cut(graph: ModelGraph, ranking: Ranking) -> str:
    """Say why no channels of a graph can be cut."""
    reasons = "; ".join(str(refusal) for refusal in ranking.cuttable(graph).boundaries[:5])
    return f"'{graph.name}' has no channels that can be cut: {reasons or 'no layer makes any'}."


def _cuttable(dependencies: Dependencies, streams: bool, ignore: Collection[str]) -> Dependencies:
    """Return the dependencies with the groups that are left whole moved to the refusals."""
    names = {node.name for node in dependencies.graph} | {
        getattr(node.layer, "name", node.name) for node in dependencies.graph
    }
    if unknown := sorted(set(ignore) - names):
        raise ModelError(f"'{dependencies.graph.name}' has no layer named '{unknown[0]}', which `ignore` lists.")
    groups: list[Group] = []
    kept: list[Refusal] = []
    for group in dependencies.groups:
        makers = [member for member in group.members if member.role not in ("in", "through")]
        ignored = [m for m in makers if m.node.name in ignore or getattr(m.node.layer, "name", "") in ignore]
        if ignored:
            kept.append(Refusal(group.name, "ignore", f"'{ignored[0].node.name}' is to be left whole"))
        elif group.is_stream and not streams:
            kept.append(Refusal(group.name, "stream", "a residual stream, left whole; streams=True cuts it"))
        else:
            groups.append(group)
    return replace(dependencies, groups=tuple(groups), boundaries=(*dependencies.boundaries, *kept))
