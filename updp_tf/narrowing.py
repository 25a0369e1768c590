"""Cut channels: a narrower Keras model whose weights are the kept slices, mended with images where there are some.

What goes is chosen within classes of isomorphic groups (METHOD section 5); how much, by a ratio or a budget. With
images, norms are renewed and the layer that closes each block is refitted, in sequence, to the original's outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from updp_tf.blocks import find_blocks_in, network_cost, prepared_graph
from updp_tf.console import shown
from updp_tf.cost import TABLE_UNITS, Budget
from updp_tf.errors import BudgetError, ModelError
from updp_tf.expansions import expand
from updp_tf.graph import build_model, read_graph
from updp_tf.isomorphic.cutting import cut_units, kept_of
from updp_tf.isomorphic.importance import Importance, single_input
from updp_tf.isomorphic.ranking import Allocation, Ranking, Width, nothing_to_cut
from updp_tf.isomorphic.ratios import Measure, Measurer, measured_ratio, ratio_within
from updp_tf.isomorphic.scopes import Scope
from updp_tf.memory import DEFAULT_LIMIT_BYTES, Memory, image_batches
from updp_tf.refitting import Refitted, refit_closing_layer
from updp_tf.reporting import NarrowedGroup, NarrowingReport
from updp_tf.structure import Block, Cost, ModelGraph, Node, Ref
from updp_tf.walking import Progress, Tensors, Unit, Walk, one_blas_thread, units


def narrow(
    model: Any,
    *,
    ratio: float | None = None,
    budget: Mapping[str, Any] | Budget | None = None,
    calibration: Any = None,
    labels: Any = None,
    scope: Scope = "isomorphic",
    importance: Importance | None = None,
    allocation: Allocation = "ratio",
    round_to: int = 8,
    streams: bool = False,
    ignore: Collection[str] = (),
    steps: int = 1,
    refit: bool = True,
    target: Measurer | None = None,
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
        budget: what the result may cost, as in `prune`: the smallest ratio within it is looked for. For times and
            bytes of files, networks of several ratios are exported and measured beside the original.
        calibration: images as the model reads them. With them, norms are renewed and closing layers refitted;
            `activation`, `taylor` and `hessian` need them.
        labels: of the images, for gradients by the loss the model was compiled with; its own answers where None.
        scope: as in `Width`, like the next five.
        importance: what ranks channels; where None, `hessian` with images, `l2` without.
        allocation: how much each scope gives under a budget.
        round_to: what every group keeps a multiple of.
        streams: cut residual streams, too.
        ignore: names of layers whose own channels are kept.
        steps: cut in so many steps, scored anew before each.
        refit: refit closing layers to the calibration images; False only renews norms.
        target: what a budget in time or bytes is measured on: a `Target`.
        seed: of `random`, and of sampled positions.
        memory_bytes: activations beyond this go to disk.
        verbose: show progress on standard error.

    Returns:
        A Keras model; `model.narrowing` is its `NarrowingReport`, which is not saved with it.

    Raises:
        BudgetError: neither or both of `ratio` and `budget`, a ratio outside (0, 1), a budget that cannot be met, one
            in time or bytes without a `target`.
        CalibrationError: an importance that needs images without them.
        ModelError: a model that cannot be read, no channels that can be cut, unknown names, NaN gradients.
        TfliteExportError: the target's device is absent or went away.
    """
    width = Width(scope, importance, allocation, round_to, streams, tuple(ignore))
    amount = _checked(ratio, budget, width, steps, target)
    # composite layers hide channels; activations inside layers only matter to fits
    graph = prepared_graph(model) if calibration is not None else expand(read_graph(model))
    ranking = Ranking(width, None, labels, _loss_of(model, labels), seed)
    if not ranking.cuttable(graph).groups:
        raise ModelError(nothing_to_cut(graph, ranking))
    images = None if calibration is None else _collected(graph, calibration)
    with shown(verbose) as progress, nullcontext() if target is None else target.against(model) as measure:
        narrowed, report = narrow_graph(
            graph,
            amount,
            replace(ranking, images=images),
            steps=steps,
            refit=refit,
            measure=measure,
            memory_bytes=memory_bytes,
            progress=progress,
        )
    small = build_model(narrowed)
    small.narrowing = report
    return small


def narrow_graph(
    graph: ModelGraph,
    amount: float | Budget,
    ranking: Ranking,
    *,
    original: Cost | None = None,
    teacher: ModelGraph | None = None,
    steps: int = 1,
    refit: bool = True,
    measure: Measure | None = None,
    memory_bytes: int = DEFAULT_LIMIT_BYTES,
    progress: Progress | None = None,
) -> tuple[ModelGraph, NarrowingReport]:
    """Return a graph with fewer channels, mended where there are images, and what was done.

    Args:
        graph: to be narrowed; prepared for blocks to be found in it, where there are images.
        amount: part of the channels that goes, or a budget.
        ranking: of its channels.
        original: cost that a budget's fractions are of; that of `graph` where None.
        teacher: graph whose tensors of the same names closing layers are refitted to, and whose time and bytes a
            budget's fractions are of; `graph` where None.
        steps: cut in so many steps.
        refit: refit closing layers.
        measure: what times networks, for a budget in time or bytes.
        memory_bytes: activations beyond this go to disk.
        progress: called after each part of the network.

    Raises:
        BudgetError: the budget cannot be met.
        ModelError: no channels can be cut.
    """
    first = ranking.cuttable(graph)
    if not first.groups:
        raise ModelError(nothing_to_cut(graph, ranking))
    counts = {group.name: group.size for group in first.groups}
    widths = dict(counts)
    before, after = network_cost(graph), None
    narrowed, dependencies, last_ratio = graph, first, 0.0
    kept: dict[str, np.ndarray] = {}
    for step in range(1, steps + 1):
        if step > 1:
            dependencies = ranking.cuttable(narrowed)
        ranked = ranking.ranked(dependencies, counts=counts, step=step, progress=progress)
        if isinstance(amount, Budget):
            if ranking.width.allocation == "score":
                ranked = ranked.allocated("macs" if amount.unit in TABLE_UNITS else amount.unit)
            if measure is not None and amount.needs_table is not None:
                last_ratio, before, after = measured_ratio(
                    ranked, amount, measure, teacher or graph, step / steps, progress
                )
            else:
                last_ratio = ratio_within(ranked, amount, original or before, step / steps)
        else:
            last_ratio = amount * step / steps
        cut = ranked.cut(last_ratio)
        widths |= {group.name: group.size - len(cut.intersection(group.units)) for group in dependencies.groups}
        for ref in dependencies.axes:
            here = kept_of(dependencies, ref, cut)
            kept[str(ref)] = kept[str(ref)][here] if str(ref) in kept else here
        narrowed = cut_units(dependencies, cut)
    refitted: dict[str, float] = {}
    if ranking.images is not None:
        mender = _Mender(teacher or graph, graph, narrowed, kept, refit, ranking.seed)
        with Memory(memory_bytes) as memory, one_blas_thread():
            narrowed, refitted = mender.run(ranking.images, memory, progress)
    groups = tuple(
        NarrowedGroup(group.name, str(group.signature), group.size, widths[group.name]) for group in first.groups
    )
    width = ranking.width
    report = NarrowingReport(
        last_ratio,
        width.scope,
        ranking.importance(graph),
        groups,
        first.boundaries,
        before,
        after or network_cost(narrowed),
        refitted,
    )
    return narrowed, report


def _checked(ratio: Any, budget: Any, width: Width, steps: int, target: Measurer | None) -> float | Budget:
    if (ratio is None) == (budget is None):
        raise BudgetError("Give either `ratio`, the part of the channels that goes, or `budget`.")
    if not isinstance(steps, int) or steps < 1:
        raise BudgetError(f"`steps` is a whole number, 1 or more. Received: {steps!r}.")
    if budget is not None:
        limits = Budget.parse(budget)
        if limits.merged is not None:
            raise BudgetError("`narrow` merges no blocks: a budget of merged blocks is for `prune`.")
        if limits.needs_table is not None and target is None:
            raise BudgetError(
                f"A budget in '{limits.needs_table}' is measured: say on what, with "
                "target=updp_tf.Target(device='local', precision='int8')."
            )
        return limits
    if not (isinstance(ratio, int | float) and 0 < ratio < 1):
        raise BudgetError(f"`ratio` is the part of the channels that goes, above 0 and below 1. Received: {ratio!r}.")
    if width.allocation != "ratio":
        raise BudgetError("With a `ratio` every scope gives the same part; `allocation` is for a `budget`.")
    return float(ratio)


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


@dataclass(frozen=True, eq=False)
class _Mender:
    """Renews the norms and refits the closing layers of a narrowed graph, in sequence along it.

    Attributes:
        teacher: whose tensors are refitted to.
        whole: the graph as it was before it was narrowed: calls and blocks of the same names.
        narrowed: the student.
        kept: indices of the last axis of each tensor that the student still has, by the tensor's name.
        refit: refit closing layers, not norms alone.
        seed: of the sampled positions.
    """

    teacher: ModelGraph
    whole: ModelGraph
    narrowed: ModelGraph
    kept: Mapping[str, np.ndarray]
    refit: bool
    seed: int

    def run(self, images: np.ndarray, memory: Memory, progress: Progress | None) -> tuple[ModelGraph, dict[str, float]]:
        """Return the mended graph, and the refitted layers with the ridge that held-out images chose."""
        own: dict[str, Node] = {}
        refitted: dict[str, float] = {}
        walk = Walk(self.narrowed, images, memory)
        parts = units(self.whole, find_blocks_in(self.whole))
        exits = [part.block.exit for part in parts if part.block is not None]
        targets = _Targets(Walk(self.teacher, walk.images, memory), exits if self.refit else ())
        student = walk.start()
        for index, part in enumerate(parts):
            nodes = walk.renew_norms([self.narrowed.by_name[name] for name in part.nodes], student)
            wanted = None if part.block is None else targets.take(part.block.exit)
            if part.block is not None and wanted is not None:
                found = self._refitted(walk, part.block, nodes, wanted, student)
                if found is not None:
                    walk.forget_behind(nodes, found.nodes, student)
                    nodes = list(found.nodes)
                    refitted[found.layer] = found.ridge
            own |= {node.name: node for node in nodes}
            student |= walk.run(nodes, {ref: ref for ref in part.writes}, student)
            walk.release(parts[index + 1 :], student)
            if progress is not None:
                progress(index + 1, len(parts), f"mend {part.name}")
        nodes_now = tuple(own.get(node.name, node) for node in self.narrowed)
        return replace(self.narrowed, nodes=nodes_now), refitted

    def _refitted(
        self, walk: Walk, block: Block, nodes: list[Node], wanted: np.ndarray, student: Tensors
    ) -> Refitted | None:
        here = self.kept[str(block.exit)]
        if len(here) < wanted.shape[-1]:
            wanted = wanted[..., here]
        return refit_closing_layer(walk, block, nodes, wanted, student, seed=self.seed)


class _Targets:
    """Tensors of a teacher, computed as they are asked for.

    Args:
        walk: over the teacher's graph.
        wanted: tensors that will be asked for, in topological order; those that the teacher does not have are None.
    """

    def __init__(self, walk: Walk, wanted: Iterable[Ref]) -> None:
        graph = walk.graph
        self._walk = walk
        self._wanted = dict.fromkeys(ref for ref in wanted if ref.node in graph.by_name)
        self._parts = list(units(graph, find_blocks_in(graph)))
        self._tensors = walk.start()

    def take(self, ref: Ref) -> np.ndarray | None:
        """Return a tensor; what was returned before is gone then."""
        if ref not in self._wanted:
            return None
        self._forget()
        while ref not in self._tensors:
            self._advance()
        del self._wanted[ref]
        return self._tensors[ref]

    def _advance(self) -> None:
        part = self._parts.pop(0)
        nodes = [self._walk.graph.by_name[name] for name in part.nodes]
        inside = set(part.nodes)
        refs = dict.fromkeys((*part.writes, *(ref for ref in self._wanted if ref.node in inside)))
        self._tensors |= self._walk.run(nodes, {ref: ref for ref in refs}, self._tensors)
        self._forget()

    def _forget(self) -> None:
        still = Unit((), None, tuple(self._wanted), ())
        self._walk.release((*self._parts, still), self._tensors)
