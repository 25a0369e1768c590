"""The sections of a report: tables, plots and drawings, from the records of a run directory."""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tflite_export.plots import draw_front, draw_network, draw_times, draw_training
from tflite_export.report_records import Record

SECTIONS = (
    ("summary", "Before and after"),
    ("front", "Accuracy against time"),
    ("network", "The network"),
    ("blocks", "Blocks and forms"),
    ("times", "Measured times"),
    ("training", "Training"),
    ("accelerators", "Accelerators"),
    ("refusals", "What was not done, and why"),
    ("origin", "How this was made"),
)


Json = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of text with a header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawing as PNG and SVG."""

    name: str
    title: str
    png: bytes
    svg: bytes

    @property
    def data_uri(self) -> str:
        """The SVG inside the page itself."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()


@dataclass(frozen=True)
class Tile:
    """One block of the drawing of a network.

    Attributes:
        name: of the block.
        form: it took; empty where it is kept.
        detail: shapes and costs, for the tooltip and for readers of the text.
    """

    name: str
    form: str
    detail: str


@dataclass
class Section:
    """A part of the page: paragraphs, tables, plots and drawings, in this order."""

    key: str
    title: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.paragraphs or self.tables or self.plots or self.tiles)


def make_sections(records: Sequence[Record], command: str | None = None) -> list[Section]:
    """Return all sections, filled from the records; some may be empty."""
    sections = {key: Section(key, title) for key, title in SECTIONS}
    by_kind: dict[str, list[Record]] = {}
    for record in records:
        by_kind.setdefault(record.kind, []).append(record)
    prunings = by_kind.get("pruning", [])
    _summarise(sections["summary"], prunings, by_kind)
    _draw_fronts(sections["front"], prunings, by_kind)
    for record in prunings:
        _show_network(sections["network"], record, by_kind)
        _show_blocks(sections["blocks"], record)
        _show_refusals(sections["refusals"], record)
    if not prunings:
        for record in by_kind.get("plan", ()):
            _show_plan(sections["network"], record)
    _show_times(sections["times"], by_kind)
    for record in by_kind.get("training", ()):
        _show_training(sections["training"], record)
    _show_accelerators(sections["accelerators"], by_kind)
    for record in by_kind.get("blocks", ()):
        rows = tuple((one["site"], one["rule"], one["reason"]) for one in record.data["skipped"])
        if rows:
            sections["refusals"].tables.append(Table(("place", "rule", "reason"), rows, f"No blocks ({record.path})"))
    _show_origin(sections["origin"], records, command)
    return list(sections.values())


_COSTS = (
    ("macs", "MACs (M)", 1e-6, ",.1f"),
    ("params", "parameters", 1, ",.0f"),
    ("activation_bytes", "peak activations (KiB)", 1 / 1024, ",.0f"),
    ("latency_ns", "predicted time (ms)", 1e-6, ".4g"),
    ("file_bytes", ".tflite file (bytes)", 1, ",.0f"),
)


def _summarise(section: Section, prunings: Sequence[Record], by_kind: Mapping[str, Sequence[Record]]) -> None:
    for record in prunings:
        before, after = record.data["before"], record.data["after"]
        rows = []
        for key, label, factor, digits in _COSTS:
            if before.get(key):
                a, b = before[key] * factor, after[key] * factor
                rows.append((label, format(a, digits), format(b, digits), f"{b / a:.3f}"))
        merged = len(record.data["blocks"])
        if record.data.get("agreement") is not None:
            rows.append(("same class as the original, held-out images", "-", _percent(record.data["agreement"]), "-"))
        count = f"{merged} block{'' if merged == 1 else 's'} merged"
        caption = f"{record.data['plan'].get('model', '')}: {count} ({record.path})"
        section.tables.append(Table(("", "before", "after", "ratio"), tuple(rows), caption))
        section.paragraphs += [str(note) for note in record.data.get("notes", ())]
        if before.get("latency_ns"):
            section.paragraphs.append("Predicted times are sums of a latency table; measured ones are further down.")
        else:
            section.paragraphs.append("A ratio of MACs is no speed-up: times are measured ones, where there are some.")
    evaluations = [record for record in by_kind.get("evaluation", ()) if isinstance(record.data["accuracy"], Mapping)]
    if evaluations:
        accuracies = [
            (
                str(one.data.get("path", one.path)),
                f"{_percent(one.data['accuracy']['1'])} ± {100 * one.data['standard_error']['1']:.1f}",
                str(one.data["n"]),
            )
            for one in evaluations
            if "1" in one.data["accuracy"]
        ]
        section.tables.append(Table(("file", "top-1, one standard error", "images"), tuple(accuracies), "Accuracy"))


def _draw_fronts(section: Section, prunings: Sequence[Record], by_kind: Mapping[str, Sequence[Record]]) -> None:
    for number, record in enumerate(by_kind.get("sweep", ())):
        rows = [row for row in record.data["rows"] if row["forms"]]
        if not rows:
            continue
        timed = record.data["measured_on"] is not None
        chosen = [one.data["after"] for one in prunings]
        png, svg = _drawn(draw_front(record.data, chosen))
        where = f"predicted ms, {record.data['measured_on']}" if timed else "MACs, which are no time"
        section.plots.append(Plot(f"front{number or ''}", f"Every plan of {record.path}: {where}", png, svg))
        header = ("budget", "merged", "lost (sum of 1 - R²)", "agreement", "MACs (M)", *(["ms"] if timed else []), "")
        section.tables.append(
            Table(header, tuple(_swept(row, timed=timed) for row in record.data["rows"]), record.path)
        )
    for record in by_kind.get("swept rows", ()):
        keys = [key for key in record.data[0] if key != "forms"]
        section.tables.append(
            Table(tuple(keys), tuple(tuple(row[k] or "" for k in keys) for row in record.data), record.path)
        )


def _swept(row: Json, *, timed: bool) -> tuple[str, ...]:
    if row["note"] and not row["forms"]:
        blank = ("-",) * (5 if timed else 4)
        return (row["budget"], *blank, row["note"])
    agreement = "-" if row["agreement"] is None else _percent(row["agreement"])
    ms = (f"{row['latency_ns'] / 1e6:.4g}",) if timed else ()
    return (row["budget"], str(row["merged"]), f"{row['score']:.3f}", agreement, f"{row['macs'] / 1e6:.1f}", *ms, "")


def _show_network(section: Section, record: Record, by_kind: Mapping[str, Sequence[Record]]) -> None:
    """Draw every block in order, merged ones marked."""
    form_by_block = {name: edit["form"] for edit in record.data["plan"]["edits"] for name in edit["blocks"]}
    network = record.data.get("network") or _blocks_of(record, by_kind)
    tiles = []
    for block in network:
        shape = f"{_shape(block['entry_shape'])} → {_shape(block['exit_shape'])}"
        cost = f"{block['macs'] / 1e6:.2f} M MACs"
        ms = f", {block['latency_ns'] / 1e6:.3g} ms" if block.get("latency_ns") else ""
        tiles.append(Tile(block["name"], form_by_block.get(block["name"], ""), f"{shape}, {cost}{ms}"))
    if not tiles:
        tiles = [
            Tile(one["name"], one["form"], f"{one['macs_before'] / 1e6:.2f} M MACs") for one in record.data["blocks"]
        ]
        section.paragraphs.append(
            "Only merged blocks are known: `updp-tf blocks --json` into the folder tells them all."
        )
    section.tiles += tiles
    if network:
        png, svg = _drawn(draw_network(network, record.data["plan"]["edits"], record.data["blocks"]))
        section.plots.append(
            Plot("network", "What each block costs before and after; merged ones are marked", png, svg)
        )


def _blocks_of(record: Record, by_kind: Mapping[str, Sequence[Record]]) -> list[Json]:
    model = record.data["plan"].get("model")
    found = [one.data["blocks"] for one in by_kind.get("blocks", ()) if one.data["model"] == model]
    return list(found[0]) if found else []


def _show_plan(section: Section, record: Record) -> None:
    rows = tuple(
        (" ".join(edit["blocks"]), edit["form"], _r2(edit.get("r2")), f"{edit['score']:.3f}")
        for edit in record.data["edits"]
    )
    section.tables.append(
        Table(("blocks", "form", "R²", "score"), rows, f"Plan for {record.data['model']} ({record.path})")
    )


def _show_blocks(section: Section, record: Record) -> None:
    chosen = {tuple(edit["blocks"]): edit["form"] for edit in record.data["plan"]["edits"]}
    rows = []
    for block in record.data.get("network") or ():
        timed = bool(block.get("latency_ns"))
        for form in block["forms"]:
            mark = "chosen" if chosen.get((block["name"],)) == form["form"] else ""
            times = (f"{form['latency_ns'] / 1e3:.4g}", f"{block['latency_ns'] / 1e3:.4g}") if timed else ("-", "-")
            macs = f"{form['macs'] / 1e6:.2f}", f"{block['macs'] / 1e6:.2f}"
            rows.append((block["name"], form["form"], f"{form['score']:.3f}", _r2(form["r2"]), *macs, *times, mark))
    if rows:
        header = ("block", "form", "score", "R²", "MACs (M)", "of block", "µs", "of block", "")
        caption = f"Every form that was scored: lower scores lose less ({record.path})"
        section.tables.append(Table(header, tuple(rows), caption))
        return
    merged = tuple(
        (
            one["name"],
            one["form"],
            one["kind"],
            _r2(one["r2"]),
            f"{one['macs_before'] / 1e6:.2f}",
            f"{one['macs_after'] / 1e6:.2f}",
        )
        for one in record.data["blocks"]
    )
    section.tables.append(Table(("block", "form", "kind", "R²", "MACs (M)", "after"), merged, record.path))


def _show_refusals(section: Section, record: Record) -> None:
    rows = tuple((one["site"], one["rule"], one["reason"]) for one in record.data.get("refusals", ()))
    if rows:
        section.tables.append(Table(("place", "form or rule", "reason"), rows, record.path))


def _show_times(section: Section, by_kind: Mapping[str, Sequence[Record]]) -> None:
    for number, record in enumerate(by_kind.get("times", ())):
        rows, bars = [], []
        for one in record.data:
            median, p10, p90 = (_float(one.get(key)) for key in ("median_ms", "p10_ms", "p90_ms"))
            ratio = f"{_float(one['ratio']):.3f} ({_short(one.get('ratio_low'))} to {_short(one.get('ratio_high'))})"
            nature = str(one.get("nature") or "measured")
            marks = [nature] if nature != "measured" else []
            marks += ["noisy"] if str(one.get("noisy")) == "True" else []
            rows.append(
                (
                    one["name"],
                    _short(median),
                    f"{_short(p10)} to {_short(p90)}",
                    str(one.get("n", "-")),
                    ratio,
                    ", ".join(marks),
                )
            )
            bars.append((str(one["name"]), median, p10, p90))
        first = record.data[0]
        parts = (
            "device_description",
            "device_system",
            "device_runtime",
            "delegate",
            "threads",
            "device_governor",
            "date",
        )
        where = "; ".join(f"{key.removeprefix('device_')} {first[key]}" for key in parts if first.get(key))
        header = ("file", "median ms", "p10 to p90", "runs", "ratio to the first (95 % interval)", "")
        section.tables.append(Table(header, tuple(rows), f"{record.path}: {where}"))
        if all(math.isfinite(bar[1]) for bar in bars):
            png, svg = _drawn(draw_times(bars))
            section.plots.append(Plot(f"times{number or ''}", f"Median, p10 and p90 of {record.path}", png, svg))
    for record in by_kind.get("latencies", ()):
        first = record.data[0]
        label = "estimate" if first.get("nature") == "estimate" else "measured"
        times = tuple(
            (
                str(one["key"]),
                _short(one["latency_us"]),
                f"{_short(one['low_us'])} to {_short(one['high_us'])}",
                "noisy" if str(one["noisy"]) == "True" else "",
            )
            for one in record.data
        )
        where = ", ".join(str(first[key]) for key in ("precision", "description", "runtime", "threads", "date"))
        caption = f"Latency table {record.path} ({label}): {where}"
        section.tables.append(Table(("part", "µs", "95 % interval", ""), times, caption))


def _show_training(section: Section, record: Record) -> None:
    axis = "step" if "step" in record.data[0] else "epoch"
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in record.data:
        place = _float(row.get(axis))
        for name, value in row.items():
            number = _float(value)
            if name not in (axis, None) and math.isfinite(place) and math.isfinite(number):
                xs, ys = curves.setdefault(str(name), ([], []))
                xs.append(place)
                ys.append(number)
    if not curves:
        return
    png, svg = _drawn(draw_training(curves, axis))
    stem = Path(record.path).stem
    section.plots.append(Plot(f"training-{stem}", f"{', '.join(curves)} over training ({record.path})", png, svg))
    rows = tuple(
        (name, _short(ys[0]), _short(ys[-1]), _short(min(ys)), _short(max(ys))) for name, (_, ys) in curves.items()
    )
    section.tables.append(Table(("", "first", "last", "least", "most"), rows, record.path))


def _show_accelerators(section: Section, by_kind: Mapping[str, Sequence[Record]]) -> None:
    for record in by_kind.get("edgetpu", ()):
        operators = record.data["operators"]
        mapped = f"{record.data['n_mapped']} of {len(operators)} operators on the Edge TPU, by its documented rules"
        section.paragraphs.append(f"{record.data.get('path', record.path)}: {mapped}.")
        section.paragraphs += [str(line) for line in record.data.get("advice", ())]
    for record in by_kind.get("ethosu", ()):
        estimate = record.data.get("estimated_ms")
        told = "nothing runs on the NPU" if estimate is None else f"{estimate:.3g} ms, an estimate of its compiler"
        on_cpu = f"{record.data['n_cpu_operators']} of {record.data['n_operators']} operators on the CPU"
        section.paragraphs.append(
            f"{record.data.get('source', record.path)}: {record.data['accelerator']}, {on_cpu}; {told}."
        )
    for record in by_kind.get("export", ()):
        data = record.data
        islands = len(data.get("float_tensors", ()))
        left = f"; {islands} tensors stayed float32" if islands else ""
        notes = "".join(f" Note: {note}." for note in data.get("notes", ()))
        section.paragraphs.append(f"{data['path']}: {data['quantize']}, {data['size_bytes']:,} bytes{left}.{notes}")


def _show_origin(section: Section, records: Sequence[Record], command: str | None) -> None:
    rows = [("command", command)] if command else []
    for record in records:
        if record.kind == "run":
            rows += [(key, _text(value)) for key, value in record.data.items()]
        versions = record.data["plan"].get("versions") if record.kind == "pruning" else None
        if record.kind in ("plan", "export"):
            versions = record.data.get("versions")
        if versions:
            rows.append((f"versions ({record.path})", ", ".join(f"{name} {v}" for name, v in versions.items())))
        if record.kind == "pruning":
            rows.append((f"budget ({record.path})", _text(record.data["plan"].get("budget"))))
    rows.append(("report", f"{datetime.now(UTC).isoformat(timespec='seconds')}, updp-tf {_version()}"))
    section.tables.append(Table(("", ""), tuple((key, str(value)) for key, value in dict(rows).items())))
    files = tuple((record.path, record.kind or "not recognised") for record in records)
    section.tables.append(Table(("file", "read as"), files, "Files of the run directory"))


def _version() -> str:
    from importlib.metadata import version

    return version("updp-tf")


# --- text ------------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    return " ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _r2(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _shape(sizes: Iterable[int | None]) -> str:
    return "×".join("?" if size is None else str(size) for size in sizes)


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _short(value: Any) -> str:
    number = _float(value)
    return f"{number:.4g}" if math.isfinite(number) else "-"


# --- drawing ----------------------------------------------------------------------------------------------------------


def _drawn(figure: Any) -> tuple[bytes, bytes]:
    """Return a figure as PNG and as SVG without the date, so that equal records give equal files."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return png.getvalue(), svg.getvalue()
