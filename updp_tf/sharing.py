"""Depth and width under one budget: how much of the saving merged blocks give, and how much narrower layers.

What a block costs depends on how wide it is, so the two do not add up. They alternate: for a part of the way that
width goes, the solver picks the forms that are best for blocks of that width; those are merged; and the channels that
are left are cut until the budget is met by what the network truly costs. Each such split is measured on held-out
images with everything mended, and the next ones are tried beside the best.

Under a budget in time or bytes of files, no table tells what narrower blocks take: forms go their part of the way by
the table's rows for whole blocks, and networks are exported and timed to find how much width has to add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from updp_tf.blocks import Blocks, cost_of, liveness, network_cost, prepared_graph
from updp_tf.cost import Budget
from updp_tf.errors import BudgetError, ModelError
from updp_tf.graph import build_model
from updp_tf.isomorphic.ranking import Ranking, nothing_to_cut
from updp_tf.isomorphic.ratios import Measure, bounds_on_the_way, measured_costs, ratio_within
from updp_tf.merging import Merged
from updp_tf.narrowing import narrow_graph
from updp_tf.partitioning import Solution
from updp_tf.reporting import NarrowingReport
from updp_tf.searching import Space
from updp_tf.structure import Candidate, Cost, ModelGraph
from updp_tf.walking import Progress

FIRST = (0.0, 1 / 3, 2 / 3, 1.0)
"""Parts of the way that width goes in the first round: from depth alone to width alone."""

ONE_SHOT = 0.5
"""Part of the way that width goes where nothing is measured."""

Merge = Callable[[Sequence[Candidate]], Merged]
"""Returns the network with forms in it."""

Loss = Callable[[Any], float]
"""Returns how far a model's outputs are from the original's, on images that fitted nothing."""


@dataclass(frozen=True, eq=False)
class Split:
    """One way to share a budget.

    Attributes:
        share: part of the way that width was to go when forms were picked, in [0, 1].
        solution: the forms.
        merged: the network with them, before it was narrowed.
        model: the result.
        costs: of the original and of the result, times and bytes measured side by side where the budget limits them.
        narrowing: what became of its channels; None where the forms alone met the budget.
        loss: what was measured of it; None where nothing was.
    """

    share: float
    solution: Solution
    merged: Merged
    model: Any
    costs: tuple[Cost, Cost]
    narrowing: NarrowingReport | None
    loss: float | None

    def __str__(self) -> str:
        ratio = 0.0 if self.narrowing is None else self.narrowing.ratio
        before, after = self.costs
        told = f", {after.latency_ns / before.latency_ns:.3f} of the time" if before.latency_ns else ""
        told += "" if self.loss is None else f", loss {self.loss:.4f}"
        return f"{self.solution.merged} blocks merged and {100 * ratio:.0f} % of the channels cut{told}"


def share_budget(
    blocks: Blocks,
    candidates: Sequence[Candidate],
    budget: Budget,
    ranking: Ranking,
    *,
    merge: Merge,
    loss: Loss | None,
    measure: Measure | None = None,
    rounds: int = 2,
    refit: bool = True,
    memory_bytes: int,
    progress: Progress | None,
) -> tuple[Split, ...]:
    """Return the splits that were tried, the best one first.

    Args:
        blocks: of the original, with the times of a table where the budget is in time or bytes of files.
        candidates: forms with their scores.
        budget: of the result. A number of merged blocks says what depth gives: width does the rest.
        ranking: of the channels.
        merge: builds the network with some forms in it.
        loss: measures a result; where None, one split is made half of the way.
        measure: what times networks beside the original, for a budget in time or bytes of files.
        rounds: of splits, each closer to the best so far.
        refit: refit closing layers while narrowing.
        memory_bytes: activations beyond this go to disk.
        progress: called after each part of the network.

    Raises:
        BudgetError: no split meets the budget, or it limits nothing that width could save.
        ModelError: no channels can be cut.
        TfliteExportError: the device is absent or went away.
    """
    resources = replace(budget, merged=None)
    if not resources.limits:
        raise BudgetError("With width, a budget limits a cost, as {'macs': 0.6} does; 'merged' alone does not.")
    if resources.is_met(blocks.network_cost, blocks.network_cost, merged=0) and budget.merged is None:
        raise BudgetError("Nothing has to be cut: the model meets the budget as it is. Ask for a smaller one.")
    if not ranking.cuttable(blocks.graph).groups:
        raise ModelError(nothing_to_cut(blocks.graph, ranking))
    timed = measure if resources.needs_table is not None else None
    depth: Callable[[float], Solution | None] = (
        _Family(blocks, candidates, budget, ranking, progress).depth
        if timed is None
        else partial(_depth_by_table, blocks, candidates, budget)
    )
    tried: dict[tuple[str, ...], Split] = {}

    def costs_of(graph: ModelGraph) -> tuple[Cost, Cost]:
        if timed is not None:
            return measured_costs(timed, blocks.graph, graph)
        return blocks.network_cost, network_cost(graph)

    def attempt(share: float) -> Split | None:
        solution = depth(share)
        if solution is None:
            return None
        key = tuple(one.key for one in solution.chosen)
        if key not in tried:
            merged = merge(solution.chosen) if solution.chosen else _untouched(blocks)
            graph = prepared_graph(merged.model)
            model, narrowing = merged.model, None
            # with nothing merged, what there is has not come down at all
            costs = (blocks.network_cost, blocks.network_cost) if not solution.chosen else costs_of(graph)
            if not resources.is_met(costs[1], costs[0], merged=0):
                if not ranking.cuttable(graph).groups:
                    return None
                try:
                    graph, narrowing = narrow_graph(
                        graph,
                        resources,
                        ranking,
                        original=blocks.network_cost,
                        teacher=blocks.graph,
                        refit=refit,
                        measure=timed,
                        memory_bytes=memory_bytes,
                        progress=progress,
                    )
                except BudgetError:
                    return None
                model = build_model(graph)
                costs = (narrowing.before if timed is not None else blocks.network_cost, narrowing.after)
            tried[key] = Split(share, solution, merged, model, costs, narrowing, None if loss is None else loss(model))
        return tried[key]

    if budget.merged is not None or loss is None:
        attempt(ONE_SHOT)
    else:
        shares = list(FIRST)
        for number in range(rounds):
            for share in shares:
                attempt(share)
            if not tried:
                break
            best = min(tried.values(), key=_loss_of)
            step = (FIRST[1] - FIRST[0]) / 2 ** (number + 1)
            shares = [share for share in (best.share - step, best.share + step) if 0 <= share <= 1]
    if not tried:
        raise BudgetError(f"Neither merged blocks nor narrower layers nor both come down to {budget}.")
    return tuple(sorted(tried.values(), key=_loss_of))


def _loss_of(split: Split) -> float:
    return 0.0 if split.loss is None else split.loss


def _untouched(blocks: Blocks) -> Merged:
    return Merged(build_model(blocks.graph), (), {}, {}, 0.0)


def _depth_by_table(blocks: Blocks, candidates: Sequence[Candidate], budget: Budget, share: float) -> Solution | None:
    """Return the best forms that go, by a table's rows for whole blocks, as far as width is not to go."""
    limits = Budget(merged=budget.merged)
    if budget.merged is None:
        limits = Budget.absolute(bounds_on_the_way(budget, blocks.network_cost, 1 - share))
    costs = {block.name: block.cost for block in blocks}
    try:
        return Space.within(candidates, blocks=costs, rest=blocks.rest_cost, budget=limits).solution
    except BudgetError:
        return None


class _Family:
    """Choices of forms, from the one that needs no narrower layers to none at all."""

    def __init__(
        self,
        blocks: Blocks,
        candidates: Sequence[Candidate],
        budget: Budget,
        ranking: Ranking,
        progress: Progress | None,
    ) -> None:
        self._blocks, self._candidates, self._budget = blocks, candidates, budget
        self._ranked = ranking.ranked(ranking.cuttable(blocks.graph), progress=progress)
        resources = replace(budget, merged=None)
        if ranking.width.allocation == "score":
            self._ranked = self._ranked.allocated(resources.unit)
        try:
            self._most = ratio_within(self._ranked, resources, blocks.network_cost)
        except BudgetError:
            self._most = 1.0

    def depth(self, share: float) -> Solution | None:
        """Return the best forms where width goes a part of the way, None where forms cannot go the rest."""
        graph = self._ranked.outline(share * self._most)
        live = liveness(graph).total
        costs = {
            block.name: replace(cost_of(graph, block.nodes), activation_bytes=max(live[name] for name in block.nodes))
            for block in self._blocks
        }
        whole, inside = network_cost(graph), {name for block in self._blocks for name in block.nodes}
        rest = Cost(
            macs=whole.macs - sum(cost.macs for cost in costs.values()),
            params=whole.params - sum(cost.params for cost in costs.values()),
            activation_bytes=max((size for name, size in live.items() if name not in inside), default=0),
        )
        try:
            return Space.within(self._candidates, blocks=costs, rest=rest, budget=self._limits()).solution
        except BudgetError:
            return None

    def _limits(self) -> Budget:
        """What depth has to reach: in absolute numbers, since fractions are of the original."""
        if self._budget.merged is not None:
            return Budget(merged=self._budget.merged)
        return Budget.absolute(self._budget.bounds(self._blocks.network_cost))
