"""Run the vendor's Edge TPU compiler where it is installed, and read what it prints and logs.

The compiler is closed, runs on x86-64 Linux only, and its last version is 16.0.384591198 (2021). It prints one block
of sizes and counts for each model, and writes one log for each with a table of operators, counts and statuses.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tflite_export.edgetpu import COMPILED_OPERATOR
from tflite_export.edgetpu_rules import MAPPED, STATUSES
from tflite_export.errors import CompilerError, OptionError
from tflite_export.files import check_target, place
from tflite_export.flatbuffer import read_flatbuffer

COMPILER_VARIABLE = "EDGETPU_COMPILER"
"""Environment variable with the path of the compiler, where it is not on the PATH."""

_NOT_INSTALLED = (
    "the Edge TPU compiler is not installed. It runs on x86-64 Linux only: on Debian or Ubuntu, or in a Docker "
    "container of debian:11, add the repository 'deb https://packages.cloud.google.com/apt coral-edgetpu-stable main' "
    "and run apt-get install edgetpu-compiler; or use it in the browser with Colab (coral.ai/docs/edgetpu/compiler). "
    f"Where it is not on the PATH, give compiler= or set {COMPILER_VARIABLE}."
)
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_ROW = re.compile(r"(?P<name>\S+)\s+(?P<count>[1-9]\d*)\s+(?P<status>[A-Z]\S*(?: \S+)*)")
_VERSION = re.compile(r"Edge TPU Compiler version (\d+(?:\.\d+)*)")
_LAST_LINE = "See the operation log file for individual operation details."  # in place of a table of operators
_TABLE_HEADER = ["Operator", "Count", "Status"]


@dataclass(frozen=True)
class LogRow:
    """`count` operators of one kind with one status; a kind has a row for each of its statuses."""

    name: str
    count: int
    status: str


@dataclass(frozen=True)
class EdgeTpuLog:
    """The log file of one model: which operators were mapped."""

    compiler_version: str
    input: str
    output: str
    rows: tuple[LogRow, ...]

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """How many operators of each kind have each status."""
        return _counts(self.rows)


@dataclass(frozen=True)
class CompiledModel:
    """What the compiler made of one model. Sizes are as exact as it prints them.

    Attributes:
        input: the file that was compiled.
        output: the file that it made.
        log: its log, where it is known.
        input_bytes: size of the input.
        output_bytes: size of the output.
        on_chip_bytes: parameters that stay in the on-chip memory.
        on_chip_free_bytes: on-chip memory that is left for parameters (of this and other models).
        streamed_bytes: parameters that are sent to the Edge TPU again for each inference.
        subgraphs: parts that run on the Edge TPU; 0: nothing does.
        n_operators: operators of the model.
        n_mapped: those that run on the Edge TPU.
        rows: its table of operators, where it is known.
    """

    input: str
    output: str
    log: str
    input_bytes: int
    output_bytes: int
    on_chip_bytes: int
    on_chip_free_bytes: int
    streamed_bytes: int
    subgraphs: int
    n_operators: int
    n_mapped: int
    rows: tuple[LogRow, ...] = ()

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """How many operators of each kind have each status."""
        return _counts(self.rows)

    def __str__(self) -> str:
        lines = [
            f"{self.output}: {self.n_mapped} of {self.n_operators} operators on the Edge TPU, "
            f"{self.output_bytes / 2**20:.2f} MiB",
            f"  parameters: {_size(self.on_chip_bytes)} on chip, {_size(self.on_chip_free_bytes)} left there, "
            f"{_size(self.streamed_bytes)} streamed for each inference",
        ]
        lines += [f"{row.name:<30} {row.count:<10} {row.status}" for row in self.rows]
        return "\n".join(lines)


@dataclass(frozen=True)
class EdgeTpuCompilation:
    """One run of the compiler. Models that were compiled together share the on-chip memory."""

    compiler_version: str
    milliseconds: int
    models: tuple[CompiledModel, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the record as values that `json.dump` takes."""
        return asdict(self)

    def __str__(self) -> str:
        header = f"Edge TPU compiler {self.compiler_version}, {self.milliseconds} ms"
        return "\n".join([header, *map(str, self.models)])


def compile_edgetpu(
    path: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    compiler: str | Path | None = None,
    timeout_s: int = 600,
    force: bool = False,
) -> EdgeTpuCompilation:
    """Compile `.tflite` files with the vendor's compiler; several are compiled together and share the cache.

    The compiler's exit status is 0 even where nothing is mapped: see `n_mapped`. Its log is written beside each file,
    as `<name>.log`.

    Args:
        path: one file, or several to compile together.
        out: of one file: where the compiled file goes, by default `<name>_edgetpu.tflite` beside it; of several: an
            existing folder.
        compiler: the compiler's path, by default `$EDGETPU_COMPILER`, or `edgetpu_compiler` on the PATH.
        timeout_s: most seconds that it may take.
        force: replace files that exist.

    Raises:
        CompilerError: the compiler is not installed, failed, took too long, or printed what is no output of it.
        FlatbufferError: a file is damaged.
        OptionError: no file, or one twice.
        OutputError: a target exists already or cannot be written.
    """
    sources = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
    targets = _targets(sources, out)
    for source, target in zip(sources, targets, strict=True):
        check_target(target, force=force)
        check_target(target.with_suffix(".log"), force=force)
        if COMPILED_OPERATOR in read_flatbuffer(source).custom_operators:
            raise CompilerError(f"'{source}' is compiled for the Edge TPU already.")
    program = _find_compiler(compiler)
    with tempfile.TemporaryDirectory(prefix="tflite_export_") as folder:
        # Names of its own: the compiler puts all outputs into one folder.
        inputs = [Path(folder) / f"model{number}.tflite" for number in range(len(sources))]
        for source, copy in zip(sources, inputs, strict=True):
            shutil.copyfile(source, copy)
        text = _run(program, inputs, Path(folder), timeout_s)
        compilation = parse_edgetpu_output(text)
        if len(compilation.models) != len(sources):
            raise CompilerError(f"the Edge TPU compiler told of {len(compilation.models)} of {len(sources)} models.")
        models = tuple(
            _collect(model, made, source, target)
            for model, made, source, target in zip(compilation.models, inputs, sources, targets, strict=True)
        )
    return EdgeTpuCompilation(compilation.compiler_version, compilation.milliseconds, models)


def _targets(sources: list[Path], out: str | Path | None) -> list[Path]:
    if not sources or len(set(sources)) < len(sources):
        raise OptionError("give one .tflite file to compile, or several different ones to compile together.")
    if len(sources) == 1 and out is not None and not Path(out).is_dir():
        return [Path(out)]
    if out is not None and not Path(out).is_dir():
        raise OptionError(f"'{out}' is no folder: several files are compiled into a folder that exists.")
    targets = [source.with_name(f"{source.stem}_edgetpu.tflite") for source in sources]
    placed = targets if out is None else [Path(out) / target.name for target in targets]
    if len(set(placed)) < len(placed):
        raise OptionError(f"the compiled files would overwrite each other in '{out}': rename the sources.")
    return placed


def _find_compiler(compiler: str | Path | None) -> str:
    wanted = compiler or os.environ.get(COMPILER_VARIABLE)
    found = shutil.which(wanted or "edgetpu_compiler")
    if found is None and wanted:
        raise CompilerError(f"'{wanted}' is no program that can be run; {_NOT_INSTALLED}")
    if found is None:
        raise CompilerError(_NOT_INSTALLED)
    return found


def _run(program: str, inputs: list[Path], folder: Path, timeout_s: int) -> str:
    command = [program, "-s", "-t", str(timeout_s), "-o", str(folder)]
    try:
        done = subprocess.run(
            [*command, *map(str, inputs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s + 10,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f"the Edge TPU compiler took more than {timeout_s} s; give timeout_s.") from error
    except OSError as error:
        raise CompilerError(f"cannot run '{program}': {error.strerror or error}; {_NOT_INSTALLED}") from error
    if done.returncode:
        raise CompilerError(f"the Edge TPU compiler ended with status {done.returncode}: {_last_lines(done.stdout)}")
    return done.stdout


def _collect(model: CompiledModel, made: Path, source: Path, target: Path) -> CompiledModel:
    """Check one model's files, put them in their place, and return its record with their names."""
    compiled = made.with_name(f"{made.stem}_edgetpu.tflite")
    log = compiled.with_suffix(".log")
    for file in (compiled, log):
        if not file.is_file():
            raise CompilerError(f"the Edge TPU compiler wrote no '{file.name}' for '{source}'.")
    rows = read_edgetpu_log(log).rows
    logged, parts = sum(row.count for row in rows), read_flatbuffer(compiled).operator_counts.get(COMPILED_OPERATOR, 0)
    if (logged, parts) != (model.n_operators, model.subgraphs):
        raise CompilerError(
            f"the Edge TPU compiler printed {model.n_operators} operators and {model.subgraphs} parts for '{source}', "
            f"but its log has {logged} and its file {parts}."
        )
    place(compiled, target)
    place(log, target.with_suffix(".log"))
    names = {"input": str(source), "output": str(target), "log": str(target.with_suffix(".log")), "rows": rows}
    return CompiledModel(**{key: getattr(model, key) for key in CompiledModel.__dataclass_fields__} | names)


# --- what the compiler writes ----------------------------------------------------------------------------------------


def read_edgetpu_log(path: str | Path) -> EdgeTpuLog:
    """Read the log that the compiler writes beside a compiled file (`<name>_edgetpu.log`).

    Raises:
        CompilerError: the file cannot be read, is no such log, or is cut short.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CompilerError(f"cannot read the compiler's log '{path}': {error}.") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    version = _version(lines[:1])
    names = [_after(line, f"{word}: ") for line, word in zip(lines[1:3], ("Input", "Output"), strict=False)]
    if version is None or len(names) < 2 or None in names or [line.split() for line in lines[3:4]] != [_TABLE_HEADER]:
        raise CompilerError(f"'{path}' is no log of the Edge TPU compiler, or is cut short.")
    rows = tuple(_row(line, str(path)) for line in lines[4:])
    if not rows:
        raise CompilerError(f"the compiler's log '{path}' is cut short: it names no operator.")
    return EdgeTpuLog(version, str(names[0]), str(names[1]), rows)


def parse_edgetpu_output(text: str) -> EdgeTpuCompilation:
    """Read what the compiler prints: of one model, or of several that were compiled together.

    Tables of operators, which it prints only on demand, are read where they are there.

    Raises:
        CompilerError: it tells of a failure, is cut short, or is no output of the compiler.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    version = _version(lines)
    took = next((m for line in lines if (m := re.match(r"Models? compiled successfully in (\d+) ms[.!]", line))), None)
    if version is None:
        raise CompilerError(f"this is no output of the Edge TPU compiler: {_last_lines(text)}")
    if took is None or "Compilation failed!" in lines:
        raise CompilerError(f"the Edge TPU compiler failed: {_last_lines(text)}")
    starts = [number for number, line in enumerate(lines) if line.startswith("Input model: ")]
    if not starts:
        raise CompilerError("the output of the Edge TPU compiler is cut short: it names no model.")
    blocks = [lines[start:stop] for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True)]
    return EdgeTpuCompilation(version, int(took.group(1)), tuple(_model(block) for block in blocks))


def _model(lines: list[str]) -> CompiledModel:
    name = _after(lines[0], "Input model: ")

    def text(label: str, *, default: str | None = None) -> str:
        found = next((rest for line in lines if (rest := _after(line, f"{label}: ")) is not None), default)
        if found is None:
            raise CompilerError(f"the output of the Edge TPU compiler on '{name}' is cut short: '{label}' is missing.")
        return found

    def number(label: str, *, default: str | None = None) -> int:
        found = text(label, default=default)
        if not re.fullmatch(r"\d+", found):
            raise CompilerError(f"the output of the Edge TPU compiler on '{name}' has '{label}: {found}'.")
        return int(found)

    rows = tuple(_rows(lines, str(name)))
    n_operators = number("Total number of operations")
    # The counts are printed only where not all is mapped.
    partly = any(line.startswith("Number of operations that will run") for line in lines)
    n_mapped = number("Number of operations that will run on Edge TPU", default=None if partly else str(n_operators))
    n_cpu = number("Number of operations that will run on CPU", default=None if partly else "0")
    model = CompiledModel(
        input=str(name),
        output=text("Output model"),
        log=text("Operation log", default=""),
        input_bytes=_bytes(text("Input size")),
        output_bytes=_bytes(text("Output size")),
        on_chip_bytes=_bytes(text("On-chip memory used for caching model parameters")),
        on_chip_free_bytes=_free_bytes(text),
        streamed_bytes=_bytes(text("Off-chip memory used for streaming uncached model parameters")),
        subgraphs=number("Number of Edge TPU subgraphs"),
        n_operators=n_operators,
        n_mapped=n_mapped,
        rows=rows,
    )
    counted = sum(row.count for row in rows), sum(row.count for row in rows if row.status == MAPPED)
    complete = counted == (n_operators, n_mapped) if rows else _LAST_LINE in lines
    if n_mapped + n_cpu != n_operators or not complete:
        raise CompilerError(
            f"the output of the Edge TPU compiler on '{name}' contradicts itself or is cut short: {n_operators} "
            f"operators, {n_mapped} and {n_cpu} on Edge TPU and CPU, {counted[0]} in the table."
        )
    return model


def _free_bytes(text: Any) -> int:
    """Return the cache that is left; up to version 2.0 the compiler printed what there was instead."""
    free = text("On-chip memory remaining for caching model parameters", default="")
    if free:
        return _bytes(free)
    available = _bytes(text("On-chip memory available for caching model parameters"))
    return available - _bytes(text("On-chip memory used for caching model parameters"))


def _rows(lines: list[str], name: str) -> Iterator[LogRow]:
    start = next((number for number, line in enumerate(lines) if line.split() == _TABLE_HEADER), len(lines))
    for line in lines[start + 1 :]:
        if line.startswith("Compilation "):
            return
        yield _row(line, name)


def _row(line: str, source: str) -> LogRow:
    match = _ROW.fullmatch(line)
    # A new compiler may have new words, but the first part of known ones is a line that was cut.
    if match is None or any(status.startswith(match["status"]) != (status == match["status"]) for status in STATUSES):
        raise CompilerError(f"the table of operators of '{source}' is cut short or damaged at '{line[:100]}'.")
    return LogRow(match["name"], int(match["count"]), match["status"])


def _counts(rows: tuple[LogRow, ...]) -> dict[tuple[str, str], int]:
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        counts[row.name, row.status] += row.count
    return dict(counts)


def _version(lines: list[str]) -> str | None:
    return next((match.group(1) for line in lines if (match := _VERSION.fullmatch(line))), None)


def _after(line: str, prefix: str) -> str | None:
    return line.removeprefix(prefix).strip() if line.startswith(prefix) else None


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB)", text)
    if match is None:
        raise CompilerError(f"the Edge TPU compiler printed the size '{text}', which is none.")
    return round(float(match.group(1)) * _UNITS[match.group(2)])


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.2f} MiB"


def _last_lines(text: str, count: int = 6) -> str:
    """Return the last lines of a program's output as one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(line[:300] for line in lines[-count:]) or "it printed nothing."
