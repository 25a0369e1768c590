"""Every kind of device keeps one contract; phones over the real adb, boards over a real sshd."""

import csv
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.device.conftest import free_port, leftovers, make_executable, wait_until
from tflite_export import DeviceError, OptionError, benchmark, benchmarking, read_flatbuffer
from tflite_export.devices import DEVICES, DeviceOptions, Nature, Quota, open_device, runner
from tflite_export.devices.transport import SshTransport
from tflite_export.interpreter import TfliteRunner
from tflite_export.outputs import fixed_inputs

SITTINGS = 4  # the devices are to be tested, not the statistics
SHORT = Quota(runs=3, ms=5, max_ms=2000)
BRIEF = {"min_runs": 24, "min_seconds": 0.1}


@pytest.fixture(autouse=True)
def fewer_sittings(monkeypatch):
    monkeypatch.setattr(benchmarking, "SITTINGS", SITTINGS)


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.fixture
def device(request, models, stand_in):
    """A device of each kind that can run here, and the two files to run on it."""
    kind = request.param
    options, files = DeviceOptions(), [models.one, models.three]
    if kind.startswith("adb"):
        phone = request.getfixturevalue("phone")(python=kind == "adb python")
        name = f"adb:{phone.serial}"
        if kind == "adb tool":
            options = DeviceOptions(benchmark_model=stand_in)
    elif kind.startswith("ssh"):
        board = request.getfixturevalue("board")
        name = board.address
        tool = stand_in if kind == "ssh tool" else None
        options = DeviceOptions(ssh_config=board.good, python=board.python, benchmark_model=tool)
    elif kind == "ethos-u55-256":
        name, files = kind, [models.int8, models.int8]
    elif kind == "file":
        folder = request.getfixturevalue("tmp_path") / "logs"
        folder.mkdir()
        for number in range(3):
            for path in files:
                (folder / f"{path.stem}{number}.log").write_text(run_stand_in(stand_in, path))
        name = f"file:{folder}"
    else:
        name = kind
    opened = open_device(name, options)
    yield opened, files, name
    opened.close()


def run_stand_in(stand_in: Path, path: Path) -> str:
    flags = ["--num_threads=1", "--num_runs=20", "--min_secs=0", "--warmup_runs=1", "--warmup_min_secs=0"]
    command = [stand_in, f"--graph={path.name}", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=path.parent, check=True, timeout=60).stdout


KINDS = ["local", "adb tool", "adb python", "ssh python", "ssh tool", "ethos-u55-256", "file"]


def test_the_contract_covers_every_kind():
    assert {kind.split()[0].partition("55")[0] for kind in KINDS} | {"edgetpu"} == set(DEVICES)


@pytest.mark.parametrize("device", KINDS, indirect=True)
def test_every_device_keeps_the_contract(device):
    opened, files, name = device
    info = opened.describe()
    assert info.name == name and info.description and info.system and info.runtime
    assert info.nature == (Nature.ESTIMATE if name.startswith("ethos") else Nature.MEASURED)
    for backwards in (False, True):
        timings = opened.run(files, threads=1, quota=SHORT, backwards=backwards)
        assert len(timings) == len(files)
        for timing in timings:
            assert timing.delegate
            if timing.log is None:
                times = np.concatenate([np.asarray(turn) for turn in timing.turns_ms])
            else:
                times = np.array([timing.log.typical_ms])
                assert not timing.turns_ms and timing.log.n >= 3
            assert (0 < times).all() and (times < 1000).all()
        assert len({len(timing.turns_ms) for timing in timings}) == 1
    if not name.startswith("ethos"):  # three convolutions take longer than one
        typical = [t.log.typical_ms if t.log else np.median(np.concatenate(t.turns_ms)) for t in timings]
        assert typical[0] < typical[1]
    for path in dict.fromkeys(files):
        inputs = fixed_inputs(read_flatbuffer(path))
        answer = opened.fetch(path, inputs, threads=1)
        assert (answer is None) == name.startswith(("ethos", "file"))
        if answer is not None:  # the same as an interpreter of the test's own gives
            (tensor,) = read_flatbuffer(path).outputs
            (expected,) = TfliteRunner(path).run(inputs[0]).values()
            assert answer.outputs[0].dtype == tensor.dtype and answer.outputs[0].shape == tensor.shape
            assert np.abs(answer.outputs[0] - expected).max() <= 1e-5 * np.abs(expected).max()
    opened.close()
    opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("device", KINDS, indirect=True)
def test_a_table_from_every_device(device, tmp_path):
    opened, files, name = device
    table = benchmark(files, device=opened, out=tmp_path / "rows.csv", **BRIEF)
    with (tmp_path / "rows.csv").open() as file:
        written = list(csv.DictReader(file))
    for row, record, path in zip(table.rows, written, files, strict=True):
        assert row.sha256 == record["sha256"] == read_flatbuffer(path).sha256
        assert row.device.name == record["device_name"] == name
        assert row.median_ms > 0
        assert row.p10_ms <= row.median_ms <= row.p90_ms or (row.n == 0 and math.isnan(row.p10_ms))
        assert row.date.endswith("+00:00") and row.threads == 1
        assert row.nature == record["nature"]
        if name.startswith("ethos"):
            assert row.n == 0 and math.isnan(row.ratio_low) and record["ratio_low"] == ""
        elif name.startswith("file"):
            assert row.sittings == 3 and row.spread == "sittings"
        else:
            assert row.sittings in (SITTINGS, SITTINGS + SITTINGS // 2) and row.n >= 24
            assert row.output_difference < 1e-5
            assert row.ratio_low <= row.ratio <= row.ratio_high
        assert row.init_ms > 0 or name.startswith("ethos")
    assert table.rows[0].ratio == 1
    json.dumps(table.as_json(), allow_nan=False)
    back, forth = table.ratio(1, 0), table.ratio(0, 1)
    assert back.value == pytest.approx(table.rows[1].ratio) and back.value * forth.value == pytest.approx(1)
    assert ("estimate" in str(table)) == name.startswith("ethos")


# --- phones ----------------------------------------------------------------------------------------------------------


def test_a_phone_with_the_tool_tells_its_whole_report(phone, models, stand_in):
    made = phone()
    table = benchmark(
        [models.one, models.three], device="adb", options=DeviceOptions(benchmark_model=stand_in), **BRIEF
    )
    row = table.rows[1]
    assert row.device.description.startswith("Acme Phone 7, SM1234, ") and row.device.system.startswith("Android 14")
    assert row.device.thermal_status == "Thermal Status: 0"
    assert row.device.runtime.startswith("benchmark_model ") and row.delegate == "XNNPACK"
    assert (row.memory_mb, row.spread) == (2.25, "sittings") and row.init_ms > 0
    assert [one.type for one in row.log.operators] == ["XNNPACK"]
    assert row.ratio > 1.5
    assert leftovers(made.root) == []
    assert not (models.folder / "pwned").exists() and not Path("pwned").exists()


def test_a_phone_without_the_tool_is_told_where_to_get_it(phone, models, monkeypatch):
    made = phone()
    monkeypatch.delenv("UPDP_TF_BENCHMARK_MODEL", raising=False)
    with pytest.raises(DeviceError, match=r"nothing to run files with .*[Dd]ownload benchmark_model from https://stor"):
        benchmark([models.one], device="adb")
    assert leftovers(made.root) == []
    monkeypatch.setenv("UPDP_TF_BENCHMARK_MODEL", "/nowhere/benchmark_model")
    with pytest.raises(DeviceError, match="cannot read the benchmark_model binary '/nowhere/benchmark_model'"):
        benchmark([models.one], device="adb")


def test_no_phone_several_phones_a_wrong_serial(phone, adb, models, stand_in):
    options = DeviceOptions(benchmark_model=stand_in)
    with pytest.raises(DeviceError, match="adb lists no device: connect one"):
        benchmark([models.one], device="adb", options=options)
    first, second = phone(), phone()
    both = rf"(?=.*'adb:{first.serial}' \(device\))(?=.*'adb:{second.serial}' \(device\))"
    with pytest.raises(DeviceError, match=rf"several devices, name one of them: {both}"):
        benchmark([models.one], device="adb", options=options)
    with pytest.raises(DeviceError, match=r"no device '\$\(reboot\)'"):
        benchmark([models.one], device="adb:$(reboot)", options=options)
    opened = [open_device(f"adb:{one.serial}", options) for one in (first, second)]  # both at once
    try:
        for device in opened:
            assert device.run([models.one], threads=1, quota=SHORT)[0].log.n >= 3
        assert len(leftovers(first.root)) == len(leftovers(second.root)) == 1
        opened[0].close()
        assert (len(leftovers(first.root)), len(leftovers(second.root))) == (0, 1)
    finally:
        for device in opened:
            device.close()


def test_a_phone_that_does_not_trust_this_computer(phone, adb, models):
    made = phone(authorised=False)
    assert wait_until(lambda: "unauthorized" in adb("devices"))
    with pytest.raises(DeviceError, match="does not trust this computer: unlock it"):
        benchmark([models.one], device=f"adb:{made.serial}")


def test_the_cable_comes_out_in_the_middle(phone, models, stand_in, tmp_path):
    made = phone()

    def pull(done, total, what):
        if done == 2:
            made.unplug()

    with pytest.raises(DeviceError, match=r"is gone: .*Check cable.*The rows of 2 sittings are in '.*rows.json'"):
        benchmark(
            [models.one, models.three],
            device="adb",
            options=DeviceOptions(benchmark_model=stand_in),
            out=tmp_path / "rows.json",
            progress=pull,
            **BRIEF,
        )
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["sittings"] for row in rows] == [2, 2] and rows[1]["ratio"] > 1
    assert wait_until(lambda: leftovers(made.root) == [])


def test_the_cable_comes_out_while_the_tool_runs(phone, models, tmp_path):
    tool = make_executable(tmp_path / "benchmark_model", "#!/bin/sh\necho started > began\nsleep 60\n")
    made = phone()
    opened = open_device("adb", DeviceOptions(benchmark_model=tool))

    def pull():
        assert wait_until(lambda: list(made.root.glob("*/began")))
        made.unplug()

    puller = threading.Thread(target=pull)
    puller.start()
    with pytest.raises(DeviceError, match="is gone"):
        opened.run([models.one], threads=1, quota=SHORT)
    puller.join()
    opened.close()
    assert wait_until(lambda: leftovers(made.root) == [])


def test_a_full_disk(phone, models, stand_in):
    made = phone()
    made.disk_bytes = models.three.stat().st_size // 2 + stand_in.stat().st_size
    with pytest.raises(DeviceError, match=r"cannot write '/data/.*No space left on device\. Its disk is full: make ro"):
        benchmark([models.three], device="adb", options=DeviceOptions(benchmark_model=stand_in))
    assert leftovers(made.root) == []


def test_a_folder_that_cannot_be_written_to(phone, models, stand_in):
    made = phone()
    made.read_only = True
    with pytest.raises(DeviceError, match="Permission denied. That folder must be writable"):
        benchmark([models.three], device="adb", options=DeviceOptions(benchmark_model=stand_in))
    made.root.rmdir()  # nothing of ours is in it
    with pytest.raises(DeviceError, match="cannot make a folder in '/data/local/tmp'"):
        benchmark([models.three], device="adb", options=DeviceOptions(benchmark_model=stand_in))


def test_a_delegate_that_refuses_the_file_names_the_operator(phone, models, stand_in):
    made = phone()
    with pytest.raises(DeviceError, match=r"GPU delegate runs nothing of .*it refused CONV_2D: OP is supported, but"):
        benchmark([models.one], device="adb", options=DeviceOptions(benchmark_model=stand_in, delegate="gpu"))
    assert leftovers(made.root) == []


def test_a_file_that_computes_something_else_is_not_timed(phone, models, stand_in, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text(stand_in.read_text().replace("interpreter.get_tensor(d", "1.05 * interpreter.get_tensor(d"))
    phone()
    with pytest.raises(DeviceError, match=r"computes something else on 'adb:.*output .* is off by 0\.0.*nothing was t"):
        benchmark([models.one], device="adb", options=DeviceOptions(benchmark_model=wrong))
    old = tmp_path / "old"
    old.write_text(stand_in.read_text().replace(" output_filepath enable", " enable"))
    with pytest.raises(DeviceError, match="does not know --output_filepath"):
        benchmark([models.one], device="adb", options=DeviceOptions(benchmark_model=old))
    assert benchmark(
        [models.one], device="adb", options=DeviceOptions(benchmark_model=old), check_outputs=False, **BRIEF
    )


CLIENT = """
import signal, sys, tflite_export
from pathlib import Path
# A shell that starts the tests in its background has them, and so this process, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
from tflite_export.devices import DeviceOptions
options = DeviceOptions(
    benchmark_model=Path(sys.argv[3]) if sys.argv[3] else None,
    ssh_config=Path(sys.argv[4]) if sys.argv[4] else None,
    python=sys.argv[6],
)
tflite_export.benchmark(
    [sys.argv[2]], device=sys.argv[1], options=options, out=sys.argv[5], min_seconds=60, max_seconds=300,
    progress=lambda done, total, what: print("sitting", done, flush=True),
)
"""


def client(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_client_that_is_killed_leaves_nothing_on_the_phone(phone, models, stand_in, tmp_path, how):
    made = phone()
    process = client(f"adb:{made.serial}", models.one, stand_in, "", tmp_path / "rows.csv", "python3")
    with process, process.stdout:
        lines = iter(process.stdout.readline, "")
        assert next(line for line in lines if line.startswith("sitting 1"))
        assert leftovers(made.root)
        process.send_signal(how)
        process.wait(30)
    assert wait_until(lambda: leftovers(made.root) == [])
    assert "one" in (tmp_path / "rows.csv").read_text()


def test_an_emulator_computes_but_tells_no_times(phone, models, stand_in, tmp_path):
    made = phone()
    getprop = made.path / "getprop"
    make_executable(getprop, getprop.read_text().replace("esac", "  ro.kernel.qemu) echo 1 ;;\nesac"))
    options = DeviceOptions(benchmark_model=stand_in)
    table = benchmark([models.one, models.three], device="adb", options=options, out=tmp_path / "rows.json", **BRIEF)
    for row, record in zip(table.rows, json.loads((tmp_path / "rows.json").read_text()), strict=True):
        assert row.nature == record["nature"] == "emulated" and row.output_difference < 1e-5
        assert math.isnan(row.median_ms) and math.isnan(row.ratio) and not row.noisy
        for name in ("median_ms", "p10_ms", "p90_ms", "ratio", "ratio_low", "ratio_high", "init_ms"):
            assert record[name] is None
    assert "emulated: the outputs are right" in str(table)


def test_a_foreign_processor_in_the_machine_s_own_files_is_emulated(monkeypatch):
    assert not runner.emulated()
    if not any(name in Path("/proc/cpuinfo").read_text() for name in ("GenuineIntel", "AuthenticAMD")):
        pytest.skip("this machine is none of those that emulate")
    monkeypatch.setattr(runner.platform, "machine", lambda: "aarch64")
    assert runner.emulated()


# --- boards ----------------------------------------------------------------------------------------------------------


def test_a_board_uses_its_own_runtime(board, models, ssh_options):
    before = leftovers(Path("/tmp"))
    table = benchmark([models.one, models.int8], device=board.address, options=ssh_options, **BRIEF)
    row = table.rows[1]
    assert row.device.runtime.startswith("ai-edge-litert ") and "Python 3" in row.device.runtime
    assert row.spread == "runs" and row.delegate == "XNNPACK"
    assert row.output_difference == 0 and row.device.system.startswith("Linux ")
    assert leftovers(Path("/tmp")) == before


def test_host_keys_are_verified(board, models):
    for config, advice in (
        (board.wrong_host, "Its key is not the one that is known"),
        (board.unknown_host, "Its key is not known here: connect once"),
        (board.wrong_key, "does not accept your key: install it with ssh-copy-id"),
    ):
        with pytest.raises(DeviceError, match=advice):
            benchmark([models.one], device=board.address, options=DeviceOptions(ssh_config=config))
    assert (board.folder / "known_unknown_host").read_text() == ""  # nothing was trusted on first sight


def test_a_board_without_a_runtime(board, models, ssh_options):
    options = DeviceOptions(ssh_config=board.good, python=str(board.bare / "python3"))
    with pytest.raises(DeviceError, match=r"nothing to run files with .*pip install ai-edge-litert' on it, or downl"):
        benchmark([models.one], device=board.address, options=options)
    alone = make_executable(board.folder / "python alone", f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    with pytest.raises(DeviceError, match="numpy|none of the runtimes"):
        benchmark([models.one], device=board.address, options=DeviceOptions(ssh_config=board.good, python=str(alone)))


def test_a_board_with_a_full_disk(board, models, ssh_options):
    """A second sshd, whose /tmp is a disk of its own without room for a model; the folders in it are the real ones."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    port = free_port()
    config, client_config = board.folder / "sshd_config_full", board.folder / "config_full"
    config.write_text((board.folder / "sshd_config").read_text().replace(str(board.port), str(port)))
    (board.folder / "known_full").write_text(f"[127.0.0.1]:{port} {(board.folder / 'host.pub').read_text()}")
    client_config.write_text(board.good.read_text().replace("known_good", "known_full"))
    size = models.three.stat().st_size // 2 // 4096 * 4096 + 20_480  # the runner fits, the model does not
    real = Path(tempfile.mkdtemp(dir="/run"))
    script = (
        f"mount --bind /tmp {real} && mount -t tmpfs -o size={size} tmpfs /tmp && for folder in {real}/*/; do "
        'name=$(basename "$folder"); mkdir "/tmp/$name" && mount --bind "$folder" "/tmp/$name"; done; '
        'exec "$0" -D -e -f "$1"'
    )
    server = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
    with (board.folder / "log_full").open("w") as log:
        process = subprocess.Popen(["unshare", "-m", "sh", "-c", script, server, config], stdout=log, stderr=log)
        try:
            with socket.socket() as probe:
                assert wait_until(lambda: probe.connect_ex(("127.0.0.1", port)) == 0)
            address = board.address.replace(str(board.port), str(port))
            options = replace(ssh_options, ssh_config=client_config)
            expected = r"cannot write '/tmp/.*No space left on device\. Its disk is full: make room"
            with pytest.raises(DeviceError, match=expected):
                benchmark([models.three], device=address, options=options)
        finally:
            process.terminate()
            process.wait(10)
            real.rmdir()


def test_a_killed_client_leaves_no_sockets_here(board, models, tmp_path):
    """SIGKILL leaves nobody to remove the folder: the next client does."""
    process = client(board.address, models.one, "", board.good, tmp_path / "rows.csv", board.python)
    folders = Path(tempfile.gettempdir())
    assert wait_until(lambda: list(folders.glob(f"updp-tf-ssh-{process.pid}-*")), seconds=120)
    process.kill()
    process.communicate()
    assert list(folders.glob(f"updp-tf-ssh-{process.pid}-*"))
    alive = SshTransport("user@host")
    other = SshTransport("user@host")
    assert not list(folders.glob(f"updp-tf-ssh-{process.pid}-*"))
    assert Path(alive._sockets).is_dir() and Path(other._sockets).is_dir()  # those of living processes stay
    alive.close()
    other.close()
    assert not Path(alive._sockets).exists()


def test_a_board_that_is_not_there(models):
    with pytest.raises(DeviceError, match="Connection refused.*Check that it is on"):
        benchmark([models.one], device="ssh:nobody@127.0.0.1:1")
    for address in ("", "-oProxyCommand=touch pwned", "me@-oX", "me@host:port", "me@host name", "a@b;touch pwned"):
        with pytest.raises(DeviceError, match="is no address"):
            benchmark([models.one], device=f"ssh:{address}")
    with pytest.raises(DeviceError, match="Passwords are never taken here"):
        benchmark([models.one], device="ssh:me:secret@host")


@pytest.mark.slow
def test_a_client_that_is_killed_leaves_nothing_on_the_board(board, models, tmp_path):
    before = set(leftovers(Path("/tmp")))
    process = client(board.address, models.one, "", board.good, tmp_path / "rows.csv", board.python)
    with process, process.stdout:
        lines = iter(process.stdout.readline, "")
        assert next(line for line in lines if line.startswith("sitting 1"))
        ours = set(leftovers(Path("/tmp"))) - before
        assert ours
        process.kill()
        process.wait(30)
    on_board = {name for name in ours if (Path("/tmp") / name / "runner.py").exists()}
    assert wait_until(lambda: not on_board & set(leftovers(Path("/tmp"))))


# --- the others ------------------------------------------------------------------------------------------------------


def test_an_edge_tpu_that_is_not_there(models):
    with pytest.raises(DeviceError, match=r"no 'libedgetpu.so.1' on this machine .*install Coral's runtime"):
        benchmark([models.int8], device="edgetpu")
    with pytest.raises(DeviceError, match="takes no address"):
        benchmark([models.int8], device="edgetpu:0")


def test_an_estimate_says_so_and_refuses_floats(models):
    table = benchmark([models.int8], device="ethos-u55-256")
    assert table.rows[0].nature == "estimate" and "estimate" in str(table)
    assert table.rows[0].device.runtime.startswith("estimate by ethos-u-vela ")
    with pytest.raises(DeviceError, match="all its .* operators stay on the CPU"):
        benchmark([models.one], device="ethos-u55-256")
    with pytest.raises(DeviceError, match="no device 'ethos-u55-7'"):
        benchmark([models.int8], device="ethos-u55-7")


def test_logs_of_another_machine(shared_data, models, tmp_path):
    folder = shared_data / "device" / "benchmark_model"
    table = benchmark([], device=f"file:{folder}")
    rows = {row.name: row for row in table.rows}
    assert rows["imx8_mobilenet-CPU"].median_ms == pytest.approx(162.98)
    assert rows["imx8_mobilenet-NPU"].median_ms == pytest.approx(2.52559)
    assert (rows["imx8_mobilenet-CPU"].size_bytes, rows["imx8_mobilenet-CPU"].sha256) == (4276350, "")
    assert rows["qemu_riscv64_mobilenet_v1_float"].threads == 4 and "1/4 threads" in str(table)
    ratio = table.ratio("imx8_mobilenet-NPU", "imx8_mobilenet-CPU")
    assert ratio.value == pytest.approx(2.52559 / 162.98) and math.isnan(ratio.low)
    for kind in ("CPU", "GPU", "NPU"):  # of one file on three processors: three rows, not three sittings
        (tmp_path / f"{kind}.log").write_text((folder / f"imx8_mobilenet-{kind}.log").read_text())
    three = benchmark([], device=f"file:{tmp_path}")
    assert [row.name for row in three.rows] == ["CPU", "GPU", "NPU"]
    assert all(row.sittings == 1 and math.isnan(row.ratio_low) for row in three.rows)
    log = folder / "imx8_mobilenet-CPU.log"
    with pytest.raises(DeviceError, match=r"no log in .* is of 'three.tflite'; there are logs of 'mobilenet_v1_1.0_22"):
        benchmark([models.three], device=f"file:{log}")
    other = tmp_path / "mobilenet_v1_1.0_224_quant.tflite"
    other.write_bytes(models.three.read_bytes())
    with pytest.raises(DeviceError, match="is of a file of 4.27635 MB, but this one has"):
        benchmark([other], device=f"file:{log}")
    with pytest.raises(DeviceError, match="no log 'nowhere'"):
        benchmark([other], device="file:nowhere")
    (tmp_path / "a.log").write_text("hello")
    with pytest.raises(DeviceError, match="'.*a.log' is no log of benchmark_model"):
        benchmark([other], device=f"file:{tmp_path / 'a.log'}")


def test_options_that_do_not_go_together(models, board, ssh_options):
    with pytest.raises(OptionError, match="no delegate 'npu': choose one of cpu, gpu, nnapi, edgetpu"):
        DeviceOptions(delegate="npu")
    with pytest.raises(OptionError, match="'local' runs on the CPU"):
        benchmark([models.one], options=DeviceOptions(delegate="gpu"))
    with pytest.raises(OptionError, match="delegate 'nnapi' on .* needs the vendor's tool"):
        benchmark([models.one], device=board.address, options=replace(ssh_options, delegate="nnapi"))
    with pytest.raises(DeviceError, match="cannot load the delegate 'libedgetpu.so.1'"):
        benchmark([models.one], device=board.address, options=replace(ssh_options, delegate="edgetpu"))
