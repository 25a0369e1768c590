"""Small models with all that hides bugs in fresh ones, and files made from them once for all tests."""

import functools
from pathlib import Path

import keras
import numpy as np
import pytest

import tflite_export
from tflite_export import ExportResult, ExportWorker

SHAPE = (17, 15, 3)
CLASSES = 10


def randomise(model: keras.Model, *, seed: int = 0) -> keras.Model:
    """Give norms random statistics (negative gammas too) and biases random values: fresh ones prove nothing."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma = rng.uniform(0.5, 1.5, layer.gamma.shape) * rng.choice([-1, 1], layer.gamma.shape)
            beta, mean = rng.normal(0, 0.3, (2, *layer.gamma.shape))
            layer.set_weights([gamma, beta, mean, rng.uniform(0.5, 2, layer.gamma.shape)])
        elif getattr(layer, "bias", None) is not None:
            layer.bias.assign(rng.normal(0, 0.3, layer.bias.shape))
    return model


def small_model(*, name: str = "small", seed: int = 0) -> keras.Model:
    """A residual network of a few layers on odd sizes, whose outputs are logits."""
    keras.utils.set_random_seed(seed)
    image = keras.Input(SHAPE, name="image")
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", name="stem")(image)
    x = keras.layers.ReLU(6.0, name="stem_relu")(keras.layers.BatchNormalization(name="stem_norm")(x))
    y = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(x)
    y = keras.layers.BatchNormalization(name="depthwise_norm")(y)
    y = keras.layers.Conv2D(8, 1, name="project")(keras.layers.ReLU(name="depthwise_relu")(y))
    x = keras.layers.Add(name="add")([x, y])
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = keras.layers.Dense(CLASSES, name="logits")(x)
    return randomise(keras.Model(image, outputs, name=name), seed=seed)


def some_images(n: int = 32, *, shape: tuple[int, ...] = SHAPE, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (n, *shape)).astype("float32")


@pytest.fixture(scope="session")
def model() -> keras.Model:
    return small_model()


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return some_images()


@pytest.fixture(scope="session")
def worker():
    """One worker process for all tests: a start takes as long as ten conversions."""
    with ExportWorker() as started:
        yield started


@pytest.fixture
def export(worker):
    """`tflite_export.export` through the shared worker."""
    return functools.partial(tflite_export.export, worker=worker)


@pytest.fixture(scope="session")
def exported(model, images, worker, tmp_path_factory) -> dict[str, ExportResult]:
    """The small model as "float32" and "int8" files."""
    folder: Path = tmp_path_factory.mktemp("exported")
    return {
        "float32": tflite_export.export(model, folder / "float32.tflite", worker=worker),
        "int8": tflite_export.export(model, folder / "int8.tflite", quantize="int8", calibration=images, worker=worker),
    }


@pytest.fixture(scope="session")
def edgetpu_folder(shared_data) -> Path:
    return shared_data / "tflite" / "edgetpu"


def conv_norm(x, filters, kernel_size=1, strides=1):
    x = keras.layers.Conv2D(filters, kernel_size, strides=strides, padding="same", use_bias=False)(x)
    return keras.layers.BatchNormalization()(x)


def inverted_residuals() -> keras.Model:
    """The blocks of a MobileNetV2 on odd sizes, one with a stride and its explicit padding."""
    image = keras.Input((33, 31, 3), name="image")
    x = keras.layers.ReLU(6.0)(conv_norm(image, 16, 3, 2))
    for filters, strides in ((16, 1), (24, 2), (24, 1)):
        y = keras.layers.ReLU(6.0)(conv_norm(x, 6 * x.shape[-1]))
        if strides == 2:
            y = keras.layers.ZeroPadding2D(((0, 1), (0, 1)))(y)
        padding = "same" if strides == 1 else "valid"
        y = keras.layers.DepthwiseConv2D(3, strides=strides, padding=padding, use_bias=False)(y)
        y = conv_norm(keras.layers.ReLU(6.0)(keras.layers.BatchNormalization()(y)), filters)
        x = keras.layers.Add()([x, y]) if y.shape == x.shape else y
    x = keras.layers.GlobalAveragePooling2D()(x)
    return randomise(keras.Model(image, keras.layers.Dense(10, activation="softmax")(x), name="residuals"))


def layer_norm_block() -> keras.Model:
    """A stem and a ConvNeXt block: depthwise, LayerNormalization, two dense layers with GELU between."""
    image = keras.Input((28, 28, 3), name="image")
    x = keras.layers.Conv2D(16, 4, strides=4, name="stem")(image)
    y = keras.layers.DepthwiseConv2D(7, padding="same", name="depthwise")(x)
    y = keras.layers.LayerNormalization(epsilon=1e-6, name="norm")(y)
    y = keras.layers.Dense(16)(keras.layers.Activation("gelu")(keras.layers.Dense(64)(y)))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Add()([x, y]))
    return randomise(keras.Model(image, keras.layers.Dense(10)(x), name="block"))


@pytest.fixture(scope="session")
def npu_files(worker, tmp_path_factory) -> dict[str, Path]:
    """Two networks as "float32" and "int8", by name; as the converter alone writes them, islands of float included."""
    folder = tmp_path_factory.mktemp("npu")
    keras.utils.set_random_seed(0)
    made = {}
    for name, model in (("residuals", inverted_residuals()), ("block", layer_norm_block())):
        images = some_images(40, shape=model.input_shape[1:])
        for scheme, calibration in (("float32", None), ("int8", images)):
            path = folder / f"{name}_{scheme}.tflite"
            tflite_export.export(model, path, quantize=scheme, calibration=calibration, clean=False, worker=worker)
            made[f"{name} {scheme}"] = path
    return made
