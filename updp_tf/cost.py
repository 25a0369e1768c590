"""Budgets, and sums of what networks, blocks and forms cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from updp_tf.errors import BudgetError
from updp_tf.structure import Cost

UNIT_NAMES = {"macs": "MACs", "params": "parameters", "activation_bytes": "bytes of activations"}
ADDITIVE_UNITS = ("macs", "params")  # the others take the maximum over the parts: see `Cost.__add__`
VALID_KEYS = (*UNIT_NAMES, *(f"{unit}_max" for unit in UNIT_NAMES), "merged")
# 0.29 * 100 is 28.999999999999996 in binary: without this a fraction could lose one unit
FRACTION_SLACK = 1e-12


@dataclass(frozen=True)
class Limit:
    """One entry of a budget: the unit, and the most there may be of it.

    Attributes:
        key: as the user wrote it, for instance `macs` or `macs_max`.
        value: a fraction of the original in (0, 1], or an absolute number where `key` ends in `_max`.
    """

    key: str
    value: float | int

    @property
    def unit(self) -> str:
        """Name of the attribute of `Cost` that is limited."""
        return self.key.removesuffix("_max")

    @property
    def is_fraction(self) -> bool:
        """True where `value` is a fraction of the original."""
        return self.key == self.unit

    def bound(self, original: Cost) -> int:
        """Return the most there may be, in whole units, where the untouched network costs `original`."""
        if not self.is_fraction:
            return int(self.value)
        return math.floor(self.value * getattr(original, self.unit) * (1 + FRACTION_SLACK))

    def __str__(self) -> str:
        return f"{self.key} {self.value}"


@dataclass(frozen=True)
class Budget:
    """What a plan may cost; every limit holds.

    Attributes:
        limits: on resources, in the order the user wrote them.
        merged: how many blocks are merged, exactly, or None for any number.
    """

    limits: tuple[Limit, ...] = ()
    merged: int | None = None

    @classmethod
    def parse(cls, asked: Mapping[str, Any] | Budget) -> Budget:
        """Return the budget that a mapping such as `{"macs": 0.7}` or `{"params_max": 200_000}` asks for.

        Args:
            asked: `macs`, `params`, `activation_bytes`: fraction of the original kept, in (0, 1]; `macs_max`,
                `params_max`, `activation_bytes_max`: whole numbers; `merged`: how many blocks, exactly.

        Raises:
            BudgetError: no mapping, an unknown key, or a value that does not fit its key.
        """
        if isinstance(asked, Budget):
            return asked
        if not isinstance(asked, Mapping):
            raise BudgetError(f'A budget is a mapping such as {{"macs": 0.7}}. Received: {asked!r}.')
        if not asked:
            raise BudgetError(f"The budget is empty: give at least one of {', '.join(VALID_KEYS)}.")
        limits, merged = [], None
        for key, value in asked.items():
            if key == "merged":
                merged = _whole_number(key, value, of="blocks")
            elif key in UNIT_NAMES:
                limits.append(Limit(key, _fraction(key, value)))
            elif key in VALID_KEYS:
                limits.append(Limit(key, _whole_number(key, value, of=UNIT_NAMES[key.removesuffix("_max")])))
            else:
                raise BudgetError(f"A budget cannot be in {key!r}: use {', '.join(VALID_KEYS)}.")
        return cls(tuple(limits), merged)

    @property
    def asked(self) -> dict[str, float | int]:
        """The mapping that `parse` reads back as this budget."""
        merged = {} if self.merged is None else {"merged": self.merged}
        return {limit.key: limit.value for limit in self.limits} | merged

    @property
    def unit(self) -> str:
        """The unit in which a form may not be dearer than its block: the first limited one, else `macs`."""
        return self.limits[0].unit if self.limits else "macs"

    def bounds(self, original: Cost) -> dict[str, int]:
        """Return the most there may be of every limited unit, where the untouched network costs `original`."""
        found: dict[str, int] = {}
        for limit in self.limits:
            found[limit.unit] = min(found.get(limit.unit, limit.bound(original)), limit.bound(original))
        return found

    def is_met(self, cost: Cost, original: Cost, *, merged: int) -> bool:
        """True where a network of this cost and number of merged blocks is within every limit."""
        within = all(getattr(cost, unit) <= bound for unit, bound in self.bounds(original).items())
        return within and self.merged in (None, merged)

    def __str__(self) -> str:
        return " and ".join(f"{key} {value}" for key, value in self.asked.items())


def total(parts: Iterable[Cost]) -> Cost:
    """Return what parts cost that run one after the other: MACs and parameters add up, memory takes the maximum."""
    return sum(parts, start=Cost())


def is_dearer(form_cost: Cost, block_cost: Cost, unit: str) -> bool:
    """True where a form costs more than the block it would replace, in one unit of `Cost`."""
    return bool(getattr(form_cost, unit) > getattr(block_cost, unit))


def readable(amount: int, unit: str) -> str:
    """Return an amount of a unit for people: `222.6 M` MACs or parameters, `1.2 MB` of activations."""
    suffix = "B" if unit.endswith("bytes") else ""
    for factor, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if amount >= factor:
            return f"{amount / factor:.1f} {prefix}{suffix}"
    return f"{amount} {suffix}".rstrip()


def _fraction(key: str, value: Any) -> float:
    if _is_number(value) and 0 < value <= 1:
        return float(value)
    hint = ""
    if _is_number(value) and value > 1:
        fraction = f"{value / 100:g}, or " if value <= 100 else ""
        hint = f' Did you mean {fraction}{{"{key}_max": {value}}}?'
    raise BudgetError(
        f"{key!r} is a fraction of the original to keep, above 0 and at most 1. Received: {value!r}.{hint}"
    )


def _whole_number(key: str, value: Any, *, of: str) -> int:
    if _is_number(value):
        if float(value).is_integer() and value >= 1:
            return int(value)
        unit = key.removesuffix("_max")
        hint = f' For a fraction use {{"{unit}": {value}}}.' if unit in UNIT_NAMES and 0 < value <= 1 else ""
    else:
        hint = ""
    raise BudgetError(f"{key!r} is a whole number of {of}, 1 or more. Received: {value!r}.{hint}")


def _is_number(value: Any) -> bool:
    """True for a finite Python or NumPy number; a bool is none."""
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False
