"""Reads what the vendor's `benchmark_model` tool prints, and finds its binary.

Two dialects: older tools print bare lines, a `[start]` column in the operator table, and no percentiles; newer ones put
`INFO: ` before lines, leave the column out, and add `p5= median= p95=`. Lines from Android's log are read, too.
Source of the lines: `benchmark_model.cc` and `benchmark_tflite_model.cc` of LiteRT, and real logs of both dialects.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tflite_export.errors import DeviceError

VENDOR = "https://storage.googleapis.com/litert/binaries/latest"
"""Where the vendor publishes the tool, in one folder for each platform."""
ENVIRONMENT_VARIABLE = "UPDP_TF_BENCHMARK_MODEL"

# `uname -m` -> (architecture in the vendor's folder names, e_machine of an ELF file)
_MACHINES = {
    "aarch64": ("arm64", 183),
    "arm64": ("arm64", 183),
    "armv7l": ("arm", 40),
    "armv8l": ("arm", 40),
    "x86_64": ("x86_64", 62),
    "riscv64": ("riscv64", 243),
}

_PREFIX = re.compile(
    r"^(?:\d\d-\d\d [\d:.]+\s+\d+\s+\d+ [VDIWEF] \S+\s*: )?(?:(?:VERBOSE|INFO|WARN(?:ING)?|ERROR|FATAL): )?"
)
_NUMBER = r"([-+\d.eE]+|inf|nan)"
_STATISTIC = re.compile(rf"(\w+)={_NUMBER}")
_TIMINGS = re.compile(
    rf"Inference timings in us: Init: {_NUMBER}, First inference: {_NUMBER}, "
    rf"Warmup \(avg\): {_NUMBER}, Inference \(avg\): {_NUMBER}"
)
_MEMORY = re.compile(rf"(?:Peak memory footprint|Memory footprint delta .*) \(MB\): init={_NUMBER} overall={_NUMBER}")
_PEAK = re.compile(rf"Overall peak memory footprint \(MB\) via periodic monitoring: {_NUMBER}")
_APPLIED = re.compile(
    r"Explicitly applied (\S+) delegate, and the model graph will be (completely|partially) executed by the delegate"
    r"(?: w/ (\d+) delegate kernels)?"
)
_NOT_APPLIED = re.compile(
    r"Though (\S+) delegate is explicitly applied, the model graph will not be executed by the delegate"
)
_UNSUPPORTED = re.compile(r"(?:Following|Next) operations are not supported by (\S+) delegate:")
_REASON = re.compile(r"([A-Z][A-Z0-9_]+): *(.*)")
_FAILURE = re.compile(r"fail|error|cannot|could not|unable|refused", re.IGNORECASE)


@dataclass(frozen=True)
class OperatorTime:
    """One line of the operator table, in the order of execution.

    Attributes:
        type: kind of operator; a delegate's name where it runs a whole part of the graph.
        name: name of its output, as the tool prints it.
        first_ms: time in the first profiled run.
        average_ms: mean time over the profiled runs.
        memory_kb: as the tool tells it.
        n_calls: calls in one run.
    """

    type: str
    name: str
    first_ms: float
    average_ms: float
    memory_kb: float
    n_calls: int


@dataclass(frozen=True)
class BenchmarkLog:
    """What one call of `benchmark_model` told.

    Attributes:
        graph: the path of the file, as the tool was given it.
        threads: threads that it was told to use; None where it chose.
        delegate: "GPU", "NNAPI", "EXTERNAL" ... where one was asked for and runs all or part of the graph, "XNNPACK"
            where the tool tells of it, else "CPU".
        n_partitions: parts of the graph that the delegate runs; None where it runs all, or where there is none.
        size_mb: size of the file in units of 1e6 bytes; None where the tool does not tell.
        init_ms: time to load.
        first_ms: time of the very first run.
        n_warmup: warm-up runs.
        warmup_ms: their mean.
        n: timed runs.
        average_ms: their mean.
        min_ms: shortest; max_ms: longest.
        max_ms: longest.
        std_ms: standard deviation.
        median_ms: None in the older dialect; p5_ms and p95_ms likewise.
        p5_ms: fifth percentile.
        p95_ms: ninety-fifth percentile.
        init_memory_mb: memory after loading (MiB); None where the tool does not tell.
        memory_mb: memory at the end (MiB), or the peak where the tool watched it.
        operators: the operator table of the timed runs; empty without `--enable_op_profiling`.
        unsupported: operators that the delegate refused, with its reasons.
        unknown_flags: options that this tool did not know and ignored.
    """

    graph: str
    threads: int | None
    delegate: str
    n_partitions: int | None
    size_mb: float | None
    init_ms: float
    first_ms: float
    n_warmup: int
    warmup_ms: float
    n: int
    average_ms: float
    min_ms: float
    max_ms: float
    std_ms: float
    median_ms: float | None
    p5_ms: float | None
    p95_ms: float | None
    init_memory_mb: float | None
    memory_mb: float | None
    operators: tuple[OperatorTime, ...]
    unsupported: tuple[str, ...]
    unknown_flags: tuple[str, ...]

    @property
    def typical_ms(self) -> float:
        """The median where the tool tells it, else the mean."""
        return self.average_ms if self.median_ms is None else self.median_ms

    @property
    def delegate_text(self) -> str:
        """The delegate, and how much of the graph it runs where that is not all."""
        return self.delegate if self.n_partitions is None else f"{self.delegate} ({self.n_partitions} parts)"


def read_benchmark_log(path: str | Path) -> BenchmarkLog:
    """Read a log of `benchmark_model` that was saved in a file.

    Raises:
        DeviceError: the file cannot be read, is no such log, or is the log of a run that failed.
    """
    try:
        text = Path(path).read_text("utf-8", errors="replace")
    except OSError as error:
        raise DeviceError(f"cannot read the log '{path}': {error.strerror or error}.") from error
    return parse_benchmark_log(text, source=f"'{path}'")


def parse_benchmark_log(text: str, *, source: str = "this text") -> BenchmarkLog:
    """Read what `benchmark_model` printed.

    Args:
        text: standard output and standard error together.
        source: what errors call it.

    Raises:
        DeviceError: it is no such log, or that of a run that failed, or of which a delegate refused the whole graph.
    """
    lines = [_PREFIX.sub("", line.rstrip("\r")) for line in text.splitlines()]
    graph = _bracketed(lines, "Graph")
    unsupported = tuple(_unsupported(lines))
    if graph is None:
        raise DeviceError(
            f"{source} is no log of benchmark_model: there is no line 'Graph: [...]'. Save all that the tool prints."
        )
    for line in lines:
        if refused := _NOT_APPLIED.match(line):
            raise DeviceError(f"the {refused[1]} delegate runs nothing of '{graph}'{_listed(unsupported)}.")
    timings = next(filter(None, map(_TIMINGS.search, lines)), None)
    counts = [dict(_STATISTIC.findall(line)) for line in lines if line.startswith("count=")]
    if timings is None or len(counts) < 2:
        complaints = [line.strip() for line in lines if _FAILURE.search(line)]
        why = " | ".join(complaints[-3:]) or (lines[-1].strip() if lines else "")
        raise DeviceError(f"benchmark_model did not finish '{graph}' ({source}): {why}{_listed(unsupported)}.")
    try:
        return _log(graph, lines, timings, counts, unsupported)
    except (ValueError, KeyError, IndexError) as error:
        raise DeviceError(f"{source} has a line that benchmark_model does not print: {error}.") from error


def _log(
    graph: str,
    lines: list[str],
    timings: re.Match[str],
    counts: list[dict[str, str]],
    unsupported: tuple[str, ...],
) -> BenchmarkLog:
    init_us, first_us, warmup_us, average_us = map(float, timings.groups())
    warmup, runs = counts[:2]
    # A single run has `count=1 curr=...` and no statistics.
    only_us = float(runs["curr"])
    memory = next(filter(None, map(_MEMORY.search, lines)), None)
    peak = next(filter(None, map(_PEAK.search, lines)), None)
    threads = _bracketed(lines, "Num threads") or _bracketed(lines, "#threads used for CPU inference")
    size = next((line.rpartition(" ")[2] for line in lines if line.startswith("The input model file size")), None)
    delegate, n_partitions = _delegate(lines)

    def milliseconds(name: str) -> float | None:
        return float(runs[name]) / 1000 if name in runs else None

    return BenchmarkLog(
        graph=graph,
        threads=int(threads) if threads is not None and int(threads) > 0 else None,
        delegate=delegate,
        n_partitions=n_partitions,
        size_mb=None if size is None else float(size),
        init_ms=init_us / 1000,
        first_ms=first_us / 1000,
        n_warmup=int(warmup["count"]),
        warmup_ms=warmup_us / 1000,
        n=int(runs["count"]),
        average_ms=average_us / 1000,
        min_ms=float(runs.get("min", only_us)) / 1000,
        max_ms=float(runs.get("max", only_us)) / 1000,
        std_ms=float(runs.get("std", 0)) / 1000,
        median_ms=milliseconds("median"),
        p5_ms=milliseconds("p5"),
        p95_ms=milliseconds("p95"),
        init_memory_mb=float(memory[1]) if memory else None,
        memory_mb=float(peak[1]) if peak else float(memory[2]) if memory else None,
        operators=tuple(_operators(lines)),
        unsupported=unsupported,
        unknown_flags=tuple(
            flag
            for line in lines
            if line.startswith("Unconsumed cmdline flags:")
            for flag in line.partition(":")[2].split()
        ),
    )


def _bracketed(lines: list[str], label: str) -> str | None:
    start = f"{label}: ["
    return next((line[len(start) : line.rindex("]")] for line in lines if line.startswith(start) and "]" in line), None)


def _delegate(lines: list[str]) -> tuple[str, int | None]:
    for line in lines:
        if applied := _APPLIED.match(line):
            return applied[1], None if applied[2] == "completely" else int(applied[3] or 0)
    return ("XNNPACK" if any("XNNPACK delegate" in line for line in lines) else "CPU"), None


def _unsupported(lines: list[str]) -> Iterator[str]:
    """Give the lines below a delegate's complaint, one for each operator."""
    listing = False
    for line in lines:
        if _UNSUPPORTED.match(line):
            listing = True
        elif listing and (reason := _REASON.match(line)):
            yield f"{reason[1]}: {reason[2].rstrip('.') or 'not supported'}"
        else:
            listing = False


def _listed(unsupported: tuple[str, ...]) -> str:
    return f"; it refused {'; '.join(unsupported)}" if unsupported else ""


def _operators(lines: list[str]) -> Iterator[OperatorTime]:
    """Give the rows of the tables in run order that belong to the timed runs, not to loading."""
    columns: list[str] | None = None
    profiled = in_order = False
    for line in lines:
        if line.startswith("Operator-wise Profiling Info for Regular Benchmark Runs"):
            profiled = True
        elif line.startswith("===="):
            in_order, columns = profiled and "Run Order" in line, None
        elif in_order and columns is None and "[node type]" in line:
            columns = [cell.strip().strip("[]") for cell in line.split("\t")]
        elif in_order and columns is not None and line.strip():
            cells = dict(zip(columns, (cell.strip() for cell in line.split("\t")), strict=True))
            yield OperatorTime(
                type=cells["node type"],
                name=cells["Name"],
                first_ms=float(cells["first"]),
                average_ms=float(cells["avg ms"]),
                memory_kb=float(cells["mem KB"]),
                n_calls=int(cells["times called"]),
            )
        elif in_order:
            in_order = False


# --- the binary ------------------------------------------------------------------------------------------------------


def platform_name(system: str, machine: str) -> str:
    """Return the vendor's name of a platform: "android_arm64", "linux_x86_64" ...

    Args:
        system: "android" or "linux".
        machine: what `uname -m` prints.
    """
    return f"{system}_{_MACHINES.get(machine, (machine, 0))[0]}"


def find_benchmark_model(option: Path | None, *, system: str, machine: str) -> Path | None:
    """Return the tool for a platform: the option, else the environment variable, else the cache folder.

    Returns:
        The binary's path; None where there is none in the cache and nothing else was named.

    Raises:
        DeviceError: the named file is not there, or is built for another processor.
    """
    named = option or (Path(value) if (value := os.environ.get(ENVIRONMENT_VARIABLE)) else None)
    path = named or cache_path(system, machine)
    try:
        with path.open("rb") as file:
            head = file.read(20)
    except OSError as error:
        if named is None:
            return None
        raise DeviceError(f"cannot read the benchmark_model binary '{path}': {error.strerror or error}.") from error
    # Anything else than an ELF file, a shell script for example, is left to the device.
    built_for = int.from_bytes(head[18:20], "little") if head[:4] == b"\x7fELF" else None
    wanted = _MACHINES.get(machine, ("", 0))[1]
    if built_for is not None and wanted and built_for != wanted:
        names = {number: name for name, (_, number) in reversed(_MACHINES.items())}
        raise DeviceError(
            f"'{path}' is built for {names.get(built_for, 'another processor')}, but the device is {machine}: "
            f"take the one in {VENDOR}/{platform_name(system, machine)}/."
        )
    return path


def cache_path(system: str, machine: str) -> Path:
    """Return where the tool for a platform is looked for when nothing else is said."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "updp-tf" / platform_name(system, machine) / "benchmark_model"


def missing_tool_advice(system: str, machine: str) -> str:
    """Return how to get the tool, as the end of an error."""
    return (
        f"download benchmark_model from {VENDOR}/{platform_name(system, machine)}/benchmark_model and name it with "
        f"--benchmark-model or {ENVIRONMENT_VARIABLE}, or put it at {cache_path(system, machine)}"
    )


def graph_name(log: BenchmarkLog) -> str:
    """Return the file name of the graph, without its folders."""
    return PurePosixPath(log.graph.replace("\\", "/")).name
