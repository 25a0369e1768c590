"""Float `.tflite` files against Keras, for every family: `python -m tests.float_equality [NAME ...]`.

The networks of the coverage table as they are, weights random in all respects, norms included. Each becomes a float32
file; 100 random images go through Keras and through LiteRT with XNNPACK, and the largest difference is told in parts of
the largest output, the worst of all outputs. Networks that Keras cannot save are written as they were read. Rows are
appended to float_equality.csv as they are done; models in it are skipped. `pytest tests/test_float_equality.py -m slow`
does it anew for one network of each library.
"""

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import keras
import numpy as np

import tflite_export
from tests import zoo
from tests.coverage_table import models
from tests.experiments.records import Records
from tflite_export import ExportWorker, ModelError
from tflite_export.interpreter import TfliteRunner
from updp_tf.blocks import prepared_graph
from updp_tf.graph import build_model

LARGEST_ERROR = 1e-4
N_IMAGES = 100
_BATCH = 10


def records() -> Records:
    values = (
        "source",
        "size",
        "n",
        "error",
        "outputs",
        "operators",
        "select_operators",
        "xnnpack",
        "written",
    )
    return Records(Path(__file__).with_suffix(".csv"), ("model",), values)


def measure(name: str, worker: ExportWorker) -> dict[str, object]:
    """Return the row of one model; `worker` converts it."""
    source, make, size = models()[name]
    model = make(size)
    images = np.random.default_rng(size).uniform(-1, 1, (N_IMAGES, size, size, 3)).astype("float32")
    with tempfile.TemporaryDirectory() as folder:
        path, written = Path(folder) / "m.tflite", "itself"
        try:
            result = tflite_export.export(model, path, worker=worker)
        except ModelError:
            written = "as read"
            result = tflite_export.export(build_model(prepared_graph(model)), path, worker=worker)
        runner = TfliteRunner(path)
        (input_name,) = result.input_names
        worst = np.zeros((2, len(result.output_names)))  # largest difference, largest output
        for start in range(0, N_IMAGES, _BATCH):
            batch = images[start : start + _BATCH]
            found = runner.run({input_name: batch})
            for i, (wanted, key) in enumerate(zip(zoo.outputs_of(model, batch), result.output_names, strict=True)):
                now = np.abs(found[key].astype("float64") - wanted).max(), np.abs(wanted).max()
                worst[:, i] = np.maximum(worst[:, i], now)
    return {
        "source": source,
        "size": size,
        "n": N_IMAGES,
        "error": f"{(worst[0] / worst[1]).max():.2e}",
        "outputs": len(result.output_names),
        "operators": sum(result.operators.values()),
        "select_operators": len(result.select_operators),
        "xnnpack": runner.delegated,
        "written": written,
    }


def main(names: Iterable[str]) -> None:
    """Measure the models that have no row yet, all of them where none is named."""
    rows = records()
    with ExportWorker() as worker:
        for name in list(names) or list(models()):
            rows.ensure(lambda name=name: measure(name, worker), model=name)
            keras.utils.clear_session(free_memory=True)


if __name__ == "__main__":
    main(sys.argv[1:])
