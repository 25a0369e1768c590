"""The offline first run: train a small network on real digits, prune it, export both, evaluate and time them."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import keras
import numpy as np

import tflite_export
from updp_tf.blocks import network_cost, prepared_graph
from updp_tf.errors import OutputError
from updp_tf.pruning import prune
from updp_tf.reporting import PruningReport
from updp_tf.run_dir import write_atomically

SIZE = 32
"""Pixels to a side: the 8x8 digits are scaled up, so that an inference is long enough to time."""

N_TEST = 600
N_CALIBRATION = 400
BUDGET = {"macs": 0.7}
"""Fixed beforehand: the test images have no say in it."""

PRECISIONS = ("float32", "int8")
NETWORKS = ("original", "pruned")
FILES = (
    *(f"{network}.keras" for network in NETWORKS),
    *(f"{network}_{precision}.tflite" for network in NETWORKS for precision in PRECISIONS),
    "plan.json",
    "images.npz",
    "demo.csv",
    "demo.json",
    "demo.png",
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoRow:
    """One `.tflite` file: what it gets right, what it costs.

    Attributes:
        network: "original" or "pruned".
        precision: "float32" or "int8".
        file: its name.
        n: number of test images.
        accuracy: share of them that it classifies rightly.
        standard_error: one standard error of that share.
        size_bytes: of the file.
        macs: multiply-accumulates for one image.
        params: parameters of the Keras model.
        median_ms: median time of one image, from the run with all four files in turns; p10_ms, p90_ms likewise.
        p10_ms: tenth percentile.
        p90_ms: ninetieth percentile.
        runs: how many were timed.
        ratio: its time over that of the original in the same precision; 1 for the original.
        ratio_low: lower end of the 95 % interval of the ratio.
        ratio_high: upper end.
        ratio_to_float32: its time over that of the original in float32.
        device: what it was timed on, with runtime and threads.
    """

    network: str
    precision: str
    file: str
    n: int
    accuracy: float
    standard_error: float
    size_bytes: int
    macs: int
    params: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_to_float32: float
    device: str

    @property
    def verdict(self) -> str:
        """Whether the interval lies below 1, above, or around it."""
        if self.network == "original":
            return ""
        if self.ratio_high < 1:
            return "faster"
        return "slower" if self.ratio_low > 1 else "no measurable difference"


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; prints as the table.

    Attributes:
        folder: where its files lie.
        rows: one for each of the four files.
        report: what pruning did.
        n_calibration: images that the pruning and the int8 ranges were fitted to.
        seconds: how long it took.
    """

    folder: Path
    rows: tuple[DemoRow, ...]
    report: PruningReport
    n_calibration: int
    seconds: float

    @property
    def plot(self) -> Path:
        """The picture of the table."""
        return self.folder / "demo.png"

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "folder": str(self.folder),
            "rows": [asdict(row) | {"verdict": row.verdict} for row in self.rows],
            "pruning": self.report.as_json(),
            "n_calibration": self.n_calibration,
            "seconds": self.seconds,
        }

    def as_csv(self) -> str:
        """Return the rows as a CSV document with a header."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(DemoRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()

    def __str__(self) -> str:
        header = ("", "", "accuracy", "size", "MACs", "median", "time / original (95 %)", "")
        lines = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join(
            [
                *(line.rstrip() for line in table),
                "",
                f"Accuracy on {self.rows[0].n} test images (+- one standard error), which were used for nothing else; "
                f"pruned and quantized with {self.n_calibration} training images, without labels or training.",
                f"Times on {self.rows[0].device}; all files in turns.",
                str(self.report),
            ]
        )


def _cells(row: DemoRow) -> tuple[str, ...]:
    interval = f"{row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f})"
    return (
        row.network,
        row.precision,
        f"{100 * row.accuracy:.1f} % +- {100 * row.standard_error:.1f}",
        f"{row.size_bytes / 1000:.0f} kB",
        f"{row.macs / 1e6:.1f} M",
        f"{row.median_ms:.3f} ms",
        interval if row.network == "pruned" else "1",
        row.verdict,
    )


def run_demo(
    folder: str | os.PathLike[str],
    *,
    epochs: int = 6,
    n_train: int | None = None,
    budget: Mapping[str, float] = BUDGET,
    min_seconds: float = 3.0,
    force: bool = False,
    say: Say | None = None,
    verbose: bool = True,
) -> DemoResult:
    """Train a small MobileNetV2 on scikit-learn's handwritten digits, prune it, and measure before and after.

    Nothing is downloaded. The 1,797 images are split at random, evenly by class, into training and test images; the
    calibration images are training images. The folder then holds both networks as `.keras` files, each as a float32
    and an int8 `.tflite` file, the plan, the images (`calibration`, `test`, `labels` in `images.npz`), the table as CSV
    and JSON, and a plot.

    Args:
        folder: where the files go; it is made if it is not there.
        epochs: of training.
        n_train: train on this many of the training images; on all of them where None.
        budget: as for `prune`.
        min_seconds: least running time of each file in each benchmark.
        force: replace files of an earlier run.
        say: called with a line for people at each step.
        verbose: show bars on standard error while pruning.

    Raises:
        OutputError: the folder cannot be made, or holds files of an earlier run and `force` is False.
    """
    started = time.perf_counter()
    folder = Path(folder)
    _prepare(folder, force=force)

    def tell(line: str) -> None:
        if say is not None:
            say(f"[{time.perf_counter() - started:4.0f} s] {line}")

    (x_train, y_train), (x_test, y_test) = load_digits()
    x_train, y_train = x_train[:n_train], y_train[:n_train]
    model = small_mobilenet()
    train(model, x_train, y_train, epochs=epochs, tell=tell)
    calibration = x_train[:N_CALIBRATION]
    tell(f"pruning to {', '.join(f'{key} {value}' for key, value in budget.items())} on {len(calibration)} images")
    small = prune(model, calibration=calibration, budget=budget, verbose=verbose)
    report: PruningReport = small.pruning
    models = dict(zip(NETWORKS, (model, small), strict=True))
    for network, one in models.items():
        with write_atomically(folder / f"{network}.keras", force=force) as file:
            one.save(file)
    report.plan.save(folder / "plan.json", force=force)
    with write_atomically(folder / "images.npz", force=force) as file:
        np.savez_compressed(file, calibration=calibration, test=x_test, labels=y_test)
    _export(models, folder, calibration, force=force, tell=tell)
    rows = _measure(models, folder, x_test, y_test, min_seconds=min_seconds, tell=tell)
    result = DemoResult(folder, rows, report, len(calibration), round(time.perf_counter() - started, 1))
    _write(result, force=force)
    tell(f"wrote {len(FILES)} files to '{folder}'; the plot is '{result.plot}'")
    return result


def _prepare(folder: Path, *, force: bool) -> None:
    """Make the folder, or say before any work why it cannot be used."""
    found = [name for name in FILES if (folder / name).exists()]
    if found and not force:
        raise OutputError(
            f"'{folder}' holds '{found[0]}' of an earlier run: choose another folder (--out), or replace its files "
            "with force=True (--force)."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make the folder '{folder}': {error.strerror or error}.") from error


Split = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def load_digits() -> Split:
    """Return ((training images, labels), (test images, labels)); images (n, 32, 32, 1) in [-1, 1].

    The split is at random, so digits of the same writers are in both parts: an easier test than new writers.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    digits = datasets.load_digits()
    images = (digits.images / 8 - 1).astype("float32")[..., None]
    scaled = keras.ops.image.resize(images, (SIZE, SIZE), interpolation="bilinear")
    x_train, x_test, y_train, y_test = train_test_split(
        keras.ops.convert_to_numpy(scaled), digits.target, test_size=N_TEST, stratify=digits.target, random_state=0
    )
    return (x_train, y_train), (x_test, y_test)


def small_mobilenet() -> Any:
    """Return an untrained MobileNetV2 in small: seven inverted residual blocks, 15 million MACs."""
    keras.utils.set_random_seed(0)
    image = keras.Input((SIZE, SIZE, 1), name="image")
    x = _conv(image, 16, 3, "stem", strides=2)
    x = _inverted_residual(x, 16, 1, "block0", expansion=1)
    for number, (filters, strides) in enumerate(((32, 1), (32, 1), (32, 1), (48, 2), (48, 1), (48, 1)), start=1):
        x = _inverted_residual(x, filters, strides, f"block{number}", expansion=6)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(_conv(x, 128, 1, "head"))
    digit = keras.layers.Dense(10, activation="softmax", name="digit")(x)
    return keras.Model(image, digit, name="digits_mobilenet")


def _conv(x: Any, filters: int, kernel_size: int, name: str, *, strides: int = 1) -> Any:
    x = keras.layers.Conv2D(filters, kernel_size, strides=strides, padding="same", use_bias=False, name=name)(x)
    return _norm_and_relu(x, name)


def _norm_and_relu(x: Any, name: str) -> Any:
    return keras.layers.ReLU(6.0, name=f"{name}_relu")(_norm(x, name))


def _norm(x: Any, name: str) -> Any:
    # Keras' own momentum of 0.99 would still hold the initial statistics after a hundred steps.
    return keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)


def _inverted_residual(x: Any, filters: int, strides: int, name: str, *, expansion: int) -> Any:
    c_in = x.shape[-1]
    y = _conv(x, expansion * c_in, 1, f"{name}_expand") if expansion > 1 else x
    y = keras.layers.DepthwiseConv2D(3, strides=strides, padding="same", use_bias=False, name=f"{name}_depthwise")(y)
    y = _norm_and_relu(y, f"{name}_depthwise")
    y = _norm(keras.layers.Conv2D(filters, 1, use_bias=False, name=f"{name}_project")(y), f"{name}_project")
    return keras.layers.Add(name=f"{name}_add")([x, y]) if strides == 1 and c_in == filters else y


def train(model: Any, images: np.ndarray, labels: np.ndarray, *, epochs: int, tell: Say) -> None:
    """Train with Adam and a cosine schedule; a minute on two cores is enough for digits."""
    batch_size = 64
    steps = epochs * -(-len(images) // batch_size)

    def report(epoch: int, logs: Mapping[str, float]) -> None:
        tell(f"training, epoch {epoch + 1} of {epochs}: {100 * logs['accuracy']:.1f} % of the training images right")

    tell(f"training a network of {model.count_params():,} parameters on {len(images)} images")
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(4e-3, steps)),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,  # compiling for a CPU takes longer than all epochs
    )
    callback = keras.callbacks.LambdaCallback(on_epoch_end=report)
    model.fit(images, labels, batch_size=batch_size, epochs=epochs, verbose=0, callbacks=[callback])


def _path(folder: Path, network: str, precision: str) -> Path:
    return folder / f"{network}_{precision}.tflite"


def _export(models: Mapping[str, Any], folder: Path, calibration: np.ndarray, *, force: bool, tell: Say) -> None:
    with tflite_export.ExportWorker() as worker:
        for precision in PRECISIONS:
            tell(f"exporting both networks as {precision}")
            pairs = [(model, _path(folder, network, precision)) for network, model in models.items()]
            tflite_export.export_many(pairs, quantize=precision, calibration=calibration, force=force, worker=worker)


def _measure(
    models: Mapping[str, Any], folder: Path, images: np.ndarray, labels: np.ndarray, *, min_seconds: float, tell: Say
) -> tuple[DemoRow, ...]:
    keys = [(network, precision) for precision in PRECISIONS for network in NETWORKS]
    paths = [_path(folder, *key) for key in keys]
    tell(f"evaluating {len(paths)} files on {len(images)} test images")
    evaluations = [tflite_export.evaluate(path, images, labels, top=(1,)) for path in paths]
    tell("timing all files in turns, one thread; then the int8 pair once more, for its own ratio")
    timed = tflite_export.benchmark(paths, min_seconds=min_seconds).rows
    pair = tflite_export.benchmark(paths[2:], min_seconds=min_seconds).rows
    costs = {network: network_cost(prepared_graph(model)) for network, model in models.items()}
    own = [timed[0], timed[1], pair[0], pair[1]]
    device = timed[0].device
    return tuple(
        DemoRow(
            network=network,
            precision=precision,
            file=row.path.name,
            n=evaluation.n,
            accuracy=evaluation.top1,
            standard_error=evaluation.standard_error[1],
            size_bytes=row.size_bytes,
            macs=costs[network].macs,
            params=costs[network].params,
            median_ms=row.median_ms,
            p10_ms=row.p10_ms,
            p90_ms=row.p90_ms,
            runs=row.n,
            ratio=ratio.ratio,
            ratio_low=ratio.ratio_low,
            ratio_high=ratio.ratio_high,
            ratio_to_float32=row.ratio,
            device=f"{device.description}, {device.system}, {device.runtime}, {row.delegate}, {row.threads} thread",
        )
        for (network, precision), evaluation, row, ratio in zip(keys, evaluations, timed, own, strict=True)
    )


def _write(result: DemoResult, *, force: bool) -> None:
    with write_atomically(result.folder / "demo.csv", force=force) as file:
        file.write_text(result.as_csv(), encoding="utf-8")
    with write_atomically(result.folder / "demo.json", force=force) as file:
        file.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    with write_atomically(result.plot, force=force) as file:
        draw(result).savefig(file, dpi=150)


def draw(result: DemoResult) -> Any:
    """Return a figure of two panels: accuracy with standard errors, and time with its ratio to the original."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    places = [0.0, 1.0, 2.4, 3.4]
    before, after = result.report.before.macs / 1e6, result.report.after.macs / 1e6
    figure.suptitle(
        f"Handwritten digits: {len(result.report.blocks)} blocks merged without training, "
        f"{before:.1f} M to {after:.1f} M MACs",
        fontsize=11,
    )
    for place, row in zip(places, result.rows, strict=True):
        _draw_accuracy(left, place, row)
        _draw_time(right, place, row)
    left.set_title(f"Right answers on {result.rows[0].n} test images, one standard error", fontsize=10)
    left.set_ylabel("%")
    left.margins(y=0.25)
    left.grid(axis="y", alpha=0.3)
    right.set_title("Time of one image, one thread; ratio to the original and its 95 % interval", fontsize=10)
    right.set_ylabel("median, ms")
    right.set_ylim(0, 1.12 * max(row.median_ms for row in result.rows))
    for panel in (left, right):
        panel.set_xticks(places, [f"{row.network}\n{row.precision}" for row in result.rows])
        panel.set_xlim(-0.7, 4.1)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


COLOURS = {"original": ("#6b7078", "#cfd3d9"), "pruned": ("#1769aa", "#9ccbee")}
"""Of lines and areas."""


def _draw_accuracy(panel: Any, place: float, row: DemoRow) -> None:
    accuracy, error = 100 * row.accuracy, 100 * row.standard_error
    panel.errorbar(place, accuracy, error, fmt="o", color=COLOURS[row.network][0], capsize=5, markersize=8, linewidth=2)
    panel.annotate(f"{accuracy:.1f}", (place, accuracy), (9, 0), textcoords="offset points", va="center")


def _draw_time(panel: Any, place: float, row: DemoRow) -> None:
    panel.bar(place, row.median_ms, width=0.96, color=COLOURS[row.network][1])
    panel.annotate(f"{row.median_ms:.3f} ms", (place, row.median_ms), (0, 4), textcoords="offset points", ha="center")
    if row.network == "pruned":
        ratio = f"x {row.ratio:.3f}\n{row.ratio_low:.3f} to {row.ratio_high:.3f}"
        panel.annotate(ratio, (place, 0), (0, 6), textcoords="offset points", ha="center", fontsize=8.5)
