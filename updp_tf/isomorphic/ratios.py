"""The smallest ratio within a budget: counted, or measured on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

from updp_tf.blocks import network_cost
from updp_tf.cost import Budget, readable
from updp_tf.errors import BudgetError
from updp_tf.graph import build_model
from updp_tf.isomorphic.cutting import cut_units, resized_graph
from updp_tf.isomorphic.ranking import Ranked
from updp_tf.structure import Cost, ModelGraph
from updp_tf.walking import Progress

BISECTIONS = 12
"""Halvings of the ratio while a budget is met: the ratio is known to one part in 4,096."""

VISITS = 3
"""To a device, while a budget in time is met."""
PER_VISIT = 3
"""Ratios between the last two, timed in one visit: at the end the ratio is known to one part in 64."""


Measure = Callable[[Mapping[str, Any]], Mapping[str, tuple[int, int]]]
"""Returns the nanoseconds and bytes of networks by their names, and of an `original` that is timed beside them."""


class Measurer(Protocol):
    """What tells the time of networks and the size of their files: `updp_tf.Target` on a device."""

    def against(self, original: Any) -> AbstractContextManager[Measure]:
        """Give what measures networks beside an original."""


def ratio_within(ranked: Ranked, limits: Budget, original: Cost, part: float = 1.0) -> float:
    """Return the smallest ratio whose cost is within the limits, or the given part of the way to them.

    Args:
        ranked: channels of the network.
        limits: on resources.
        original: cost that fractions are of.
        part: of the way, in logarithms.

    Raises:
        BudgetError: the limits cannot be met.
    """
    costs: dict[frozenset[int], Cost] = {}

    def cost(ratio: float) -> Cost:
        cut = ranked.cut(ratio)
        if cut not in costs:
            costs[cut] = network_cost(resized_graph(ranked.dependencies, cut))
        return costs[cut]

    bounds = bounds_on_the_way(limits, original, part)

    def is_met(ratio: float) -> bool:
        return all(getattr(cost(ratio), unit) <= bound for unit, bound in bounds.items())

    if is_met(0.0):
        return 0.0
    low, high = 0.0, 1.0
    if not is_met(high):
        raise _out_of_reach(limits, bounds, cost(high))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_met(middle) else (middle, high)
    return high


def bounds_on_the_way(limits: Budget, original: Cost, part: float) -> dict[str, int]:
    """Return the most there may be of each limited unit, a part of the way down to the limits, in logarithms."""
    return {
        unit: bound if part == 1 else int(getattr(original, unit) * (bound / getattr(original, unit)) ** part)
        for unit, bound in limits.bounds(original).items()
    }


def measured_costs(measure: Measure, original: ModelGraph, graph: ModelGraph) -> tuple[Cost, Cost]:
    """Return what an original and another network cost, their times and bytes measured in one visit.

    Raises:
        TfliteExportError: the device is absent or went away.
    """
    found = measure({"other": build_model(graph)})
    return _whole_cost(original, found["original"]), _whole_cost(graph, found["other"])


def measured_ratio(
    ranked: Ranked,
    limits: Budget,
    measured: Measure,
    original: ModelGraph,
    part: float = 1.0,
    progress: Progress | None = None,
) -> tuple[float, Cost, Cost]:
    """Return the smallest ratio that was measured to be within limits, and what the original and the result cost.

    The original is timed in every visit, beside the networks that are compared with it: devices have slow hours.

    Args:
        ranked: channels of the network.
        limits: on resources, those of files among them.
        measured: measures times and bytes beside the original.
        original: network that fractions are of.
        part: of the way, in logarithms.
        progress: called before each visit.

    Raises:
        BudgetError: the limits cannot be met.
        TfliteExportError: the device is absent or went away.
    """

    def measure(ratios: Sequence[float]) -> tuple[Cost, dict[float, Cost]]:
        graphs = {ratio: cut_units(ranked.dependencies, ranked.cut(ratio)) for ratio in ratios}
        models = {f"ratio_{ratio:.6f}": build_model(graph) for ratio, graph in graphs.items()}
        found = measured(models)
        costs = {ratio: _whole_cost(graph, found[f"ratio_{ratio:.6f}"]) for ratio, graph in graphs.items()}
        return _whole_cost(original, found["original"]), costs

    def is_met(before: Cost, cost: Cost) -> bool:
        bounds = bounds_on_the_way(limits, before, part)
        return all(getattr(cost, unit) <= bound for unit, bound in bounds.items())

    def visit(number: int, low: float, high: float) -> list[float]:
        if progress is not None:
            progress(number, VISITS, f"time ratios between {low:.2f} and {high:.2f}")
        between = [low + (high - low) * step / (PER_VISIT + 1) for step in range(1, PER_VISIT + 1)]
        return _of_different_cuts(ranked, [low, *between, high])

    asked = visit(0, 0.0, 1.0)
    before, costs = measure(asked)
    met = [ratio for ratio in asked if is_met(before, costs[ratio])]
    if not met:
        raise _out_of_reach(limits, limits.bounds(before), costs[asked[-1]])
    best = met[0], before, costs[met[0]]
    for number in range(1, VISITS):
        low = max((ratio for ratio in asked if ratio < best[0]), default=best[0])
        # what is known to fail, and what is known to be met, is not timed again
        asked = visit(number, low, best[0])[1:-1]
        if not asked:
            break
        before, costs = measure(asked)
        met = [ratio for ratio in asked if is_met(before, costs[ratio])]
        best = (met[0], before, costs[met[0]]) if met else best
        asked = [low, *asked]
    return best


def _whole_cost(graph: ModelGraph, measured: tuple[int, int]) -> Cost:
    return replace(network_cost(graph), latency_ns=measured[0], file_bytes=measured[1])


def _of_different_cuts(ranked: Ranked, ratios: Sequence[float]) -> list[float]:
    """Return the ratios without those that cut what the one before cuts."""
    cuts = {ratio: ranked.cut(ratio) for ratio in ratios}
    return [ratio for i, ratio in enumerate(ratios) if i == 0 or cuts[ratio] != cuts[ratios[i - 1]]]


def _out_of_reach(limits: Budget, bounds: Iterable[str], least: Cost) -> BudgetError:
    told = ", ".join(f"{readable(getattr(least, unit), unit)} {unit}" for unit in bounds)
    return BudgetError(f"Narrowing cannot come down to {limits}: with every group at its least it has {told}.")
