"""MobileNetV2 (ImageNet weights) at 224: channels cut inside blocks without training, by what ranks and what mends.

    uv run --frozen python -m tests.experiments.mobilenet_v2_narrowing

Writes mobilenet_v2_narrowing.csv beside this file, row by row; what is there is not run again. Calibrated on 400 images
of the even ImageNet classes, evaluated on those of the odd ones and 500 held-out images of ImageNet's validation set,
as in mobilenet_v2_merging.py. Widths are multiples of 8. `less` is the factor by which MACs had to fall. `refit, tuned`
is followed by a short training at one factor: two epochs of the 500 images of the even classes, without labels, by Adam
(0.00001) with norms frozen.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from tests.experiments.mobilenet_v2_merging import Data
from tests.experiments.records import HERE, Records, shared_loader
from tests.experiments.resnet56_merging import macs_of
from tests.experiments.resnet56_narrowing import MENDS, RANKINGS, TUNED

DIRECTION = "even"
DRAWS = (0, 1, 2)
MORE_LESS, LESS = 1.2, 1.5
RANKINGS = (*RANKINGS, ("isomorphic", "hessian"))
MORE_RANKINGS = (
    ("isomorphic", "activation"),
    ("isomorphic", "taylor"),
    ("local", "activation"),
    ("local", "taylor"),
    ("global", "hessian"),
    ("local", "hessian"),
)
EPOCHS, BATCH, RATE = 2, 32, 1e-5

Setting = tuple[int, str, str, str, float]
"""Draw, scope, importance, what mends, factor of MACs."""


def settings() -> Iterator[Setting]:
    for draw in DRAWS:
        for scope, importance in RANKINGS:
            for mend in ("refit", TUNED):
                yield draw, scope, importance, mend, LESS
    for scope, importance in MORE_RANKINGS:
        yield 0, scope, importance, "refit", LESS
    for mend in MENDS:
        for less in (LESS, MORE_LESS) if mend == "refit" else (LESS,):
            for scope, importance in RANKINGS:
                if (importance, mend) != ("hessian", "none"):  # it needs images, which renew norms
                    yield 0, scope, importance, mend, less


def main() -> None:
    from updp_tf.narrowing import narrow

    key = ("direction", "draw", "scope", "importance", "mend", "less")
    records = Records(HERE / "mobilenet_v2_narrowing.csv", key, ("macs", "params", "ratio", "top1", "n"))
    load = shared_loader()
    model = load.mobilenet_v2()
    data = {draw: Data(DIRECTION, draw) for draw in DRAWS}
    even = load.mobilenet_preprocess(load.imagenet1000()[0][0::2])

    @lru_cache(maxsize=1)
    def narrowed(draw: int, scope: str, importance: str, mend: str, less: float):
        return narrow(
            model,
            budget={"macs": 1 / less},
            calibration=None if mend == "none" else data[draw].calibration,
            scope=scope,
            importance=importance,
            refit=mend == "refit",
            seed=draw,
        )

    def row(net, ratio: float) -> dict[str, object]:
        top1, n = float(data[0].hits(net).mean()), len(data[0].labels)
        cost = {"macs": macs_of(net), "params": net.count_params(), "ratio": f"{ratio:.4f}"}
        return cost | {"top1": f"{top1:.4f}", "n": n}

    def run(draw: int, scope: str, importance: str, mend: str, less: float) -> dict[str, object]:
        small = narrowed(draw, scope, importance, "refit" if mend == TUNED else mend, less)
        if mend == TUNED:
            tune(small, model, even, seed=draw)
            narrowed.cache_clear()
        return row(small, small.narrowing.ratio)

    original = dict(zip(key, (DIRECTION, 0, "original", "-", "-", 1.0), strict=True))
    records.ensure(lambda: row(model, 0.0), **original)
    for one in settings():
        records.ensure(lambda one=one: run(*one), **dict(zip(key, (DIRECTION, *one), strict=True)))


def tune(small, teacher, images: np.ndarray, *, seed: int) -> None:
    """Train a narrowed network for a short while."""
    import keras

    from updp_tf.training import Batches, Training, train

    recipe = Training(
        epochs=EPOCHS, batch_size=BATCH, optimizer=keras.optimizers.Adam(RATE), freeze_norms=True, seed=seed
    )
    batches = Batches(images, recipe)
    steps = EPOCHS * batches.steps_per_epoch
    train(small, teacher, batches, recipe, steps=(0, steps, steps), validation=None, run=None, stage="", progress=None)
    teacher.trainable = True  # the Distiller freezes it, and what is narrowed next would be frozen too


if __name__ == "__main__":
    main()
