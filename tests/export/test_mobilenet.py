"""The real MobileNetV2 with ImageNet weights: accuracy, memory and time of an export as users do it."""

import time

import keras
import numpy as np
import pytest

import tflite_export

pytestmark = pytest.mark.slow  # half a minute, more on a loaded machine


def test_export_and_evaluate(shared_loader, tmp_path):
    model = shared_loader.mobilenet_v2(classifier_activation=None)
    calibration = shared_loader.mobilenet_preprocess(shared_loader.imagenet1000(200)[0])
    pixels, classes = shared_loader.imagenette("heldout", 100)
    images, labels = shared_loader.mobilenet_preprocess(pixels), np.array(list(shared_loader.IMAGENETTE))[classes]
    reference = keras.ops.convert_to_numpy(model.predict(images, verbose=0))

    with tflite_export.ExportWorker() as worker:
        exact = tflite_export.export(model, tmp_path / "float32.tflite", worker=worker)
        started = time.monotonic()
        int8 = tflite_export.export(
            model, tmp_path / "int8.tflite", quantize="int8", calibration=calibration, worker=worker
        )
        seconds = time.monotonic() - started

    assert exact.max_error < 1e-4
    assert exact.operators == int8.operators
    assert exact.operators == {"ADD": 10, "CONV_2D": 35, "DEPTHWISE_CONV_2D": 17, "FULLY_CONNECTED": 1, "MEAN": 1}
    assert int8.float_tensors == ()
    assert int8.size_bytes < 0.3 * exact.size_bytes
    assert int8.peak_memory_bytes < 3 * 2**30
    assert seconds < 60  # 10 s on an idle machine
    as_keras = tflite_export.evaluate(exact.path, images, labels, reference=reference)
    assert as_keras.agreement == 1 and as_keras.mean_kl < 1e-6
    quantized = tflite_export.evaluate(int8.path, images, labels, reference=reference)
    # 100 images: one standard error is 3 to 5 points; the weights come from an int8 file, which flatters.
    assert as_keras.top1 > 0.55 and quantized.top1 > as_keras.top1 - 0.1
    assert quantized.agreement > 0.85 and quantized.mean_kl < 0.1
