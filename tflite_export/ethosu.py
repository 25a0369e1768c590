"""Compile `.tflite` files for Arm's Ethos-U NPUs with the vendor's compiler, `ethos-u-vela` (an extra).

It runs in a process of its own: on files that it does not expect it ends with a segmentation fault. Its exit status is
0 even where nothing runs on the NPU, so the operators that stay on the CPU are read from the compiled file.
"""

import csv
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tflite_export.errors import CompilerError, OptionError
from tflite_export.files import check_target, place
from tflite_export.flatbuffer import read_flatbuffer

COMPILED_OPERATOR = "ethos-u"
ACCELERATORS = (
    "ethos-u55-32",
    "ethos-u55-64",
    "ethos-u55-128",
    "ethos-u55-256",
    "ethos-u65-256",
    "ethos-u65-512",
    "ethos-u85-128",
    "ethos-u85-256",
    "ethos-u85-512",
    "ethos-u85-1024",
    "ethos-u85-2048",
)

_KIB = 2**10
_WARNING = re.compile(r"Warning \((?P<rule>[^)]*)\) operator: (?P<name>\S+), ofm: '(?P<output>.*)'")


@dataclass(frozen=True)
class CpuOperator:
    """An operator that the compiler left on the CPU.

    Attributes:
        name: as the file's schema spells it.
        output: name of its first output tensor.
        reason: the compiler's reason, in its own words and lines; empty where it gives none.
    """

    name: str
    output: str
    reason: str


@dataclass(frozen=True)
class EthosUCompilation:
    """What the compiler made of a file. Latency and memory are the compiler's estimates, not measurements.

    Attributes:
        path: the compiled file.
        source: the file it was made from.
        accelerator: the NPU that it was compiled for.
        system: the compiler's model of clocks and memories that the estimates hold for.
        memory_mode: where in it weights and activations lie.
        compiler_version: version of ethos-u-vela.
        n_operators: operators of the source.
        cpu_operators: those that stay on the CPU.
        estimated_ms: latency of one inference of the NPU's part, by the compiler's estimate; None where there is none.
        estimated_inferences_per_second: its inverse.
        estimated_sram_bytes: most SRAM that is used at a time, by the compiler's estimate.
        estimated_dram_bytes: likewise of DRAM.
        estimated_flash_bytes: likewise of flash, on and off the chip: weights and commands.
        npu_macs: multiplications of one inference on the NPU, as the compiler counts them.
    """

    path: Path
    source: Path
    accelerator: str
    system: str
    memory_mode: str
    compiler_version: str
    n_operators: int
    cpu_operators: tuple[CpuOperator, ...]
    estimated_ms: float | None
    estimated_inferences_per_second: float | None
    estimated_sram_bytes: int
    estimated_dram_bytes: int
    estimated_flash_bytes: int
    npu_macs: int

    @property
    def n_cpu_operators(self) -> int:
        """How many operators stay on the CPU."""
        return len(self.cpu_operators)

    def as_json(self) -> dict[str, Any]:
        """Return the record as values that `json.dump` takes."""
        paths = {"path": str(self.path), "source": str(self.source)}
        return asdict(self) | paths | {"n_cpu_operators": self.n_cpu_operators}

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.accelerator}, {self.n_cpu_operators} of {self.n_operators} operators on the CPU"]
        if self.estimated_ms is None:
            lines.append("  nothing runs on the NPU")
        else:
            lines.append(
                f"  compiler's estimate, not measured: {self.estimated_ms:.3g} ms an inference "
                f"({self.estimated_inferences_per_second:.4g} a second) on the NPU, {self.npu_macs / 1e6:.1f} M MACs"
            )
        memories = (
            ("SRAM", self.estimated_sram_bytes),
            ("DRAM", self.estimated_dram_bytes),
            ("flash", self.estimated_flash_bytes),
        )
        used = ", ".join(f"{n_bytes / _KIB:,.0f} KiB {name}" for name, n_bytes in memories if n_bytes)
        lines.append(f"  compiler's estimate of memory: {used or 'none'}")
        lines.append(f"  for the system {self.system}, {self.memory_mode}; ethos-u-vela {self.compiler_version}")
        reasons = Counter((operator.name, _outline(operator.reason)) for operator in self.cpu_operators)
        if reasons:
            lines.append("on the CPU, and the compiler's reasons:")
        lines += [f"  {count} {name}: {reason}" for (name, reason), count in reasons.items()]
        if self.n_cpu_operators == self.n_operators:
            lines.append('The NPU computes in 8 or 16 bits: export the model with quantize="int8".')
        return "\n".join(lines)


def compile_ethosu(
    path: str | Path,
    accelerator: str = "ethos-u55-256",
    out: str | Path | None = None,
    *,
    timeout_s: int = 600,
    force: bool = False,
) -> EthosUCompilation:
    """Compile a `.tflite` file for an Ethos-U NPU; say what stays on the CPU, and what the compiler estimates.

    The estimates hold for the compiler's default system of that NPU. Operators on the CPU are not in them.

    Args:
        path: the file, as an export writes it.
        accelerator: the NPU and its number of multipliers, one of `ACCELERATORS`.
        out: where the compiled file goes, by default `<name>_vela.tflite` beside it.
        timeout_s: most seconds that the compiler may take.
        force: replace a file that exists.

    Raises:
        OptionError: there is no such accelerator.
        FlatbufferError: the file is damaged, or none.
        CompilerError: the compiler is not installed, failed, or took too long; or the file is compiled already.
        OutputError: the target exists already or cannot be written.
    """
    if accelerator not in ACCELERATORS:
        raise OptionError(f"there is no accelerator '{accelerator}': choose one of {', '.join(ACCELERATORS)}.")
    if importlib.util.find_spec("ethosu") is None:
        raise CompilerError("the Ethos-U compiler is not installed: pip install 'updp-tf[ethosu]'.")
    source = Path(path)
    model = read_flatbuffer(source)
    if COMPILED_OPERATOR in model.custom_operators:
        raise CompilerError(f"'{source}' is compiled for Ethos-U already.")
    target = Path(out) if out is not None else source.with_name(f"{source.stem}_vela.tflite")
    check_target(target, force=force)
    with tempfile.TemporaryDirectory(prefix="tflite_export_") as name:
        folder = Path(name)
        shutil.copyfile(source, folder / "model.tflite")
        printed = _run(folder, source, accelerator, timeout_s)
        made = folder / "out" / "model_vela.tflite"
        summaries = list((folder / "out").glob("model_summary_*.csv"))
        if not made.is_file() or len(summaries) != 1:
            raise CompilerError(f"the Ethos-U compiler wrote no file for '{source}': {_last_lines(printed)}")
        cpu_operators = tuple(_cpu_operators(made, dict(_reasons(printed))))
        estimates = _summary(summaries[0])
        place(made, target)
    return EthosUCompilation(
        path=target,
        source=source,
        accelerator=accelerator,
        compiler_version=_version(),
        n_operators=len(model.subgraphs[0].operators),
        cpu_operators=cpu_operators,
        **estimates,
    )


def _run(folder: Path, source: Path, accelerator: str, timeout_s: int) -> str:
    # Not `-m ethosu.vela.vela`: that module does nothing when it is run, with exit status 0.
    command = [sys.executable, "-P", "-m", "ethosu.vela", "model.tflite", "--accelerator-config", accelerator]
    try:
        done = subprocess.run(
            [*command, "--output-dir", "out"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CompilerError(
            f"the Ethos-U compiler took more than {timeout_s} s on '{source}'; give timeout_s."
        ) from error
    if done.returncode:
        how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        raise CompilerError(f"the Ethos-U compiler {how} on '{source}': {_last_lines(done.stdout)}")
    return done.stdout


def _outline(reason: str) -> str:
    """Return the first line of a reason, without the name of a tensor at its end."""
    return re.sub(r" \([^()]*\)$", "", reason.splitlines()[0]) if reason else "none given"


def _cpu_operators(made: Path, reasons: dict[tuple[str, str], str]) -> Iterator[CpuOperator]:
    graph = read_flatbuffer(made).subgraphs[0]
    reasons_by_output = {output: reason for (_, output), reason in reasons.items()}
    for operator in graph.operators:
        if operator.name != COMPILED_OPERATOR:
            output = graph.tensors[operator.outputs[0]].name if operator.outputs else ""
            # An operator with a fused activation is told of by the name of the activation.
            reason = reasons.get((operator.name, output)) or reasons_by_output.get(output, "")
            yield CpuOperator(operator.name, output, reason)


def _reasons(printed: str) -> Iterator[tuple[tuple[str, str], str]]:
    """Give the compiler's reason for each operator that it warns of, by name and output tensor."""
    key: tuple[str, str] | None = None
    reason: list[str] = []
    for line in [*printed.splitlines(), ""]:
        if match := _WARNING.fullmatch(line.strip()):
            key, reason = (match["name"], match["output"]), []
        elif key is not None and line.strip():
            reason.append(line.strip().removeprefix("Reason: "))
        elif key is not None:
            yield key, "\n".join(reason)
            key = None


def _summary(path: Path) -> dict[str, Any]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        (row,) = rows
        seconds, rate = float(row["inference_time"]), float(row["inferences_per_second"])
        kib = {name: float(row[f"{name}_memory_used"]) for name in ("sram", "dram", "on_chip_flash", "off_chip_flash")}
        macs = int(float(row["nn_macs"]))
        system, memory_mode = row["system_config"], row["memory_mode"]
    except (KeyError, ValueError) as error:
        raise CompilerError(f"the Ethos-U compiler's summary '{path.name}' has another form than expected.") from error
    return {
        "system": system,
        "memory_mode": memory_mode,
        "estimated_ms": 1000 * seconds if seconds > 0 else None,
        "estimated_inferences_per_second": rate if seconds > 0 else None,
        "estimated_sram_bytes": round(kib["sram"] * _KIB),
        "estimated_dram_bytes": round(kib["dram"] * _KIB),
        "estimated_flash_bytes": round((kib["on_chip_flash"] + kib["off_chip_flash"]) * _KIB),
        "npu_macs": macs,
    }


def _version() -> str:
    return importlib.metadata.version("ethos-u-vela")


def _last_lines(text: str, count: int = 6) -> str:
    """Return the last lines of a program's output as one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(line[:300] for line in lines[-count:]) or "it printed nothing."
