"""Which blend a training step has: 1 is the network as it was, 0 its linear, mergeable form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from updp_tf.errors import ScheduleError

Shape = Literal["cosine", "linear"]
Order = Literal["together", "front_to_back", "back_to_front"]


@dataclass(frozen=True)
class Schedule:
    """How blends go from 1 to 0 over the steps of a training.

    Attributes:
        total_steps: of the whole training; filled in by the `BlendSchedule` callback where None.
        until: part of the training at the end of which every blend is 0; the rest trains the linear network. 0 is
            "at once", which is direct removal.
        shape: `cosine` or `linear`.
        order: all blocks `together`, or one after the other, `front_to_back` or `back_to_front`, each in an equal share
            of the time.

    Raises:
        ScheduleError: a value that makes no schedule.

    Source: METHOD section 3; UPDP (arXiv 2401.06426) publishes no formula, so the curves are this package's choice.

    Example:
        >>> schedule = Schedule(total_steps=100, until=0.5, shape="linear")
        >>> [schedule.blend(step) for step in (0, 25, 50, 99)]
        [1.0, 0.5, 0.0, 0.0]
    """

    total_steps: int | None = None
    until: float = 0.5
    shape: Shape = "cosine"
    order: Order = "together"

    def __post_init__(self) -> None:
        if self.total_steps is not None and self.total_steps < 1:
            raise ScheduleError(f"A schedule has one step or more. Received: total_steps={self.total_steps}")
        if not 0 <= self.until <= 1:
            raise ScheduleError(f"`until` is a part of the training, from 0 to 1. Received: {self.until}")
        if self.shape not in ("cosine", "linear"):
            raise ScheduleError(f"The shape is 'cosine' or 'linear'. Received: {self.shape!r}")
        if self.order not in ("together", "front_to_back", "back_to_front"):
            raise ScheduleError(
                f"The order is 'together', 'front_to_back' or 'back_to_front'. Received: {self.order!r}"
            )

    def window(self, index: int = 0, n: int = 1) -> tuple[float, float]:
        """Return where block `index` of `n` begins and ends to change, as parts of the training."""
        if self.order == "together":
            return 0.0, self.until
        place = index if self.order == "front_to_back" else n - 1 - index
        return self.until * place / n, self.until * (place + 1) / n

    def blend(self, step: int, index: int = 0, n: int = 1) -> float:
        """Return the blend that training step `step` (from 0) uses in block `index` of `n`."""
        if self.total_steps is None:
            raise ScheduleError("The schedule has no total_steps, so no step has a blend.")
        begin, end = steps_of(self.window(index, n), self.total_steps)
        return curve(step, begin, end, self.shape)


def steps_of(window: tuple[float, float], total_steps: int) -> tuple[int, int]:
    """Return a window in parts of the training as whole steps."""
    return round(window[0] * total_steps), round(window[1] * total_steps)


def curve(step: int, begin: int, end: int, shape: Shape) -> float:
    """Return 1 up to step `begin`, 0 from step `end` on, and the shape between."""
    if step >= end:
        return 0.0
    done = max(step - begin, 0) / max(end - begin, 1)
    return 1.0 - done if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
