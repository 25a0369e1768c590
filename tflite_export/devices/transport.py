"""Ways to a machine: run a shell script there, send a file, get a file. By adb, by ssh, or on this machine.

A command line of ours is a list of arguments and never passes through a shell here; what the shell over there reads is
quoted by whoever writes the script.
"""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tflite_export.errors import DeviceError

_CONNECT_S = 20
_END = "updp-tf-status-"
_PUSH_S_PER_MB = 2  # 0.5 MB/s, slower than any cable


@dataclass(frozen=True)
class Completed:
    """What a script did: its exit status, standard output and standard error."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """Its last lines that say something, as one line."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return " | ".join(lines[-3:]) or f"exit status {self.status}"


class Transport(Protocol):
    """A way to one machine."""

    @property
    def name(self) -> str:
        """Name of the device, as `open_device` takes it."""

    @property
    def folder(self) -> str:
        """Where files may be put there."""

    @property
    def system(self) -> str:
        """Operating system: android or linux."""

    def command(self, script: str) -> list[str]:
        """Return our command line that has the machine's shell run a script."""

    def send(self, source: Path, target: str) -> None:
        """Copy a file to the machine.

        Raises:
            DeviceError: it cannot be written there, or the machine is gone.
        """

    def get(self, source: str, target: Path) -> None:
        """Copy a file from the machine.

        Raises:
            DeviceError: it cannot be read there, or the machine is gone.
        """

    def loss(self, done: Completed) -> str | None:
        """Return why the machine cannot be reached any more after a command failed; None where it can."""

    def close(self) -> None:
        """Let go of the connection."""


def execute(transport: Transport, script: str, *, timeout_s: float = _CONNECT_S) -> Completed:
    """Run a script over there.

    Its exit status travels in its output: `adb shell` ends with 0 when the cable comes out in the middle.

    Raises:
        DeviceError: the machine is gone or does not answer in time.
    """
    whole = f"(\n{script}\n)\nstatus=$?; echo; echo {_END}$status"
    done = call(transport.command(whole), name=transport.name, timeout_s=timeout_s)
    out, end, status = done.out.rpartition(f"\n{_END}")
    if not end or not status.strip().isdigit():
        check_reachable(transport, done)
        raise DeviceError(f"'{transport.name}' is gone: its answer breaks off. Check cable, sleep and power.")
    return Completed(int(status), out, done.err)


def check_reachable(transport: Transport, done: Completed) -> None:
    """Raise a DeviceError if a command failed because the machine is gone."""
    if why := transport.loss(done):
        raise DeviceError(f"'{transport.name}' is gone: {why}")


def call(command: list[str], *, name: str, timeout_s: float, stdin: Path | None = None) -> Completed:
    """Run a program of this machine that talks to a device.

    Raises:
        DeviceError: it takes too long, or is not there.
    """
    try:
        with open(stdin or os.devnull, "rb") as source:
            done = subprocess.run(command, stdin=source, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(
            f"'{name}' did not answer for {timeout_s:.0f} s: check that it is awake and connected."
        ) from error
    except FileNotFoundError as error:
        raise DeviceError(f"cannot reach '{name}': the program '{command[0]}' is not installed.") from error
    return Completed(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


def _transfer_s(path: Path) -> float:
    return _CONNECT_S + _PUSH_S_PER_MB * path.stat().st_size / 1e6


def not_written(name: str, target: str, size_bytes: int, complaint: str) -> DeviceError:
    """Return the error of a copy that failed on the device."""
    advice = ""
    if "No space left" in complaint:
        advice = f" Its disk is full: make room for {size_bytes / 1e6:.1f} MB and more."
    elif "ermission denied" in complaint or "Read-only" in complaint:
        advice = " That folder must be writable for this user."
    return DeviceError(f"cannot write '{target}' on '{name}': {complaint.rstrip('.')}.{advice}")


# --- adb -------------------------------------------------------------------------------------------------------------


class AdbTransport:
    """A phone or board that the Android Debug Bridge reaches, by cable or network."""

    folder = "/data/local/tmp"
    system = "android"

    def __init__(self, serial: str) -> None:
        """Find the device.

        Args:
            serial: as `adb devices` prints it; empty for the only one that is there.

        Raises:
            DeviceError: adb is not installed; there is no such device, or none, or several; or it is not authorised.
        """
        self._adb = _find_adb()
        self.serial = self._choose(serial)
        self.name = f"adb:{self.serial}"

    def _choose(self, serial: str) -> str:
        done = call([self._adb, "devices"], name="adb", timeout_s=_CONNECT_S)
        if done.status:
            raise DeviceError(f"adb does not work: {done.complaint}.")
        rows = [line.split("\t") for line in done.out.splitlines() if "\t" in line]
        state_by_serial = {row[0]: row[1].strip() for row in rows}
        listed = ", ".join(f"'adb:{name}' ({state})" for name, state in state_by_serial.items()) or "none"
        if serial and serial not in state_by_serial:
            raise DeviceError(f"adb knows no device '{serial}'; it lists: {listed}.")
        if not state_by_serial:
            raise DeviceError(
                "adb lists no device: connect one by cable and switch on 'USB debugging' in its developer options, "
                "or run 'adb connect HOST'."
            )
        usable = [name for name, state in state_by_serial.items() if state == "device"]
        if not serial and len(usable) > 1:
            raise DeviceError(f"adb lists several devices, name one of them: {listed}.")
        chosen = serial or (usable or list(state_by_serial))[0]
        state = state_by_serial[chosen]
        if state == "unauthorized":
            raise DeviceError(
                f"'adb:{chosen}' does not trust this computer: unlock it and accept its question about USB debugging."
            )
        if state != "device":
            raise DeviceError(
                f"'adb:{chosen}' cannot be used, adb says '{state}': wake it up, or take the cable out and put it in."
            )
        return chosen

    def command(self, script: str) -> list[str]:
        """Return the command line for a script; see `Transport`."""
        return [self._adb, "-s", self.serial, "shell", script]

    def send(self, source: Path, target: str) -> None:
        """Copy a file to the device; see `Transport`."""
        command = [self._adb, "-s", self.serial, "push", str(source), target]
        done = call(command, name=self.name, timeout_s=_transfer_s(source))
        if done.status:
            check_reachable(self, done)
            # Behind the error comes a line about what was pushed.
            errors = [line for line in (done.err + done.out).splitlines() if "error:" in line]
            raise not_written(self.name, target, source.stat().st_size, errors[0] if errors else done.complaint)

    def get(self, source: str, target: Path) -> None:
        """Copy a file from the device; see `Transport`."""
        command = [self._adb, "-s", self.serial, "pull", source, str(target)]
        done = call(command, name=self.name, timeout_s=120)
        if done.status:
            check_reachable(self, done)
            raise DeviceError(f"cannot read '{source}' on '{self.name}': {done.complaint}.")

    def loss(self, done: Completed) -> str | None:
        """Return why the device is gone; see `Transport`."""
        state = call([self._adb, "-s", self.serial, "get-state"], name=self.name, timeout_s=_CONNECT_S)
        if state.status == 0 and state.out.strip() == "device":
            return None
        return f"{state.complaint.rstrip('.')}. Check cable, sleep and power, then start again."

    def close(self) -> None:
        """Leave the adb server as it is: others may use it."""


def _find_adb() -> str:
    roots = [os.environ[name] for name in ("ANDROID_HOME", "ANDROID_SDK_ROOT") if os.environ.get(name)]
    found = shutil.which("adb") or next(
        filter(None, (shutil.which("adb", path=f"{r}/platform-tools") for r in roots)), None
    )
    if found is None:
        raise DeviceError(
            "adb is not installed: take it from Android's platform tools "
            "(https://developer.android.com/tools/releases/platform-tools) or your distribution's package 'adb'."
        )
    return found


# --- ssh -------------------------------------------------------------------------------------------------------------

_ADDRESS = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.\-]*)@)?"
    r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.\-]*|\[[0-9A-Fa-f:.%A-Za-z]+\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_SOCKETS = "updp-tf-ssh-"  # then the process's id: a killed one cannot remove its folder
_LOST = 255  # what the ssh client ends with where it is to blame itself


class SshTransport:
    """A Linux board that ssh reaches. Keys only: nothing here ever asks for or passes on a password."""

    system = "linux"

    def __init__(self, address: str, *, config: Path | None = None) -> None:
        """Read the address; nothing is connected yet.

        Args:
            address: `[user@]host[:port]`, or a name from the ssh configuration.
            config: configuration file in place of the user's own.

        Raises:
            DeviceError: the address cannot be one.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None:
            password = " Passwords are never taken here: set up a key with ssh-copy-id." if "@" in address else ""
            raise DeviceError(f"'ssh:{address}' is no address: write ssh:user@host or ssh:user@host:port.{password}")
        self.name = f"ssh:{address}"
        self.folder = "/tmp"
        self._host = match["host"].strip("[]")
        # The first connection carries the others, so that a board does one key exchange and not fifty.
        _remove_abandoned_sockets()
        self._sockets = tempfile.mkdtemp(prefix=f"{_SOCKETS}{os.getpid()}-")
        self._options = [
            *(["-F", str(config)] if config is not None else []),
            *(["-p", match["port"]] if match["port"] else []),
            *(["-l", match["user"]] if match["user"] else []),
            *("-T", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "LogLevel=ERROR"),
            *("-o", f"ConnectTimeout={_CONNECT_S}", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
            *("-o", f"ControlPath={self._sockets}/master", "-o", "ControlMaster=auto", "-o", "ControlPersist=no"),
        ]

    def command(self, script: str) -> list[str]:
        """Return the command line for a script; see `Transport`."""
        return ["ssh", *self._options, "--", self._host, f"exec sh -c {shlex.quote(script)}"]

    def send(self, source: Path, target: str) -> None:
        """Copy a file to the board; see `Transport`. Not by scp, whose remote paths pass through a shell or not."""
        script = f"cat > {shlex.quote(target)}"
        done = call(self.command(script), name=self.name, timeout_s=_transfer_s(source), stdin=source)
        if done.status:
            check_reachable(self, done)
            raise not_written(self.name, target, source.stat().st_size, done.complaint)

    def get(self, source: str, target: Path) -> None:
        """Copy a file from the board; see `Transport`."""
        with target.open("wb") as file:
            command = self.command(f"cat {shlex.quote(source)}")
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE, timeout=120, check=False
            )
        if done.returncode:
            said = Completed(done.returncode, "", done.stderr.decode("utf-8", "replace"))
            check_reachable(self, said)
            raise DeviceError(f"cannot read '{source}' on '{self.name}': {said.complaint}.")

    def loss(self, done: Completed) -> str | None:
        """Return why the board is gone; see `Transport`."""
        return f"{done.complaint.rstrip('.')}.{_ssh_advice(done.err, self._host)}" if done.status == _LOST else None

    def close(self) -> None:
        """Remove the socket that connections share."""
        shutil.rmtree(self._sockets, ignore_errors=True)


def _remove_abandoned_sockets() -> None:
    """Remove the folders of this user's processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SOCKETS}*-*"):
        owner = folder.name.removeprefix(_SOCKETS).partition("-")[0]
        try:
            if folder.stat().st_uid == os.getuid() and owner.isdecimal() and not _is_running(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # another process was quicker
            continue


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _ssh_advice(complaint: str, host: str) -> str:
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in complaint:
        return f" Its key is not the one that is known: find out why before you run 'ssh-keygen -R {host}'."
    if "Host key verification failed" in complaint or "host key is known" in complaint:
        return f" Its key is not known here: connect once with 'ssh {host}' and compare the fingerprint."
    if "Permission denied" in complaint:
        return " It does not accept your key: install it with ssh-copy-id, or load it with ssh-add."
    if "Connection refused" in complaint or "timed out" in complaint or "No route" in complaint:
        return " Check that it is on, that sshd runs there, and the port."
    if "resolve" in complaint:
        return " Check the name."
    return " Check power and network, then start again."


# --- this machine ----------------------------------------------------------------------------------------------------


class HostTransport:
    """This machine, but in processes of their own: a delegate's library may bring its process down."""

    system = "linux"

    def __init__(self, name: str) -> None:
        """Give the device its name."""
        self.name = name
        self.folder = tempfile.gettempdir()

    def command(self, script: str) -> list[str]:
        """Return the command line for a script; see `Transport`."""
        return ["sh", "-c", script]

    def send(self, source: Path, target: str) -> None:
        """Copy a file; see `Transport`."""
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise not_written(self.name, target, source.stat().st_size, error.strerror or str(error)) from error

    def get(self, source: str, target: Path) -> None:
        """Copy a file back; see `Transport`."""
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise DeviceError(f"cannot read '{source}': {error.strerror or error}.") from error

    def loss(self, done: Completed) -> str | None:
        """Return None: it cannot be gone."""
        return None

    def close(self) -> None:
        """There is nothing to let go of."""
