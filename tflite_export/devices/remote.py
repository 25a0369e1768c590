"""A device behind a transport: a folder there that never outlives us, what runs the files, and what it told.

A guard keeps the folder: a shell over there that makes it, waits for its standard input to end, and removes it. Input
ends when we close it, when this process is killed, and when the connection breaks; so nothing is left in any case but
a reboot, and folders older than a day are swept by the next guard.
"""

import hashlib
import json
import logging
import math
import secrets
import selectors
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tflite_export.benchmark_model import (
    BenchmarkLog,
    find_benchmark_model,
    missing_tool_advice,
    parse_benchmark_log,
)
from tflite_export.devices import runner, thermal
from tflite_export.devices.device import Answer, Delegate, DeviceInfo, DeviceOptions, Nature, Quota, Timing
from tflite_export.devices.transport import Completed, Transport, check_reachable, execute
from tflite_export.errors import DeviceError, OptionError
from tflite_export.flatbuffer import TfliteModel, read_bytes, read_flatbuffer

EDGETPU_LIBRARY = "libedgetpu.so.1"

_READY = "updp-tf-ready"
_GUARD_S = 30
_LOADING_S = 120  # beside the running itself: start, load, delegates that compile

_GUARD = """
umask 077
find {base} -maxdepth 1 -name 'updp-tf-*' -mtime +0 -exec rm -rf {{}} + 2>/dev/null
mkdir {folder} || exit 3
trap '{{ read p < {folder}/pid && kill -9 "$p"; }} 2>/dev/null; rm -rf {folder}' EXIT
trap 'exit 4' HUP INT TERM PIPE
echo {ready}
cat > /dev/null
"""

# What a command leaves behind when its connection breaks is ended by the guard.
_RUN = """
cd {folder} || exit 5
{command} < /dev/null &
echo $! > pid
wait $!
status=$?
rm -f pid
exit $status
"""

_STATE = r"""
echo "machine=$(uname -m)"
echo "kernel=$(uname -s)"
echo "load=$(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null)"
echo "processors=$(grep -c '^processor' /proc/cpuinfo 2>/dev/null)"
echo "cpu=$(grep -m 1 -E '^(model name|Hardware|Model)' /proc/cpuinfo 2>/dev/null | cut -d : -f 2-)"
echo "board=$(cat /proc/device-tree/model 2>/dev/null | tr -d '\000')"
for f in /sys/devices/system/cpu/cpu[0-9]*; do
  [ -r "$f/cpufreq/scaling_governor" ] && echo "governor=$(cat "$f/cpufreq/scaling_governor" 2>/dev/null)"
  [ -r "$f/cpufreq/cpuinfo_max_freq" ] && echo "frequency=${f##*cpu} $(cat "$f/cpufreq/cpuinfo_max_freq" 2>/dev/null)"
done
for z in /sys/class/thermal/thermal_zone*; do
  [ -r "$z/temp" ] && echo "zone=$(cat "$z/temp" 2>/dev/null) $(cat "$z/type" 2>/dev/null)"
done
if command -v getprop > /dev/null 2>&1; then
  echo "model=$(getprop ro.product.manufacturer) $(getprop ro.product.model)"
  echo "soc=$(getprop ro.soc.model)"
  echo "release=$(getprop ro.build.version.release)"
  echo "emulator=$(getprop ro.kernel.qemu)$(getprop ro.boot.qemu)"
  echo "thermal=$(dumpsys thermalservice 2>/dev/null | grep -m 1 -i 'thermal status')"
fi
exit 0
"""

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What runs the files on the device."""

    @property
    def runtime(self) -> str:
        """Its name and version."""

    @property
    def emulated(self) -> bool:
        """Whether it runs on an emulated processor."""

    def run(self, files: list["SentFile"], threads: int, quota: Quota, order: list[int]) -> list[Timing]:
        """Hold one sitting; files that come first in `order` go first."""

    def fetch(self, file: "SentFile", inputs: list[str], threads: int) -> Answer:
        """Run a file on inputs that lie in the folder under these names."""


@dataclass(frozen=True)
class SentFile:
    """A file of ours and its name in the folder over there."""

    path: Path
    name: str
    model: TfliteModel


class RemoteDevice:
    """A device that a transport reaches."""

    n_sittings = None

    def __init__(self, transport: Transport, options: DeviceOptions) -> None:
        """Make the folder there, look around, and choose what runs the files.

        Raises:
            DeviceError: the device cannot be reached or written to, or has nothing to run files with.
        """
        self._transport = transport
        self._guard: Guard | None = None
        try:
            self._guard = Guard(transport)
            self._state = self._read_state()
            self._mask = ""
            self._cores: str | None = None
            self._bound_for = 0
            self._engine = self._choose_engine(options)
        except BaseException:
            self.close()
            raise

    # --- the protocol ------------------------------------------------------------------------------------------------

    def describe(self) -> DeviceInfo:
        """Return what the device is now; see `Device`."""
        state = self._state = self._read_state()
        android = self._transport.system == "android"
        names = state["model"] + state["soc"] if android else state["board"] + state["cpu"]
        system = f"Android {state['release'][0]}" if android and state["release"] else state["kernel"][0]
        zones = [tuple(reversed(zone.split(" ", 1))) for zone in state["zone"] if " " in zone]
        emulated = self._engine.emulated or "1" in "".join(state["emulator"])
        return DeviceInfo(
            name=self._transport.name,
            description=f"{', '.join(names) or 'unknown processor'}, {(state['processors'] or ['?'])[0]} cores",
            system=f"{system} {state['machine'][0]}",
            runtime=self._engine.runtime,
            governor=" ".join(sorted(set(state["governor"]))) or None,
            load_average=float(state["load"][0]) if state["load"] else None,
            cores=self._cores,
            temperature_c=thermal.processor_temperature([(kind, value) for kind, value in zones]),
            thermal_status=state["thermal"][0].strip() if state["thermal"] else None,
            nature=Nature.EMULATED if emulated else Nature.MEASURED,
        )

    def run(self, paths: Sequence[Path], *, threads: int, quota: Quota, backwards: bool = False) -> list[Timing]:
        """Time the files; see `Device`."""
        files = [self._sent(path) for path in paths]
        self._bind(threads)
        order = list(range(len(files)))[:: -1 if backwards else 1]
        return self._engine.run(files, threads, quota, order)

    def fetch(self, path: Path, inputs: Sequence[np.ndarray], *, threads: int) -> Answer:
        """Run a file once; see `Device`."""
        file = self._sent(path)
        self._bind(threads)
        names = []
        for number, values in enumerate(inputs):
            names.append(f"input{number}.bin")
            self._send_bytes(values.tobytes(), names[-1])
        return self._engine.fetch(file, names, threads)

    def close(self) -> None:
        """Remove our folder from the device; see `Device`."""
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        self._transport.close()

    # --- for the engines ---------------------------------------------------------------------------------------------

    def call(self, command: Sequence[str], *, timeout_s: float = _LOADING_S, bound: bool = True) -> Completed:
        """Run a program in our folder over there, bound to the chosen cores.

        Args:
            command: its name and arguments; quoted here.
            timeout_s: most seconds that it may take.
            bound: whether to bind it.
        """
        words = [*(["taskset", self._mask] if bound and self._mask else []), *command]
        script = _RUN.format(folder=shlex.quote(self._folder), command=shlex.join(words))
        return execute(self._transport, script, timeout_s=timeout_s)

    def send(self, path: Path, name: str) -> None:
        """Copy a file of ours into the folder."""
        self._transport.send(path, f"{self._folder}/{name}")

    def _send_bytes(self, data: bytes, name: str) -> None:
        with tempfile.NamedTemporaryFile(prefix="updp-tf-") as file:
            file.write(data)
            file.flush()
            self.send(Path(file.name), name)

    def get(self, name: str) -> bytes:
        """Return the content of a file of the folder."""
        with tempfile.TemporaryDirectory(prefix="updp-tf-") as folder:
            target = Path(folder) / "file"
            self._transport.get(f"{self._folder}/{name}", target)
            return target.read_bytes()

    @property
    def name(self) -> str:
        """The device's name."""
        return self._transport.name

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _folder(self) -> str:
        if self._guard is None:
            raise DeviceError(f"'{self.name}' is closed.")
        return self._guard.folder

    def _sent(self, path: Path) -> SentFile:
        """Send a file unless it is there; over there it is called by its hash, whatever its name is here."""
        if self._guard is None:
            raise DeviceError(f"'{self.name}' is closed.")
        sent = self._guard.sent
        if path not in sent:
            model = read_flatbuffer(path)
            file = SentFile(path, f"{model.sha256[:24]}.tflite", model)
            if file.name not in {other.name for other in sent.values()}:
                self.send(path, file.name)
            sent[path] = file
        return sent[path]

    def _read_state(self) -> dict[str, list[str]]:
        done = execute(self._transport, _STATE)
        if done.status:
            raise DeviceError(f"'{self.name}' has no usable shell: {done.complaint}.")
        keys = (
            *("machine", "kernel", "load", "processors", "cpu", "board", "governor", "frequency", "zone"),
            *("model", "soc", "release", "emulator", "thermal"),
        )
        state: dict[str, list[str]] = {key: [] for key in keys}
        for line in done.out.splitlines():
            key, _, value = line.partition("=")
            if key in state and value.strip():
                state[key].append(value.strip())
        if not state["machine"]:
            raise DeviceError(f"'{self.name}' has no usable shell: 'uname -m' printed nothing.")
        state["kernel"] = state["kernel"] or ["unknown system"]
        return state

    def _bind(self, threads: int) -> None:
        """Choose the fastest cores, one for each thread; leave it where the shell or the kernel does not allow it."""
        if threads == self._bound_for:
            return
        self._bound_for = threads
        frequencies = [tuple(map(int, entry.split())) for entry in self._state["frequency"] if len(entry.split()) == 2]
        # Among equals the last: the first core serves most interrupts.
        chosen = sorted(core for _, core in sorted((speed, core) for core, speed in frequencies)[-threads:])
        self._mask, self._cores = "", None
        if len(chosen) < threads:
            return
        mask = f"{sum(1 << core for core in chosen):x}"
        if execute(self._transport, f"taskset {mask} true").status == 0:
            self._mask, self._cores = mask, _ranges(chosen)

    def _choose_engine(self, options: DeviceOptions) -> Engine:
        """Take the tool on a phone and Python on a board, and the other where that one is missing."""
        machine = self._state["machine"][0]
        android = self._transport.system == "android"
        tool = find_benchmark_model(options.benchmark_model, system=self._transport.system, machine=machine)
        if tool is not None and (android or options.benchmark_model is not None):
            return ToolEngine.sent(self, tool, options.delegate)
        python, refusal = self._find_python(options)
        if python is not None and options.delegate in (Delegate.CPU, Delegate.EDGETPU):
            library = EDGETPU_LIBRARY if options.delegate == Delegate.EDGETPU else ""
            return PythonEngine(self, python, library)
        if tool is not None:
            return ToolEngine.sent(self, tool, options.delegate)
        if execute(self._transport, "command -v benchmark_model").status == 0:
            return ToolEngine(self, "benchmark_model", "benchmark_model", options.delegate)
        if python is not None:
            raise OptionError(
                f"the delegate '{options.delegate}' on '{self.name}' needs the vendor's tool: "
                f"{missing_tool_advice(self._transport.system, machine)}."
            )
        advice = missing_tool_advice(self._transport.system, machine)
        other = "" if android else f"Run 'python3 -m pip install ai-edge-litert' on it, or {advice}."
        raise DeviceError(f"'{self.name}' has nothing to run files with ({refusal}). {other or _sentence(advice)}")

    def _find_python(self, options: DeviceOptions) -> tuple[str | None, str]:
        """Return a Python over there that has a runtime; else None and why not."""
        candidates = [options.python]
        # The script's first line names the Python that has the runtime, mostly that of a virtual environment.
        script = 'f=$(command -v litert-benchmark) && head -n 1 "$f"'
        first_line = execute(self._transport, script).out.strip()
        if first_line.startswith("#!") and "python" in first_line:
            candidates.append(first_line[2:].strip())
        self.send(Path(runner.__file__), "runner.py")
        refusals = []
        for python in candidates:
            done = self.call([python, "runner.py", '{"action": "describe"}'], bound=False)
            answer = _last_json(done.out)
            if answer is not None and "error" not in answer:
                self._python_answer = answer
                return python, ""
            refusals.append(answer["error"] if answer is not None else f"{python}: {done.complaint}")
        return None, "; ".join(refusals)


class Guard:
    """Our folder over there, for as long as this process lives and the connection holds."""

    def __init__(self, transport: Transport) -> None:
        """Make the folder.

        Raises:
            DeviceError: the device cannot be reached, or has no place that can be written to.
        """
        self.folder = f"{transport.folder}/updp-tf-{secrets.token_hex(8)}"
        self.sent: dict[Path, SentFile] = {}
        self._name = transport.name
        script = _GUARD.format(
            base=shlex.quote(transport.folder), folder=shlex.quote(self.folder), ready=shlex.quote(_READY)
        )
        try:
            self._process = subprocess.Popen(
                transport.command(script),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for us; the guard goes when its input ends
            )
        except FileNotFoundError as error:
            raise DeviceError(f"cannot reach '{self._name}': '{error.filename}' is not installed.") from error
        said = self._first_line()
        if _READY not in said:
            self._end_input()
            try:
                out, err = self._process.communicate(timeout=_GUARD_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                out, err = self._process.communicate()
            done = Completed(
                self._process.returncode, said + out.decode("utf-8", "replace"), err.decode("utf-8", "replace")
            )
            check_reachable(transport, done)
            raise DeviceError(
                f"cannot make a folder in '{transport.folder}' on '{self._name}': {done.complaint.rstrip('.')}."
                + (" Its disk is full." if "No space" in done.complaint else "")
            )

    def close(self) -> None:
        """Have the folder removed, and wait for that."""
        self._end_input()
        try:
            self._process.wait(_GUARD_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        if self._process.returncode not in (0, 4):
            _log.warning("the folder '%s' may be left on '%s'", self.folder, self._name)

    def _end_input(self) -> None:
        try:
            if self._process.stdin is not None:
                self._process.stdin.close()
        except BrokenPipeError:
            pass  # the other end is gone already
        self._process.stdin = None  # `communicate` must not close it again

    def _first_line(self) -> str:
        stream: Any = self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            if not selector.select(_GUARD_S):
                return ""
            return stream.readline().decode("utf-8", "replace")


# --- engines ---------------------------------------------------------------------------------------------------------


class PythonEngine:
    """`runner.py` in a Python that has a LiteRT runtime."""

    def __init__(self, device: RemoteDevice, python: str, library: str) -> None:
        """Remember what the runner said of itself."""
        self._device, self._python, self._library = device, python, library
        self.runtime = str(device._python_answer["runtime"])
        self.emulated = bool(device._python_answer["emulated"])

    def run(self, files: list[SentFile], threads: int, quota: Quota, order: list[int]) -> list[Timing]:
        """Have one sitting held over there; only its outcome travels."""
        request = {
            "action": "run",
            "files": [file.name for file in files],
            "threads": threads,
            "library": self._library,
            "order": order,
            "quota": asdict(quota),
        }
        answer = self._ask(request, files, timeout_s=_LOADING_S + 3 * quota.max_ms / 1000)
        return [
            Timing(delegate, tuple(map(tuple, turns)), init_ms=init_ms)
            for delegate, turns, init_ms in zip(answer["delegates"], answer["times_ms"], answer["init_ms"], strict=True)
        ]

    def fetch(self, file: SentFile, inputs: list[str], threads: int) -> Answer:
        """Run once and get the outputs."""
        request = {
            "action": "fetch",
            "files": [file.name],
            "threads": threads,
            "library": self._library,
            "inputs": inputs,
            "output": "output.bin",
        }
        self._ask(request, [file], timeout_s=_LOADING_S)
        return Answer(_split(self._device.get("output.bin"), file, self._device.name))

    def _ask(self, request: dict[str, Any], files: list[SentFile], *, timeout_s: float) -> dict[str, Any]:
        done = self._device.call([self._python, "runner.py", json.dumps(request)], timeout_s=timeout_s)
        answer = _last_json(done.out)
        names = ", ".join(f"'{file.path}'" for file in files)
        if answer is None:
            how = f"was killed by signal {done.status - 128}" if done.status > 128 else "ended"
            raise DeviceError(f"the runner on '{self._device.name}' {how} over {names}: {done.complaint}.")
        if "error" in answer:
            raise DeviceError(f"'{self._device.name}' cannot run {names}: {answer['error']}.")
        return answer


class ToolEngine:
    """The vendor's `benchmark_model`."""

    emulated = False
    _FLAGS = {
        Delegate.CPU: "--use_xnnpack=true",
        Delegate.GPU: "--use_gpu=true",
        Delegate.NNAPI: "--use_nnapi=true",
        Delegate.EDGETPU: f"--external_delegate_path={EDGETPU_LIBRARY}",
    }

    def __init__(self, device: RemoteDevice, program: str, runtime: str, delegate: str) -> None:
        """Name the program over there."""
        self._device, self._program, self.runtime = device, program, runtime
        self._delegate = Delegate(delegate)

    @classmethod
    def sent(cls, device: RemoteDevice, tool: Path, delegate: str) -> "ToolEngine":
        """Send our binary."""
        device.send(tool, "benchmark_model")
        done = device.call(["chmod", "700", "benchmark_model"], bound=False)
        if done.status:
            raise DeviceError(f"cannot make benchmark_model executable on '{device.name}': {done.complaint}.")
        version = hashlib.sha256(read_bytes(tool)).hexdigest()[:12]
        return cls(device, "./benchmark_model", f"benchmark_model {version}", delegate)

    def run(self, files: list[SentFile], threads: int, quota: Quota, order: list[int]) -> list[Timing]:
        """Call the tool for one file after the other."""
        logs = {}
        for index in order:
            flags = [
                f"--num_runs={math.ceil(quota.runs)}",
                f"--min_secs={quota.ms / 1000:.4f}",
                f"--max_secs={max(quota.max_ms / len(files), 1) / 1000:.4f}",
                "--warmup_runs=2",
                "--warmup_min_secs=0.1",
            ]
            logs[index] = self._call(files[index], threads, flags, timeout_s=_LOADING_S + 3 * quota.max_ms / 1000)
        return [
            Timing(logs[index].delegate_text, log=logs[index], init_ms=logs[index].init_ms)
            for index in range(len(files))
        ]

    def fetch(self, file: SentFile, inputs: list[str], threads: int) -> Answer:
        """Run a few times with the operators' times, and get the outputs."""
        tensors = file.model.inputs
        flags = [
            "--input_layer=" + ",".join(tensor.name for tensor in tensors),
            "--input_layer_shape=" + ":".join(",".join(map(str, tensor.shape)) for tensor in tensors),
            # A colon in a name is doubled there, and only there.
            "--input_layer_value_files="
            + ",".join(
                f"{tensor.name.replace(':', '::')}:{name}" for tensor, name in zip(tensors, inputs, strict=True)
            ),
            "--output_filepath=output.bin",
            *("--enable_op_profiling=true", "--num_runs=10", "--min_secs=0", "--warmup_runs=1", "--warmup_min_secs=0"),
        ]
        log = self._call(file, threads, flags, timeout_s=_LOADING_S)
        unknown = [flag for flag in log.unknown_flags if "output_filepath" in flag or "value_files" in flag]
        if unknown:
            raise DeviceError(
                f"this benchmark_model on '{self._device.name}' cannot write outputs (it does not know "
                f"{unknown[0].partition('=')[0]}), so they cannot be compared: take a newer one."
            )
        return Answer(_split(self._device.get("output.bin"), file, self._device.name), log)

    def _call(self, file: SentFile, threads: int, flags: list[str], *, timeout_s: float) -> BenchmarkLog:
        command = [self._program, f"--graph={file.name}", f"--num_threads={threads}", self._FLAGS[self._delegate]]
        done = self._device.call([*command, *flags], timeout_s=timeout_s)
        label = f"'{file.path}' on '{self._device.name}'"
        if done.status in (126, 127):
            raise DeviceError(f"cannot start benchmark_model for {label}: {done.complaint}.")
        if done.status > 128:
            raise DeviceError(f"benchmark_model was killed by signal {done.status - 128} over {label}.")
        try:
            log = parse_benchmark_log(done.out + "\n" + done.err, source=f"what benchmark_model printed over {label}")
        except DeviceError as error:
            raise DeviceError(f"{label} failed: {error}") from error
        if done.status:
            raise DeviceError(f"benchmark_model ended with {done.status} over {label}: {done.complaint}.")
        return log


def _split(data: bytes, file: SentFile, device: str) -> tuple[np.ndarray, ...]:
    """Return the outputs that lie in a file one after another."""
    outputs, start = [], 0
    for tensor in file.model.outputs:
        dtype = np.dtype(tensor.dtype)
        n_bytes = dtype.itemsize * math.prod(tensor.shape)
        part = data[start : start + n_bytes]
        if len(part) != n_bytes:
            break
        outputs.append(np.frombuffer(part, dtype).reshape(tensor.shape))
        start += n_bytes
    if len(outputs) != len(file.model.outputs) or start != len(data):
        raise DeviceError(f"the outputs of '{file.path}' on '{device}' have another size than the file says.")
    return tuple(outputs)


def _last_json(text: str) -> dict[str, Any] | None:
    line = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _ranges(numbers: list[int]) -> str:
    """Return sorted numbers as "0-1,4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
