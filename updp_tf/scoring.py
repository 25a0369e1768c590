"""Fit every form of every block in one walk over the images, and score it by what it explains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

import numpy as np

from updp_tf.blocks import Blocks, read_stages
from updp_tf.cost import is_dearer
from updp_tf.errors import CalibrationError, UpdpError
from updp_tf.forms import (
    Evidence,
    Fitted,
    Form,
    SkipMode,
    all_forms,
    explained_by,
    explains_all_of,
    with_border,
)
from updp_tf.memory import DEFAULT_LIMIT_BYTES, Memory
from updp_tf.moments import MAX_DENSE_UNKNOWNS, Centred, Moments
from updp_tf.samples import Samples
from updp_tf.solving import RIDGE
from updp_tf.starts import gaussian_start, identity_start
from updp_tf.structure import Block, Candidate, Cost, ModelGraph, Ref, Refusal, as_images
from updp_tf.walking import Progress, Walk, one_blas_thread, units
from updp_tf.windows import Window, draw

HOLD_OUT_EVERY = 10
"""Each tenth calibration image is kept from the fits, to tell R^2 and to choose strengths."""

POSITIONS_PER_UNKNOWN = 100
"""Sampled output positions per unknown of a fit: more changes nothing, fewer shows."""

SCORING_POSITIONS = 8
"""Sampled positions per unknown while forms are only compared: ranks need fewer than fits."""

Start = Literal["least_squares", "gaussian", "identity"]


class CalibrationWarning(UserWarning):
    """The calibration images are too few for some fit; the message says how many it needs."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What every form of every block would cost in accuracy.

    Attributes:
        candidates: in graph order, forms that were fitted.
        fitted: the fitted maps of each candidate, by `Candidate.key`.
        refusals: forms that were not fitted, and why.
    """

    candidates: tuple[Candidate, ...]
    fitted: Mapping[str, Fitted]
    refusals: tuple[Refusal, ...]


def skip_mode(block: Block, skip: str) -> SkipMode:
    """Return how a dense form treats a block's skip.

    `auto` keeps an identity (an Add costs next to nothing, and a 1 folded in between weights of a few hundredths
    costs 3 to 5 dB in int8) and folds a projection (which costs MACs).
    """
    if skip == "auto":
        return "kept" if block.skip_kind == "identity" else "folded"
    return "kept" if skip == "kept" else "folded"


FormCost = Callable[[Form, Block, SkipMode], Cost]
"""What a form costs in the place of a block."""


def own_cost(form: Form, block: Block, mode: SkipMode) -> Cost:
    """What the form itself says it costs."""
    return form.cost(block, skip=mode)


def eligible_forms(
    block: Block,
    *,
    forms: Sequence[Form],
    skip: str,
    unit: str,
    cheapest_too: bool = True,
    cost_of: FormCost = own_cost,
) -> tuple[list[tuple[Form, SkipMode]], list[Refusal]]:
    """Return the forms a block can take without getting dearer in the budget's unit, and why not the others.

    Args:
        block: whose forms they are.
        forms: to look at.
        skip: `auto`, `kept` or `folded`.
        unit: of the budget.
        cheapest_too: False where no resource is limited: then a form whose maps another one has too cannot be picked.
        cost_of: what forms cost.
    """
    able: list[tuple[Form, SkipMode]] = []
    refusals: list[Refusal] = []
    mode = skip_mode(block, skip)
    for form in forms:
        refusal = form.refuses(block, skip=mode)
        if refusal is None and is_dearer(cost := cost_of(form, block, mode), block.cost, unit):
            told = "latency_ns" if cost.latency_ns > block.cost.latency_ns else unit
            have, want = getattr(block.cost, told), getattr(cost, told)
            refusal = Refusal(block.name, form.name, f"dearer than the block: {want:,} {told} against {have:,}")
        if refusal is None and block.part_of is not None and cost_of(form, block, mode).macs >= block.cost.macs:
            refusal = Refusal(block.name, form.name, "no cheaper than the layer itself")
        if refusal is None:
            able.append((form, mode))
        else:
            refusals.append(refusal)
    if not cheapest_too:
        for form, mode in list(able):
            larger = next((one for one, _ in able if explains_all_of(one, form, block)), None)
            if larger is not None:
                able.remove((form, mode))
                reason = f"{larger.name} explains at least as much, and the budget limits no cost"
                refusals.append(Refusal(block.name, form.name, reason))
    return able, refusals


def candidate(
    block: Block, form: Form, mode: SkipMode, fitted: Fitted, *, score: float, cost_of: FormCost = own_cost
) -> Candidate:
    """Return a candidate with its cost and options filled in."""
    cost = with_border(cost_of(form, block, mode), block, fitted)
    return Candidate(block.covers, form.name, score, cost, {"skip": mode}, fitted.r2)


def score_without_images(
    blocks: Blocks,
    *,
    forms: Sequence[Form] | None = None,
    skip: str = "auto",
    unit: str = "macs",
    start: Start,
    exact_borders: bool = False,
    cost_of: FormCost = own_cost,
) -> Scores:
    """Score forms by what the blocks' own norms tell: the share of each activation that a slope explains.

    Raises:
        CalibrationError: no block can be scored without images.
    """
    candidates: list[Candidate] = []
    fitted: dict[str, Fitted] = {}
    refusals: list[Refusal] = []
    for block in blocks:
        able, refused = eligible_forms(block, forms=forms or all_forms(), skip=skip, unit=unit, cost_of=cost_of)
        refusals += refused
        for form, mode in able:
            found, explained = start_without_images(blocks.graph, block, form, mode, start, exact_borders=exact_borders)
            if isinstance(found, Refusal):
                refusals.append(found)
                continue
            score = 1.0 - explained * (1.0 - found.dropped)
            one = candidate(block, form, mode, found, score=score, cost_of=cost_of)
            candidates.append(one)
            fitted[one.key] = found
    if not candidates:
        reasons = "; ".join(str(refusal) for refusal in refusals[:3])
        raise CalibrationError(f"No block can be merged without images: needs calibration images ({reasons}).")
    return Scores(tuple(candidates), fitted, tuple(refusals))


def start_without_images(
    graph: ModelGraph, block: Block, form: Form, mode: SkipMode, start: Start, *, exact_borders: bool = False
) -> tuple[Fitted | Refusal, float]:
    """Return a form's maps from the block's own weights, and what share of the activations they explain."""
    if block.linear_refusal is not None:
        return replace(block.linear_refusal, rule=form.name), 0.0
    if (refusal := form.refuses(block, skip=mode)) is not None:
        return refusal, 0.0
    try:
        stages = read_stages(graph, block)
        linear = gaussian_start(stages) if start == "gaussian" else identity_start(stages)
    except CalibrationError as error:
        return Refusal(block.name, form.name, str(error)), 0.0
    found = form.from_maps(block, linear.maps, skip=mode, exact_border=exact_borders)
    return found, 1.0 if linear.explained is None else linear.explained


def score(
    blocks: Blocks,
    images: Any,
    *,
    forms: Sequence[Form] | None = None,
    keep: Iterable[str] = (),
    skip: str = "auto",
    unit: str = "macs",
    cheapest_too: bool = True,
    spans: int = 1,
    ridge: float = RIDGE,
    seed: int = 0,
    memory_bytes: int = DEFAULT_LIMIT_BYTES,
    cost_of: FormCost = own_cost,
    progress: Progress | None = None,
) -> Scores:
    """Fit every form of every block alone, by least squares on images, in one walk.

    The score of a form is 1 - R^2 of the block's output on images that were not used to fit it.

    Args:
        blocks: of the model.
        images: calibration data, as `image_batches` reads it.
        forms: to try; all registered ones where None.
        keep: names of blocks to leave alone.
        skip: `auto`, `kept` or `folded`: how dense forms treat a skip.
        unit: of the budget; forms dearer than their block in it are not fitted.
        cheapest_too: False where the budget limits no resource, see `eligible_forms`.
        spans: up to how many consecutive blocks one form may replace.
        ridge: strength in mean eigenvalues.
        seed: of the sampled positions.
        memory_bytes: activations beyond this go to disk.
        cost_of: what forms cost.
        progress: called after each part of the network.

    Returns:
        `Scores`; deterministic for equal arguments.
    """
    kept = set(keep)
    candidates: list[Candidate] = []
    fitted: dict[str, Fitted] = {}
    refusals: list[Refusal] = []
    short: dict[str, int] = {}
    ending: dict[str, list[Block]] = {block.name: [block] for block in blocks if block.name not in kept}
    starting: dict[str, list[Block]] = {}
    for span in blocks.spans(max_length=spans):
        if not kept & set(span.members):
            starting.setdefault(span.members[0], []).append(span)
            ending[span.members[-1]].append(span)
    entries: dict[str, np.ndarray] = {}
    with Memory(memory_bytes) as memory, one_blas_thread():
        walk = Walk(blocks.graph, images, memory)
        parts = units(blocks.graph, blocks)
        tensors = walk.start()
        last_block = max((i for i, part in enumerate(parts) if part.block is not None), default=-1)
        for index, part in enumerate(parts[: last_block + 1]):
            nodes = [blocks.graph.by_name[name] for name in part.nodes]
            tensors |= walk.run(nodes, {ref: ref for ref in part.writes}, tensors)
            name = part.block.name if part.block is not None else ""
            entries |= {span.name: tensors[span.entry] for span in starting.get(name, ())}
            for block in ending.get(name, ()):
                able, refused = eligible_forms(
                    block,
                    forms=forms or all_forms(),
                    skip=skip,
                    unit=unit,
                    cheapest_too=cheapest_too,
                    cost_of=cost_of,
                )
                refusals += refused
                sampler = Sampler(walk.n, seed=seed, positions_per_unknown=SCORING_POSITIONS)
                fits, missing = fit_forms(
                    block,
                    able,
                    entries.get(block.name, tensors.get(block.entry, walk.images)),
                    tensors[block.exit],
                    sampler,
                    ridge=ridge,
                    parts=walk.batches((block.entry_shape, block.exit_shape)),
                )
                if missing:
                    short[block.name] = missing
                for form, mode in able:
                    found = fits[form.name]
                    one = candidate(block, form, mode, found, score=1.0 - (found.r2 or 0.0), cost_of=cost_of)
                    candidates.append(one)
                    fitted[one.key] = found
                _forget(walk, entries.pop(block.name, None), tensors, entries)
            walk.release(parts[index + 1 :], tensors, keep=entries.values())
            if progress is not None:
                progress(index + 1, last_block + 1, f"score {part.name}")
    warn_if_short(short, walk.n)
    return Scores(tuple(candidates), fitted, tuple(refusals))


def _forget(
    walk: Walk, entry: np.ndarray | None, tensors: Mapping[Ref, np.ndarray], entries: Mapping[str, np.ndarray]
) -> None:
    """Release what only a span held."""
    held = (*tensors.values(), *entries.values())
    if entry is not None and not any(entry is one for one in held):
        walk.memory.release(entry)


@dataclass(frozen=True)
class Sampler:
    """Which images and positions a fit sees: deterministic, a tenth of the images held out."""

    n_images: int
    seed: int = 0
    positions_per_unknown: int = POSITIONS_PER_UNKNOWN

    @property
    def holds_out(self) -> bool:
        """False where there are too few images to spare any."""
        return self.n_images >= 2 * HOLD_OUT_EVERY

    def held_out(self, part: slice) -> np.ndarray:
        """Which images of a batch are held out, as a mask."""
        index = np.arange(part.start, part.stop)
        return (index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1) & self.holds_out

    def n_positions(self, n_unknowns: int, n_batch: int) -> int:
        """Positions to take from `n_batch` images."""
        return -(-self.positions_per_unknown * n_unknowns * n_batch // self.n_images)


def fit_forms(
    block: Block,
    able: Sequence[tuple[Form, SkipMode]],
    x: np.ndarray,
    y: np.ndarray,
    sampler: Sampler,
    *,
    ridge: float,
    parts: Iterable[slice],
    on_all: bool = False,
) -> tuple[dict[str, Fitted], int]:
    """Fit forms of one block to (input, output) pairs of all images.

    Args:
        block: whose forms they are.
        able: forms it can take.
        x: block input of the network that is fitted: images, tokens or vectors, as the block reads them.
        y: block output that is wanted.
        sampler: of images and positions.
        ridge: strength in mean eigenvalues.
        parts: batches.
        on_all: fit once more to all images after R^2 was told: for maps that are used, not compared.

    Returns:
        Fits by form name with R^2 on held-out images, and how many images are needed if there were too few.
    """
    windows = {form.name: form.window(block) for form, _ in able}
    wanted = [(form.evidence, windows[form.name]) for form, _ in able]
    seen_by_kind = (
        gather(wanted, as_images(x), as_images(y), sampler, parts, special_rows=block.special_tokens)
        if any(windows.values())
        else {}
    )
    fits: dict[str, Fitted] = {}
    missing = 0
    for form, mode in able:
        window = windows[form.name]
        if window is None:
            fits[form.name] = form.fit(block, None, skip=mode, ridge=ridge)
            continue
        seen, unseen = seen_by_kind[form.evidence, window]
        found = form.fit(block, _solvable(seen), skip=mode, ridge=ridge)
        if unseen.n >= 2:
            r2 = explained_by(block, found, unseen)
            if on_all and sampler.holds_out:
                seen.add_all(unseen)
                found = form.fit(block, _solvable(seen), skip=mode, ridge=ridge)
            found = replace(found, r2=r2)
        fits[form.name] = found
        if seen.n < seen.n_unknowns:
            missing = max(missing, -(-seen.n_unknowns * sampler.n_images // int(seen.n)))
    return fits, missing


def _solvable(evidence: Moments | Samples) -> Centred | Samples:
    return evidence.centred() if isinstance(evidence, Moments) else evidence


Evidences = tuple[Moments | Samples, Samples]
"""What forms are fitted to, and samples of the held-out images (of all, where none are held out)."""


def gather(
    wanted: Iterable[tuple[Evidence, Window | None]],
    x: np.ndarray,
    y: np.ndarray,
    sampler: Sampler,
    parts: Iterable[slice],
    *,
    special_rows: Sequence[int] = (),
) -> dict[tuple[Evidence, Window], Evidences]:
    """Return the evidence that forms ask for, in one pass over the images.

    The moments of a window inside a larger one are cut out of the larger one's. Where they would be too large, a form
    gets samples instead, and solves by conjugate gradients.
    """
    c_in, c_out = x.shape[-1], y.shape[-1]
    # In one order in every process: positions are drawn one evidence after the other.
    keys = sorted(
        {(kind, w) for kind, w in wanted if w is not None}, key=lambda key: (-key[1].n_taps, key[0], astuple(key[1]))
    )
    found: dict[tuple[Evidence, Window], Evidences] = {}
    source: dict[tuple[Evidence, Window], tuple[Evidence, Window]] = {}
    for key in keys:
        kind, window = key
        n_unknowns = window.n_taps * c_in
        dense = kind == "moments" and n_unknowns <= MAX_DENSE_UNKNOWNS
        larger = [
            other for other, (seen, _) in found.items() if isinstance(seen, Moments) and other[1].contains(window)
        ]
        source[key] = larger[0] if larger and dense else key
        if source[key] == key:
            unseen = Samples.empty(window, c_in, c_out)
            if dense:
                found[key] = Moments(window, c_in, c_out), unseen
            else:
                found[key] = Samples(window, c_in, c_out, n_unknowns if kind == "moments" else None), unseen
    rng = np.random.default_rng(sampler.seed)
    for part in parts:
        out = sampler.held_out(part)
        for seen, unseen in found.values():
            add_batch(seen, unseen, np.asarray(x[part]), np.asarray(y[part]), out, sampler, rng, special_rows)
    return {key: _cut(found[source[key]], key[1]) for key in keys}


def add_batch(
    seen: Moments | Samples,
    unseen: Samples,
    x: np.ndarray,
    y: np.ndarray,
    held_out: np.ndarray,
    sampler: Sampler,
    rng: np.random.Generator,
    special_rows: Sequence[int] = (),
) -> None:
    """Add one batch: held-out images to `unseen`, the others to `seen`; all to both where none are held out."""
    masks = (~held_out, held_out) if sampler.holds_out else (~held_out, ~held_out)
    for evidence, mask in zip((seen, unseen), masks, strict=True):
        if mask.any():
            n = sampler.n_positions(seen.n_unknowns, int(mask.sum()))
            drawn = draw(evidence.window, x[mask], y[mask], n_positions=n, rng=rng, special_rows=special_rows)
            evidence.add(drawn)


def _cut(evidence: Evidences, window: Window) -> Evidences:
    seen, unseen = evidence
    return (seen.crop(window) if isinstance(seen, Moments) else seen), unseen.crop(window)


def warn_if_short(short: Mapping[str, int], n_images: int) -> None:
    """Warn once about blocks with fewer output positions than unknowns."""
    if short:
        warnings.warn(
            f"{n_images} calibration images give fewer samples (images x output pixels) than unknowns in "
            f"{len(short)} blocks ({', '.join(list(short)[:3])}{', ...' if len(short) > 3 else ''}); ridge regression "
            f"fills in. Give at least {max(short.values())} images.",
            CalibrationWarning,
            stacklevel=3,
        )


def require_names(names: Iterable[str], blocks: Blocks) -> None:
    """Raise if a name is no block."""
    for name in names:
        try:
            blocks[name]
        except KeyError as error:
            raise UpdpError(str(error.args[0])) from error
