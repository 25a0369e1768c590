"""The drawings of a report: matplotlib figures, without a window system."""

from collections.abc import Mapping, Sequence
from typing import Any

GREY, BLUE, RED = "#9aa3ad", "#1769aa", "#b3261e"

Json = Mapping[str, Any]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no `pyplot`: it would choose a window system

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_front(sweep: Json, chosen: Sequence[Json]) -> Any:
    """Return what plans keep against what they take.

    Args:
        sweep: the record of a sweep; rows without forms are left out.
        chosen: costs of networks that were made, marked where the sweep has such a plan.
    """
    figure, axes = _figure(7, 4.2)
    timed = sweep["measured_on"] is not None
    key, factor, unit = ("latency_ns", 1e-6, "predicted ms") if timed else ("macs", 1e-6, "MACs (M), which are no time")
    rows = [row for row in sweep["rows"] if row["forms"]]
    agreed = all(row["agreement"] is not None for row in rows)
    kept = [100 * row["agreement"] if agreed else -row["score"] for row in rows]
    places = [row[key] * factor for row in rows]
    axes.plot([sweep["original"][key] * factor, *places], [100.0 if agreed else 0.0, *kept], "-o", color=BLUE, lw=1.2)
    for row, place, value in zip(rows, places, kept, strict=True):
        axes.annotate(str(row["merged"]), (place, value), (4, 4), textcoords="offset points", fontsize=8)
        if any(one.get(key) == row[key] for one in chosen):
            axes.plot([place], [value], "o", ms=13, mfc="none", mec=RED, mew=1.6)
    axes.set_xlabel(unit)
    axes.set_ylabel("held-out images with the original's class, %" if agreed else "minus the sum of (1 - R²)")
    axes.set_title("Plans, with the number of merged blocks; ringed: the one that was made", fontsize=10)
    return figure


def draw_network(network: Sequence[Json], edits: Sequence[Json], merged: Sequence[Json]) -> Any:
    """Return a bar for each block, before and after, in time where it is known, else in MACs.

    Args:
        network: the blocks in order: name, macs, latency_ns where it is known, and forms with the same.
        edits: of the plan: blocks and form.
        merged: what became of each: name, macs_before, macs_after.
    """
    timed = all(block.get("latency_ns") for block in network)
    key, factor, unit = ("latency_ns", 1e-3, "µs, from the latency table") if timed else ("macs", 1e-6, "MACs (M)")
    after_by_block = {one["name"]: one["macs_after"] for one in merged}
    form_by_block = {name: edit["form"] for edit in edits for name in edit["blocks"]}
    figure, axes = _figure(7, 1.2 + 0.26 * len(network))
    for place, block in enumerate(network):
        name, before = block["name"], block[key] * factor
        form = form_by_block.get(name)
        if form is None:
            axes.barh(place, before, color=GREY, height=0.7)
            continue
        forms = {one["form"]: one for one in block.get("forms", ())}
        after = forms[form][key] if form in forms else after_by_block.get(name, 0)
        axes.barh(place, before, color="none", edgecolor=GREY, height=0.7)
        axes.barh(place, after * factor, color=BLUE, height=0.7)
        axes.annotate(f" {form}", (max(before, after * factor), place), va="center", fontsize=8, color=BLUE)
    axes.set_yticks(range(len(network)), [block["name"] for block in network], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(unit)
    axes.set_title("Grey: kept. Blue: merged, in the outline of what was there", fontsize=10)
    return figure


def draw_times(bars: Sequence[tuple[str, float, float, float]]) -> Any:
    """Return medians with the tenth and ninetieth percentile.

    Args:
        bars: name, median, p10 and p90 in milliseconds; percentiles may be NaN.
    """
    figure, axes = _figure(7, 1.1 + 0.35 * len(bars))
    for place, (_, median, p10, p90) in enumerate(bars):
        axes.barh(place, median, color=BLUE if place else GREY, height=0.6)
        if p10 == p10 and p90 == p90:
            axes.plot([p10, p90], [place, place], color="black", lw=1.5)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    return figure


def draw_training(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], axis: str) -> Any:
    """Return a panel for each curve over one axis.

    Args:
        curves: places and values by name.
        axis: what the places are.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 1.4 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, (places, values)) in zip(panels, curves.items(), strict=True):
        panel.plot(places, values, color=BLUE, lw=1.2)
        panel.set_ylabel(name, fontsize=8)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(axis)
    return figure
