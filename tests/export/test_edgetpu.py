"""The Edge TPU: rules against what the vendor's compiler made of real files, and its output and logs.

The compiler itself is closed and not here. Its word is in the shared data: compiled files and logs; and in outputs that
users published, which are repeated below.
"""

import json
import os
import random
import re
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.export.tflite_writer import Writer
from tflite_export import (
    CompilerError,
    FlatbufferError,
    OptionError,
    OutputError,
    check_edgetpu,
    compile_edgetpu,
    edgetpu_rules,
    parse_edgetpu_output,
    read_edgetpu_log,
    read_flatbuffer,
)
from tflite_export.edgetpu_rules import (
    MAPPED,
    NOT_SUPPORTED,
    OTHER_SUBGRAPH,
    UNSPECIFIED,
    UNSUPPORTED_RANK,
    UNSUPPORTED_TYPE,
    VERSION_NOT_SUPPORTED,
)

PAIRS = ("deeplabv3_mnv2_dm05_pascal_quant", "mobilenet_v1_0.25_128_quant", "mobilenet_v2_flowers_quant")
LOGS = (
    "efficientdet-lite_edgetpu",
    "mnist4_edgetpu",
    "mnist9_edgetpu",
    "nasassai_model_v2_edgetpu",
    "yolov5n-int8_edgetpu_160",
    "yolov8n_full_integer_quant_edgetpu_192",
    "yolov8s_full_integer_quant_edgetpu_192",
)
N_OPERATORS = dict(zip(LOGS, (267, 10, 10, 5, 262, 257, 256), strict=True))


# --- what the compiler did to real files -----------------------------------------------------------------------------


def left_by_the_compiler(compiled: Path) -> Counter:
    """What the compiler left outside of its custom operator, by name and by the name of the first output."""
    graph = read_flatbuffer(compiled).subgraphs[0]
    return Counter((op.name, graph.tensors[op.outputs[0]].name) for op in graph.operators if not op.custom)


def test_every_pair_and_log_of_the_folder_is_tried(edgetpu_folder):
    assert {path.stem.removesuffix("_edgetpu") for path in edgetpu_folder.glob("*.tflite")} == set(PAIRS)
    assert {path.stem for path in edgetpu_folder.glob("logs/*.log")} == set(LOGS)


@pytest.mark.parametrize("name", PAIRS)
def test_maps_what_the_compiler_mapped(edgetpu_folder, name):
    report = check_edgetpu(edgetpu_folder / f"{name}.tflite")
    graph = read_flatbuffer(edgetpu_folder / f"{name}.tflite").subgraphs[0]
    ours = Counter(
        (verdict.name, graph.tensors[operator.outputs[0]].name)
        for verdict, operator in zip(report.operators, graph.operators, strict=True)
        if not verdict.mapped
    )
    assert ours == left_by_the_compiler(edgetpu_folder / f"{name}_edgetpu.tflite")
    assert report.fully_mapped == (not ours)
    assert report.rejections == report.cautions == ()
    # the compiled file holds the parameters that the mapped operators have, and the executable
    assert report.parameter_bytes < (edgetpu_folder / f"{name}_edgetpu.tflite").stat().st_size
    assert report.cache == "fits"


def test_a_side_branch_is_mapped_and_what_waits_for_the_other_is_not(edgetpu_folder):
    report = check_edgetpu(edgetpu_folder / "deeplabv3_mnv2_dm05_pascal_quant.tflite")
    assert [operator.mapped for operator in report.operators[61:66]] == [True, True, True, False, False]
    assert report.blocker.operator.index == 64 and report.blocker.operator.name == "RESIZE_BILINEAR"
    assert report.blocker.operators_lost == 8
    # two convolutions on 33 x 33: 512 to 256 and 256 to 21 channels
    assert report.blocker.macs_lost == report.macs - report.mapped_macs == 33 * 33 * (512 * 256 + 256 * 21)


def test_gives_the_table_of_the_compilers_log(edgetpu_folder):
    report = check_edgetpu(edgetpu_folder / "mobilenet_v2_flowers_quant.tflite")
    assert report.counts == read_edgetpu_log(edgetpu_folder / "mobilenet_v2_flowers_quant_edgetpu.log").counts


@pytest.mark.parametrize("name", LOGS)
def test_reads_every_log_and_agrees_with_its_statuses(edgetpu_folder, name):
    log = read_edgetpu_log(edgetpu_folder / "logs" / f"{name}.log")
    assert log.compiler_version in ("15.0.340273435", "16.0.384591198")
    assert log.input.endswith(".tflite") and log.output.endswith("_edgetpu.tflite")
    assert sum(log.counts.values()) == N_OPERATORS[name]
    for (operator, status), count in log.counts.items():
        assert count > 0
        if status in (MAPPED, OTHER_SUBGRAPH, UNSPECIFIED):
            assert operator in edgetpu_rules._RULES
        elif status == NOT_SUPPORTED:
            assert operator not in edgetpu_rules._RULES
        else:
            assert status == UNSUPPORTED_TYPE


def test_macs_are_those_of_the_network(edgetpu_folder):
    # MobileNetV1 0.25 at 128: 14 M multiply-adds, by its authors' table (arXiv:1704.04861 gives 41 M at 224)
    assert check_edgetpu(edgetpu_folder / "mobilenet_v1_0.25_128_quant.tflite").macs == pytest.approx(14e6, rel=0.05)


# --- rules, one operator at a time -----------------------------------------------------------------------------------


def only(name, inputs, shape, *, dtype="int8", version=1, scales=(0.1,), custom=None, **options):
    """A file with one operator. `inputs`: the arguments of `Writer.tensor`; `shape` and `dtype`: of its output."""
    writer = Writer()
    indices = [writer.tensor(*given) if isinstance(given, tuple) else given for given in inputs]
    output = writer.tensor(shape, dtype, scales=scales)
    writer.operator(name, indices, [output], version=version, custom=custom, **options)
    return writer.file()


def conv(channels=8, per_kernel=8, *, weights=1, bias=0, version=3, **options):
    given = [((1, 8, 8, channels),), ((4, 3, 3, per_kernel), "int8", weights), ((4,), "int32", bias)]
    return only("CONV_2D", given, (1, 8, 8, 4), version=version, kind="Conv2DOptions", **options)


def depthwise(**options):
    given = [((1, 8, 8, 8),), ((1, 3, 3, 8), "int8", 1), ((8,), "int32", 0)]
    return only("DEPTHWISE_CONV_2D", given, (1, 8, 8, 8), version=3, kind="DepthwiseConv2DOptions", **options)


def dense(batch=(1,), *, version=4, **options):
    given = [((*batch, 8),), ((5, 8), "int8", 1), ((5,), "int32", 0)]
    return only("FULLY_CONNECTED", given, (*batch, 5), version=version, kind="FullyConnectedOptions", **options)


def reduction(name, shape, axes, after):
    return only(name, [(shape,), ((len(axes),), "int32", axes)], after, version=2)


def resize(before, after, name="RESIZE_BILINEAR"):
    return only(name, [(before,), ((2,), "int32", after[1:3])], after, version=3)


def sliced(strides=(1, 1, 1, 1), **masks):
    given = [((1, 8, 8, 4),), *(((4,), "int32", value) for value in ((0, 0, 0, 0), (1, 4, 4, 4), strides))]
    return only("STRIDED_SLICE", given, (1, 4, 4, 4), kind="StridedSliceOptions", **masks)


def unary(name, shape=(1, 8, 8, 4), **more):
    return only(name, [(shape,)], shape, **more)


def binary(name, **more):
    return only(name, [((1, 8, 8, 4),), ((1, 8, 8, 4),)], (1, 8, 8, 4), **more)


def concatenation(*inputs, **options):
    return only("CONCATENATION", inputs, (1, 8, 8, 8), kind="ConcatenationOptions", axis=3, **options)


def lstm(weights):
    gates = [((4, 6), "int8", weights)] * 4 + [((4, 4), "int8", weights)] * 4
    cells = [-1, -1, -1, *(((4,), "int32", 0) for _ in range(4)), -1, -1, ((1, 4), "int8"), ((1, 4), "int16")]
    return only("UNIDIRECTIONAL_SEQUENCE_LSTM", [((1, 7, 6),), *gates, *cells], (1, 7, 4), version=3)


RELU, TANH = 1, 4
HALF, IMAGE, ZERO = (1, 8, 8, 4), ((1, 8, 8, 4),), ((1, 8, 8, 4), "int8", 0)

MAPPED_FILES = {
    "ADD": binary("ADD", kind="AddOptions", fusedActivationFunction=RELU, version=2),
    "AVERAGE_POOL_2D": unary("AVERAGE_POOL_2D", version=2, kind="Pool2DOptions"),
    "CONCATENATION": concatenation(IMAGE, IMAGE),
    "CONCATENATION with zeros": concatenation(IMAGE, ZERO),
    "CONV_2D": conv(dilationWFactor=2, dilationHFactor=2, fusedActivationFunction=RELU),
    "DEPTHWISE_CONV_2D": depthwise(),
    "EXPAND_DIMS": only("EXPAND_DIMS", [((1, 8),), ((1,), "int32", 1)], (1, 1, 8)),
    "FULLY_CONNECTED": dense(),
    "FULLY_CONNECTED of ones": dense((1, 1, 1)),
    "L2_NORMALIZATION": unary("L2_NORMALIZATION", version=2),
    "LOGISTIC": unary("LOGISTIC", version=2),
    "MAXIMUM": binary("MAXIMUM", version=2),
    "MAX_POOL_2D": unary("MAX_POOL_2D", version=2, kind="Pool2DOptions"),
    "MEAN over space": reduction("MEAN", (1, 64, 128, 3), (1, 2), (1, 3)),
    "MEAN over channels": reduction("MEAN", (1, 8, 8, 96), (-1,), (1, 8, 8, 1)),
    "MINIMUM": binary("MINIMUM", version=2),
    "MUL": binary("MUL", version=2),
    "PACK": only("PACK", [((8, 4),), ((8, 4),)], (8, 2, 4), kind="PackOptions", axis=1),
    "PAD": only("PAD", [IMAGE, ((4, 2), "int32", [[0, 0], [1, 0], [1, 0], [0, 4]])], (1, 9, 9, 8), version=2),
    "PRELU": only("PRELU", [IMAGE, ((1, 1, 4), "int8", 1)], HALF),
    "QUANTIZE": unary("QUANTIZE", dtype="uint8"),
    "REDUCE_MAX": reduction("REDUCE_MAX", HALF, (1, 2), (1, 4)),
    "REDUCE_MIN": reduction("REDUCE_MIN", HALF, (1, 2), (1, 4)),
    "RELU": unary("RELU", version=2),
    "RELU6": unary("RELU6", version=2),
    "RELU_N1_TO_1": unary("RELU_N1_TO_1"),
    "RESHAPE": only("RESHAPE", [IMAGE, ((2,), "int32", (1, 256))], (1, 256)),
    "RESIZE_BILINEAR": resize((1, 16, 16, 8), (1, 32, 32, 8)),
    "RESIZE_NEAREST_NEIGHBOR": resize((1, 16, 16, 8), (1, 32, 32, 8), "RESIZE_NEAREST_NEIGHBOR"),
    "RSQRT": unary("RSQRT", version=2),
    "SLICE": only("SLICE", [IMAGE, ((4,), "int32", 0), ((4,), "int32", (1, 4, 4, 4))], (1, 4, 4, 4)),
    "SOFTMAX": unary("SOFTMAX", (1, 16_000), version=2),
    "SOFTMAX of boxes": unary("SOFTMAX", (1, 4, 756, 16), version=2),  # in the logs of YOLOv8
    "SPACE_TO_DEPTH": only("SPACE_TO_DEPTH", [IMAGE], (1, 4, 4, 16)),
    "SPLIT": only("SPLIT", [((), "int32", 3), IMAGE], (1, 8, 8, 2)),
    "SQUARED_DIFFERENCE": binary("SQUARED_DIFFERENCE", version=2),
    "SQUEEZE": only("SQUEEZE", [((1, 1, 1, 8),)], (1, 8)),
    "STRIDED_SLICE": sliced(endMask=1),
    "STRIDED_SLICE by 2": sliced((1, 2, 2, 1)),  # compiler 16 maps YOLOv5's; 15 did not
    "SUB": binary("SUB", version=2),
    "SUM": reduction("SUM", HALF, (1, 2), (1, 4)),
    "TANH": unary("TANH", version=2),
    "TRANSPOSE": only("TRANSPOSE", [IMAGE, ((4,), "int32", (0, 3, 1, 2))], (1, 4, 8, 8), version=2),
    "TRANSPOSE_CONV": only(
        "TRANSPOSE_CONV", [((4,), "int32", (1, 16, 16, 2)), ((2, 3, 3, 4), "int8", 1), IMAGE], (1, 16, 16, 2), version=2
    ),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": lstm(1),
    "five dimensions of which three count": unary("LOGISTIC", (1, 1, 8, 8, 4)),
    "uint8": only("LOGISTIC", [(HALF, "uint8")], HALF, dtype="uint8"),
}

# name: (file, status, what the reason says)
REFUSED = {
    "float": (only("LOGISTIC", [(HALF, "float32")], HALF, dtype="float32"), UNSUPPORTED_TYPE, "float32"),
    "int16": (only("LOGISTIC", [(HALF, "int16")], HALF, dtype="int16"), UNSUPPORTED_TYPE, "int16"),
    "no scale": (unary("LOGISTIC", scales=()), UNSUPPORTED_TYPE, "without a scale"),
    "DEQUANTIZE": (unary("DEQUANTIZE", dtype="float32"), UNSUPPORTED_TYPE, "float32"),
    "QUANTIZE of floats": (only("QUANTIZE", [(HALF, "float32")], HALF), UNSPECIFIED, "float32"),
    "custom on floats": (
        unary("CUSTOM", dtype="float32", custom="TFLite_Detection_PostProcess"),
        UNSUPPORTED_TYPE,
        "float32",
    ),
    "custom": (unary("CUSTOM", custom="mine"), NOT_SUPPORTED, "'mine'"),
    "ARG_MAX": (only("ARG_MAX", [IMAGE, ((), "int32", 3)], (1, 8, 8), dtype="int64"), UNSUPPORTED_TYPE, "int64"),
    "GELU": (unary("GELU"), NOT_SUPPORTED, "ReLU"),
    "HARD_SWISH": (unary("HARD_SWISH"), NOT_SUPPORTED, "ReLU6"),
    "LEAKY_RELU": (unary("LEAKY_RELU"), NOT_SUPPORTED, "PReLU"),
    "NEG": (unary("NEG"), NOT_SUPPORTED, "not in the table"),
    "BATCH_MATMUL": (binary("BATCH_MATMUL"), NOT_SUPPORTED, "attention"),
    "newer version": (unary("LOGISTIC", version=4), VERSION_NOT_SUPPORTED, "version is 4.* up to 3"),
    "Dense on a sequence": (dense((1, 7), version=5, keepNumDims=True), VERSION_NOT_SUPPORTED, r"kernel_size=1"),
    "four sizes": (unary("LOGISTIC", (2, 8, 8, 4)), UNSUPPORTED_RANK, r"\(2, 8, 8, 4\).*3 innermost"),
    "five sizes": (unary("LOGISTIC", (1, 2, 8, 8, 4)), UNSUPPORTED_RANK, "3 innermost"),
    "no size": (unary("LOGISTIC", (1, 0, 8, 4)), UNSUPPORTED_RANK, "holds nothing"),
    "fused tanh": (binary("ADD", kind="AddOptions", fusedActivationFunction=TANH), UNSPECIFIED, "TANH"),
    "pool with relu": (
        unary("MAX_POOL_2D", kind="Pool2DOptions", fusedActivationFunction=RELU),
        UNSPECIFIED,
        "RELU is not supported",
    ),
    "average with relu": (
        unary("AVERAGE_POOL_2D", kind="Pool2DOptions", fusedActivationFunction=RELU),
        UNSPECIFIED,
        "RELU is not supported",
    ),
    "concatenation with relu": (concatenation(IMAGE, IMAGE, fusedActivationFunction=RELU), UNSPECIFIED, "RELU"),
    "concatenation with ones": (concatenation(IMAGE, ((1, 8, 8, 4), "int8", 1)), UNSPECIFIED, "all zeros"),
    "concatenation of three": (concatenation(IMAGE, IMAGE, ZERO), UNSPECIFIED, "must be two"),
    "dilation": (conv(dilationWFactor=2, dilationHFactor=1), UNSPECIFIED, "1 x 2"),
    "depthwise dilation": (depthwise(dilationWFactor=1, dilationHFactor=3), UNSPECIFIED, "3 x 1"),
    "groups": (conv(8, 4), UNSPECIFIED, "grouped"),
    "groups by version": (conv(8, 4, version=6), VERSION_NOT_SUPPORTED, "DepthwiseConv2D"),
    "computed weights": (conv(weights=None), UNSPECIFIED, "is computed"),
    "computed bias": (conv(bias=None), UNSPECIFIED, "is computed"),
    "shuffled weights": (dense(weightsFormat=1), UNSPECIFIED, "SHUFFLED4x16INT8"),
    "several vectors": (dense((7,)), UNSPECIFIED, "one vector"),
    "mean over batch": (reduction("MEAN", (1, 8, 8, 4), (0, 1), (8, 4)), UNSPECIFIED, "batch"),
    "mean over 3 channels": (reduction("MEAN", (1, 8, 8, 3), (3,), (1, 8, 8)), UNSPECIFIED, "multiple of 4"),
    "mean over much": (reduction("MEAN", (1, 256, 128, 3), (1, 2), (1, 3)), UNSPECIFIED, "32768 values"),
    "sum over batch": (reduction("SUM", (1, 8, 8, 4), (0,), (8, 8, 4)), UNSPECIFIED, "batch"),
    "max over batch": (reduction("REDUCE_MAX", (1, 8, 8, 4), (-4,), (8, 8, 4)), UNSPECIFIED, "batch"),
    "min over batch": (reduction("REDUCE_MIN", (1, 8, 8, 4), (0,), (8, 8, 4)), UNSPECIFIED, "batch"),
    "axis outside": (reduction("SUM", (1, 8), (5,), (1,)), UNSPECIFIED, "rank 2"),
    "computed axes": (only("SUM", [IMAGE, ((1,), "int32")], (1, 8, 8), version=2), UNSPECIFIED, "axes are computed"),
    "pack in batch": (only("PACK", [((4,),), ((4,),)], (2, 4), kind="PackOptions", axis=0), UNSPECIFIED, "batch"),
    "split of batch": (only("SPLIT", [((), "int32", 0), ((2, 8),)], (1, 8)), UNSPECIFIED, "batch"),
    "pad of batch": (
        only("PAD", [((1, 8),), ((2, 2), "int32", [[0, 1], [0, 0]])], (2, 8), version=2),
        UNSPECIFIED,
        "batch",
    ),
    "alpha per pixel": (only("PRELU", [IMAGE, ((8, 8, 4), "int8", 1)], HALF), UNSPECIFIED, "shared_axes"),
    "resize by 33": (resize((1, 1, 1, 8), (1, 33, 33, 8)), UNSPECIFIED, "precision"),
    "resize of much": (resize((1, 256, 256, 32), (1, 512, 512, 32)), UNSPECIFIED, "on-chip memory"),
    "softmax over much": (unary("SOFTMAX", (1, 16_001), version=2), UNSPECIFIED, "16001"),
    "slice with ellipsis": (sliced(ellipsisMask=2), UNSPECIFIED, "ellipsis_mask is 2"),
    "slice with new axis": (sliced(newAxisMask=1), UNSPECIFIED, "new_axis_mask is 1"),
    "slice backwards": (sliced((1, -1, 1, 1)), UNSPECIFIED, "backwards"),
    "computed permutation": (
        only("TRANSPOSE", [IMAGE, ((4,), "int32")], (1, 4, 8, 8), version=2),
        UNSPECIFIED,
        "is computed",
    ),
    "computed shape": (only("RESHAPE", [IMAGE, ((2,), "int32")], (1, 256)), UNSPECIFIED, "is computed"),
    "computed LSTM": (lstm(None), UNSPECIFIED, "weights are computed"),
    "no input": (only("LOGISTIC", [], HALF), UNSUPPORTED_TYPE, "lacks inputs"),
}


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.tflite"
    path.write_bytes(data)
    return path


def test_every_documented_operation_is_tried():
    assert {name.split()[0] for name in MAPPED_FILES if name[0].isupper()} == set(edgetpu_rules._RULES)


@pytest.mark.parametrize("name", MAPPED_FILES)
def test_maps_what_the_rules_allow(tmp_path, name):
    (verdict,) = check_edgetpu(write(tmp_path, MAPPED_FILES[name])).operators
    assert (verdict.status, verdict.reason) == (MAPPED, "")


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_they_do_not(tmp_path, name):
    data, status, reason = REFUSED[name]
    report = check_edgetpu(write(tmp_path, data))
    (verdict,) = report.operators
    assert verdict.status == status
    assert re.search(reason, verdict.reason), verdict.reason
    assert not report.fully_mapped and verdict.reason in str(report)


@pytest.mark.parametrize(
    ("data", "rejected"),
    [
        (unary("GELU"), "version 1 of GELU"),
        (conv(8, 4, version=6), "opcode 'CONV_2D' version '6'"),  # google-coral/edgetpu#631
        (unary("QUANTIZE", version=3), "opcode 'QUANTIZE' version '3'"),  # google-coral/edgetpu#879
        (unary("EXP", version=2), "opcode 'EXP' version '2'"),  # google-coral/libedgetpu#71
    ],
)
def test_says_where_the_compiler_will_not_read_the_file(tmp_path, data, rejected):
    report = check_edgetpu(write(tmp_path, data))
    assert rejected in report.rejections[0]
    assert "the compiler will not read this file" in str(report) and not report.fully_mapped


def test_says_that_dense_layers_with_many_scales_are_not_known(tmp_path):
    writer = Writer()
    image, out = writer.tensor((1, 8)), writer.tensor((1, 5))
    weights = writer.tensor((5, 8), "int8", 1, scales=(0.1, 0.2, 0.3, 0.4, 0.5))
    writer.operator("FULLY_CONNECTED", [image, weights, -1], [out], version=4)
    report = check_edgetpu(write(tmp_path, writer.file()))
    assert report.n_mapped == 1 and "one scale for each output" in report.cautions[0]
    assert report.parameter_bytes == 40 and report.macs == 40


@pytest.mark.parametrize(("channels", "cache"), [(1024, "fits"), (2600, "may not fit"), (3000, "streamed")])
def test_compares_the_parameters_with_the_cache(tmp_path, channels, cache):
    given = [((1, channels),), ((channels, channels), "int8", 1), -1]
    report = check_edgetpu(write(tmp_path, only("FULLY_CONNECTED", given, (1, channels), version=4)))
    assert report.parameter_bytes == channels**2 and report.cache == cache


# --- how a graph is cut ----------------------------------------------------------------------------------------------


def network(kinds, sources) -> bytes:
    """Operators that read the outputs of `sources` (-1: the input); True: LOGISTIC or ADD, False: NEG."""
    writer = Writer()
    tensors = [writer.tensor(HALF)]
    for kind, read in zip(kinds, sources, strict=True):
        tensors.append(writer.tensor(HALF))
        name = ("ADD" if len(read) > 1 else "LOGISTIC") if kind else "NEG"
        writer.operator(name, [tensors[index + 1] for index in read], [tensors[-1]])
    return writer.file()


def by_hand(kinds, sources) -> list[bool]:
    """TensorFlow Lite's partitions in so many words: epochs of one kind, each scanned until nothing is added."""
    epochs: list[int | None] = [None] * len(kinds)
    epoch = 0
    while None in epochs:
        kind, added = None, True
        while added:
            added = False
            for number, read in enumerate(sources):
                if epochs[number] is None and all(index < 0 or epochs[index] is not None for index in read):
                    kind = kinds[number] if kind is None else kind
                    if kinds[number] == kind:
                        epochs[number], added = epoch, True
        if kind:
            return [found == epoch for found in epochs]
        epoch += 1
    return [False] * len(kinds)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_keeps_the_first_partition(tmp_path, data):
    n = data.draw(st.integers(1, 12))
    kinds = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    sources = [
        data.draw(st.lists(st.integers(-1, number - 1), min_size=1, max_size=1 + kinds[number])) for number in range(n)
    ]
    report = check_edgetpu(write(tmp_path, network(kinds, sources)))
    mapped = by_hand(kinds, sources)
    assert [operator.mapped for operator in report.operators] == mapped
    for operator, kind in zip(report.operators, kinds, strict=True):
        assert operator.mapped or operator.status == (OTHER_SUBGRAPH if kind else NOT_SUPPORTED)
    if report.blocker:
        first = report.blocker.operator.index
        assert not kinds[first] and any(index >= 0 and mapped[index] for index in sources[first])


def test_an_unsupported_start_stops_nothing(tmp_path):
    # As the log of mnist4: float images are quantized on the CPU, the rest is mapped.
    writer = Writer()
    image, quantized, out = writer.tensor(HALF, "float32"), writer.tensor(HALF), writer.tensor(HALF)
    result = writer.tensor(HALF, "float32")
    writer.operator("QUANTIZE", [image], [quantized])
    writer.operator("LOGISTIC", [quantized], [out])
    writer.operator("DEQUANTIZE", [out], [result], version=2)
    report = check_edgetpu(write(tmp_path, writer.file()))
    assert [operator.status for operator in report.operators] == [UNSPECIFIED, MAPPED, UNSUPPORTED_TYPE]


def test_the_order_in_the_file_does_not_matter(tmp_path):
    n = 500
    writer = Writer()
    tensors = [writer.tensor((4,)) for _ in range(n + 1)]
    for number in range(n):
        writer.operator("LOGISTIC", [tensors[number + 1]], [tensors[number]])
        writer.codes = writer.codes[:1]
        writer.operators[-1].opcodeIndex = 0
    assert check_edgetpu(write(tmp_path, writer.file())).n_mapped == n


def test_operators_that_wait_for_each_other_are_not_mapped(tmp_path):
    writer = Writer()
    a, b = writer.tensor(HALF), writer.tensor(HALF)
    writer.operator("LOGISTIC", [a], [b])
    writer.operator("LOGISTIC", [b], [a])
    assert check_edgetpu(write(tmp_path, writer.file())).n_mapped == 0


# --- files of our own ------------------------------------------------------------------------------------------------


def test_an_exported_network_is_fully_mapped(npu_files):
    report = check_edgetpu(npu_files["residuals int8"])
    assert report.fully_mapped and report.n_mapped == 16, str(report)
    assert report.blocker is None and report.rejections == ()
    assert f"{report.n_mapped} of {report.n_mapped} operators on the Edge TPU, 100.0 %" in str(report)
    # stem, and what the other layers add up to, by hand: out pixels x kernel x channels
    assert report.operators[0].macs == 17 * 16 * 3 * 3 * 3 * 16


def test_a_layer_norm_stops_the_edge_tpu(npu_files):
    report = check_edgetpu(npu_files["block int8"])
    assert [operator.name for operator in report.operators[:2]] == ["CONV_2D", "DEPTHWISE_CONV_2D"]
    assert report.operators[0].mapped and report.operators[1].mapped
    first = report.blocker.operator
    # The converter leaves NEG of the norm in float, between DEQUANTIZE and QUANTIZE.
    names = [operator.name for operator in report.operators]
    assert first.index < names.index("FULLY_CONNECTED") and first.name == "DEQUANTIZE"
    assert names[first.index + 1] == "NEG"
    assert report.blocker.operators_lost > len(names) / 2
    assert not any(operator.mapped for operator in report.operators if operator.name in ("FULLY_CONNECTED", "GELU"))
    assert "GELU" in report.rejections[0]


def test_a_float_file_is_refused_and_told_what_to_do(npu_files):
    report = check_edgetpu(npu_files["residuals float32"])
    assert {operator.status for operator in report.operators} == {UNSUPPORTED_TYPE}
    assert all("float32" in operator.reason for operator in report.operators)
    assert 'quantize="int8"' in str(report) and report.n_mapped == 0


def test_the_report_is_json(npu_files):
    report = check_edgetpu(npu_files["block int8"])
    document = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert document["n_mapped"] == report.n_mapped < len(document["operators"])
    assert document["blocker"]["operator"]["index"] == report.blocker.operator.index
    assert document["fully_mapped"] is False and document["path"] == str(report.path)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_file_that_is_none_is_an_error(tmp_path, edgetpu_folder):
    with pytest.raises(FlatbufferError, match=r"cannot read '.*none\.tflite'"):
        check_edgetpu(tmp_path / "none.tflite")
    with pytest.raises(FlatbufferError, match=r"model\.tflite' is no .tflite file"):
        check_edgetpu(write(tmp_path, b"PK\x03\x04" + bytes(100)))
    with pytest.raises(CompilerError, match="compiled for the Edge TPU already"):
        check_edgetpu(edgetpu_folder / "mobilenet_v1_0.25_128_quant_edgetpu.tflite")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_our_error_or_a_report(tmp_path, npu_files, data):
    damaged = bytearray(npu_files[data.draw(st.sampled_from(["residuals int8", "block int8"]))].read_bytes())
    # tables and vectors stand at both ends, weights between
    place = st.one_of(st.integers(0, 3000), st.integers(len(damaged) // 2, len(damaged) - 4))
    for start in data.draw(st.lists(place, min_size=1, max_size=12)):
        value = data.draw(st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 40), st.sampled_from([2**31, 2**32 - 1])))
        struct.pack_into("<I", damaged, start, value)
    damaged = damaged[: data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))]
    check_or_refuse(write(tmp_path, bytes(damaged)))


def test_flipped_bytes_of_a_real_file(tmp_path, edgetpu_folder):
    original = (edgetpu_folder / "mobilenet_v1_0.25_128_quant.tflite").read_bytes()
    rng = random.Random(0)
    weights = sorted(tensor.data for tensor in read_flatbuffer(original).tensors if tensor.data)
    gaps = zip([0, *(stop for _, stop in weights)], [*(start for start, _ in weights), len(original)], strict=True)
    places = [place for start, stop in gaps for place in range(start, stop)]
    assert len(places) < len(original) / 5  # tables, names, and the labels at the end
    refused = 0
    for _ in range(60):
        damaged = bytearray(original)
        for place in rng.sample(places, rng.randint(1, 12)):
            damaged[place] = rng.randrange(256)
        refused += check_or_refuse(write(tmp_path, bytes(damaged)))
    assert 5 < refused < 55


def check_or_refuse(path: Path) -> bool:
    try:
        report = check_edgetpu(path)
    except (FlatbufferError, CompilerError) as error:
        assert len(str(error)) < 700
        return True
    str(report), json.dumps(report.as_json(), allow_nan=False)
    assert sum(report.counts.values()) == len(report.operators)
    return False


# --- the compiler's output and logs ----------------------------------------------------------------------------------

# From the READMEs of public repositories: jveitchmichaelis/edgetpu-yolo, and two that were found without a name.
YOLOV5_16 = """edgetpu_compiler -sa yolov5s-int8-224.tflite
Edge TPU Compiler version 16.0.384591198
Started a compilation timeout timer of 180 seconds.

Model compiled successfully in 3173 ms.

Input model: yolov5s-int8-224.tflite
Input size: 7.37MiB
Output model: yolov5s-int8-224_edgetpu.tflite
Output size: 8.34MiB
On-chip memory used for caching model parameters: 6.08MiB
On-chip memory remaining for caching model parameters: 0.00B
Off-chip memory used for streaming uncached model parameters: 1.70MiB
Number of Edge TPU subgraphs: 2
Total number of operations: 294
Operation log: yolov5s-int8-224_edgetpu.log

Model successfully compiled but not all operations are supported by the Edge TPU. A percentage of the model will \
instead run on the CPU, which is slower. If possible, consider updating your model to use only operations supported \
by the Edge TPU. For details, visit g.co/coral/model-reqs.
Number of operations that will run on Edge TPU: 289
Number of operations that will run on CPU: 5

Operator                       Count      Status

RESIZE_NEAREST_NEIGHBOR        2          Mapped to Edge TPU
CONCATENATION                  1          Operation is otherwise supported, but not mapped due to some unspecified limitation
CONCATENATION                  17         Mapped to Edge TPU
STRIDED_SLICE                  13         Mapped to Edge TPU
TRANSPOSE                      1          Operation is otherwise supported, but not mapped due to some unspecified limitation
TRANSPOSE                      2          Mapped to Edge TPU
MAX_POOL_2D                    3          Mapped to Edge TPU
LOGISTIC                       62         Mapped to Edge TPU
QUANTIZE                       2          Operation is otherwise supported, but not mapped due to some unspecified limitation
QUANTIZE                       24         Mapped to Edge TPU
SUB                            3          Mapped to Edge TPU
PAD                            6          Mapped to Edge TPU
RESHAPE                        1          Operation is otherwise supported, but not mapped due to some unspecified limitation
RESHAPE                        5          Mapped to Edge TPU
ADD                            10         Mapped to Edge TPU
MUL                            80         Mapped to Edge TPU
CONV_2D                        62         Mapped to Edge TPU
Compilation child process completed within timeout period.
Compilation succeeded! 
"""  # noqa: E501, W291

YOLOV3_TINY_15 = """Edge TPU Compiler version 15.0.340273435

Model compiled successfully in 577 ms.

Input model: /home/yolo/yolov3-tiny_int8.tflite
Input size: 8.58MiB
Output model: /home/yolo/yolov3-tiny_int8_edgetpu.tflite
Output size: 8.70MiB
On-chip memory used for caching model parameters: 3.00KiB
On-chip memory remaining for caching model parameters: 7.67MiB
Off-chip memory used for streaming uncached model parameters: 0.00B
Number of Edge TPU subgraphs: 1
Total number of operations: 36
Operation log: /home/yolo/yolov3-tiny_int8_edgetpu.log

Model successfully compiled but not all operations are supported by the Edge TPU.
Number of operations that will run on Edge TPU: 2
Number of operations that will run on CPU: 34

Operator                       Count      Status

MAX_POOL_2D                    6          More than one subgraph is not supported
QUANTIZE                       2          Operation is otherwise supported, but not mapped due to some unspecified limitation
QUANTIZE                       1          Mapped to Edge TPU
QUANTIZE                       1          More than one subgraph is not supported
CONV_2D                        1          Mapped to Edge TPU
CONV_2D                        12         More than one subgraph is not supported
RESIZE_NEAREST_NEIGHBOR        1          Operation version not supported
LEAKY_RELU                     11         Operation not supported
CONCATENATION                  1          More than one subgraph is not supported
"""  # noqa: E501

RESNET50_2 = """Edge TPU Compiler version 2.0.291256449

Model compiled successfully in 2356 ms.

Input model: resnet50.tflite
Input size: 25.08MiB
Output model: resnet50_edgetpu.tflite
Output size: 24.87MiB
On-chip memory available for caching model parameters: 6.25MiB
On-chip memory used for caching model parameters: 6.25MiB
Off-chip memory used for streaming uncached model parameters: 18.43MiB
Number of Edge TPU subgraphs: 1
Total number of operations: 77
Operation log: resnet50_edgetpu.log
See the operation log file for individual operation details.
"""

BLOCK = """Input model: {name}.tflite
Input size: 258.55KiB
Output model: {name}_edgetpu.tflite
Output size: 380.62KiB
On-chip memory used for caching model parameters: {used}
On-chip memory remaining for caching model parameters: 2.98MiB
Off-chip memory used for streaming uncached model parameters: 0.00B
Number of Edge TPU subgraphs: 1
Total number of operations: {operators}
Operation log: {name}_edgetpu.log
See the operation log file for individual operation details.
"""
TOGETHER_16 = (
    "Edge TPU Compiler version 16.0.384591198\nStarted a compilation timeout timer of 180 seconds.\n\n"
    "Models compiled successfully in 1717 ms.\n\n"
    + BLOCK.format(name="lanes", used="322.25KiB", operators=12)
    + "\n"
    + BLOCK.format(name="signs", used="4.50MiB", operators=66)
    + "Compilation child process completed within timeout period.\nCompilation succeeded! \n"
)


def test_reads_what_compiler_16_prints():
    compilation = parse_edgetpu_output(YOLOV5_16)
    assert (compilation.compiler_version, compilation.milliseconds) == ("16.0.384591198", 3173)
    (model,) = compilation.models
    assert (model.n_operators, model.n_mapped, model.subgraphs) == (294, 289, 2)
    assert (model.on_chip_bytes, model.on_chip_free_bytes) == (round(6.08 * 2**20), 0)
    assert (model.input_bytes, model.streamed_bytes) == (round(7.37 * 2**20), round(1.70 * 2**20))
    assert model.counts["QUANTIZE", UNSPECIFIED] == 2 and len(model.rows) == 17
    # what the rules say of operators that this log maps
    assert all(name in edgetpu_rules._RULES for name, status in model.counts if status == MAPPED)
    text = str(compilation)
    assert "289 of 294 operators" in text and "1.70 MiB streamed" in text


def test_reads_what_older_compilers_print():
    (tiny,) = parse_edgetpu_output(YOLOV3_TINY_15).models
    assert (tiny.n_operators, tiny.n_mapped, tiny.on_chip_bytes) == (36, 2, 3072)
    assert tiny.counts["LEAKY_RELU", NOT_SUPPORTED] == 11 and "LEAKY_RELU" not in edgetpu_rules._RULES
    assert tiny.counts["RESIZE_NEAREST_NEIGHBOR", VERSION_NOT_SUPPORTED] == 1
    (resnet,) = parse_edgetpu_output(RESNET50_2).models
    assert (resnet.n_operators, resnet.n_mapped, resnet.on_chip_free_bytes) == (77, 77, 0)
    assert resnet.streamed_bytes == round(18.43 * 2**20) and resnet.rows == ()


def test_reads_several_models_that_share_the_cache():
    compilation = parse_edgetpu_output(TOGETHER_16)
    assert [(model.output, model.n_operators) for model in compilation.models] == [
        ("lanes_edgetpu.tflite", 12),
        ("signs_edgetpu.tflite", 66),
    ]
    assert [model.on_chip_bytes for model in compilation.models] == [round(322.25 * 1024), round(4.5 * 2**20)]
    json.dumps(compilation.as_json(), allow_nan=False)


FAILURES = {
    # google-coral/edgetpu issues 313, 439, 358 and 845
    "Edge TPU Compiler version 15.0.340273435\nInvalid model: m.tflite\nModel not quantized\n": "Model not quantized",
    "Edge TPU Compiler version 16.0.384591198\nStarted a compilation timeout timer of 180 seconds.\nERROR: Restored "
    "original execution plan after delegate application failure.\nCompilation failed: Compilation failed due to large "
    "activation tensors in model.\nCompilation child process completed within timeout period.\n"
    "Compilation failed! \n": "large activation tensors",
    "Edge TPU Compiler version 15.0.340273435\n\nInternal compiler error. Aborting! \n": "Internal compiler error",
    "Edge TPU Compiler version 16.0.384591198\nERROR: Didn't find op for builtin opcode 'TRANSPOSE_CONV' version '4'.\n"
    "\nERROR: Registration failed.\n\nInvalid model: m.tflite\nModel could not be parsed\n": "TRANSPOSE_CONV",
    "": "no output of the Edge TPU compiler",
    "bash: edgetpu_compiler: command not found\n": "no output .* command not found",
}


@pytest.mark.parametrize("text", FAILURES)
def test_a_failure_is_told_in_the_compilers_words(text):
    with pytest.raises(CompilerError, match=FAILURES[text]):
        parse_edgetpu_output(text)


@pytest.mark.parametrize("text", [YOLOV5_16, YOLOV3_TINY_15, RESNET50_2, TOGETHER_16])
def test_an_output_that_is_cut_short_is_an_error_or_complete(text):
    whole = parse_edgetpu_output(text)
    for size in range(len(text)):
        try:
            models = parse_edgetpu_output(text[:size]).models
        except CompilerError:
            continue
        # What is lost may be a whole model, or closing words.
        assert models and models == whole.models[: len(models)]


@pytest.mark.parametrize("name", LOGS)
def test_a_log_that_is_cut_within_a_line_is_an_error(tmp_path, edgetpu_folder, name):
    text = (edgetpu_folder / "logs" / f"{name}.log").read_text()
    rows = read_edgetpu_log(edgetpu_folder / "logs" / f"{name}.log").rows
    path = tmp_path / "cut.log"
    for size in range(0, len(text), 7):
        path.write_text(text[:size])
        try:
            kept = read_edgetpu_log(path).rows
        except CompilerError:
            continue
        assert kept and kept == rows[: len(kept)] and text[:size].rstrip().endswith(kept[-1].status)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"hello\n", b"Edge TPU Compiler version 16.0.384591198\n", b"\x89PNG\r\n" * 20]
)
def test_another_file_is_no_log(tmp_path, content):
    path = tmp_path / "other.log"
    path.write_bytes(content)
    with pytest.raises(CompilerError, match=r"other\.log"):
        read_edgetpu_log(path)
    with pytest.raises(CompilerError, match=r"none\.log"):
        read_edgetpu_log(tmp_path / "none.log")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Mapped to Edge TPU", "Mapped to Edge"),
        ("12         Mapped", "0          Mapped"),
        ("12         Mapped", "many       Mapped"),
        ("Operator  ", "Operators "),
        ("Input: ", "In: "),
    ],
)
def test_a_damaged_log_is_an_error(tmp_path, edgetpu_folder, before, after):
    text = (edgetpu_folder / "logs" / "efficientdet-lite_edgetpu.log").read_text()
    assert before in text
    path = tmp_path / "damaged.log"
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(CompilerError, match=r"damaged\.log"):
        read_edgetpu_log(path)


# --- running the compiler --------------------------------------------------------------------------------------------

# Stands in for the program on disk only: it prints what compiler 16 prints, and hands out the file and the log that
# the real one made of the same model.
STAND_IN = """#!{python}
import pathlib, shutil, sys
folder = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
models = [pathlib.Path(name) for name in sys.argv[1:] if name.endswith(".tflite")]
mode = {mode!r}
if mode == "fails":
    print("Edge TPU Compiler version 16.0.384591198")
    print("Invalid model: m.tflite")
    print("Model not quantized")
    sys.exit(1)
print("Edge TPU Compiler version 16.0.384591198")
print("Started a compilation timeout timer of 180 seconds.")
print("Model" + "s" * (len(models) > 1), "compiled successfully in 542 ms.")
for model in models:
    name = str(folder / model.stem)
    if mode != "writes nothing":
        shutil.copyfile({compiled!r}, name + "_edgetpu.tflite")
        text = pathlib.Path({log!r}).read_text()
        pathlib.Path(name + "_edgetpu.log").write_text(text.rsplit("QUANTIZE", 1)[0] if mode == "cut log" else text)
    print({block!r}.format(model=name, operators=72))
print("Compilation succeeded!")
"""
STAND_IN_BLOCK = """Input model: {model}.tflite
Input size: 2.94MiB
Output model: {model}_edgetpu.tflite
Output size: 3.12MiB
On-chip memory used for caching model parameters: 2.62MiB
On-chip memory remaining for caching model parameters: 4.70MiB
Off-chip memory used for streaming uncached model parameters: 0.00B
Number of Edge TPU subgraphs: 1
Total number of operations: {operators}
Operation log: {model}_edgetpu.log
See the operation log file for individual operation details.
"""


def stand_in(folder: Path, edgetpu_folder: Path, mode: str = "works") -> Path:
    program = folder / "edgetpu_compiler"
    made = edgetpu_folder / "mobilenet_v2_flowers_quant_edgetpu"
    program.write_text(
        STAND_IN.format(
            python=sys.executable,
            mode=mode,
            compiled=str(made.with_suffix(".tflite")),
            log=str(made.with_suffix(".log")),
            block=STAND_IN_BLOCK,
        )
    )
    program.chmod(0o755)
    return program


@pytest.fixture
def flowers(tmp_path, edgetpu_folder) -> Path:
    path = tmp_path / "flowers.tflite"
    path.write_bytes((edgetpu_folder / "mobilenet_v2_flowers_quant.tflite").read_bytes())
    return path


def test_without_the_compiler_says_where_it_runs(monkeypatch, flowers, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("EDGETPU_COMPILER", raising=False)
    with pytest.raises(CompilerError, match=r"not installed.*x86-64.*debian:11.*Colab.*EDGETPU_COMPILER"):
        compile_edgetpu(flowers)
    with pytest.raises(CompilerError, match=r"nowhere/edgetpu_compiler' is no program"):
        compile_edgetpu(flowers, compiler="nowhere/edgetpu_compiler")
    assert sorted(tmp_path.iterdir()) == [flowers]


def test_runs_the_compiler_and_agrees_with_the_check(monkeypatch, flowers, tmp_path, edgetpu_folder):
    (tmp_path / "bin").mkdir()
    stand_in(tmp_path / "bin", edgetpu_folder)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    compilation = compile_edgetpu(flowers)
    (model,) = compilation.models
    assert (model.input, model.output) == (str(flowers), str(tmp_path / "flowers_edgetpu.tflite"))
    assert (model.n_operators, model.n_mapped) == (72, 72)
    assert model.counts == check_edgetpu(flowers).counts == read_edgetpu_log(model.log).counts
    assert read_flatbuffer(model.output).custom_operators == ("edgetpu-custom-op",)
    with pytest.raises(OutputError, match="flowers_edgetpu.tflite' exists already"):
        compile_edgetpu(flowers)
    assert compile_edgetpu(flowers, force=True) == compilation
    with pytest.raises(CompilerError, match="compiled for the Edge TPU already"):
        compile_edgetpu(model.output)


def test_compiles_several_files_into_a_folder(monkeypatch, flowers, tmp_path, edgetpu_folder):
    monkeypatch.setenv("EDGETPU_COMPILER", str(stand_in(tmp_path, edgetpu_folder)))
    other = tmp_path / "other.tflite"
    other.write_bytes(flowers.read_bytes())
    (tmp_path / "out").mkdir()
    models = compile_edgetpu([flowers, other], tmp_path / "out").models
    assert [Path(model.output).name for model in models] == ["flowers_edgetpu.tflite", "other_edgetpu.tflite"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "flowers_edgetpu.log",
        "flowers_edgetpu.tflite",
        "other_edgetpu.log",
        "other_edgetpu.tflite",
    ]
    with pytest.raises(OptionError, match="no folder"):
        compile_edgetpu([flowers, other], tmp_path / "nowhere")
    with pytest.raises(OptionError, match="several different ones"):
        compile_edgetpu([flowers, flowers])


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("fails", "ended with status 1: .*Model not quantized"),
        ("writes nothing", "wrote no 'model0_edgetpu.tflite'"),
        ("cut log", "printed 72 operators and 1 parts .* log has 70"),
    ],
)
def test_a_compiler_that_fails_leaves_nothing_behind(flowers, tmp_path, edgetpu_folder, mode, message):
    program = stand_in(tmp_path, edgetpu_folder, mode)
    with pytest.raises(CompilerError, match=message):
        compile_edgetpu(flowers, compiler=program)
    assert sorted(tmp_path.iterdir()) == sorted([flowers, program])


def test_rules_name_operators_of_the_schema():
    from ai_edge_litert import schema_py_generated as schema

    for name in {*edgetpu_rules._RULES, *edgetpu_rules._REPLACEMENTS, *edgetpu_rules._NEWEST_READABLE}:
        assert hasattr(schema.BuiltinOperator, name), name
    assert np.all([rule.newest_version > 0 for rule in edgetpu_rules._RULES.values()])
