"""Which form for which block: the exact choice under a budget.

Minimising a sum of scores such that every block is covered by exactly one item (itself, one of its forms, or the
form of a span) and that costs stay within bounds is a set partitioning problem with knapsack rows; without spans it
is a multiple-choice knapsack. HiGHS solves it to a gap of zero.

The untouched block needs no variable: it is what is left where no chosen item covers it. So a variable per
candidate, at most one of them over each block, and rows in *differences* of cost.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from updp_tf.cost import ADDITIVE_UNITS, NS_PER_MS, Budget, Limit, is_dearer, readable, total
from updp_tf.errors import BudgetError, FormError
from updp_tf.structure import Candidate, Cost

# Two sums of scores are equal when they differ by less than this part of the largest score: scores are measured
# to three digits or so, and HiGHS cannot tell sums apart below about 1e-10 of the largest coefficient.
SCORE_TIE = 5e-10
# Largest coefficient of an objective and of a row as HiGHS sees them. Its tolerances are absolute (1e-6 for the gap
# and for rows), so this makes them 1e-10 of the largest score and of the largest cost.
LARGEST_COEFFICIENT = 1e4
FIRST_CORE = 25  # how many items and blocks beyond the basis of the relaxation the first, guessed core has


@dataclass(frozen=True)
class Solution:
    """The best choice of forms.

    Attributes:
        chosen: in graph order; blocks in none of them are kept.
        score: sum of the scores.
        cost: of the whole network.
        merged: how many blocks are replaced; a span counts each of its blocks.
    """

    chosen: tuple[Candidate, ...]
    score: float
    cost: Cost
    merged: int


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
    space = Space.nearest(candidates, blocks=blocks, rest=rest, budget=budget)
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
    _system: _System
    _first: np.ndarray

    @classmethod
    def within(
        cls,
        candidates: Sequence[Candidate],
        *,
        blocks: Mapping[str, Cost],
        rest: Cost,
        budget: Budget | Mapping[str, float],
    ) -> Space:
        """Return the choices within a budget; arguments and errors as of `solve`."""
        budget = Budget.parse(budget)
        problem = _Problem.build(candidates, blocks, rest, budget)
        limits = _Limits(problem.budget_bounds(budget), budget.merged)
        picked = _pick(problem, limits)
        if picked is None:
            raise BudgetError(_say_nearest(problem, budget))
        return cls(problem.solution(picked), None, _System.build(problem, limits), picked)

    @classmethod
    def nearest(
        cls,
        candidates: Sequence[Candidate],
        *,
        blocks: Mapping[str, Cost],
        rest: Cost,
        budget: Budget | Mapping[str, float],
    ) -> Space:
        """Return the choices within a budget, or within the nearest that can be met, as `nearest` does."""
        budget = Budget.parse(budget)
        problem = _Problem.build(candidates, blocks, rest, budget)
        limits = _Limits(problem.budget_bounds(budget), budget.merged)
        picked = _pick(problem, limits)
        if picked is not None:
            return cls(problem.solution(picked), None, _System.build(problem, limits), picked)
        relaxed = _Limits({}, None)
        if (asked := budget.merged) is not None:
            counts = _nearest_counts(problem, asked, {})
            relaxed = replace(relaxed, merged=min(counts, key=lambda count: (abs(count - asked), count)))
        for unit, bound in limits.bounds.items():
            smallest = _attainable(problem, unit, relaxed)
            relaxed = replace(relaxed, bounds={**relaxed.bounds, unit: max(bound, smallest or 0)})
        picked = _pick(problem, relaxed)
        if picked is None:
            raise RuntimeError("the nearest budget cannot be met, though each of its values was attained")
        note = _say_nearest(problem, budget)
        return cls(problem.solution(picked), note, _System.build(problem, relaxed), picked)

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
    def _problem(self) -> _Problem:
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


@dataclass(frozen=True)
class _Limits:
    """Bounds by unit, and the exact number of merged blocks or None."""

    bounds: Mapping[str, int]
    merged: int | None


@dataclass(frozen=True)
class _Row:
    """`lower <= coefficients @ x <= upper` over whole numbers."""

    coefficients: np.ndarray
    lower: int | None
    upper: int | None

    def holds(self, picked: np.ndarray) -> bool:
        value = int(self.coefficients[picked].sum())
        return (self.lower is None or self.lower <= value) and (self.upper is None or value <= self.upper)

    def scaled(self) -> tuple[np.ndarray, float, float]:
        """Return coefficients no larger than HiGHS likes, and bounds half a unit off, where no sum can lie."""
        divisor = int(np.gcd.reduce(self.coefficients)) or 1
        scale = max(1.0, float(np.abs(self.coefficients // divisor).max()) / LARGEST_COEFFICIENT)
        lower = -math.inf if self.lower is None else (-(-self.lower // divisor) - 0.5) / scale
        upper = math.inf if self.upper is None else (self.upper // divisor + 0.5) / scale
        return self.coefficients // divisor / scale, lower, upper


@dataclass(frozen=True)
class _ScoreRow:
    """`coefficients @ x <= upper` over real numbers."""

    coefficients: np.ndarray
    upper: float
    lower: None = None

    def holds(self, picked: np.ndarray) -> bool:
        return math.fsum(self.coefficients[picked]) <= self.upper

    def scaled(self) -> tuple[np.ndarray, float, float]:
        """Return coefficients as large as those of the objective, so that the upper bound is as sharp."""
        scale = LARGEST_COEFFICIENT / (float(np.abs(self.coefficients).max()) or 1.0)
        return self.coefficients * scale, -math.inf, self.upper * scale


@dataclass(frozen=True)
class _Problem:
    """Candidates in canonical order, and what choosing each of them changes.

    Attributes:
        items: candidates that may be picked, sorted by their blocks and key.
        names: of the blocks, in graph order.
        blocks: what each costs when kept.
        rest: what is outside the blocks.
    """

    items: tuple[Candidate, ...]
    names: tuple[str, ...]
    blocks: tuple[Cost, ...]
    rest: Cost

    @classmethod
    def build(cls, candidates: Sequence[Candidate], blocks: Mapping[str, Cost], rest: Cost, budget: Budget) -> _Problem:
        position = {name: index for index, name in enumerate(blocks)}
        items: dict[str, Candidate] = {}
        for item in candidates:
            if item.form == "keep":
                continue
            unknown = [name for name in item.blocks if name not in position]
            if unknown or not item.blocks:
                raise FormError(f"'{item.key}' replaces '{''.join(unknown[:1])}', which is none of the blocks.")
            if not math.isfinite(item.score):
                raise FormError(f"The score of '{item.key}' is {item.score}: it must be a finite number.")
            if item.key in items:
                raise FormError(f"Two candidates are named '{item.key}'.")
            items[item.key] = item
        affordable = [
            item
            for item in items.values()
            if not is_dearer(item.cost, total(blocks[name] for name in item.blocks), budget.unit)
        ]
        affordable.sort(key=lambda item: (sorted(position[name] for name in item.blocks), item.key))
        return cls(tuple(affordable), tuple(blocks), tuple(blocks.values()), rest)

    @cached_property
    def original(self) -> Cost:
        """What the untouched network costs."""
        return total((self.rest, *self.blocks))

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the blocks that each item covers."""
        position = {name: index for index, name in enumerate(self.names)}
        return tuple(tuple(position[name] for name in item.blocks) for item in self.items)

    @cached_property
    def cover(self) -> Any:
        """Sparse matrix: a row per block, a column per item, 1 where the item covers the block."""
        from scipy.sparse import csr_array

        places = [(index, item) for item, covered in enumerate(self.members) for index in covered]
        shape = (len(self.names), len(self.items))
        return csr_array((np.ones(len(places)), tuple(zip(*places, strict=True))), shape=shape)

    @cached_property
    def scores(self) -> np.ndarray:
        return np.array([item.score for item in self.items], dtype=np.float64)

    @cached_property
    def counts(self) -> np.ndarray:
        return np.array([len(item.blocks) for item in self.items], dtype=np.int64)

    def differences(self, unit: str) -> np.ndarray:
        """What picking each item adds to the whole network, in an additive unit."""
        kept = [sum(getattr(self.blocks[index], unit) for index in covered) for covered in self.members]
        mine = [getattr(item.cost, unit) for item in self.items]
        return np.array(mine, dtype=np.int64) - np.array(kept, dtype=np.int64)

    def budget_bounds(self, budget: Budget) -> dict[str, int]:
        return budget.bounds(self.original)

    def solution(self, picked: np.ndarray) -> Solution:
        chosen = tuple(self.items[index] for index in picked)
        covered = {name for item in chosen for name in item.blocks}
        kept = (cost for name, cost in zip(self.names, self.blocks, strict=True) if name not in covered)
        cost = total((self.rest, *kept, *(item.cost for item in chosen)))
        return Solution(chosen, math.fsum(item.score for item in chosen), cost, len(covered))


@dataclass(frozen=True)
class _System:
    """A problem under limits, as rows over one 0/1 variable per item.

    Attributes:
        problem: what to choose from.
        rows: besides the rule that a block is covered at most once.
        allowed: which items may be picked at all.
        forced: which blocks must be covered, because kept they break a limit that is a maximum over the parts.
        possible: False where what lies outside the blocks breaks a limit by itself.
        limits: that it was built from.
    """

    problem: _Problem
    rows: tuple[_Row | _ScoreRow, ...]
    allowed: np.ndarray
    forced: np.ndarray
    possible: bool
    limits: _Limits

    @classmethod
    def build(cls, problem: _Problem, limits: _Limits) -> _System:
        rows: list[_Row] = []
        allowed = np.ones(len(problem.items), dtype=bool)
        forced = np.zeros(len(problem.names), dtype=bool)
        possible = True
        for unit, bound in limits.bounds.items():
            if unit in ADDITIVE_UNITS:
                rows.append(_Row(problem.differences(unit), None, bound - getattr(problem.original, unit)))
            else:
                allowed &= np.array([getattr(item.cost, unit) <= bound for item in problem.items], dtype=bool)
                forced |= np.array([getattr(cost, unit) > bound for cost in problem.blocks], dtype=bool)
                possible &= getattr(problem.rest, unit) <= bound
        if limits.merged is not None:
            rows.append(_Row(problem.counts, limits.merged, limits.merged))
        return cls(problem, tuple(rows), allowed, forced, possible, limits)

    def minimise(self, objective: np.ndarray, *, other_than: Sequence[np.ndarray] = ()) -> np.ndarray | None:
        """Return the positions of the items with the smallest sum of `objective`, or None where nothing is feasible.

        Every answer of the solver is checked in whole numbers; one that breaks a row by less than the solver's
        tolerance is excluded, alone, and the solver asked again, so that rounding can neither break a budget nor
        lose the optimum.
        """
        nothing = np.zeros(0, dtype=np.int64)
        if not self.possible:
            return None
        if not self.allowed.any():
            return nothing if self.holds(nothing) and all(map(len, other_than)) else None
        excluded = list(other_than)
        while (picked := self._ask(objective, excluded)) is not None and not self.holds(picked):
            excluded.append(picked)
        return picked

    def core(
        self, objective: np.ndarray, *, slack: float, other_than: Sequence[np.ndarray] = ()
    ) -> tuple[np.ndarray | None, _System]:
        """Return what `minimise` returns, and the system narrowed to whatever can come within `slack` of it.

        By weak duality a choice costs at least `bound` plus the reduced cost of each of its items, plus the price of
        each block it leaves uncovered. The linear relaxation of a knapsack over many blocks is so tight that all but
        some dozens of items are ruled out by that, which leaves HiGHS little to branch on. First guess a margin
        within which the optimum lies; what it leaves in gives an optimum of its own, and that gives the margin
        which is certain.
        """
        prices = self._prices(objective) if self.possible and self.allowed.any() else None
        if prices is None:
            return self.minimise(objective, other_than=other_than), self
        bound, reduced, uncovered = prices
        steps = np.sort(np.concatenate([reduced[self.allowed], uncovered]))
        margin = float(steps[min(len(uncovered) + FIRST_CORE, len(steps) - 1)])
        while True:
            narrow = self._within(margin, reduced, uncovered)
            picked = narrow.minimise(objective, other_than=other_than)
            needed = math.inf if picked is None else math.fsum(objective[picked]) - bound + slack
            if needed <= margin:
                return picked, self._within(needed, reduced, uncovered)
            if math.isinf(margin):
                return None, self
            margin = needed

    def _within(self, margin: float, reduced: np.ndarray, uncovered: np.ndarray) -> _System:
        return replace(self, allowed=self.allowed & (reduced <= margin), forced=self.forced | (uncovered > margin))

    def _prices(self, objective: np.ndarray) -> tuple[float, np.ndarray, np.ndarray] | None:
        """Return a lower bound, what each item adds to it, and what each uncovered block adds to it.

        From the dual values of the linear relaxation, whatever their accuracy: the bound is computed from them anew.
        None where the relaxation has no solution.
        """
        from scipy.optimize import linprog
        from scipy.sparse import csr_array, vstack

        cover = self.problem.cover
        scaled = [row.scaled() for row in self.rows]
        upper = [(row, high) for row, _, high in scaled if math.isfinite(high)]
        upper += [(-row, -low) for row, low, _ in scaled if math.isfinite(low)]
        above = vstack([cover, -cover[self.forced], *(csr_array(row[None]) for row, _ in upper)], format="csr")
        limits = np.concatenate([np.ones(cover.shape[0]), -np.ones(self.forced.sum()), [high for _, high in upper]])
        scale = LARGEST_COEFFICIENT / (float(np.abs(objective).max()) or 1.0)
        bounds = np.stack([np.zeros(len(objective)), np.where(self.allowed, np.inf, 0.0)], axis=1)
        relaxed = linprog(objective * scale, A_ub=above, b_ub=limits, bounds=bounds, method="highs")
        if relaxed.status != 0:
            return None
        duals = np.minimum(relaxed.ineqlin.marginals, 0.0) / scale
        reduced = objective - above.T @ duals
        bound = float(duals @ limits + np.minimum(reduced, 0.0)[self.allowed].sum())
        return bound, np.maximum(reduced, 0.0), -duals[: cover.shape[0]]

    def rows_hold_with(self, rest: np.ndarray) -> np.ndarray:
        """Return, for each item, whether the limits hold for it together with some others."""
        able = np.ones(len(self.problem.items), dtype=bool)
        for row in self.rows:
            values = row.coefficients + row.coefficients[rest].sum()
            if row.upper is not None:
                able &= values <= row.upper
            if row.lower is not None:
                able &= values >= row.lower
        return able

    def holds(self, picked: np.ndarray) -> bool:
        """True where a choice covers no block twice, and is within every limit."""
        covered = np.bincount(
            [index for item in picked for index in self.problem.members[item]], minlength=len(self.problem.names)
        )
        return bool(
            (covered <= 1).all() and (covered >= self.forced).all() and all(row.holds(picked) for row in self.rows)
        )

    def _ask(self, objective: np.ndarray, excluded: Sequence[np.ndarray]) -> np.ndarray | None:
        # imported here: it takes a second, and most that import this module never solve
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array, vstack

        n_items = len(self.problem.items)
        parts, lower, upper = [self.problem.cover], [self.forced.astype(float)], [np.ones(len(self.problem.names))]
        for row in self.rows:
            coefficients, low, high = row.scaled()
            parts.append(csr_array(coefficients[None]))
            lower.append(np.array([low]))
            upper.append(np.array([high]))
        for picked in excluded:
            # at least one of them out, or one of the others in
            differs = np.ones(n_items)
            differs[picked] = -1.0
            parts.append(csr_array(differs[None]))
            lower.append(np.array([1.0 - len(picked)]))
            upper.append(np.array([math.inf]))
        largest = float(np.abs(objective).max())
        answer = milp(
            objective * (LARGEST_COEFFICIENT / largest) if largest else objective,
            integrality=np.ones(n_items),
            bounds=Bounds(0, self.allowed.astype(float)),
            constraints=LinearConstraint(vstack(parts, format="csc"), np.concatenate(lower), np.concatenate(upper)),
            options={"mip_rel_gap": 0.0, "presolve": True},
        )
        if answer.status == 2:
            return None
        if answer.status != 0:
            raise RuntimeError(f"HiGHS stopped without an answer: {answer.message}")
        return np.flatnonzero(answer.x > 0.5)


def _pick(problem: _Problem, limits: _Limits) -> np.ndarray | None:
    """Return the best items, ties broken in stages: each stage keeps what the stages before it reached."""
    if not problem.items:
        return _System.build(problem, limits).minimise(problem.scores)
    slack = SCORE_TIE * float(np.abs(problem.scores).max())
    picked, system = _System.build(problem, limits).core(problem.scores, slack=slack)
    if picked is None:
        return None
    tied = _ScoreRow(problem.scores, math.fsum(problem.scores[picked]) + slack)
    system = replace(system, rows=(*system.rows, tied))
    ranks = np.arange(1, len(problem.items) + 1, dtype=np.int64)
    objectives = (problem.differences("macs"), problem.counts, ranks)
    # mostly no other choice is as good, and then one question, cheaper than a stage, settles it
    if system.minimise(np.zeros(len(problem.items)), other_than=[picked]) is None:
        return picked
    for objective in objectives:
        better = system.minimise(objective)
        picked = picked if better is None else better
        system = replace(system, rows=(*system.rows, _Row(objective, None, int(objective[picked].sum()))))
    return picked


def _attainable(problem: _Problem, unit: str, limits: _Limits) -> int | None:
    """Return the smallest cost of the whole network in one unit, under limits on the others, or None."""
    others = _Limits({name: bound for name, bound in limits.bounds.items() if name != unit}, limits.merged)
    if unit in ADDITIVE_UNITS:
        picked = _System.build(problem, others).minimise(problem.differences(unit))
        return None if picked is None else int(getattr(problem.solution(picked).cost, unit))
    # a maximum over parts is one of the parts' own values: bisect over them
    parts = (problem.rest, *problem.blocks, *(item.cost for item in problem.items))
    values = sorted({getattr(part, unit) for part in parts})

    def is_feasible(value: int) -> bool:
        system = _System.build(problem, replace(others, bounds={**others.bounds, unit: value}))
        return system.minimise(np.zeros(len(problem.items))) is not None

    if not is_feasible(values[-1]):
        return None
    return values[bisect.bisect_left(values, True, key=is_feasible)]


def _nearest_counts(problem: _Problem, asked: int, bounds: Mapping[str, int]) -> tuple[int, ...]:
    """Return the numbers of merged blocks next to the asked one that are possible within other bounds."""
    system = _System.build(problem, _Limits(bounds, None))
    found = []
    for sign, row in ((-1, _Row(problem.counts, None, asked)), (1, _Row(problem.counts, asked, None))):
        picked = replace(system, rows=(*system.rows, row)).minimise(sign * problem.counts)
        if picked is not None:
            found.append(int(problem.counts[picked].sum()))
    return tuple(dict.fromkeys(found))


def _say_nearest(problem: _Problem, budget: Budget) -> str:
    """Return one sentence on why a budget cannot be met, with the nearest values that can be had."""
    alone, together = [], []
    everything = _Limits(problem.budget_bounds(budget), budget.merged)
    if budget.merged is not None:
        counts = _nearest_counts(problem, budget.merged, {})
        if budget.merged not in counts:
            alone.append(f"merged {budget.merged} cannot be met: {_say_counts(problem, budget.merged, counts)}")
        elif counts := _nearest_counts(problem, budget.merged, everything.bounds):
            together.append(f"within the other limits {_say_counts(problem, budget.merged, counts)}")
    for limit in budget.limits:
        bound = limit.bound(problem.original)
        is_time = limit.unit == "latency_ns"
        smallest = _attainable(problem, limit.unit, _Limits({}, None))
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


def _say_counts(problem: _Problem, asked: int, counts: Sequence[int]) -> str:
    if max(counts) < asked:
        return f"at most {max(counts)} of {len(problem.names)} blocks can be merged"
    return f"{' or '.join(map(str, counts))} blocks can be merged"


def _share(problem: _Problem, limit: Limit, value: int) -> str:
    """Return a cost in the terms of a limit: `0.74 (222.6 M of 300.8 M)`, rounded so that asking for it would do."""
    original = getattr(problem.original, limit.unit)
    amounts = f"{readable(value, limit.unit)} of {readable(original, limit.unit)}"
    if limit.key == "latency_ms":
        return f"{math.ceil(value / NS_PER_MS * 1e4) / 1e4:g} ({amounts})"
    if not limit.is_fraction:
        return f"{value} ({amounts})"
    return f"{math.ceil(value / original * 1000) / 1000:g} ({amounts})"
