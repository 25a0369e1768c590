"""How a rule about channels is written: what it sees of a call, and what it says.

A rule says which labels stand on the axes of what a call writes, given those on the axes of what it reads, and ties
the axes of the layer's weights to them. A second, smaller function says which configuration entries and arguments
change when axes get shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from updp_tf.isomorphic.units import Labels, Units
from updp_tf.structure import Node, Shape

Axes = tuple[Labels | None, ...]
"""Labels of every axis of a tensor, batch first; None for an axis that is never cut."""


class NotCovered(Exception):
    """A call whose rule does not cover this configuration; the message is the reason. Never leaves this package."""


class Ledger(Protocol):
    """Where rules write which axes of which weights carry which labels; `dependency` has the one there is."""

    units: Units

    def tie(
        self, node: Node, role: str, variable: Any, axis: int, labels: Labels | None, *, fresh: bool, scored: bool
    ) -> Labels | None:
        """Tie an axis of a variable to labels, and return those that stand for it now."""


@dataclass(frozen=True, eq=False)
class Site:
    """One call, as a rule sees it.

    Attributes:
        node: the call.
        shapes: of the tensors it reads, batch axis first.
        axes: labels of those tensors.
        ledger: where the axes of weights are tied to labels.
    """

    node: Node
    shapes: tuple[Shape, ...]
    axes: tuple[Axes, ...]
    ledger: Ledger

    @property
    def layer(self) -> Any:
        """The Keras layer or operation."""
        return self.node.layer

    @property
    def units(self) -> Units:
        """All units of the network."""
        return self.ledger.units

    def last(self, number: int = 0) -> Labels | None:
        """Labels of the last axis of a tensor that is read."""
        return self.axes[number][-1]

    def reads(self, variable: Any, axis: int, labels: Labels | None, *, role: str = "in") -> None:
        """Say that an axis of a weight is summed over channels that are read."""
        self.ledger.tie(self.node, role, variable, axis, labels, fresh=False, scored=True)

    def writes(self, variable: Any, axis: int, *, role: str = "out") -> Labels | None:
        """Say that an axis of a weight makes channels of its own, and return their labels."""
        return self.ledger.tie(self.node, role, variable, axis, None, fresh=True, scored=True)

    def follows(
        self, variable: Any, axis: int, labels: Labels | None, *, role: str = "through", scored: bool = False
    ) -> None:
        """Say that an axis of a weight has one index per channel that passes."""
        if variable is not None:
            self.ledger.tie(self.node, role, variable, axis, labels, fresh=False, scored=scored)

    def only_last(self, number: int = 0) -> Labels | None:
        """Labels of the last axis of a tensor; those of all other axes are fixed."""
        *others, last = self.axes[number]
        for labels in others:
            self.fix(labels, "is read by a layer that works along this axis")
        return last

    def fix(self, labels: Labels | None, reason: str) -> None:
        """Say that channels are never cut."""
        if labels is not None:
            self.units.fix(labels, f"'{self.node.name}' ({self.node.kind}) {reason}")

    def equal_parts(self, labels: Labels | None, n: int) -> Labels | None:
        """Tie the same places of `n` equal parts of an axis together, and return the labels of one part."""
        if labels is None:
            return None
        parts = labels.reshape(n, -1)
        self.units.unite(parts, parts[:1])
        return parts[0]


@dataclass(frozen=True, eq=False)
class Resized:
    """What changes in a call when axes get shorter.

    Attributes:
        config: entries of the layer's configuration.
        args: positional arguments, where they change.
        scaled: factors that some variables are multiplied with, by index in the layer's variables.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] | None = None
    scaled: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Cut:
    """One call and which indices of every axis are kept.

    Attributes:
        node: the call.
        kept: of every axis of every tensor that is read: a mask, or None where all are kept.
        written: the same of what is written.
        shapes: new shapes of what is written.
        masks: which indices of a variable's axis are kept, by (index in the layer's variables, axis).
    """

    node: Node
    kept: tuple[tuple[np.ndarray | None, ...], ...]
    written: tuple[tuple[np.ndarray | None, ...], ...]
    shapes: tuple[Shape, ...]
    masks: Mapping[tuple[int, int], np.ndarray]

    @property
    def layer(self) -> Any:
        """The Keras layer or operation, as it was."""
        return self.node.layer

    def size(self, variable: Any, axis: int) -> int:
        """New size of an axis of a variable."""
        index = variable_index(self.layer, variable)
        axis %= len(variable.shape)
        mask = self.masks.get((index, axis))
        return int(variable.shape[axis] if mask is None else mask.sum())


@dataclass(frozen=True)
class Coupling:
    """The rule of one kind of call.

    Attributes:
        connect: returns the labels of every tensor that the call writes, and ties weights on the way.
        resize: returns what changes in the call when axes get shorter; nothing by default.
    """

    connect: Callable[[Site], Sequence[Axes]]
    resize: Callable[[Cut], Resized] = lambda cut: Resized()


def per_channel(*variables: str, scored: Sequence[str] = (), config: Sequence[str] = (), axis: int = -1) -> Coupling:
    """Return the rule of a layer that treats every channel alone.

    Args:
        variables: attributes of the layer that hold weights whose last axis has one index per channel; those that are
            None are left out.
        scored: of these, the ones that count for the importance of a channel.
        config: entries of the layer's configuration that hold the number of channels.
        axis: of the channels in what is read and written.
    """

    def connect(site: Site) -> Sequence[Axes]:
        for name in variables:
            site.follows(getattr(site.layer, name, None), -1, site.axes[0][axis], scored=name in scored)
        return (site.axes[0],)

    def resize(cut: Cut) -> Resized:
        return Resized({name: cut.shapes[0][axis] for name in config})

    return Coupling(connect, resize)


def variable_index(layer: Any, variable: Any) -> int:
    """Place of a variable among a layer's variables."""
    for index, one in enumerate(layer.variables):
        if one is variable:
            return index
    raise NotCovered(f"holds a weight '{getattr(variable, 'path', variable)}' that is none of its variables")


def variable_named(layer: Any, ending: str) -> Any | None:
    """The variable of a layer whose path ends so, or None."""
    return next((one for one in layer.variables if one.path.endswith("/" + ending)), None)


def follows_elementwise(site: Site) -> Sequence[Axes]:
    """Every channel passes as it is."""
    return (site.axes[0],)


ELEMENTWISE = Coupling(follows_elementwise)
"""The rule of a layer without weights that treats every number alone."""

ALONG_CHANNELS = frozenset({"softmax", "log_softmax", "sparsemax", "glu"})
"""Activations that mix channels."""


def function_name(function: Any) -> str:
    """Name of an activation function or layer."""
    return getattr(function, "__name__", type(function).__name__.lower())
