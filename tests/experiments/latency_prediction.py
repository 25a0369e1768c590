"""Predicted against measured time: latency tables, twenty random plans, plans chosen by a table, and intervals.

    uv run --frozen python -m tests.experiments.latency_prediction all

or one of its parts:

    ... table        float32 and int8 tables of MobileNetV2 at 224, int8 of ResNet-56, float32 of ConvNeXt-Tiny at 224,
                     one thread; seconds of each
    ... predictions  twenty networks of random plans that the correction was not fitted to
    ... plans        MobileNetV2 and ResNet-56: plans chosen with the table, by MACs, and by the number of blocks; their
                     int8 files stay in the system's folder for temporary files (the machine may be busy); fitted to 200
                     images of MobileNetV2's, 600 of ResNet-56's
    ... plan_times   these files against the original's, all in turns
    ... coverage     ten benchmarks of a file against a copy of itself: does the interval of the ratio hold 1?
    ... plot         draw the last: latency_plans.svg
    ... report       print what the CSV files beside this one say
    ... rehearse     all of it with a network of milliseconds, in a folder of its own: shows that it runs, nothing else

Times need an idle machine. Rows that are there are not measured again: delete a CSV file to start anew.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.experiments.records import HERE, Records, shared_loader

PRECISIONS = ("float32", "int8")
"""That plans are predicted in."""
SEED = 7  # not the seed of the networks that the correction is fitted to


@dataclass(frozen=True)
class Images:
    """Images that calibrate, and others with their labels."""

    calibration: np.ndarray
    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Setting:
    """What is measured, how long, and where the rows go."""

    folder: Path = HERE
    name: str = "mobilenet_v2"
    precisions: tuple[str, ...] = PRECISIONS
    max_seconds: float = 120.0
    n_plans: int = 20
    fractions: tuple[float, ...] = (0.95, 0.9, 0.85, 0.8, 0.75)
    macs: tuple[float, ...] = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
    merged: tuple[int, ...] = (1, 2, 4, 6, 8, 10)
    n_runs: int = 10
    min_seconds: float = 3.0

    def model(self):
        return shared_loader().mobilenet_v2()

    def data(self) -> Images:
        from tests.experiments.mobilenet_v2_merging import Data

        found = Data("even")
        return Images(found.calibration[::2], found.images, found.labels)


class ResNet56(Setting):
    """CIFAR-10, 27 blocks."""

    def model(self):
        return shared_loader().resnet56()

    def data(self) -> Images:
        from tests.experiments.resnet56_merging import N_CALIBRATION

        load = shared_loader()
        (x_train, _), (x_test, y_test) = load.cifar10()
        chosen = np.random.default_rng(0).choice(len(x_train), N_CALIBRATION, replace=False)
        return Images(load.cifar_preprocess(x_train[chosen]), load.cifar_preprocess(x_test), y_test)


class ConvNeXtTiny(Setting):
    """Random weights: only its table is measured."""

    def model(self):
        import keras

        keras.utils.set_random_seed(0)
        return keras.applications.ConvNeXtTiny(weights=None)


class Rehearsal(Setting):
    """A network of random weights, which takes milliseconds."""

    def model(self):
        from tests import zoo

        return zoo.build("inverted_residuals")

    def data(self) -> Images:
        model = self.model()
        images = np.random.default_rng(0).normal(size=(64, *model.input_shape[1:])).astype("float32")
        labels = np.asarray(model(images[32:], training=False)).argmax(-1)
        return Images(images[:32], images[32:], labels)


def table_path(at: Setting, precision: str) -> Path:
    return at.folder / f"{at.name}_latencies_{precision}.csv"


def seconds(at: Setting) -> Records:
    values = ("seconds", "rows", "noisy", "correction")
    return Records(at.folder / "latency_table_seconds.csv", ("model", "precision"), values)


def table(at: Setting) -> None:
    import updp_tf

    records = seconds(at)
    for precision in at.precisions:
        path = table_path(at, precision)
        if records.find(model=at.name, precision=precision) and path.exists():
            continue
        start = time.monotonic()
        found = updp_tf.measure_latency(at.model(), precision=precision, out=path, max_seconds=at.max_seconds)
        took = f"{time.monotonic() - start:.0f}"
        noisy = sum(row.noisy for row in found.rows)

        def row(took=took, found=found, noisy=noisy) -> dict[str, object]:
            return {"seconds": took, "rows": len(found.rows), "noisy": noisy, "correction": str(found.correction)}

        records.ensure(row, model=at.name, precision=precision)


def predicted(at: Setting) -> Records:
    values = ("sum_us", "predicted_us", "measured_us", "low_us", "high_us", "noisy", "macs")
    return Records(at.folder / "latency_predictions.csv", ("precision", "plan"), values)


def predictions(at: Setting) -> None:
    """Measure networks of random plans together with the original, so that slow hours of the machine cancel."""
    from tflite_export import LatencyItem, LatencyTable
    from updp_tf.blocks import find_blocks, network_cost, prepared_graph
    from updp_tf.forms import all_forms
    from updp_tf.graph import build_model
    from updp_tf.timing import block_key, network_key, random_network

    records = predicted(at)
    for precision in at.precisions:
        if len([row for row in records.rows if row["precision"] == precision]) >= at.n_plans:
            continue
        parts = LatencyTable.load(table_path(at, precision), precision=precision)
        blocks = find_blocks(at.model())
        whole = network_key(blocks.graph)
        rng = np.random.default_rng(SEED)
        items = [LatencyItem(whole, build_model(blocks.graph), tuple(block_key(blocks.graph, one) for one in blocks))]
        macs = {}
        for number in range(at.n_plans):
            fraction = 0.05 + 0.95 * number / (at.n_plans - 1)
            item = LatencyItem(*random_network(blocks, forms=all_forms(), skip="auto", fraction=fraction, rng=rng))
            macs[item.key] = network_cost(prepared_graph(item.model)).macs
            items.append(item)
        found = LatencyTable.measure(items, precision=precision, max_seconds=at.max_seconds)
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


def chosen(at: Setting) -> Records:
    values = ("merged", "forms", "macs", "predicted_ms", "measured_ms", "ratio", "low", "high", "top1", "n")
    return Records(at.folder / "latency_plans.csv", ("model", "by", "target"), values)


def files_of(at: Setting) -> Path:
    return (Path(tempfile.gettempdir()) if at.folder == HERE else at.folder) / f"updp-tf-plans-{at.name}"


def plans(at: Setting) -> None:
    """Choose plans three ways, and leave their int8 files with what is known of them; nothing is timed here."""
    import tflite_export
    import updp_tf
    from updp_tf.blocks import network_cost, prepared_graph

    folder = files_of(at)
    folder.mkdir(exist_ok=True)
    model, data, times = at.model(), at.data(), table_path(at, "int8")
    images = data.calibration
    # by MACs and by count the same forms are at hand; the table is only asked what they would take
    budgets = {
        "latency": [{"latency": fraction} for fraction in at.fractions],
        "macs": [{"macs": fraction} for fraction in at.macs],
        "merged": [{"merged": number} for number in at.merged],
    }
    with tflite_export.ExportWorker() as worker:
        options = {"quantize": "int8", "calibration": images[:200], "worker": worker, "force": True}
        if not (folder / "original.tflite").exists():
            tflite_export.export(model, folder / "original.tflite", **options)
        for by, asked in budgets.items():
            notes = folder / f"{by}.json"
            told = json.loads(notes.read_text()) if notes.exists() else {}
            asked = [one for one in asked if str(next(iter(one.values()))) not in told]
            if not asked:
                continue
            known = times if by == "latency" else None
            swept = updp_tf.sweep(model, calibration=images, budgets=asked, latency=known, verbose=False)
            for row in swept.plans:  # a budget that another's plan meets as well has none of its own
                small = updp_tf.merge(model, row.plan, calibration=images, verbose=False)
                target = str(next(iter(row.budget.values())))
                path = folder / f"{by}-{target}.tflite"
                tflite_export.export(small, path, **options)
                accuracy = tflite_export.evaluate(path, data.images, data.labels)
                told[target] = {
                    "merged": row.merged,
                    "forms": " ".join(f"{edit.name}={edit.form}" for edit in row.plan.edits),
                    "macs": network_cost(prepared_graph(small)).macs,
                    "predicted_ms": f"{row.cost.latency_ns / 1e6:.4f}" if known else "",
                    "top1": f"{accuracy.top1:.4f}",
                    "n": accuracy.n,
                }
                print(at.name, by, target, told[target], flush=True)
            notes.write_text(json.dumps(told))


def plan_times(at: Setting) -> None:
    """Measure the files that `plans` left, all in turns with the original."""
    import tflite_export

    records, folder = chosen(at), files_of(at)
    found = [
        (by, target, told)
        for by in ("latency", "macs", "merged")
        for target, told in json.loads((folder / f"{by}.json").read_text()).items()
    ]
    if all(records.find(model=at.name, by=by, target=target) for by, target, _ in found):
        return
    paths = [folder / "original.tflite", *(folder / f"{by}-{target}.tflite" for by, target, _ in found)]
    timed = tflite_export.benchmark(paths, min_seconds=at.min_seconds, check_outputs=False).rows[1:]
    for (by, target, told), row in zip(found, timed, strict=True):
        values = {
            "measured_ms": f"{row.median_ms:.4f}",
            "ratio": f"{row.ratio:.4f}",
            "low": f"{row.ratio_low:.4f}",
            "high": f"{row.ratio_high:.4f}",
        }
        records.ensure(lambda values=values, told=told: told | values, model=at.name, by=by, target=target)


def covered(at: Setting) -> Records:
    return Records(at.folder / "interval_coverage.csv", ("state", "number"), ("ratio", "low", "high", "noisy", "load"))


def coverage(at: Setting, state: str = "idle") -> None:
    """Benchmark the network in int8 against a copy of itself."""
    import tflite_export

    records = covered(at)
    if len([row for row in records.rows if row["state"] == state]) >= at.n_runs:
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.tflite" for name in ("one", "copy")]
        tflite_export.export(at.model(), paths[0], quantize="int8", calibration=at.data().calibration[:20])
        paths[1].write_bytes(paths[0].read_bytes())
        for number in range(at.n_runs):
            row = tflite_export.benchmark(paths, check_outputs=False, min_seconds=at.min_seconds).rows[1]
            told = {"ratio": row.ratio, "low": row.ratio_low, "high": row.ratio_high}
            values = {name: f"{value:.4f}" for name, value in told.items()}
            extra = {"noisy": row.noisy, "load": row.device.load_average}
            records.ensure(lambda values=values, extra=extra: values | extra, state=state, number=number)


def report(at: Setting) -> None:
    from scipy.stats import spearmanr

    for row in seconds(at).rows:
        rows = f"{row['rows']} rows, {row['noisy']} noisy"
        print(f"table {row['precision']}: {row['seconds']} s, {rows}; {row['correction']}")
    for precision in PRECISIONS:
        rows = [row for row in predicted(at).rows if row["precision"] == precision]
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
    for row in chosen(at).rows:
        ratio = f"x {row['ratio']} [{row['low']}, {row['high']}]"
        who = f"{row['model']}, by {row['by']:8} {row['target']:>5}"
        print(f"{who}: {row['merged']:>2} merged, {ratio}, top-1 {row['top1']}")
    for model in dict.fromkeys(row["model"] for row in chosen(at).rows):
        for ratio, own, rivals in at_equal_time([row for row in chosen(at).rows if row["model"] == model]):
            told = ", ".join(f"by {by} {100 * top1:.1f}" for by, top1 in rivals.items())
            print(f"{model} at {ratio:.3f} of the time: by latency {100 * own:.1f} %, {told}")
    for state in dict.fromkeys(row["state"] for row in covered(at).rows):
        rows = [row for row in covered(at).rows if row["state"] == state]
        inside = sum(float(row["low"]) <= 1 <= float(row["high"]) for row in rows)
        widest = max(float(row["high"]) - float(row["low"]) for row in rows)
        print(f"{state}: {inside} of {len(rows)} intervals hold 1.00, the widest is {widest:.3f} wide")


def plot(at: Setting) -> None:
    """Draw top-1 against measured time, a panel for each network, as latency_plans.svg."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = chosen(at).rows
    models = list(dict.fromkeys(row["model"] for row in rows))
    names = {"latency": "measured time", "macs": "MACs", "merged": "number of blocks"}
    # without a date and with its own salt: the same picture from the same rows
    with rc_context({"svg.hashsalt": "latency_plans"}):
        figure = Figure(figsize=(4.2 * len(models), 3.4), layout="constrained")
        for axes, model in zip(np.atleast_1d(figure.subplots(1, len(models))), models, strict=True):
            for (by, told), marker in zip(names.items(), "o^s", strict=True):
                found = sorted(
                    (float(row["ratio"]), 100 * float(row["top1"]))
                    for row in rows
                    if (row["model"], row["by"]) == (model, by)
                )
                axes.plot(*zip(*found, strict=True), marker=marker, markersize=4, linewidth=1, label=f"by {told}")
            axes.set_title(model, fontsize=10)
            axes.set_xlabel("measured time of the int8 file, in parts of the original's", fontsize=8)
            axes.set_ylabel("top-1 %, no training", fontsize=8)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        figure.savefig(at.folder / "latency_plans.svg", metadata={"Date": None})


def at_equal_time(rows: list[dict[str, str]]) -> Iterator[tuple[float, float, dict[str, float]]]:
    """Yield for each plan chosen by latency its measured ratio, its top-1, and its rivals' top-1 at that ratio.

    A rival's accuracy between two of its plans lies on the line between them; beyond its fastest it has none.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(row["by"], []).append((float(row["ratio"]), float(row["top1"])))
    for row in rows:
        if row["by"] != "latency":
            continue
        ratio, rivals = float(row["ratio"]), {}
        for by, found in points.items():
            measured = sorted(found)
            if by != "latency" and measured[0][0] <= ratio <= measured[-1][0]:
                rivals[by] = float(np.interp(ratio, *zip(*measured, strict=True)))
        yield ratio, float(row["top1"]), rivals


if __name__ == "__main__":
    parts = {
        "table": table,
        "predictions": predictions,
        "coverage": coverage,
        "plans": plans,
        "plan_times": plan_times,
        "plot": plot,
        "report": report,
    }
    mobilenet = Setting()
    resnet = ResNet56(
        name="resnet56",
        precisions=("int8",),
        fractions=(0.9, 0.8, 0.7, 0.6, 0.5),
        macs=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
        merged=(4, 8, 12, 16, 20, 24, 26, 27),
    )
    convnext = ConvNeXtTiny(name="convnext_tiny", precisions=("float32",), max_seconds=600.0)
    settings = {"table": (mobilenet, resnet, convnext), "plans": (mobilenet, resnet), "plan_times": (mobilenet, resnet)}
    if sys.argv[1] == "rehearse":
        with tempfile.TemporaryDirectory() as made:
            small = Rehearsal(Path(made), "rehearsal", ("int8",), 4.0, 4, (0.95, 0.9), (0.95, 0.9), (1, 2), 2, 0.1)
            for part in parts.values():
                part(small)
    else:
        for name in parts if sys.argv[1] == "all" else sys.argv[1:2]:
            for setting in settings.get(name, (mobilenet,)):
                parts[name](setting, *sys.argv[2:])
