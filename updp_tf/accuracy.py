"""The accuracy side of a search: how much may be lost, and the smallest plan that loses no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import keras
import numpy as np

from updp_tf.blocks import prepared_graph
from updp_tf.errors import BudgetError
from updp_tf.folding import fold_norms_in
from updp_tf.graph import run_nodes
from updp_tf.judging import ScoreFn
from updp_tf.scoring import Sampler
from updp_tf.structure import Ref, map_refs
from updp_tf.walking import default_batch_size

SEARCH_STEPS = 6
"""Bisections of `max_drop`: the last one moves the budget by about 1 % of the network."""

T = TypeVar("T")


@dataclass(frozen=True)
class DropLimit:
    """How much may be lost, and what measures it from the outputs of the original and of the pruned model."""

    drop_of: ScoreFn
    bound: float


def drop_limit(
    model: Any, budget: Mapping[str, float] | None, max_drop: Mapping[str, float] | None, score_fn: ScoreFn | None
) -> DropLimit | None:
    """Return what measures the drop and how much of it is allowed, or None where a budget decides."""
    if max_drop is None:
        return None
    if budget is not None:
        raise BudgetError("Give either `budget` or `max_drop`, not both.")
    if len(max_drop) != 1 or next(iter(max_drop)) not in ("agreement", "score"):
        raise BudgetError(
            f'`max_drop` is {{"agreement": 0.02}}, or {{"score": x}} with a score_fn. Received: {max_drop}'
        )
    ((kind, bound),) = max_drop.items()
    if kind == "score":
        if score_fn is None:
            raise BudgetError('`max_drop={"score": ...}` needs a `score_fn`.')
        return DropLimit(score_fn, float(bound))
    if not 0 <= float(bound) < 1:
        raise BudgetError(f"The agreement may drop by a fraction in [0, 1). Received: {bound}")
    if not gives_classes(model):
        raise BudgetError(
            f"'{model.name}' does not write one row of class scores per image, so agreement means nothing: give a "
            '`score_fn` and `max_drop={"score": ...}`.'
        )
    return DropLimit(agreement_drop, float(bound))


def gives_classes(model: Any) -> bool:
    """True for a model that writes one row of class scores per image."""
    shapes = [tuple(output.shape) for output in model.outputs]
    return len(shapes) == 1 and len(shapes[0]) == 2 and (shapes[0][1] or 0) >= 2


def agreement_drop(original: Any, pruned: Any) -> float:
    """Return the part of images that change their class."""
    return float(np.mean(np.argmax(original, axis=-1) != np.argmax(pruned, axis=-1)))


def held_out_outputs(model: Any, pruned: Any, images: np.ndarray) -> tuple[Any, Any]:
    """Return outputs of both models on the images that were not fitted to (on all, where none were held out)."""
    mask = Sampler(len(images)).held_out(slice(0, len(images)))
    chosen = images[mask] if mask.any() else images
    return _outputs(model, chosen), _outputs(pruned, chosen)


def _outputs(model: Any, images: np.ndarray) -> Any:
    """Return outputs, nested as the model gives them; run with folded norms, which eagerly cost as much as the rest."""
    graph, _ = fold_norms_in(prepared_graph(model))
    size = default_batch_size(graph)
    parts = []
    for start in range(0, len(images), size):
        values: dict[Ref, Any] = {graph.input_refs[0]: keras.ops.convert_to_tensor(images[start : start + size])}
        run_nodes(graph, values)
        outputs = map_refs(graph.outputs, values.__getitem__)
        parts.append(keras.tree.map_structure(keras.ops.convert_to_numpy, outputs))
    return keras.tree.map_structure(lambda *pieces: np.concatenate(pieces), *parts)


def smallest_within(bound: float, low: float, attempt: Callable[[float], tuple[T, float] | None]) -> T:
    """Bisect a budget to the smallest whose measured drop is within a bound.

    Args:
        bound: of the drop.
        low: the smallest fraction that can be had.
        attempt: fraction of the cost kept -> (what it gives, its drop), or None where that fraction gives nothing.

    Raises:
        BudgetError: no fraction keeps the drop within the bound.
    """
    high = 1.0
    best: tuple[T] | None = None
    least = float("inf")
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        found = attempt(middle)
        if found is None:
            low = middle
            continue
        result, drop = found
        least = min(least, drop)
        if drop <= bound:
            best, high = (result,), middle
        else:
            low = middle
    if best is None:
        raise BudgetError(f"No plan keeps the drop within {bound}: the least measured is {least:.4f}. Allow more.")
    return best[0]
