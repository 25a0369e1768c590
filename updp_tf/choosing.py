"""Ways to search: which of the choices that are within a budget is taken.

All look in the same `Space` and, but for the first, compare choices by what a judge measures of them on images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from updp_tf.errors import BudgetError, CalibrationError
from updp_tf.evolving import Genetic, evolve
from updp_tf.learning import Learned
from updp_tf.partitioning import Solution
from updp_tf.searching import Measured, SearchReport, Space
from updp_tf.structure import Candidate
from updp_tf.walking import Progress


class Measures(Protocol):
    """What measures a choice of forms; `judging.Judge` does it on calibration images."""

    n_images: int

    @property
    def measure(self) -> str:
        """What `loss` returns, in a word or two."""

    def loss(self, chosen: tuple[Candidate, ...]) -> float:
        """Return how much is lost by some forms together, lower is better."""


@dataclass(frozen=True)
class Additive:
    """The smallest sum of scores: one question to the solver, and nothing measured."""

    name = "additive"
    measures = False


@dataclass(frozen=True)
class Exact:
    """The choices with the smallest sums of scores, measured; then swaps, as long as one of them is better.

    Attributes:
        plans: how many of the smallest sums are measured.
        swaps: how many choices are measured besides, at most: each differs from the best so far in one form or one
            block, those with the smallest sums first.
    """

    plans: int = 8
    swaps: int = 32
    name = "exact"
    measures = True

    def __post_init__(self) -> None:
        _require_at_least(1, plans=self.plans)
        _require_at_least(0, swaps=self.swaps)


@dataclass(frozen=True)
class Random:
    """The best of some random choices, which know no score; with one, nothing is measured.

    Attributes:
        n: how many.
        seed: of the draw.
    """

    n: int = 1
    seed: int = 0
    name = "random"

    def __post_init__(self) -> None:
        _require_at_least(1, n=self.n)

    @property
    def measures(self) -> bool:
        """True where there is something to compare."""
        return self.n > 1


@dataclass(frozen=True)
class Uniform:
    """The fewest blocks that do, spread evenly over the depth, each in the form of the smallest score."""

    name = "uniform"
    measures = False


Method = Additive | Exact | Random | Uniform | Genetic | Learned

METHODS: dict[str, type[Method]] = {one.name: one for one in (Additive, Exact, Random, Uniform, Genetic, Learned)}


def method_of(asked: str | Method) -> Method:
    """Return a method by its name, with its defaults, or as it is.

    Raises:
        BudgetError: no method has that name.
    """
    if not isinstance(asked, str):
        return asked
    if asked not in METHODS:
        raise BudgetError(f"No way to search is named '{asked}'; there are: {', '.join(METHODS)}.")
    return METHODS[asked]()


def choose(
    space: Space,
    method: Method,
    judge: Measures | None,
    progress: Progress | None = None,
    learned: Callable[[Space, Learned], Mapping[str, float]] | None = None,
) -> tuple[Solution, SearchReport]:
    """Return the choice that a method takes, and what it looked at; deterministic for equal arguments.

    Args:
        space: of the choices within the budget.
        method: how to search.
        judge: measures choices; None where nothing can be measured: then sums of scores decide.
        progress: called after each measured choice.
        learned: learns scores for the items of a space; None where there is nothing to learn from.

    Raises:
        BudgetError: `uniform` finds no evenly spread blocks within the budget.
        CalibrationError: a genetic or learned search, and no images.
        RunError: the storage of a genetic search holds a study of other plans.
    """
    if isinstance(method, Uniform):
        return space.uniform(), SearchReport(method.name)
    if isinstance(method, Additive):
        return space.solution, SearchReport(method.name)
    if isinstance(method, Random):
        rng = np.random.default_rng(method.seed)
        drawn = [space.random(rng) for _ in range(method.n)]
        if judge is None or method.n == 1:
            return min(drawn, key=lambda one: one.score), SearchReport(method.name)
        tally = _Tally(judge, progress, method.n)
        return tally.best_of(drawn), tally.report(method.name)
    if isinstance(method, Learned):
        if judge is None or learned is None:
            raise CalibrationError("A learned search trains on calibration images: give some.")
        tally = _Tally(judge, progress, 1)
        found = space.smallest(learned(space, method))
        tally.loss(found)
        return found, tally.report(method.name)
    if judge is None:
        if isinstance(method, Genetic):
            raise CalibrationError("A genetic search measures plans: give calibration images.")
        return space.solution, SearchReport(method.name)
    if isinstance(method, Genetic):
        tally = _Tally(judge, progress, method.trials)
        return evolve(space, method, tally.loss, tally.know), tally.report(method.name)
    tally = _Tally(judge, progress, method.plans + method.swaps)
    best = tally.best_of(space.best(method.plans))
    while (better := tally.better_one(space.swaps(best), best)) is not None:
        best = better
    return best, tally.report(method.name)


class _Tally:
    """Measures each choice once, up to a number of them."""

    def __init__(self, judge: Measures, progress: Progress | None, most: int) -> None:
        self._judge, self._progress, self._most = judge, progress, most
        self._measured: dict[tuple[str, ...], Measured] = {}

    def loss(self, one: Solution) -> float:
        key = tuple(item.key for item in one.chosen)
        if key not in self._measured:
            self._measured[key] = Measured(one, _or_worst(self._judge.loss(one.chosen)))
            if self._progress is not None:
                self._progress(len(self._measured), self._most, "measure plans")
        return self._measured[key].loss

    def know(self, one: Solution, loss: float) -> None:
        """Take over what was measured before."""
        self._measured.setdefault(tuple(item.key for item in one.chosen), Measured(one, loss))

    def best_of(self, solutions: Iterable[Solution]) -> Solution:
        return min(solutions, key=self.loss)

    def better_one(self, solutions: Iterator[Solution], than: Solution) -> Solution | None:
        """Return the first choice that is better, None where there is none or enough were measured."""
        best = self.loss(than)
        for one in solutions:
            if len(self._measured) >= self._most:
                return None
            if self.loss(one) < best:
                return one
        return None

    def report(self, method: str) -> SearchReport:
        measured = tuple(self._measured.values())
        best = min(range(len(measured)), key=lambda index: measured[index].loss)
        return SearchReport(method, self._judge.measure, self._judge.n_images, measured, best)


def _or_worst(loss: float) -> float:
    """A network that writes NaN has lost everything."""
    return loss if np.isfinite(loss) else float("inf")


def _require_at_least(least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BudgetError(f"'{name}' of a search is a whole number, {least} or more. Received: {value!r}.")
