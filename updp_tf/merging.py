"""Put forms in the place of blocks: a graph with edits in it, and a plain Keras model from that.

With calibration images the forms are fitted in sequence: each from what the *student* (the network with the edits so
far) writes at the block's entry to what the *teacher* (the original) writes at its exit, so that a fit repairs the
error of those before it. Norms of kept blocks behind an edit are re-estimated, exactly, one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from updp_tf import affine
from updp_tf.affine import AffineConv
from updp_tf.blocks import Blocks, read_stages
from updp_tf.errors import MergeError
from updp_tf.forms import Fitted, SkipMode, cost_of_fitted, form_by_name, layer_specs, scale_spec
from updp_tf.graph import build_model, run_nodes
from updp_tf.memory import DEFAULT_LIMIT_BYTES, Memory
from updp_tf.refitting import refit_closing_layer
from updp_tf.scoring import Sampler, fit_forms, warn_if_short
from updp_tf.solving import RIDGE
from updp_tf.structure import Block, LayerSpec, ModelGraph, Node, Ref, Shape, as_images, map_refs
from updp_tf.walking import Progress, Tensors, Unit, Walk, as_float32, one_blas_thread, units

BLOCK_TOLERANCE = 1e-5
"""Largest relative error of a merged block's layers in float32 against its map in float64."""

ROUNDING = 1e-6
"""The same in parts of the magnitudes that float32 adds up: weights that are fitted to few images cancel."""

NETWORK_TOLERANCE = 1e-4
"""Largest relative error of the built model against the graph it was built from."""


@dataclass(frozen=True)
class Choice:
    """A form chosen for a block."""

    block: str
    form: str
    skip: SkipMode


@dataclass(frozen=True)
class MergedBlock:
    """What became of one block.

    Attributes:
        name: of the block.
        form: it took.
        kind: `exact` (the block was linear), `fitted` (to images) or `linearized` (from its own weights).
        r2: explained part of its output on held-out images, None without images.
        macs_before: of the block.
        macs_after: of the form.
    """

    name: str
    form: str
    kind: str
    r2: float | None
    macs_before: int
    macs_after: int


@dataclass(frozen=True, eq=False)
class Merged:
    """A merged network.

    Attributes:
        model: plain Keras model.
        blocks: what became of each merged block.
        fitted: the maps that were put in, by block name.
        refitted: kept layers that were refitted, with the ridge that held-out images chose.
        error: largest relative error of the model against the graph it was built from, on probe images.
    """

    model: Any
    blocks: tuple[MergedBlock, ...]
    fitted: Mapping[str, Fitted]
    refitted: Mapping[str, float]
    error: float


def merge_fitted(blocks: Blocks, choices: Sequence[Choice], fitted: Mapping[str, Fitted], *, kind: str) -> Merged:
    """Merge with maps that are there already, by block name; nothing else of the network changes."""
    edits = {one.block: build_edit(blocks.graph, blocks[one.block], fitted[one.block]) for one in choices}
    rng = np.random.default_rng(0)
    for one in choices:
        block = blocks[one.block]
        shape = tuple(axis or 32 for axis in block.entry_shape[1:])
        _verify_edit(block, edits[one.block], fitted[one.block], rng.normal(size=(2, *shape)))
    graph = assemble(blocks, edits, {})
    return _finish(blocks, graph, choices, fitted, {}, kind, probe=None)


def merge_in_sequence(
    blocks: Blocks,
    choices: Sequence[Choice],
    images: Any,
    *,
    fitted: Mapping[str, Fitted] | None = None,
    in_sequence: bool = True,
    reestimate: bool = True,
    refit: bool = False,
    ridge: float = RIDGE,
    seed: int = 0,
    memory_bytes: int = DEFAULT_LIMIT_BYTES,
    progress: Progress | None = None,
) -> Merged:
    """Fit the chosen forms to images, block by block, and merge them.

    Args:
        blocks: of the model.
        choices: a form for each block that goes.
        images: calibration data, as `image_batches` reads it.
        fitted: maps to put in as they are instead of fitting, by block name.
        in_sequence: fit from the student's activations; from the original's where False.
        reestimate: renew the norms behind the first edit.
        refit: refit the layers that close kept blocks behind the first edit, where held-out images gain by it.
        ridge: strength in mean eigenvalues.
        seed: of the sampled positions.
        memory_bytes: activations beyond this go to disk.
        progress: called after each part of the network.
    """
    pass_ = _Sequence(blocks, choices, fitted, in_sequence, reestimate, refit, ridge, seed)
    with Memory(memory_bytes) as memory, one_blas_thread():
        return pass_.run(Walk(blocks.graph, images, memory), progress)


@dataclass(frozen=True, eq=False)
class Edit:
    """Calls that stand for a block, and the tensor that its readers read now."""

    nodes: tuple[Node, ...]
    exit: Ref


class _Sequence:
    """The state of one walk: teacher and student side by side."""

    def __init__(
        self,
        blocks: Blocks,
        choices: Sequence[Choice],
        given: Mapping[str, Fitted] | None,
        in_sequence: bool,
        reestimate: bool,
        refit: bool,
        ridge: float,
        seed: int,
    ) -> None:
        self.blocks, self.graph = blocks, blocks.graph
        self.choices = {one.block: one for one in choices}
        self.given = given
        self.in_sequence, self.reestimate, self.refit = in_sequence, reestimate, refit
        self.ridge, self.seed = ridge, seed
        self.fitted: dict[str, Fitted] = {}
        self.edits: dict[str, Edit] = {}
        self.own: dict[str, Node] = {}
        self.refitted: dict[str, float] = {}
        self.short: dict[str, int] = {}

    def run(self, walk: Walk, progress: Progress | None) -> Merged:
        parts = units(self.graph, self.blocks)
        teacher = walk.start()
        student = dict(teacher)
        edited = [i for i, part in enumerate(parts) if part.block is not None and part.block.name in self.choices]
        last_needed = max(edited, default=-1)
        for index, part in enumerate(parts):
            # Behind the last edit the teacher is only needed as a target of refits.
            if index <= last_needed or self.refit:
                nodes = [self.graph.by_name[name] for name in part.nodes]
                teacher |= walk.run(nodes, {ref: ref for ref in part.writes}, teacher)
            self._advance(walk, part, teacher, student)
            walk.release(parts[index + 1 :], teacher, student)
            if progress is not None:
                progress(index + 1, len(parts), f"merge {part.name}")
        warn_if_short(self.short, walk.n)
        graph = assemble(self.blocks, self.edits, self.own)
        return _finish(
            self.blocks,
            graph,
            tuple(self.choices.values()),
            self.fitted,
            self.refitted,
            "fitted",
            probe=walk.images[: min(walk.n, 4)],
        )

    def _advance(self, walk: Walk, part: Unit, teacher: Tensors, student: Tensors) -> None:
        choice = self.choices.get(part.block.name) if part.block is not None else None
        if part.block is not None and choice is not None:
            self._merge(walk, part, part.block, choice, teacher, student)
            return
        if all(student[ref] is teacher.get(ref) for ref in part.reads):
            # No edit in front: nothing to renew. Behind the last edit the teacher has not run yet.
            if not all(ref in teacher for ref in part.writes):
                nodes = [self.graph.by_name[name] for name in part.nodes]
                teacher |= walk.run(nodes, {ref: ref for ref in part.writes}, teacher)
            student |= {ref: teacher[ref] for ref in part.writes}
            return
        nodes = [self.graph.by_name[name] for name in part.nodes]
        if self.reestimate:
            nodes = walk.renew_norms(nodes, student)
        if self.refit and part.block is not None:
            nodes = self._refit(walk, part.block, nodes, teacher, student)
        self.own |= {node.name: node for node in nodes}
        student |= walk.run(nodes, {ref: ref for ref in part.writes}, student)

    def _merge(self, walk: Walk, part: Unit, block: Block, choice: Choice, teacher: Tensors, student: Tensors) -> None:
        if self.given is not None:
            found = self.given[block.name]
        else:
            x = student[block.entry] if self.in_sequence else teacher[block.entry]
            able = [(form_by_name(choice.form), choice.skip)]
            sampler = Sampler(walk.n, seed=self.seed)
            fits, missing = fit_forms(
                block,
                able,
                x,
                teacher[block.exit],
                sampler,
                ridge=self.ridge,
                parts=walk.batches((block.entry_shape, block.exit_shape)),
                on_all=True,
            )
            found = fits[choice.form]
            if missing:
                self.short[block.name] = missing
        edit = build_edit(self.graph, block, found)
        _verify_edit(block, edit, found, np.asarray(student[block.entry][:1]))
        self.fitted[block.name] = found
        self.edits[block.name] = edit
        if edit.exit == block.entry:
            student[block.exit] = student[block.entry]
        else:
            student |= walk.run(edit.nodes, {block.exit: edit.exit}, student)

    def _refit(self, walk: Walk, block: Block, nodes: list[Node], teacher: Tensors, student: Tensors) -> list[Node]:
        found = refit_closing_layer(walk, block, nodes, teacher[block.exit], student, seed=self.seed)
        if found is None:
            return nodes
        walk.forget_behind(nodes, found.nodes, student)
        self.refitted[found.layer] = found.ridge
        return list(found.nodes)


def build_edit(graph: ModelGraph, block: Block, fitted: Fitted) -> Edit:
    """Return the calls of stock Keras layers that stand for a block."""
    policy = policy_of(graph, block)
    nodes: list[Node] = []
    ref = block.entry
    shape = block.entry_shape
    for index, one in enumerate(fitted.maps):
        suffix = "merged" if len(fitted.maps) == 1 else f"merged{index + 1}"
        for spec in _specs(block, fitted, one, f"{block.name}_{suffix}"):
            node = new_node(spec, ref, shape, policy, graph.dtype(block.exit))
            nodes.append(node)
            ref, shape = Ref(node.name), node.shapes[0]
    if fitted.border is not None:
        # A Rescaling by 1 with an array as offset: the one stock layer that adds a constant map; it becomes one ADD.
        offset = {"scale": 1.0, "offset": fitted.border.astype("float32"), "name": f"{block.name}_border"}
        node = new_node(LayerSpec("Rescaling", offset), ref, shape, policy, graph.dtype(block.exit))
        nodes.append(node)
        ref = Ref(node.name)
    if not fitted.keeps_skip or block.join is None:
        return Edit(tuple(nodes), ref)
    kept = [graph.by_name[name] for name in block.skip_nodes]
    skip_exit = Ref(block.skip_nodes[-1]) if block.skip_nodes else block.entry
    if not nodes:
        return Edit(tuple(kept), skip_exit)
    join = graph.by_name[block.join]
    # The Add of a span reads the skip of its last block; the span's own starts at its entry.
    swap = lambda one: skip_exit if one == block.skip_exit else ref  # noqa: E731
    join = replace(join, args=map_refs(join.args, swap), kwargs=map_refs(dict(join.kwargs), swap))
    return Edit((*nodes, *kept, join), Ref(join.name))


def _specs(block: Block, fitted: Fitted, map: AffineConv, name: str) -> Iterator[LayerSpec]:
    if fitted.statistics is not None:
        yield scale_spec(map, name, fitted.statistics)
    else:
        yield from layer_specs(map, name, rank=block.rank)


def policy_of(graph: ModelGraph, block: Block) -> Any:
    """Return the dtype policy of a block's layers, None where none has weights."""
    for name in block.body:
        layer = graph.by_name[name].layer
        if getattr(layer, "weights", None):
            return layer.dtype_policy
    return None


def new_node(spec: LayerSpec, ref: Ref, shape: Shape, policy: Any, dtype: str) -> Node:
    """Return a call of the Keras layer that a spec describes, with its weights."""
    layer = getattr(keras.layers, spec.class_name)(**spec.config, dtype=policy)
    layer.build(shape)
    if spec.weights:
        layer.set_weights(list(spec.weights))
    written = tuple(layer.compute_output_shape(shape))
    return Node(layer.name, layer, spec.class_name, (ref,), {}, (written,), (dtype,))


def assemble(blocks: Blocks, edits: Mapping[str, Edit], own: Mapping[str, Node]) -> ModelGraph:
    """Return the model's graph with edits in the place of blocks and the student's own layers in kept ones."""
    graph = replace(blocks.graph, nodes=tuple(own.get(node.name, node) for node in blocks.graph))
    for block in blocks:
        if (edit := edits.get(block.name)) is not None:
            # An earlier edit may have renamed what this one reads.
            entry_now = graph.by_name[block.nodes[0]].inputs[0]
            swap = lambda ref, old=block.entry, new=entry_now: new if ref == old else ref  # noqa: E731
            nodes = [
                replace(node, args=map_refs(node.args, swap), kwargs=map_refs(dict(node.kwargs), swap))
                for node in edit.nodes
            ]
            graph = graph.replace_site(block.nodes, nodes, block.exit, swap(edit.exit))
    return graph


def _verify_edit(block: Block, edit: Edit, fitted: Fitted, x: np.ndarray) -> None:
    """Raise if the layers that were built do not compute what the fit says, borders included."""
    x = x.astype("float32")
    values: dict[Ref, Any] = {block.entry: keras.ops.convert_to_tensor(x)}
    run_nodes(edit.nodes, values)
    have = as_float32(values[edit.exit]).astype("float64")
    want = x.astype("float64")
    if fitted.maps or block.skip_kind == "projection":
        want = _predicted(block, fitted, as_images(want)).reshape(have.shape)
    difference = float(np.abs(have - want).max())
    # Half precision rounds each layer to its own eight to eleven bits.
    tolerance = BLOCK_TOLERANCE if _is_float32(edit) else 2e-2
    largest = float(np.abs(want).max()) or 1.0
    if difference <= tolerance * largest:
        return
    summed = _predicted(block, _magnitudes(fitted), np.abs(as_images(x.astype("float64"))))
    if not difference <= ROUNDING * float(summed.max()):  # NaN is no agreement
        raise MergeError(
            f"The merged '{block.name}' differs from its fitted map by {difference / largest:.1e} (relative), "
            f"more than {tolerance}."
        )


def _predicted(block: Block, fitted: Fitted, x: np.ndarray) -> np.ndarray:
    """Return what fitted maps and the skip that they keep write for images, float64."""
    skipped = affine.apply(block.skip, x) if fitted.keeps_skip and block.skip is not None else None
    if not fitted.maps and skipped is not None:
        return skipped
    for one in fitted.maps:
        x = affine.apply(one, x)
    if fitted.border is not None:
        x = x + fitted.border
    return x if skipped is None else x + skipped


def _magnitudes(fitted: Fitted) -> Fitted:
    """Return the maps with the absolute value of each weight: what they add up, whatever the signs."""
    maps = tuple(replace(one, kernel=np.abs(one.kernel), bias=np.abs(one.bias)) for one in fitted.maps)
    return replace(fitted, maps=maps, border=None if fitted.border is None else np.abs(fitted.border))


def _is_float32(edit: Edit) -> bool:
    return all(getattr(node.layer, "compute_dtype", "float32") == "float32" for node in edit.nodes)


def relative_error(have: np.ndarray, want: np.ndarray) -> float:
    """Max |difference| / max |wanted|."""
    largest = float(np.abs(want).max())
    return float(np.abs(have - want).max()) / (largest or 1.0)


def _finish(
    blocks: Blocks,
    graph: ModelGraph,
    choices: Iterable[Choice],
    fitted: Mapping[str, Fitted],
    refitted: Mapping[str, float],
    kind: str,
    *,
    probe: np.ndarray | None,
) -> Merged:
    model = build_model(graph)
    error = _verify_model(graph, model, probe)
    chosen = {one.block: one for one in choices}
    merged = []
    for block in blocks:
        if (one := chosen.get(block.name)) is None:
            continue
        have = fitted[block.name]
        cost = cost_of_fitted(form_by_name(one.form), block, have, skip=one.skip)
        # A linear block loses nothing where its own maps are taken over, unless its border is another one now.
        exact = kind == "linearized" and have.dropped == 0.0 and _is_linear(blocks.graph, block, have)
        own_kind = "exact" if exact else kind
        merged.append(MergedBlock(block.name, one.form, own_kind, fitted[block.name].r2, block.cost.macs, cost.macs))
    return Merged(model, tuple(merged), dict(fitted), dict(refitted), error)


def _is_linear(graph: ModelGraph, block: Block, fitted: Fitted) -> bool:
    """True for a block without activations whose layers compose to what was fitted, borders included."""
    stages = read_stages(graph, block) if block.linearizable else ()
    if not stages or any(stage.activation is not None for stage in stages):
        return False
    if fitted.border is not None:
        return True
    first, *others = [one for stage in stages for one in stage.maps]
    for one in others:
        if not affine.padding_is_exact(first, one):
            return False
        first = affine.compose(first, one)
    return True


def _verify_model(graph: ModelGraph, model: Any, probe: np.ndarray | None) -> float:
    """Return the largest relative error of a built model against its graph run call by call."""
    values: dict[Ref, Any] = {}
    rng = np.random.default_rng(0)
    for ref in graph.input_refs:
        shape = tuple(axis or 32 for axis in graph.shape(ref)[1:])
        dtype = graph.dtype(ref)
        made = rng.normal(size=(2, *shape)) if "float" in dtype else rng.integers(0, 256, size=(2, *shape))
        values[ref] = keras.ops.convert_to_tensor((made if probe is None else np.asarray(probe)).astype(dtype))
    inputs = map_refs(graph.inputs, values.__getitem__)
    have = keras.tree.flatten(model(inputs, training=False))
    run_nodes(graph, values)
    errors = []
    for ref, tensor in zip(graph.output_refs, have, strict=True):
        want = as_float32(values[ref])
        if not np.isfinite(want).all():
            raise MergeError(f"The merged '{graph.name}' writes NaN or infinite values on probe inputs.")
        errors.append(relative_error(as_float32(tensor), want))
    if not all(error <= NETWORK_TOLERANCE for error in errors) and not any(
        "16" in str(graph.dtype(ref)) for ref in graph.output_refs
    ):
        raise MergeError(f"The built '{graph.name}' differs from its graph by {max(errors):.1e} (relative).")
    return max(errors)
