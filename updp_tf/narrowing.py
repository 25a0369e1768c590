"""Cut channels: a narrower Keras model whose weights are the kept slices, mended with images where there are some.

What goes is chosen within classes of isomorphic groups (METHOD section 5); how much, by a ratio or a budget. With
images, norms are renewed and the layer that closes each block is refitted, in sequence, to the original's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from updp_tf.blocks import find_blocks_in, network_cost, prepared_graph
from updp_tf.console import shown
from updp_tf.cost import Budget, readable
from updp_tf.errors import BudgetError, ModelError
from updp_tf.graph import build_model, read_graph
from updp_tf.isomorphic.cutting import cut_units, kept_of, resized_graph
from updp_tf.isomorphic.dependency import Dependencies, Group, find_dependencies
from updp_tf.isomorphic.gradients import gradient_statistics
from updp_tf.isomorphic.importance import IMPORTANCES, Importance, group_scores, single_input
from updp_tf.isomorphic.scopes import SCOPES, Scope, choose_units
from updp_tf.memory import DEFAULT_LIMIT_BYTES, Memory, image_batches
from updp_tf.refitting import Refitted, refit_closing_layer
from updp_tf.structure import Block, Cost, ModelGraph, Node, Refusal
from updp_tf.walking import Progress, Tensors, Walk, one_blas_thread, units

BISECTIONS = 12
"""Halvings of the ratio while a budget is met: the ratio is known to one part in 4,096."""


@dataclass(frozen=True)
class NarrowedGroup:
    """What became of one group of channels.

    Attributes:
        name: of the layer that makes them.
        members: kinds and roles of the layers that go together.
        before: units it had.
        after: units it has.
    """

    name: str
    members: str
    before: int
    after: int


@dataclass(frozen=True, eq=False)
class NarrowingReport:
    """What `narrow` did.

    Attributes:
        ratio: part of each scope's units that was asked to go.
        scope: which groups shared a ranking.
        importance: what ranked them.
        groups: that could be cut, in topological order.
        kept: what could not be cut, and why.
        before: cost of the original.
        after: cost of the narrowed network.
        refitted: layers that were refitted, with the ridge that held-out images chose.
    """

    ratio: float
    scope: str
    importance: str
    groups: tuple[NarrowedGroup, ...]
    kept: tuple[Refusal, ...]
    before: Cost
    after: Cost
    refitted: Mapping[str, float]

    def __str__(self) -> str:
        changed = [group for group in self.groups if group.after < group.before]
        lines = [
            f"{len(changed)} of {len(self.groups)} groups narrowed ({self.importance}, {self.scope}, "
            f"ratio {self.ratio:.3f}): MACs {readable(self.before.macs, 'macs')} -> "
            f"{readable(self.after.macs, 'macs')}, parameters {self.before.params:,} -> {self.after.params:,}",
            *(f"  {group.name}: {group.before} -> {group.after}" for group in changed),
            *(f"  kept  {refusal}" for refusal in self.kept),
        ]
        return "\n".join(lines)


def narrow(
    model: Any,
    *,
    ratio: float | None = None,
    budget: Mapping[str, Any] | Budget | None = None,
    calibration: Any = None,
    labels: Any = None,
    scope: Scope = "isomorphic",
    importance: Importance = "l2",
    round_to: int = 8,
    streams: bool = False,
    ignore: Collection[str] = (),
    steps: int = 1,
    refit: bool = True,
    seed: int = 0,
    memory_bytes: int = DEFAULT_LIMIT_BYTES,
    verbose: bool = True,
) -> Any:
    """Return a narrower Keras model: the same layers with fewer channels, and the kept slices of their weights.

    Channels that go together are scored together. Residual streams are left whole unless `streams`: cut without
    training, they cost several times the accuracy of channels inside blocks at the same MACs.

    Args:
        model: a built Functional or Sequential Keras 3 model; it is not changed.
        ratio: part of the channels that goes, in (0, 1); give this or `budget`.
        budget: what the result may cost, as in `prune`: the smallest ratio within it is looked for.
        calibration: images as the model reads them. With them, norms are renewed and closing layers refitted;
            `activation`, `taylor` and `hessian` need them.
        labels: of the images, for gradients by the loss the model was compiled with; its own answers where None.
        scope: which channels share a ranking: those of `isomorphic` groups, `global` all, `local` those of a group.
        importance: `l1`, `l2`, `activation`, `taylor`, `hessian` or `random`.
        round_to: every group keeps a multiple of so many channels, and at least so many; heads are not rounded.
        streams: cut residual streams, too.
        ignore: names of layers whose own channels are kept.
        steps: cut in so many steps, scored anew before each.
        refit: refit closing layers to the calibration images; False only renews norms.
        seed: of `random`, and of sampled positions.
        memory_bytes: activations beyond this go to disk.
        verbose: show progress on standard error.

    Returns:
        A Keras model; `model.narrowing` is its `NarrowingReport`, which is not saved with it.

    Raises:
        BudgetError: neither or both of `ratio` and `budget`, a ratio outside (0, 1), a budget that cannot be met.
        CalibrationError: an importance that needs images without them.
        ModelError: a model that cannot be read, no channels that can be cut, unknown names, NaN gradients.
    """
    limits = _checked(ratio, budget, scope, importance, round_to, steps)
    original = prepared_graph(model) if calibration is not None else read_graph(model)
    first = _cuttable(find_dependencies(original), streams, ignore)
    if not first.groups:
        reasons = "; ".join(str(refusal) for refusal in first.boundaries[:5])
        raise ModelError(f"'{model.name}' has no channels that can be cut: {reasons or 'no layer makes any'}.")
    images = None if calibration is None else _collected(original, calibration)
    counts = {group.name: group.size for group in first.groups}
    widths = dict(counts)
    before = network_cost(original)
    graph, dependencies, last_ratio = original, first, 0.0
    kept: dict[str, np.ndarray] = {}
    for step in range(1, steps + 1):
        if step > 1:
            dependencies = _cuttable(find_dependencies(graph), streams, ignore)
        gradients = None
        if importance in ("taylor", "hessian"):
            gradients = gradient_statistics(graph, importance, images, labels, _loss_of(model, labels), seed=seed)
        scores = group_scores(dependencies, importance, images=images, gradients=gradients, seed=seed + step - 1)

        choose = partial(choose_units, dependencies.groups, scores, scope=scope, round_to=round_to, counts=counts)

        if limits is None:
            last_ratio = (ratio or 0.0) * step / steps
        else:
            last_ratio = _ratio_within(dependencies, choose, limits, before, step / steps)
        cut = choose(last_ratio)
        widths |= {group.name: group.size - len(cut.intersection(group.units)) for group in dependencies.groups}
        for ref in dependencies.axes:
            here = kept_of(dependencies, ref, cut)
            kept[str(ref)] = kept[str(ref)][here] if str(ref) in kept else here
        graph = cut_units(dependencies, cut)
    refitted: dict[str, float] = {}
    if images is not None:
        with shown(verbose) as progress:
            graph, refitted = _mended(
                original, graph, kept, images, refit=refit, seed=seed, memory_bytes=memory_bytes, progress=progress
            )
    narrowed = build_model(graph)
    narrowed.narrowing = NarrowingReport(
        last_ratio,
        scope,
        importance,
        tuple(
            NarrowedGroup(group.name, str(group.signature), group.size, widths[group.name]) for group in first.groups
        ),
        first.boundaries,
        before,
        network_cost(graph),
        refitted,
    )
    return narrowed


def _checked(ratio: Any, budget: Any, scope: str, importance: str, round_to: int, steps: int) -> Budget | None:
    if (ratio is None) == (budget is None):
        raise BudgetError("Give either `ratio`, the part of the channels that goes, or `budget`.")
    if ratio is not None and not (isinstance(ratio, int | float) and 0 < ratio < 1):
        raise BudgetError(f"`ratio` is the part of the channels that goes, above 0 and below 1. Received: {ratio!r}.")
    for name, value, known in (("scope", scope, SCOPES), ("importance", importance, IMPORTANCES)):
        if value not in known:
            raise BudgetError(f"`{name}` is one of {', '.join(known)}. Received: {value!r}.")
    for name, number in (("round_to", round_to), ("steps", steps)):
        if not isinstance(number, int) or number < 1:
            raise BudgetError(f"`{name}` is a whole number, 1 or more. Received: {number!r}.")
    if budget is None:
        return None
    limits = Budget.parse(budget)
    if limits.merged is not None:
        raise BudgetError("`narrow` merges no blocks: a budget of merged blocks is for `prune`.")
    if limits.needs_table is not None:
        raise BudgetError(f"A latency table knows no narrower layers: '{limits.needs_table}' is for `prune`.")
    return limits


def _collected(graph: ModelGraph, calibration: Any) -> np.ndarray:
    """Calibration images as one array: scores and mending each go through them, and an iterator may not start again."""
    return np.concatenate(list(image_batches(calibration, shape=graph.shape(single_input(graph)))))


def _loss_of(model: Any, labels: Any) -> Any:
    """The loss a model was compiled with, where there are labels for it."""
    if labels is None:
        return None
    loss = getattr(model, "loss", None)
    if loss is None:
        raise ModelError(
            f"'{model.name}' is not compiled, so there is no loss for the labels; compile it, or give none."
        )
    return loss


def _cuttable(dependencies: Dependencies, streams: bool, ignore: Collection[str]) -> Dependencies:
    """Return the dependencies with the groups that are left whole moved to the refusals."""
    names = {node.name for node in dependencies.graph} | {
        getattr(node.layer, "name", node.name) for node in dependencies.graph
    }
    if unknown := sorted(set(ignore) - names):
        raise ModelError(f"'{dependencies.graph.name}' has no layer named '{unknown[0]}', which `ignore` lists.")
    groups: list[Group] = []
    kept: list[Refusal] = []
    for group in dependencies.groups:
        makers = [member for member in group.members if member.role not in ("in", "through")]
        ignored = [m for m in makers if m.node.name in ignore or getattr(m.node.layer, "name", "") in ignore]
        if ignored:
            kept.append(Refusal(group.name, "ignore", f"'{ignored[0].node.name}' is to be left whole"))
        elif group.is_stream and not streams:
            kept.append(Refusal(group.name, "stream", "a residual stream, left whole; streams=True cuts it"))
        else:
            groups.append(group)
    return replace(dependencies, groups=tuple(groups), boundaries=(*dependencies.boundaries, *kept))


def _ratio_within(
    dependencies: Dependencies, choose: Callable[[float], frozenset[int]], limits: Budget, original: Cost, part: float
) -> float:
    """Return the smallest ratio whose cost is within the limits, or the given part of the way to them."""
    costs: dict[frozenset[int], Cost] = {}

    def cost(ratio: float) -> Cost:
        cut = choose(ratio)
        if cut not in costs:
            costs[cut] = network_cost(resized_graph(dependencies, cut))
        return costs[cut]

    bounds = {
        unit: bound if part == 1 else int(getattr(original, unit) * (bound / getattr(original, unit)) ** part)
        for unit, bound in limits.bounds(original).items()
    }

    def is_met(ratio: float) -> bool:
        return all(getattr(cost(ratio), unit) <= bound for unit, bound in bounds.items())

    if is_met(0.0):
        return 0.0
    low, high = 0.0, 1.0
    if not is_met(high):
        least = ", ".join(f"{readable(getattr(cost(high), unit), unit)} {unit}" for unit in bounds)
        raise BudgetError(f"Narrowing cannot come down to {limits}: with every group at its least it has {least}.")
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_met(middle) else (middle, high)
    return high


def _mended(
    original: ModelGraph,
    narrowed: ModelGraph,
    kept: Mapping[str, np.ndarray],
    images: Any,
    *,
    refit: bool,
    seed: int,
    memory_bytes: int,
    progress: Progress | None,
) -> tuple[ModelGraph, dict[str, float]]:
    """Renew the norms and refit the closing layers of a narrowed graph, in sequence along it.

    Args:
        original: the teacher.
        narrowed: the student: calls of the same names.
        kept: indices of the last axis of each tensor that the student still has, by the tensor's name.
        images: calibration data.
        refit: refit closing layers, not norms alone.
        seed: of the sampled positions.
        memory_bytes: activations beyond this go to disk.
        progress: called after each part of the network.
    """
    own: dict[str, Node] = {}
    refitted: dict[str, float] = {}
    with Memory(memory_bytes) as memory, one_blas_thread():
        teacher_walk = Walk(original, images, memory)
        student_walk = Walk(narrowed, teacher_walk.images, memory)
        blocks = find_blocks_in(original)
        parts = units(original, blocks)
        teacher, student = teacher_walk.start(), student_walk.start()
        for index, part in enumerate(parts):
            if refit:
                theirs = [original.by_name[name] for name in part.nodes]
                teacher |= teacher_walk.run(theirs, {ref: ref for ref in part.writes}, teacher)
            nodes = student_walk.renew_norms([narrowed.by_name[name] for name in part.nodes], student)
            if refit and part.block is not None:
                found = _refitted(student_walk, part.block, nodes, teacher, student, kept, seed)
                if found is not None:
                    student_walk.forget_behind(nodes, found.nodes, student)
                    nodes = list(found.nodes)
                    refitted[found.layer] = found.ridge
            own |= {node.name: node for node in nodes}
            student |= student_walk.run(nodes, {ref: ref for ref in part.writes}, student)
            student_walk.release(parts[index + 1 :], teacher, student)
            if progress is not None:
                progress(index + 1, len(parts), f"mend {part.name}")
    return replace(narrowed, nodes=tuple(own.get(node.name, node) for node in narrowed)), refitted


def _refitted(
    walk: Walk,
    block: Block,
    nodes: list[Node],
    teacher: Tensors,
    student: Tensors,
    kept: Mapping[str, np.ndarray],
    seed: int,
) -> Refitted | None:
    wanted = teacher[block.exit]
    here = kept[str(block.exit)]
    if len(here) < wanted.shape[-1]:
        wanted = wanted[..., here]
    return refit_closing_layer(walk, block, nodes, wanted, student, seed=seed)
