"""The report of a run: what is in it, that it stands alone, and how it looks in a browser where there is one."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest

from tflite_export import DataError, LatencyTable, OutputError, write_report
from tflite_export.latency_rows import Conditions, LatencyRow
from tflite_export.report_records import read_records
from tflite_export.report_sections import SECTIONS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

FORMS = [
    {"form": "conv3", "score": 0.08, "r2": 0.92, "macs": 2_000_000, "params": 900, "latency_ns": 90_000},
    {"form": "remove", "score": 0.4, "r2": 0.6, "macs": 0, "params": 0, "latency_ns": 0},
]


def block(name: str, **change) -> dict:
    costs = {"macs": 5_000_000, "params": 4000, "activation_bytes": 10, "latency_ns": 200_000, "file_bytes": 5000}
    shapes = {"entry_shape": [14, 14, 64], "exit_shape": [14, 14, 64], "skip": "identity"}
    return {"name": name, **shapes, **costs, "forms": FORMS} | change


PLAN = {
    "schema": 1,
    "fingerprint": "ab",
    "model": 'net <script>alert("x")</script>',
    "edits": [{"blocks": ["b1"], "site": ["n"], "form": "conv3", "score": 0.08, "r2": 0.92, "options": {}}],
    "budget": {"latency": 0.8},
    "versions": {"keras": "3.15.1", "updp-tf": "0.1"},
    "notes": [],
}
BEFORE = {"macs": 15_000_000, "params": 12_000, "activation_bytes": 10_240, "latency_ns": 700_000, "file_bytes": 15_000}
AFTER = {"macs": 12_000_000, "params": 8900, "activation_bytes": 10_240, "latency_ns": 590_000, "file_bytes": 11_000}
MERGED = {
    "name": "b1",
    "form": "conv3",
    "kind": "fitted",
    "r2": 0.92,
    "macs_before": 5_000_000,
    "macs_after": 2_000_000,
}
PRUNING = {
    "plan": PLAN,
    "blocks": [MERGED],
    "before": BEFORE,
    "after": AFTER,
    "agreement": 0.975,
    "refitted": {},
    "refusals": [{"site": "b2", "rule": "conv5", "reason": "the block itself reads 3x3 pixels | less than the form"}],
    "error": 1e-6,
    "notes": ["a note with <b>brackets</b>"],
    "network": [block("b0", skip="none"), block("b1"), block("b2")],
}


def swept(budget: str, merged: int, score: float, agreement: float | None, forms: str, note: str = "", **cost) -> dict:
    told = {"budget": budget, "merged": merged, "score": score, "agreement": agreement, "forms": forms, "note": note}
    return told | AFTER | cost


SWEEP = {
    "model": "net",
    "measured_on": "int8 on a board",
    "original": BEFORE,
    "rows": [
        swept("latency=0.9", 1, 0.08, 0.975, "b1=conv3"),
        swept("latency=0.7", 2, 0.3, 0.9, "b1=conv3 b2=conv3", latency_ns=480_000),
        swept("latency=0.1", 0, 0.0, None, "", "cannot be met"),
    ],
}
HEAD = (
    "name,nature,median_ms,p10_ms,p90_ms,n,ratio,ratio_low,ratio_high,noisy,threads,delegate,date,device_description\n"
)
TIMES = HEAD + "original,measured,0.71,0.7,0.73,60,1,1,1,False,1,XNNPACK,2026-01-01,a board\n"
TIMES += "pruned,measured,0.60,0.59,0.66,60,0.845,0.83,0.86,True,1,XNNPACK,2026-01-01,a board\n"


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(PRUNING))
    (folder / "sweep.json").write_text(json.dumps(SWEEP))
    (folder / "times.csv").write_text(TIMES)
    steps = "".join(f"{step},{max(0, 1 - step / 5):.2f},{2 / (step + 1):.3f},{0.1 * step:.2f}\n" for step in range(10))
    (folder / "logs" / "training.csv").write_text(f"step,blend,loss,accuracy\n{steps}")
    conditions = Conditions("measured", "a board", "Linux", "litert 2", "cpu", "int8", 1)
    row = LatencyRow("keep:b1", (), 200.0, 198, 202, False, 9, 1, 5000, "", "", "adb", "", "", "2026-01-01", conditions)
    LatencyTable((row,)).save(folder / "table.csv")
    npu = {"accelerator": "ethos-u55-256", "n_operators": 30, "n_cpu_operators": 0, "estimated_ms": 1.5, "source": "a"}
    (folder / "ethosu.json").write_text(json.dumps(npu))
    (folder / "command.json").write_text(json.dumps({"command": "updp-tf prune net.keras", "commit": "abc"}))
    (folder / "strange.json").write_text(json.dumps({"x": 1}))
    return folder


class Page(html.parser.HTMLParser):
    """Collects tags, ids and links, and checks that tags are closed in order."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.images, self.tags = [], [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.add(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag == "img":
            self.images.append(found)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_every_section_and_needs_nothing_else(run_dir):
    report = write_report(run_dir)
    text = report.html.read_text(encoding="utf-8")
    page = Page(text)
    assert [key for key, _ in SECTIONS] == [one for one in page.ids if not one.startswith("plot-")]
    assert report.sections == tuple(title for _, title in SECTIONS)
    assert len(set(page.ids)) == len(page.ids)
    # nothing is fetched: links lead into the page, images are in it
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "script" not in page.tags and "@import" not in text and "url(" not in text
    assert {"plot-front", "plot-network", "plot-times", "plot-training-training"} <= set(page.ids)
    assert all(image["alt"] for image in page.images)
    assert "&lt;script&gt;" in text and "<script>" not in text  # a model's name is text
    assert report.unread == ("strange.json",) and "strange.json" in text


def test_what_was_measured_done_and_refused_is_told(run_dir):
    text = write_report(run_dir).markdown.read_text(encoding="utf-8")
    for wanted in (
        "| MACs (M) | 15.0 | 12.0 | 0.800 |",
        "| predicted time (ms) | 0.7 | 0.59 | 0.843 |",
        "**b1 → conv3**",
        "- b2 (14×14×64 → 14×14×64",
        "| b1 | conv3 | 0.080 | 0.920 | 2.00 | 5.00 | 90 | 200 | chosen |",
        "0.845 (0.83 to 0.86) | noisy",
        "reads 3x3 pixels \\| less than",
        "| latency=0.1 | - | - | - | - | - | cannot be met |",
        "ethos-u55-256, 0 of 30 operators on the CPU; 1.5 ms, an estimate of its compiler",
        "| loss | 2 | 0.2 |",
        "updp-tf prune net.keras",
        "keras 3.15.1",
        "![",
    ):
        assert wanted in text, wanted


def test_markdown_tables_are_well_formed(run_dir):
    lines = write_report(run_dir).markdown.read_text(encoding="utf-8").splitlines()
    tables = 0
    for above, line, below in zip(lines, lines[1:], lines[2:], strict=False):
        if re.fullmatch(r"\|( --- \|)+ ?", line):
            tables += 1
            columns = line.count("---")
            for row in (above, below):
                assert len(re.findall(r"(?<!\\)\|", row)) == columns + 1, row
    assert tables >= 8


def test_plots_are_there_as_png_and_svg(run_dir):
    report = write_report(run_dir)
    kinds = {path.suffix for path in report.plots}
    assert kinds == {".png", ".svg"} and len(report.plots) == 8
    for path in report.plots:
        start = path.read_bytes()[:100]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in start


def test_a_plan_alone_is_enough_for_a_report(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    report = write_report(tmp_path, title="a plan")
    text = report.html.read_text(encoding="utf-8")
    assert "<h1>a plan</h1>" in text and "conv3" in text
    assert report.sections == ("The network", "How this was made")


def test_an_estimate_is_labelled(tmp_path):
    conditions = Conditions("estimate", "ethos-u55-256", "", "vela", "cpu", "int8", 1)
    nan = float("nan")
    row = LatencyRow("a", (), 5.0, nan, nan, False, 1, 1, 9, "", "", "ethos-u55-256", "", "", "2026-01-01", conditions)
    LatencyTable((row,)).save(tmp_path / "t.csv")
    assert "Latency table t.csv (estimate)" in write_report(tmp_path).html.read_text(encoding="utf-8")


def test_bad_folders_are_named(tmp_path, run_dir):
    with pytest.raises(DataError, match="there is no run directory"):
        write_report(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no records to report \(nothing\): write some there"):
        (tmp_path / "empty").mkdir()
        write_report(tmp_path / "empty")
    write_report(run_dir)
    with pytest.raises(OutputError, match="report.html' exists already"):
        write_report(run_dir)
    write_report(run_dir, force=True)
    assert write_report(run_dir, out=run_dir.parent / "elsewhere").html.is_file()
    with pytest.raises(OutputError, match="cannot make the folder"):
        write_report(run_dir, out=run_dir / "no" / "where")
    (run_dir / "broken.json").write_text("{")
    with pytest.raises(DataError, match="broken.json' cannot be read"):
        write_report(run_dir, force=True)


def test_a_report_is_no_record_of_its_run(run_dir):
    before = [record.path for record in read_records(run_dir)]
    write_report(run_dir)
    assert [record.path for record in read_records(run_dir)] == before


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_in_a_browser(run_dir, width):
    """No message on the console, nothing wider than the window, every picture drawn."""
    write_report(run_dir)
    probe = """<!DOCTYPE html><title></title><iframe style="border: 0" width="WIDTH" height="900" src="report.html">
        </iframe><script>addEventListener("load", () => {
        const inner = frames[0].document, root = inner.documentElement;
        document.title = JSON.stringify({
            wide: root.scrollWidth - frames[0].innerWidth,
            width: frames[0].innerWidth,
            images: [...inner.images].map(i => i.naturalWidth > 0 && i.width > 100),
            sections: [...inner.querySelectorAll("section")].map(s => s.offsetHeight > 30)}); });</script>"""
    probed = run_dir / "probed.html"
    probed.write_text(probe.replace("WIDTH", str(width)), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={run_dir / 'profile'}",
         "--enable-logging=stderr", "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND",
         "--window-size=1500,900",
         "--virtual-time-budget=5000", "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-500:]
    found = json.loads(title[1].replace("&quot;", '"'))
    assert width - 20 <= found["width"] <= width and found["wide"] <= 0
    assert len(found["images"]) == 4 and all(found["images"]) and all(found["sections"])
    assert len(found["sections"]) == len(SECTIONS)
