"""Random changes of training images, by Keras' own layers, that are the same whenever a step is repeated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from updp_tf.errors import TrainingError


@dataclass(frozen=True)
class Augmentation:
    """What is done to each batch of training images before it is shown to student and teacher.

    Everything is a layer of Keras, in this order; the strengths are those layers' own. A step of a training always sees
    the same images, so that one that was stopped goes on as if it had not been.

    Attributes:
        value_range: of the images as the model reads them, for instance (-1, 1); for `rand_augment` and `erase`.
        flip: mirror half of the images.
        shift: largest translation, as a part of height and width.
        rand_augment: strength of two random operations on each image, 0 to 1; 0 for none.
        erase: part of the images that lose a rectangle.
        mixup: alpha of the mixture of two images; 0 for none. Labels are mixed too: one-hot ones, or none at all.
        cutmix: alpha of a rectangle of another image; 0 for none. As with `mixup`.

    Source: RandAugment (arXiv 1909.13719), random erasing (1708.04896), MixUp (1710.09412), CutMix (1905.04899).

    Example:
        >>> recipe = Augmentation(value_range=(-1, 1), shift=0.125, rand_augment=0.3, mixup=0.2)
        >>> training = updp_tf.Training(epochs=30, augmentation=recipe)  # doctest: +SKIP
    """

    value_range: tuple[float, float] | None = None
    flip: bool = True
    shift: float = 0.0
    rand_augment: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if self.value_range is None and (self.rand_augment or self.erase):
            raise TrainingError("rand_augment and erase have to know the images' range: give value_range=(low, high).")

    def __call__(self, batch: tuple[Any, ...], seed: tuple[int, ...]) -> tuple[Any, ...]:
        """Return a changed batch: images, and labels where there are any.

        Args:
            batch: images, shape (n, height, width, channels), and labels.
            seed: the same for the same result.

        Raises:
            TrainingError: labels that are numbers of classes cannot be mixed.
        """
        images, *labels = batch
        mixed = self.mixup or self.cutmix
        if mixed and labels and not (np.ndim(labels[0]) == 2 and np.shape(labels[0])[-1] > 1):
            raise TrainingError(
                "mixup and cutmix mix labels, which have to be one-hot: keras.utils.to_categorical(labels), or leave "
                "the labels out."
            )
        data = {"images": images}
        if mixed and labels:
            data["labels"] = np.asarray(labels[0], dtype="float32")
        for layer in self._layers(int(np.random.SeedSequence(seed).generate_state(1)[0]) % 2**31):
            data = layer(data, training=True)
        return (data["images"], *([data.get("labels", labels[0]), *labels[1:]] if labels else []))

    def _layers(self, seed: int) -> Iterator[Any]:
        # Made anew for each batch: their random states would go on from the batch before.
        layers = keras.layers
        if self.flip:
            yield layers.RandomFlip("horizontal", seed=seed)
        if self.shift:
            yield layers.RandomTranslation(self.shift, self.shift, seed=seed + 1)
        if self.rand_augment:
            yield layers.RandAugment(self.value_range, factor=self.rand_augment, seed=seed + 2)
        if self.erase:
            yield layers.RandomErasing(self.erase, value_range=self.value_range, seed=seed + 3)
        if self.mixup:
            yield layers.MixUp(self.mixup, seed=seed + 4)
        if self.cutmix:
            yield layers.CutMix(self.cutmix, seed=seed + 5)
