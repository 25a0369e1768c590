"""How every model family narrows: `python -m tests.width_table [NAME ...]`.

For every family in keras.applications and backbones of keras_cv and keras_hub, a quarter and a half of the channels of
every isomorphic class are cut, residual streams included. The narrowed model is compared with the oracle (the original
with the kernels zeroed that read what was cut), trained for a step, saved, loaded, and, with half of the channels,
exported to int8. Weights are random in all respects. Rows are appended to width_table.csv as they are done; models in
it are skipped.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import keras
import numpy as np

import tflite_export
from tests.coverage_table import models
from tests.isomorphic.narrow_zoo import logits_of
from tests.isomorphic.oracle import largest_error
from updp_tf.expansions import expand
from updp_tf.graph import build_model, read_graph
from updp_tf.isomorphic.cutting import cut_units
from updp_tf.isomorphic.dependency import Dependencies, find_dependencies
from updp_tf.isomorphic.importance import group_scores
from updp_tf.isomorphic.scopes import choose_units

RESULTS = Path(__file__).with_suffix(".csv")

RATIOS = (0.25, 0.5)


@dataclass(frozen=True)
class Row:
    """One model and ratio; `oracle_error` is relative to the largest output."""

    model: str
    source: str
    size: int
    ratio: float
    groups: int
    classes: int
    left_whole: int
    reasons: str
    params: int
    params_after: int
    oracle_error: str
    trained: str
    loaded: str
    int8: str
    keras: str


def measure(name: str, *, export: bool = True) -> list[Row]:
    """Return the rows of one model."""
    source, make, size = models()[name]
    model = logits_of(make(size))
    dependencies = find_dependencies(expand(read_graph(model)))
    # pixels where the network scales them itself: else its outputs would hardly depend on the image
    low, high = (0, 255) if any(node.kind == "Rescaling" for node in dependencies.graph) else (-1, 1)
    x = np.random.default_rng(0).uniform(low, high, (2, size, size, 3)).astype("float32")
    scores = group_scores(dependencies, "l2")
    rows = []
    for ratio in RATIOS:
        cut = choose_units(dependencies.groups, scores, ratio, scope="isomorphic", round_to=8)
        small = build_model(cut_units(dependencies, cut))
        error = largest_error(dependencies, cut, small, x)
        trained, loaded = _trained(small, x), _loaded(small, x)
        rows.append(
            Row(
                model=name,
                source=source,
                size=size,
                ratio=ratio,
                groups=len(dependencies.groups),
                classes=len({group.signature for group in dependencies.groups}),
                left_whole=len(dependencies.boundaries),
                reasons=_reasons(dependencies),
                params=model.count_params(),
                params_after=small.count_params(),
                oracle_error=f"{error:.1e}",
                trained=trained,
                loaded=loaded,
                int8=_int8(small, x) if export and ratio == RATIOS[-1] else "-",
                keras=keras.__version__,
            )
        )
    return rows


def _reasons(dependencies: Dependencies) -> str:
    """Kinds of calls that keep channels whole for want of a rule."""
    kinds = {dependencies.graph.by_name[one.site].kind for one in dependencies.boundaries if one.rule == "coupling"}
    return " ".join(sorted(kinds)) or "-"


def _trained(small: keras.Model, x: np.ndarray) -> str:
    """Train a copy for a step; random networks may be too steep for a number to come out, so that a step is small."""
    copy = keras.models.clone_model(small)
    copy.set_weights(small.get_weights())
    wanted = keras.tree.map_structure(lambda one: np.zeros(one.shape), copy(x, training=False))
    copy.compile(keras.optimizers.SGD(1e-9), "mse")
    copy.train_on_batch(x, wanted)
    return "yes"


def _loaded(small: keras.Model, x: np.ndarray) -> str:
    with tempfile.TemporaryDirectory() as folder:
        small.save(f"{folder}/small.keras")
        loaded = keras.saving.load_model(f"{folder}/small.keras", safe_mode=False)
    have, want = (keras.tree.flatten(one(x, training=False)) for one in (loaded, small))
    for one, other in zip(have, want, strict=True):
        one, other = keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(other)
        if not np.allclose(one, other, atol=1e-5 * np.abs(other).max()):
            return "differs"
    return "yes"


def _int8(small: keras.Model, x: np.ndarray) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = tflite_export.export(small, f"{folder}/m.tflite", quantize="int8", calibration=x)
        except tflite_export.TfliteExportError as error:
            return f"no: {str(error).splitlines()[0][:80]}"
    return f"{result.size_bytes} bytes"


def results() -> list[Row]:
    """What has been measured; the numbers are text."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def append(rows: list[Row]) -> None:
    """Add rows to the results."""
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main(names: list[str]) -> None:
    """Measure models, by default all that the results lack."""
    for name in names or [name for name in models() if name not in {row.model for row in results()}]:
        rows = measure(name)
        append(rows)
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
