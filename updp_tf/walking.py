"""Run a graph block by block over all images, holding only what later blocks read.

Activations at block borders live in a `Memory`: their size on disk grows with the number of images, the memory does
not. Each unit (a block, or the calls between two blocks) runs once over all images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from threadpoolctl import threadpool_limits

from updp_tf.errors import CalibrationError
from updp_tf.folding import fold_norms_in
from updp_tf.graph import clone_layer, n_elements, run_nodes
from updp_tf.memory import Memory, calibration_images
from updp_tf.structure import Block, ModelGraph, Node, Ref, Shape

Progress = Callable[[int, int, str], None]
"""Called with (units done, units in all, what is being done)."""

Tensors = dict[Ref, np.ndarray]

BATCH_ELEMENTS = 16_000_000
"""Elements that the largest tensor of a batch has at most, about."""

MAX_BATCH = 128
"""Images at a time at most."""


@dataclass(frozen=True)
class Unit:
    """A block, or a run of calls between blocks, and the tensors at its border."""

    nodes: tuple[str, ...]
    block: Block | None
    reads: tuple[Ref, ...]
    writes: tuple[Ref, ...]

    @property
    def name(self) -> str:
        """Of its last node."""
        return self.nodes[-1]


def units(graph: ModelGraph, blocks: Iterable[Block]) -> tuple[Unit, ...]:
    """Cut a graph into blocks and what lies between them, in an order in which they can run."""
    block_by_node = {name: block for block in blocks for name in block.nodes}
    # A block runs as a whole at the place of its last node: nothing outside reads it before.
    groups: list[tuple[Block | None, list[str]]] = []
    for node in graph:
        if node.is_input:
            continue
        block = block_by_node.get(node.name)
        if block is not None:
            if node.name == block.nodes[-1]:
                groups.append((block, list(block.nodes)))
        elif groups and groups[-1][0] is None:
            groups[-1][1].append(node.name)
        else:
            groups.append((None, [node.name]))
    return tuple(_unit(graph, block, names) for block, names in groups)


def _unit(graph: ModelGraph, block: Block | None, names: Sequence[str]) -> Unit:
    inside = set(names)
    outputs = set(graph.output_refs)
    reads: dict[Ref, None] = {}
    writes: dict[Ref, None] = {}
    for name in names:
        node = graph.by_name[name]
        reads |= dict.fromkeys(ref for ref in node.inputs if ref.node not in inside)
        for index in range(len(node.shapes)):
            ref = Ref(name, index)
            if ref in outputs or any(reader not in inside for reader in graph.readers.get(ref, ())):
                writes[ref] = None
    return Unit(tuple(names), block, tuple(reads), tuple(writes))


class Walk:
    """One pass over all images, unit by unit.

    Args:
        graph: whose nodes are run.
        images: calibration data, as `memory.image_batches` reads it.
        memory: where activations live; the caller closes it.
        batch_size: images at a time; chosen for each part by its largest tensor, where None.
    """

    def __init__(self, graph: ModelGraph, images: Any, memory: Memory, *, batch_size: int | None = None) -> None:
        if len(graph.input_refs) != 1:
            raise CalibrationError(
                f"'{graph.name}' has {len(graph.input_refs)} inputs; calibration works for models with one input."
            )
        self.graph = graph
        self.memory = memory
        self.batch_size = batch_size
        (source,) = graph.input_refs
        shape = graph.shape(source)
        self.source = source
        self.images = calibration_images(images, shape=shape, memory=memory)
        self.n = len(self.images)

    def start(self) -> Tensors:
        """Return the tensors that are there before the first unit ran."""
        return {self.source: self.images}

    def batches(self, shapes: Iterable[Shape]) -> Iterator[slice]:
        """Yield the images of each batch, for work on tensors of some shapes."""
        size = self.batch_size or batch_size_of(shapes)
        for start in range(0, self.n, size):
            yield slice(start, min(start + size, self.n))

    def run(
        self,
        nodes: Sequence[Node],
        reads: Sequence[Ref],
        writes: Mapping[Ref, Ref],
        tensors: Mapping[Ref, np.ndarray],
    ) -> Tensors:
        """Run calls over all images and return what they write for others.

        Args:
            nodes: to run: a unit's own, or a student's in its place.
            reads: tensors from outside.
            writes: name under which a tensor is kept -> the tensor of `nodes`.
            tensors: what was written before.
        """
        written: Tensors = {}
        for part, batches in self.stream(nodes, reads, tuple(writes.values()), tensors):
            for ref, batch in zip(writes, batches, strict=True):
                if ref not in written:
                    written[ref] = self.memory.allocate((self.n, *batch.shape[1:]))
                written[ref][part] = batch
        return written

    def stream(
        self, nodes: Sequence[Node], reads: Sequence[Ref], refs: Sequence[Ref], tensors: Mapping[Ref, np.ndarray]
    ) -> Iterator[tuple[slice, list[np.ndarray]]]:
        """Yield tensors inside a unit, batch by batch, running only the calls they depend on."""
        needed = _needed_for(nodes, refs)
        inside = {node.name for node in needed}
        used = {ref for node in needed for ref in node.inputs if ref.node not in inside} | set(refs)
        sources = [ref for ref in reads if ref in used]
        part_graph = self._folded(needed, sources, refs)
        for part in self.batches(shape for node in part_graph for shape in node.shapes):
            values = {ref: keras.ops.convert_to_tensor(np.ascontiguousarray(tensors[ref][part])) for ref in sources}
            run_nodes(part_graph, values)
            yield part, [as_float32(values[ref]) for ref in part_graph.outputs]

    def renew_norms(self, nodes: Sequence[Node], reads: Sequence[Ref], tensors: Mapping[Ref, np.ndarray]) -> list[Node]:
        """Return a unit's calls with the exact mean and variance of its input in each BatchNormalization, in order.

        Everything before a norm runs in inference mode with its own statistics renewed. A norm that is called more
        than once keeps its statistics: it reads several distributions. The layers that change are copies.

        Args:
            nodes: all calls of the unit.
            reads: tensors that the unit reads.
            tensors: what was written before.
        """
        renewed = [self._with_own_norm(node) for node in nodes]
        for node, old in zip(renewed, nodes, strict=True):
            if node is old:
                continue
            axes = tuple(axis for axis in range(len(node.shapes[0])) if axis != node.layer.axis % len(node.shapes[0]))
            n, mean, spread = 0, 0.0, 0.0
            for _, (batch,) in self.stream(renewed, reads, node.inputs, tensors):
                # Chan's merging of means and sums of squares: exact, with no cancellation.
                count = batch.size // batch.shape[node.layer.axis]
                batch_mean = batch.mean(axis=axes, dtype=np.float64)
                batch_spread = batch.var(axis=axes, dtype=np.float64) * count
                change = batch_mean - mean
                spread = spread + batch_spread + change**2 * (n * count / (n + count))
                mean = mean + change * (count / (n + count))
                n += count
            node.layer.moving_mean.assign(mean)
            node.layer.moving_variance.assign(spread / n)
        return renewed

    def _with_own_norm(self, node: Node) -> Node:
        """Return a call with a copy of its norm, or the call itself where nothing of it is renewed."""
        if node.kind != "BatchNormalization" or node.name not in self.graph.called_once:
            return node
        layer = clone_layer(node.layer, node.layer.name, input_shape=self.graph.shape(node.inputs[0]))
        return replace(node, layer=layer)

    def _folded(self, nodes: Sequence[Node], reads: Sequence[Ref], writes: Sequence[Ref]) -> ModelGraph:
        """Return calls as a graph of their own with norms folded: eager norms cost as much as the convolutions."""
        names = dict.fromkeys(ref.node for ref in reads)
        sources = [
            replace(self.graph.by_name[name], layer=None, kind="InputLayer", args=(), kwargs={}) for name in names
        ]
        part = ModelGraph(self.graph.name, (*sources, *nodes), inputs=tuple(reads), outputs=tuple(writes))
        return fold_norms_in(part)[0]

    def release(self, later: Sequence[Unit], *tensors: Tensors, keep: Iterable[np.ndarray] = ()) -> None:
        """Drop what no later unit reads and what is no output of the model.

        Args:
            later: units that are still to run.
            tensors: what was written; entries are taken out.
            keep: arrays to leave alone though nothing reads them.
        """
        needed = {ref for unit in later for ref in unit.reads} | set(self.graph.output_refs) | {self.source}
        gone: dict[int, np.ndarray] = {}
        for group in tensors:
            for ref in [ref for ref in group if ref not in needed]:
                array = group.pop(ref)
                gone[id(array)] = array
        held = {id(array) for group in tensors for array in group.values()} | {id(array) for array in keep}
        for key, array in gone.items():
            if key not in held:
                self.memory.release(array)


def batch_size_of(shapes: Iterable[Shape]) -> int:
    """Images at a time such that the largest tensor of a batch has about `BATCH_ELEMENTS` elements at most."""
    return int(np.clip(BATCH_ELEMENTS // max(max(map(n_elements, shapes)), 1), 1, MAX_BATCH))


def default_batch_size(graph: ModelGraph) -> int:
    """Images at a time for a whole network."""
    return batch_size_of(shape for node in graph for shape in node.shapes)


def one_blas_thread() -> threadpool_limits:
    """Return a context in which NumPy and SciPy solve on one thread.

    Small systems gain nothing by more, and spinning BLAS threads take the cores from the backend: pruning a network
    took 94 s instead of 79 s on two idle cores, and a 300 x 300 Cholesky 45 ms instead of 1.4 ms on busy ones.
    """
    return threadpool_limits(limits=1, user_api="blas")


def as_float32(tensor: Any) -> np.ndarray:
    """Return a backend tensor as a float32 array."""
    return np.asarray(keras.ops.convert_to_numpy(tensor), dtype="float32")


def _needed_for(nodes: Sequence[Node], refs: Sequence[Ref]) -> tuple[Node, ...]:
    needed = {ref.node for ref in refs}
    for node in reversed(nodes):
        if node.name in needed:
            needed |= {read.node for read in node.inputs}
    return tuple(node for node in nodes if node.name in needed)
