"""Train what was pruned: at once or with the plan blended in, in stages that a run directory keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from updp_tf.graph import build_model, load_model, read_graph
from updp_tf.judging import divergence
from updp_tf.memory import DEFAULT_LIMIT_BYTES
from updp_tf.mending import reestimate_norms
from updp_tf.progress import progressive
from updp_tf.runs import RunDir
from updp_tf.settling import merged_student
from updp_tf.training import Batches, Training, require_like, train
from updp_tf.walking import Progress


def train_pruned(
    model: Any,
    merged: Any,
    plan_path: Path,
    training: Training,
    data: Any,
    *,
    images: np.ndarray | None,
    validation: Iterable[Any] | None = None,
    run: RunDir | None = None,
    memory_bytes: int = DEFAULT_LIMIT_BYTES,
    progress: Progress | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """Return the pruned model after its training, and sentences for people.

    Args:
        model: the original, which teaches; it is not changed.
        merged: the model with the plan applied at once; trained in place where the mode is `direct`.
        plan_path: of the plan, its fitted arrays beside it.
        training: how.
        data: to train on.
        images: calibration images, or None.
        validation: batches for the log.
        run: directory that is locked, or None.
        memory_bytes: activations beyond this go to disk.
        progress: called after every step.

    Raises:
        TrainingError: the data do not fit, or the loss is no number.
    """
    batches = Batches(data, training)
    if images is not None:
        require_like(batches, images)
    teacher = build_model(read_graph(model))  # the Distiller freezes its teacher
    total = training.epochs * batches.steps_per_epoch

    def trained(stage: str, make: Callable[[], Any], first: int, last: int) -> Any:
        def compute() -> Any:
            net = make()
            train(
                net,
                teacher,
                batches,
                training,
                steps=(first, last, total),
                validation=validation,
                run=run,
                stage=stage,
                progress=progress,
            )
            return net

        if run is None:
            return compute()
        return run.stage(
            stage,
            compute,
            write=lambda net, folder: net.save(folder / "net.keras"),
            read=lambda folder: load_model(folder / "net.keras", like=model),
        )

    mode = training.mode
    if mode == "direct":
        net = trained("merged", lambda: merged, 0, total)
    else:
        until = math.ceil(training.schedule.until * total)
        turn = min(until, total) if training.merge_at_zero else total

        def make_student() -> Any:
            return progressive(
                model,
                plan_path,
                calibration=images,
                schedule=replace(training.schedule, total_steps=total),
                mode=mode,
                tail=training.tail,
                memory_bytes=memory_bytes,
                verbose=False,
            )

        student = trained("student", make_student, 0, turn)
        net = merged_student(student)[0]
        if turn < total:
            small = net
            net = trained("merged", lambda: small, turn, total)
    return (net, ()) if training.freeze_norms else _renewed(net, teacher, images, memory_bytes)


def _renewed(net: Any, teacher: Any, images: np.ndarray | None, memory_bytes: int) -> tuple[Any, tuple[str, ...]]:
    """Return the network with its norms' exact statistics where that brings its outputs closer to the original's.

    Moving averages lag behind: with a momentum of 0.999 a short training leaves them useless.
    """
    if images is None or not any(isinstance(one, keras.layers.BatchNormalization) for one in net.layers):
        return net, ()
    renewed = reestimate_norms(net, images, memory_bytes=memory_bytes)
    before, after = (_divergence(one, teacher, images[:512]) for one in (net, renewed))
    told = f"norms renewed after training: divergence on calibration images {before:.4f} -> {after:.4f}"
    return (renewed, (f"{told}, kept",)) if after < before else (net, (f"{told}, not kept",))


def _divergence(net: Any, teacher: Any, images: np.ndarray) -> float:
    outputs = [
        np.concatenate(
            [
                keras.ops.convert_to_numpy(keras.tree.flatten(one(images[i : i + 64], training=False))[0])
                for i in range(0, len(images), 64)
            ]
        )
        for one in (teacher, net)
    ]
    return divergence(outputs[0], outputs[1])
