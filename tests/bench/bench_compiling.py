"""Seconds of a training step with XLA and without it, the original as teacher.

    uv run --frozen python -m tests.bench.bench_compiling [vit | convnext | mobilenet_v2]

On a CPU; alone on its core (`taskset -c 1`, say). MobileNetV2 needs its stored weights and some minutes to compile.
"""

import sys
import time

import keras
import numpy as np

from tests.experiments.norms_training import convnext, vit
from tests.experiments.records import shared_loader

NETWORKS = {
    "vit": (vit, (128, 32, 32, 3), 12),
    "convnext": (convnext, (128, 32, 32, 3), 12),
    "mobilenet_v2": (lambda: shared_loader().mobilenet_v2(), (16, 224, 224, 3), 3),
}
"""What makes the network, a batch of it, and how many steps."""


def main(names: list[str]) -> None:
    for name in names:
        make, shape, n = NETWORKS[name]
        teacher = make()
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        y = np.zeros((len(x), *teacher.output_shape[1:]), "float32")
        trained = {}
        for jit in (False, True):
            distiller = keras.distillation.Distiller(
                teacher,
                keras.models.clone_model(teacher),
                keras.distillation.LogitsDistillation(loss=keras.losses.KLDivergence()),
                student_loss_weight=0.0,
            )
            distiller.compile(optimizer=keras.optimizers.SGD(0.001), loss="mse", jit_compile=jit)
            distiller.student.trainable = True
            distiller.train_on_batch(x, y)
            trained[jit] = distiller
        seconds = {jit: [] for jit in trained}
        for _ in range(n):
            for jit, distiller in trained.items():
                began = time.perf_counter()
                distiller.train_on_batch(x, y)
                seconds[jit].append(time.perf_counter() - began)
        medians = {jit: float(np.median(one)) for jit, one in seconds.items()}
        print(f"{name}: {medians[True]:.2f} s with XLA, {medians[False]:.2f} s without, {n} steps each", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(NETWORKS))
