"""MobileNetV2 (ImageNet weights): blocks merged without training, all ways side by side; rank of R^2; speed.

    uv run --frozen python -m tests.experiments.mobilenet_v2_merging accuracy
    uv run --frozen python -m tests.experiments.mobilenet_v2_merging ranks
    uv run --frozen python -m tests.experiments.mobilenet_v2_merging latency
    uv run --frozen python -m tests.experiments.mobilenet_v2_merging report

The first three write CSV rows beside this file, what is there is not run again; the last prints what is kept of the
original's top-1, with paired bootstrap intervals. Calibrated on 400 images of one half of the ImageNet classes, one
image each, evaluated on the other half pooled with 500 held-out images of ImageNet's validation set. The best blocks
by R^2 of a fitted 3x3, without block 0, whose merged form is 5.8 times dearer.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.experiments.records import HERE, Records, shared_loader
from tests.experiments.resnet56_merging import latency_row, macs_of, predict

N_CALIBRATION = 400
N_MERGED = (5, 3, 8)
WAYS = (
    "in sequence, norms, refit",
    "in sequence, norms",
    "alone",
    "alone, norms",
    "gaussian",
    "gaussian, norms",
    "identity",
    "identity, norms",
)
BLOCK_0 = "expanded_conv_project_BN"


class Data:
    """One direction: calibrate on even classes and evaluate on odd ones, or the other way round.

    Draw 0 leaves out each fifth of the 500 images that there are to calibrate on, any other a hundred by chance.
    """

    def __init__(self, direction: str, draw: int = 0) -> None:
        load = shared_loader()
        images, labels = load.imagenet1000()
        first = 0 if direction == "even" else 1
        every = np.linspace(0, 499, N_CALIBRATION).astype(int)
        if draw:
            every = np.sort(np.random.default_rng(draw).choice(500, N_CALIBRATION, replace=False))
        self.calibration = load.mobilenet_preprocess(images[first::2][every])
        held_out, classes = load.imagenette("heldout")
        other = 1 - first
        self.images = load.mobilenet_preprocess(np.concatenate([images[other::2], held_out]))
        self.labels = np.concatenate([labels[other::2], np.array(list(load.IMAGENETTE))[classes]])

    def hits(self, model) -> np.ndarray:
        return predict(model, self.images).argmax(-1) == self.labels


def pack(hits: np.ndarray) -> str:
    """One bit per image, so that paired intervals can be computed from the CSV."""
    return np.packbits(hits).tobytes().hex()


def unpack(text: str, n: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:n].astype(bool)


def points_lost(before: str, after: str, n: int) -> tuple[float, float, float]:
    """Points of top-1 lost between two packed rows of hits, and their paired 95 % bootstrap interval."""
    lost = unpack(before, n).astype(float) - unpack(after, n)
    draws = lost[np.random.default_rng(0).integers(n, size=(2000, n))].mean(axis=1)
    return 100 * float(lost.mean()), *(100 * float(np.quantile(draws, q)) for q in (0.025, 0.975))


def accuracy_records() -> Records:
    key, values = ("direction", "way", "n_blocks"), ("blocks", "macs", "top1", "n", "hits")
    return Records(HERE / "mobilenet_v2_merging.csv", key, values)


def accuracy() -> None:
    import updp_tf
    from updp_tf.forms import form_by_name
    from updp_tf.merging import Choice, merge_fitted, merge_in_sequence
    from updp_tf.scoring import score, score_without_images

    records = accuracy_records()
    model = shared_loader().mobilenet_v2()
    blocks = updp_tf.find_blocks(model)
    conv3 = [form_by_name("conv3")]

    def row(small, data: Data, names: list[str]) -> dict[str, object]:
        hits = data.hits(small)
        top1 = f"{hits.mean():.4f}"
        return {"blocks": " ".join(names), "macs": macs_of(small), "top1": top1, "n": len(hits), "hits": pack(hits)}

    starts = {start: score_without_images(blocks, forms=conv3, start=start) for start in ("identity", "gaussian")}
    # The main ways first, in both directions: they decide what is asked of the method.
    for ways, direction in itertools.product((WAYS[:1], WAYS[1:2], WAYS[2:]), ("even", "odd")):
        if all(records.find(direction=direction, way=way, n_blocks=n) for way in ways for n in N_MERGED):
            continue
        data = Data(direction)
        images = data.calibration
        records.ensure(lambda d=data: row(model, d, []), direction=direction, way="original", n_blocks=0)
        scores = score(blocks, images, forms=conv3, keep=[BLOCK_0])
        for n in N_MERGED:
            best = sorted(scores.candidates, key=lambda one: one.score)[:n]
            names = [one.blocks[0] for one in best]
            picked = [Choice(one.blocks[0], "conv3", one.options["skip"]) for one in best]
            maps = {
                "alone": {name: scores.fitted[f"{name}=conv3"] for name in names},
                "gaussian": {name: starts["gaussian"].fitted[f"{name}=conv3"] for name in names},
                "identity": {name: starts["identity"].fitted[f"{name}=conv3"] for name in names},
            }

            def run(way: str, picked=picked, maps=maps, images=images):
                start = way.split(",")[0]
                if start == "in sequence":
                    return merge_in_sequence(blocks, picked, images, refit="refit" in way).model
                if "norms" in way:
                    return merge_in_sequence(blocks, picked, images, fitted=maps[start]).model
                return merge_fitted(blocks, picked, maps[start], kind="fitted").model

            for way in ways:
                records.ensure(
                    lambda way=way, run=run, data=data, names=names: row(run(way), data, names),
                    direction=direction,
                    way=way,
                    n_blocks=n,
                )


def ranks() -> None:
    """R^2 of each block's fitted 3x3, and top-1 with that block alone merged."""
    import updp_tf
    from updp_tf.forms import form_by_name
    from updp_tf.merging import Choice, merge_fitted
    from updp_tf.scoring import score

    records = Records(HERE / "mobilenet_v2_ranks.csv", ("block",), ("r2", "kl", "top1", "n"))
    model = shared_loader().mobilenet_v2()
    blocks = updp_tf.find_blocks(model)
    data = Data("even")
    scores = score(blocks, data.calibration, forms=[form_by_name("conv3")], keep=[BLOCK_0])
    wanted = predict(model, data.calibration[:200])

    def row(one) -> dict[str, object]:
        choice = Choice(one.blocks[0], "conv3", one.options["skip"])
        small = merge_fitted(blocks, [choice], {one.blocks[0]: scores.fitted[one.key]}, kind="fitted").model
        outputs = predict(small, data.calibration[:200])
        kl = float(np.sum(wanted * (np.log(wanted + 1e-12) - np.log(outputs + 1e-12)), axis=-1).mean())
        hits = data.hits(small)
        return {"r2": f"{one.r2:.4f}", "kl": f"{kl:.4f}", "top1": f"{hits.mean():.4f}", "n": len(hits)}

    for one in scores.candidates:
        records.ensure(lambda one=one: row(one), block=one.blocks[0])


def latency() -> None:
    """Whole networks, float32 and int8, one thread, interleaved: 5 blocks in dense and in separable form."""
    import tflite_export
    import updp_tf
    from updp_tf.forms import form_by_name
    from updp_tf.merging import Choice, merge_in_sequence

    model = shared_loader().mobilenet_v2()
    blocks = updp_tf.find_blocks(model)
    data = Data("even")
    names = accuracy_records().find(direction="even", way="in sequence, norms, refit", n_blocks=5)["blocks"].split()
    images = data.calibration[:200]
    models = {"original": model}
    for form in ("conv3", "separable3", "remove"):
        able = [name for name in names if form_by_name(form).refuses(blocks[name], skip="kept") is None]
        if able:
            choices = [Choice(name, form, "kept") for name in able]
            models[f"{form} {len(able)}"] = merge_in_sequence(blocks, choices, images).model
    columns = ("macs", "size_bytes", "median_ms", "p10_ms", "p90_ms", "ratio", "low", "high", "n", "threads", "runtime")
    records = Records(
        HERE / "mobilenet_v2_latency.csv", ("precision", "network"), (*columns, "top1", "n_images", "float_tensors")
    )
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("float32", "int8"):
            jobs = [(one, Path(folder) / f"{precision}-{i}.tflite") for i, one in enumerate(models.values())]
            made = tflite_export.export_many(
                jobs, quantize=precision, calibration=images if precision == "int8" else None
            )
            table = tflite_export.benchmark([path for _, path in jobs], threads=1)
            for name, one, result, file in zip(models, models.values(), table.rows, made, strict=True):

                def row(one=one, result=result, file=file) -> dict[str, object]:
                    found = tflite_export.evaluate(file.path, data.images, data.labels)
                    extra = {"top1": f"{found.top1:.4f}", "n_images": found.n, "float_tensors": len(file.float_tensors)}
                    return {"macs": macs_of(one), **latency_row(result)} | extra

                records.ensure(row, precision=precision, network=name)


def report() -> None:
    """Print what each way keeps of the original's top-1: mean of both directions, and the paired interval."""
    records = accuracy_records()
    print(f"{'way':28} {'blocks':>6} {'kept':>7}   95 % interval   (even, odd)")
    for n in sorted(N_MERGED):
        for way in WAYS:
            kept = []
            for direction in ("even", "odd"):
                before = records.find(direction=direction, way="original", n_blocks=0)
                after = records.find(direction=direction, way=way, n_blocks=n)
                if before is None or after is None:
                    continue
                size = int(before["n"])
                kept.append((unpack(before["hits"], size), unpack(after["hits"], size)))
            if kept:
                mean, low, high = kept_interval(kept)
                each = ", ".join(f"{a.mean() / b.mean():.3f}" for b, a in kept)
                print(f"{way:28} {n:6} {mean:7.3f}   [{low:.3f}, {high:.3f}]   ({each})")


def kept_interval(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """Mean over directions of (hits after) / (hits before), and its paired bootstrap interval."""
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(2000):
        ratios = []
        for before, after in pairs:
            index = rng.integers(len(before), size=len(before))
            ratios.append(after[index].mean() / before[index].mean())
        draws.append(np.mean(ratios))
    mean = float(np.mean([after.mean() / before.mean() for before, after in pairs]))
    return mean, float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


if __name__ == "__main__":
    {"accuracy": accuracy, "ranks": ranks, "latency": latency, "report": report}[sys.argv[1]]()
