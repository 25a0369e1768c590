"""Train a student: the callback that watches its blends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from updp_tf.errors import ScheduleError
from updp_tf.layers import Blend


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
