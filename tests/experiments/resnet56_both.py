"""ResNet-56 on CIFAR-10: depth, width, and both under one budget, without training, and the int8 speed of each.

    uv run --frozen python -m tests.experiments.resnet56_both accuracy FOLDER
    uv run --frozen python -m tests.experiments.resnet56_both timed FOLDER [LESS ...]
    uv run --frozen python -m tests.experiments.resnet56_both latency FOLDER
    uv run --frozen python -m tests.experiments.resnet56_both files FOLDER

`accuracy` (budgets in MACs) and `timed` (budgets in time, int8, one thread of this machine) write resnet56_both.csv
beside this file, row by row, and each network as an int8 file into FOLDER; what is there is not run again. 600
calibration images from the training images; accuracy on 1,000 test images, which choose nothing. Merged blocks become
fitted 3x3 convolutions; widths are multiples of 8, channels ranked by l2. `less` is the factor by which the unit had to
fall. `latency` times all files of FOLDER in turns, one thread, and writes resnet56_both_latency.csv. `files` evaluates
those of budgets in time on the 10,000 JPEG-compressed test images and writes resnet56_both_files.csv: the network was
trained on lossless images, but ten times as many tell smaller differences.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tests.experiments.mobilenet_v2_merging import pack
from tests.experiments.records import HERE, Records, shared_loader
from tests.experiments.resnet56_merging import N_CALIBRATION, latency_row, macs_of, predict

LESS = {"macs": (1.5, 2.0, 1.7, 1.3), "latency": (1.5, 1.66, 2.0, 1.3)}
WAYS = {"macs": ("width", "depth", "both", "one shot"), "latency": ("width", "depth", "both")}


def accuracy(folder: Path, unit: str = "macs", factors: tuple[float, ...] = ()) -> None:
    load = shared_loader()
    import tflite_export

    folder.mkdir(parents=True, exist_ok=True)
    values = ("macs", "merged", "ratio", "splits", "top1", "n_test")
    records = Records(HERE / "resnet56_both.csv", ("draw", "way", "unit", "less"), values)
    model = load.resnet56()
    (x_train, _), (x_test, y_test) = load.cifar10()
    x_test = load.cifar_preprocess(x_test)
    draw = 0
    chosen = np.random.default_rng(draw).choice(len(x_train), N_CALIBRATION, replace=False)
    images = load.cifar_preprocess(x_train[chosen])

    timed = {}
    if unit == "latency":
        import updp_tf

        table = updp_tf.measure_latency(model, out=folder / "table.csv", precision="int8", forms=["conv3"])
        timed = {"latency": table, "target": updp_tf.Target(precision="int8")}

    def row(way: str, less: float) -> dict[str, object]:
        from updp_tf.errors import BudgetError

        try:
            small, merged, ratio, splits = network(model, images, way, {unit: 1 / less}, **timed)
        except BudgetError as error:
            print(error, flush=True)
            return dict.fromkeys(values, "") | {"n_test": len(y_test)}  # out of reach
        path = folder / name_of(way, unit, less)
        tflite_export.export(small, path, quantize="int8", calibration=images[:100], force=True)
        top1 = float((predict(small, x_test).argmax(-1) == y_test).mean())
        return {
            "macs": macs_of(small),
            "merged": merged,
            "ratio": f"{ratio:.3f}",
            "splits": splits,
            "top1": f"{top1:.4f}",
            "n_test": len(y_test),
        }

    if not (folder / "original.tflite").exists():
        tflite_export.export(model, folder / "original.tflite", quantize="int8", calibration=images[:100])
    for less in factors or LESS[unit]:
        for way in WAYS[unit]:
            records.ensure(lambda way=way, less=less: row(way, less), draw=draw, way=way, unit=unit, less=less)


def network(model, images, way: str, budget, latency=None, target=None):
    """A network in a budget: with how many blocks merged, which part of the channels cut, out of how many splits."""
    import updp_tf
    from updp_tf.blocks import find_blocks
    from updp_tf.cost import Budget
    from updp_tf.forms import form_by_name
    from updp_tf.isomorphic.ranking import Ranking
    from updp_tf.merging import Choice, merge_in_sequence
    from updp_tf.scoring import score
    from updp_tf.sharing import share_budget

    width = updp_tf.Width(importance="l2")
    if way == "width":
        small = updp_tf.narrow(model, budget=budget, calibration=images, importance="l2", target=target)
        return small, 0, small.narrowing.ratio, 1
    asked = {"budget": budget, "calibration": images, "forms": ["conv3"], "latency": latency}
    if way == "depth":
        small = updp_tf.prune(model, **asked)
        return small, len(small.pruning.blocks), 0.0, 1
    if way == "both":
        small = updp_tf.prune(model, **asked, target=target, width=width)
        print(*small.pruning.notes, sep="\n", flush=True)
        told = small.pruning
        return small, len(told.blocks), 0.0 if told.narrowing is None else told.narrowing.ratio, len(told.notes)
    blocks = find_blocks(model)
    scores = score(blocks, images, forms=[form_by_name("conv3")])

    def merged(chosen):
        choices = [Choice(one.blocks[0], one.form, one.options["skip"]) for one in chosen]
        return merge_in_sequence(blocks, choices, images, refit=True)

    (split,) = share_budget(
        blocks,
        scores.candidates,
        Budget.parse(budget),
        Ranking(width, images),
        merge=merged,
        loss=None,
        memory_bytes=2 << 30,
        progress=None,
    )
    ratio = 0.0 if split.narrowing is None else split.narrowing.ratio
    return split.model, split.solution.merged, ratio, 1


def name_of(way: str, unit: str, less: float) -> str:
    timed = "timed_" if unit == "latency" else ""
    return f"{timed}{way.replace(' ', '_')}_{less}.tflite"


def files_of(folder: Path, units: Iterable[str]) -> dict[tuple[str, str, float], Path]:
    """The original's file and those of some units that are there, by way, unit and factor."""
    files = {("original", "-", 1.0): folder / "original.tflite"}
    files |= {
        (way, unit, less): folder / name_of(way, unit, less)
        for unit in units
        for way in WAYS[unit]
        for less in sorted(LESS[unit])
    }
    return {key: path for key, path in files.items() if path.exists()}


def evaluate(folder: Path) -> None:
    from tflite_export.evaluation import run_tflite

    records = Records(HERE / "resnet56_both_files.csv", ("way", "unit", "less"), ("top1", "n", "hits"))
    load = shared_loader()
    x, y = load.cifar10_jpeg("test")
    x = load.cifar_preprocess(x)

    def row(path: Path) -> dict[str, object]:
        hits = run_tflite(path, x).reshape(len(x), -1).argmax(axis=1) == y
        return {"top1": f"{hits.mean():.4f}", "n": len(x), "hits": pack(hits)}

    for (way, unit, less), path in files_of(folder, ("latency",)).items():
        records.ensure(lambda path=path: row(path), way=way, unit=unit, less=less)


def latency(folder: Path) -> None:
    import tflite_export

    columns = ("size_bytes", "median_ms", "p10_ms", "p90_ms", "ratio", "low", "high", "n", "threads", "runtime")
    records = Records(HERE / "resnet56_both_latency.csv", ("way", "unit", "less"), columns)
    files = files_of(folder, LESS)
    table = tflite_export.benchmark(list(files.values()), threads=1)
    for (way, unit, less), result in zip(files, table.rows, strict=True):
        records.ensure(lambda result=result: latency_row(result), way=way, unit=unit, less=less)


if __name__ == "__main__":
    what, where, *given = sys.argv[1:]
    if what in ("latency", "files"):
        {"latency": latency, "files": evaluate}[what](Path(where))
    else:
        accuracy(Path(where), "latency" if what == "timed" else "macs", tuple(float(one) for one in given))
