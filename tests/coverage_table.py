"""What of each model family can be pruned: `python -m tests.coverage_table [NAME ...]`.

For every family in keras.applications (its smallest member and one more) and for backbones of keras_cv and keras_hub:
blocks found and refused, the plan that merges every block that has a form, MACs before and after, whether the merged
model becomes a float32 and an int8 `.tflite` file without select operators, and the largest error of a merged network
against the student that it was at blend 0, at two sizes of images, borders included. There are two such students:
whole blocks blended with what their forms write, and every block that can be expanded, expanded. Weights are random in
all respects, negative gammas and tiny variances included; nothing here is about accuracy. Rows are appended to
coverage_table.csv as they are done; models in it are skipped.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tflite_export
from tests import backbones, zoo
from tflite_export.worker import ExportWorker
from updp_tf.blend_starts import start
from updp_tf.blocks import Blocks, find_blocks, network_cost, prepared_graph
from updp_tf.errors import UpdpError
from updp_tf.expanding import Surgeon
from updp_tf.forms import ConvForm, SeparableForm, all_forms
from updp_tf.graph import build_model, read_graph, run_nodes
from updp_tf.merging import Choice, Merged, merge_in_sequence, relative_error
from updp_tf.schedule import Schedule
from updp_tf.scoring import CalibrationWarning, eligible_forms, skip_mode
from updp_tf.settling import merged_student
from updp_tf.structure import Block
from updp_tf.training import blend_layers

RESULTS = Path(__file__).with_suffix(".csv")

LESS_THAN_ALL = ("remove", "scale")
"""Forms that mix neither pixels nor channels: taken where a block has no other."""

N_IMAGES = 20
"""Fewer than a fit should see: that layers come out right is asked here, not what they are worth."""

RIDGE = 1.0
"""So strong that maps fitted to few images do not blow up the rounding of what is in front of them."""

FURTHER = 32
"""Pixels that the second size is larger by: all strides together, so that paddings fall as at the first."""

LARGEST_COMPOSED = 5_000_000
"""Weights of a composed layer beyond which a block is not expanded: more of the same, in gigabytes."""


@dataclass(frozen=True)
class Row:
    """One model; MACs in millions, errors relative to the largest value, `-` where there is nothing to tell.

    Attributes:
        prunable: blocks that have a form other than `remove` and `scale` that is no dearer than they are.
        forms: of the plan that merges every block, each in its cheapest such form.
        blend0_error: of the merged networks against their students at blend 0, at the size of the row.
        blend0_error_further: the same, `FURTHER` pixels larger.
        expanded: blocks of the second student.
        without_form: why blocks are not merged, with how many.
    """

    model: str
    source: str
    size: int
    params: int
    calls: int
    blocks: int
    linearizable: int
    prunable: int
    refused: int
    reasons: str
    merged: int
    forms: str
    without_form: str
    macs_before: float
    macs_after: float
    read_error: float
    expanded: int
    blend0_error: float
    blend0_error_further: float
    float32: str
    int8: str
    cpu_seconds: float
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
            "NASNetLarge": 64,
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


def measure(name: str, worker: ExportWorker) -> Row:
    """Return the row of one model; `worker` converts it."""
    source, make, size = models()[name]
    started = time.process_time()
    model = make(size)
    x = _images(size)
    blocks = find_blocks(model)
    read = build_model(prepared_graph(model))
    read_error = _largest_error(zoo.outputs_of(read, x[:4]), zoo.outputs_of(model, x[:4]))
    merged, without = _all_merged(blocks, x)
    small = read if merged is None else merged.model
    exported = {kind: _exported(small, kind, x, worker) for kind in ("float32", "int8")}
    students = _students(blocks, merged, x)
    further = _images(size + FURTHER)
    if _takes(model, further):
        further_error = _error(students, further)
    else:
        others = find_blocks(make(size + FURTHER))
        further_error = _error(_students(others, _all_merged(others, further)[0], further), further)
    forms = Counter(one.form for one in merged.blocks) if merged else Counter()
    return Row(
        model=name,
        source=source,
        size=size,
        params=model.count_params(),
        calls=len(blocks.graph.nodes),
        blocks=len(blocks),
        linearizable=sum(block.linear_refusal is None for block in blocks),
        prunable=sum(n for form, n in forms.items() if form not in LESS_THAN_ALL),
        refused=len(blocks.skipped),
        reasons=_told(Counter(refusal.rule for refusal in blocks.skipped)),
        merged=sum(forms.values()),
        forms=_told(forms),
        without_form=_told(without),
        macs_before=round(network_cost(blocks.graph).macs / 1e6, 2),
        macs_after=round(network_cost(prepared_graph(small)).macs / 1e6, 2),
        read_error=read_error,
        expanded=students.n_expanded,
        blend0_error=_error(students, x),
        blend0_error_further=further_error,
        **exported,
        cpu_seconds=round(time.process_time() - started, 1),
        keras=keras.__version__,
    )


def _images(size: int) -> np.ndarray:
    return np.random.default_rng(size).uniform(-1, 1, (N_IMAGES, size, size, 3)).astype("float32")


def _told(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{n} {what}" for what, n in Counter(counts).most_common()) or "-"


def _all_merged(blocks: Blocks, images: np.ndarray) -> tuple[Merged | None, Counter[str]]:
    """Merge every block, each in its cheapest form; say why others have none."""
    choices: list[Choice] = []
    without: Counter[str] = Counter()
    for block in blocks:
        able, refusals = eligible_forms(block, forms=all_forms(), skip="auto", unit="macs")
        wanted = [one for one in able if one[0].name not in LESS_THAN_ALL] or able
        if wanted:
            form, mode = min(wanted, key=lambda one: one[0].cost(block, skip=one[1]).macs)
            choices.append(Choice(block.name, form.name, mode))
        else:
            without.update({refusal.reason.partition(":")[0] for refusal in refusals})
    if not choices:
        return None, without
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return merge_in_sequence(blocks, choices, images, reestimate=False, ridge=RIDGE), without


@dataclass(frozen=True)
class Students:
    """Networks at blend 0, each with what it merges to."""

    pairs: tuple[tuple[keras.Model, keras.Model], ...]
    n_expanded: int


def _students(blocks: Blocks, merged: Merged | None, images: np.ndarray) -> Students:
    """Blend whole blocks with their fitted forms; and expand every block that can be."""
    students: list[keras.Model] = []
    if merged is not None:
        surgeon = Surgeon(blocks.graph)
        for name, fitted in merged.fitted.items():
            surgeon.double(blocks[name], fitted, _options(blocks[name]))
        students.append(build_model(surgeon.graph))
    surgeon = Surgeon(blocks.graph)
    n_expanded = sum([_expand(surgeon, block) for block in blocks])
    if n_expanded:
        start(surgeon.graph, images, "least_squares", surgeon.rings)
        students.append(build_model(surgeon.graph))
    for student in students:
        for layer in blend_layers(student):
            layer.step.assign(1)
    return Students(tuple((merged_student(student)[0], student) for student in students), n_expanded)


def _error(students: Students, images: np.ndarray) -> float:
    return max((_largest_error(*(_run(one, images[:2]) for one in pair)) for pair in students.pairs), default=0.0)


def _takes(model: keras.Model, images: np.ndarray) -> bool:
    """True where a network runs at another size of images than it was built for."""
    try:
        _run(model, images[:1])
    except (ValueError, tf.errors.InvalidArgumentError):
        return False
    return True


def _expand(surgeon: Surgeon, block: Block) -> bool:
    mode = skip_mode(block, "auto")
    for form in all_forms():
        if not isinstance(form, ConvForm | SeparableForm) or form.refuses(block, skip=mode) is not None:
            continue
        if form.cost(block, skip=mode).params > LARGEST_COMPOSED:
            continue
        if surgeon.expand(block, form.name, mode, "sigma", _options(block)) is None:
            return True
    return False


def _options(block: Block) -> dict[str, Any]:
    begin, end = Schedule().window(0, 1)
    return {"begin": begin, "end": end, "total_steps": 1, "block": block.name}


def _run(model: keras.Model, images: np.ndarray) -> list[np.ndarray]:
    """Run a network call by call, at a size that it was not built for."""
    graph = read_graph(model)
    values = {ref: keras.ops.convert_to_tensor(images) for ref in graph.input_refs}
    run_nodes(graph, values)
    return [np.asarray(values[ref], "float32") for ref in graph.output_refs]


def _largest_error(have: list[np.ndarray], want: list[np.ndarray]) -> float:
    pairs = zip(have, want, strict=True)
    return max(relative_error(a.astype("float64"), b.astype("float64")) for a, b in pairs)


def _exported(model: keras.Model, kind: str, images: np.ndarray, worker: ExportWorker) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = tflite_export.export(model, f"{folder}/m.tflite", quantize=kind, calibration=images, worker=worker)
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
    with ExportWorker() as worker:
        for name in names:
            if name in done():
                continue
            try:
                row = measure(name, worker)
            except UpdpError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            append(row)
            told = f"{row.macs_before} -> {row.macs_after} M MACs"
            print(f"{name}: {row.blocks} blocks, {row.merged} merged, {told}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
