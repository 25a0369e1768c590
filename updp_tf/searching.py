"""Which form for which block: the exact choice under a budget, others within it, and what was measured of them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from updp_tf.cost import ADDITIVE_UNITS, NS_PER_MS, Budget, Limit, readable
from updp_tf.errors import BudgetError
from updp_tf.partitioning import Limits, Problem, Row, Solution, System, pick
from updp_tf.structure import Candidate, Cost


@dataclass(frozen=True)
class Measured:
    """One choice that was measured.

    Attributes:
        solution: the choice, with its sum of scores.
        loss: what was measured of it.
    """

    solution: Solution
    loss: float


@dataclass(frozen=True)
class SearchReport:
    """What a search looked at.

    Attributes:
        method: of the search.
        measure: what `loss` means: `KL`, `squared error`, `score_fn`, ...; empty where nothing was measured.
        n_images: that it was measured on.
        measured: in the order in which they were measured.
        best: number of the one that was taken, None where nothing was measured.
    """

    method: str
    measure: str = ""
    n_images: int = 0
    measured: tuple[Measured, ...] = ()
    best: int | None = None

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, of the sums of scores with what was measured; None for fewer than three measured choices."""
        if len(self.measured) < 3:
            return None
        ranks = np.array(
            [_ranks([one.solution.score for one in self.measured]), _ranks([one.loss for one in self.measured])]
        )
        if (ranks.std(axis=1) == 0).any():
            return None
        return float(np.corrcoef(ranks)[0, 1])

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        rows = [
            {
                "forms": [item.key for item in one.solution.chosen],
                "score": one.solution.score,
                "macs": one.solution.cost.macs,
                "params": one.solution.cost.params,
                "merged": one.solution.merged,
                "loss": one.loss if math.isfinite(one.loss) else None,
            }
            for one in self.measured
        ]
        return {
            "method": self.method,
            "measure": self.measure,
            "n_images": self.n_images,
            "measured": rows,
            "best": self.best,
            "rank_correlation": self.rank_correlation,
        }

    def __str__(self) -> str:
        if self.best is None:
            return f"{self.method}: sum of scores, nothing measured"
        best = self.measured[self.best]
        smallest = min(self.measured, key=lambda one: one.solution.score)
        told = f"{self.method}: {len(self.measured)} plans measured on {self.n_images} images, "
        told += f"{self.measure} {best.loss:.4f} (sum of scores {best.solution.score:.4f})"
        if smallest is not best:
            told += f"; the smallest sum of them, {smallest.solution.score:.4f}, had {smallest.loss:.4f}"
        if (correlation := self.rank_correlation) is not None:
            told += f"; rank correlation of both {correlation:.2f}"
        return told


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Return the rank of each value, the mean rank for equal ones; importing scipy.stats for it takes seconds."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def solve(
    candidates: Sequence[Candidate], *, blocks: Mapping[str, Cost], rest: Cost, budget: Budget | Mapping[str, float]
) -> Solution:
    """Return the forms with the smallest sum of scores within the budget.

    Candidates dearer than the blocks they replace, in `budget.unit` or in measured time, are left out first. Among
    equal scores the choice with fewer MACs wins, then the one with fewer merged blocks, then the one of earlier
    candidates (sorted by block and key): the answer does not depend on the order in which candidates come.

    Args:
        candidates: forms of blocks and of spans. `keep` needs no candidate; one that is given is ignored.
        blocks: what every block costs as it is, in graph order.
        rest: what the network costs outside the blocks.
        budget: or the mapping that `Budget.parse` reads.

    Raises:
        BudgetError: no choice is within the budget; the message says what is the nearest.
        FormError: a score that is not finite, a candidate for an unknown block, or two with the same key.
    """
    return Space.within(candidates, blocks=blocks, rest=rest, budget=budget).solution


def nearest(
    candidates: Sequence[Candidate], *, blocks: Mapping[str, Cost], rest: Cost, budget: Budget | Mapping[str, float]
) -> tuple[Solution, str | None]:
    """Return the best choice within the budget, or within the nearest budget that can be met.

    A limit that cannot be met is replaced by the smallest value that can be had under the limits before it; a
    number of merged blocks comes first, and is replaced by the nearest number that is possible.

    Returns:
        The solution, and None where the budget is met, else a sentence that says what was had instead.

    Raises:
        FormError: as `solve`.
    """
    space = Space.within(candidates, blocks=blocks, rest=rest, budget=budget, or_nearest=True)
    return space.solution, space.note


@dataclass(frozen=True)
class Space:
    """Every choice that is within a budget: where all ways to search look.

    Attributes:
        solution: the choice with the smallest sum of scores, as `solve` returns it.
        note: None where the budget asked for is met, else a sentence that says what was had instead.
    """

    solution: Solution
    note: str | None
    _system: System
    _first: np.ndarray

    @classmethod
    def within(
        cls,
        candidates: Sequence[Candidate],
        *,
        blocks: Mapping[str, Cost],
        rest: Cost,
        budget: Budget | Mapping[str, float],
        or_nearest: bool = False,
    ) -> Space:
        """Return the choices within a budget; arguments and errors as of `solve`.

        Args:
            candidates: as of `solve`.
            blocks: as of `solve`.
            rest: as of `solve`.
            budget: as of `solve`.
            or_nearest: where it cannot be met, take the nearest that can, as `nearest` does.
        """
        budget = Budget.parse(budget)
        problem = Problem.build(candidates, blocks, rest, budget)
        limits = Limits(problem.budget_bounds(budget), budget.merged)
        picked, note = pick(problem, limits), None
        if picked is None:
            note = _say_nearest(problem, budget)
            if not or_nearest:
                raise BudgetError(note)
            limits = _nearest_limits(problem, limits)
            picked = pick(problem, limits)
        if picked is None:
            raise RuntimeError("the nearest budget cannot be met, though each of its values was attained")
        return cls(problem.solution(picked), note, System.build(problem, limits), picked)

    @property
    def items(self) -> tuple[Candidate, ...]:
        """What may be chosen, in graph order."""
        allowed = self._system.allowed
        return tuple(item for item, is_allowed in zip(self._problem.items, allowed, strict=True) if is_allowed)

    @property
    def limits(self) -> tuple[tuple[np.ndarray, float, float], ...]:
        """The limits as rows over `items`: what each of them adds, and what the sum of the chosen must lie between."""
        allowed = self._system.allowed
        return tuple(
            (
                np.asarray(row.coefficients, dtype=np.float64)[allowed],
                -math.inf if row.lower is None else float(row.lower),
                math.inf if row.upper is None else float(row.upper),
            )
            for row in self._system.rows
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks, in graph order."""
        return self._problem.names

    @property
    def _problem(self) -> Problem:
        return self._system.problem

    def best(self, n: int) -> tuple[Solution, ...]:
        """Return the `n` choices with the smallest sums of scores, the best first; fewer where there are fewer.

        Each is found like the first, with those before it cut off.
        """
        found = [self._first]
        while len(found) < n:
            picked, _ = self._system.core(self._problem.scores, slack=0.0, other_than=found)
            if picked is None:
                break
            found.append(picked)
        return tuple(self._problem.solution(picked) for picked in found[:n])

    def smallest(self, scores: Mapping[str, float]) -> Solution:
        """Return the choice with the smallest sum of other scores, by `Candidate.key`."""
        objective = np.array([scores.get(item.key, 0.0) for item in self._problem.items])
        picked = self._system.minimise(objective)
        return self._problem.solution(self._first if picked is None else picked)

    def random(self, rng: np.random.Generator) -> Solution:
        """Return a choice that knows no score.

        Blocks come in random order and take one of their forms or spans at random until the budget is met. Where
        it is not met even so, or overshot, the nearest choice that meets it is taken: the one that differs in the
        fewest items.
        """
        covered: set[int] = set()
        picked: list[int] = []
        items_by_block: dict[int, list[int]] = {}
        for item in np.flatnonzero(self._system.allowed):
            for block in self._problem.members[item]:
                items_by_block.setdefault(block, []).append(int(item))
        for block in rng.permutation(len(self.names)):
            if self._system.holds(_positions(picked)):
                break
            able = [item for item in items_by_block.get(block, ()) if not covered & set(self._problem.members[item])]
            if able:
                picked.append(able[rng.integers(len(able))])
                covered |= set(self._problem.members[picked[-1]])
        return self._repaired(_positions(picked))

    def uniform(self) -> Solution:
        """Return the choice that merges the fewest blocks, spread evenly over the depth, each in its best form.

        Raises:
            BudgetError: no number of evenly spread blocks is within the budget.
        """
        system, members = self._system, self._problem.members
        able = sorted({block for item in np.flatnonzero(system.allowed) for block in members[item]})
        merged = system.limits.merged
        for n in range(1, len(able) + 1) if merged is None else (merged,):
            places = {able[int((index + 0.5) * len(able) / n)] for index in range(n)}
            inside = np.array([places.issuperset(covered) for covered in members], dtype=bool)
            forced = np.isin(np.arange(len(self.names)), list(places))
            spread = replace(system, allowed=system.allowed & inside, forced=system.forced | forced)
            picked = spread.minimise(self._problem.scores)
            if picked is not None:
                return self._problem.solution(picked)
        raise BudgetError("No evenly spread blocks are within the budget; let the scores choose, method='exact'.")

    def closest_to(self, chosen: Sequence[Candidate]) -> Solution:
        """Return the choice that differs from a wished one in the fewest items: itself, where it is within the budget.

        Args:
            chosen: items of this space; they may break the budget, and cover a block twice.
        """
        wished = {one.key for one in chosen}
        return self._repaired(_positions(i for i, item in enumerate(self._problem.items) if item.key in wished))

    def _repaired(self, wished: np.ndarray) -> Solution:
        if not self._system.holds(wished):
            distance = np.ones(len(self._problem.items))
            distance[wished] = -1.0
            closest = self._system.minimise(distance)
            wished = self._first if closest is None else closest
        return self._problem.solution(wished)

    def swaps(self, solution: Solution) -> Iterator[Solution]:
        """Yield the choices within the budget that are one swap away, those with the smallest sums of scores first.

        A swap takes one item out, and puts another one in or none: another form, or another block, or a span.
        """
        problem, system = self._problem, self._system
        keys = {one.key for one in solution.chosen}
        mine = [index for index, item in enumerate(problem.items) if item.key in keys]
        cover = problem.cover
        found: list[tuple[float, tuple[int, ...]]] = []
        for out in mine:
            rest = _positions(index for index in mine if index != out)
            taken = np.zeros(len(self.names))
            for index in rest:
                taken[list(problem.members[index])] = 1.0
            able = system.allowed & (cover.T @ taken == 0) & system.rows_hold_with(rest)
            able[out] = False
            swapped = [rest, *(np.sort(np.append(rest, index)) for index in np.flatnonzero(able))]
            for picked in swapped:
                if system.holds(picked):
                    found.append((math.fsum(problem.scores[picked]), tuple(int(index) for index in picked)))
        for _, indices in sorted(found):
            yield problem.solution(_positions(indices))


def _positions(indices: Iterable[int]) -> np.ndarray:
    return np.array(sorted(indices), dtype=np.int64)


def _attainable(problem: Problem, unit: str, limits: Limits) -> int | None:
    """Return the smallest cost of the whole network in one unit, under limits on the others, or None."""
    others = Limits({name: bound for name, bound in limits.bounds.items() if name != unit}, limits.merged)
    if unit in ADDITIVE_UNITS:
        picked = System.build(problem, others).minimise(problem.differences(unit))
        return None if picked is None else int(getattr(problem.solution(picked).cost, unit))
    # a maximum over parts is one of the parts' own values: bisect over them
    parts = (problem.rest, *problem.blocks, *(item.cost for item in problem.items))
    values = sorted({getattr(part, unit) for part in parts})

    def is_feasible(value: int) -> bool:
        system = System.build(problem, replace(others, bounds={**others.bounds, unit: value}))
        return system.minimise(np.zeros(len(problem.items))) is not None

    if not is_feasible(values[-1]):
        return None
    return values[bisect.bisect_left(values, True, key=is_feasible)]


def _nearest_limits(problem: Problem, asked: Limits) -> Limits:
    """Return limits that can be met: each loosened to what can be had under those before it, the count first."""
    relaxed = Limits({}, None)
    if (wanted := asked.merged) is not None:
        counts = _nearest_counts(problem, wanted, {})
        relaxed = replace(relaxed, merged=min(counts, key=lambda count: (abs(count - wanted), count)))
    for unit, bound in asked.bounds.items():
        smallest = _attainable(problem, unit, relaxed)
        relaxed = replace(relaxed, bounds={**relaxed.bounds, unit: max(bound, smallest or 0)})
    return relaxed


def _nearest_counts(problem: Problem, asked: int, bounds: Mapping[str, int]) -> tuple[int, ...]:
    """Return the numbers of merged blocks next to the asked one that are possible within other bounds."""
    system = System.build(problem, Limits(bounds, None))
    found = []
    for sign, row in ((-1, Row(problem.counts, None, asked)), (1, Row(problem.counts, asked, None))):
        picked = replace(system, rows=(*system.rows, row)).minimise(sign * problem.counts)
        if picked is not None:
            found.append(int(problem.counts[picked].sum()))
    return tuple(dict.fromkeys(found))


def _say_nearest(problem: Problem, budget: Budget) -> str:
    """Return one sentence on why a budget cannot be met, with the nearest values that can be had."""
    alone, together = [], []
    everything = Limits(problem.budget_bounds(budget), budget.merged)
    if budget.merged is not None:
        counts = _nearest_counts(problem, budget.merged, {})
        if budget.merged not in counts:
            alone.append(f"merged {budget.merged} cannot be met: {_say_counts(problem, budget.merged, counts)}")
        elif counts := _nearest_counts(problem, budget.merged, everything.bounds):
            together.append(f"within the other limits {_say_counts(problem, budget.merged, counts)}")
    for limit in budget.limits:
        bound = limit.bound(problem.original)
        is_time = limit.unit == "latency_ns"
        smallest = _attainable(problem, limit.unit, Limits({}, None))
        if smallest is not None and smallest > bound:
            least = "the fastest plan takes" if is_time else "the smallest plan has"
            alone.append(f"{limit} cannot be met: {least} {_share(problem, limit, smallest)}")
            continue
        smallest = _attainable(problem, limit.unit, everything)
        if smallest is not None and smallest > bound:
            least = "the fastest plan takes" if is_time else f"the least {limit.unit} are"
            together.append(f"within the other limits {least} {_share(problem, limit, smallest)}")
    if alone:
        return f"The budget {'; '.join(alone)}."
    details = f": {'; '.join(together)}" if together else ""
    return f"The budgets {budget} cannot be met together{details}."


def _say_counts(problem: Problem, asked: int, counts: Sequence[int]) -> str:
    if max(counts) < asked:
        return f"at most {max(counts)} of {len(problem.names)} blocks can be merged"
    return f"{' or '.join(map(str, counts))} blocks can be merged"


def _share(problem: Problem, limit: Limit, value: int) -> str:
    """Return a cost in the terms of a limit: `0.74 (222.6 M of 300.8 M)`, rounded so that asking for it would do."""
    original = getattr(problem.original, limit.unit)
    amounts = f"{readable(value, limit.unit)} of {readable(original, limit.unit)}"
    if limit.key == "latency_ms":
        return f"{math.ceil(value / NS_PER_MS * 1e4) / 1e4:g} ({amounts})"
    if not limit.is_fraction:
        return f"{value} ({amounts})"
    return f"{math.ceil(value / original * 1000) / 1000:g} ({amounts})"
