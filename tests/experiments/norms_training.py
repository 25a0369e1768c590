"""A small ConvNeXt and a small ViT on CIFAR-10 (JPEG): what becomes of LayerNorm while blocks are merged.

    uv run --frozen python -m tests.experiments.norms_training --work FOLDER [NETWORK ...]

Each network is trained first (its weights stay in FOLDER, outside of the project) and loses half of its blocks then;
norms_training.csv is written beside this file, row by row, and what is there is not run again. Every way gets 4 epochs
of the same 10,000 training images (shifts and flips), Adam with cosine decay, half of the loss from labels and half
from the network before. In expanded blocks 1 / sigma is blended into a constant (`sigma`) or the norm becomes a
BatchNormalization (`batch`); in whole blocks it is left alone until the block goes; `direct` merges before training.
Two more ways merge nothing: the network trained on as it is, and with all its norms made affine (`linearize`).
Accuracy is that of the last epoch on all 10,000 test images.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from keras import layers

from tests.experiments.records import HERE, Records, shared_loader
from tests.experiments.resnet20_training import BATCH, N_CALIBRATION, N_TRAIN, batches, row, top1, train
from tests.experiments.updp_networks import Positions

BASELINE_EPOCHS, EPOCHS = 10, 4
BASELINE_RATE, RATE = 2e-3, 5e-4
STEPS = EPOCHS * (N_TRAIN // BATCH)
SEEDS = (0,)


def convnext() -> keras.Model:
    """Two stages of two blocks, 32 and 64 channels, patches of 2 pixels."""
    inputs = keras.Input((32, 32, 3))
    x = layers.LayerNormalization()(layers.Conv2D(32, 2, strides=2)(inputs))
    for width in (32, 64):
        if width > x.shape[-1]:
            x = layers.Conv2D(width, 2, strides=2)(layers.LayerNormalization()(x))
        for _ in range(2):
            y = layers.LayerNormalization()(layers.DepthwiseConv2D(7, padding="same")(x))
            y = layers.Dense(width)(layers.Activation("gelu")(layers.Dense(4 * width)(y)))
            x = layers.Add()([x, y])
    x = layers.LayerNormalization()(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(10)(x), name="convnext")


def vit() -> keras.Model:
    """Four blocks of 64 channels, two heads, patches of 4 pixels."""
    inputs = keras.Input((32, 32, 3))
    x = Positions()(layers.Reshape((-1, 64))(layers.Conv2D(64, 4, strides=4)(inputs)))
    for _ in range(4):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(2, 32)(y, y)])
        y = layers.Dense(128)(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(64)(layers.Activation("gelu")(y))])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(10)(x), name="vit")


def adam(rate: float, steps: int):
    return keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(rate, steps), weight_decay=0.01)


def trained(make: Callable[[], keras.Model], x: np.ndarray, y: np.ndarray, path: Path) -> keras.Model:
    from updp_tf.compiling import jit_compile

    keras.utils.set_random_seed(0)
    model = make()
    if path.exists():
        model.load_weights(path)
        return model
    steps = BASELINE_EPOCHS * (len(x) // BATCH)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=adam(BASELINE_RATE, steps), loss=loss, jit_compile=jit_compile())
    model.fit(batches(x, y, BASELINE_EPOCHS + 1, seed=0), steps_per_epoch=steps, verbose=0)
    model.save_weights(path)
    return model


def student(way: str, model, plan, images):
    """Return what is trained, and whether it is merged in the end."""
    import updp_tf

    schedule = updp_tf.Schedule(total_steps=STEPS)
    if way == "as it is":
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        return copy, False
    if way == "norms made affine":
        return updp_tf.linearize(model, activations=None, calibration=images, schedule=schedule), True
    if way == "direct":
        return updp_tf.merge(model, plan, calibration=images, verbose=False), False
    options = (
        {"mode": "whole"} if way == "whole block" else {"mode": "expanded", "norms": way.removeprefix("expanded, ")}
    )
    return updp_tf.progressive(model, plan, calibration=images, schedule=schedule, verbose=False, **options), True


WAYS = ("as it is", "norms made affine", "direct", "whole block", "expanded, sigma", "expanded, batch")
NETWORKS = {"ConvNeXt": convnext, "ViT": vit}


def compare(name: str, work: Path) -> None:
    import updp_tf

    load = shared_loader()
    x, y = load.cifar10_jpeg("train", N_TRAIN)
    x = load.cifar_preprocess(x)
    images = x[:N_CALIBRATION]
    values = ("macs", "start", "top1", "seconds", "n_test")
    records = Records(HERE / "norms_training.csv", ("network", "way", "seed"), values)
    model = trained(NETWORKS[name], x, y, work / f"{name}.weights.h5")
    records.ensure(lambda: row(model, top1(model, load), 0.0, load), network=name, way="before", seed="-")
    half = {"merged": len(updp_tf.find_blocks(model)) // 2}
    plan = updp_tf.search(model, calibration=images, budget=half, verbose=False)
    for seed in SEEDS:
        for way in WAYS:

            def run(way=way, seed=seed) -> dict[str, object]:
                keras.utils.set_random_seed(seed)
                started = time.perf_counter()
                net, is_merged = student(way, model, plan, images)
                at_start = top1(net, load)
                train(net, model, batches(x, y, EPOCHS + 1, seed=seed), steps=STEPS, optimizer=adam(RATE, STEPS))
                net = updp_tf.merge(net) if is_merged else net
                return row(net, at_start, time.perf_counter() - started, load)

            records.ensure(run, network=name, way=way, seed=seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("names", nargs="*", choices=[*NETWORKS, []], metavar="NETWORK", help="all where none is named")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for wanted in arguments.names or NETWORKS:
        compare(wanted, arguments.work)
