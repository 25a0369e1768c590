"""Float files compute what Keras does: the rows of the table, and some of them anew."""

import pytest

from tests.float_equality import LARGEST_ERROR, N_IMAGES, measure, records
from tflite_export import ExportWorker


def test_rows_are_within_the_bound():
    rows = records().rows
    assert rows
    for row in rows:
        assert float(row["error"]) <= LARGEST_ERROR and int(row["n"]) == N_IMAGES, row["model"]
        assert row["select_operators"] == "0" and row["xnnpack"] == "True", row["model"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV2 alpha 0.35", "MobileNetV3Small", "cv_resnet_v2", "hub_deit"])
def test_float_files_compute_what_keras_does(name):
    with ExportWorker() as worker:
        row = measure(name, worker)
    assert float(row["error"]) <= LARGEST_ERROR and row["xnnpack"] and not row["select_operators"]
