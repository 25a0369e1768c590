"""ResNet-56 on CIFAR-10: channels cut inside blocks without training, by scope, importance and what mends them.

    uv run --frozen python -m tests.experiments.resnet56_narrowing [main | rivals | rounded | tuned]

Writes resnet56_narrowing.csv beside this file, row by row; what is there is not run again. Three draws of 600
calibration images from the training images; accuracy on 1,000 test images, which choose nothing. `less` is the factor
by which MACs had to fall; `macs` what the network really has. `tuned` compares rankings at one factor, three draws,
with and without a short training: two epochs of the 4,000 lossless training images, shifted and flipped, half of the
loss from labels and half from the original.
"""

import sys
from collections.abc import Iterator

import numpy as np

from tests.experiments.records import HERE, Records, shared_loader
from tests.experiments.resnet20_training import BATCH, batches, sgd, train
from tests.experiments.resnet56_merging import DRAWS, N_CALIBRATION, macs_of, predict

LESS = (1.29, 1.43, 1.59, 2.10, 2.57)
MENDS = ("refit", "norms", "none")
RANKINGS = (("isomorphic", "l2"), ("global", "l2"), ("local", "l2"), ("isomorphic", "random"))
TUNED = "refit, tuned"
TUNED_LESS = 2.10
EPOCHS, RATE = 2, 0.01

Setting = tuple[int, str, str, int, bool, str, float]
"""Draw, scope, importance, round_to, whether streams are cut, what mends, factor of MACs."""


def settings(part: str) -> Iterator[Setting]:
    if part == "main":
        for draw in DRAWS:
            for less in LESS:
                yield draw, "isomorphic", "l2", 1, False, "refit", less
    if part == "rounded":
        for less in LESS:
            yield 0, "isomorphic", "l2", 8, False, "refit", less
    if part == "tuned":
        for mend in (TUNED, *MENDS):
            for scope, importance in (
                ("isomorphic", "l2"),
                ("global", "l2"),
                ("local", "l2"),
                ("isomorphic", "random"),
            ):
                for draw in DRAWS:
                    yield draw, scope, importance, 1, False, mend, TUNED_LESS
    if part == "rivals":
        for importance in ("hessian", "taylor", "activation", "l1"):
            for less in (2.10, 2.57, 1.59):
                yield 0, "isomorphic", importance, 1, False, "refit", less
        for scope in ("isomorphic", "global", "local"):
            for less in LESS:
                yield 0, scope, "l2", 1, False, "refit", less
        for less in LESS:
            yield 0, "isomorphic", "l2", 1, True, "refit", less


def main(part: str) -> None:
    load = shared_loader()
    from updp_tf.narrowing import narrow

    key = ("draw", "scope", "importance", "round_to", "streams", "mend", "less")
    records = Records(HERE / "resnet56_narrowing.csv", key, ("macs", "params", "ratio", "refitted", "top1", "n_test"))
    model = load.resnet56(classifier_activation=None)
    (x_train, y_train), (x_test, y_test) = load.cifar10()
    x_test = load.cifar_preprocess(x_test)
    for setting in settings(part):
        draw, scope, importance, round_to, streams, mend, less = setting
        chosen = np.random.default_rng(draw).choice(len(x_train), N_CALIBRATION, replace=False)
        images = load.cifar_preprocess(x_train[chosen])

        def run(images=images, setting=setting) -> dict[str, object]:
            draw, scope, importance, round_to, streams, mend, less = setting
            small = narrow(
                model,
                budget={"macs": 1 / less},
                calibration=None if mend == "none" else images,
                scope=scope,
                importance=importance,
                round_to=round_to,
                streams=streams,
                refit=mend in ("refit", TUNED),
                seed=draw,
            )
            report = small.narrowing
            if mend == TUNED:
                tune(small, model, load.cifar_preprocess(x_train), y_train, seed=draw)
            top1 = float((predict(small, x_test).argmax(-1) == y_test).mean())
            return {
                "macs": macs_of(small),
                "params": report.after.params,
                "ratio": f"{report.ratio:.4f}",
                "refitted": len(report.refitted),
                "top1": f"{top1:.4f}",
                "n_test": len(y_test),
            }

        records.ensure(run, **dict(zip(key, setting, strict=True)))


def tune(small, teacher, x: np.ndarray, y: np.ndarray, *, seed: int) -> None:
    """Train a narrowed network for a short while."""
    import keras

    keras.utils.set_random_seed(seed)
    steps = EPOCHS * (len(x) // BATCH)
    train(small, teacher, batches(x, y, EPOCHS, seed=seed), steps=steps, optimizer=sgd(RATE, steps))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "main")
