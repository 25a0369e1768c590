"""Predicted against measured time: MobileNetV2's table, twenty random plans, plans chosen by it, and intervals.

    uv run --frozen python -m tests.experiments.latency_prediction all

or one of its parts:

    ... table        float32 and int8 tables of MobileNetV2 at 224, one thread; seconds of each
    ... predictions  twenty networks of random plans that the correction was not fitted to
    ... plans        plans chosen with the table, by MACs, and by the number of blocks, at five measured times (int8)
    ... coverage     ten benchmarks of a file against a copy of itself: does the interval of the ratio hold 1?
    ... report       print what the CSV files beside this one say

Times need an idle machine. Rows that are there are not measured again: delete a CSV file to start anew.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.experiments.records import HERE, Records, shared_loader

PRECISIONS = ("float32", "int8")
N_PLANS, SEED = 20, 7  # not the seed of the networks that the correction is fitted to
FRACTIONS = (0.95, 0.9, 0.85, 0.8, 0.75)
N_CALIBRATION, N_RUNS = 400, 10


def table_path(precision: str) -> Path:
    return HERE / f"mobilenet_v2_latencies_{precision}.csv"


def seconds() -> Records:
    return Records(
        HERE / "latency_table_seconds.csv", ("model", "precision"), ("seconds", "rows", "noisy", "correction")
    )


def table() -> None:
    import updp_tf

    records = seconds()
    for precision in PRECISIONS:
        if records.find(model="mobilenet_v2", precision=precision) and table_path(precision).exists():
            continue
        model = shared_loader().mobilenet_v2()
        start = time.monotonic()
        found = updp_tf.measure_latency(model, precision=precision, out=table_path(precision), max_seconds=120)
        took = f"{time.monotonic() - start:.0f}"
        noisy = sum(row.noisy for row in found.rows)

        def row(took=took, found=found, noisy=noisy) -> dict[str, object]:
            return {"seconds": took, "rows": len(found.rows), "noisy": noisy, "correction": str(found.correction)}

        records.ensure(row, model="mobilenet_v2", precision=precision)


def predicted() -> Records:
    values = ("sum_us", "predicted_us", "measured_us", "low_us", "high_us", "noisy", "macs")
    return Records(HERE / "latency_predictions.csv", ("precision", "plan"), values)


def predictions() -> None:
    """Measure networks of random plans together with the original, so that slow hours of the machine cancel."""
    from tflite_export import LatencyItem, LatencyTable
    from updp_tf.blocks import find_blocks, network_cost, prepared_graph
    from updp_tf.forms import all_forms
    from updp_tf.graph import build_model
    from updp_tf.timing import block_key, network_key, random_network

    records = predicted()
    for precision in PRECISIONS:
        if len([row for row in records.rows if row["precision"] == precision]) >= N_PLANS:
            continue
        parts = LatencyTable.load(table_path(precision), precision=precision)
        blocks = find_blocks(shared_loader().mobilenet_v2())
        whole = network_key(blocks.graph)
        rng = np.random.default_rng(SEED)
        items = [LatencyItem(whole, build_model(blocks.graph), tuple(block_key(blocks.graph, one) for one in blocks))]
        macs = {}
        for number in range(N_PLANS):
            fraction = 0.05 + 0.95 * number / (N_PLANS - 1)
            item = LatencyItem(*random_network(blocks, forms=all_forms(), skip="auto", fraction=fraction, rng=rng))
            macs[item.key] = network_cost(prepared_graph(item.model)).macs
            items.append(item)
        found = LatencyTable.measure(items, precision=precision, max_seconds=120)
        # the machine may be faster or slower than while the table was measured: the untouched network tells
        level = found.latency_us(whole) / parts.latency_us(whole)
        for number, item in enumerate(items[1:]):
            row = found[item.key]

            def values(item=item, row=row, level=level, parts=parts, macs=macs) -> dict[str, object]:
                total = sum(parts.latency_us(part) for part in item.parts) * level
                told = parts.predict_us(item.parts) * level
                times = (total, told, row.latency_us, row.low_us, row.high_us)
                names = ("sum_us", "predicted_us", "measured_us", "low_us", "high_us")
                shown = {name: f"{value:.1f}" for name, value in zip(names, times, strict=True)}
                return shown | {"noisy": row.noisy, "macs": macs[item.key]}

            records.ensure(values, precision=precision, plan=number)


def chosen() -> Records:
    values = ("merged", "forms", "macs", "predicted_ms", "measured_ms", "ratio", "low", "high", "top1", "n")
    return Records(HERE / "latency_plans.csv", ("by", "target"), values)


def plans() -> None:
    """Choose plans three ways, measure their int8 files against the original's, and their accuracy without training."""
    import tflite_export
    import updp_tf
    from tests.experiments.mobilenet_v2_merging import Data
    from updp_tf.blocks import network_cost, prepared_graph

    records = chosen()
    model, data = shared_loader().mobilenet_v2(), Data("even")
    images, times = data.calibration, table_path("int8")
    # by MACs and by count the same forms are at hand; the table is only asked what they would take
    for by in ("latency", "macs", "merged"):
        for number, fraction in enumerate(FRACTIONS):
            budget = {
                "latency": {"latency": fraction},
                "macs": {"macs": fraction},
                "merged": {"merged": 2 + 2 * number},
            }
            target = str(next(iter(budget[by].values())))
            if records.find(by=by, target=target):
                continue
            known = times if by == "latency" else None
            small = updp_tf.prune(model, calibration=images, budget=budget[by], latency=known, verbose=False)
            with tempfile.TemporaryDirectory() as folder:
                jobs = [(one, Path(folder) / f"{name}.tflite") for name, one in (("original", model), ("small", small))]
                with tflite_export.ExportWorker() as worker:
                    tflite_export.export_many(jobs, quantize="int8", calibration=images[:200], worker=worker)
                timed = tflite_export.benchmark([path for _, path in jobs]).rows[1]
                accuracy = tflite_export.evaluate(jobs[1][1], data.images, data.labels)
            told = small.pruning.after.latency_ns / 1e6

            def row(small=small, timed=timed, accuracy=accuracy, told=told) -> dict[str, object]:
                return {
                    "merged": len(small.pruning.blocks),
                    "forms": " ".join(f"{edit.name}={edit.form}" for edit in small.pruning.plan.edits),
                    "macs": network_cost(prepared_graph(small)).macs,
                    "predicted_ms": f"{told:.4f}" if told else "",
                    "measured_ms": f"{timed.median_ms:.4f}",
                    "ratio": f"{timed.ratio:.4f}",
                    "low": f"{timed.ratio_low:.4f}",
                    "high": f"{timed.ratio_high:.4f}",
                    "top1": f"{accuracy.top1:.4f}",
                    "n": accuracy.n,
                }

            records.ensure(row, by=by, target=target)


def covered() -> Records:
    return Records(HERE / "interval_coverage.csv", ("state", "run"), ("ratio", "low", "high", "noisy", "load"))


def coverage(state: str = "idle") -> None:
    """Benchmark MobileNetV2 in int8 against a copy of itself, ten times."""
    import tflite_export

    records = covered()
    if len([row for row in records.rows if row["state"] == state]) >= N_RUNS:
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.tflite" for name in ("one", "copy")]
        images = shared_loader().mobilenet_preprocess(shared_loader().imagenet1000(20)[0])
        tflite_export.export(shared_loader().mobilenet_v2(), paths[0], quantize="int8", calibration=images)
        paths[1].write_bytes(paths[0].read_bytes())
        for run in range(N_RUNS):
            row = tflite_export.benchmark(paths, check_outputs=False).rows[1]
            told = {"ratio": row.ratio, "low": row.ratio_low, "high": row.ratio_high}
            values = {name: f"{value:.4f}" for name, value in told.items()}
            extra = {"noisy": row.noisy, "load": row.device.load_average}
            records.ensure(lambda values=values, extra=extra: values | extra, state=state, run=run)


def report() -> None:
    from scipy.stats import spearmanr

    for row in seconds().rows:
        rows = f"{row['rows']} rows, {row['noisy']} noisy"
        print(f"table {row['precision']}: {row['seconds']} s, {rows}; {row['correction']}")
    for precision in PRECISIONS:
        rows = [row for row in predicted().rows if row["precision"] == precision]
        if not rows:
            continue
        told, sums, measured = (
            np.array([float(row[key]) for row in rows]) for key in ("predicted_us", "sum_us", "measured_us")
        )
        macs = np.array([float(row["macs"]) for row in rows])
        for name, values in (("predicted", told), ("sum of parts", sums)):
            errors = np.abs(values / measured - 1)
            print(
                f"{precision}, {name}: median error {100 * np.median(errors):.1f} %, worst {100 * errors.max():.1f} %, "
                f"rank correlation {spearmanr(values, measured)[0]:.3f} (MACs: {spearmanr(macs, measured)[0]:.3f}), "
                f"n = {len(rows)}"
            )
    for row in chosen().rows:
        ratio = f"x {row['ratio']} [{row['low']}, {row['high']}]"
        print(f"by {row['by']:8} {row['target']:>5}: {row['merged']:>2} merged, {ratio}, top-1 {row['top1']}")
    for state in dict.fromkeys(row["state"] for row in covered().rows):
        rows = [row for row in covered().rows if row["state"] == state]
        inside = sum(float(row["low"]) <= 1 <= float(row["high"]) for row in rows)
        widest = max(float(row["high"]) - float(row["low"]) for row in rows)
        print(f"{state}: {inside} of {len(rows)} intervals hold 1.00, the widest is {widest:.3f} wide")


if __name__ == "__main__":
    parts = {"table": table, "predictions": predictions, "plans": plans, "coverage": coverage, "report": report}
    if sys.argv[1] == "all":
        for part in parts.values():
            part()
    elif sys.argv[1] == "coverage":
        coverage(*sys.argv[2:])
    else:
        parts[sys.argv[1]]()
