"""Whether a network is compiled by XLA where this package trains one."""

from __future__ import annotations

from typing import Literal

import keras


def jit_compile() -> Literal[False, "auto"]:
    """Return what `compile` is to be told: not on TensorFlow's CPU kernels, as Keras decides anywhere else.

    XLA has no fast convolutions on a CPU [seconds a step with XLA and without, on one core, teacher included: ResNet-20
    0.97 and 0.67, a small ConvNeXt 2.07 and 0.37, MobileNetV2 at 224, 16 images, 7.4 and 1.7; a small ViT 0.22 and
    0.29; `tests/bench/bench_compiling.py`].
    """
    if keras.backend.backend() != "tensorflow":
        return "auto"
    # where there is an accelerator, no CPU is listed
    return False if all(name.lower().startswith("cpu") for name in keras.distribution.list_devices()) else "auto"
