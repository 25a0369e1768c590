"""A detector of keras_cv whose backbone was pruned, from end to end: to `.tflite` files that run."""

from __future__ import annotations

import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

import tflite_export
import updp_tf
from tests import backbones, zoo

SIZE = 64


def detector() -> keras.Model:
    """A small YOLOv8 with generic weights."""
    models = backbones.library("keras_cv").models
    keras.utils.clear_session(free_memory=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone = models.YOLOV8Backbone(
            stackwise_channels=[16, 24, 32, 40],
            stackwise_depth=[1, 2, 2, 1],
            include_rescaling=True,
            input_shape=(SIZE, SIZE, 3),
        )
        made = models.YOLOV8Detector(backbone=backbone, num_classes=3, bounding_box_format="xyxy", fpn_depth=1)
    return zoo.randomise(made)


@pytest.fixture(scope="module")
def pruned():
    model = detector()
    images = np.random.default_rng(0).uniform(0, 255, (40, SIZE, SIZE, 3)).astype("float32")
    # keras_cv calls the backbone with its pyramid levels as a nested model, whose name its layers have in front
    outside = [block.name for block in updp_tf.find_blocks(model) if not block.name.startswith("functional_")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", updp_tf.CalibrationWarning)
        small = updp_tf.prune(model, calibration=images, budget={"merged": 5}, keep=outside, verbose=False)
    return model, small, images


@pytest.mark.slow
def test_blocks_of_the_backbone_are_merged_and_its_pyramid_stays(pruned):
    model, small, _ = pruned
    assert len(small.pruning.blocks) == 5
    assert all(name.startswith("functional_") for edit in small.pruning.plan.edits for name in edit.site)
    assert small.pruning.after.macs < small.pruning.before.macs
    kept = {name: tensor.shape for name, tensor in model.output.items()}
    assert {name: tensor.shape for name, tensor in small.output.items()} == kept


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["float32", "int8"])
def test_the_file_runs(pruned, tmp_path: Path, quantize: str):
    """Both outputs, in the interpreter, against Keras."""
    _, small, images = pruned
    result = tflite_export.export(small, tmp_path / "m.tflite", quantize=quantize, calibration=images)
    assert len(result.output_names) == 2 and not result.select_operators
    assert result.max_error <= (1e-4 if quantize == "float32" else 0.3)
