"""Make the README's tables from the CSV files beside this script.

    uv run --frozen python -m tests.experiments.tables        # writes them into README.md

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`; a test compares.
"""

import csv
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from tests.experiments import latency_prediction, quantization
from tests.experiments import mobilenet_v2_merging as mobilenet
from tests.experiments import resnet56_merging as resnet
from tests.experiments.records import HERE

README = HERE.parents[1] / "README.md"


def rows_of(name: str) -> list[dict[str, str]]:
    path = HERE / name
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def resnet56() -> str:
    rows = rows_of("resnet56_merging.csv")
    speed = {row["network"]: row for row in rows_of("resnet56_latency.csv") if row["precision"] == "int8"}
    n_blocks = sorted(resnet.N_MERGED)
    body = []
    for way in resnet.WAYS:
        cells = [way]
        for n in n_blocks:
            found = [float(row["top1"]) for row in rows if row["way"] == way and row["n_blocks"] == str(n)]
            cells.append(percent(found))
        body.append(cells)
    macs = {int(row["n_blocks"]): int(row["macs"]) for row in rows if row["way"] == "alone"}
    original = int(next(row["macs"] for row in rows if row["way"] == "original"))
    body.append(["fewer MACs (fitted 3x3)", *(f"{original / macs[n]:.2f}x" if n in macs else "-" for n in n_blocks)])
    body.append(["int8 speed-up, measured", *(speed_up(speed.get(f"merged {n}")) for n in n_blocks)])
    dropped = []
    for n in resnet.DROPPED:
        found = [row for row in rows if row["way"].startswith("drop blocks") and row["n_blocks"] == str(n)]
        if found:
            top1 = [float(row["top1"]) for row in found]
            fewer = f"{original / int(found[0]['macs']):.2f}x"
            dropped.append([str(n), fewer, percent(top1), speed_up(speed.get(f"dropped {n}"))])
    rival = table(["blocks dropped greedily, norms renewed", "fewer MACs", "top-1 %", "int8 speed-up"], dropped)
    return table(["blocks merged, of 27", *map(str, n_blocks)], body) + "\n\n" + rival


def percent(found: list[float]) -> str:
    """Mean of accuracies as per cent, with their standard deviation where there are several."""
    spread = f" ± {100 * np.std(found, ddof=1):.1f}" if len(found) > 1 else ""
    return f"{100 * np.mean(found):.1f}{spread}" if found else "-"


def speed_up(row: dict[str, str] | None) -> str:
    return "-" if row is None else f"{1 / float(row['ratio']):.2f}x"


def mobilenetv2() -> str:
    records = mobilenet.accuracy_records()
    body = []
    for way in mobilenet.WAYS:
        cells = [way]
        for n in sorted(mobilenet.N_MERGED):
            pairs = []
            for direction in ("even", "odd"):
                before = records.find(direction=direction, way="original", n_blocks=0)
                after = records.find(direction=direction, way=way, n_blocks=n)
                if before and after:
                    size = int(before["n"])
                    pairs.append((mobilenet.unpack(before["hits"], size), mobilenet.unpack(after["hits"], size)))
            if pairs:
                mean, low, high = mobilenet.kept_interval(pairs)
                one = "" if len(pairs) == 2 else " (one direction)"
                cells.append(f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]{one}")
            else:
                cells.append("-")
        body.append(cells)
    return table(["blocks merged", *map(str, sorted(mobilenet.N_MERGED))], body)


def latency() -> str:
    body = []
    for row in rows_of("mobilenet_v2_latency.csv"):
        interval = f"{float(row['ratio']):.3f} [{float(row['low']):.3f}, {float(row['high']):.3f}]"
        top1 = f"{100 * float(row['top1']):.1f}"
        ms = f"{float(row['median_ms']):.2f} ({float(row['p10_ms']):.2f} to {float(row['p90_ms']):.2f})"
        body.append([row["precision"], row["network"], f"{int(row['macs']) / 1e6:.1f}", ms, interval, top1])
    head = ["precision", "network", "MACs (M)", "median ms (p10 to p90)", "time ratio, 95 % interval", "top-1 %"]
    return table(head, body)


def coverage() -> str:
    body = []
    float_errors = {row["model"]: row["error"] for row in rows_of("../float_equality.csv")}
    for row in rows_of("../coverage_table.csv"):
        both = (float(row[name]) for name in ("blend0_error", "blend0_error_further"))
        errors = " / ".join(f"{error:.0e}" if error else "0" for error in both)
        size = int(row["size"])
        before, after = (float(row[name]) for name in ("macs_before", "macs_after"))
        body.append(
            [
                f"{row['model']} ({row['source']}, {size})",
                f"{row['blocks']} ({row['linearizable']})",
                row["reasons"].replace("_", " "),
                row["forms"].replace(";", ","),
                f"{before:.0f} -> {after:.0f}" if before >= 100 else f"{before:.1f} -> {after:.1f}",
                row["expanded"],
                errors,
                " / ".join(exported(row[kind]) for kind in ("float32", "int8")),
                f"{float(float_errors[row['model']]):.0e}" if row["model"] in float_errors else "-",
            ]
        )
    head = ["network (from, pixels)", "blocks (linear but for activations)", "places refused", "all merged into"]
    return table(
        [
            *head,
            "MACs (M)",
            "expanded",
            "error at blend 0, two sizes",
            "float32 / int8 `.tflite`",
            "float32 file of the original against Keras",
        ],
        sorted(body, key=lambda cells: cells[0].lower()),
    )


def exported(told: str) -> str:
    if told.startswith("no"):
        return "no"
    return "floats left" if "float tensors" in told else "yes"


def updp() -> str:
    body = []
    for row in rows_of("updp_networks.csv"):
        macs, params = (
            f"{int(row[name]) / 1e6:,.1f} -> {int(row[f'{name}_after']) / 1e6:,.1f}" for name in ("macs", "params")
        )
        merged = f"{row['merged']} of {row['blocks']}"
        body.append([row["network"], merged, row["forms"].replace(";", ","), macs, params, row["merge_cpu_s"]])
    return table(["network, 224 pixels", "blocks merged", "into", "MACs (M)", "parameters (M)", "CPU s to merge"], body)


def narrowing() -> str:
    rows = rows_of("resnet56_narrowing.csv")
    factors = sorted({float(row["less"]) for row in rows})
    named = [({**row, "way": narrowing_way(row)}) for row in rows]
    body = []
    for way in dict.fromkeys(row["way"] for row in named):
        cells = [way]
        for less in factors:
            top1 = [float(row["top1"]) for row in named if row["way"] == way and float(row["less"]) == less]
            cells.append(percent(top1))
        body.append(cells)
    return table(["fewer MACs", *(f"{less:.2f}x" for less in factors)], body)


def narrowing_way(row: dict[str, str]) -> str:
    """What was done, as far as it differs from the usual."""
    streams = ", streams too" if row["streams"] == "True" else ""
    step = "" if row["round_to"] == "1" else f", widths in steps of {row['round_to']}"
    return f"{row['scope']}, {row['importance']}{step}{streams}, {row['mend']}"


def both(unit: str) -> str:
    rows = [row for row in rows_of("resnet56_both.csv") if row["unit"] == unit]
    times, files = (
        {(row["way"], row["unit"], row["less"]): row for row in rows_of(f"resnet56_both_{name}.csv")}
        for name in ("latency", "files")
    )
    body = []
    for row in sorted(rows, key=lambda row: (float(row["less"]), row["way"])):
        key = (row["way"], row["unit"], row["less"])
        cells = [f"{row['less']}x", row["way"]]
        if row["top1"]:
            made = f"{row['merged']} blocks merged, {100 * float(row['ratio']):.0f} % of channels cut"
            cells += [made, percent([float(row["top1"])])]
            cells += [percent([float(files[key]["top1"])] if key in files else [])] if unit == "latency" else []
            cells += [speed_up(times.get(key))]
        else:
            cells += ["out of reach", *["-"] * 3]
        body.append(cells)
    more = ["int8, 10,000 JPEG images"] if unit == "latency" else []
    asked = "fewer MACs" if unit == "macs" else "faster, asked"
    return table([asked, "way", "what it is", "top-1 %", *more, "int8 speed-up"], body)


def narrowing_mobilenet() -> str:
    rows = rows_of("mobilenet_v2_narrowing.csv")
    factors = sorted({float(row["less"]) for row in rows if row["scope"] != "original"})
    body = []
    for scope, importance, mend in dict.fromkeys((row["scope"], row["importance"], row["mend"]) for row in rows):
        same = [row for row in rows if (row["scope"], row["importance"], row["mend"]) == (scope, importance, mend)]
        found = [percent([float(row["top1"]) for row in same if float(row["less"]) == less]) for less in factors]
        body.append([f"{scope}, {importance}, {mend}", *found])
    (original,) = (float(row["top1"]) for row in rows if row["scope"] == "original")
    body[0] = ["original", *[percent([original])] * len(factors)]
    return table(["fewer MACs", *(f"{less:.2f}x" for less in factors)], body)


def predictions() -> str:
    body = []
    rows = rows_of("latency_predictions.csv")
    for precision in dict.fromkeys(row["precision"] for row in rows):
        same = [row for row in rows if row["precision"] == precision]
        measured, macs = (np.array([float(row[name]) for row in same]) for name in ("measured_us", "macs"))
        for name, key in (("predicted", "predicted_us"), ("sum of parts", "sum_us")):
            told = np.array([float(row[key]) for row in same])
            errors = 100 * np.abs(told / measured - 1)
            ranks = f"{spearmanr(told, measured)[0]:.3f}"
            body.append([precision, name, f"{np.median(errors):.1f}", f"{errors.max():.1f}", ranks, str(len(same))])
        body.append([precision, "MACs", "-", "-", f"{spearmanr(macs, measured)[0]:.3f}", str(len(same))])
    return table(["precision", "from", "median error %", "worst %", "rank correlation", "networks"], body)


def plans() -> str:
    rows = rows_of("latency_plans.csv")
    body = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for ratio, own, rivals in latency_prediction.at_equal_time([row for row in rows if row["model"] == model]):
            others = [f"{100 * rivals[by]:.1f}" if by in rivals else "-" for by in ("macs", "merged")]
            body.append([model, f"{ratio:.3f}", f"{100 * own:.1f}", *others])
    return table(["network", "measured time", "by latency, top-1 %", "by MACs", "by blocks"], body)


def training() -> str:
    rows = rows_of("resnet20_training.csv")
    original = rows[0]
    body = []
    for way in dict.fromkeys(row["way"] for row in rows):
        same = [row for row in rows if row["way"] == way]
        start, top1 = ([float(row[name]) for row in same] for name in ("start", "top1"))
        less = int(original["macs"]) / int(same[0]["macs"])
        cells = [f"{less:.2f}x", f"{100 * np.mean(start):.1f}", percent(top1), str(len(same))]
        body.append([way, *cells])
    return table(["way", "fewer MACs", "before training", "after", "seeds"], body)


def int8() -> str:
    body = []
    for row in sorted(rows_of("quantization.csv"), key=order_of_int8):
        lost, low, high = mobilenet.points_lost(row["hits_float"], row["hits"], int(row["n"]))
        top1 = f"{100 * float(row['top1_float']):.1f} -> {100 * float(row['top1']):.1f}"
        agreement, kl = f"{100 * float(row['agreement']):.1f}", f"{float(row['mean_kl']):.4f}"
        interval = f"{lost:.1f} [{low:.1f}, {high:.1f}]"
        body.append([row["network"], row["way"], top1, interval, agreement, kl, f"{float(row['sqnr_db']):.1f}"])
    head = [
        "network",
        "steps",
        "top-1 %, float -> int8",
        "points lost, 95 % interval",
        "agreement %",
        "mean KL",
        "SQNR dB",
    ]
    return table(head, body)


def order_of_int8(row: dict[str, str]) -> tuple[int, int]:
    return quantization.NETWORKS.index(row["network"]), list(quantization.WAYS).index(row["way"])


def npu() -> str:
    body = []
    times = {(row["size"], row["network"]): row for row in rows_of("convnext_npu_times.csv")}
    for row in sorted(rows_of("convnext_npu.csv"), key=lambda row: int(row["size"])):
        reads = "" if row["edgetpu_reads"] == "True" else ", but the compiler cannot read the file"
        mapped = f"{row['edgetpu_mapped']} of {row['operators']}{reads}"
        macs = f"{int(row['macs']) / 1e6:,.0f}"
        timed = times.get((row["size"], row["network"]))
        here = f"{float(timed['median_ms']):.1f} ({float(timed['ratio']):.2f})" if timed else "-"
        name = f"{row['network']}, {row['size']}"
        body.append([name, macs, mapped, row["ethosu_cpu_operators"], row["ethosu_estimated_ms"], here])
    head = [
        "ConvNeXt-Tiny, pixels",
        "MACs (M)",
        "operators on the Edge TPU",
        "on the CPU by Vela",
        "Vela's estimate, ms",
        "LiteRT here, ms (ratio)",
    ]
    return table(head, body)


def export_cost() -> str:
    body = []
    for row in rows_of("export_cost.csv"):
        memory = f"{float(row['caller_gib']):.1f} + {float(row['worker_gib']):.1f}"
        body.append([row["network"], row["n_images"], f"{float(row['cpu_seconds']):.0f}", memory])
    return table(["int8 export, 224 pixels", "images", "CPU s", "GiB at most, caller + worker"], body)


TABLES: dict[str, Callable[[], str]] = {
    "plans": plans,
    "predictions": predictions,
    "both": partial(both, "macs"),
    "both_timed": partial(both, "latency"),
    "resnet56": resnet56,
    "mobilenetv2": mobilenetv2,
    "latency": latency,
    "updp": updp,
    "coverage": coverage,
    "narrowing": narrowing,
    "narrowing_mobilenet": narrowing_mobilenet,
    "training": training,
    "int8": int8,
    "npu": npu,
    "export": export_cost,
}


def with_tables(text: str) -> str:
    """Return a text with every marked table made anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        made = make()
        text, found = re.subn(pattern, lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"README.md has {found} places for the table '{name}', one is needed.")
    return text


if __name__ == "__main__":
    path = Path(README)
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
