"""Budgets, and sums of what networks, blocks and forms cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from updp_tf.errors import BudgetError
from updp_tf.structure import Cost

FRACTIONS = {
    "macs": "macs",
    "params": "params",
    "activation_bytes": "activation_bytes",
    "latency": "latency_ns",
    "bytes": "file_bytes",
}
"""Keys of a budget that are fractions of the original, and the attribute of `Cost` that each limits."""
ABSOLUTES = {
    "macs_max": "macs",
    "params_max": "params",
    "activation_bytes_max": "activation_bytes",
    "latency_ms": "latency_ns",
    "bytes_max": "file_bytes",
}
"""Keys that are absolute."""
UNIT_NAMES = {
    "macs": "MACs",
    "params": "parameters",
    "activation_bytes": "bytes of activations",
    "latency_ns": "nanoseconds",
    "file_bytes": "bytes of the .tflite file",
}
TABLE_UNITS = ("latency_ns", "file_bytes")  # known only with a latency table
ADDITIVE_UNITS = ("macs", "params", *TABLE_UNITS)  # the others take the maximum over the parts: see `Cost.__add__`
VALID_KEYS = (*FRACTIONS, *ABSOLUTES, "merged")
NS_PER_MS = 10**6
# 0.29 * 100 is 28.999999999999996 in binary: without this a fraction could lose one unit
FRACTION_SLACK = 1e-12


@dataclass(frozen=True)
class Limit:
    """One entry of a budget: the unit, and the most there may be of it.

    Attributes:
        key: as the user wrote it, for instance `macs` or `macs_max`.
        value: a fraction of the original in (0, 1], or an absolute number where `key` is one of `ABSOLUTES`.
    """

    key: str
    value: float | int

    @property
    def unit(self) -> str:
        """Name of the attribute of `Cost` that is limited."""
        return FRACTIONS.get(self.key) or ABSOLUTES[self.key]

    @property
    def is_fraction(self) -> bool:
        """True where `value` is a fraction of the original."""
        return self.key in FRACTIONS

    def bound(self, original: Cost) -> int:
        """Return the most there may be, in whole units, where the untouched network costs `original`."""
        if self.key == "latency_ms":
            return math.floor(self.value * NS_PER_MS * (1 + FRACTION_SLACK))
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
            asked: `macs`, `params`, `activation_bytes`, `latency`, `bytes`: fraction of the original kept, in (0, 1];
                `macs_max`, `params_max`, `activation_bytes_max`, `bytes_max`: whole numbers; `latency_ms`:
                milliseconds; `merged`: how many blocks, exactly. Latency and bytes are those of a latency table.

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
            elif key in FRACTIONS:
                limits.append(Limit(key, _fraction(key, value)))
            elif key == "latency_ms":
                limits.append(Limit(key, _milliseconds(key, value)))
            elif key in ABSOLUTES:
                limits.append(Limit(key, _whole_number(key, value, of=UNIT_NAMES[ABSOLUTES[key]])))
            else:
                raise BudgetError(f"A budget cannot be in {key!r}: use {', '.join(VALID_KEYS)}.")
        return cls(tuple(limits), merged)

    @classmethod
    def absolute(cls, bounds: Mapping[str, int]) -> Budget:
        """Return the budget that allows so much of each unit of `Cost`, as `bounds` returns them."""
        keys = {unit: key for key, unit in ABSOLUTES.items()}
        return cls(
            tuple(
                Limit(keys[unit], bound / NS_PER_MS if unit == "latency_ns" else bound)
                for unit, bound in bounds.items()
            )
        )

    @property
    def asked(self) -> dict[str, float | int]:
        """The mapping that `parse` reads back as this budget."""
        merged = {} if self.merged is None else {"merged": self.merged}
        return {limit.key: limit.value for limit in self.limits} | merged

    @property
    def unit(self) -> str:
        """The unit in which a form may not be dearer than its block: the first limited one, else `macs`."""
        return self.limits[0].unit if self.limits else "macs"

    @property
    def needs_table(self) -> str | None:
        """The first key that only a latency table gives a meaning to, or None."""
        return next((limit.key for limit in self.limits if limit.unit in TABLE_UNITS), None)

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
    """True where a form costs more than the block it would replace, in one unit of `Cost` or in measured time.

    Time counts whatever the budget: who has measured does not want a form that is slower than what was there.
    """
    return bool(getattr(form_cost, unit) > getattr(block_cost, unit) or form_cost.latency_ns > block_cost.latency_ns)


def readable(amount: int, unit: str) -> str:
    """Return an amount of a unit for people: `222.6 M` MACs or parameters, `1.2 MB`, `3.14 ms`."""
    if unit == "latency_ns":
        return f"{amount / NS_PER_MS:.4g} ms"
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
        absolute = next(one for one, unit in ABSOLUTES.items() if unit == FRACTIONS[key])
        hint = f' Did you mean {fraction}{{"{absolute}": {value}}}?'
    raise BudgetError(
        f"{key!r} is a fraction of the original to keep, above 0 and at most 1. Received: {value!r}.{hint}"
    )


def _whole_number(key: str, value: Any, *, of: str) -> int:
    if _is_number(value):
        if float(value).is_integer() and value >= 1:
            return int(value)
        fraction = key.removesuffix("_max")
        hint = f' For a fraction use {{"{fraction}": {value}}}.' if fraction in FRACTIONS and 0 < value <= 1 else ""
    else:
        hint = ""
    raise BudgetError(f"{key!r} is a whole number of {of}, 1 or more. Received: {value!r}.{hint}")


def _milliseconds(key: str, value: Any) -> float:
    if _is_number(value) and value > 0:
        return float(value)
    raise BudgetError(f"{key!r} is a number of milliseconds above 0. Received: {value!r}.")


def _is_number(value: Any) -> bool:
    """True for a finite Python or NumPy number; a bool is none."""
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False
