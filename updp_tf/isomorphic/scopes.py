"""Which units go: ranked within classes of isomorphic groups, over all groups, or group by group."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from updp_tf.isomorphic.dependency import Group

Scope = Literal["isomorphic", "global", "local"]

SCOPES: tuple[Scope, ...] = ("isomorphic", "global", "local")


def scope_key(group: Group, scope: Scope) -> Hashable:
    """Groups with equal keys share one ranking; heads and head dimensions never share one with channels."""
    if scope == "isomorphic":
        return group.signature
    if scope == "global":
        return group.role if group.role in ("heads", "head dims", "value dims") else "channels"
    return group.name


def choose_units(
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    ratio: float,
    *,
    scope: Scope,
    round_to: int,
    counts: Mapping[str, int] | None = None,
    rates: Mapping[Hashable, float] | None = None,
) -> frozenset[int]:
    """Return the units that go where a part `ratio` of each scope's units is to go.

    Units go by score, ties by the order of groups and of the units in them. A group that has come down to its floor
    gives no more, and the others of its scope give what is missing; then each group is rounded to the nearest size
    whose channels are a multiple of `round_to` (upwards where two are as near), or to what it was.

    Args:
        groups: that may be cut.
        scores: of the units of each group, by its name.
        ratio: part of the units that goes, in [0, 1).
        scope: which groups share a ranking.
        round_to: channels that every group keeps a multiple of, and at least.
        counts: units that each group had before earlier steps, by name; those of `groups` where None.
        rates: what a score of 1 is worth in each scope, by `scope_key`: then all scopes give units by one ranking,
            and `ratio` is the part of all units. Where None, each scope gives the same part.
    """
    by_scope: dict[Hashable, list[Group]] = {}
    for group in groups:
        by_scope.setdefault(scope_key(group, scope), []).append(group)
    if rates is not None:
        scores = {group.name: scores[group.name] * rates[key] for key, members in by_scope.items() for group in members}
        by_scope = {None: list(groups)}
    cut: set[int] = set()
    for members in by_scope.values():
        before = sum((counts or {}).get(group.name, group.size) for group in members)
        gone = before - sum(group.size for group in members)
        wanted = max(int(ratio * before + 1e-9) - gone, 0)
        cells = [cell for group in members for cell in _cells(group, scores[group.name], round_to)]
        for cell, n in zip(cells, _counts(cells, wanted), strict=True):
            cut |= set(cell.units[: cell.rounded(n)])
    return frozenset(cut)


@dataclass(frozen=True, eq=False)
class _Cell:
    """Units that stand together everywhere, the least important first."""

    units: tuple[int, ...]
    scores: np.ndarray
    step: int

    @property
    def floor(self) -> int:
        """Units that are kept at least."""
        return min(len(self.units), self.step)

    def rounded(self, n: int) -> int:
        """The number of units nearest to `n` that may go."""
        keep = len(self.units) - n
        possible = {*range(self.step, len(self.units) + 1, self.step), len(self.units)}
        return len(self.units) - min(possible, key=lambda size: (abs(size - keep), -size))


def _cells(group: Group, scores: np.ndarray, round_to: int) -> list[_Cell]:
    found = []
    for number in range(int(group.cells.max()) + 1):
        inside = np.flatnonzero(group.cells == number)
        order = inside[np.argsort(scores[inside], kind="stable")]
        found.append(_Cell(tuple(group.units[i] for i in order.tolist()), scores[order], group.step(round_to)))
    return found


def _counts(cells: Sequence[_Cell], wanted: int) -> list[int]:
    """How many units of each cell go, before rounding."""
    values = np.concatenate([cell.scores for cell in cells])
    owner = np.repeat(np.arange(len(cells)), [len(cell.units) for cell in cells])
    taken = [0] * len(cells)
    for index in owner[np.argsort(values, kind="stable")].tolist():
        if wanted == 0:
            break
        if taken[index] < len(cells[index].units) - cells[index].floor:
            taken[index] += 1
            wanted -= 1
    return taken
