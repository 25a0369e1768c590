"""What a board with an Arm processor computes, emulated: the runner over a real sshd, on the runtime's own arm64 build.

uv run --frozen pytest tests/device/test_arm64.py -m slow     # downloads 40 MB
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from tests import zoo
from tests.device.arm64 import CannotBeHadError, make_python
from tests.device.conftest import leftovers
from tflite_export import DeviceError, LatencyTable, benchmark, export, read_flatbuffer
from tflite_export.devices import Nature, open_device
from tflite_export.outputs import fixed_inputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def arm64(tmp_path_factory):
    try:
        return make_python(tmp_path_factory.mktemp("arm64"))
    except CannotBeHadError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def files(tmp_path_factory, models, shared_data):
    """Networks in floats and in integers: plain convolutions, inverted residuals, and one that Google quantized."""
    folder = tmp_path_factory.mktemp("files")
    network = zoo.build("inverted_residuals")
    images = zoo.inputs_of(network, n=16)
    for scheme in ("float32", "int8"):
        export(network, folder / f"{scheme}.tflite", quantize=scheme, calibration=images)
    google = shared_data / "tflite" / "edgetpu" / "mobilenet_v1_0.25_128_quant.tflite"
    return [models.three, models.int8, folder / "float32.tflite", folder / "int8.tflite", google]


@pytest.fixture
def options(ssh_options, arm64):
    return replace(ssh_options, python=str(arm64))


def interpreted(path, inputs):
    """What the interpreter of this machine makes of numbers as the file stores them."""
    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], inputs)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def test_arm64_computes_what_this_machine_does(board, options, files):
    device = open_device(board.address, options)
    try:
        info = device.describe()
        assert info.nature == Nature.EMULATED and "ai-edge-litert 1.4.0" in info.runtime
        for path in files:
            model = read_flatbuffer(path)
            (inputs,) = fixed_inputs(model)
            (found,) = device.fetch(path, [inputs], threads=1).outputs
            expected = interpreted(path, inputs)
            assert found.dtype == expected.dtype and np.ptp(expected.astype("float64")) > 0
            if model.outputs[0].scales:
                np.testing.assert_array_equal(found, expected)
            else:
                assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    finally:
        device.close()


def test_its_rows_say_emulated_and_carry_no_times(board, options, files, tmp_path):
    before = leftovers(tmp_path.parent)
    table = benchmark(files[:2], device=board.address, options=options, min_runs=1, min_seconds=0, max_seconds=60)
    for row in table.rows:
        assert row.nature == Nature.EMULATED and row.output_difference < 1e-5
        assert all(math.isnan(value) for value in (row.median_ms, row.p10_ms, row.p90_ms, row.ratio, row.init_ms))
    assert "emulated: the outputs are right" in str(table)
    with pytest.raises(DeviceError, match="is emulated: its times mean nothing"):
        LatencyTable.measure([("one", zoo.build("inverted_residuals"))], device=board.address, options=options)
    assert leftovers(tmp_path.parent) == before
