"""Units: what has to be cut together, as numbers written on the axes of tensors and weights.

Every axis that may be cut carries an array of *labels*, one per index; an axis without labels (`None`) is never cut.
Rules say which labels are equal; equal labels form a *unit*. So an index map is written down by slicing, tiling or
concatenating arrays, and is exact by construction.

A label may be a *product* of others: where two axes (heads and their dimensions) are flattened into one, an index of
that one is kept while both of its factors are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Labels = np.ndarray
"""Labels of one axis, shape (size of the axis,), whole numbers."""


class Units:
    """Labels, which of them are equal, and which are fixed; a union-find that rules write to."""

    def __init__(self) -> None:
        self._parent = np.zeros(0, dtype=np.int64)
        self._n = 0
        self._factors: dict[int, tuple[int, ...]] = {}
        self._reasons: dict[int, str] = {}
        self._streams: set[int] = set()
        self._last_cut: frozenset[int] | None = None
        self._last_gone = np.zeros(0, dtype=bool)

    def fresh(self, n: int) -> Labels:
        """Return labels that are equal to no others."""
        if self._n + n > len(self._parent):
            grown = np.arange(max(2 * len(self._parent), self._n + n, 1024), dtype=np.int64)
            grown[: self._n] = self._parent[: self._n]
            self._parent = grown
        labels = np.arange(self._n, self._n + n, dtype=np.int64)
        self._parent[self._n : self._n + n] = labels
        self._n += n
        return labels

    def find(self, labels: Labels) -> Labels:
        """Return the unit of each label: the label that stands for all that are equal to it."""
        roots = self._parent[labels]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[labels] = roots
        return roots

    def unite(self, first: Labels, second: Labels) -> None:
        """Make labels equal, index by index; the shapes broadcast."""
        a, b = np.broadcast_arrays(self.find(first), self.find(second))
        pairs = np.unique(np.stack([a[a != b], b[a != b]]), axis=1)
        for one, other in pairs.T:
            self._unite(int(one), int(other))

    def _unite(self, first: int, second: int) -> None:
        first, second = (int(self.find(np.array([label]))[0]) for label in (first, second))
        if first == second:
            return
        root, gone = min(first, second), max(first, second)
        self._parent[gone] = root
        if gone in self._streams:
            self._streams.add(root)
        if gone in self._reasons:
            self._reasons.setdefault(root, self._reasons[gone])
        theirs, ours = self._factors.pop(gone, None), self._factors.get(root)
        if theirs is not None and ours is None:
            self._factors[root] = theirs
        elif theirs is not None and ours is not None:
            if len(theirs) == len(ours):
                for one, other in zip(theirs, ours, strict=True):
                    self._unite(one, other)
            else:
                self.fix(np.array([root, *theirs]), "its axis is divided in two different ways")
        if root in self._factors:
            self._spread(root)

    def _spread(self, root: int) -> None:
        """Tell the factors of a product what is true of it."""
        factors = np.array(self._factors[root])
        if root in self._reasons:
            self.fix(factors, self._reasons[root])
        if root in self._streams:
            self.mark_stream(factors)

    def fix(self, labels: Labels, reason: str) -> None:
        """Say that indices with these labels are never cut, and why."""
        for root in np.unique(self.find(labels)).tolist():
            if root not in self._reasons:
                self._reasons[root] = reason
                if root in self._factors:
                    self._spread(root)

    def mark_stream(self, labels: Labels) -> None:
        """Say that these units are summed into a residual stream."""
        for root in np.unique(self.find(labels)).tolist():
            if root not in self._streams:
                self._streams.add(root)
                if root in self._factors:
                    self._spread(root)

    def product(self, axes: Sequence[Labels]) -> Labels:
        """Return labels of axes flattened into one, the last running fastest."""
        grid = np.stack([one.ravel() for one in np.meshgrid(*axes, indexing="ij")], axis=1)
        labels = self.fresh(len(grid))
        for label, factors in zip(labels.tolist(), grid.tolist(), strict=True):
            self._factors[label] = tuple(factors)
        return labels

    def divide(self, labels: Labels) -> tuple[tuple[Labels, ...], bool] | None:
        """Return labels of the axes that one axis is reshaped to; None where its units are no grid.

        Args:
            labels: of shape (size of each new axis, ...); at least two axes.

        Returns:
            Labels of each new axis, and whether they are new.
        """
        roots = self.find(labels)
        known = [self._factors.get(root) for root in roots.ravel().tolist()]
        if all(factors is None for factors in known) and len(np.unique(roots)) == roots.size:
            axes = tuple(self.fresh(n) for n in roots.shape)
            grid = np.stack([one.ravel() for one in np.meshgrid(*axes, indexing="ij")], axis=1)
            for root, factors in zip(roots.ravel().tolist(), grid.tolist(), strict=True):
                self._factors[root] = tuple(factors)
                self._spread(root)
            return axes, True
        if any(factors is None or len(factors) != roots.ndim for factors in known):
            return None
        table = self.find(np.array(known, dtype=np.int64)).reshape(*roots.shape, roots.ndim)
        axes = tuple(along_only(table[..., axis], axis) for axis in range(roots.ndim))  # type: ignore[misc]
        return None if any(one is None for one in axes) else (axes, False)

    def atoms(self, labels: Labels) -> Labels:
        """Return the units that are no products and that these labels are made of, in order, each once."""
        found: dict[int, None] = {}
        stack = list(reversed(self.find(labels).tolist()))
        while stack:
            root = stack.pop()
            if root in self._factors:
                stack += reversed(self.find(np.array(self._factors[root])).tolist())
            else:
                found[root] = None
        return np.array(list(found), dtype=np.int64)

    def parts(self, labels: Labels) -> list[Labels]:
        """Return the units that each index of an axis is made of: one array, or one per factor and deeper."""
        roots = self.find(labels)
        known = [self._factors.get(root) for root in roots.tolist()] if self._factors else []
        depth = max((len(factors) for factors in known if factors is not None), default=0)
        if depth == 0:
            return [roots]
        found = []
        for position in range(depth):
            one = [(factors or (root,) * depth)[position] for root, factors in zip(roots.tolist(), known, strict=True)]
            found += self.parts(np.array(one, dtype=np.int64))
        return found

    @property
    def n(self) -> int:
        """How many labels there are."""
        return self._n

    def factors_of(self, label: int) -> tuple[int, ...] | None:
        """The factors of a label that is a product."""
        return self._factors.get(int(self.find(np.array([label]))[0]))

    def reason(self, unit: int) -> str | None:
        """Why a unit is never cut, or None."""
        return self._reasons.get(unit)

    def is_stream(self, unit: int) -> bool:
        """True where the unit is summed into a residual stream."""
        return unit in self._streams

    def kept(self, labels: Labels, cut: frozenset[int]) -> Labels:
        """Return which indices of an axis are kept, shape as `labels`, where some units are cut."""
        roots = self.find(labels)
        kept = ~self._gone(cut)[roots]
        if self._factors:
            for root in np.unique(roots).tolist():
                if root in self._factors:
                    kept[roots == root] = self._is_kept(root, cut)
        return kept

    def _gone(self, cut: frozenset[int]) -> np.ndarray:
        """Which of all labels are cut: asked for every axis of a network, made once."""
        if self._last_cut is not cut:
            self._last_cut = cut
            self._last_gone = np.zeros(self._n, dtype=bool)
            self._last_gone[list(cut)] = True
        return self._last_gone

    def _is_kept(self, root: int, cut: frozenset[int]) -> bool:
        if root in self._factors:
            return all(self._is_kept(one, cut) for one in self.find(np.array(self._factors[root])).tolist())
        return root not in cut


def along_only(labels: Labels, axis: int) -> Labels | None:
    """Return the labels along one axis of a grid, None if they change along another axis as well."""
    line = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
    return line[:, 0] if (line == line[:, :1]).all() else None


def joined(parts: Iterable[Labels]) -> Labels:
    """Labels of axes laid end to end."""
    return np.concatenate(list(parts))
