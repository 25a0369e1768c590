"""Train a student: what its training is made of, distillation from the original, checkpoints, the blends' callback.

A training runs in pieces between checkpoints. What decides the next piece (weights, counters and random states of the
network, the optimizer, the position in the data) is in the checkpoint, so that a training that was stopped goes on with
the values of an unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from updp_tf._keras import layers_within
from updp_tf.augmenting import Augmentation
from updp_tf.compiling import jit_compile
from updp_tf.errors import ScheduleError, TrainingError
from updp_tf.layers import Blend
from updp_tf.runs import RunDir
from updp_tf.schedule import Schedule
from updp_tf.walking import Progress

COLUMNS = ("step", "blend", "loss", "validation")
"""Of the log of a training; `validation` is the accuracy where there are labels, else agreement with the original."""

SMALLEST_PROBABILITY = 1e-7


@dataclass(frozen=True)
class Training:
    """How `prune` trains what it has pruned.

    The defaults follow `tests/experiments/resnet20_training.csv`.

    Attributes:
        epochs: over the training data.
        mode: `direct` puts the fitted forms in at once and trains the merged network; `whole` and `expanded` blend them
            in (see `progressive`).
        schedule: of the blends, `total_steps` filled in; not for `direct`.
        merge_at_zero: merge once every blend is 0, and train the merged network for the rest.
        batch_size: where the data are arrays.
        learning_rate: of SGD with Nesterov momentum 0.9, gradients clipped to a norm of 5, cosine decay to 0; where
            `optimizer` is None.
        optimizer: a Keras optimizer, of which a copy is used.
        label_weight: of the loss on labels against that on the original's outputs, where the data have labels.
        loss: on labels; cross-entropy for models that give classes, where None.
        temperature: of the distillation of classes.
        tail: activation that is blended in behind every pruned block, or None.
        freeze_norms: keep the BatchNormalizations as they were fitted, their statistics included: for few images, or
            batches too small to take statistics of.
        checkpoint_steps: between checkpoints in the run directory; an epoch where None.
        steps_per_epoch: for data that do not tell.
        augmentation: of the training images, or None.
        callbacks: Keras callbacks, for instance `keras.callbacks.TensorBoard`.
        seed: of the order of arrays and of layers that draw.
    """

    epochs: int = 10
    mode: Literal["direct", "whole", "expanded"] = "direct"
    schedule: Schedule = field(default_factory=Schedule)
    merge_at_zero: bool = True
    batch_size: int = 64
    learning_rate: float = 0.01
    optimizer: Any = None
    label_weight: float = 0.5
    loss: Any = None
    temperature: float = 3.0
    tail: str | None = None
    freeze_norms: bool = False
    checkpoint_steps: int | None = None
    steps_per_epoch: int | None = None
    augmentation: Augmentation | None = None
    callbacks: tuple[Any, ...] = ()
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        """What decides the result, as plain data."""
        optimizer = None if self.optimizer is None else keras.optimizers.serialize(self.optimizer)
        loss = None if self.loss is None else str(keras.losses.serialize(keras.losses.get(self.loss)))
        augmentation = None if self.augmentation is None else asdict(self.augmentation)
        replaced = {
            "optimizer": optimizer,
            "loss": loss,
            "schedule": asdict(self.schedule),
            "augmentation": augmentation,
        }
        kept = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("callbacks", *replaced)}
        return {**kept, **replaced}


def blend_layers(model: Any) -> Iterator[Blend]:
    """Yield the blend layers of a model and of the models inside it, a `Distiller`'s student for instance."""
    for layer in model.layers:
        if isinstance(layer, Blend):
            yield layer
        elif hasattr(layer, "layers"):
            yield from blend_layers(layer)


class BlendSchedule(keras.callbacks.Callback):
    """Logs the mean blend as `blend` after each epoch, and fills in how long the training is where that is missing.

    The schedule itself is in the student. Works on the student and on whatever wraps it, such as a `Distiller`.

    Args:
        goes_on: the training goes on in another `fit`, so blends need not reach 0 in this one.

    Raises:
        ScheduleError: at the start, where the schedule is longer than the training; the message says which step it
            needs.
    """

    def __init__(self, goes_on: bool = False) -> None:
        super().__init__()
        self.goes_on = goes_on

    def on_train_begin(self, logs: Any = None) -> None:
        """Fill in `total_steps`, and refuse a schedule that the training is too short for."""
        steps, epochs = self.params.get("steps"), self.params["epochs"]
        layers = list(blend_layers(self.model))
        for layer in layers:
            if layer.total_steps is None:
                if steps is None:
                    raise ScheduleError(
                        "How many steps an epoch has is not known, so the schedule cannot be filled in: give "
                        "steps_per_epoch to fit, or Schedule(total_steps=...)."
                    )
                layer.set_total_steps(steps * epochs)
        if steps is None or self.goes_on:
            return
        for layer in layers:
            end = int(keras.ops.convert_to_numpy(layer.window)[1])
            last = int(keras.ops.convert_to_numpy(layer.step)) + steps * epochs
            if end > last and not layer.learned:
                raise ScheduleError(
                    f"The blend of '{layer.block or layer.name}' reaches 0 at step {end}, but the training ends after "
                    f"{last}: train longer, shorten the schedule, or say BlendSchedule(goes_on=True)."
                )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Log the mean blend."""
        blends = [layer.blend for layer in blend_layers(self.model)]
        if logs is not None and blends:
            logs["blend"] = float(np.mean(blends))


class Batches:
    """Training data as batches by the number of their step, the same ones whenever they are asked for.

    Where processes share a training (`keras.distribution`), each gets its own rows of every batch.

    Args:
        data: (images, labels) or images as arrays, shuffled anew in each epoch; a `PyDataset`; or anything with a
            length that gives the same batches each time it is iterated, a `tf.data.Dataset` for instance.
        training: batch size, seed and steps per epoch.

    Raises:
        TrainingError: the data are empty, or do not tell how many batches they have.
    """

    def __init__(self, data: Any, training: Training) -> None:
        self._data, self._training = data, training
        self._arrays = _as_arrays(data)
        self._at, self._iterator = 0, iter(())
        self._shard, self._n_shards = _own_shard()
        if self._arrays is not None:
            steps = len(self._arrays[0]) // training.batch_size
        else:
            steps = training.steps_per_epoch or _length(data)
        if steps < 1:
            raise TrainingError(
                "The training data hold less than one batch: give more images, or a smaller batch_size."
            )
        self.steps_per_epoch = steps

    def window(self, first: int, last: int) -> Any:
        """Return steps `first` up to `last` in a form that `fit` reads."""
        if self._arrays is not None or isinstance(self._data, keras.utils.PyDataset):
            return _Window(self, first, last)
        return (self._prepared(self._next(step), step) for step in range(first, last))

    def __getitem__(self, step: int) -> tuple[Any, ...]:
        return self._prepared(self._whole(step), step)

    def _prepared(self, batch: tuple[Any, ...], step: int) -> tuple[Any, ...]:
        """Return a batch as this process trains on it."""
        if self._training.augmentation is not None:
            batch = self._training.augmentation(batch, (self._training.seed, step))
        if self._n_shards == 1:
            return batch
        if (n := len(batch[0])) % self._n_shards:
            raise TrainingError(
                f"{self._n_shards} processes cannot share a batch of {n} images evenly: choose another batch_size."
            )
        return tuple(part[self._shard :: self._n_shards] for part in batch)

    def _whole(self, step: int) -> tuple[Any, ...]:
        if self._arrays is None:
            return _as_tuple(self._data[step % self.steps_per_epoch])
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self._training.seed, epoch)).permutation(len(self._arrays[0]))
        picked = order[place * self._training.batch_size : (place + 1) * self._training.batch_size]
        return tuple(array[picked] for array in self._arrays)

    def first(self) -> tuple[Any, ...]:
        """Return one batch, to look at."""
        if self._arrays is not None or isinstance(self._data, keras.utils.PyDataset):
            return self._whole(0)
        return _as_tuple(next(iter(self._data)))

    def _next(self, step: int) -> tuple[Any, ...]:
        # A training that goes on begins in the middle of an epoch: what came before is passed over.
        if step % self.steps_per_epoch == 0 or self._at != step:
            self._iterator = iter(self._data)
            for _ in range(step % self.steps_per_epoch):
                next(self._iterator)
        self._at = step + 1
        return _as_tuple(next(self._iterator))


class _Window(keras.utils.PyDataset):
    def __init__(self, batches: Batches, first: int, last: int) -> None:
        super().__init__()
        self._batches, self._first, self._last = batches, first, last

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self._batches[self._first + index]


def _own_shard() -> tuple[int, int]:
    """Return which part of each batch this process trains on, and how many parts there are."""
    spread = keras.distribution.distribution()
    if spread is None or spread.num_processes == 1:
        return 0, 1
    if spread.auto_shard_dataset:
        raise TrainingError(
            "Each process takes its own rows of every batch here, and Keras would shard a dataset once more: set "
            "DataParallel(auto_shard_dataset=False)."
        )
    return spread.data_shard_id, min(spread.num_processes, spread.num_model_replicas)


def _as_arrays(data: Any) -> tuple[np.ndarray, ...] | None:
    parts = data if isinstance(data, tuple) else (data,)
    return parts if all(isinstance(part, np.ndarray) for part in parts) else None


def _as_tuple(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, list | tuple) else (batch,)


def _length(data: Any) -> int:
    try:
        return len(data)
    except TypeError as error:
        raise TrainingError(
            "How many batches the training data have is not known: set Training(steps_per_epoch=...)."
        ) from error


def train(
    net: Any,
    teacher: Any,
    data: Batches,
    training: Training,
    *,
    steps: tuple[int, int, int],
    validation: Iterable[Any] | None,
    run: RunDir | None,
    stage: str,
    progress: Progress | None,
) -> None:
    """Distil a network in place, from its last checkpoint where there is one.

    Args:
        net: plain, or a student whose blends go on from where they are.
        teacher: the original; it is not changed.
        data: to train on.
        training: how.
        steps: where this part of the training begins, where it ends, and how long the whole training is.
        validation: batches of (images, labels) or images, for the log.
        run: where checkpoints and the log go, or None.
        stage: name of this part of the training.
        progress: called with (steps done, steps in all, what is done).

    Raises:
        TrainingError: the loss is no number; the message says at which step, and where the last good state is.
    """
    begin, end, total = steps
    with _frozen_norms(net) if training.freeze_norms else nullcontext():
        keras.utils.set_random_seed(training.seed)
        optimizer = _optimizer(training, total)
        optimizer.build(net.trainable_variables)
        optimizer.iterations.assign(begin)
        labelled = len(data.first()) > 1
        distiller = keras.distillation.Distiller(
            teacher, net, _distillation(teacher, data, training), student_loss_weight=training.label_weight * labelled
        )
        distiller.compile(optimizer=optimizer, loss=_label_loss(teacher, data, training), jit_compile=jit_compile())
        variables = [*net.variables, *optimizer.variables]
        done = begin
        if run is not None and (state := run.last_checkpoint(stage)) is not None:
            _restore(variables, state.path)
            done = state.step
        log = None if run is None else run.log(f"training_{stage}", COLUMNS, after=done)
        piece = training.checkpoint_steps or data.steps_per_epoch
        while done < end:
            upto = min(end, (done // piece + 1) * piece)
            epoch = done // data.steps_per_epoch
            watch = _Watch(net, done, total, stage, run, progress, keeps_weights=optimizer.use_ema)
            history = distiller.fit(
                data.window(done, upto),
                steps_per_epoch=upto - done,
                initial_epoch=epoch,
                epochs=epoch + 1,
                verbose=0,
                shuffle=False,
                callbacks=[watch, *training.callbacks],
            )
            done = upto
            if optimizer.use_ema and done < end:
                watch.undo_average()
            if run is not None and log is not None:
                blends = [layer.blend for layer in blend_layers(net)]
                log.append(
                    step=done,
                    blend=f"{np.mean(blends) if blends else 0.0:.6f}",
                    loss=f"{history.history['loss'][-1]:.6f}",
                    validation="" if validation is None else f"{score_of(net, teacher, validation):.4f}",
                )
                run.checkpoint(stage, done, lambda folder: _store(variables, folder))


@contextmanager
def _frozen_norms(net: Any) -> Iterator[None]:
    """Take the BatchNormalizations of a network out of its training."""
    norms = [one for one in layers_within(net) if isinstance(one, keras.layers.BatchNormalization) and one.trainable]
    for norm in norms:
        norm.trainable = False
    try:
        yield
    finally:
        for norm in norms:
            norm.trainable = True


def _optimizer(training: Training, total: int) -> Any:
    if training.optimizer is not None:
        return type(training.optimizer).from_config(training.optimizer.get_config())
    decay = keras.optimizers.schedules.CosineDecay(training.learning_rate, total)
    # a merged network has few norms left, or none, and the first steps can throw it off
    return keras.optimizers.SGD(decay, momentum=0.9, nesterov=True, global_clipnorm=5.0)


def _store(variables: list[Any], folder: Path) -> None:
    arrays = {f"{index}": keras.ops.convert_to_numpy(variable) for index, variable in enumerate(variables)}
    np.savez(folder / "state.npz", **arrays)


def _restore(variables: list[Any], folder: Path) -> None:
    with np.load(folder / "state.npz") as arrays:
        for index, variable in enumerate(variables):
            variable.assign(arrays[f"{index}"])


class OutputDistillation(keras.distillation.LogitsDistillation):
    """KL of softened class scores, whether a model writes logits or probabilities; other outputs by squared error.

    Args:
        kind: `logits`, `probabilities` or `values`.
        temperature: of class scores.
    """

    def __init__(self, kind: str, temperature: float) -> None:
        # Named, not by default: the default is a function, which Keras 3.15 applies to the logits themselves.
        loss = keras.losses.MeanSquaredError() if kind == "values" else keras.losses.KLDivergence()
        super().__init__(temperature=1.0 if kind == "values" else temperature, loss=loss)
        self.kind = kind

    def compute_loss(self, teacher_outputs: Any, student_outputs: Any, **kwargs: Any) -> Any:
        """Return the loss as a scalar."""
        if self.kind == "probabilities":
            teacher_outputs, student_outputs = (
                keras.tree.map_structure(_logarithm, outputs) for outputs in (teacher_outputs, student_outputs)
            )
        return super().compute_loss(teacher_outputs, student_outputs, **kwargs)


def _logarithm(probabilities: Any) -> Any:
    return keras.ops.log(keras.ops.maximum(probabilities, SMALLEST_PROBABILITY))


def _kind(teacher: Any, data: Batches) -> str:
    """Tell what a model writes: one row of logits or probabilities for each image, or other values."""
    shapes = [tuple(output.shape) for output in teacher.outputs]
    if len(shapes) != 1 or len(shapes[0]) != 2 or (shapes[0][1] or 0) < 2:
        return "values"
    output = keras.ops.convert_to_numpy(teacher(data.first()[0], training=False))
    sums = output.sum(axis=-1, dtype=np.float64)
    return "probabilities" if (output >= 0).all() and np.allclose(sums, 1.0, atol=1e-2) else "logits"


def _distillation(teacher: Any, data: Batches, training: Training) -> OutputDistillation:
    kind = _kind(teacher, data)
    if kind == "values" and len(teacher.outputs) > 1:
        raise TrainingError(
            f"'{teacher.name}' has {len(teacher.outputs)} outputs; training is built for models with one. Train the "
            "student of updp_tf.progressive with a loss of your own, then updp_tf.merge it."
        )
    return OutputDistillation(kind, training.temperature)


def _label_loss(teacher: Any, data: Batches, training: Training) -> Any:
    if training.loss is not None:
        return training.loss
    batch = data.first()
    kind = _kind(teacher, data)
    if kind == "values" or len(batch) < 2:
        return keras.losses.MeanSquaredError()
    one_hot = np.ndim(batch[1]) == 2 and np.shape(batch[1])[-1] > 1
    loss = keras.losses.CategoricalCrossentropy if one_hot else keras.losses.SparseCategoricalCrossentropy
    return loss(from_logits=kind == "logits")


def score_of(net: Any, teacher: Any, batches: Iterable[Any]) -> float:
    """Return a classifier's accuracy on labelled batches, its agreement with the original on others."""
    hits = n = 0
    for batch in batches:
        x, *rest = _as_tuple(batch)
        found = keras.ops.convert_to_numpy(net(x, training=False)).argmax(axis=-1)
        wanted = np.asarray(rest[0]) if rest else keras.ops.convert_to_numpy(teacher(x, training=False))
        wanted = wanted.argmax(axis=-1) if wanted.ndim == 2 and wanted.shape[-1] > 1 else wanted.reshape(-1)
        hits, n = hits + int((found == wanted).sum()), n + len(found)
    return hits / max(n, 1)


def require_like(data: Batches, images: np.ndarray) -> None:
    """Raise a `TrainingError` where training images have another shape or range than calibration images."""
    batch = np.asarray(data.first()[0], dtype="float64")
    if batch.shape[1:] != images.shape[1:]:
        raise TrainingError(
            f"The training images have shape {batch.shape[1:]}, the calibration images {images.shape[1:]}; give both "
            "as the model reads them."
        )
    ranges = [(float(part.min()), float(part.max())) for part in (batch, images[:1024])]
    widths = [high - low for low, high in ranges]
    if max(widths) > 4 * min(widths) or abs(sum(ranges[0]) - sum(ranges[1])) > 4 * max(widths):
        told = [f"{low:.3g} to {high:.3g}" for low, high in ranges]
        raise TrainingError(
            f"The training images go from {told[0]}, the calibration images from {told[1]}; preprocess both alike."
        )


class _Watch(keras.callbacks.Callback):
    """Stops at a loss that is no number, and tells how far a training is."""

    def __init__(
        self,
        net: Any,
        done: int,
        total: int,
        stage: str,
        run: RunDir | None,
        progress: Callable[..., None] | None,
        *,
        keeps_weights: bool,
    ) -> None:
        super().__init__()
        self._net, self._done, self._total, self._stage = net, done, total, stage
        self._run, self._progress = run, progress
        self._keeps_weights = keeps_weights
        self._weights: list[np.ndarray] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._keeps_weights:
            self._weights = [keras.ops.convert_to_numpy(weight) for weight in self._net.trainable_variables]

    def undo_average(self) -> None:
        """Put back the weights that `fit` replaced by their moving averages: the training is not over."""
        for variable, weight in zip(self._net.trainable_variables, self._weights, strict=True):
            variable.assign(weight)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = self._done + batch + 1
        if self._progress is not None:
            self._progress(step, self._total, f"train {self._stage}")
        if math.isfinite(float((logs or {}).get("loss", 0.0))):
            return
        moving = sorted({layer.block or layer.name for layer in blend_layers(self._net) if 0 < layer.blend < 1})
        state = None if self._run is None else self._run.last_checkpoint(self._stage)
        raise TrainingError(
            f"The loss is no number at step {step}"
            + (f", while the blends of {', '.join(moving)} moved" if moving else "")
            + (f"; the last good state is step {state.step} in '{state.path}'" if state is not None else "")
            + ": use a smaller learning rate, or a longer schedule."
        )
