"""The reports of the vendor's `benchmark_model`: real logs of the older dialect, and the newer one as it differs."""

import re

import pytest

from tflite_export import DeviceError
from tflite_export.benchmark_model import (
    cache_path,
    find_benchmark_model,
    graph_name,
    missing_tool_advice,
    parse_benchmark_log,
    read_benchmark_log,
)

# average, first run, warm-up, loading in milliseconds; runs; memory at the end; operators; what ran them
REAL = {
    "imx8_mobilenet-CPU": (162.980, 169.816, 164.822, 2.409, 50, 10.332, 31, "CPU"),
    "imx8_mobilenet-GPU": (163.347, None, None, None, 50, None, 1, "EXTERNAL"),
    "imx8_mobilenet-NPU": (2.52559, 4625.131, 4625.13, 12.434, 379, 34.3164, 1, "EXTERNAL"),
    "qemu_riscv64_mobilenet_v1_float": (2950.34, 3512.391, 3512.39, 17.187, 50, 46.0859, 31, "CPU"),
    "imx8_deeplabv3-CPU": (None, None, None, None, 50, None, None, "CPU"),
    "imx8_inception_v4_299_quant-CPU": (None, None, None, None, 50, None, None, "CPU"),
}


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "device" / "benchmark_model"


def newer(text: str) -> str:
    """Rewrite a real log in the newer dialect, from what the shared data's README and the tool's source say of it."""
    lines, columns = [], []
    for line in text.splitlines():
        cells = line.split("\t")
        if "[node type]" in line:
            columns = [cell.strip() for cell in cells]
        elif len(cells) != len(columns):
            columns = []
        if "[start]" in columns:
            del cells[columns.index("[start]")]
        lines.append("\t".join(cells))
    text = "\n".join(lines)
    text = re.sub(r"(count=\d+ first=.* std=\d+)$", r"\1 p5=11 median=12 p95=1.30001e+06", text, flags=re.M)
    return "\n".join(line if line.startswith("\t") or not line else f"INFO: {line}" for line in text.splitlines())


def test_all_real_logs_are_covered(folder):
    assert {path.stem for path in folder.glob("*.log")} == set(REAL)


@pytest.mark.parametrize("name", REAL)
def test_a_real_log_is_read_whole(folder, name):
    path = folder / f"{name}.log"
    log = read_benchmark_log(path)
    average, first, warmup, init, n, memory, n_operators, delegate = REAL[name]
    for wanted, found in (
        (average, log.average_ms),
        (first, log.first_ms),
        (warmup, log.warmup_ms),
        (init, log.init_ms),
        (memory, log.memory_mb),
        (n_operators, len(log.operators)),
    ):
        assert wanted is None or found == pytest.approx(wanted, rel=1e-6)
    assert (log.n, log.delegate, log.median_ms, log.p5_ms, log.p95_ms) == (n, delegate, None, None, None)
    assert log.min_ms <= log.average_ms <= log.max_ms and log.std_ms > 0
    # Independent of the parser: the operators' times add up to that of a run, told elsewhere in the file.
    total_us = float(re.findall(r"Timings \(microseconds\): .*?avg=([\d.e+]+)", path.read_text())[-1])
    assert sum(one.average_ms * one.n_calls for one in log.operators) == pytest.approx(total_us / 1000, rel=0.002)
    n_nodes = int(re.findall(r"^(\d+) nodes observed", path.read_text(), re.M)[-1])
    assert len(log.operators) == n_nodes
    assert log.typical_ms == log.average_ms


def test_what_a_log_says_of_the_file(folder):
    log = read_benchmark_log(folder / "qemu_riscv64_mobilenet_v1_float.log")
    assert (log.graph, graph_name(log)) == ("./mobilenet_v1_1.0_224.tflite", "mobilenet_v1_1.0_224.tflite")
    assert (log.threads, log.size_mb, log.n_warmup) == (4, 16.9008, 1)
    assert (log.min_ms, log.max_ms, log.std_ms) == (2727.568, 3189.954, 109.798)
    assert read_benchmark_log(folder / "imx8_mobilenet-CPU.log").threads is None


def test_operators_in_order_of_execution(folder):
    first, *_, last = read_benchmark_log(folder / "imx8_mobilenet-CPU.log").operators
    assert (first.type, first.name, first.first_ms, first.average_ms) == (
        "CONV_2D",
        "[MobilenetV1/MobilenetV1/Conv2d_0/Relu6]:0",
        7.628,
        7.640,
    )
    assert (last.type, last.average_ms, last.n_calls, last.memory_kb) == ("SOFTMAX", 0.022, 1, 0)


@pytest.mark.parametrize("name", REAL)
def test_the_newer_dialect_says_the_same_and_percentiles(folder, name):
    text = (folder / f"{name}.log").read_text()
    old, new = parse_benchmark_log(text), parse_benchmark_log(newer(text))
    assert "[start]" in text and "[start]" not in newer(text)
    assert new.operators == old.operators and new.graph == old.graph and new.delegate == old.delegate
    assert (new.average_ms, new.n, new.init_ms, new.memory_mb) == (old.average_ms, old.n, old.init_ms, old.memory_mb)
    assert (new.p5_ms, new.median_ms, new.p95_ms, new.typical_ms) == (0.011, 0.012, 1300.01, 0.012)


def test_lines_of_the_android_log_are_read(folder):
    text = (folder / "imx8_mobilenet-CPU.log").read_text()
    stamped = "\n".join(f"05-31 10:38:42.569 22206 22206 I tflite  : {line}" for line in text.splitlines())
    assert parse_benchmark_log(stamped) == parse_benchmark_log(text)


def test_a_part_of_the_graph_on_a_delegate(folder):
    text = (folder / "imx8_mobilenet-NPU.log").read_text()
    partly = text.replace(
        "completely executed by the delegate.", "partially executed by the delegate w/ 3 delegate kernels."
    )
    log = parse_benchmark_log(partly)
    assert (log.delegate, log.n_partitions, log.delegate_text) == ("EXTERNAL", 3, "EXTERNAL (3 parts)")


REFUSED = """STARTING!
Graph: [m.tflite]
Use gpu: [1]
GPU delegate created.
ERROR: Following operations are not supported by GPU delegate:
AVERAGE_POOL_2D: OP is supported, but tensor type/shape isn't compatible.
DEQUANTIZE:
No operations will run on the GPU, and all 65 operations will run on the CPU.
"""


def test_operators_that_a_delegate_refuses_are_named(folder):
    text = (folder / "imx8_mobilenet-CPU.log").read_text()
    log = parse_benchmark_log(REFUSED + text)
    assert log.unsupported == (
        "AVERAGE_POOL_2D: OP is supported, but tensor type/shape isn't compatible",
        "DEQUANTIZE: not supported",
    )
    nothing = "Though GPU delegate is explicitly applied, the model graph will not be executed by the delegate.\n"
    with pytest.raises(DeviceError, match=r"GPU delegate runs nothing of 'm.tflite'; it refused AVERAGE_POOL_2D.*DEQ"):
        parse_benchmark_log(REFUSED + nothing + text)
    with pytest.raises(DeviceError, match=r"did not finish 'm.tflite'.*Failed to apply GPU delegate.*refused AVERAGE"):
        parse_benchmark_log(REFUSED + "ERROR: Failed to apply GPU delegate.\nERROR: Benchmarking failed.\n")


def test_what_is_no_log_is_an_error(folder, tmp_path):
    text = (folder / "imx8_mobilenet-CPU.log").read_text()
    for other in ("", "hello\n", "count=3\n" * 5, "Inference timings in us: Init: 1"):
        with pytest.raises(DeviceError, match="no log of benchmark_model"):
            parse_benchmark_log(other)
    for end in (200, 400, 600):
        with pytest.raises(DeviceError, match="did not finish|no log"):
            parse_benchmark_log(text[:end])
    with pytest.raises(DeviceError, match="a line that benchmark_model does not print"):
        parse_benchmark_log(text.replace("7.628", "seven"))
    with pytest.raises(DeviceError, match="a line that benchmark_model does not print"):
        parse_benchmark_log(text.replace("\t    7.640", ""))
    with pytest.raises(DeviceError, match="cannot read the log .*No such file"):
        read_benchmark_log(tmp_path / "none.log")
    (tmp_path / "image.log").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(DeviceError, match="no log of benchmark_model"):
        read_benchmark_log(tmp_path / "image.log")


def test_the_binary_is_found_by_option_then_environment_then_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("UPDP_TF_BENCHMARK_MODEL", raising=False)
    where = {"system": "android", "machine": "aarch64"}
    assert find_benchmark_model(None, **where) is None
    cached = cache_path("android", "aarch64")
    assert cached == tmp_path / "cache/updp-tf/android_arm64/benchmark_model"
    cached.parent.mkdir(parents=True)
    arm = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + (183).to_bytes(2, "little")
    cached.write_bytes(arm)
    assert find_benchmark_model(None, **where) == cached
    (tmp_path / "by_environment").write_bytes(arm)
    monkeypatch.setenv("UPDP_TF_BENCHMARK_MODEL", str(tmp_path / "by_environment"))
    assert find_benchmark_model(None, **where) == tmp_path / "by_environment"
    (tmp_path / "by_option").write_bytes(arm)
    assert find_benchmark_model(tmp_path / "by_option", **where) == tmp_path / "by_option"
    with pytest.raises(DeviceError, match="built for aarch64, but the device is x86_64"):
        find_benchmark_model(tmp_path / "by_option", system="linux", machine="x86_64")
    with pytest.raises(DeviceError, match="cannot read the benchmark_model binary"):
        find_benchmark_model(tmp_path / "none", **where)
    assert "/android_arm64/benchmark_model" in missing_tool_advice("android", "aarch64")
