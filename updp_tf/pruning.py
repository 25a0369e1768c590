"""The order of the stages: find blocks, score forms, choose under a budget, merge, verify, report."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from updp_tf.accuracy import DropLimit, agreement_drop, drop_limit, gives_classes, held_out_outputs, smallest_within
from updp_tf.applying import arrays_beside, blocks_of_plan, maps_of_plan, plan_of
from updp_tf.blocks import Blocks, find_blocks, network_cost, prepared_graph, require_blocks
from updp_tf.choosing import Measures, Method, choose, method_of
from updp_tf.console import shown
from updp_tf.cost import Budget
from updp_tf.errors import BudgetError, CalibrationError, TrainingError
from updp_tf.forms import Fitted, Form, all_forms, form_by_name
from updp_tf.graph import fingerprint, load_model, weights_hash
from updp_tf.isomorphic.ranking import Ranking, Width
from updp_tf.isomorphic.ratios import Measurer
from updp_tf.judging import Judge, ScoreFn, total_divergence
from updp_tf.learning import learn
from updp_tf.measuring import Target
from updp_tf.memory import DEFAULT_LIMIT_BYTES, Memory, calibration_images
from updp_tf.merging import Choice, Merged, merge_fitted, merge_in_sequence
from updp_tf.partitioning import Solution
from updp_tf.planning import Plan
from updp_tf.reconstructing import reconstruct
from updp_tf.rejoining import rejoined
from updp_tf.reporting import PruningReport, scored_blocks
from updp_tf.runs import RunDir
from updp_tf.scoring import (
    FormCost,
    Sampler,
    Scores,
    Start,
    own_cost,
    require_names,
    score,
    score_without_images,
)
from updp_tf.searching import SearchReport, Space
from updp_tf.settling import merged_student
from updp_tf.sharing import Split, share_budget
from updp_tf.solving import RIDGE
from updp_tf.structure import Candidate, Cost, block_name
from updp_tf.timing import with_latencies
from updp_tf.trained import train_pruned
from updp_tf.training import Training
from updp_tf.walking import Progress

if TYPE_CHECKING:
    from tflite_export import LatencyTable

DEFAULT_BUDGET = {"macs": 0.8}
"""What `prune(model)` aims at where nothing is asked."""


@dataclass(frozen=True)
class Options:
    """How forms are fitted and merged.

    Attributes:
        start: `least_squares` needs images; `gaussian` and `identity` take the block's own weights. Least squares where
            there are images, gaussian where there are none, if None.
        skip: `auto`, `kept` or `folded`: how dense forms treat a skip.
        in_sequence: fit from the pruned network's activations, not from the original's.
        reestimate: renew the norms behind the first edit.
        refit: refit layers that close kept blocks where held-out images gain by it.
        reconstruct_steps: train the fitted layers alone for so many steps, without labels, kept where held-out images
            gain by it.
        rejoin: merge merged blocks again that read one another with nothing in between, or that read the same tensor
            and are added, where the one layer that they are multiplies less; outputs stay as they are, up to rounding.
        exact_borders: without images, merge so that border pixels are those of the linearised block too: one more Add
            in each merged block, and only where its size is fixed and 1x1 layers alone come before its padding.
        spans: up to how many consecutive blocks one form may replace; only where forms are fitted to images.
        parts: choose among the single layers of blocks instead of whole blocks: what is left keeps its activations and
            skips. With `spans` neighbouring layers go together, up to all of a block.
        ridge: strength of the regressions in mean eigenvalues.
        seed: of the sampled positions.
        memory_bytes: activations beyond this go to disk.
    """

    start: Start | None = None
    skip: Literal["auto", "kept", "folded"] = "auto"
    in_sequence: bool = True
    reestimate: bool = True
    refit: bool = True
    reconstruct_steps: int = 0
    rejoin: bool = False
    exact_borders: bool = False
    spans: int = 1
    parts: bool = False
    ridge: float = RIDGE
    seed: int = 0
    memory_bytes: int = DEFAULT_LIMIT_BYTES


def prune(
    model: Any,
    *,
    calibration: Any = None,
    budget: Mapping[str, float] | None = None,
    max_drop: Mapping[str, float] | None = None,
    keep: Iterable[str] = (),
    forms: Sequence[str] | None = None,
    score_fn: ScoreFn | None = None,
    method: str | Method = "additive",
    latency: LatencyTable | str | os.PathLike[str] | None = None,
    target: Measurer | None = None,
    judge: Measures | None = None,
    train: Any = None,
    validation: Iterable[Any] | None = None,
    training: Training | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    width: Width | bool = False,
    options: Options | None = None,
    verbose: bool = True,
) -> Any:
    """Return a shallower Keras model: blocks merged into single layers, without training or with it.

    Args:
        model: a trained Functional or Sequential Keras 3 model; it is not changed.
        calibration: a few hundred unlabelled images as the model reads them: an array, a `tf.data.Dataset`, a
            `PyDataset` or any iterable of batches. Without them only the blocks' own norms are used.
        budget: what is kept: `{"macs": 0.7}`, `params`, `activation_bytes` as fractions, `macs_max` and so on as
            absolute numbers, `{"merged": 5}` for a number of blocks; several hold together. With a latency table also
            `{"latency": 0.6}`, `{"latency_ms": 1.2}`, `{"bytes": 0.5}` and `{"bytes_max": 2_000_000}`. 0.8 of the
            MACs, or the nearest that can be had, where neither this nor `max_drop` is given.
        max_drop: the accuracy side: `{"agreement": 0.02}` gives the smallest plan that keeps the class of at least
            98 % of held-out calibration images; `{"score": x}` the same for `score_fn`.
        keep: names of blocks never to touch.
        forms: names of the forms to consider; all registered ones where None.
        score_fn: for outputs that are no class scores: (original outputs, pruned outputs) -> loss.
        method: how to search: `additive` (the smallest sum of scores), `exact` (the best few sums measured together on
            held-out images, then swaps), `genetic`, `random`, `uniform`, or one of `Exact`, `Genetic`, ... with its
            settings.
        latency: what blocks and forms take on a device, as `measure_latency` returns it, or its file; no form that it
            says is slower than its block is picked, whatever the budget.
        target: with `width` and a budget in time or bytes of files: what narrower networks, of which a table knows
            nothing, are exported for and timed on: a `Target` like the table's.
        judge: what measures plans in the place of held-out calibration images, for instance `Supernet.judge(...)`.
        train: data to train the pruned network on, the original teaching: (images, labels) or images as arrays, a
            `PyDataset`, or a `tf.data.Dataset` of batches that gives the same ones each time; labels are optional. No
            training where None.
        validation: batches of (images, labels) or images, whose accuracy is logged after each piece of the training.
        training: how it is trained; `Training()` where None.
        run_dir: folder that keeps every stage, checkpoints and the log: a call that was stopped, however, is continued
            by the same call.
        width: cut channels as well: how much of the saving is depth's and how much width's is tried out on held-out
            images, half of the way each where there are none. `Width(...)` says which channels may go. With the
            `additive` method; under a budget in time or bytes of files, with a `target` as well as a table.
        options: how forms are fitted and merged.
        verbose: show progress on standard error.

    Returns:
        A plain Keras model of stock layers, with a `PruningReport` as `model.pruning`.

    Raises:
        ModelError: the model cannot be read, or has no block that could be pruned.
        CalibrationError: images that do not fit the model, or none where they are needed.
        BudgetError: a budget that cannot be met; the message says the nearest that can.
        TrainingError: training data that do not fit, or a loss that is no number.
        RunError: the run directory is in use, or of another call; the message says by whom, or what differs.

    Example:
        >>> small = updp_tf.prune(model, calibration=images, budget={"merged": 5})  # doctest: +SKIP
        >>> print(small.pruning)  # doctest: +SKIP
    """
    if train is None and (validation, training, run_dir) != (None, None, None):
        raise TrainingError("`validation`, `training` and `run_dir` belong to a training: give `train` as well.")
    widths = (Width() if width else None) if isinstance(width, bool) else width
    started = _started(options, calibration)
    ask = _Ask(model, budget, max_drop, tuple(keep), forms, score_fn, method, judge, latency, target, widths, *started)
    if widths is not None:
        _require_depth_and_width_go_together(ask, training)
    elif target is not None:
        raise BudgetError("`target` is what narrower networks are timed on: it goes with `width`.")
    if train is not None:
        return _prune_and_train(ask, calibration, train, validation, training or Training(), run_dir, verbose)
    return _prune_at_once(ask, calibration, verbose)[0]


@dataclass(frozen=True, eq=False)
class _Ask:
    """What `prune` was asked, but for the images and the training."""

    model: Any
    budget: Mapping[str, float] | None
    max_drop: Mapping[str, float] | None
    keep: tuple[str, ...]
    forms: Sequence[str] | None
    score_fn: ScoreFn | None
    method: str | Method
    judge: Measures | None
    latency: LatencyTable | str | os.PathLike[str] | None
    target: Measurer | None
    width: Width | None
    options: Options
    start: Start

    def as_json(self, images: np.ndarray | None) -> dict[str, Any]:
        """What decides the plan, as plain data."""
        graph = prepared_graph(self.model)
        return {
            "model": fingerprint(graph),
            "weights": weights_hash(graph),
            "calibration": None if images is None else hashlib.sha256(images.tobytes()).hexdigest(),
            "budget": self.budget and dict(self.budget),
            "max_drop": self.max_drop and dict(self.max_drop),
            "keep": list(self.keep),
            "forms": None if self.forms is None else list(self.forms),
            "score_fn": None if self.score_fn is None else getattr(self.score_fn, "__qualname__", "a function"),
            "method": str(self.method),
            "judge": None if self.judge is None else f"{self.judge.measure} on {self.judge.n_images} images",
            "latency": None if self.latency is None else str(self.latency),
            "target": None if self.target is None else str(self.target),
            "width": None if self.width is None else asdict(self.width),
            "options": asdict(self.options),
        }


def _prune_and_train(
    ask: _Ask,
    calibration: Any,
    train: Any,
    validation: Iterable[Any] | None,
    training: Training,
    run_dir: str | os.PathLike[str] | None,
    verbose: bool,
) -> Any:
    """Prune at once, train, and keep every stage where there is a run directory."""
    with ExitStack() as stack:
        images = stack.enter_context(_images(find_blocks(ask.model), calibration, ask.options))
        run: RunDir | None = None
        if run_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="updp-tf-")))
        else:
            arguments = {**ask.as_json(images), "training": training.as_json()}
            packages = ("updp-tf", "keras", "numpy", "scipy")
            run = stack.enter_context(RunDir(run_dir, arguments=arguments, packages=packages))
            folder = run.path / "start"

        def write(found: tuple[Any, Plan, dict[str, np.ndarray]], folder: Path) -> None:
            small, plan, arrays = found
            small.save(folder / "start.keras")
            plan.save(folder / "plan.json", arrays)
            (folder / "report.json").write_text(small.pruning.to_json(), encoding="utf-8")

        def read(folder: Path) -> Any:
            small = load_model(folder / "start.keras", like=ask.model)
            small.pruning = PruningReport.from_json((folder / "report.json").read_text(encoding="utf-8"))
            return small

        def at_once() -> tuple[Any, Plan, dict[str, np.ndarray]]:
            return _prune_at_once(ask, images, verbose)

        if run is None:
            write(at_once(), folder)
            small = read(folder)
        else:
            # What `stage` returns is what `read` gives.
            small = run.stage("start", cast(Any, at_once), write=cast(Any, write), read=read)
        report = small.pruning
        with shown(verbose) as progress:
            net, notes = train_pruned(
                ask.model,
                small,
                folder / "plan.json",
                training,
                train,
                images=images,
                validation=validation,
                run=run,
                memory_bytes=ask.options.memory_bytes,
                progress=progress,
            )
        agreement = report.agreement
        if images is not None and gives_classes(ask.model):
            agreement = 1.0 - agreement_drop(*held_out_outputs(ask.model, net, images))
        net.pruning = replace(report, agreement=agreement, notes=(*report.notes, *notes))
        return net


def _prune_at_once(ask: _Ask, calibration: Any, verbose: bool) -> tuple[Any, Plan, dict[str, np.ndarray]]:
    """Return the merged model with its report, its plan, and the arrays beside that."""
    model, options, start, budget, score_fn = ask.model, ask.options, ask.start, ask.budget, ask.score_fn
    blocks, cost_of = _costed(_blocks(model, options), _parsed(budget), read_table(ask.latency), ask.forms, options)
    limit = drop_limit(model, budget, ask.max_drop, score_fn)
    way = method_of(ask.method)
    agreement: float | None = None
    notes: tuple[str, ...] = ()
    split: Split | None = None
    with _images(blocks, calibration, options) as images, shown(verbose) as progress:
        scores = _score(blocks, images, _parsed(budget), ask.keep, ask.forms, start, options, cost_of, progress)
        with _judge(blocks, scores, images, way, ask.judge, score_fn, options) as measures:
            if ask.width is not None:
                found, merged, split, notes = _shared(ask, ask.width, blocks, scores, images, progress)
            elif limit is not None:
                found, merged = _from_accuracy(model, blocks, scores, images, limit, way, measures, options, progress)
            else:
                found = _choose(blocks, scores, images, budget, way, measures, progress)
                notes = (found.note,) if found.note else ()
                merged = _merge(blocks, found.solution.chosen, images, scores, options, progress)
        if options.reconstruct_steps and images is not None:
            merged, note = _reconstructed(model, merged, images, options, progress)
            notes = (*notes, note)
        if options.rejoin:
            merged, joined = rejoined(merged)
            notes = (*notes, f"merged again into single layers: {', '.join(joined) or 'none, nothing would cost less'}")
        if images is not None and gives_classes(model):
            agreement = 1.0 - agreement_drop(*held_out_outputs(model, merged.model, images))
    worse = [block.name for block in merged.blocks if block.r2 is not None and block.r2 < 0]
    if worse:
        notes = (*notes, f"explained less than a constant would on held-out images: {', '.join(worse)}; keep them")
    plan = _plan(model, blocks, found, merged.fitted, budget or ask.max_drop or DEFAULT_BUDGET)
    with_arrays = replace(plan, edits=tuple(replace(edit, arrays=block_name(edit.blocks)) for edit in plan.edits))
    before, predicted = (blocks.network_cost, found.solution.cost) if split is None else split.costs
    report = PruningReport(
        plan=plan,
        blocks=merged.blocks,
        before=before,
        after=_like(network_cost(prepared_graph(merged.model)), predicted),
        agreement=agreement,
        refitted=merged.refitted,
        refusals=(*blocks.skipped, *scores.refusals),
        error=merged.error,
        notes=notes,
        search=found.report,
        network=scored_blocks(blocks, scores.candidates),
        narrowing=None if split is None else split.narrowing,
    )
    merged.model.pruning = report
    return merged.model, with_arrays, arrays_beside(with_arrays, merged.fitted)


def _require_depth_and_width_go_together(ask: _Ask, training: Training | None) -> None:
    """Refuse what is defined for depth alone."""
    if ask.max_drop is not None:
        raise BudgetError("With width, give a `budget`: `max_drop` searches depth alone.")
    if method_of(ask.method).name != "additive" or ask.judge is not None:
        raise BudgetError("With width, plans are found by the `additive` method; splits are measured, plans are not.")
    needed = _parsed(ask.budget).needs_table
    if needed is None and (ask.latency, ask.target) != (None, None):
        told = "`target`" if ask.latency is None else "`latency`"
        raise BudgetError(f"With width, {told} is for a budget in time or bytes of files, such as {{'latency': 0.6}}.")
    if needed is not None and ask.target is None:
        raise BudgetError(
            f"A latency table knows no narrower layers: with width, a budget in '{needed}' is measured; say on what, "
            "with target=updp_tf.Target(device='local', precision='int8') (--device local), like the table's."
        )
    table = read_table(ask.latency)
    if table is not None and isinstance(ask.target, Target):
        asked, known = ((one.precision, one.threads) for one in (ask.target, table.conditions))
        if asked != known:
            raise BudgetError(
                f"`target` times networks in {asked[0]} with {asked[1]} threads; "
                f"{table.source} holds times in {known[0]} with {known[1]}: take the same."
            )
    for told in ("reconstruct_steps", "rejoin", "parts"):
        if getattr(ask.options, told):
            raise BudgetError(f"With width, blocks and fitted layers stay whole: leave `{told}` as it is by default.")
    if training is not None and training.mode != "direct":
        raise TrainingError(f"With width, the pruned network is trained at once: mode='direct', not {training.mode!r}.")


def _shared(
    ask: _Ask, width: Width, blocks: Blocks, scores: Scores, images: np.ndarray | None, progress: Progress | None
) -> tuple[Found, Merged, Split, tuple[str, ...]]:
    """Share the budget between depth and width, and return the best split and what was tried."""
    options = ask.options

    def loss(small: Any) -> float:
        want, have = held_out_outputs(ask.model, small, cast(np.ndarray, images))
        return total_divergence(want, have) if ask.score_fn is None else float(ask.score_fn(want, have))

    with nullcontext() if ask.target is None else ask.target.against(ask.model) as measure:
        splits = share_budget(
            blocks,
            scores.candidates,
            _parsed(ask.budget),
            Ranking(width, images, seed=options.seed),
            merge=lambda chosen: _merge(blocks, chosen, images, scores, options, progress),
            loss=loss if images is not None and Sampler(len(images)).holds_out else None,
            measure=measure,
            refit=options.refit,
            memory_bytes=options.memory_bytes,
            progress=progress,
        )
    best = splits[0]
    notes = tuple(f"{'taken' if one is best else 'tried'}: {one}" for one in splits)
    found = Found(best.solution, SearchReport("additive"), "channels were cut as well, which this plan does not hold")
    return found, replace(best.merged, model=best.model), best, notes


def search(
    model: Any,
    *,
    calibration: Any = None,
    budget: Mapping[str, float] | None = None,
    keep: Iterable[str] = (),
    forms: Sequence[str] | None = None,
    score_fn: ScoreFn | None = None,
    method: str | Method = "additive",
    latency: LatencyTable | str | os.PathLike[str] | None = None,
    judge: Measures | None = None,
    options: Options | None = None,
    path: str | os.PathLike[str] | None = None,
    force: bool = False,
    verbose: bool = True,
) -> Plan:
    """Return the plan that `prune` would carry out, without merging anything.

    Args:
        model: as for `prune`.
        calibration: as for `prune`.
        budget: as for `prune`.
        keep: as for `prune`.
        forms: as for `prune`.
        score_fn: as for `prune`; what `method` measures plans with.
        method: as for `prune`.
        latency: as for `prune`.
        judge: as for `prune`.
        options: as for `prune`.
        path: write the plan there, and the fitted arrays beside it, so that `merge` needs no images.
        force: replace files that exist.
        verbose: show progress on standard error.

    Raises:
        ModelError, CalibrationError, BudgetError: as `prune`.
        OutputError: the plan cannot be written.
    """
    options, start = _started(options, calibration)
    way = method_of(method)
    blocks, cost_of = _costed(_blocks(model, options), _parsed(budget), read_table(latency), forms, options)
    with _images(blocks, calibration, options) as images, shown(verbose) as progress:
        scores = _score(blocks, images, _parsed(budget), keep, forms, start, options, cost_of, progress)
        with _judge(blocks, scores, images, way, judge, score_fn, options) as measures:
            found = _choose(blocks, scores, images, budget, way, measures, progress)
    fitted = {block_name(one.blocks): scores.fitted[one.key] for one in found.solution.chosen}
    plan = _plan(model, blocks, found, fitted, budget or DEFAULT_BUDGET, has_arrays=path is not None)
    if path is not None:
        plan.save(path, arrays_beside(plan, fitted), force=force)
    return plan


@dataclass(frozen=True, eq=False)
class Scored:
    """A model whose forms are fitted and scored: plans for any budget come from it at once.

    Attributes:
        model: the model.
        blocks: its blocks, with measured times where there is a latency table.
        scores: of every form of every block.
        images: checked calibration images, None where there are none.
        options: with the start filled in.
        progress: callback, or None.
    """

    model: Any
    blocks: Blocks
    scores: Scores
    images: np.ndarray | None
    options: Options
    progress: Progress | None

    def plan(self, budget: Mapping[str, float]) -> tuple[Plan, Solution]:
        """Return the plan with the smallest sum of scores within a budget.

        Raises:
            BudgetError: no choice is within the budget, or the model is within it as it is.
        """
        found = _choose(self.blocks, self.scores, None, budget, method_of("additive"), None, self.progress)
        fitted = {block_name(one.blocks): self.scores.fitted[one.key] for one in found.solution.chosen}
        return _plan(self.model, self.blocks, found, fitted, budget), found.solution

    def agreement(self, solution: Solution) -> float:
        """Merge a choice and return the part of held-out images that get the class the original gives them.

        Raises:
            CalibrationError: there are no images, or the model gives no classes.
        """
        if self.images is None or not gives_classes(self.model):
            raise CalibrationError("The agreement of plans needs calibration images and a model that writes classes.")
        merged = _merge(self.blocks, solution.chosen, self.images, self.scores, self.options, self.progress)
        return 1.0 - agreement_drop(*held_out_outputs(self.model, merged.model, self.images))


@contextmanager
def scored(
    model: Any,
    *,
    calibration: Any,
    budget: Budget,
    keep: Iterable[str],
    forms: Sequence[str] | None,
    table: LatencyTable | None,
    options: Options | None,
    verbose: bool,
) -> Iterator[Scored]:
    """Give a model with all forms scored, as `prune` and `search` score them."""
    options, start = _started(options, calibration)
    blocks, cost_of = _costed(_blocks(model, options), budget, table, forms, options)
    with _images(blocks, calibration, options) as images, shown(verbose) as progress:
        scores = _score(blocks, images, budget, keep, forms, start, options, cost_of, progress)
        yield Scored(model, blocks, scores, images, options, progress)


def merge(
    model: Any,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    calibration: Any = None,
    options: Options | None = None,
    verbose: bool = True,
) -> Any:
    """Return the model with a plan applied at once, or the plain model that a trained student has become.

    Args:
        model: the model the plan was made for; or, without a plan, a student of `progressive` or `linearize`.
        plan: a `Plan`, or the path of a saved one, whose arrays are read from beside it; None for a student.
        calibration: images to fit to, in sequence; without them the arrays beside the plan are used.
        options: how forms are fitted and merged; with `start` `gaussian` or `identity` no images are needed.
        verbose: show progress on standard error.

    Raises:
        PlanError: the plan is for another model, or it has no arrays and there are no calibration images.
        MergeError: the merged layers do not compute what they should, or a blend of a student is not 0.
    """
    if plan is None:
        return merged_student(model)[0]
    options, start = _started(options, calibration, default="least_squares")
    arrays: Mapping[str, np.ndarray] | None = None
    if not isinstance(plan, Plan):
        plan, arrays = Plan.load(plan)
    blocks, choices = blocks_of_plan(model, plan)
    with _images(blocks, calibration, options) as images, shown(verbose) as progress:
        if images is None:
            given = maps_of_plan(blocks, plan, arrays, start, exact_borders=options.exact_borders)
            merged = merge_fitted(blocks, choices, given, kind="linearized" if arrays is None else "fitted")
        elif start == "least_squares":
            merged = _merge_with_images(blocks, choices, images, options, progress)
        else:
            given = maps_of_plan(blocks, plan, None, start, exact_borders=options.exact_borders)
            merged = _merge_with_images(blocks, choices, images, options, progress, fitted=given)
    return (rejoined(merged)[0] if options.rejoin else merged).model


def _started(options: Options | None, calibration: Any, default: Start = "gaussian") -> tuple[Options, Start]:
    """Return the options with the start that they or the images ask for, and that start."""
    options = options or Options()
    start = options.start or ("least_squares" if calibration is not None else default)
    return replace(options, start=start), start


def _parsed(budget: Mapping[str, float] | None) -> Budget:
    return Budget.parse(DEFAULT_BUDGET if budget is None else budget)


@contextmanager
def _images(blocks: Blocks, calibration: Any, options: Options) -> Iterator[np.ndarray | None]:
    """Give checked images as one float32 array; what is no such array is read once, to disk where memory is full."""
    if calibration is None:
        yield None
        return
    sources = blocks.graph.input_refs
    if len(sources) != 1:
        raise CalibrationError(
            f"'{blocks.graph.name}' has {len(sources)} inputs; calibration works for models with one."
        )
    with Memory(options.memory_bytes) as memory:
        yield calibration_images(calibration, shape=blocks.graph.shape(sources[0]), memory=memory)


def _score(
    blocks: Blocks,
    images: np.ndarray | None,
    budget: Budget,
    keep: Iterable[str],
    forms: Sequence[str] | None,
    start: Start,
    options: Options,
    cost_of: FormCost,
    progress: Progress | None,
) -> Scores:
    keep = tuple(keep)
    require_names(keep, blocks)
    wanted = _wanted(forms)
    if start != "least_squares":
        found = score_without_images(
            blocks,
            forms=wanted,
            skip=options.skip,
            unit=budget.unit,
            start=start,
            exact_borders=options.exact_borders,
            cost_of=cost_of,
        )
        kept = tuple(one for one in found.candidates if one.blocks[0] not in keep)
        return replace(found, candidates=kept)
    if images is None:
        raise CalibrationError("Least squares needs calibration images; set Options(start='gaussian') to do without.")
    return score(
        blocks,
        images,
        forms=wanted,
        keep=keep,
        skip=options.skip,
        unit=budget.unit,
        cheapest_too=bool(budget.limits),
        spans=options.spans,
        ridge=options.ridge,
        seed=options.seed,
        memory_bytes=options.memory_bytes,
        cost_of=cost_of,
        progress=progress,
    )


def _wanted(forms: Sequence[str] | None) -> Sequence[Form]:
    return all_forms() if forms is None else [form_by_name(name) for name in forms]


def _blocks(model: Any, options: Options) -> Blocks:
    blocks = find_blocks(model)
    return blocks.in_parts() if options.parts else blocks


def _costed(
    blocks: Blocks, budget: Budget, table: LatencyTable | None, forms: Sequence[str] | None, options: Options
) -> tuple[Blocks, FormCost]:
    """Return the blocks and what forms cost, with the times of a table where there is one."""
    require_blocks(blocks)
    if table is not None:
        return with_latencies(blocks, table, forms=_wanted(forms), skip=options.skip, spans=options.spans)
    if budget.needs_table is not None:
        raise BudgetError(
            f"A budget in '{budget.needs_table}' needs a latency table: "
            "give latency=updp_tf.measure_latency(model) (--latency TABLE.csv)."
        )
    return blocks, own_cost


def read_table(latency: LatencyTable | str | os.PathLike[str] | None) -> LatencyTable | None:
    """Return a latency table, read from its file where that is given."""
    if not isinstance(latency, str | os.PathLike):
        return latency
    from tflite_export import LatencyTable

    return LatencyTable.load(latency)


def _like(cost: Cost, predicted: Cost) -> Cost:
    """Return what a built network costs, with the time and the bytes that were predicted or measured."""
    return replace(cost, latency_ns=predicted.latency_ns, file_bytes=predicted.file_bytes)


@dataclass(frozen=True)
class Found:
    """What a search gave: the choice, what was looked at, and a sentence where the budget could not be met."""

    solution: Solution
    report: SearchReport
    note: str | None


def _choose(
    blocks: Blocks,
    scores: Scores,
    images: np.ndarray | None,
    budget: Mapping[str, float] | None,
    method: Method,
    judge: Measures | None,
    progress: Progress | None,
) -> Found:
    space = _space(blocks, scores, DEFAULT_BUDGET if budget is None else budget, or_nearest=budget is None)
    learned = None if images is None else partial(learn, blocks=blocks, fitted=scores.fitted, images=images)
    solution, report = choose(space, method, judge, progress, learned)
    if not solution.chosen:
        raise BudgetError("Nothing has to be merged: the model meets the budget as it is. Ask for a smaller one.")
    return Found(solution, report, space.note)


def _space(blocks: Blocks, scores: Scores, budget: Mapping[str, float], *, or_nearest: bool) -> Space:
    costs = {block.name: block.cost for block in blocks}
    return Space.within(scores.candidates, blocks=costs, rest=blocks.rest_cost, budget=budget, or_nearest=or_nearest)


@contextmanager
def _judge(
    blocks: Blocks,
    scores: Scores,
    images: np.ndarray | None,
    method: Method,
    given: Measures | None,
    score_fn: ScoreFn | None,
    options: Options,
) -> Iterator[Measures | None]:
    """Give what measures whole plans, where the method measures any and there are images to do it on."""
    if given is not None:
        yield given
        return
    if images is None or not method.measures:
        yield None
        return
    with Judge(
        blocks,
        scores.fitted,
        images,
        score_fn=score_fn,
        reestimate=options.reestimate,
        memory_bytes=options.memory_bytes,
    ) as judge:
        yield judge


def _merge(
    blocks: Blocks,
    chosen: Sequence[Candidate],
    images: np.ndarray | None,
    scores: Scores,
    options: Options,
    progress: Progress | None,
) -> Merged:
    blocks = blocks.joined(one.blocks for one in chosen)
    choices = tuple(Choice(block_name(one.blocks), one.form, one.options["skip"]) for one in chosen)
    if options.start == "least_squares" and images is not None:
        return _merge_with_images(blocks, choices, images, options, progress)
    fitted = {block_name(one.blocks): scores.fitted[one.key] for one in chosen}
    if images is None:
        return merge_fitted(blocks, choices, fitted, kind="linearized")
    return _merge_with_images(blocks, choices, images, options, progress, fitted=fitted)


def _merge_with_images(
    blocks: Blocks,
    choices: Sequence[Choice],
    images: np.ndarray,
    options: Options,
    progress: Progress | None,
    *,
    fitted: Mapping[str, Fitted] | None = None,
) -> Merged:
    return merge_in_sequence(
        blocks,
        choices,
        images,
        fitted=fitted,
        in_sequence=options.in_sequence,
        reestimate=options.reestimate,
        refit=options.refit,
        ridge=options.ridge,
        seed=options.seed,
        memory_bytes=options.memory_bytes,
        progress=progress,
    )


def _reconstructed(
    model: Any, merged: Merged, images: np.ndarray, options: Options, progress: Progress | None
) -> tuple[Merged, str]:
    names = [block.name for block in merged.blocks]
    trained, told = reconstruct(
        merged.model, model, names, images, steps=options.reconstruct_steps, seed=options.seed, progress=progress
    )
    verdict = "kept" if told.kept else "not kept"
    note = (
        f"reconstruction of {told.steps} steps: output error on held-out images {told.before:.4f} -> {told.after:.4f}"
    )
    return replace(merged, model=trained), f"{note}, {verdict}"


def _from_accuracy(
    model: Any,
    blocks: Blocks,
    scores: Scores,
    images: np.ndarray | None,
    limit: DropLimit,
    method: Method,
    judge: Measures | None,
    options: Options,
    progress: Progress | None,
) -> tuple[Found, Merged]:
    """Bisect the budget, time where it was measured, else MACs, to the smallest plan whose drop is within the bound."""
    if images is None:
        raise CalibrationError("`max_drop` is measured on held-out calibration images; give calibration images.")
    if not Sampler(len(images)).holds_out:
        raise CalibrationError(
            f"`max_drop` holds a tenth of the images out: {len(images)} are too few, give 20 or more."
        )

    key, unit = ("latency", "latency_ns") if blocks.network_cost.latency_ns else ("macs", "macs")

    def attempt(fraction: float) -> tuple[tuple[Found, Merged], float] | None:
        try:
            found = _choose(blocks, scores, images, {key: fraction}, method, judge, progress)
        except BudgetError:
            return None
        merged = _merge(blocks, found.solution.chosen, images, scores, options, progress)
        return (found, merged), limit.drop_of(*held_out_outputs(model, merged.model, images))

    smallest = _space(blocks, scores, {key: 1e-9}, or_nearest=True).solution
    low = getattr(smallest.cost, unit) / getattr(blocks.network_cost, unit)
    return smallest_within(limit.bound, low, attempt)


def _plan(
    model: Any,
    blocks: Blocks,
    found: Found,
    fitted: Mapping[str, Fitted],
    budget: Mapping[str, float],
    *,
    has_arrays: bool = False,
) -> Plan:
    notes = tuple(note for note in (found.note, found.report.measured and str(found.report)) if note)
    return plan_of(model, blocks, found.solution.chosen, fitted, budget=budget, notes=notes, has_arrays=has_arrays)
