"""One self-contained page, and the same as Markdown, from what a run directory holds. Nothing is measured here.

Records are recognised by what is in them, never by their names: a report of pruning, a plan, a sweep, rows of times, a
latency table, a log of training, checks for an NPU. What is not recognised is listed at the end, so that nothing is
silently left out.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tflite_export.errors import DataError, OutputError
from tflite_export.files import check_target, write_text
from tflite_export.report_records import model_name, read_records
from tflite_export.report_sections import Plot, Section, make_sections

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        html: the page.
        markdown: the same as text, with the plots beside it.
        plots: their files, PNG and SVG.
        sections: titles of the sections that had something to show.
        unread: files that were not recognised.
    """

    html: Path
    markdown: Path
    plots: tuple[Path, ...]
    sections: tuple[str, ...]
    unread: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the record as values that `json.dump` takes."""
        plots = [str(path) for path in self.plots]
        paths = {"html": str(self.html), "markdown": str(self.markdown), "plots": plots}
        return paths | {"sections": list(self.sections), "unread": list(self.unread)}

    def __str__(self) -> str:
        unread = f"; not recognised: {', '.join(self.unread)}" if self.unread else ""
        return f"{self.html}: {', '.join(self.sections).lower()}{unread}\n{self.markdown}, {len(self.plots)} plot files"


def write_report(
    run_dir: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    title: str | None = None,
    command: str | None = None,
    force: bool = False,
) -> Report:
    """Write `report.html`, `report.md` and `plots/` from the records in a run directory.

    The page needs no network and no other file. Records are the JSON documents and CSV files that this package and
    `updp_tf` write, in the folder or one below it.

    Args:
        run_dir: folder of the records.
        out: folder for what is written, made where it is missing; the run directory itself if None.
        title: of the page; the model's name if None.
        command: that made the run, where no record tells it.
        force: replace a report that exists.

    Raises:
        DataError: the folder does not exist or holds nothing to report.
        OutputError: a report exists and `force` is not set, or it cannot be written.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise DataError(f"there is no run directory '{folder}'.")
    records = read_records(folder)
    if not any(record.kind for record in records):
        found = ", ".join(record.path for record in records) or "nothing"
        raise DataError(
            f"'{folder}' holds no records to report ({found}): write some there, for instance with "
            "updp-tf prune --json > RUN_DIR/report.json or updp-tf bench --csv RUN_DIR/times.csv."
        )
    target = folder if out is None else Path(out)
    _make_folder(target)
    for name in ("report.html", "report.md"):
        check_target(target / name, force=force)
    sections = [section for section in make_sections(records, command) if not section.empty]
    plots = [plot for section in sections for plot in section.plots]
    heading = title or next((name for record in records if (name := model_name(record))), folder.resolve().name)
    paths = _write_plots(plots, target / "plots")
    documents = {name: _render(f"{name}.j2", heading, sections) for name in ("report.html", "report.md")}
    for name, text in documents.items():
        write_text(text, target / name)
    titles = tuple(section.title for section in sections)
    unread = tuple(record.path for record in records if not record.kind)
    return Report(target / "report.html", target / "report.md", paths, titles, unread)


# --- writing ---------------------------------------------------------------------------------------------------------


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder '{folder}': {error.strerror or error}.") from error


def _write_plots(plots: Sequence[Plot], folder: Path) -> tuple[Path, ...]:
    paths = []
    if plots:
        _make_folder(folder)
    try:
        for plot in plots:
            for suffix, content in (("png", plot.png), ("svg", plot.svg)):
                path = folder / f"{plot.name}.{suffix}"
                path.write_bytes(content)
                paths.append(path)
    except OSError as error:
        raise OutputError(f"cannot write plots to '{folder}': {error.strerror or error}.") from error
    return tuple(paths)


def _render(template: str, heading: str, sections: Sequence[Section]) -> str:
    # imported here: nothing else needs it
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=template.startswith("report.html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(template).render(heading=heading, sections=sections)
