"""What was done to a model on its way into a file: one record for each step, printed as one line."""

from dataclasses import dataclass
from typing import Any

_SHOWN = 3


@dataclass(frozen=True)
class Step:
    """One named step, done before, in or after the conversion.

    Attributes:
        name: of the step.
        done: names of the layers it changed, in order.
        refused: layers that looked right for it and stay as they are, each with the reason.
        detail: what it measured, in words; empty where there is nothing to tell.
    """

    name: str
    done: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    detail: str = ""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Step":
        """Return the record that `dataclasses.asdict` and JSON have turned into lists."""
        refused = tuple((site, reason) for site, reason in data["refused"])
        return cls(data["name"], tuple(data["done"]), refused, data["detail"])

    def __str__(self) -> str:
        parts = [f"{len(self.done)} {'place' if len(self.done) == 1 else 'places'}"] if self.done else []
        parts += [self.detail] if self.detail else []
        parts += [f"'{site}' stays: {reason}" for site, reason in self.refused[:_SHOWN]]
        parts += [f"{len(self.refused) - _SHOWN} more stay"] if len(self.refused) > _SHOWN else []
        return f"{self.name}: {'; '.join(parts)}"
