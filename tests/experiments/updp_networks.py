"""The networks of UPDP, at 224 pixels: every block merged into the fullest form that is no dearer than it.

    uv run --frozen python -m tests.experiments.updp_networks [NAME ...]

Writes updp_networks.csv beside this file, row by row; what is there is not run again. Architectures as keras_cv,
keras.applications and keras_hub ship them, DeiT expanded into standard layers, and a Functional ViT of the same size
as the Keras examples write it. Weights are random, so nothing here is about accuracy: it is about what is found, what
is left, and whether the merged network computes what its graph says. Times are CPU seconds of finding and of merging.
"""

import argparse
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable

import keras
import numpy as np
from keras import layers

from tests import backbones, zoo
from tests.experiments.records import HERE, Records
from updp_tf.blocks import find_blocks, network_cost, prepared_graph
from updp_tf.forms import all_forms
from updp_tf.merging import Choice, merge_in_sequence
from updp_tf.scoring import CalibrationWarning, eligible_forms

SIZE = 224
N_IMAGES = 4
RIDGE = 1.0  # maps that are fitted to four images must not blow up rounding


class Positions(layers.Layer):
    """A trainable vector for each position, added."""

    def build(self, shape):
        self.table = self.add_weight(shape=(1, *shape[1:]), name="table")

    def call(self, x):
        return x + self.table


def vit_tiny() -> keras.Model:
    """192 channels, 12 blocks, 3 heads, patches of 16 pixels; mean of tokens in the place of a class token."""
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(192, 16, strides=16)(inputs)
    x = Positions()(layers.Reshape((-1, 192))(x))
    for _ in range(12):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        x = layers.Add()([layers.MultiHeadAttention(3, 64, dropout=0.1)(y, y), x])
        y = layers.Dense(768, activation="gelu")(layers.LayerNormalization(epsilon=1e-6)(x))
        x = layers.Add()([layers.Dense(192)(layers.Dropout(0.1)(y)), x])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization(epsilon=1e-6)(x))
    return keras.Model(inputs, layers.Dense(1000, activation="softmax")(x), name="vit_tiny")


def application(name: str) -> Callable[[], keras.Model]:
    return lambda: getattr(keras.applications, name)(weights=None)


def resnet34() -> keras.Model:
    return backbones.library("keras_cv").models.ResNetBackbone(
        stackwise_filters=[64, 128, 256, 512],
        stackwise_blocks=[3, 4, 6, 3],
        stackwise_strides=[1, 2, 2, 2],
        block_type="basic_block",
        include_rescaling=True,
        input_shape=(SIZE, SIZE, 3),
    )


def deit_tiny() -> keras.Model:
    return backbones.library("keras_hub").models.DeiTBackbone(
        image_shape=(SIZE, SIZE, 3), patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, intermediate_dim=768
    )


NETWORKS: dict[str, Callable[[], keras.Model]] = {
    "ResNet-34 (keras_cv)": resnet34,
    "MobileNetV2": application("MobileNetV2"),
    "ConvNeXt-Tiny": application("ConvNeXtTiny"),
    "ConvNeXt-Small": application("ConvNeXtSmall"),
    "ConvNeXt-Base": application("ConvNeXtBase"),
    "DeiT-Tiny (keras_hub)": deit_tiny,
    "ViT-Tiny (Functional)": vit_tiny,
}
COLUMNS = ("blocks", "merged", "forms", "macs", "macs_after", "params", "params_after")
COLUMNS += ("error", "find_cpu_s", "merge_cpu_s", "peak_gib", "keras")


def measure(make: Callable[[], keras.Model]) -> dict[str, object]:
    keras.utils.clear_session()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = zoo.randomise(make())
    started = time.process_time()
    blocks = find_blocks(model)
    find_s = time.process_time() - started
    choices = []
    for block in blocks:
        able, _ = eligible_forms(block, forms=all_forms(), skip="auto", unit="macs")
        if able:
            form, mode = max(able, key=lambda one: one[0].cost(block, skip=one[1]).macs)
            choices.append(Choice(block.name, form.name, mode))
    images = np.random.default_rng(0).uniform(-1, 1, (N_IMAGES, SIZE, SIZE, 3)).astype("float32")
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        merged = merge_in_sequence(blocks, choices, images, reestimate=False, ridge=RIDGE)
    merge_s = time.process_time() - started
    before, after = blocks.network_cost, network_cost(prepared_graph(merged.model))
    forms = Counter(one.form for one in merged.blocks)
    return {
        "blocks": len(blocks),
        "merged": len(choices),
        "forms": "; ".join(f"{n} {form}" for form, n in forms.most_common()),
        "macs": before.macs,
        "macs_after": after.macs,
        "params": before.params,
        "params_after": after.params,
        "error": f"{merged.error:.1e}",
        "find_cpu_s": f"{find_s:.2f}",
        "merge_cpu_s": f"{merge_s:.1f}",
        "peak_gib": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}",
        "keras": keras.__version__,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*NETWORKS, []], metavar="NAME", help="all where none is named")
    records = Records(HERE / "updp_networks.csv", ("network",), COLUMNS)
    for wanted in parser.parse_args().names or NETWORKS:
        records.ensure(lambda name=wanted: measure(NETWORKS[name]), network=wanted)
