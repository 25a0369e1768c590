"""ResNet-56 on CIFAR-10: blocks merged without training, all ways side by side, and the int8 speed of each network.

    uv run --frozen python -m tests.experiments.resnet56_merging accuracy
    uv run --frozen python -m tests.experiments.resnet56_merging latency

Writes resnet56_merging.csv and resnet56_latency.csv beside this file, row by row; what is there is not run again.
Blocks are taken by the R^2 of their fitted 3x3 on held-out calibration images. Three draws of 600 calibration images
from the training images; accuracy on 1,000 test images, which choose nothing.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.experiments.records import HERE, Records, shared_loader

DRAWS = (0, 1, 2)
N_CALIBRATION = 600
N_MERGED = (16, 20, 12, 8, 4, 27)
# fewer MACs of the merged networks: what block dropping has to reach
DROPPED = (4, 6, 8, 10)


def accuracy() -> None:
    load = shared_loader()
    import updp_tf
    from updp_tf.forms import form_by_name
    from updp_tf.merging import Choice, merge_fitted, merge_in_sequence
    from updp_tf.scoring import score, score_without_images

    records = Records(HERE / "resnet56_merging.csv", ("draw", "way", "n_blocks"), ("macs", "top1", "n_test"))
    model = load.resnet56()
    blocks = updp_tf.find_blocks(model)
    (x_train, _), (x_test, y_test) = load.cifar10()
    x_test = load.cifar_preprocess(x_test)

    def row(small) -> dict[str, object]:
        outputs = predict(small, x_test)
        top1 = float((outputs.argmax(-1) == y_test).mean())
        return {"macs": macs_of(small), "top1": f"{top1:.4f}", "n_test": len(y_test)}

    records.ensure(lambda: row(model), draw="-", way="original", n_blocks=0)
    # The way that `prune` takes and greedy dropping for every draw; the others are shown for one draw.
    for draw, wanted in (*((draw, MAIN_WAY) for draw in DRAWS), (DRAWS[0], WAYS)):
        chosen = np.random.default_rng(draw).choice(len(x_train), N_CALIBRATION, replace=False)
        images = load.cifar_preprocess(x_train[chosen])
        scores = None
        for n in N_MERGED:
            if all(records.find(draw=draw, way=way, n_blocks=n) for way in wanted):
                continue
            if scores is None:
                scores = score(blocks, images, forms=[form_by_name("conv3")])
                starts = {
                    (start, form): score_without_images(
                        blocks, forms=[form_by_name(form)], unit="activation_bytes", start=start
                    )
                    for start in ("identity", "gaussian")
                    for form in ("conv3", "conv5")
                }
            best = sorted(scores.candidates, key=lambda one: one.score)[:n]
            names = [one.blocks[0] for one in best]
            modes = {one.blocks[0]: one.options["skip"] for one in best}
            choices = [Choice(name, "conv3", modes[name]) for name in names]
            alone = {name: scores.fitted[f"{name}=conv3"] for name in names}

            def given(start: str, form: str, reestimate: bool = False, names=names, modes=modes):
                fitted = {name: starts[start, form].fitted.get(f"{name}={form}") for name in names}
                if None in fitted.values():
                    return None
                picked = [Choice(name, form, modes[name]) for name in names]
                if not reestimate:
                    return merge_fitted(blocks, picked, fitted, kind="linearized").model
                return merge_in_sequence(blocks, picked, images, fitted=fitted).model

            ways = {
                "identity 5x5": lambda g=given: g("identity", "conv5"),
                "gaussian 5x5": lambda g=given: g("gaussian", "conv5"),
                "gaussian 3x3": lambda g=given: g("gaussian", "conv3"),
                "gaussian 3x3, norms": lambda g=given: g("gaussian", "conv3", reestimate=True),
                "alone": lambda c=choices, a=alone: merge_fitted(blocks, c, a, kind="fitted").model,
                "alone, norms": lambda c=choices, a=alone: merge_in_sequence(blocks, c, images, fitted=a).model,
                "in sequence": lambda c=choices: merge_in_sequence(blocks, c, images, reestimate=False).model,
                "in sequence, norms": lambda c=choices: merge_in_sequence(blocks, c, images).model,
                "in sequence, norms, refit": lambda c=choices: merge_in_sequence(blocks, c, images, refit=True).model,
            }
            for way in wanted:
                if records.find(draw=draw, way=way, n_blocks=n) is None and (small := ways[way]()) is not None:
                    records.ensure(lambda small=small: row(small), draw=draw, way=way, n_blocks=n)
        drop_blocks(records, blocks, images, draw, row)


WAYS = (
    "identity 5x5",
    "gaussian 5x5",
    "gaussian 3x3",
    "gaussian 3x3, norms",
    "alone",
    "alone, norms",
    "in sequence",
    "in sequence, norms",
    "in sequence, norms, refit",
)
MAIN_WAY = ("in sequence, norms, refit",)


def drop_blocks(records: Records, blocks, images, draw, row) -> None:
    """The fair depth rival: drop the block whose loss changes the logits least, again and again, then renew norms."""
    from updp_tf.forms import form_by_name
    from updp_tf.merging import Choice, merge_in_sequence

    way = "drop blocks greedily, norms"
    if all(records.find(draw=draw, way=way, n_blocks=n) for n in DROPPED):
        return
    remove = form_by_name("remove")
    droppable = [block.name for block in blocks if block.skip_kind == "identity"]
    nothing = {name: remove.fit(blocks[name], None, skip="kept", ridge=0.0) for name in droppable}
    probe = images[:100]
    wanted = logits_without(blocks, [], nothing, probe)
    dropped: list[str] = []
    while len(dropped) < max(DROPPED):
        left = [name for name in droppable if name not in dropped]
        errors = [
            (float(np.square(logits_without(blocks, [*dropped, name], nothing, probe) - wanted).mean()), name)
            for name in left
        ]
        dropped.append(min(errors)[1])
        if len(dropped) in DROPPED:
            picked = [Choice(name, "remove", "kept") for name in dropped]
            fitted = {name: nothing[name] for name in dropped}
            records.ensure(
                lambda p=picked, f=fitted: row(merge_in_sequence(blocks, p, images, fitted=f).model),
                draw=draw,
                way=way,
                n_blocks=len(dropped),
            )


def logits_without(blocks, dropped: list[str], nothing, images) -> np.ndarray:
    """Log-probabilities, centred, of the network without some blocks."""
    import keras

    from updp_tf.folding import fold_norms_in
    from updp_tf.graph import run_nodes
    from updp_tf.merging import assemble, build_edit

    edits = {name: build_edit(blocks.graph, blocks[name], nothing[name]) for name in dropped}
    graph, _ = fold_norms_in(assemble(blocks, edits, {}))
    values = {graph.input_refs[0]: keras.ops.convert_to_tensor(images)}
    run_nodes(graph, values)
    logs = np.log(keras.ops.convert_to_numpy(values[graph.output_refs[0]]) + 1e-7)
    return logs - logs.mean(axis=-1, keepdims=True)


def predict(model, images) -> np.ndarray:
    import keras

    import updp_tf

    fast = updp_tf.fold_norms(model)
    parts = [fast(images[i : i + 100], training=False) for i in range(0, len(images), 100)]
    return np.concatenate([keras.ops.convert_to_numpy(part) for part in parts])


def macs_of(model) -> int:
    from updp_tf.blocks import network_cost, prepared_graph

    return network_cost(prepared_graph(model)).macs


def latency() -> None:
    """Speed of the networks' structures, int8 and float32, one thread, all files interleaved in one run."""
    load = shared_loader()
    import tflite_export
    import updp_tf
    from updp_tf.forms import form_by_name
    from updp_tf.merging import Choice, merge_fitted
    from updp_tf.scoring import score, score_without_images

    model = load.resnet56()
    blocks = updp_tf.find_blocks(model)
    (x_train, _), _ = load.cifar10()
    images = load.cifar_preprocess(x_train[:200])
    scores = score(blocks, images, forms=[form_by_name("conv3")])
    best = sorted(scores.candidates, key=lambda one: one.score)
    models = {"original": model}
    for n in N_MERGED:
        choices = [Choice(one.blocks[0], "conv3", one.options["skip"]) for one in best[:n]]
        fitted = {one.blocks[0]: scores.fitted[one.key] for one in best[:n]}
        models[f"merged {n}"] = merge_fitted(blocks, choices, fitted, kind="fitted").model
    gaussian = score_without_images(blocks, forms=[form_by_name("conv5")], unit="activation_bytes", start="gaussian")
    names = [one.blocks[0] for one in best if f"{one.blocks[0]}=conv5" in gaussian.fitted][:12]
    choices = [Choice(name, "conv5", "kept") for name in names]
    fitted = {name: gaussian.fitted[f"{name}=conv5"] for name in names}
    models["composed 5x5, 12"] = merge_fitted(blocks, choices, fitted, kind="linearized").model
    names = [block.name for block in blocks if block.skip_kind == "identity"]
    for n in DROPPED:
        picked = [Choice(name, "remove", "kept") for name in names[:n]]
        empty = {one.block: form_by_name("remove").fit(blocks[one.block], None, skip="kept", ridge=0) for one in picked}
        models[f"dropped {n}"] = merge_fitted(blocks, picked, empty, kind="linearized").model
    columns = ("macs", "size_bytes", "median_ms", "p10_ms", "p90_ms", "ratio", "low", "high", "n", "threads", "runtime")
    records = Records(HERE / "resnet56_latency.csv", ("precision", "network"), columns)
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("float32", "int8"):
            jobs = [(one, Path(folder) / f"{precision}-{i}.tflite") for i, one in enumerate(models.values())]
            data = images[:100] if precision == "int8" else None
            tflite_export.export_many(jobs, quantize=precision, calibration=data)
            table = tflite_export.benchmark([path for _, path in jobs], threads=1)
            for name, one, result in zip(models, models.values(), table.rows, strict=True):
                records.ensure(
                    lambda one=one, result=result: {"macs": macs_of(one), **latency_row(result)},
                    precision=precision,
                    network=name,
                )


def latency_row(result) -> dict[str, object]:
    return {
        "size_bytes": result.size_bytes,
        "median_ms": f"{result.median_ms:.4f}",
        "p10_ms": f"{result.p10_ms:.4f}",
        "p90_ms": f"{result.p90_ms:.4f}",
        "ratio": f"{result.ratio:.4f}",
        "low": f"{result.ratio_low:.4f}",
        "high": f"{result.ratio_high:.4f}",
        "n": result.n,
        "threads": result.threads,
        "runtime": f"{result.device.runtime} {result.delegate}",
    }


if __name__ == "__main__":
    {"accuracy": accuracy, "latency": latency}[sys.argv[1]]()
