"""The integer program behind a search, solved by HiGHS: each block covered at most once, costs within limits.

Minimising a sum of scores such that every block is covered by exactly one item (itself, one of its forms, or the
form of a span) and that costs stay within bounds is a set partitioning problem with knapsack rows; without spans it
is a multiple-choice knapsack. HiGHS solves it to a gap of zero.

The untouched block needs no variable: it is what is left where no chosen item covers it. So a variable per
candidate, at most one of them over each block, and rows in *differences* of cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from updp_tf.cost import ADDITIVE_UNITS, Budget, is_dearer, total
from updp_tf.errors import FormError
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
class Limits:
    """Bounds by unit, and the exact number of merged blocks or None."""

    bounds: Mapping[str, int]
    merged: int | None


@dataclass(frozen=True)
class Row:
    """`lower <= coefficients @ x <= upper` over whole numbers."""

    coefficients: np.ndarray
    lower: int | None
    upper: int | None

    def holds(self, picked: np.ndarray) -> bool:
        """True where a choice keeps to the row, in whole numbers."""
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
class Problem:
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
    def build(cls, candidates: Sequence[Candidate], blocks: Mapping[str, Cost], rest: Cost, budget: Budget) -> Problem:
        """Check and sort candidates; those dearer than what they replace are left out."""
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
        """Of the items."""
        return np.array([item.score for item in self.items], dtype=np.float64)

    @cached_property
    def counts(self) -> np.ndarray:
        """How many blocks each item replaces."""
        return np.array([len(item.blocks) for item in self.items], dtype=np.int64)

    def differences(self, unit: str) -> np.ndarray:
        """What picking each item adds to the whole network, in an additive unit."""
        kept = [sum(getattr(self.blocks[index], unit) for index in covered) for covered in self.members]
        mine = [getattr(item.cost, unit) for item in self.items]
        return np.array(mine, dtype=np.int64) - np.array(kept, dtype=np.int64)

    def budget_bounds(self, budget: Budget) -> dict[str, int]:
        """Return the largest cost that a budget allows, by unit."""
        return budget.bounds(self.original)

    def solution(self, picked: np.ndarray) -> Solution:
        """Return what a choice of positions is, with the cost of the whole network."""
        chosen = tuple(self.items[index] for index in picked)
        covered = {name for item in chosen for name in item.blocks}
        kept = (cost for name, cost in zip(self.names, self.blocks, strict=True) if name not in covered)
        cost = total((self.rest, *kept, *(item.cost for item in chosen)))
        return Solution(chosen, math.fsum(item.score for item in chosen), cost, len(covered))


@dataclass(frozen=True)
class System:
    """A problem under limits, as rows over one 0/1 variable per item.

    Attributes:
        problem: what to choose from.
        rows: besides the rule that a block is covered at most once.
        allowed: which items may be picked at all.
        forced: which blocks must be covered, because kept they break a limit that is a maximum over the parts.
        possible: False where what lies outside the blocks breaks a limit by itself.
        limits: that it was built from.
    """

    problem: Problem
    rows: tuple[Row | _ScoreRow, ...]
    allowed: np.ndarray
    forced: np.ndarray
    possible: bool
    limits: Limits

    @classmethod
    def build(cls, problem: Problem, limits: Limits) -> System:
        """Write limits as rows, and as what must and must not be picked."""
        rows: list[Row] = []
        allowed = np.ones(len(problem.items), dtype=bool)
        forced = np.zeros(len(problem.names), dtype=bool)
        possible = True
        for unit, bound in limits.bounds.items():
            if unit in ADDITIVE_UNITS:
                rows.append(Row(problem.differences(unit), None, bound - getattr(problem.original, unit)))
            else:
                allowed &= np.array([getattr(item.cost, unit) <= bound for item in problem.items], dtype=bool)
                forced |= np.array([getattr(cost, unit) > bound for cost in problem.blocks], dtype=bool)
                possible &= getattr(problem.rest, unit) <= bound
        if limits.merged is not None:
            rows.append(Row(problem.counts, limits.merged, limits.merged))
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
    ) -> tuple[np.ndarray | None, System]:
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

    def _within(self, margin: float, reduced: np.ndarray, uncovered: np.ndarray) -> System:
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


def pick(problem: Problem, limits: Limits) -> np.ndarray | None:
    """Return the best items, ties broken in stages: each stage keeps what the stages before it reached."""
    if not problem.items:
        return System.build(problem, limits).minimise(problem.scores)
    slack = SCORE_TIE * float(np.abs(problem.scores).max())
    picked, system = System.build(problem, limits).core(problem.scores, slack=slack)
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
        system = replace(system, rows=(*system.rows, Row(objective, None, int(objective[picked].sum()))))
    return picked
