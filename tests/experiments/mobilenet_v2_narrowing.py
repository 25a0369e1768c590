"""MobileNetV2 (ImageNet weights) at 224: channels cut inside blocks without training, by what ranks and what mends.

    uv run --frozen python -m tests.experiments.mobilenet_v2_narrowing

Writes mobilenet_v2_narrowing.csv beside this file, row by row; what is there is not run again. Calibrated on 400 images
of the even ImageNet classes, evaluated on those of the odd ones and 500 held-out images of ImageNet's validation set,
as in mobilenet_v2_merging.py. Widths are multiples of 8. `less` is the factor by which MACs had to fall. `refit, tuned`
is followed by a short training at one factor: two epochs of the 500 images of the even classes, without labels, by Adam
(0.00001) with norms frozen.
"""

import numpy as np

from tests.experiments.mobilenet_v2_merging import Data
from tests.experiments.records import HERE, Records, shared_loader
from tests.experiments.resnet56_merging import macs_of
from tests.experiments.resnet56_narrowing import MENDS, RANKINGS, TUNED

DIRECTION = "even"
LESS = (1.5, 1.2)
TUNED_LESS = 1.5
BEST = ("isomorphic", "hessian")
MORE_RANKINGS = (
    ("isomorphic", "activation"),
    ("isomorphic", "taylor"),
    ("local", "activation"),
    ("local", "taylor"),
)
EPOCHS, BATCH, RATE = 2, 32, 1e-5


def main() -> None:
    from updp_tf.narrowing import narrow

    key = ("direction", "scope", "importance", "mend", "less")
    records = Records(HERE / "mobilenet_v2_narrowing.csv", key, ("macs", "params", "ratio", "top1", "n"))
    load = shared_loader()
    model, data = load.mobilenet_v2(), Data(DIRECTION)
    even = load.mobilenet_preprocess(load.imagenet1000()[0][0::2])

    def row(scope: str, importance: str, mend: str, less: float) -> dict[str, object]:
        small = model
        told = {"ratio": "0.0000"}
        if scope != "original":
            small = narrow(
                model,
                budget={"macs": 1 / less},
                calibration=None if mend == "none" else data.calibration,
                scope=scope,
                importance=importance,
                refit=mend in ("refit", TUNED),
            )
            if mend == TUNED:
                tune(small, model, even)
            told["ratio"] = f"{small.narrowing.ratio:.4f}"
        top1 = float(data.hits(small).mean())
        return told | {
            "macs": macs_of(small),
            "params": small.count_params(),
            "top1": f"{top1:.4f}",
            "n": len(data.labels),
        }

    def ensure(scope: str, importance: str, mend: str, less: float) -> None:
        values = dict(zip(key, (DIRECTION, scope, importance, mend, less), strict=True))
        records.ensure(lambda: row(scope, importance, mend, less), **values)

    ensure("original", "-", "-", 1.0)
    for scope, importance in MORE_RANKINGS:
        ensure(scope, importance, "refit", TUNED_LESS)
    for less in LESS:
        for mend in (*MENDS, *((TUNED,) if less == TUNED_LESS else ())):
            for scope, importance in (*RANKINGS, BEST):
                ensure(scope, importance, mend, less)


def tune(small, teacher, images: np.ndarray) -> None:
    """Train a narrowed network for a short while."""
    import keras

    from updp_tf.training import Batches, Training, train

    recipe = Training(epochs=EPOCHS, batch_size=BATCH, optimizer=keras.optimizers.Adam(RATE), freeze_norms=True)
    batches = Batches(images, recipe)
    steps = EPOCHS * batches.steps_per_epoch
    train(small, teacher, batches, recipe, steps=(0, steps, steps), validation=None, run=None, stage="", progress=None)
    teacher.trainable = True  # the Distiller freezes it, and what is narrowed next would be frozen too


if __name__ == "__main__":
    main()
