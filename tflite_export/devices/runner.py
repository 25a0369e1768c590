"""Runs `.tflite` files wherever it is sent: one script that needs NumPy and a LiteRT runtime, and answers in JSON.

The package imports it for this machine, and sends it as it stands to boards, some of which have Python 3.7: nothing of
the package and nothing newer may be used here. Called as a script it takes a request in JSON from the command line and
prints one line of JSON: the answer, or `{"error": "..."}`.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
from typing import Any

import numpy as np

RUNTIMES = ("ai_edge_litert", "tflite_runtime")
SLICE_MS = 20.0  # one file's turn: short against the drift, long against the clock's resolution
WARM_UP_RUNS = 2
WARM_UP_MS = 30.0


class RunnerError(Exception):
    """What the runtime refused, in one line."""


def runtime() -> tuple[Any, str]:
    """Return the first runtime's interpreter module that is installed, and its name and version."""
    for package in RUNTIMES:
        try:
            module = importlib.import_module(package + ".interpreter")
        except ImportError:
            continue
        return module, package.replace("_", "-") + " " + _version(package)
    raise RunnerError("none of the runtimes " + " and ".join(RUNTIMES) + " is installed for " + sys.executable)


def _version(package: str) -> str:
    try:
        from importlib.metadata import version
    except ImportError:  # Python 3.7
        return str(getattr(importlib.import_module(package), "__version__", "of unknown version"))
    return version(package)


def load(path: str, threads: int, library: str = "") -> Any:
    """Return an interpreter with its tensors allocated and its inputs filled with fixed random values.

    Args:
        path: the file.
        threads: how many threads one inference may use.
        library: shared library of a delegate; empty for the runtime's own, XNNPACK.
    """
    module, _ = runtime()
    try:
        delegates = [module.load_delegate(library)] if library else None
    except (OSError, ValueError) as error:
        raise RunnerError("cannot load the delegate '" + library + "': " + _first_line(error)) from error
    try:
        interpreter = module.Interpreter(model_path=path, num_threads=threads, experimental_delegates=delegates)
        interpreter.allocate_tensors()
        for detail, values in zip(interpreter.get_input_details(), fixed_inputs(interpreter)):  # noqa: B905
            interpreter.set_tensor(detail["index"], values)
    except (RuntimeError, ValueError, OSError) as error:
        raise RunnerError("the runtime cannot load the file: " + _first_line(error)) from error
    return interpreter


def fixed_inputs(interpreter: Any) -> list[np.ndarray]:
    """Return the same random inputs at every call: all values of an integer type, a standard normal for floats."""
    rng = np.random.RandomState(0)
    arrays = []
    for detail in interpreter.get_input_details():
        dtype, shape = np.dtype(detail["dtype"]), tuple(int(size) for size in detail["shape"])
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            arrays.append(rng.randint(limits.min, limits.max, size=shape, dtype=dtype))
        elif dtype.kind == "b":
            arrays.append(rng.randint(0, 2, size=shape).astype(dtype))
        else:
            arrays.append(rng.standard_normal(shape).astype(dtype))
    return arrays


def delegate_name(interpreter: Any, library: str = "") -> str:
    """Return what has taken over operators: the library's name, "XNNPACK", or "none"."""
    # The only place where the Python runtime tells: the partitions of a delegate are appended as operators.
    operators: list[dict[str, Any]] = getattr(interpreter, "_get_ops_details", list)()
    if library and any("EdgeTpu" in str(one["op_name"]) or one["op_name"] == "DELEGATE" for one in operators):
        return os.path.basename(library)
    return "XNNPACK" if any(one["op_name"] == "DELEGATE" for one in operators) else "none"


def time_turn(interpreter: Any, n_runs: int) -> list[float]:
    """Run `n_runs` times in a row and return the milliseconds of each run."""
    invoke, clock, times_ms = interpreter.invoke, time.perf_counter, []
    for _ in range(n_runs):
        start = clock()
        invoke()
        times_ms.append(1000 * (clock() - start))
    return times_ms


def sit(interpreters: list[Any], order: list[int], quota: dict[str, float]) -> list[list[list[float]]]:
    """Warm all up, then let them take turns until each has its share; see `device.Quota`.

    Returns:
        times_ms[file][round]: the runs of one turn, in milliseconds. The same number of rounds for all files.
    """
    try:
        runs = {index: max(1, round(SLICE_MS / _warm_up(interpreters[index]))) for index in order}
        times_ms: list[list[list[float]]] = [[] for _ in interpreters]
        while _unfinished(times_ms, quota):
            for index in order:
                times_ms[index].append(time_turn(interpreters[index], runs[index]))
    except (RuntimeError, ValueError) as error:
        raise RunnerError("the runtime failed while it ran the file: " + _first_line(error)) from error
    return times_ms


def _warm_up(interpreter: Any) -> float:
    """Run until the times have settled and return the time of one run in milliseconds."""
    times = time_turn(interpreter, 1)
    while len(times) < WARM_UP_RUNS or (sum(times) < WARM_UP_MS and len(times) < 1000):
        times += time_turn(interpreter, len(times))
    return max(float(np.median(times)), 1e-4)


def _unfinished(times_ms: list[list[list[float]]], quota: dict[str, float]) -> bool:
    totals = [sum(sum(turn) for turn in file) for file in times_ms]
    if not times_ms[0]:
        return True
    if sum(totals) >= quota["max_ms"]:
        return False
    n_runs = [sum(len(turn) for turn in file) for file in times_ms]
    return min(n_runs) < quota["runs"] or min(totals) < quota["ms"]


def answer(interpreter: Any) -> list[np.ndarray]:
    """Run once on the inputs that are set and return the outputs as they are stored."""
    try:
        interpreter.invoke()
        return [np.array(interpreter.get_tensor(detail["index"])) for detail in interpreter.get_output_details()]
    except (RuntimeError, ValueError) as error:
        raise RunnerError("the runtime failed while it ran the file: " + _first_line(error)) from error


def emulated() -> bool:
    """Return whether this process runs on an emulated processor: the machine's own files speak of another one."""
    if platform.system() != "Linux" or platform.machine() in ("x86_64", "i386", "i686"):
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read()
        if "GenuineIntel" in text or "AuthenticAMD" in text:
            return True
    except OSError:
        pass
    return os.path.exists("/sys/devices/system/cpu/microcode")


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks for.

    The keys are `action` ("describe", "run" or "fetch"), `files`, `threads`, `library`; for "run" also `order` and
    `quota`; for "fetch" `inputs`, the paths of raw arrays, and `output`, where the raw outputs go one after another.
    """
    if request["action"] == "describe":
        python = "Python " + platform.python_version()
        return {"runtime": runtime()[1] + ", " + python, "emulated": emulated(), "machine": platform.machine()}
    library = request["library"]
    if request["action"] == "fetch":
        interpreter = load(request["files"][0], request["threads"], library)
        for detail, path in zip(interpreter.get_input_details(), request["inputs"]):  # noqa: B905
            values = np.fromfile(path, detail["dtype"]).reshape(detail["shape"])
            interpreter.set_tensor(detail["index"], values)
        with open(request["output"], "wb") as file:
            for output in answer(interpreter):
                file.write(output.tobytes())
        return {"delegates": [delegate_name(interpreter, library)]}
    interpreters, init_ms = {}, {}
    for index in request["order"]:
        start = time.perf_counter()
        interpreters[index] = load(request["files"][index], request["threads"], library)
        init_ms[index] = 1000 * (time.perf_counter() - start)
    loaded = [interpreters[index] for index in range(len(interpreters))]
    times_ms = sit(loaded, request["order"], request["quota"])
    return {
        "times_ms": [[[round(time_ms, 5) for time_ms in turn] for turn in file] for file in times_ms],
        "delegates": [delegate_name(one, library) for one in loaded],
        "init_ms": [init_ms[index] for index in range(len(loaded))],
    }


def _first_line(error: BaseException) -> str:
    # The runtime's messages go on with links and C++ file names.
    return str(error).partition("\n")[0].rstrip(".")


def main() -> None:
    """Answer the request on the command line."""
    try:
        result = serve(json.loads(sys.argv[1]))
    except RunnerError as error:
        result = {"error": str(error)}
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
