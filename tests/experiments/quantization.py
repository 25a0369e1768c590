"""What int8 costs: networks with merged blocks and the originals side by side, each post-training step on and off.

    uv run --frozen python -m tests.experiments.quantization prepare [NETWORK ...]
    uv run --frozen python -m tests.experiments.quantization accuracy [NETWORK ...] [WAY ...]
    uv run --frozen python -m tests.experiments.quantization report

The first leaves networks and images in the system's folder for temporary files, the second writes quantization.csv
beside this file, row by row; what is there is not run again. ResNet-56 on 1,000 test images of CIFAR-10, MobileNetV2 on
500 images of the half of the ImageNet classes that calibrated nothing and 500 held-out ones. Blocks are merged without
training (in sequence, norms renewed, refit); 100 of the same calibration images set the ranges. The float network is
its float32 file. MobileNetV2's stored kernels lie on an int8 grid, which flatters it: `disturbed` moves each weight by
up to half a step. `ai-edge-quantizer` quantizes the same float file by its own recipe, with its own ranges.
`quantization-aware training` follows the network's own float outputs, without labels, on images of the training set
(2,000 of CIFAR-10; for MobileNetV2 those that calibrated).
"""

import contextlib
import io
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from tests.experiments import mobilenet_v2_merging as mobilenet
from tests.experiments.mobilenet_v2_merging import pack, points_lost
from tests.experiments.records import HERE, Records, shared_loader
from tflite_export.evaluation import _mean_kl

WORK = Path(tempfile.gettempdir()) / "updp-tf-quantization"
N_CIFAR = 600
N_CALIBRATION = 100
N_TRAINING = 2_000
TRAINING_STEPS = {"ResNet-56": 500, "MobileNetV2": 30}  # of 32 images: minutes of one core
AI_EDGE, TRAINED = "ai-edge-quantizer", "quantization-aware training"
N_RESNET = 14
N_MOBILENET = 5
WAYS = {
    "none": (),
    "equalize": ("equalize",),
    "measure_ranges": ("measure_ranges",),
    "clip_mse": ("clip_mse",),
    "clip_percentile": ("clip_percentile",),
    "correct_bias": ("correct_bias",),
    "equalize, measure_ranges, correct_bias": ("equalize", "measure_ranges", "correct_bias"),
    "equalize, clip_mse, correct_bias": ("equalize", "clip_mse", "correct_bias"),
    AI_EDGE: (),
    TRAINED: (),
}


def merged(model, blocks, images, n: int):
    from updp_tf.forms import form_by_name
    from updp_tf.merging import Choice, merge_in_sequence
    from updp_tf.scoring import score

    skip_first = [mobilenet.BLOCK_0] if mobilenet.BLOCK_0 in {block.name for block in blocks} else []
    scores = score(blocks, images, forms=[form_by_name("conv3")], keep=skip_first)
    best = sorted(scores.candidates, key=lambda one: one.score)[:n]
    choices = [Choice(one.blocks[0], "conv3", one.options["skip"]) for one in best]
    return merge_in_sequence(blocks, choices, images, refit=True).model


class Cifar:
    """ResNet-56, its calibration images and its test images."""

    def __init__(self) -> None:
        load = shared_loader()
        (x_train, _), (x_test, self.labels) = load.cifar10()
        chosen = np.random.default_rng(0).choice(len(x_train), N_CIFAR, replace=False)
        self.calibration, self.images = load.cifar_preprocess(x_train[chosen]), load.cifar_preprocess(x_test)
        self.training = load.cifar_preprocess(load.cifar10_jpeg("train", N_TRAINING)[0])
        self.model = load.resnet56()
        self.n_merged = N_RESNET


class ImageNet:
    """MobileNetV2, calibrated on the even classes, evaluated on the odd ones and on held-out images."""

    def __init__(self) -> None:
        data = mobilenet.Data("even")
        self.calibration, self.images, self.labels = data.calibration, data.images, data.labels
        self.training = data.calibration
        self.model = shared_loader().mobilenet_v2()
        self.n_merged = N_MOBILENET


def disturbed(model):
    """Move each weight of a convolution by up to half the int8 step of its output."""
    import keras

    rng = np.random.default_rng(0)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for layer in clone.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D | keras.layers.Dense):
            kernel = layer.get_weights()[0]
            axes = (0, 1) if isinstance(layer, keras.layers.DepthwiseConv2D) else tuple(range(kernel.ndim - 1))
            step = np.abs(kernel).max(axis=axes, keepdims=True) / 127
            noise = rng.uniform(-0.5, 0.5, kernel.shape) * step
            layer.set_weights([(kernel + noise).astype("float32"), *layer.get_weights()[1:]])
    return clone


def prepare(*names: str) -> None:
    """Leave networks and images where `accuracy` reads them, which needs no Keras unless it trains."""
    import updp_tf

    WORK.mkdir(exist_ok=True)
    for name in names or NETWORKS:
        if file_of(name).exists():
            continue
        family, _, edit = name.partition(", ")
        data = {"ResNet-56": Cifar, "MobileNetV2": ImageNet}[family]()
        every = np.linspace(0, len(data.calibration) - 1, N_CALIBRATION).astype(int)
        arrays = {"calibration": data.calibration[every], "images": data.images, "labels": data.labels}
        np.savez(WORK / f"{family}.npz", **arrays)
        np.save(WORK / f"{family}_training.npy", data.training)
        model = data.model
        if edit == "disturbed":
            model = disturbed(model)
        elif edit:
            model = merged(model, updp_tf.find_blocks(model), data.calibration, data.n_merged)
        model.save(file_of(name))


def file_of(name: str) -> Path:
    return WORK / f"{name.replace(', ', '_').replace(' ', '_')}.keras"


@cache
def data_of(family: str) -> dict[str, np.ndarray]:
    return dict(np.load(WORK / f"{family}.npz"))


NETWORKS = (
    "ResNet-56",
    f"ResNet-56, {N_RESNET} blocks merged",
    "MobileNetV2",
    "MobileNetV2, disturbed",
    f"MobileNetV2, {N_MOBILENET} blocks merged",
)


def records() -> Records:
    values = ("n", "top1_float", "top1", "agreement", "mean_kl", "sqnr_db", "hits_float", "hits")
    return Records(HERE / "quantization.csv", ("network", "way"), values)


def accuracy(*names: str) -> None:
    from tflite_export import ExportWorker

    rows = records()
    with ExportWorker() as worker, tempfile.TemporaryDirectory() as folder:
        ways = {way: steps for way, steps in WAYS.items() if way in names} or WAYS
        for name in [one for one in NETWORKS if one in names] or NETWORKS:
            for way, steps in ways.items():
                rows.ensure(
                    lambda name=name, way=way, steps=steps: row(name, way, steps, Path(folder), worker),
                    network=name,
                    way=way,
                )


def row(name: str, way: str, steps: tuple[str, ...], folder: Path, worker) -> dict[str, object]:
    import tflite_export

    data = data_of(name.partition(", ")[0])
    images, path, exact = data["images"], folder / "model.tflite", file_of(name).with_suffix(".tflite")
    if not exact.exists():
        tflite_export.export(file_of(name), folder / exact.name, worker=worker)
        np.save(exact.with_suffix(".npy"), tflite_export.run_tflite(folder / exact.name, images))
        shutil.copy(folder / exact.name, exact)
    if way == AI_EDGE:
        path.write_bytes(by_ai_edge_quantizer(exact, data["calibration"]))
    elif way == TRAINED:
        import keras

        family = name.partition(", ")[0]
        images_seen, steps = np.load(WORK / f"{family}_training.npy"), TRAINING_STEPS[family]
        tflite_export.quantize_aware(
            keras.saving.load_model(file_of(name)), path, images_seen, steps=steps, force=True, progress=print
        )
    else:
        options = {"quantize": "int8", "calibration": data["calibration"], "post_training": steps}
        tflite_export.export(file_of(name), path, **options, force=True, worker=worker)
    wanted, found = np.load(exact.with_suffix(".npy")), tflite_export.run_tflite(path, images)
    hits_float, hits = wanted.argmax(-1) == data["labels"], found.argmax(-1) == data["labels"]
    return {
        "n": len(hits),
        "top1_float": f"{hits_float.mean():.4f}",
        "top1": f"{hits.mean():.4f}",
        "agreement": f"{(wanted.argmax(-1) == found.argmax(-1)).mean():.4f}",
        "mean_kl": f"{_mean_kl(wanted, found):.5f}",
        "sqnr_db": f"{10 * np.log10(np.sum(wanted**2) / np.sum((wanted - found) ** 2)):.2f}",
        "hits_float": pack(hits_float),
        "hits": pack(hits),
    }


def by_ai_edge_quantizer(path: Path, images: np.ndarray) -> bytes:
    from ai_edge_quantizer import quantizer, recipe

    (name,) = tflite_reader_inputs(path)
    with contextlib.redirect_stdout(io.StringIO()):
        one = quantizer.Quantizer(str(path))
        one.load_quantization_recipe(recipe.static_wi8_ai8())
        calibrated = one.calibrate({"serving_default": [{name: image[None]} for image in images]})
        return bytes(one.quantize(calibrated).quantized_model)


def tflite_reader_inputs(path: Path) -> tuple[str, ...]:
    import tflite_export

    return tflite_export.read_flatbuffer(path).input_names


def report() -> None:
    for one in records().rows:
        lost, low, high = points_lost(one["hits_float"], one["hits"], int(one["n"]))
        print(
            f"{one['network']:30} {one['way']:34} float {100 * float(one['top1_float']):.1f}  "
            f"int8 {100 * float(one['top1']):.1f}  lost {lost:.1f} [{low:.1f}, {high:.1f}]  "
            f"agreement {100 * float(one['agreement']):.1f}  KL {one['mean_kl']}  SQNR {one['sqnr_db']}"
        )


if __name__ == "__main__":
    {"prepare": prepare, "accuracy": accuracy, "report": report}[sys.argv[1]](*sys.argv[2:])
