"""Ethos-U through the vendor's real compiler, which runs anywhere."""

import json
import subprocess
import sys

import pytest

from tests.export.tflite_writer import Writer
from tflite_export import (
    CompilerError,
    FlatbufferError,
    OptionError,
    OutputError,
    compile_ethosu,
    ethosu,
    read_flatbuffer,
)

pytest.importorskip("ethosu.vela", reason="needs the extra: pip install 'updp-tf[ethosu]'")


def test_an_exported_network_runs_on_the_npu_alone(npu_files, tmp_path):
    result = compile_ethosu(npu_files["residuals int8"], out=tmp_path / "out.tflite")
    assert result.n_cpu_operators == 0 and result.cpu_operators == ()
    assert result.n_operators == len(read_flatbuffer(result.source).operators) == 16
    assert read_flatbuffer(result.path).custom_operators == ("ethos-u",)
    assert 0.01 < result.estimated_ms < 10
    assert result.estimated_inferences_per_second == pytest.approx(1000 / result.estimated_ms, rel=1e-3)
    # the largest activation, 17 x 16 x 96 int8, must lie in the SRAM; weights in the flash
    assert result.estimated_sram_bytes > 17 * 16 * 96
    assert 10_000 < result.estimated_flash_bytes < result.source.stat().st_size * 2
    text = str(result)
    assert "0 of 16 operators on the CPU" in text
    assert all("compiler's estimate" in line for line in text.splitlines() if " ms " in line or "SRAM" in line)
    document = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert document["n_cpu_operators"] == 0 and document["path"] == str(tmp_path / "out.tflite")
    # a bigger NPU of the same kind is faster, and every figure is named an estimate
    small = compile_ethosu(npu_files["residuals int8"], "ethos-u55-32", tmp_path / "small.tflite")
    assert small.estimated_ms > 1.5 * result.estimated_ms
    assert small.npu_macs == pytest.approx(result.npu_macs, rel=0.02)
    assert {key for key in document if "ms" in key.split("_") or "bytes" in key} == {
        "estimated_ms",
        "estimated_sram_bytes",
        "estimated_dram_bytes",
        "estimated_flash_bytes",
    }


def test_a_layer_norm_leaves_operators_on_the_cpu_with_reasons(npu_files, tmp_path):
    result = compile_ethosu(npu_files["block int8"], out=tmp_path / "out.tflite")
    names = [operator.name for operator in result.cpu_operators]
    assert names.count("NEG") == 1 and names.count("DEQUANTIZE") == 1 and names.count("MEAN") == 2
    assert result.n_cpu_operators == 5
    reasons = {operator.name: operator.reason for operator in result.cpu_operators}
    assert "Float32" in reasons["NEG"] and "depth-reduction" in reasons["MEAN"]
    assert all(reasons.values())
    assert "on the CPU, and the compiler's reasons" in str(result) and result.estimated_ms > 0


def test_a_float_network_is_left_to_the_cpu_though_the_compiler_is_content(npu_files, tmp_path):
    source = npu_files["residuals float32"]
    done = subprocess.run([sys.executable, "-m", "ethosu.vela", source, "--output-dir", tmp_path], capture_output=True)
    assert done.returncode == 0  # which is why counts are checked
    result = compile_ethosu(source, out=tmp_path / "out.tflite")
    assert result.n_cpu_operators == result.n_operators == 16
    assert result.estimated_ms is None and result.estimated_inferences_per_second is None
    assert all("Float32" in operator.reason for operator in result.cpu_operators)
    assert "nothing runs on the NPU" in str(result) and 'quantize="int8"' in str(result)


@pytest.mark.parametrize("accelerator", ["ethos-u65-512", "ethos-u85-256"])
def test_other_accelerators(npu_files, tmp_path, accelerator):
    result = compile_ethosu(npu_files["residuals int8"], accelerator, tmp_path / "out.tflite")
    assert result.n_cpu_operators == 0 and result.estimated_ms > 0
    assert result.system.lower().startswith(accelerator[:9].replace("-", "_"))
    assert result.estimated_dram_bytes > 0  # these are built with DRAM


@pytest.mark.slow  # a network of 0.9 G MACs: seconds, and a minute on a loaded machine
def test_real_files_of_other_makers(edgetpu_folder, tmp_path):
    result = compile_ethosu(edgetpu_folder / "deeplabv3_mnv2_dm05_pascal_quant.tflite", out=tmp_path / "out.tflite")
    (left,) = result.cpu_operators
    assert (left.name, left.output) == ("RESIZE_BILINEAR", "ResizeBilinear_2")
    assert "scale-factor" in left.reason.splitlines()[0] and len(left.reason.splitlines()) > 1


def test_the_accelerators_are_those_of_the_compiler():
    text = subprocess.run([sys.executable, "-m", "ethosu.vela", "--help"], capture_output=True, text=True).stdout
    listed = text.split("--accelerator-config {")[1].split("}")[0]
    assert tuple(listed.split(",")) == ethosu.ACCELERATORS
    with pytest.raises(OptionError, match=r"no accelerator 'ethos-u99'.*ethos-u55-256.*ethos-u85-2048"):
        compile_ethosu("any.tflite", "ethos-u99")


def test_bad_input_is_an_error_and_nothing_is_written(npu_files, tmp_path):
    source, out = npu_files["residuals int8"], tmp_path / "out.tflite"
    cut = tmp_path / "cut.tflite"
    # On this file the compiler itself ends with a segmentation fault.
    cut.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    with pytest.raises(FlatbufferError, match="cut.tflite"):
        compile_ethosu(cut, out=out)
    with pytest.raises(FlatbufferError, match="cannot read"):
        compile_ethosu(tmp_path / "none.tflite", out=out)
    with pytest.raises(OutputError, match="no folder"):
        compile_ethosu(source, out=tmp_path / "nowhere" / "out.tflite")
    assert not out.exists()
    compile_ethosu(source, out=out)
    with pytest.raises(OutputError, match="exists already"):
        compile_ethosu(source, out=out)
    with pytest.raises(CompilerError, match="compiled for Ethos-U already"):
        compile_ethosu(out)
    with pytest.raises(CompilerError, match="more than 0.01 s"):
        compile_ethosu(source, out=out, force=True, timeout_s=0.01)


def test_a_compiler_that_ends_badly_is_an_error(tmp_path):
    # Weights that are computed, in a file that is sound: the compiler gives up on the operator or on the file.
    writer = Writer()
    image, weights, out = writer.tensor((1, 8)), writer.tensor((5, 8)), writer.tensor((1, 5))
    writer.operator("FULLY_CONNECTED", [image, weights, -1], [out], version=4, kind="FullyConnectedOptions")
    source = tmp_path / "computed.tflite"
    source.write_bytes(writer.file())
    try:
        result = compile_ethosu(source)
    except CompilerError as error:
        assert "computed.tflite" in str(error)
    else:
        assert result.n_operators == 1
