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

from updp_tf import rules
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

ROWS_IN_CACHE = 512
"""Rows of channels that statistics are computed of at a time."""

MAX_BATCH = 128
"""Images at a time at most."""

LARGEST = 1e15
"""Magnitude of activations beyond which float32 sums of a few thousand squares overflow."""


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

    def run(self, nodes: Sequence[Node], writes: Mapping[Ref, Ref], tensors: Mapping[Ref, np.ndarray]) -> Tensors:
        """Run calls over all images and return what they write for others.

        Args:
            nodes: to run: a unit's own, or a student's in its place.
            writes: name under which a tensor is kept -> the tensor of `nodes`.
            tensors: what was written before.
        """
        written: Tensors = {}
        for part, batches in self.stream(nodes, tuple(writes.values()), tensors):
            for ref, batch in zip(writes, batches, strict=True):
                if ref not in written:
                    written[ref] = self.memory.allocate((self.n, *batch.shape[1:]))
                written[ref][part] = batch
        return written

    def stream(
        self, nodes: Sequence[Node], refs: Sequence[Ref], tensors: Mapping[Ref, np.ndarray]
    ) -> Iterator[tuple[slice, list[np.ndarray]]]:
        """Yield tensors inside a unit, batch by batch, running only the calls behind what was written before.

        The arrays are the backend's own: read them, do not write to them.

        Raises:
            CalibrationError: a tensor holds NaN, infinite values or values that no fit could add up.
        """
        needed = _needed_for(nodes, refs, tensors)
        inside = {node.name for node in needed}
        used = {ref for node in needed for ref in node.inputs if ref.node not in inside} | set(refs)
        sources = [ref for ref in tensors if ref in used]
        part_graph = self._folded(needed, sources, refs)
        for part in self.batches(shape for node in part_graph for shape in node.shapes):
            values = {ref: keras.ops.convert_to_tensor(np.ascontiguousarray(tensors[ref][part])) for ref in sources}
            run_nodes(part_graph, values)
            batches = [as_float32(values[ref]) for ref in part_graph.outputs]
            if not all(map(_is_tame, batches)):
                raise CalibrationError(_say_who_is_wild(part_graph, values))
            yield part, batches

    def renew_norms(self, nodes: Sequence[Node], tensors: Tensors) -> list[Node]:
        """Return a unit's calls with the exact mean and variance of its input in each BatchNormalization, in order.

        Everything before a norm runs in inference mode with its own statistics renewed. A norm that is called more
        than once keeps its statistics: it reads several distributions. The layers that change are copies.

        Args:
            nodes: all calls of the unit.
            tensors: what was written before. What the norms write is added, so that what follows need not start over;
                `release` takes it out again. On disk where memory is used up: running the calls anew, with the norms
                folded, would round otherwise.
        """
        renewed = [self._with_own_norm(node) for node in nodes]
        for node, old in zip(renewed, nodes, strict=True):
            if node is old:
                continue
            axis = node.layer.axis % len(node.shapes[0])
            statistics = _Statistics()
            held: np.ndarray | None = None
            for part, (batch,) in self.stream(renewed, node.inputs, tensors):
                statistics.add(np.moveaxis(batch, axis, -1).reshape(-1, batch.shape[axis]))
                if part.start == 0 and axis == batch.ndim - 1:
                    held = self.memory.allocate((self.n, *batch.shape[1:]))
                if held is not None:
                    held[part] = batch
            node.layer.moving_mean.assign(statistics.mean)
            node.layer.moving_variance.assign(statistics.variance)
            if held is not None and (norm := rules.norm(node, node.shapes[0])) is not None:
                _scale_in_place(held.reshape(-1, held.shape[-1]), norm.scale, norm.shift)
                tensors[Ref(node.name)] = held
        return renewed

    def forget_behind(self, before: Sequence[Node], after: Sequence[Node], tensors: Tensors) -> None:
        """Drop what calls of a unit wrote before some of them were replaced."""
        stale: set[str] = set()
        for old, new in zip(before, after, strict=True):
            if old is not new or any(ref.node in stale for ref in new.inputs):
                stale.add(new.name)
        for ref in [ref for ref in tensors if ref.node in stale]:
            self.memory.release(tensors.pop(ref))

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
    """Return a backend tensor as a float32 array, which may be the tensor's own memory."""
    if keras.backend.backend() == "tensorflow":
        return np.asarray(tensor).astype("float32", copy=False)  # where it lies: Keras makes a copy
    return np.asarray(keras.ops.convert_to_numpy(tensor), dtype="float32")


def _is_tame(array: np.ndarray) -> bool:
    """True where all values are finite and none is so large that sums of squares overflow."""
    return array.size == 0 or bool(array.min() >= -LARGEST and array.max() <= LARGEST)  # NaN compares as False


def _say_who_is_wild(graph: ModelGraph, values: Mapping[Ref, Any]) -> str:
    """Name the first call that writes values which no fit can use."""
    arrays = ((node.name, as_float32(values[Ref(node.name, i)])) for node in graph for i in range(len(node.shapes)))
    name, array = next((name, array) for name, array in arrays if not _is_tame(array))
    what = f"values up to {np.abs(array).max():.0e}" if np.isfinite(array).all() else "NaN or infinite values"
    return (
        f"'{name}' of '{graph.name}' writes {what} on the calibration images, which nothing can be fitted to: check "
        "its weights, the norms in front of it, and that the images are scaled as the model wants them."
    )


def _needed_for(nodes: Sequence[Node], refs: Sequence[Ref], there: Mapping[Ref, np.ndarray]) -> tuple[Node, ...]:
    """Return the calls that write tensors, back to what is there."""
    needed = {ref.node for ref in refs if ref not in there}
    for node in reversed(nodes):
        if node.name in needed:
            needed |= {read.node for read in node.inputs if read not in there}
    return tuple(node for node in nodes if node.name in needed)


class _Statistics:
    """Running mean and variance of channels.

    A few hundred rows at a time are added up in float32, less an offset close to the mean, and those sums in float64:
    as exact as float64 throughout to 1e-6, and seven times faster.
    """

    def __init__(self) -> None:
        self._n = 0
        self._offset: np.ndarray | None = None
        self._sum: Any = 0.0
        self._squares: Any = 0.0

    def add(self, rows: np.ndarray) -> None:
        """Add rows of shape (n, channels)."""
        if self._offset is None:
            self._offset = rows[:ROWS_IN_CACHE].mean(axis=0)
        for start in range(0, len(rows), ROWS_IN_CACHE):
            shifted = rows[start : start + ROWS_IN_CACHE] - self._offset
            self._sum = self._sum + shifted.sum(axis=0).astype(np.float64)
            self._squares = self._squares + np.square(shifted).sum(axis=0).astype(np.float64)
        self._n += len(rows)

    @property
    def mean(self) -> np.ndarray:
        """Of each channel."""
        return self._offset + self._sum / self._n

    @property
    def variance(self) -> np.ndarray:
        """Of each channel, of the rows as a population."""
        return np.maximum(self._squares / self._n - np.square(self._sum / self._n), 0.0)


def _scale_in_place(rows: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> None:
    scale, shift = scale.astype("float32"), shift.astype("float32")
    for start in range(0, len(rows), ROWS_IN_CACHE):
        part = rows[start : start + ROWS_IN_CACHE]
        np.multiply(part, scale, out=part)
        np.add(part, shift, out=part)
