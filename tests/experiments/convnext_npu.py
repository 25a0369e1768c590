"""A ConvNeXt-Tiny on two NPUs: as it is, with its blocks merged, and with its norms and activations linearized as well.

    uv run --frozen python -m tests.experiments.convnext_npu make [SIZE]
    uv run --frozen python -m tests.experiments.convnext_npu times [SIZE]
    uv run --frozen python -m tests.experiments.convnext_npu report

The first writes convnext_npu.csv beside this file, row by row, and leaves the int8 files in the system's folder for
temporary files; the second times them here (the machine must be idle) into convnext_npu_times.csv. SIZE is that of the
images, 224 if not given. Weights and images are random: accuracy is not what is asked here. What the Edge TPU maps is
told by its documented rules, what the Ethos-U runs and how long by its compiler, Vela.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.experiments.records import HERE, Records

WORK = Path(tempfile.gettempdir()) / "updp-tf-convnext"
ACCELERATOR = "ethos-u55-256"
N_IMAGES, N_RANGES = 48, 16
NETWORKS = ("original", "merged", "merged and linearized")


def records() -> Records:
    values = (
        *("macs", "blocks_merged", "operators", "edgetpu_mapped", "edgetpu_reads", "edgetpu_stopped_by"),
        *("ethosu_cpu_operators", "ethosu_cpu_kinds", "ethosu_estimated_ms"),
    )
    return Records(HERE / "convnext_npu.csv", ("size", "network"), values)


def make(size: int = 224) -> None:
    import keras

    keras.utils.set_random_seed(0)
    images = np.random.default_rng(0).normal(size=(N_IMAGES, size, size, 3)).astype("float32")
    model = keras.applications.ConvNeXtTiny(
        weights=None, input_shape=(size, size, 3), classes=100, include_preprocessing=False
    )
    give_weights(model)
    WORK.mkdir(exist_ok=True)
    made = {"original": model}
    for name in NETWORKS:
        records().ensure(
            lambda name=name: row(network(name, made, images), name, size, images), size=size, network=name
        )


def give_weights(model) -> None:
    """Replace Keras' own start by numbers that let every layer do something: its scales are 1e-6, its biases 0."""
    rng = np.random.default_rng(1)
    for layer in model._flatten_layers(include_self=False):
        for weight in layer.weights:
            if weight.path.endswith("/gamma"):
                weight.assign(rng.uniform(0.3, 1.0, weight.shape))
            elif weight.path.endswith(("/bias", "/beta")):
                weight.assign(0.2 * rng.normal(size=weight.shape))


def network(name: str, made: dict, images: np.ndarray):
    """Return a network, made from the one before it, or by an earlier run."""
    import keras

    import updp_tf
    from updp_tf.training import blend_layers

    saved = file_of(name, images.shape[1]).with_suffix(".keras")
    if name not in made and saved.exists():
        made[name] = keras.saving.load_model(saved)
    if name not in made:
        before = network(NETWORKS[NETWORKS.index(name) - 1], made, images)
        if name == "merged":
            n = len(updp_tf.find_blocks(before))
            made[name] = updp_tf.prune(
                before, calibration=images, budget={"merged": n}, forms=("separable7",), verbose=False
            )
        else:
            schedule = updp_tf.Schedule(total_steps=1, until=1.0)
            student = updp_tf.linearize(before, calibration=images, norms="all", activations="all", schedule=schedule)
            for layer in blend_layers(student):  # as the end of a training leaves them
                layer.step.assign(1)
            made[name] = updp_tf.merge(student)
        made[name].save(saved)
    return made[name]


def file_of(name: str, size: int) -> Path:
    return WORK / f"{name.replace(' ', '_')}_{size}.tflite"


def row(model, name: str, size: int, images: np.ndarray) -> dict[str, object]:
    import tflite_export
    from updp_tf.blocks import network_cost, prepared_graph

    path = file_of(name, size)
    # as the target wants it, where it runs anything of it
    ask = {"quantize": "int8", "calibration": images[:N_RANGES], "force": True}
    try:
        tflite_export.export(model, path, target="edgetpu", **ask)
    except tflite_export.ExportError:
        if name == NETWORKS[-1]:
            raise
        tflite_export.export(model, path, **ask)
    tpu = tflite_export.check_edgetpu(path)
    npu = tflite_export.compile_ethosu(path, ACCELERATOR, WORK / f"{path.stem}_vela.tflite", force=True)
    kinds = sorted({one.name for one in npu.cpu_operators})
    stopped = tpu.blocker.operator if tpu.blocker else next((one for one in tpu.operators if not one.mapped), None)
    return {
        "macs": network_cost(prepared_graph(model)).macs,
        "blocks_merged": len(model.pruning.blocks) if hasattr(model, "pruning") else "",
        "operators": len(tpu.operators),
        "edgetpu_mapped": tpu.n_mapped,
        "edgetpu_reads": not tpu.rejections,
        "edgetpu_stopped_by": f"{stopped.name}: {stopped.reason}" if stopped else "",
        "ethosu_cpu_operators": npu.n_cpu_operators,
        "ethosu_cpu_kinds": " ".join(kinds),
        "ethosu_estimated_ms": "" if npu.estimated_ms is None else f"{npu.estimated_ms:.2f}",
    }


def timed() -> Records:
    values = ("median_ms", "ratio", "low", "high", "noisy", "load", "runtime", "description")
    return Records(HERE / "convnext_npu_times.csv", ("size", "network"), values)


def times(size: int = 224) -> None:
    import tflite_export

    table = tflite_export.benchmark([file_of(name, size) for name in NETWORKS])
    for name, one in zip(NETWORKS, table.rows, strict=True):
        values = {
            "median_ms": f"{one.median_ms:.3f}",
            "ratio": f"{one.ratio:.4f}",
            "low": f"{one.ratio_low:.4f}",
            "high": f"{one.ratio_high:.4f}",
            "noisy": one.noisy,
            "load": one.device.load_average,
            "runtime": one.device.runtime,
            "description": one.device.description,
        }
        timed().ensure(lambda values=values: values, size=size, network=name)


def report() -> None:
    for one in records().rows:
        told = f"{one['edgetpu_mapped']} of {one['operators']} operators on the Edge TPU"
        stop = f", stopped by {one['edgetpu_stopped_by']}" if one["edgetpu_stopped_by"] else ""
        npu = f"{one['ethosu_cpu_operators']} left on the CPU by Vela, its estimate {one['ethosu_estimated_ms']} ms"
        print(f"{one['size']} pixels, {one['network']}: {int(one['macs']) / 1e6:.0f} M MACs; {told}{stop}; {npu}")
    for one in timed().rows:
        ratio = f"x {one['ratio']} [{one['low']}, {one['high']}]"
        print(f"{one['size']} pixels, {one['network']}: {one['median_ms']} ms, {ratio}")


if __name__ == "__main__":
    {"make": make, "times": times, "report": report}[sys.argv[1]](*map(int, sys.argv[2:]))
