"""What of each model family can be pruned: `python -m tests.coverage_table [NAME ...]`.

For every family in keras.applications (its smallest member and one more) and for backbones of keras_cv and keras_hub:
blocks found and refused, the deepest plan that needs no images, MACs before and after, the largest merge error, and
whether the merged model becomes a float32 and an int8 `.tflite` file. Weights are random in all respects, negative
gammas and tiny variances included. Rows are appended to coverage_table.csv as they are done; models in it are skipped.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import keras
import numpy as np

import tflite_export
from tests import backbones, zoo
from updp_tf.blocks import Blocks, find_blocks, network_cost, prepared_graph
from updp_tf.errors import CalibrationError, UpdpError
from updp_tf.forms import all_forms
from updp_tf.graph import build_model
from updp_tf.merging import Choice, merge_fitted, relative_error
from updp_tf.scoring import score_without_images
from updp_tf.searching import nearest
from updp_tf.structure import Cost

RESULTS = Path(__file__).with_suffix(".csv")

DEEPEST = 1e-3
"""Part of the MACs that no plan reaches: the nearest to it is the deepest one."""


@dataclass(frozen=True)
class Row:
    """One model; MACs in millions, errors relative to the largest value, `-` where there is nothing to tell."""

    model: str
    source: str
    size: int
    params: int
    calls: int
    blocks: int
    linearizable: int
    refused: int
    reasons: str
    merged: int
    forms: str
    macs_before: float
    macs_after: float
    read_error: float
    merge_error: float
    float32: str
    int8: str
    seconds: float
    keras: str


def _application(name: str, **options: object) -> Callable[[int], keras.Model]:
    def build(size: int) -> keras.Model:
        keras.utils.clear_session(free_memory=True)
        make = getattr(keras.applications, name)
        return zoo.randomise(make(input_shape=(size, size, 3), weights=None, include_top=False, **options))

    return build


APPLICATIONS: dict[str, tuple[Callable[[int], keras.Model], int]] = {
    **{
        name: (_application(name), size)
        for name, size in {
            "ConvNeXtTiny": 64,
            "ConvNeXtSmall": 64,
            "DenseNet121": 64,
            "DenseNet169": 64,
            "EfficientNetB0": 64,
            "EfficientNetB1": 64,
            "EfficientNetV2B0": 64,
            "EfficientNetV2B1": 64,
            "InceptionResNetV2": 96,
            "InceptionV3": 96,
            "MobileNet": 64,
            "MobileNetV2": 64,
            "MobileNetV3Small": 64,
            "MobileNetV3Large": 64,
            "NASNetMobile": 64,
            "ResNet50": 64,
            "ResNet101": 64,
            "ResNet50V2": 64,
            "ResNet101V2": 64,
            "VGG16": 64,
            "VGG19": 64,
            "Xception": 96,
        }.items()
    },
    "MobileNet alpha 0.25": (_application("MobileNet", alpha=0.25), 64),
    "MobileNetV2 alpha 0.35": (_application("MobileNetV2", alpha=0.35), 64),
}


def models() -> dict[str, tuple[str, Callable[[int], keras.Model], int]]:
    """Every model by name: where it is from, how it is made, height and width of its images."""
    found = {name: ("keras.applications", make, size) for name, (make, size) in APPLICATIONS.items()}
    for name in backbones.BACKBONES:
        source = {"cv": "keras_cv", "hub": "keras_hub"}[name.partition("_")[0]]
        found[name] = (source, lambda size, name=name: backbones.build(name, size=size), 64)
    return found


def measure(name: str) -> Row:
    """Return the row of one model."""
    source, make, size = models()[name]
    start = time.perf_counter()
    model = make(size)
    x = np.random.default_rng(0).uniform(-1, 1, (4, size, size, 3)).astype("float32")
    blocks = find_blocks(model)
    reasons = Counter(refusal.rule for refusal in blocks.skipped)
    before = network_cost(blocks.graph)
    read = build_model(prepared_graph(model))
    small, forms, error = _deepest(blocks, before)
    after = before if small is None else network_cost(prepared_graph(small))
    exported = {kind: _exported(small or read, kind, x) for kind in ("float32", "int8")}
    return Row(
        model=name,
        source=source,
        size=size,
        params=model.count_params(),
        calls=len(blocks.graph.nodes),
        blocks=len(blocks),
        linearizable=sum(block.linear_refusal is None for block in blocks),
        refused=len(blocks.skipped),
        reasons="; ".join(f"{n} {rule}" for rule, n in reasons.most_common()) or "-",
        merged=sum(forms.values()),
        forms="; ".join(f"{n} {form}" for form, n in forms.most_common()) or "-",
        macs_before=round(before.macs / 1e6, 2),
        macs_after=round(after.macs / 1e6, 2),
        read_error=_largest_error(read, model, x),
        merge_error=error,
        **exported,
        seconds=round(time.perf_counter() - start, 1),
        keras=keras.__version__,
    )


def _deepest(blocks: Blocks, whole: Cost) -> tuple[keras.Model | None, Counter[str], float]:
    """Merge the plan of fewest MACs among the forms that need no images."""
    try:
        scores = score_without_images(blocks, forms=all_forms(), skip="auto", unit="macs", start="gaussian")
    except CalibrationError:
        return None, Counter(), 0.0
    costs = {block.name: block.cost for block in blocks}
    rest = Cost(
        macs=whole.macs - sum(cost.macs for cost in costs.values()),
        params=whole.params - sum(cost.params for cost in costs.values()),
    )
    if not any(one.form != "keep" for one in scores.candidates):
        return None, Counter(), 0.0
    solution, _ = nearest(scores.candidates, blocks=costs, rest=rest, budget={"macs": DEEPEST})
    choices = [Choice(one.blocks[0], one.form, one.options["skip"]) for one in solution.chosen]
    if not choices:
        return None, Counter(), 0.0
    fitted = {one.block: scores.fitted[f"{one.block}={one.form}"] for one in choices}
    merged = merge_fitted(blocks, choices, fitted, kind="linearized")
    return merged.model, Counter(one.form for one in choices), merged.error


def _largest_error(have: keras.Model, want: keras.Model, x: np.ndarray) -> float:
    pairs = zip(zoo.outputs_of(have, x), zoo.outputs_of(want, x), strict=True)
    return max(relative_error(a.astype("float64"), b.astype("float64")) for a, b in pairs)


def _exported(model: keras.Model, kind: str, images: np.ndarray) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = tflite_export.export(model, f"{folder}/m.tflite", quantize=kind, calibration=images)
        except tflite_export.TfliteExportError as error:
            return f"no: {str(error).splitlines()[0][:80]}"
        told = f"{result.size_bytes} bytes"
        return f"{told}, {len(result.float_tensors)} float tensors" if result.float_tensors else told


def done() -> list[str]:
    """Names of the models in the results."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return [row["model"] for row in csv.DictReader(file)]


def append(row: Row) -> None:
    """Add a row to the results."""
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def main(names: Iterable[str]) -> None:
    """Measure the models that have no row yet, all of them where none is named."""
    known = models()
    names = list(names) or list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"Unknown: {', '.join(unknown)}. Known: {', '.join(known)}")
    for name in names:
        if name in done():
            continue
        try:
            row = measure(name)
        except UpdpError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        append(row)
        print(f"{name}: {row.blocks} blocks, {row.merged} merged, {row.macs_before} -> {row.macs_after} M MACs")


if __name__ == "__main__":
    main(sys.argv[1:])
