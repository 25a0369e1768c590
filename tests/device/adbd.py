"""The phone's end of the Android Debug Bridge, for tests with the real client: Debian has the client only.

Speaks the wire protocol over TCP: CNXN, AUTH (refusing), OPEN, WRTE, OKAY, CLSE; the services `shell,v2` with separate
streams, standard input and exit status, and `sync:` with STAT, SEND, RECV, QUIT. Shells are real shells of this
machine in a process group of their own; they see a PATH of the test's choosing, and `/data/local/tmp` is a folder of
the test. When the connection ends they get SIGHUP and the end of their input, as on a phone.
Source: the protocol descriptions in AOSP (`protocol.txt`, `SYNC.TXT`, `shell_protocol.h`).
"""

import os
import queue
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path

MAX_DATA = 64 * 1024
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
FOLDER = "/data/local/tmp"


def _command(name: bytes) -> int:
    return int.from_bytes(name, "little")


CNXN, AUTH, OPEN, OKAY, WRTE, CLSE = map(_command, (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"WRTE", b"CLSE"))


class Adbd:
    """One phone, listening on the loopback address."""

    def __init__(self, root: Path, path: Path, *, authorised: bool = True) -> None:
        self.root, self.path, self.authorised = root, path, authorised
        self.disk_bytes: int | None = None  # what fits on its disk; None: all
        self.read_only = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.serial = f"127.0.0.1:{self.port}"
        self._connections: list[Connection] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            connection = Connection(self, sock)
            self._connections.append(connection)
            threading.Thread(target=connection.serve, daemon=True).start()

    def unplug(self) -> None:
        """Pull the cable; it may be out already."""
        if self._server.fileno() < 0:
            return
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in self._connections:
            connection.close()

    def used_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())


class Connection:
    def __init__(self, phone: Adbd, sock: socket.socket) -> None:
        self.phone, self.sock = phone, sock
        self.lock = threading.Lock()
        self.streams: dict[int, Shell | Sync] = {}
        self.last_id = 0

    def send(self, command: int, arg0: int, arg1: int, data: bytes = b"") -> None:
        header = struct.pack("<6I", command, arg0, arg1, len(data), sum(data) & 0xFFFFFFFF, command ^ 0xFFFFFFFF)
        with self.lock:
            try:
                self.sock.sendall(header + data)
            except OSError:
                pass

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                raise ConnectionError
            data += part
        return data

    def serve(self) -> None:
        try:
            while True:
                command, arg0, arg1, length, _, _ = struct.unpack("<6I", self._receive(24))
                self._answer(command, arg0, arg1, self._receive(length))
        except (ConnectionError, OSError):
            self.close()

    def _answer(self, command: int, arg0: int, arg1: int, data: bytes) -> None:
        if command in (CNXN, AUTH) and not self.phone.authorised:
            if command == CNXN or arg0 == 2:  # a signature that it does not know
                self.send(AUTH, 1, 0, os.urandom(20))
        elif command == CNXN:
            banner = b"device::ro.product.name=test;ro.product.model=Test;ro.product.device=test;features=shell_v2,cmd"
            self.send(CNXN, 0x01000000, MAX_DATA, banner)
        elif command == OPEN:
            self.last_id += 1
            stream = self._open(data.rstrip(b"\0").decode(), self.last_id, arg0)
            if stream is None:
                self.send(CLSE, 0, arg0)
            else:
                self.streams[self.last_id] = stream
                self.send(OKAY, self.last_id, arg0)
                stream.start()
        elif command == WRTE and arg1 in self.streams:
            self.send(OKAY, arg1, arg0)
            self.streams[arg1].receive(data)
        elif command == OKAY and arg1 in self.streams:
            self.streams[arg1].ready.release()
        elif command == CLSE and arg1 in self.streams:
            self.streams.pop(arg1).hang_up()

    def _open(self, service: str, own: int, other: int) -> "Shell | Sync | None":
        name, _, rest = service.partition(":")
        if name.startswith("shell"):
            return Shell(self, own, other, rest)
        return Sync(self, own, other) if name == "sync" else None

    def close(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.sock.close()
        for stream in list(self.streams.values()):
            stream.hang_up()
        self.streams.clear()


class Stream:
    def __init__(self, connection: Connection, own: int, other: int) -> None:
        self.connection, self.own, self.other = connection, own, other
        self.ready = threading.Semaphore(1)  # one write may be under way
        self.write_lock = threading.Lock()

    def write(self, data: bytes) -> None:
        with self.write_lock:
            for start in range(0, len(data), MAX_DATA):
                self.ready.acquire(timeout=60)
                self.connection.send(WRTE, self.own, self.other, data[start : start + MAX_DATA])

    def end(self) -> None:
        self.ready.acquire(timeout=60)
        self.connection.send(CLSE, self.own, self.other)


class Shell(Stream):
    def __init__(self, connection: Connection, own: int, other: int, script: str) -> None:
        super().__init__(connection, own, other)
        phone = connection.phone
        self.rest = b""
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", script.replace(FOLDER, str(phone.root))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": str(phone.path), "HOME": "/"},
            start_new_session=True,
        )

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        pumps = [
            threading.Thread(target=self._pump, args=(number, pipe), daemon=True)
            for number, pipe in ((STDOUT, self.process.stdout), (STDERR, self.process.stderr))
        ]
        for pump in pumps:
            pump.start()
        status = self.process.wait()
        for pump in pumps:
            pump.join()
        code = status if status >= 0 else 128 - status
        self.write(struct.pack("<BI", EXIT, 1) + bytes([code]))
        self.end()
        self._close_input()

    def _pump(self, number: int, pipe) -> None:
        with pipe:
            while data := pipe.read1(MAX_DATA - 5):
                self.write(struct.pack("<BI", number, len(data)) + data)

    def receive(self, data: bytes) -> None:
        self.rest += data
        while len(self.rest) >= 5:
            number, length = struct.unpack("<BI", self.rest[:5])
            if len(self.rest) < 5 + length:
                return
            content, self.rest = self.rest[5 : 5 + length], self.rest[5 + length :]
            if number == STDIN:
                self.process.stdin.write(content)
                self.process.stdin.flush()
            elif number == CLOSE_STDIN:
                self._close_input()

    def _close_input(self) -> None:
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass

    def hang_up(self) -> None:
        self._close_input()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGHUP)
        self.ready.release()


class Sync(Stream):
    def __init__(self, connection: Connection, own: int, other: int) -> None:
        super().__init__(connection, own, other)
        self.parts: queue.Queue[bytes | None] = queue.Queue()
        self.rest = b""

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def receive(self, data: bytes) -> None:
        self.parts.put(data)

    def hang_up(self) -> None:
        self.parts.put(None)
        self.ready.release()

    def _read(self, size: int) -> bytes:
        while len(self.rest) < size:
            part = self.parts.get()
            if part is None:
                raise ConnectionError
            self.rest += part
        data, self.rest = self.rest[:size], self.rest[size:]
        return data

    def _run(self) -> None:
        try:
            while True:
                name, length = struct.unpack("<4sI", self._read(8))
                argument = self._read(length).decode()
                if name == b"QUIT":
                    self.end()
                    return
                {b"STAT": self._stat, b"SEND": self._send, b"RECV": self._recv}[name](argument)
        except ConnectionError:
            pass

    def _path(self, name: str) -> Path:
        return Path(name.replace(FOLDER, str(self.connection.phone.root)))

    def _stat(self, name: str) -> None:
        path = self._path(name)
        found = path.stat() if path.exists() else None
        numbers = (found.st_mode, found.st_size & 0xFFFFFFFF, int(found.st_mtime)) if found else (0, 0, 0)
        self.write(b"STAT" + struct.pack("<3I", *numbers))

    def _fail(self, message: str) -> None:
        self.write(b"FAIL" + struct.pack("<I", len(message)) + message.encode())

    def _send(self, argument: str) -> None:
        phone, path, content, complaint = self.connection.phone, self._path(argument.rpartition(",")[0]), b"", ""
        if phone.read_only:
            complaint = "couldn't create file: Permission denied"
        while True:
            name, length = struct.unpack("<4sI", self._read(8))
            if name == b"DONE":
                break
            content += self._read(length)
        if phone.disk_bytes is not None and phone.used_bytes() + len(content) > phone.disk_bytes:
            content, complaint = content[: max(0, phone.disk_bytes - phone.used_bytes())], "No space left on device"
        try:
            if not phone.read_only:
                path.write_bytes(content)
        except OSError as error:
            complaint = f"couldn't create file: {error.strerror}"
        if complaint:
            self._fail(complaint)
        else:
            self.write(b"OKAY" + struct.pack("<I", 0))

    def _recv(self, name: str) -> None:
        try:
            content = self._path(name).read_bytes()
        except OSError as error:
            self._fail(f"open failed: {error.strerror}")
            return
        for start in range(0, len(content), MAX_DATA - 8):
            part = content[start : start + MAX_DATA - 8]
            self.write(b"DATA" + struct.pack("<I", len(part)) + part)
        self.write(b"DONE" + struct.pack("<I", 0))
