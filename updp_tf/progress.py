"""Blend a plan into a model slowly: the student that is trained.

A student holds each pruned block twice over (`whole`), or the activations, norms and gates in it twice over
(`expanded`): as they were, and as what takes their place. At blend 1 it computes what the model computes; at blend 0
every pruned block is linear, and `settling` writes it as the single layer that it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np

from updp_tf import rules
from updp_tf.applying import blocks_of_plan, maps_of_plan
from updp_tf.blend_starts import Lines, start
from updp_tf.blocks import Blocks, prepared_graph
from updp_tf.console import shown
from updp_tf.errors import PlanError
from updp_tf.expanding import Norms, NotExpandable, Surgeon, activation_layer, refuse_norm
from updp_tf.forms import Fitted, form_by_name
from updp_tf.graph import build_model, clone_layer, read_graph
from updp_tf.layers import ActivationBlend, NormBlend
from updp_tf.memory import DEFAULT_LIMIT_BYTES, Memory, calibration_images
from updp_tf.merging import merge_in_sequence
from updp_tf.planning import Plan
from updp_tf.schedule import Schedule
from updp_tf.structure import Node, Ref, Refusal, block_name

Mode = Literal["expanded", "whole"]


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
    surgeon = Surgeon(blocks.graph)
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
    surgeon = Surgeon(prepared_graph(model))
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
                except NotExpandable as error:
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


def _soften(surgeon: Surgeon, name: str, kind: str, schedule: Schedule) -> None:
    node = surgeon.graph.by_name[name]
    (read,) = node.inputs
    shape = surgeon.graph.shape(read)
    options = {**_window(schedule), "name": f"{name}_blend", "dtype": getattr(node.layer, "dtype_policy", None)}
    if kind == "norms":
        refuse_norm(node, shape)
        layer: Any = NormBlend(clone_layer(node.layer, name, input_shape=shape), **options)
    else:
        function = rules.activation(node)
        softer = SOFTER.get(function.name, "relu") if function is not None else "relu"
        target = keras.layers.Activation(softer, name=name)
        layer = ActivationBlend(activation_layer(node, surgeon.graph), target, **options)
    blend = surgeon.node(layer, (read,), (shape,), node.dtypes[0])
    surgeon.graph = surgeon.graph.replace_site((name,), (blend,), Ref(name), Ref(blend.name))
