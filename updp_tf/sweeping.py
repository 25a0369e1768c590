"""Plans for a range of budgets from one set of scores: a table, a plot, and the user picks."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from updp_tf.cost import FRACTIONS, NS_PER_MS, Budget
from updp_tf.errors import BudgetError
from updp_tf.planning import Plan
from updp_tf.pruning import Options, Scored, read_table, scored
from updp_tf.run_dir import write_atomically
from updp_tf.structure import Cost

if TYPE_CHECKING:
    from tflite_export import LatencyTable

DEFAULT_FRACTIONS = tuple(round(0.95 - 0.05 * step, 2) for step in range(14))
"""0.95 down to 0.3 of the original."""


@dataclass(frozen=True)
class SweepRow:
    """The best plan within one budget, or why there is none.

    Attributes:
        budget: as it was asked.
        plan: None where the budget cannot be met, or where an easier row has the same plan.
        cost: of the network with the plan; of the original where there is no plan.
        merged: how many blocks are merged.
        score: sum of the scores of its forms: the parts of the blocks' outputs that are lost.
        agreement: part of held-out calibration images that get the original's class; None where not measured.
        note: why there is no plan; empty where there is one.
    """

    budget: Mapping[str, float]
    plan: Plan | None
    cost: Cost
    merged: int
    score: float
    agreement: float | None
    note: str

    def as_json(self) -> dict[str, Any]:
        """Everything but the plan, flat, as plain data."""
        forms = "" if self.plan is None else " ".join(f"{edit.name}={edit.form}" for edit in self.plan.edits)
        asked = " ".join(f"{key}={value:g}" for key, value in self.budget.items())
        own = {"merged": self.merged, "score": round(self.score, 6), "agreement": self.agreement}
        return {"budget": asked, **own, **self.cost.as_json(), "forms": forms, "note": self.note}


@dataclass(frozen=True)
class Sweep:
    """Rows from the easiest budget to the hardest.

    Attributes:
        model: its name.
        rows: one for each budget.
        original: what the untouched network costs.
        measured_on: what the times were measured on, None where there is no latency table.
    """

    model: str
    rows: tuple[SweepRow, ...]
    original: Cost
    measured_on: str | None = None

    @property
    def plans(self) -> tuple[SweepRow, ...]:
        """The rows with a plan, each plan once."""
        return tuple(row for row in self.rows if row.plan is not None)

    def as_json(self) -> dict[str, Any]:
        """Everything but the plans as plain data."""
        return {
            "model": self.model,
            "measured_on": self.measured_on,
            "original": self.original.as_json(),
            "rows": [row.as_json() for row in self.rows],
        }

    def as_csv(self) -> str:
        """Return a CSV document, a line for each budget."""
        records = [row.as_json() for row in self.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue()

    def save_plans(self, folder: str | os.PathLike[str], *, force: bool = False) -> tuple[Path, ...]:
        """Write each plan as `plan-<blocks merged>-<number>.json`, to be merged with calibration images.

        Raises:
            OutputError: a file exists and `force` is False, or the folder does not.
        """
        paths = []
        for number, row in enumerate(self.plans):
            if row.plan is not None:
                paths.append(Path(folder) / f"plan-{number:02}-merged-{row.merged}.json")
                row.plan.save(paths[-1], force=force)
        return tuple(paths)

    def plot(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Draw what is kept against time where it was measured, else against MACs; the suffix says the format.

        Raises:
            OutputError: the file exists and `force` is False, or it cannot be written.
        """
        # no `pyplot`: it would choose a window system
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        kept = [1 - row.score / max(len(row.plan.edits), 1) if row.plan else 1.0 for row in self.plans]
        told = "mean explained part (R2) of the merged blocks' outputs"
        if all(row.agreement is not None for row in self.plans):
            kept = [row.agreement or 0.0 for row in self.plans]
            told = "held-out images with the original's class"
        places = [self._place(row.cost) for row in self.plans]
        axes.plot([self._place(self.original), *places], [1.0, *kept], marker="o", linewidth=1)
        for row, place, value in zip(self.plans, places, kept, strict=True):
            axes.annotate(str(row.merged), (place, value), textcoords="offset points", xytext=(4, 4), fontsize=8)
        on = f"\n{self.measured_on}" if self.measured_on else ""
        axes.set_xlabel(("predicted ms" if self.measured_on else "MACs (M), not a time") + on, fontsize=9)
        axes.set_ylabel(told, fontsize=9)
        axes.set_title(f"{self.model}: plans, with the number of merged blocks", fontsize=10)
        axes.grid(alpha=0.3)
        with write_atomically(path, force=force) as made:
            figure.savefig(made, format=Path(path).suffix.removeprefix(".") or "png", dpi=150)

    def _place(self, cost: Cost) -> float:
        return cost.latency_ns / NS_PER_MS if self.measured_on else cost.macs / 1e6

    def __str__(self) -> str:
        head = ("budget", "merged", "score", "agreement", "MACs (M)", "params", *self._times(None))
        rows = [head]
        for row in (SweepRow({}, None, self.original, 0, 0.0, None, ""), *self.rows):
            asked = " ".join(f"{key} {value:g}" for key, value in row.budget.items()) or "original"
            if row.note:
                rows.append((asked, *("-" for _ in head[1:])))
                continue
            agreement = "-" if row.agreement is None else f"{100 * row.agreement:.1f} %"
            told = (asked, str(row.merged), f"{row.score:.3f}", agreement, f"{row.cost.macs / 1e6:.1f}")
            rows.append((*told, f"{row.cost.params:,}", *self._times(row.cost)))
        widths = [max(len(line[column]) for line in rows) for column in range(len(head))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in rows
        ]
        notes = [
            f"{' '.join(f'{k} {v:g}' for k, v in row.budget.items())}: {row.note}" for row in self.rows if row.note
        ]
        return "\n".join([*lines, *notes, *([f"ms: predicted, {self.measured_on}"] if self.measured_on else [])])

    def _times(self, cost: Cost | None) -> tuple[str, ...]:
        if not self.measured_on:
            return ()
        return ("ms", "file bytes") if cost is None else (f"{cost.latency_ns / NS_PER_MS:.4g}", f"{cost.file_bytes:,}")


def sweep(
    model: Any,
    *,
    calibration: Any = None,
    budgets: Iterable[float] | Iterable[Mapping[str, float]] = DEFAULT_FRACTIONS,
    unit: str | None = None,
    agreement: bool = False,
    keep: Iterable[str] = (),
    forms: Sequence[str] | None = None,
    latency: LatencyTable | str | os.PathLike[str] | None = None,
    options: Options | None = None,
    verbose: bool = True,
) -> Sweep:
    """Return the best plan for each of several budgets, all from one set of scores.

    Args:
        model: as for `prune`.
        calibration: as for `prune`.
        budgets: fractions of the original in `unit`, or whole budgets as `prune` takes them.
        unit: of the fractions: "latency" with a table, else "macs", if None.
        agreement: merge every plan and measure how often it gives the original's class on held-out calibration images.
        keep: as for `prune`.
        forms: as for `prune`.
        latency: as for `prune`.
        options: as for `prune`.
        verbose: show progress on standard error.

    Raises:
        ModelError, CalibrationError: as `prune`.
        BudgetError: a malformed budget. One that cannot be met is a row that says so.

    Example:
        >>> plans = updp_tf.sweep(model, calibration=images, latency="phone.csv")  # doctest: +SKIP
        >>> print(plans)  # doctest: +SKIP
        >>> small = updp_tf.merge(model, plans.rows[3].plan, calibration=images)  # doctest: +SKIP
    """
    asked = _asked(budgets, unit or ("latency" if latency is not None else "macs"))
    table = read_table(latency)
    with scored(
        model,
        calibration=calibration,
        budget=Budget.parse(asked[0]),
        keep=keep,
        forms=forms,
        table=table,
        options=options,
        verbose=verbose,
    ) as found:
        rows: list[SweepRow] = []
        for budget in asked:
            rows.append(_row(found, budget, rows, agreement=agreement))
        measured_on = None if table is None else str(table.conditions)
        return Sweep(found.model.name, tuple(rows), found.blocks.network_cost, measured_on)


def _asked(budgets: Iterable[Any], unit: str) -> list[Mapping[str, float]]:
    if unit not in FRACTIONS:
        raise BudgetError(f"A sweep goes over fractions of {', '.join(FRACTIONS)}, not of {unit!r}.")
    asked = [one if isinstance(one, Mapping) else {unit: one} for one in budgets]
    if not asked:
        raise BudgetError("A sweep needs at least one budget.")
    for one in asked:
        Budget.parse(one)
    return asked


def _row(found: Scored, budget: Mapping[str, float], before: Sequence[SweepRow], *, agreement: bool) -> SweepRow:
    try:
        plan, solution = found.plan(budget)
    except BudgetError as error:
        return SweepRow(dict(budget), None, found.blocks.network_cost, 0, 0.0, None, str(error))
    twin = next((row for row in before if row.plan is not None and row.plan.edits == plan.edits), None)
    if twin is not None:
        note = f"the plan of {' '.join(f'{key} {value:g}' for key, value in twin.budget.items())} meets it, too"
        return SweepRow(dict(budget), None, solution.cost, solution.merged, solution.score, twin.agreement, note)
    measured = found.agreement(solution) if agreement else None
    return SweepRow(dict(budget), plan, solution.cost, solution.merged, solution.score, measured, "")
