"""Recipes: images and labels change together, and a step sees the same images whenever it is repeated."""

from __future__ import annotations

from dataclasses import asdict

import keras
import numpy as np
import pytest

import updp_tf
from tests import zoo
from updp_tf import Augmentation, Training
from updp_tf.errors import TrainingError
from updp_tf.training import Batches

VALUES = np.array([0.0, 50.0, 100.0, 200.0], "float32")


def _flat_images(n: int = 16, size: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Images of one grey each, and one-hot labels that tell which."""
    labels = keras.utils.to_categorical(np.random.default_rng(0).integers(0, 4, n), 4).astype("float32")
    return np.broadcast_to((labels @ VALUES)[:, None, None, None], (n, size, size, 3)).copy(), labels


@pytest.mark.parametrize(("recipe", "error"), [({"mixup": 0.5}, 1e-3), ({"cutmix": 1.0}, 15.0)])
def test_labels_say_what_is_in_mixed_images(recipe: dict[str, float], error: float) -> None:
    """The mean grey of an image is that of its label; Keras rounds CutMix' rectangles to pixels, not its labels."""
    images, labels = _flat_images()
    mixed, told = (
        keras.ops.convert_to_numpy(part) for part in Augmentation(flip=False, **recipe)((images, labels), (0, 1))
    )
    assert np.abs(mixed - images).max() > 20
    np.testing.assert_allclose(told.sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), told @ VALUES, atol=error)


def _all(value_range: tuple[float, float] = (0.0, 255.0)) -> Augmentation:
    return Augmentation(value_range, shift=0.1, rand_augment=0.3, erase=0.3, mixup=0.2, cutmix=1.0)


def test_a_step_is_the_same_whenever_it_is_asked_for_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, size=(24, 16, 16, 3)).astype("float32")
    labels = keras.utils.to_categorical(rng.integers(0, 4, 24), 4)
    training = Training(batch_size=8, augmentation=_all())
    first, again = (Batches((images, labels), training) for _ in range(2))
    for step in (0, 1, 4):
        for a, b in zip(first[step], again[step], strict=True):
            np.testing.assert_array_equal(a, b)
    plain = Batches((images, labels), Training(batch_size=8))
    assert np.abs(np.asarray(first[1][0]) - plain[1][0]).max() > 10
    # The same images one epoch later, in the order of that epoch, are changed in another way.
    once = Batches(images[:8], Training(batch_size=8, augmentation=Augmentation(shift=0.3)))
    totals = [np.sort(np.asarray(once[step][0]).sum(axis=(1, 2, 3))) for step in (0, 1)]
    assert np.abs(totals[0] - totals[1]).max() > 1


def test_labels_that_cannot_be_mixed_are_refused() -> None:
    images, _ = _flat_images()
    with pytest.raises(TrainingError, match=r"have to be one-hot: keras\.utils\.to_categorical"):
        Augmentation(mixup=0.2)((images, np.zeros(16, "int64")), (0, 0))
    (mixed,) = Augmentation(mixup=0.2)((images,), (0, 0))
    assert mixed.shape == images.shape


def test_range_has_to_be_told() -> None:
    with pytest.raises(TrainingError, match="give value_range"):
        Augmentation(rand_augment=0.5)


def test_a_recipe_belongs_to_what_decides_the_result() -> None:
    recipe = _all()
    assert Training(augmentation=recipe).as_json()["augmentation"] == asdict(recipe)
    assert Training().as_json()["augmentation"] is None


def test_averaged_weights_do_not_depend_on_checkpoints() -> None:
    """Keras' fit ends with moving averages in the place of weights; here it ends at every checkpoint."""
    images = np.random.default_rng(0).normal(size=(48, 9, 11, 3)).astype("float32")

    def pruned(checkpoint_steps: int, use_ema: bool) -> list[np.ndarray]:
        training = Training(
            epochs=1,
            batch_size=8,
            optimizer=keras.optimizers.AdamW(0.01, weight_decay=0.01, use_ema=use_ema, ema_momentum=0.7),
            augmentation=Augmentation(shift=0.1),
            checkpoint_steps=checkpoint_steps,
        )
        small = updp_tf.prune(
            zoo.residual_without_norms(),
            calibration=images,
            budget={"merged": 2},
            train=images,
            training=training,
            verbose=False,
        )
        return small.get_weights()

    averaged = pruned(6, True)
    for a, b in zip(pruned(2, True), averaged, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(pruned(6, False), averaged, strict=True))
