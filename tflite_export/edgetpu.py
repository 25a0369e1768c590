"""Which operators of a `.tflite` file the Edge TPU runs, and why not the others, without the vendor's compiler.

What it asks of each operator is in `edgetpu_rules`; here is how the compiler cuts a graph of supported and other
operators: it is a TensorFlow Lite delegate that keeps one partition.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tflite_export.edgetpu_rules import (
    MAPPED,
    ON_CHIP_BYTES,
    OTHER_SUBGRAPH,
    UNSUPPORTED_TYPE,
    Call,
    Refusal,
    macs_of,
    newest_readable,
    parameter_bytes_of,
    refusal_of,
    short_name,
)
from tflite_export.errors import CompilerError
from tflite_export.flatbuffer import Subgraph, TfliteModel, read_bytes, read_flatbuffer

COMPILED_OPERATOR = "edgetpu-custom-op"

# What logs tell of as "used" plus "remaining" for parameters: between 6.1 and 8.0 MiB, as the executable needs.
_CACHE_FITS_BYTES = 6 * 2**20


@dataclass(frozen=True)
class OperatorVerdict:
    """What becomes of one operator.

    Attributes:
        index: its place in the file's order of execution.
        name: as the compiler's log has it: as in the file's schema, and CUSTOM for all custom operators.
        output: name of its first output tensor.
        shape: shape of that tensor.
        status: the words that the compiler's log has for it.
        reason: why it is not mapped, in plainer words; empty where it is.
        macs: multiplications of one inference.
        parameter_bytes: bytes of its weights and biases.
    """

    index: int
    name: str
    output: str
    shape: tuple[int, ...]
    status: str
    reason: str
    macs: int
    parameter_bytes: int

    @property
    def mapped(self) -> bool:
        """Whether it goes into the Edge TPU's part."""
        return self.status == MAPPED


@dataclass(frozen=True)
class Blocker:
    """The first operator at which the Edge TPU's part ends though it should not, and what that costs.

    Attributes:
        operator: the operator.
        operators_lost: it and all operators that read from it, directly or not: none of them is mapped.
        macs_lost: multiplications of these.
    """

    operator: OperatorVerdict
    operators_lost: int
    macs_lost: int


@dataclass(frozen=True)
class EdgeTpuReport:
    """What the Edge TPU's compiler (16, runtime 14) will make of a file, by its documented rules.

    Attributes:
        path: the file.
        sha256: its hash.
        operators: one verdict for each operator, in the file's order.
        parameter_bytes: weights and biases of the mapped operators.
        blocker: the first operator that the Edge TPU cannot run on what it has computed; None where there is none.
        rejections: why the compiler will not read the file at all, whatever else is said; empty where it will.
        cautions: what is mapped by the rules, but not known to be.
        advice: what to do about it.
    """

    path: Path
    sha256: str
    operators: tuple[OperatorVerdict, ...]
    parameter_bytes: int
    blocker: Blocker | None
    rejections: tuple[str, ...]
    cautions: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def n_mapped(self) -> int:
        """How many operators are mapped."""
        return sum(operator.mapped for operator in self.operators)

    @property
    def fully_mapped(self) -> bool:
        """Whether every operator is mapped, and the compiler will read the file."""
        return self.n_mapped == len(self.operators) > 0 and not self.rejections

    @property
    def macs(self) -> int:
        """Multiplications of one inference."""
        return sum(operator.macs for operator in self.operators)

    @property
    def mapped_macs(self) -> int:
        """Multiplications of the mapped operators."""
        return sum(operator.macs for operator in self.operators if operator.mapped)

    @property
    def cache(self) -> str:
        """Whether the parameters fit into the on-chip memory: "fits", "may not fit" or "streamed"."""
        if self.parameter_bytes <= _CACHE_FITS_BYTES:
            return "fits"
        return "may not fit" if self.parameter_bytes <= ON_CHIP_BYTES else "streamed"

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """How often each operator occurs with each status: the table of the compiler's log."""
        return dict(Counter((operator.name, operator.status) for operator in self.operators))

    def as_json(self) -> dict[str, Any]:
        """Return the report as values that `json.dump` takes."""
        derived = ("n_mapped", "fully_mapped", "macs", "mapped_macs", "cache")
        return asdict(self) | {"path": str(self.path)} | {name: getattr(self, name) for name in derived}

    def __str__(self) -> str:
        share = f", {100 * self.mapped_macs / self.macs:.1f} % of {self.macs / 1e6:.1f} M MACs" if self.macs else ""
        lines = [
            f"{self.path}: {self.n_mapped} of {len(self.operators)} operators on the Edge TPU{share} "
            "(by the rules of compiler 16, runtime 14)",
            f"  parameters on it: {self.parameter_bytes / 2**20:.2f} MiB of {ON_CHIP_BYTES / 2**20:.0f} MiB on-chip "
            f"memory, which the executable shares: {self.cache}",
            "",
            f"{'Operator':<30} {'Count':<10} Status",
            *(f"{name:<30} {count:<10} {status}" for (name, status), count in sorted(self.counts.items())),
        ]
        reasons = Counter((v.name, v.reason) for v in self.operators if not v.mapped and v.status != OTHER_SUBGRAPH)
        if reasons:
            lines += ["", "not mapped, and why:"]
            lines += [f"  {count} {name}: {reason}" for (name, reason), count in reasons.items()]
        if self.blocker:
            first = self.blocker.operator
            lines += [
                f"the first that stops the Edge TPU is operator {first.index}, {first.name} '{first.output}': "
                f"{self.blocker.operators_lost} operators of {self.blocker.macs_lost / 1e6:.1f} M MACs, itself and all "
                "that come after it, run on the CPU"
            ]
        lines += [f"the compiler will not read this file: {text}" for text in self.rejections]
        lines += [f"not known: {text}" for text in self.cautions]
        lines += list(self.advice)
        return "\n".join(lines)


def check_edgetpu(path: str | Path) -> EdgeTpuReport:
    """Say for every operator of a `.tflite` file whether the Edge TPU runs it, and why not.

    Only what is documented or seen in the compiler's logs is checked. What depends on its memory planning is not: it
    refuses some reshapes, transposes and resizes of large tensors, and whole files with very large activations.

    Args:
        path: the file, as an export writes it (not yet compiled).

    Raises:
        FlatbufferError: the file is damaged, or none.
        CompilerError: the file is compiled for the Edge TPU already.
    """
    data = read_bytes(Path(path))
    model = read_flatbuffer(data, name=str(path))
    if COMPILED_OPERATOR in model.custom_operators:
        raise CompilerError(f"'{path}' is compiled for the Edge TPU already: check the file that it was made from.")
    graph = model.subgraphs[0]
    calls = [Call(data, graph, operator) for operator in graph.operators]
    refusals = [refusal_of(call) for call in calls]
    supported = [refusal is None for refusal in refusals]
    partition = _partition(graph, supported)
    verdicts = tuple(
        _verdict(number, calls[number], refusals[number], mapped=number in partition) for number in range(len(calls))
    )
    return EdgeTpuReport(
        path=Path(path),
        sha256=model.sha256,
        operators=verdicts,
        parameter_bytes=parameter_bytes_of([call for number, call in enumerate(calls) if number in partition]),
        blocker=_blocker(graph, supported, partition, verdicts),
        rejections=_rejections(model),
        cautions=_cautions([call for number, call in enumerate(calls) if number in partition]),
        advice=_advice(verdicts),
    )


# --- the graph -------------------------------------------------------------------------------------------------------


def _partition(graph: Subgraph, supported: list[bool]) -> set[int]:
    """Return the operators that go to the Edge TPU: of the partitions that a delegate gets, the first.

    As TensorFlow Lite cuts a graph: operators of one kind (supported or not) are collected as long as all that they
    read is there, then those of the other kind, in turn. So an operator on a side branch is mapped although one
    before it in the order of execution is not, and an unsupported start (QUANTIZE of float images) stops nothing.
    """
    waiting, readers = _dependencies(graph)
    # Ready operators by kind; of a damaged file, operators in a circle never are.
    ready: dict[bool, list[int]] = {True: [], False: []}
    for number, n_missing in enumerate(waiting):
        if not n_missing:
            ready[supported[number]].append(number)
    kind = bool(ready[True]) and min(ready[True]) < min(ready[False], default=len(waiting))
    while ready[kind]:
        part: set[int] = set()
        while ready[kind]:
            number = ready[kind].pop()
            part.add(number)
            for reader in readers[number]:
                waiting[reader] -= 1
                if not waiting[reader]:
                    ready[supported[reader]].append(reader)
        if kind:
            return part
        kind = not kind
    return set()


def _dependencies(graph: Subgraph) -> tuple[list[int], list[list[int]]]:
    """Return for each operator how many others it waits for, and which others read from it."""
    producers = {output: number for number, operator in enumerate(graph.operators) for output in operator.outputs}
    readers: list[list[int]] = [[] for _ in graph.operators]
    waiting = []
    for number, operator in enumerate(graph.operators):
        before = {producers[index] for index in operator.inputs if index in producers}
        for other in before:
            readers[other].append(number)
        waiting.append(len(before))
    return waiting, readers


def _blocker(
    graph: Subgraph, supported: list[bool], partition: set[int], verdicts: tuple[OperatorVerdict, ...]
) -> Blocker | None:
    outputs = {index for number in partition for index in graph.operators[number].outputs}
    for number, operator in enumerate(graph.operators):
        if not supported[number] and not outputs.isdisjoint(operator.inputs):
            behind = _behind(graph, number)
            return Blocker(verdicts[number], len(behind), sum(verdicts[other].macs for other in behind))
    return None


def _behind(graph: Subgraph, first: int) -> set[int]:
    """Return an operator and all that read from it, directly or not."""
    _, readers = _dependencies(graph)
    behind, waiting = {first}, [first]
    while waiting:
        new = set(readers[waiting.pop()]) - behind
        behind |= new
        waiting += new
    return behind


def _verdict(number: int, call: Call, refusal: Refusal | None, *, mapped: bool) -> OperatorVerdict:
    if refusal is None and not mapped:
        refusal = Refusal(OTHER_SUBGRAPH, "it comes after an operator that is not mapped")
    output = call.outputs[0] if call.outputs else None
    return OperatorVerdict(
        index=number,
        name="CUSTOM" if call.operator.custom else call.name,
        output=short_name(output.name) if output else "",
        shape=output.shape if output else (),
        status=refusal.status if refusal else MAPPED,
        reason=refusal.reason if refusal else "",
        macs=macs_of(call),
        parameter_bytes=parameter_bytes_of([call]),
    )


# --- the file --------------------------------------------------------------------------------------------------------


def _rejections(model: TfliteModel) -> tuple[str, ...]:
    """Return why the compiler cannot even parse the file: operators that are newer than it."""
    newer = {
        (operator.name, operator.version)
        for operator in model.operators
        if not operator.custom and operator.version > newest_readable(operator.name)
    }
    return tuple(
        f"version {version} of {name} is newer than the compiler, which stops with \"Didn't find op for builtin "
        f"opcode '{name}' version '{version}'\""
        for name, version in sorted(newer)
    )


def _cautions(mapped: list[Call]) -> tuple[str, ...]:
    several = [call for call in mapped if call.name == "FULLY_CONNECTED" and len(call.input(1).scales) > 1]
    if not several:
        return ()
    return (
        f"{len(several)} FULLY_CONNECTED with one scale for each output, which TensorFlow writes since 2024 and the "
        "compiler (2021) was not made for: export dense layers with one scale",
    )


def _advice(verdicts: tuple[OperatorVerdict, ...]) -> tuple[str, ...]:
    floats = sum(verdict.status == UNSUPPORTED_TYPE and "float" in verdict.reason for verdict in verdicts)
    if verdicts and floats > len(verdicts) / 2:
        return ('The Edge TPU computes in 8 bits: export the model with quantize="int8" and calibration images.',)
    return ()
