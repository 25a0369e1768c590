"""ResNet-20 on CIFAR-10 (JPEG): a plan blended in while training, and its rivals, after equal training.

    uv run --frozen python -m tests.experiments.resnet20_training baseline --work FOLDER
    uv run --frozen python -m tests.experiments.resnet20_training compare --work FOLDER

The stored weights were trained on lossless images; the complete CIFAR-10 here is JPEG-compressed. So `baseline` trains
the network on for five epochs of all 50,000 images first; its weights stay in FOLDER, outside of the project.

`compare` writes resnet20_training.csv beside this file, row by row; what is there is not run again. Every way gets 8
epochs of the same 10,000 training images (shifts and flips), SGD with cosine decay from 0.02 (from scratch: 0.1), half
of the loss from labels and half from the baseline. The plan has 2.1 times fewer MACs: 3x3 and 1x1 convolutions in the
place of blocks, chosen on 600 images. Accuracy is that of the last epoch on all 10,000 test images.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tests.experiments.records import HERE, Records, shared_loader

BASELINE_EPOCHS = 5
EPOCHS = 8
BATCH = 128
N_TRAIN = 10_000
N_CALIBRATION = 600
BUDGET = {"macs": 1 / 2.1}
FORMS = ("conv3", "pointwise")
RATE, SCRATCH_RATE = 0.02, 0.1
STEPS = EPOCHS * (N_TRAIN // BATCH)


def baseline(work: Path) -> None:
    """Train the network on the complete JPEG set and write its weights."""
    import keras

    load = shared_loader()
    keras.utils.set_random_seed(0)
    x, y = load.cifar10_jpeg("train")
    model = load.resnet20(classifier_activation=None)
    steps = len(x) // BATCH
    model.compile(
        optimizer=sgd(RATE, BASELINE_EPOCHS * steps),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    print("before", top1(model, load), flush=True)
    data = batches(load.cifar_preprocess(x), y, BASELINE_EPOCHS, seed=0)
    model.fit(data, epochs=BASELINE_EPOCHS, steps_per_epoch=steps, verbose=2)
    print("after", top1(model, load), flush=True)
    model.save_weights(work / "resnet20_jpeg.weights.h5")


def sgd(rate: float, steps: int, clip: float | None = None):
    import keras

    decay = keras.optimizers.schedules.CosineDecay(rate, steps)
    return keras.optimizers.SGD(decay, momentum=0.9, nesterov=True, weight_decay=2e-6, global_clipnorm=clip)


def batches(x: np.ndarray, y: np.ndarray, epochs: int, *, seed: int):
    """Yield shuffled batches with random shifts of up to four pixels and flips, as CIFAR networks are trained."""
    rng = np.random.default_rng(seed)
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            picked = order[start : start + BATCH]
            rows, columns = rng.integers(0, 9, (2, BATCH, 1))
            row, column = rows + np.arange(32), columns + np.arange(32)
            images = padded[picked[:, None, None], row[:, :, None], column[:, None, :]]
            flipped = rng.random(BATCH) < 0.5
            images[flipped] = images[flipped, :, ::-1]
            yield images, y[picked]


def top1(model, load) -> float:
    x, y = load.cifar10_jpeg("test")
    x = load.cifar_preprocess(x)
    found = [np.asarray(model(x[i : i + 500], training=False)).argmax(-1) for i in range(0, len(x), 500)]
    return float((np.concatenate(found) == y).mean())


@dataclass(frozen=True)
class Setting:
    """What every way starts from."""

    model: object
    plan: object
    drop: object
    images: np.ndarray


def train(model, teacher, data, *, steps: int, optimizer) -> None:
    """Distil for some steps; a student's blends go their way."""
    import keras

    import updp_tf
    from updp_tf.compiling import jit_compile

    distiller = keras.distillation.Distiller(teacher, model, kl_of_logits())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    distiller.compile(optimizer=optimizer, loss=loss, jit_compile=jit_compile())
    distiller.fit(data, steps_per_epoch=steps, verbose=0, callbacks=[updp_tf.BlendSchedule(goes_on=True)])
    teacher.trainable = True  # the Distiller freezes it


def kl_of_logits():
    import keras

    # Named, not by default: the default is a function, which LogitsDistillation applies to the logits themselves.
    return keras.distillation.LogitsDistillation(temperature=3.0, loss=keras.losses.KLDivergence())


def compare(work: Path, ways: Sequence[str]) -> None:
    import keras

    import updp_tf

    load = shared_loader()
    model = load.resnet20(classifier_activation=None)
    model.load_weights(work / "resnet20_jpeg.weights.h5")
    x, y = load.cifar10_jpeg("train", N_TRAIN)
    x = load.cifar_preprocess(x)
    images = x[:N_CALIBRATION]
    records = Records(HERE / "resnet20_training.csv", ("way", "seed"), ("macs", "start", "top1", "seconds", "n_test"))
    records.ensure(lambda: row(model, top1(model, load), 0.0, load), way="baseline", seed="-")
    plan = updp_tf.search(model, calibration=images, budget=BUDGET, forms=FORMS, verbose=False)
    drop = updp_tf.search(model, calibration=images, budget=BUDGET, forms=("remove",), verbose=False)
    setting = Setting(model, plan, drop, images)
    for way, seeds in WAYS:
        for seed in seeds if not ways or way in ways else ():

            def run(way=way, seed=seed) -> dict[str, object]:
                keras.utils.set_random_seed(seed)
                started = time.perf_counter()
                net, start = STARTS[way](setting)
                at_start = top1(net, load)
                clip = float(way.rpartition("clipped at ")[2]) if "clipped at" in way else None
                optimizer = sgd(SCRATCH_RATE if way == "scratch" else RATE, STEPS, clip)
                data = batches(x, y, EPOCHS + 1, seed=seed)  # one more: batches are fetched ahead
                first = STEPS // 2 if "merged at half" in way else STEPS
                train(net, model, data, steps=first, optimizer=optimizer)
                if start is not None:
                    net = start(net)
                if first < STEPS:
                    rest = sgd(RATE, STEPS)
                    rest.build(net.trainable_variables)
                    rest.iterations.assign(first)
                    train(net, model, data, steps=STEPS - first, optimizer=rest)
                return row(net, at_start, time.perf_counter() - started, load)

            records.ensure(run, way=way, seed=seed)


def row(model, at_start: float, seconds: float, load) -> dict[str, object]:
    from updp_tf.blocks import network_cost, prepared_graph

    macs = network_cost(prepared_graph(model)).macs
    return {
        "macs": macs,
        "start": f"{at_start:.4f}",
        "top1": f"{top1(model, load):.4f}",
        "seconds": f"{seconds:.0f}",
        "n_test": 10_000,
    }


def progressive(**options) -> Callable:
    def start(setting: Setting):
        import updp_tf

        schedule = updp_tf.Schedule(total_steps=STEPS)
        student = updp_tf.progressive(
            setting.model, setting.plan, calibration=setting.images, schedule=schedule, verbose=False, **options
        )
        return student, updp_tf.merge

    return start


def direct(**options) -> Callable:
    """The merged network at once, then trained."""

    def start(setting: Setting):
        import updp_tf

        small = updp_tf.merge(
            setting.model,
            setting.plan,
            calibration=setting.images,
            options=updp_tf.Options(**options),
            verbose=False,
        )
        return small, None

    return start


def planned(method: str) -> Callable:
    """The merged network of a plan that was found in another way, within the same budget."""

    def start(setting: Setting):
        import updp_tf

        methods = {"genetic": updp_tf.Genetic(trials=40, population=10, seed=0), "random": updp_tf.Random(seed=0)}
        plan = updp_tf.search(
            setting.model,
            calibration=setting.images,
            budget=BUDGET,
            forms=FORMS,
            method=methods.get(method, method),
            verbose=False,
        )
        return direct(refit=True)(replace(setting, plan=plan))

    return start


def cut(setting: Setting):
    """Channels cut in the same budget, in any number."""
    import updp_tf

    return updp_tf.narrow(setting.model, budget=BUDGET, calibration=setting.images, round_to=1, verbose=False), None


def both(setting: Setting):
    """Depth and width in the same budget."""
    import updp_tf

    small = updp_tf.prune(
        setting.model,
        calibration=setting.images,
        budget=BUDGET,
        forms=FORMS,
        width=updp_tf.Width(round_to=1),
        verbose=False,
    )
    return small, None


def dropped(setting: Setting):
    import updp_tf

    return updp_tf.merge(setting.model, setting.drop, calibration=setting.images, verbose=False), None


def scratch(setting: Setting):
    import keras

    small, _ = direct()(setting)
    return keras.models.clone_model(small), None


STARTS: dict[str, Callable] = {
    "progressive, whole block, merged at half": progressive(),
    "direct, least squares": direct(refit=True),
    "blocks dropped": dropped,
    "scratch": scratch,
    "progressive, expanded, merged at half": progressive(mode="expanded"),
    "progressive, expanded, merged at the end": progressive(mode="expanded"),
    "progressive, expanded, lines identity, merged at half": progressive(mode="expanded", lines="identity"),
    "progressive, expanded, lines gaussian, merged at half": progressive(mode="expanded", lines="gaussian"),
    "channels cut": cut,
    "depth and width": both,
    "direct, gaussian": direct(start="gaussian"),
    "direct, identity": direct(start="identity"),
    "progressive, whole block, tail ReLU, merged at half": progressive(tail="relu"),
    **{f"direct, plan by {one}": planned(one) for one in ("exact", "genetic", "learned", "random", "uniform")},
    **{f"direct, least squares, gradients clipped at {norm}": direct(refit=True) for norm in (1, 5)},
    **{f"direct, plan by {one}, gradients clipped at 5": planned(one) for one in ("random", "uniform")},
}
# The main comparison first, with three seeds.
MAIN = (
    "direct, least squares",
    "progressive, whole block, merged at half",
    "blocks dropped",
    "scratch",
    "progressive, expanded, merged at half",
)
WAYS = (*((way, (0, 1, 2)) for way in MAIN), *((way, (0,)) for way in STARTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("baseline", "compare"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], choices=[*STARTS, []], metavar="WAY", help="of `compare`")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.what == "baseline":
        baseline(arguments.work)
    else:
        compare(arguments.work, arguments.only)


if __name__ == "__main__":
    main()
