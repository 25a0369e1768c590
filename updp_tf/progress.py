"""Blend a plan into a model slowly: the student that is trained, and the plain model it becomes.

A student holds each pruned block twice over (`whole`), or the activations, norms and gates in it twice over
(`expanded`): as they were, and as what takes their place. At blend 1 it computes what the model computes; at blend 0
every pruned block is linear, and `merged_student` writes it as the single layer that it is.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import keras
import numpy as np

from updp_tf import affine, rules
from updp_tf.activations import gaussian_fit
from updp_tf.affine import AffineConv
from updp_tf.applying import blocks_of_plan, maps_of_plan
from updp_tf.blocks import Blocks, block_of, prepared_graph
from updp_tf.console import shown
from updp_tf.errors import CalibrationError, MergeError, PlanError, ShapeError
from updp_tf.folding import absorbed
from updp_tf.forms import ConvForm, Fitted, SeparableForm, form_by_name, layer_specs, scale_spec
from updp_tf.graph import build_model, clone_layer, read_graph
from updp_tf.layers import (
    ActivationBlend,
    Blend,
    BlockBlend,
    BorderRing,
    GateBlend,
    InteriorNormalization,
    NormBlend,
    NormToBatch,
    TailBlend,
    TapsBlend,
    gamma_and_beta,
)
from updp_tf.memory import DEFAULT_LIMIT_BYTES, Memory, calibration_images
from updp_tf.merging import (
    NETWORK_TOLERANCE,
    build_edit,
    merge_in_sequence,
    new_node,
    policy_of,
    relative_error,
)
from updp_tf.planning import Plan
from updp_tf.schedule import Schedule
from updp_tf.structure import Block, LayerSpec, ModelGraph, Node, Ref, Refusal, Shape, block_name, map_refs
from updp_tf.walking import Walk, as_float32

Mode = Literal["expanded", "whole"]
Lines = Literal["least_squares", "gaussian", "identity"]
Norms = Literal["sigma", "batch"]
Pads = tuple[int, int, int, int]

NO_RING: Pads = (0, 0, 0, 0)


@dataclass(frozen=True)
class BlendedBlock:
    """How one block of a plan was blended.

    Attributes:
        name: of the block.
        form: it becomes.
        mode: `expanded` or `whole`.
        refusal: why it was not expanded where that was asked for, or None.
    """

    name: str
    form: str
    mode: Mode
    refusal: Refusal | None = None


@dataclass(frozen=True)
class Blending:
    """How the blocks of a plan are blended.

    Attributes:
        schedule: of the blends.
        mode: `whole` blends what blocks write with what their forms write; `expanded` blends the activations, norms
            and gates inside, and the off-centre taps where the composed kernel would be larger than the form's.
        lines: where the lines of expanded activations start.
        norms: what expanded per-image norms become: `sigma` keeps them with a constant 1 / sigma, `batch` makes them
            BatchNormalizations.
        tail: name of an activation that is blended in behind every pruned block, or None.
        penalty: learn the blends of whole blocks, adding this to the loss times the part of the plan's savings that
            is not had; scheduled blends where None.
    """

    schedule: Schedule
    mode: Mode = "whole"
    lines: Lines = "least_squares"
    norms: Norms = "sigma"
    tail: str | None = None
    penalty: float | None = None


def blended(
    blocks: Blocks, plan: Plan, fitted: Mapping[str, Fitted], blending: Blending, images: np.ndarray | None
) -> tuple[Any, tuple[BlendedBlock, ...]]:
    """Return the student of a plan, and how each block was blended.

    Args:
        blocks: of the model, the plan's spans joined.
        plan: which blocks become what.
        fitted: maps of the forms, by block name; blocks that can be expanded need none.
        blending: how.
        images: calibration images, for the starts of lines, norms and gates.

    Raises:
        PlanError: a block can neither be expanded nor has it fitted maps.
        CalibrationError: a norm, a gate or an activation whose start only images tell.
    """
    surgeon = _Surgeon(blocks.graph)
    done: list[BlendedBlock] = []
    savings = _savings(blocks, plan)
    for index, edit in enumerate(plan.edits):
        block = blocks[block_name(edit.blocks)]
        options = {**_window(blending.schedule, index, len(plan.edits)), "block": block.name}
        if blending.penalty is not None:
            options |= {"learned": True, "penalty": blending.penalty * savings[block.name]}
        refusal: Refusal | None = None
        if blending.mode == "expanded":
            refusal = surgeon.expand(block, edit.form, edit.options["skip"], blending.norms, options)
        if blending.mode == "whole" or refusal is not None:
            if block.name not in fitted:
                reason = refusal.reason if refusal is not None else "its form is not fitted"
                raise PlanError(f"'{block.name}' cannot be blended: {reason}; give calibration images.")
            surgeon.double(block, fitted[block.name], options)
        if blending.tail is not None:
            surgeon.add_tail(block, blending.tail, options)
        mode: Mode = "whole" if blending.mode == "whole" or refusal is not None else "expanded"
        done.append(BlendedBlock(block.name, edit.form, mode, refusal))
    start(surgeon.graph, images, blending.lines, surgeon.rings)
    return build_model(surgeon.graph), tuple(done)


def _savings(blocks: Blocks, plan: Plan) -> dict[str, float]:
    """Part of the MACs that a plan saves which each of its blocks saves."""
    saved = {}
    for edit in plan.edits:
        block = blocks[block_name(edit.blocks)]
        cost = form_by_name(edit.form).cost(block, skip=edit.options["skip"])
        saved[block.name] = max(block.cost.macs - cost.macs, 0)
    total = sum(saved.values()) or 1
    return {name: value / total for name, value in saved.items()}


def _window(schedule: Schedule, index: int = 0, n: int = 1) -> dict[str, Any]:
    begin, end = schedule.window(index, n)
    return {"begin": begin, "end": end, "shape": schedule.shape, "total_steps": schedule.total_steps}


def progressive(
    model: Any,
    plan: Plan | str | os.PathLike[str],
    *,
    calibration: Any = None,
    schedule: Schedule | None = None,
    mode: Mode = "whole",
    lines: Lines | None = None,
    norms: Norms = "sigma",
    tail: str | None = None,
    penalty: float | None = None,
    seed: int = 0,
    memory_bytes: int = DEFAULT_LIMIT_BYTES,
    verbose: bool = True,
) -> Any:
    """Return a student in which a plan is blended in while it trains.

    At first it computes what the model computes, bit for bit in inference; once every blend is 0,
    `updp_tf.merge(student)` returns the plain, shallower model. The schedule is in the student: it advances with every
    training step, on every backend, whatever wraps the student.

    Args:
        model: the plan was made for; it is not changed.
        plan: a `Plan`, or the path of a saved one, whose arrays are read from beside it.
        calibration: a few hundred unlabelled images that forms, lines and norms are fitted to. Without them forms come
            from the arrays beside the plan or from the blocks' own weights, and norms cannot be blended.
        schedule: of the blends; `Schedule()` where None.
        mode: `whole` blends what each block writes with what its form writes: any block, both branches in training.
            `expanded` blends activations, norms, gates and off-centre taps inside the block, which then merges by
            composition; a block that cannot be expanded is blended whole, and `student.blending` says why.
        lines: where expanded activations start: `least_squares` (with images), `gaussian` (without) or `identity`.
        norms: what expanded per-image norms become: `sigma` (1 / sigma is blended into a constant) or `batch`.
        tail: an activation, for instance "relu", that is blended in behind every pruned block.
        penalty: learn the blends of whole blocks: this times the part of the plan's savings that is not had is added to
            the loss.
        seed: of sampled positions.
        memory_bytes: activations beyond this go to disk.
        verbose: show progress on standard error.

    Returns:
        A Keras model, with a tuple of `BlendedBlock` as `student.blending`.

    Raises:
        PlanError: the plan is for another model, or a block has no fitted form.
        CalibrationError: images are needed, or do not fit the model.

    Example:
        >>> student = updp_tf.progressive(model, plan, calibration=images)  # doctest: +SKIP
        >>> student.fit(dataset, epochs=8, callbacks=[updp_tf.BlendSchedule()])  # doctest: +SKIP
        >>> small = updp_tf.merge(student)  # doctest: +SKIP
    """
    arrays: Mapping[str, np.ndarray] | None = None
    if not isinstance(plan, Plan):
        plan, arrays = Plan.load(plan)
    if penalty is not None and mode != "whole":
        raise PlanError("Blends are learned for whole blocks, one for each: leave mode='whole'.")
    blocks, choices = blocks_of_plan(model, plan)
    with Memory(memory_bytes) as memory, shown(verbose) as progress:
        images: np.ndarray | None = None
        fitted: Mapping[str, Fitted] = {}
        if calibration is not None:
            images = calibration_images(
                calibration, shape=blocks.graph.shape(blocks.graph.input_refs[0]), memory=memory
            )
        if arrays is not None or (images is None and mode == "whole"):
            fitted = maps_of_plan(blocks, plan, arrays, "gaussian")
        elif images is not None:
            fitted = merge_in_sequence(
                blocks, choices, images, seed=seed, memory_bytes=memory_bytes, progress=progress
            ).fitted
        lines = lines or ("gaussian" if images is None else "least_squares")
        blending = Blending(schedule or Schedule(), mode, lines, norms, tail, penalty)
        student, student_blocks = blended(blocks, plan, fitted, blending, images)
    student.blending = student_blocks
    return student


def linearize(
    model: Any,
    *,
    norms: str | Iterable[str] | None = "all",
    activations: str | Iterable[str] | None = "all",
    calibration: Any = None,
    schedule: Schedule | None = None,
    memory_bytes: int = DEFAULT_LIMIT_BYTES,
) -> Any:
    """Return a student in which norms and activations become what integer targets run, wherever they are.

    LayerNormalization, GroupNormalization and RMSNormalization become affine (their 1 / sigma a constant per channel);
    SiLU and hard-swish become ReLU6, other smooth activations (GELU, ELU, ...) ReLU. Train it, then
    `updp_tf.merge(student)` returns the plain model; with `Schedule(total_steps=1, until=0)` it can be merged at once.

    Args:
        model: a Functional or Sequential Keras 3 model, or a student of `progressive`; it is not changed.
        norms: `all`, names of calls, or None for none.
        activations: the same.
        calibration: unlabelled images, which tell the norms' constants; needed where norms are blended.
        schedule: of the blends; `Schedule()` where None.
        memory_bytes: activations beyond this go to disk.

    Returns:
        A Keras model; `student.blending` is a tuple of the names of the calls that were blended, and
        `student.refusals` says what was left and why.

    Raises:
        PlanError: a name that is no norm or activation of the model.
        CalibrationError: images are needed, or do not fit the model.
    """
    graph = read_graph(model)
    with Memory(memory_bytes) as memory:
        images: np.ndarray | None = None
        if calibration is not None:
            images = calibration_images(calibration, shape=graph.shape(graph.input_refs[0]), memory=memory)
        student, done, refusals = linearized(
            model, norms=norms, activations=activations, schedule=schedule or Schedule(), images=images
        )
    student.blending, student.refusals = done, refusals
    return student


class _NotExpandable(Exception):
    """Why a block cannot be expanded; the message reads on from "it"."""


class _Surgeon:
    """A graph whose blocks get blends one by one, front to back."""

    def __init__(self, graph: ModelGraph) -> None:
        self.original = graph
        self.graph = graph
        self.rings: dict[str, Pads] = {}
        """Width of the ring around what each blend reads, where there is one."""
        self._exits: dict[Ref, Ref] = {}

    def now(self, data: Any) -> Any:
        """Return refs of the original graph as they are called now."""
        return map_refs(data, lambda ref: self._exits.get(ref, ref))

    def node(self, layer: Any, refs: Sequence[Ref], shapes: Sequence[Shape], dtype: str) -> Node:
        """Return a call of a new layer."""
        read = shapes[0] if len(shapes) == 1 else list(shapes)
        if not layer.built:
            layer.build(read)
        args = (refs[0],) if len(refs) == 1 else (list(refs),)
        written = tuple(layer.compute_output_shape(read))
        return Node(layer.name, layer, rules.kind_of(layer), args, {}, (written,), (dtype,))

    def double(self, block: Block, fitted: Fitted, options: Mapping[str, Any]) -> None:
        """Put a form beside a block, and a blend behind both."""
        edit = build_edit(self.original, block, fitted)
        added = Ref(f"{block.name}_merged_add")
        swap = lambda ref: added if block.join and ref == Ref(block.join) else self.now(ref)  # noqa: E731
        form: list[Node] = []
        for node in edit.nodes:
            if node.name in block.nodes and node.name != block.join:
                continue  # the skip's own calls, which are there already
            args, kwargs = map_refs(node.args, swap), map_refs(dict(node.kwargs), swap)
            if node.name == block.join:
                layer = keras.layers.Add(name=added.node, dtype=policy_of(self.original, block))
                node = replace(node, name=added.node, layer=layer, kind="Add")
                args, kwargs = ([*replace(node, args=args, kwargs=kwargs).inputs],), {}
            form.append(replace(node, args=args, kwargs=kwargs))
        layer = BlockBlend(name=f"{block.name}_blend", dtype=policy_of(self.original, block), **options)
        shape, dtype = block.exit_shape, self.original.dtype(block.exit)
        blend = self.node(layer, (block.exit, swap(edit.exit)), (shape, shape), dtype)
        own = [self.graph.by_name[name] for name in block.nodes]
        self._replace(block, (*own, *form, blend), Ref(blend.name))
        self._stop_dropping(block)

    def add_tail(self, block: Block, activation: str, options: Mapping[str, Any]) -> None:
        """Put an activation that starts as the identity behind a block."""
        exit = self.now(block.exit)
        last = self.graph.by_name[exit.node]
        inner = keras.layers.Activation(activation, name=f"{block.name}_tail_activation")
        layer = TailBlend(inner, name=f"{block.name}_tail", dtype=policy_of(self.original, block), **options)
        tail = self.node(layer, (exit,), (last.shapes[exit.index],), last.dtypes[exit.index])
        self.graph = self.graph.replace_site((last.name,), (last, tail), exit, Ref(tail.name))
        self._exits[block.exit] = Ref(tail.name)

    def expand(self, block: Block, form: str, skip: str, norms: Norms, options: Mapping[str, Any]) -> Refusal | None:
        """Put blends in the place of the activations, norms and gates of a block, or say why that cannot be."""
        try:
            nodes, exit, rings = _Expansion(self, block, form, skip, norms, options).run()
        except (_NotExpandable, rules.Unsupported, ShapeError) as error:
            return Refusal(block.name, "expanded", str(error))
        self._replace(block, nodes, exit)
        self.rings |= rings
        return None

    def _replace(self, block: Block, nodes: Sequence[Node], exit: Ref) -> None:
        self.graph = self.graph.replace_site(block.nodes, nodes, block.exit, exit)
        self._exits[block.exit] = exit

    def _stop_dropping(self, block: Block) -> None:
        """Take the calls that only act in training out of a block: its form has none."""
        for name in block.nodes:
            node = self.graph.by_name[name]
            if rules.is_passive(node) and len(node.inputs) == 1 and Ref(name) != block.exit:
                self.graph = self.graph.replace_site((name,), (), Ref(name), node.inputs[0])


class _Expansion:
    """One block whose inside is blended.

    Where a layer behind the first one pads, all padding moves to the front of the block, so that at blend 0 the block
    is one convolution, borders included; a `BorderRing` before each layer that padded keeps blend 1 what it was.
    """

    def __init__(
        self, surgeon: _Surgeon, block: Block, form: str, skip: str, norms: Norms, options: Mapping[str, Any]
    ) -> None:
        self.surgeon, self.graph, self.block = surgeon, surgeon.graph, block
        self.form, self.skip, self.norms, self.options = form, skip, norms, dict(options)
        self.policy = policy_of(surgeon.original, block)
        self.nodes: list[Node] = []
        self.rings: dict[str, Pads] = {}
        self.read: dict[Ref, Ref] = {}
        self.cropped: dict[Ref, Ref] = {}
        self.path = self._path()
        self.maps = {name: self._map(self.graph.by_name[name]) for name in self.path}
        self.tapped = self._tapped()
        self.moves = False

    def run(self) -> tuple[list[Node], Ref, dict[str, Pads]]:
        """Return the block's new calls, the tensor they write, and the rings around what they write."""
        used = [name for name in self.path if not rules.is_passive(self.graph.by_name[name])]
        self.moves = any(one.pads for name in used[1:] for one in self.maps[name])
        on_path = set(self.path)
        for name in self.block.nodes:
            node = self.graph.by_name[name]
            if name not in on_path:
                self._beside(node)
            elif name not in used:
                self.read[Ref(name)] = self._current(node.inputs[0])
            else:
                self._on_path(node, used[used.index(name) :], first=name == used[0])
        self._sign()
        return self.nodes, self._current(self.block.exit), self.rings

    # What the block is made of

    def _path(self) -> list[str]:
        """Return the calls from the entry to what the body writes; a gate is entered by what it multiplies."""
        block, graph = self.block, self.graph
        ref = block.exit
        if block.join is not None:
            body = set(block.body)
            (ref,) = [one for one in graph.by_name[block.join].inputs if one.node in body]
        entry = self.surgeon.now(block.entry)
        names: list[str] = []
        while ref != entry:
            node = graph.by_name[ref.node]
            if len(node.inputs) == 2 and node.kind == "Multiply":
                full = [one for one in node.inputs if graph.shape(one) == node.shapes[0]]
                if len(full) != 1:
                    raise _NotExpandable(f"'{node.name}' in it multiplies two tensors of its own size")
                (ref,) = full
            elif len(node.inputs) == 1:
                (ref,) = node.inputs
            else:
                raise _NotExpandable(f"'{node.name}' in it reads {len(node.inputs)} tensors")
            names.append(node.name)
        return names[::-1]

    def _map(self, node: Node) -> tuple[AffineConv, ...]:
        """Return the geometry that a call has at blend 0: its maps, none for what works pixel by pixel."""
        if rules.is_passive(node) or len(node.inputs) == 2 or node.kind in rules.ACTIVATIONS or node.kind == "PReLU":
            return ()
        if node.kind in rules.NORMS:
            return ()
        maps = rules.linear_maps(node, _as_image(self.graph.shape(node.inputs[0])))
        if maps is None:
            raise _NotExpandable(f"'{node.name}' in it {rules.why_unknown(node)}")
        return maps

    def _padding(self, names: Sequence[str]) -> Pads:
        """Return how much the calls pad all together, in pixels of what the first of them reads."""
        maps = [one for name in names for one in self.maps[name]]
        return affine.composed_geometry(maps).padding if maps else NO_RING

    def _tapped(self) -> frozenset[str]:
        """Return the convolutions that must become 1x1 for the composed kernel to be the form's."""
        form = form_by_name(self.form)
        if not isinstance(form, ConvForm | SeparableForm):
            raise _NotExpandable(f"it becomes '{self.form}', which is not what its own layers compose to")
        maps = [(name, one) for name in self.path for one in self.maps[name]]

        def composed(tapped: set[str]) -> int:
            size, stride = 1, 1
            for name, one in maps:
                size += stride * (max(one.effective_size) - 1) * (name not in tapped)
                stride *= max(one.strides)
            return size

        able = [name for name, one in reversed(maps) if len(self.maps[name]) == 1 and _can_lose_taps(one)]
        choices = (set(names) for n in range(len(able) + 1) for names in itertools.combinations(able, n))
        tapped = next((names for names in choices if composed(names) == form.kernel_size), None)
        if tapped is None:
            raise _NotExpandable(f"its layers do not compose to the kernel of '{self.form}', whatever taps are blended")
        if isinstance(form, SeparableForm):
            windows = [max(one.kernel_size) > 1 for _, one in maps]
            channelwise = [one.groups == one.c_in == one.c_out for _, one in maps]
            if True not in windows or not all(channelwise[: windows.index(True) + 1]) or sum(windows) > 1:
                raise _NotExpandable(f"its layers do not compose to the two of '{self.form}'")
        return frozenset(tapped)

    # Its new calls

    def _add(self, layer: Any, refs: Sequence[Ref], ring: Pads) -> _Added:
        by_name = {node.name: node for node in self.nodes}
        shapes = [by_name[ref.node].shapes[ref.index] if ref.node in by_name else self.graph.shape(ref) for ref in refs]
        node = self.surgeon.node(layer, refs, shapes, self.surgeon.original.dtype(self.block.exit))
        self.nodes.append(node)
        if any(ring):
            self.rings[node.name] = ring
        return _Added(node, Ref(node.name))

    def _blend_options(self, node: Node) -> dict[str, Any]:
        return {**self.options, "name": f"{node.name}_blend", "dtype": self.policy}

    def _current(self, ref: Ref) -> Ref:
        return self.read.get(ref, ref)

    def _on_path(self, node: Node, ahead: Sequence[str], *, first: bool) -> None:
        (old,) = [one for one in node.inputs if len(node.inputs) == 1 or self.graph.shape(one) == node.shapes[0]]
        read = self._current(old)
        ring, ring_after = (self._padding(ahead), self._padding(ahead[1:])) if self.moves else (NO_RING, NO_RING)
        maps = self.maps[node.name]
        if self.moves and first:
            pad = keras.layers.ZeroPadding2D((ring[:2], ring[2:]), name=f"{self.block.name}_pad", dtype=self.policy)
            read = self._add(pad, (read,), ring).exit
        elif any(one.pads for one in maps) and any(ring):
            layer = BorderRing(ring, **{**self._blend_options(node), "name": f"{node.name}_ring"})
            read = self._add(layer, (read,), ring).exit
        if len(node.inputs) == 2:
            (gate,) = [one for one in node.inputs if one != old]
            added = self._add(GateBlend(**self._blend_options(node)), (read, self._current(gate)), ring_after)
        elif maps and self.moves and node.kind == "ZeroPadding2D":
            self.read[Ref(node.name)] = read
            return
        elif maps:
            added = self._add(self._linear(node), (read,), ring_after)
        elif node.kind == "BatchNormalization":
            added = self._add(self._batch_norm(node, ring), (read,), ring_after)
        elif node.kind in rules.NORMS:
            added = self._add(self._norm(node), (read,), ring_after)
        else:
            layer = ActivationBlend(_activation_layer(node, self.graph), **self._blend_options(node))
            added = self._add(layer, (read,), ring_after)
        self.read[Ref(node.name)] = added.exit

    def _linear(self, node: Node) -> Any:
        change = {"padding": "valid"} if self.moves and "padding" in node.layer.get_config() else {}
        layer = clone_layer(node.layer, node.name, input_shape=self.graph.shape(node.inputs[0]), **change)
        if node.name not in self.tapped:
            return layer
        return TapsBlend(layer, **self._blend_options(node))

    def _batch_norm(self, node: Node, ring: Pads) -> Any:
        shape = self.graph.shape(node.inputs[0])
        if not any(ring):
            return clone_layer(node.layer, node.name, input_shape=shape)
        config = node.layer.get_config() | {"name": node.name, "ring": ring}
        layer = InteriorNormalization(**config)
        layer.build(shape)
        layer.set_weights(node.layer.get_weights())
        return layer

    def _norm(self, node: Node) -> Any:
        shape = self.graph.shape(node.inputs[0])
        _refuse_norm(node, shape)
        inner = clone_layer(node.layer, node.name, input_shape=shape)
        if self.norms == "sigma":
            return NormBlend(inner, **self._blend_options(node))
        target = keras.layers.BatchNormalization(name=f"{node.name}_batch", dtype=self.policy)
        return NormToBatch(inner, target, **self._blend_options(node))

    def _beside(self, node: Node) -> None:
        """Take over a call that is not on the path: a gate's, the skip's, the Add."""

        def current(ref: Ref) -> Ref:
            return self._current(ref) if node.name == self.block.join else self._crop(ref)

        args, kwargs = map_refs(node.args, current), map_refs(dict(node.kwargs), current)
        self.nodes.append(replace(node, args=args, kwargs=kwargs))

    def _crop(self, ref: Ref) -> Ref:
        """Return a tensor of the path without its ring, for a gate that is computed from it."""
        ring = self.rings.get(self._current(ref).node)
        if ring is None:
            return self._current(ref)
        if ref not in self.cropped:
            layer = keras.layers.Cropping2D((ring[:2], ring[2:]), name=f"{ref.node}_crop", dtype=self.policy)
            self.cropped[ref] = self._add(layer, (self._current(ref),), NO_RING).exit
        return self.cropped[ref]

    def _sign(self) -> None:
        """Write into the first blend what merging has to know of the block."""
        first = next((node.layer for node in self.nodes if isinstance(node.layer, Blend)), None)
        if first is None:
            raise _NotExpandable("it has no activation, norm or gate: it is linear, and can be merged at once")
        first.site = {
            "nodes": [node.name for node in self.nodes],
            "skip_nodes": list(self.block.skip_nodes),
            "join": self.block.join,
            "form": self.form,
            "skip": self.skip,
        }


@dataclass(frozen=True)
class _Added:
    node: Node
    exit: Ref


def _as_image(shape: Shape) -> Shape:
    """Tokens and vectors as images, for rules that read the spatial axes."""
    return shape if len(shape) == 4 else (shape[0], 1, 1, shape[-1])


def _can_lose_taps(one: AffineConv) -> bool:
    """True where the centre tap alone is a 1x1 convolution."""
    if max(one.kernel_size) == 1 or not all(size % 2 for size in one.kernel_size):
        return False
    down, right = ((size - 1) // 2 for size in one.effective_size)
    return all(pad >= reach for pad, reach in zip(one.padding, (down, down, right, right), strict=True))


def _activation_layer(node: Node, graph: ModelGraph) -> Any:
    """Return what applies an activation as a layer of its own."""
    if isinstance(node.layer, keras.layers.Layer):
        return clone_layer(node.layer, node.name, input_shape=graph.shape(node.inputs[0]))
    function = rules.activation(node)
    defaults = None if function is None else rules.named(function.name)
    if function is None or function != defaults:
        raise _NotExpandable(f"'{node.name}' in it is an operation that is no layer's activation")
    return keras.layers.Activation(function.name, name=node.name)


def _refuse_norm(node: Node, shape: Shape) -> None:
    layer = node.layer
    last = (-1, len(shape) - 1, [-1], [len(shape) - 1], (-1,), (len(shape) - 1,))
    if node.kind not in ("LayerNormalization", "GroupNormalization", "RMSNormalization") or layer.axis not in last:
        raise _NotExpandable(f"'{node.name}' in it is a {node.kind} that does not normalize the channels alone")


# Kept blocks and what lies outside blocks

SOFTER: Mapping[str, str] = {"silu": "relu6", "hard_silu": "relu6"}
"""What an activation becomes that integer targets cannot run; others that are not in `ROBUST` become a ReLU."""

ROBUST = frozenset({"linear", "relu", "relu6", "sigmoid", "hard_sigmoid", "tanh", "hard_tanh"})
"""Activations that integer targets run, or that are gates."""


def linearized(
    model: Any,
    *,
    norms: str | Iterable[str] | None,
    activations: str | Iterable[str] | None,
    schedule: Schedule,
    images: np.ndarray | None,
) -> tuple[Any, tuple[str, ...], tuple[Refusal, ...]]:
    """Return a student whose norms and activations become what every target runs, their names, and refusals.

    Args:
        model: a Functional or Sequential model, plain or a student of `blended`; it is not changed.
        norms: `all`, names of calls, or None.
        activations: the same.
        schedule: of the blends, all together.
        images: calibration images, which tell the norms' constants.
    """
    surgeon = _Surgeon(prepared_graph(model))
    done: list[str] = []
    refusals: list[Refusal] = []
    for kind, selection in (("norms", norms), ("activations", activations)):
        known = [node.name for node in surgeon.original if _is_wanted(node, kind)]
        names = None if selection in (None, "all") else {*selection}
        if names is not None and (missing := sorted(names - set(known))):
            raise PlanError(f"'{model.name}' has no {kind} named {', '.join(missing)}; it has: {', '.join(known)}.")
        for name in known if selection is not None else ():
            if names is None or name in names:
                try:
                    _soften(surgeon, name, kind, schedule)
                    done.append(name)
                except _NotExpandable as error:
                    refusals.append(Refusal(name, "linearize", str(error)))
    start(surgeon.graph, images, "identity", {})
    return build_model(surgeon.graph), tuple(done), tuple(refusals)


def _is_wanted(node: Node, kind: str) -> bool:
    if kind == "norms":
        return node.kind in rules.NORMS and node.kind != "BatchNormalization"
    try:
        function = rules.activation(node)
    except rules.Unsupported:
        return False
    return function is not None and function.name not in ROBUST


def _soften(surgeon: _Surgeon, name: str, kind: str, schedule: Schedule) -> None:
    node = surgeon.graph.by_name[name]
    (read,) = node.inputs
    shape = surgeon.graph.shape(read)
    options = {**_window(schedule), "name": f"{name}_blend", "dtype": getattr(node.layer, "dtype_policy", None)}
    if kind == "norms":
        _refuse_norm(node, shape)
        layer: Any = NormBlend(clone_layer(node.layer, name, input_shape=shape), **options)
    else:
        function = rules.activation(node)
        softer = SOFTER.get(function.name, "relu") if function is not None else "relu"
        target = keras.layers.Activation(softer, name=name)
        layer = ActivationBlend(_activation_layer(node, surgeon.graph), target, **options)
    blend = surgeon.node(layer, (read,), (shape,), node.dtypes[0])
    surgeon.graph = surgeon.graph.replace_site((name,), (blend,), Ref(name), Ref(blend.name))


# Where blends start


def start(graph: ModelGraph, images: np.ndarray | None, lines: Lines, rings: Mapping[str, Pads]) -> None:
    """Give lines, norms and gates of a graph's blends their best constants; the layers are changed in place.

    Lines per channel: the regression of f(z) on z over images (`least_squares`) or under the distribution that the
    norm in front tells (`gaussian`). Norms: the regression of the normalized on the centred input, per channel, which
    is E[c^2 / sigma] / E[c^2]. Gates: their mean.

    Args:
        graph: with blends at 1.
        images: calibration images, shape (n, height, width, channels), or None.
        lines: where activations start.
        rings: how much of the border of a tensor is no image, by the node that writes it.

    Raises:
        CalibrationError: images are needed; the message names the layer.
    """
    told: dict[str, _Sums] = {}
    for node in graph:
        layer = node.layer
        if isinstance(layer, ActivationBlend) and layer.target is None:
            if lines == "gaussian":
                _start_gaussian(graph, node)
            elif lines == "least_squares":
                told[node.name] = _Line(layer.layer)
        elif isinstance(layer, NormBlend | NormToBatch):
            told[node.name] = _Scale(layer)
        elif isinstance(layer, GateBlend):
            told[node.name] = _Mean(layer)
    if not told:
        return
    if images is None:
        name = next(iter(told))
        raise CalibrationError(f"Where the blend '{name}' starts is told by images alone: give calibration images.")
    reads = {name: graph.by_name[name].inputs[-1] for name in told}
    nodes = [node for node in graph if not node.is_input]
    with Memory(images.nbytes) as memory:
        walk = Walk(graph, images, memory)
        for _, batch in walk.stream(nodes, tuple(reads.values()), walk.start()):
            for (name, ref), tensor in zip(reads.items(), batch, strict=True):
                top, bottom, left, right = rings.get(ref.node, NO_RING)
                if tensor.ndim == 4:
                    tensor = tensor[:, top : tensor.shape[1] - bottom, left : tensor.shape[2] - right]
                told[name].add(tensor)
    for name, sums in told.items():
        sums.write(graph.by_name[name].layer)


class _Sums:
    """Sums over all images and positions of products of two tensors, per channel."""

    def __init__(self) -> None:
        self.n = 0
        self.parts: dict[str, Any] = {}

    def add(self, tensor: np.ndarray) -> None:
        """Add a batch of what the blend reads."""
        raise NotImplementedError

    def write(self, layer: Any) -> None:
        """Set the blend's weights."""
        raise NotImplementedError

    def _sum(self, **products: np.ndarray) -> None:
        for name, product in products.items():
            flat = product.reshape(-1, product.shape[-1])
            self.parts[name] = self.parts.get(name, 0.0) + flat.sum(axis=0, dtype=np.float64)
        self.n += flat.shape[0]


class _Line(_Sums):
    """Regression of an activation on what it reads."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def add(self, tensor: np.ndarray) -> None:
        z, f = tensor.astype(np.float64), as_float32(self.function(tensor)).astype(np.float64)
        self._sum(z=z, f=f, zz=z * z, zf=z * f)

    def write(self, layer: Any) -> None:
        z, f, zz, zf = (self.parts[name] / self.n for name in ("z", "f", "zz", "zf"))
        variance = np.maximum(zz - z * z, 0.0)
        slope = np.where(variance > 1e-12 * np.maximum(zz, 1e-30), (zf - z * f) / np.maximum(variance, 1e-300), 0.0)
        layer.slope.assign(slope.astype(np.float32))
        layer.offset.assign((f - slope * z).astype(np.float32))


class _Scale(_Sums):
    """Regression of a normalization, without its gamma and beta, on its centred input."""

    def __init__(self, blend: Any) -> None:
        super().__init__()
        self.blend = blend

    def add(self, tensor: np.ndarray) -> None:
        inner = self.blend.layer
        x = tensor.astype(np.float64)
        y = as_float32(inner(tensor)).astype(np.float64)
        gamma, beta = _gamma_and_beta(self.blend.layer, x.shape[-1])
        centre = x.mean(axis=-1, keepdims=True) if isinstance(inner, keras.layers.LayerNormalization) else 0.0
        c, normed = x - centre, (y - beta) / np.where(gamma == 0, 1.0, gamma)
        self._sum(x=x, xx=x * x, y=y, xy=x * y, c=c, cc=c * c, n=normed, cn=c * normed)

    def write(self, layer: Any) -> None:
        mean = {name: part / self.n for name, part in self.parts.items()}
        if isinstance(layer, NormToBatch):
            self._write_batch(layer, mean)
            return
        shift = mean["c"] if layer.has_centre else 0.0
        offset = mean["n"] if layer.has_centre else 0.0
        power = mean["cc"] - shift * mean["c"]
        rate = (mean["cn"] - offset * mean["c"]) / np.maximum(power, 1e-12)
        layer.rate.assign(rate.astype(np.float32))
        if layer.has_centre:
            layer.centre.assign((shift - offset / np.where(rate == 0, 1.0, rate)).astype(np.float32))

    def _write_batch(self, layer: Any, mean: Mapping[str, np.ndarray]) -> None:
        """Statistics of the input; gamma and beta such that each channel's output is the best line in its input."""
        target = layer.target
        variance = np.maximum(mean["xx"] - mean["x"] ** 2, 0.0)
        slope = (mean["xy"] - mean["x"] * mean["y"]) / np.maximum(variance, 1e-12)
        target.moving_mean.assign(mean["x"].astype(np.float32))
        target.moving_variance.assign(variance.astype(np.float32))
        target.gamma.assign((slope * np.sqrt(variance + target.epsilon)).astype(np.float32))
        target.beta.assign(mean["y"].astype(np.float32))


class _Mean(_Sums):
    """Mean of a gate."""

    def __init__(self, blend: Any) -> None:
        super().__init__()

    def add(self, tensor: np.ndarray) -> None:
        self._sum(gate=tensor.astype(np.float64))

    def write(self, layer: Any) -> None:
        layer.mean.assign((self.parts["gate"] / self.n).astype(np.float32))


def _gamma_and_beta(norm: Any, channels: int) -> tuple[np.ndarray, np.ndarray]:
    gamma, beta = (np.asarray(keras.ops.convert_to_numpy(one), np.float64) for one in gamma_and_beta(norm))
    return np.broadcast_to(gamma, (channels,)), np.broadcast_to(beta, (channels,))


def _start_gaussian(graph: ModelGraph, node: Node) -> None:
    """Start a line under the distribution that the norm in front of it tells."""
    moments = _moments(graph, node.inputs[0])
    function = rules.activation_of(node.layer.layer)
    if moments is None or function is None:
        raise CalibrationError(
            f"The activation '{node.name}' has no normalization in front of it that tells its input's distribution: "
            "give calibration images."
        )
    slope, offset, _ = gaussian_fit(function, *moments)
    node.layer.slope.assign(slope.astype(np.float32))
    node.layer.offset.assign(offset.astype(np.float32))


def _moments(graph: ModelGraph, ref: Ref) -> tuple[np.ndarray, np.ndarray] | None:
    """Return mean and standard deviation of a tensor as the norm in front tells them, through a linear layer too."""
    node = graph.by_name[ref.node]
    layer = node.layer
    if isinstance(layer, keras.layers.BatchNormalization):
        norm = rules.NORMS["BatchNormalization"](layer, node.shapes[0])
        return norm.mean, norm.std
    if isinstance(layer, NormBlend):
        gamma, beta = _gamma_and_beta(layer.layer, int(node.shapes[0][-1] or 0))
        return beta, np.abs(gamma)
    if node.kind in ("Dense", "Conv2D") and len(node.inputs) == 1:
        (one,) = rules.LINEAR[node.kind](layer, _as_image(graph.shape(node.inputs[0])))
        before = _moments(graph, node.inputs[0])
        if before is None or not one.is_pointwise:
            return None
        kernel = affine.regroup(one, 1).kernel[0, 0]
        return before[0] @ kernel + one.bias, np.sqrt(before[1] ** 2 @ kernel**2)
    return None


# Merging a student


def blends_of(graph: ModelGraph) -> list[Node]:
    """Return the calls of blend layers."""
    return [node for node in graph if isinstance(node.layer, Blend)]


def merged_student(student: Any) -> tuple[Any, float]:
    """Return the plain model that a student has become, and its largest relative error against the student.

    Raises:
        MergeError: the model holds no blends, one that is not 0 (the message names its block), or the merged model
            does not compute what the student does.
    """
    graph = read_graph(student)
    blends = blends_of(graph)
    if not blends:
        raise MergeError(f"'{student.name}' holds no blend layers, so there is nothing to merge; give a plan.")
    for node in blends:
        if (blend := node.layer.blend) != 0.0:
            raise MergeError(
                f"The blend of '{node.layer.block or node.name}' is {blend:.3g}, not 0: train on until its schedule "
                f"ends (step {int(keras.ops.convert_to_numpy(node.layer.step))} now)."
            )
    for node in blends:
        if node.layer.site is not None:
            graph = _composed(graph, node.layer)
    for node in blends_of(graph):
        graph = _settled(graph, node.name)
    model = build_model(_alive(_renamed(graph)), name=student.name)
    return model, _require_equal(student, model)


def _composed(graph: ModelGraph, layer: Blend) -> ModelGraph:
    """Write an expanded block as the single layer that it is."""
    site = layer.site or {}
    names = tuple(site["nodes"])
    join = site["join"]
    skip_nodes = tuple(site["skip_nodes"])
    beside = {*skip_nodes, join}
    exit = Ref(names[-1])
    body_exit = exit
    skip_exit = Ref(skip_nodes[-1]) if skip_nodes else None
    if join is not None:
        (body_exit,) = [ref for ref in graph.by_name[join].inputs if ref.node in set(names) - beside]
        skip_exit = next(ref for ref in graph.by_name[join].inputs if ref != body_exit)
    body: list[str] = []
    ref = body_exit
    while ref.node in names:
        body.append(ref.node)
        ref = graph.by_name[ref.node].inputs[0]
    maps = [one for name in reversed(body) for one in _maps_at_zero(graph, graph.by_name[name])]
    block = block_of(
        graph,
        names,
        tuple(name for name in names if name not in beside),
        ref,
        body_exit,
        skip_nodes=skip_nodes,
        skip_exit=skip_exit,
        join=join,
    )
    form = form_by_name(site["form"])
    found: Fitted | Refusal
    if isinstance(form, SeparableForm):
        found = _separable(form, maps)
    else:
        found = form.from_maps(block, maps, skip=site["skip"])
    if isinstance(found, Refusal):
        raise MergeError(f"'{layer.block}' cannot become {form.name}: {found.reason}.")
    edit = build_edit(graph, block, found)
    return graph.replace_site(names, edit.nodes, exit, edit.exit)


def _separable(form: SeparableForm, maps: Sequence[AffineConv]) -> Fitted:
    """Compose channelwise maps into one depthwise convolution, and the rest into one pointwise."""
    maps = affine.move_padding_to_front(maps)
    last = max(i for i, one in enumerate(maps) if max(one.kernel_size) > 1)
    first, rest = affine.compose_all(maps[: last + 1]), affine.compose_all(maps[last + 1 :])
    cropped, _ = affine.crop_kernel(first, (form.kernel_size, form.kernel_size))
    return Fitted((cropped, affine.regroup(rest, 1)), keeps_skip=True)


def _maps_at_zero(graph: ModelGraph, node: Node) -> tuple[AffineConv, ...]:
    """Return what a call of an expanded block computes at blend 0."""
    layer = node.layer
    shape = graph.shape(node.inputs[0])
    channels = int(shape[-1] or 0)
    if isinstance(layer, BorderRing):
        return ()
    if isinstance(layer, ActivationBlend):
        return (affine.from_scale(rules.as_array(layer.slope), rules.as_array(layer.offset)),)
    if isinstance(layer, GateBlend):
        return (affine.from_scale(rules.as_array(layer.mean), np.zeros(channels)),)
    if isinstance(layer, NormBlend):
        return (_norm_at_zero(layer, channels),)
    if isinstance(layer, NormToBatch):
        layer = layer.target
    if isinstance(layer, keras.layers.BatchNormalization):
        norm = rules.NORMS["BatchNormalization"](layer, shape)
        return (affine.from_scale(norm.scale, norm.shift),)
    if isinstance(layer, TapsBlend):
        inner = replace(node, layer=layer.layer, kind=rules.kind_of(layer.layer))
        (one,) = rules.linear_maps(inner, _as_image(shape)) or ()
        return (_centre_alone(one),)
    maps = rules.linear_maps(node, _as_image(shape))
    if maps is None:
        raise MergeError(f"'{node.name}' {rules.why_unknown(node)}")
    return maps


def _centre_alone(one: AffineConv) -> AffineConv:
    """Return a convolution with zeros in the place of all taps but the centre one."""
    kernel = np.zeros_like(one.kernel)
    centre = tuple(size // 2 for size in one.kernel_size)
    kernel[centre] = one.kernel[centre]
    return replace(one, kernel=kernel)


def _norm_at_zero(layer: NormBlend, channels: int) -> AffineConv:
    gamma, beta = _gamma_and_beta(layer.layer, channels)
    rate = rules.as_array(layer.rate) * gamma
    if layer.has_centre:
        return affine.from_scale(rate, beta - rules.as_array(layer.centre) * rate)
    if isinstance(layer.layer, keras.layers.LayerNormalization):
        centring = np.eye(channels) - 1.0 / channels
        return affine.from_dense(centring * rate, beta)
    return affine.from_scale(rate, beta)


def _settled(graph: ModelGraph, name: str) -> ModelGraph:
    """Take one blend out of a graph, which keeps what it is at 0."""
    node = graph.by_name[name]
    layer = node.layer
    if isinstance(layer, BlockBlend):
        return graph.replace_site((name,), (), Ref(name), node.inputs[1])
    if isinstance(layer, TailBlend):
        return _exchanged(graph, node, layer.layer)
    if isinstance(layer, ActivationBlend) and layer.target is not None:
        return _exchanged(graph, node, layer.target)
    if isinstance(layer, NormToBatch):
        return _exchanged(graph, node, layer.target)
    if isinstance(layer, NormBlend):
        map = _norm_at_zero(layer, int(node.shapes[0][-1] or 0))
        if (folded := absorbed(graph, name, map)) is not None:
            return folded
        return _with_map(graph, node, map)
    raise MergeError(f"'{name}' is a {type(layer).__name__} outside of any pruned block; nothing says what it becomes.")


def _exchanged(graph: ModelGraph, node: Node, layer: Any) -> ModelGraph:
    new = replace(node, name=layer.name, layer=layer, kind=rules.kind_of(layer))
    return graph.replace_site((node.name,), (new,), Ref(node.name), Ref(new.name))


def _with_map(graph: ModelGraph, node: Node, map: AffineConv) -> ModelGraph:
    """Put the layers of a 1x1 map in the place of a call."""
    (ref,) = node.inputs
    shape, dtype = node.shapes[0], node.dtypes[0]
    name = node.layer.layer.name
    specs: list[LayerSpec]
    specs = [scale_spec(map, name, None)] if map.groups == map.c_in > 1 else [*layer_specs(map, name, rank=len(shape))]
    nodes: list[Node] = []
    for spec in specs:
        nodes.append(new_node(spec, ref, shape, node.layer.dtype_policy, dtype))
        ref, shape = Ref(nodes[-1].name), nodes[-1].shapes[0]
    return graph.replace_site((node.name,), nodes, Ref(node.name), ref)


def _renamed(graph: ModelGraph) -> ModelGraph:
    """Return the graph with the Add of each merged block called as its block was."""
    alive = {node.name for node in _alive(graph)}
    names = {name: name.removesuffix("_merged_add") for name in alive if name.endswith("_merged_add")}
    names = {old: new for old, new in names.items() if new not in alive}
    swap = lambda ref: replace(ref, node=names.get(ref.node, ref.node))  # noqa: E731
    nodes = [
        replace(
            node,
            name=names.get(node.name, node.name),
            args=map_refs(node.args, swap),
            kwargs=map_refs(dict(node.kwargs), swap),
        )
        for node in _alive(graph)
    ]
    return replace(graph, nodes=tuple(nodes), outputs=map_refs(graph.outputs, swap))


def _alive(graph: ModelGraph) -> ModelGraph:
    """Return the graph without calls that no output depends on; inputs stay."""
    needed = {ref.node for ref in graph.output_refs}
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed |= {ref.node for ref in node.inputs}
    return replace(graph, nodes=tuple(node for node in graph if node.name in needed or node.is_input))


def _require_equal(student: Any, model: Any) -> float:
    """Return the largest relative error of a merged model against its student on probe inputs."""
    rng = np.random.default_rng(0)
    inputs = []
    for tensor in student.inputs:
        shape = (2, *(axis or 32 for axis in tensor.shape[1:]))
        made = rng.normal(size=shape) if "float" in tensor.dtype else rng.integers(0, 256, size=shape)
        inputs.append(made.astype(tensor.dtype))
    wanted, have = (
        [as_float32(one) for one in keras.tree.flatten(net(inputs if len(inputs) > 1 else inputs[0], training=False))]
        for net in (student, model)
    )
    error = max(relative_error(one, other) for one, other in zip(have, wanted, strict=True))
    half = any("16" in str(getattr(layer, "compute_dtype", "")) for layer in student.layers)
    if not error <= (2e-2 if half else NETWORK_TOLERANCE):
        raise MergeError(f"The merged '{student.name}' differs from its student by {error:.1e} (relative).")
    return error
