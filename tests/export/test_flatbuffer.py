"""Reading `.tflite` files: real ones in full, damaged ones with one kind of error."""

import math
import struct

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tflite_export import FlatbufferError, read_flatbuffer


@pytest.fixture(scope="module")
def int8_bytes(exported) -> bytes:
    return exported["int8"].path.read_bytes()


def test_agrees_with_the_runtime(exported):
    for result in exported.values():
        file = read_flatbuffer(result.path)
        interpreter = Interpreter(model_path=str(result.path))
        details = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
        for index, tensor in enumerate(file.subgraphs[0].tensors):
            theirs = details[index]
            assert tensor.name == theirs["name"]
            assert tensor.shape == tuple(theirs["shape"])
            assert tensor.dtype == np.dtype(theirs["dtype"]).name
            np.testing.assert_array_equal(tensor.scales, theirs["quantization_parameters"]["scales"])
            np.testing.assert_array_equal(tensor.zero_points, theirs["quantization_parameters"]["zero_points"])
        signature = interpreter.get_signature_list()["serving_default"]
        assert list(file.input_names) == signature["inputs"]
        assert list(file.output_names) == signature["outputs"]


def test_finds_weights_channels_and_float_tensors(exported):
    float_file, int8_file = (read_flatbuffer(exported[kind].path) for kind in ("float32", "int8"))
    assert len(float_file.float_tensors) > 10
    assert int8_file.float_tensors == ()
    kernels = [t for t in int8_file.tensors if t.constant and len(t.shape) == 4]
    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel.axis is not None
        assert len(kernel.scales) == kernel.shape[kernel.axis]
    assert int8_file.operator_counts["CONV_2D"] == 2
    assert int8_file.custom_operators == int8_file.select_operators == ()


def test_sees_custom_operators(edgetpu_folder):
    compiled = read_flatbuffer(edgetpu_folder / "mobilenet_v1_0.25_128_quant_edgetpu.tflite")
    assert compiled.operator_counts == {"edgetpu-custom-op": 1}
    assert compiled.custom_operators == ("edgetpu-custom-op",)
    assert compiled.select_operators == ()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FlatbufferError, match=r"cannot read '.*none\.tflite': No such file"):
        read_flatbuffer(tmp_path / "none.tflite")


@pytest.mark.parametrize("data", [b"", b"TFL3", b"\x00" * 100, b"PK\x03\x04" + b"\x00" * 64])
def test_other_files_are_refused(data):
    with pytest.raises(FlatbufferError, match="no .tflite file"):
        read_flatbuffer(data)


def test_every_truncation_is_noticed(int8_bytes):
    for size in np.unique(np.linspace(0, len(int8_bytes) - 16, 300).astype(int)):
        with pytest.raises(FlatbufferError):
            read_flatbuffer(int8_bytes[:size])


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_gives_a_valid_read_or_our_error(int8_bytes, data):
    damaged = bytearray(int8_bytes)
    # Half of the changes hit the first bytes, where root, vtables and vectors of offsets stand.
    place = st.one_of(st.integers(0, 2000), st.integers(0, len(damaged) - 4))
    for start in data.draw(st.lists(place, min_size=1, max_size=8)):
        value = data.draw(st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 2**31 - 1, 2**31, 2**32 - 1])))
        struct.pack_into("<I", damaged, start, value)
    damaged = damaged[: data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))]
    read_or_refuse(bytes(damaged))


@pytest.mark.parametrize("value", [-1, 1000, 2**31 - 1])
def test_damage_at_every_place(int8_bytes, value):
    refused = [
        read_or_refuse(int8_bytes[:place] + struct.pack("<i", value) + int8_bytes[place + 4 :])
        for place in range(0, len(int8_bytes) - 4, 4)
    ]
    assert 0.1 < np.mean(refused) < 0.9  # the rest hits weights, names and options of operators


def read_or_refuse(data: bytes) -> bool:
    """Return whether the file was refused; what is not refused is consistent."""
    try:
        file = read_flatbuffer(data)
    except FlatbufferError as error:
        assert len(str(error)) < 500
        return True
    assert len(file.input_names) == len(file.inputs) and len(file.output_names) == len(file.outputs)
    for subgraph in file.subgraphs:
        for operator in subgraph.operators:
            assert all(-1 <= index < len(subgraph.tensors) for index in (*operator.inputs, *operator.outputs))
    assert all(math.prod(tensor.shape) >= 0 for tensor in file.tensors)
    return False


def test_a_vector_that_claims_too_much_is_refused_at_once(int8_bytes):
    n_operators = len(read_flatbuffer(int8_bytes).operators)
    # The length of the operator vector: the only place where that count is followed by rising offsets.
    claimed = struct.pack("<I", 2**28)
    places = [i for i in range(0, len(int8_bytes) - 4, 4) if int8_bytes[i : i + 4] == struct.pack("<I", n_operators)]
    refused = 0
    for place in places:
        try:
            read_flatbuffer(int8_bytes[:place] + claimed + int8_bytes[place + 4 :])
        except FlatbufferError as error:
            refused += "claim more data" in str(error)
    assert refused >= 1
