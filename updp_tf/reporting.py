"""What was done to a model, for people and for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import dacite

from updp_tf.blocks import Blocks, network_cost, prepared_graph
from updp_tf.cost import TABLE_UNITS, readable
from updp_tf.merging import MergedBlock
from updp_tf.planning import Plan
from updp_tf.searching import SearchReport
from updp_tf.structure import Candidate, Cost, Refusal


@dataclass(frozen=True)
class ScoredForm:
    """One form that a block could have taken.

    Attributes:
        form: its name; of a span also how many blocks it would replace.
        score: what it was expected to cost in accuracy.
        r2: explained part of the block's output, None where nothing was measured.
        cost: in the block's place.
    """

    form: str
    score: float
    r2: float | None
    cost: Cost


@dataclass(frozen=True)
class ScoredBlock:
    """A block of the original network, and what it could have become.

    Attributes:
        name: of the block.
        entry_shape: of what it reads, without the batch axis.
        exit_shape: of what it writes, without the batch axis.
        skip: `none`, `identity` or `projection`.
        cost: of the block as it is.
        forms: that were scored, spans under their first block.
    """

    name: str
    entry_shape: tuple[int | None, ...]
    exit_shape: tuple[int | None, ...]
    skip: str
    cost: Cost
    forms: tuple[ScoredForm, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data, costs among the other fields."""
        forms = [{"form": one.form, "score": one.score, "r2": one.r2, **one.cost.as_json()} for one in self.forms]
        shapes = {"entry_shape": list(self.entry_shape), "exit_shape": list(self.exit_shape)}
        return {"name": self.name, **shapes, "skip": self.skip, **self.cost.as_json(), "forms": forms}


def scored_blocks(blocks: Blocks, candidates: Iterable[Candidate]) -> tuple[ScoredBlock, ...]:
    """Return every block with the forms that were scored for it."""
    forms: dict[str, list[ScoredForm]] = {block.name: [] for block in blocks}
    for one in candidates:
        name = one.form if len(one.blocks) == 1 else f"{one.form} for {len(one.blocks)} blocks"
        forms[one.blocks[0]].append(ScoredForm(name, one.score, one.r2, one.cost))
    return tuple(
        ScoredBlock(
            block.name,
            block.entry_shape[1:],
            block.exit_shape[1:],
            block.skip_kind,
            block.cost,
            tuple(forms[block.name]),
        )
        for block in blocks
    )


@dataclass(frozen=True)
class NarrowedGroup:
    """What became of one group of channels.

    Attributes:
        name: of the layer that makes them.
        members: kinds and roles of the layers that go together.
        before: units it had.
        after: units it has.
    """

    name: str
    members: str
    before: int
    after: int


@dataclass(frozen=True, eq=False)
class NarrowingReport:
    """What `narrow` did.

    Attributes:
        ratio: part of each scope's units that was asked to go.
        scope: which groups shared a ranking.
        importance: what ranked them.
        groups: that could be cut, in topological order.
        kept: what could not be cut, and why.
        before: cost of the original.
        after: cost of the narrowed network.
        refitted: layers that were refitted, with the ridge that held-out images chose.
    """

    ratio: float
    scope: str
    importance: str
    groups: tuple[NarrowedGroup, ...]
    kept: tuple[Refusal, ...]
    before: Cost
    after: Cost
    refitted: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "ratio": self.ratio,
            "scope": self.scope,
            "importance": self.importance,
            "groups": [asdict(group) for group in self.groups],
            "kept": [asdict(refusal) for refusal in self.kept],
            "before": self.before.as_json(),
            "after": self.after.as_json(),
            "refitted": dict(self.refitted),
        }

    def __str__(self) -> str:
        changed = [group for group in self.groups if group.after < group.before]
        lines = [
            f"{len(changed)} of {len(self.groups)} groups narrowed ({self.importance}, {self.scope}, "
            f"ratio {self.ratio:.3f}): MACs {readable(self.before.macs, 'macs')} -> "
            f"{readable(self.after.macs, 'macs')}, parameters {self.before.params:,} -> {self.after.params:,}",
            *(
                f"  measured: {unit.replace('_', ' ')} {readable(getattr(self.before, unit), unit)} -> "
                f"{readable(getattr(self.after, unit), unit)}"
                for unit in TABLE_UNITS
                if getattr(self.before, unit)
            ),
            *(f"  {group.name}: {group.before} -> {group.after}" for group in changed),
            *(f"  kept  {refusal}" for refusal in self.kept),
        ]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class PruningReport:
    """What `prune` did; hangs on the model it returns as `model.pruning`.

    Attributes:
        plan: the edits.
        blocks: what became of each merged block.
        before: cost of the original.
        after: cost of the pruned model.
        agreement: part of held-out calibration images on which both give the same class, None where not measured.
        refitted: kept layers that were refitted, with the ridge that held-out images chose.
        refusals: what was not possible, and why.
        error: largest relative error of the built model on probe images.
        notes: sentences for people.
        search: what the search for the plan looked at.
        network: every block in order, and the forms that were scored for it.
        narrowing: what became of the channels of the merged network, None where they were left alone.
    """

    plan: Plan
    blocks: tuple[MergedBlock, ...]
    before: Cost
    after: Cost
    agreement: float | None
    refitted: Mapping[str, float]
    refusals: tuple[Refusal, ...]
    error: float
    notes: tuple[str, ...]
    search: SearchReport
    network: tuple[ScoredBlock, ...] = ()
    narrowing: NarrowingReport | None = None

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "plan": json.loads(self.plan.to_json()),
            "blocks": [asdict(block) for block in self.blocks],
            "before": self.before.as_json(),
            "after": self.after.as_json(),
            "agreement": self.agreement,
            "refitted": dict(self.refitted),
            "refusals": [asdict(refusal) for refusal in self.refusals],
            "error": self.error,
            "notes": list(self.notes),
            "search": self.search.as_json(),
            "network": [block.as_json() for block in self.network],
            "narrowing": None if self.narrowing is None else self.narrowing.as_json(),
        }

    def to_json(self) -> str:
        """Everything that `from_json` reads back."""
        return json.dumps(asdict(self), default=_plain)

    @classmethod
    def from_json(cls, text: str) -> PruningReport:
        """Return the report that `to_json` wrote."""
        return dacite.from_dict(cls, json.loads(text), dacite.Config(cast=[tuple, float]))

    def __str__(self) -> str:
        lines = [
            f"{self.plan.model}: {len(self.blocks)} blocks merged, "
            f"MACs {self.before.macs / 1e6:.1f} M -> {self.after.macs / 1e6:.1f} M, "
            f"parameters {self.before.params:,} -> {self.after.params:,}"
        ]
        for block in self.blocks:
            told = "" if block.r2 is None else f", R2 {block.r2:.3f}"
            lines.append(
                f"  {block.name}: {block.form} ({block.kind}{told}), "
                f"MACs {block.macs_before / 1e6:.2f} M -> {block.macs_after / 1e6:.2f} M"
            )
        if self.agreement is not None:
            lines.append(f"  same class as the original on {100 * self.agreement:.1f} % of held-out calibration images")
        if self.narrowing is not None:
            lines += [f"  {line}" for line in str(self.narrowing).splitlines() if not line.startswith("  kept")]
        if self.search.measured:
            lines.append(f"  {self.search}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    __repr__ = __str__


def _plain(value: Any) -> Any:
    """Numbers of NumPy as Python's, for JSON."""
    return value.item() if hasattr(value, "item") else list(value)


def summary(model: Any, small: Any) -> str:
    """Return a table of two models side by side: layers, MACs, parameters, peak activations.

    Args:
        model: the original.
        small: the pruned one; its `pruning` report is printed as well, where it has one.
    """
    rows: list[tuple[str, ...]] = [("", "original", "pruned", "ratio")]
    costs = [network_cost(prepared_graph(one)) for one in (model, small)]
    depths = [sum(1 for layer in one.layers if len(layer.weights) > 0) for one in (model, small)]
    for label, values in (
        ("layers with weights", depths),
        ("MACs (M)", [cost.macs / 1e6 for cost in costs]),
        ("parameters", [cost.params for cost in costs]),
        ("peak activations, float32 (KiB)", [cost.activation_bytes / 1024 for cost in costs]),
    ):
        shown_values = [f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for value in values]
        rows.append((label, *shown_values, f"{values[1] / values[0]:.3f}" if values[0] else "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    report = getattr(small, "pruning", None)
    return "\n".join([*lines, str(report)] if report is not None else lines)
