"""Devices made of real parts: the real adb client against `adbd.py`, a real sshd on the loopback address."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.device.adbd import Adbd
from tests.networks import conv_network
from tflite_export.devices import DeviceOptions

TOOLS = "sh cat uname grep cut mkdir rm find chmod head tr taskset true sleep".split()
STAND_IN = Path(__file__).with_name("benchmark_model.py")

GETPROP = """#!/bin/sh
case "$1" in
  ro.product.manufacturer) echo Acme ;;
  ro.product.model) echo Phone 7 ;;
  ro.soc.model) echo SM1234 ;;
  ro.build.version.release) echo 14 ;;
esac
"""
DUMPSYS = "#!/bin/sh\necho 'IsStatusOverride: false'\necho 'Thermal Status: 0'\n"


def make_executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def toolbox(folder: Path, *, python: bool, android: bool = True) -> Path:
    """A PATH with few programs, as a phone has; `python3` has a runtime where there is one."""
    folder.mkdir()
    for name in TOOLS:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    if android:
        make_executable(folder / "getprop", GETPROP)
        make_executable(folder / "dumpsys", DUMPSYS)
    if python:
        make_executable(folder / "python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_until(condition, *, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> SimpleNamespace:
    """`one` and `three`: one convolution and three; `int8`: three in int8. Names that shells would stumble on."""
    folder = tmp_path_factory.mktemp("models") / "it's a $(touch pwned); folder"
    folder.mkdir()
    made = SimpleNamespace(
        one=folder / "one `x` & co.tflite", three=folder / "three.tflite", int8=folder / "int8.tflite"
    )
    made.one.write_bytes(conv_network(1))
    made.three.write_bytes(conv_network(3))
    made.int8.write_bytes(conv_network(3, dtype="int8"))
    made.folder = folder
    return made


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> Path:
    """A `benchmark_model` for this machine."""
    return make_executable(
        tmp_path_factory.mktemp("tool") / "benchmark model",
        f"#!{sys.executable}\n" + STAND_IN.read_text(),
    )


# --- adb -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def adb(tmp_path_factory):
    """The real client with a server of its own, which ends with the tests."""
    program = shutil.which("adb")
    if program is None:
        pytest.skip("needs the adb client (Debian and Ubuntu: apt-get install adb)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # keys are made there
        patch.delenv("ANDROID_SERIAL", raising=False)

        def run(*arguments: str) -> str:
            done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
            return done.stdout + done.stderr

        run("start-server")
        yield run
        run("kill-server")


@pytest.fixture
def phone(adb, tmp_path):
    """Make phones that are connected until the test ends."""
    phones = []

    def connect(*, python: bool = False, authorised: bool = True) -> Adbd:
        folder = tmp_path / f"phone{len(phones)}"
        (folder / "tmp").mkdir(parents=True)
        made = Adbd(folder / "tmp", toolbox(folder / "bin", python=python), authorised=authorised)
        phones.append(made)
        said = adb("connect", made.serial)
        assert "connected to" in said or not authorised, said
        assert wait_until(lambda: made.serial in adb("devices"))
        return made

    yield connect
    for made in phones:
        adb("disconnect", made.serial)
        made.unplug()


# --- ssh -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def board(tmp_path_factory):
    """A real sshd on the loopback address with keys of its own, and the client's configurations for it."""
    server = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
    if server is None or shutil.which("ssh") is None:
        pytest.skip("needs ssh and sshd (Debian and Ubuntu: apt-get install openssh-client openssh-server)")
    folder = tmp_path_factory.mktemp("ssh")
    folder.chmod(0o700)
    for name in ("host", "other_host", "user", "other_user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    bare, equipped = (
        toolbox(folder / "bare", python=False, android=False),
        toolbox(folder / "equipped", python=True, android=False),
    )
    port = free_port()
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized_keys\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\n"
        f"PermitRootLogin prohibit-password\nMaxSessions 20\nSetEnv PATH={equipped}\n"
        f"Match LocalPort {port}\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, for its separated half
    log = (folder / "log").open("w")
    process = subprocess.Popen([server, "-D", "-e", "-f", folder / "sshd_config"], stderr=log, stdout=log)

    def config(name: str, *, key: str = "user", host_key: str = "host") -> Path:
        public = (folder / f"{host_key}.pub").read_text()
        (folder / f"known_{name}").write_text(f"[127.0.0.1]:{port} {public}" if host_key != "none" else "")
        path = folder / f"config_{name}"
        path.write_text(
            f"Host *\n  IdentityFile {folder}/{key}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {folder}/known_{name}\n  GlobalKnownHostsFile /dev/null\n"
        )
        return path

    (folder / "none.pub").write_text("")
    made = SimpleNamespace(
        address=f"ssh:{getpass.getuser()}@127.0.0.1:{port}",
        port=port,
        good=config("good"),
        wrong_key=config("wrong_key", key="other_user"),
        wrong_host=config("wrong_host", host_key="other_host"),
        unknown_host=config("unknown_host", host_key="none"),
        bare=bare,
        python=str(equipped / "python3"),
        folder=folder,
    )

    def answers() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    if not wait_until(answers, seconds=10):
        process.terminate()
        process.wait()
        log.close()
        pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()[-300:]}")
    yield made
    process.terminate()
    process.wait(10)
    log.close()


@pytest.fixture
def ssh_options(board):
    """The board's good side. Python is named: a user's start-up files may put another one first."""
    return DeviceOptions(ssh_config=board.good, python=board.python)


def leftovers(folder: Path) -> list[str]:
    """What devices left in a folder."""
    return sorted(path.name for path in folder.glob("updp-tf-*"))
