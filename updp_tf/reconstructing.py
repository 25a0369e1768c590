"""Train the fitted layers alone for a few steps against the original's features, without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from updp_tf.compiling import jit_compile
from updp_tf.graph import build_model, read_graph
from updp_tf.scoring import Sampler
from updp_tf.walking import Progress, default_batch_size

LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class Reconstruction:
    """What a reconstruction did to the mean squared error of the outputs on held-out images (relative to variance).

    Attributes:
        steps: that were trained.
        before: error of the merged model.
        after: error of the trained one.
        kept: True if it was better by more than a standard error over images, and is what was returned.
    """

    steps: int
    before: float
    after: float
    kept: bool


def reconstruct(
    merged: Any,
    original: Any,
    blocks: Sequence[str],
    images: np.ndarray,
    *,
    steps: int,
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
    progress: Progress | None = None,
) -> tuple[Any, Reconstruction]:
    """Return the merged model with its fitted layers trained, if that helps on held-out images.

    Only the layers that stand for merged blocks learn (all weights would fit a few hundred images and forget the
    rest); the loss is the squared error of each merged block's output and of the network's output, each relative to
    its variance in the original.

    Args:
        merged: model with merged blocks; it is not changed.
        original: the model it came from.
        blocks: names of the merged blocks.
        images: calibration images, shape (n, height, width, channels); a tenth is held out.
        steps: of Adam.
        seed: of the batches.
        learning_rate: of Adam.
        progress: called after every step.
    """
    student = build_model(read_graph(merged), name=merged.name)
    names = [name for name in blocks if _merged_layers(student, name)]
    learning = {id(layer) for name in names for layer in _merged_layers(student, name)}
    was_trainable = {layer.name: layer.trainable for layer in student.layers}
    for layer in student.layers:
        layer.trainable = id(layer) in learning
    held_out = Sampler(len(images), seed=seed).held_out(slice(0, len(images)))
    batch_size = min(default_batch_size(read_graph(merged)), 32, int((~held_out).sum()))
    batches = _Targets(_with_features(original, names), images[~held_out], batch_size, steps, seed)
    trainer = _with_features(student, names)
    losses = [_relative_squared_error(scale) for scale in batches.variances]
    trainer.compile(optimizer=keras.optimizers.Adam(learning_rate), loss=losses, jit_compile=jit_compile())
    callbacks = [_Steps(steps, progress)] if progress is not None else []
    trainer.fit(batches, epochs=1, verbose=0, shuffle=False, callbacks=callbacks)
    unseen = images[held_out] if held_out.any() else images
    wanted = _outputs(original, unseen, batch_size)
    errors = [_output_errors(wanted, _outputs(model, unseen, batch_size)) for model in (merged, student)]
    before, after = (float(one.sum()) for one in errors)
    kept = _is_surely_less(errors[1], errors[0])
    if kept:
        for layer in student.layers:
            layer.trainable = was_trainable[layer.name]
    return (student if kept else merged), Reconstruction(steps, before, after, kept)


def _merged_layers(model: Any, block: str) -> list[Any]:
    return [layer for layer in model.layers if layer.name.startswith(f"{block}_merged") and layer.weights]


def _with_features(model: Any, blocks: Sequence[str]) -> Any:
    """The model with the outputs of some blocks in front of its own."""
    by_name = {layer.name: layer for layer in model.operations}
    outputs = []
    for name in blocks:
        # A merged block ends in its Add, or in the last layer that was put in.
        ends = [one for one in by_name if one == name or one.startswith(f"{name}_merged")]
        outputs.append(by_name[ends[-1]].output)
    return keras.Model(model.inputs[0], [*outputs, *model.outputs])


class _Targets(keras.utils.PyDataset):
    """Batches of images and the original's features of them, computed as they are asked for."""

    def __init__(self, original: Any, images: np.ndarray, batch_size: int, steps: int, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self._original, self._images = original, images
        self._batches = [rng.choice(len(images), batch_size, replace=False) for _ in range(steps)]
        first = [keras.ops.convert_to_numpy(part) for part in original(images[: 4 * batch_size], training=False)]
        self.variances = [float(part.var()) or 1.0 for part in first]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        images = self._images[self._batches[index]]
        wanted = tuple(keras.ops.convert_to_numpy(part) for part in self._original(images, training=False))
        return images, wanted


def _relative_squared_error(scale: float) -> Any:
    def loss(wanted: Any, written: Any) -> Any:
        return keras.ops.mean(keras.ops.square(wanted - written)) / scale

    return loss


class _Steps(keras.callbacks.Callback):
    def __init__(self, total: int, progress: Progress) -> None:
        super().__init__()
        self._total, self._progress = total, progress

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._progress(batch + 1, self._total, "reconstruct")


def _output_errors(wanted: Sequence[np.ndarray], have: Sequence[np.ndarray]) -> np.ndarray:
    """Squared error of the outputs relative to their variance, image by image; they add up to the error of all."""
    total = sum(float(np.square(part - part.mean(axis=0)).sum()) for part in wanted) or 1.0
    lost = [np.square(a - b).reshape(len(a), -1).sum(axis=1) for a, b in zip(wanted, have, strict=True)]
    return np.sum(lost, axis=0) / total


def _is_surely_less(errors: np.ndarray, before: np.ndarray) -> bool:
    """True where errors fall by more than a standard error: two images out of 60 can make all the difference."""
    gains = before - errors
    return bool(gains.sum() > gains.std(ddof=1) * np.sqrt(len(gains)))


def _outputs(model: Any, images: np.ndarray, batch_size: int) -> list[np.ndarray]:
    parts = [
        [
            keras.ops.convert_to_numpy(part)
            for part in keras.tree.flatten(model(images[i : i + batch_size], training=False))
        ]
        for i in range(0, len(images), batch_size)
    ]
    return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
