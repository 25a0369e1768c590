"""What a plan does to a network's outputs, measured on images, without building a model.

A sum of scores is a guess: it takes each block alone. Here the fitted forms of a whole plan are put in, the norms
behind them given the statistics of what they read now, and the outputs compared with the original's, on images that
no fit has seen. What the original writes at every block border is computed once, so that a plan runs behind its first
edit only.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import keras
import numpy as np

from updp_tf.blocks import Blocks
from updp_tf.errors import CalibrationError
from updp_tf.forms import Fitted
from updp_tf.memory import DEFAULT_LIMIT_BYTES, Memory
from updp_tf.merging import build_edit
from updp_tf.scoring import Sampler
from updp_tf.structure import Candidate, Node, block_name, map_refs
from updp_tf.walking import Tensors, Walk, one_blas_thread, units

ScoreFn = Callable[[Any, Any], float]
"""(outputs of the original, outputs of the pruned model) -> how much was lost, 0 for nothing."""

Divergence = Literal["KL", "squared error", "score_fn"]

N_HELD_OUT = 100
"""Images that plans are compared on, at most."""

N_OTHERS = 100
"""Images besides these that go through the norms with them, at most."""

SMALLEST_PROBABILITY = 1e-7
"""As Keras' own losses clip: a class that float32 rounds to zero is no infinite surprise."""


class Judge:
    """Measures plans; a context manager that takes its files along when it closes.

    Args:
        blocks: of the original.
        fitted: maps of every candidate, by `Candidate.key`.
        images: calibration images; each tenth, which no fit has seen, is compared on, at most `N_HELD_OUT` of them.
        score_fn: compares outputs in the place of the divergence.
        reestimate: norms behind the first edit take the statistics of each batch, as merging will renew them.
        memory_bytes: activations beyond this go to disk.

    Raises:
        CalibrationError: too few images to hold any out.
    """

    def __init__(
        self,
        blocks: Blocks,
        fitted: Mapping[str, Fitted],
        images: np.ndarray,
        *,
        score_fn: ScoreFn | None = None,
        reestimate: bool = True,
        memory_bytes: int = DEFAULT_LIMIT_BYTES,
    ) -> None:
        held_out = Sampler(len(images)).held_out(slice(0, len(images)))
        if not held_out.any():
            raise CalibrationError(
                f"Plans are compared on a tenth of the images: {len(images)} are too few, give 20 or more."
            )
        unseen = np.flatnonzero(held_out)[:N_HELD_OUT]
        others = np.flatnonzero(~held_out)[:N_OTHERS] if reestimate else unseen[:0]
        self.n_images = len(unseen)
        self._images = np.concatenate([images[unseen], images[others]])
        self._blocks, self._fitted, self._score_fn = blocks, fitted, score_fn
        self._reestimate, self._memory_bytes = reestimate, memory_bytes
        self._memory = Memory(memory_bytes)
        self._original: Tensors = {}

    def __enter__(self) -> Judge:
        graph = self._blocks.graph
        with one_blas_thread():
            walk = Walk(graph, self._images, self._memory)
            self._original = walk.start()
            for part in units(graph, self._blocks):
                nodes = [graph.by_name[name] for name in part.nodes]
                self._original |= walk.run(nodes, {ref: ref for ref in part.writes}, self._original)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.__exit__(kind, error, trace)

    @property
    def measure(self) -> Divergence:
        """What `loss` returns: the KL divergence of probabilities, the relative squared error of other outputs."""
        if self._score_fn is not None:
            return "score_fn"
        outputs = [self._original[ref][: self.n_images] for ref in self._blocks.graph.output_refs]
        return "KL" if any(are_probabilities(one) for one in outputs) else "squared error"

    def loss(self, chosen: Sequence[Candidate]) -> float:
        """Return how far the outputs of the network with some forms in it are from the original's; 0 for equal ones."""
        graph = self._blocks.graph
        with Memory(self._memory_bytes) as memory, one_blas_thread():
            changed = self._run(Walk(graph, self._images, memory), chosen)
            values = ChainMap(changed, self._original)
            want = map_refs(graph.outputs, lambda ref: np.array(self._original[ref][: self.n_images]))
            have = map_refs(graph.outputs, lambda ref: np.array(values[ref][: self.n_images]))
        if self._score_fn is not None:
            return float(self._score_fn(want, have))
        return total_divergence(want, have)

    def _run(self, walk: Walk, chosen: Sequence[Candidate]) -> Tensors:
        """Return every tensor that differs from the original's and is still needed at the end."""
        graph = self._blocks.graph
        forms = {block_name(one.blocks): one for one in chosen}
        parts = units(graph, self._blocks.joined(one.blocks for one in chosen))
        changed: Tensors = {}
        values = ChainMap(changed, self._original)
        for index, part in enumerate(parts):
            one = None if part.block is None else forms.get(part.block.name)
            # not what the original wrote in this part's place
            read = {ref: values[ref] for ref in part.reads}
            if part.block is not None and one is not None:
                edit = build_edit(graph, part.block, self._fitted[one.key])
                if edit.exit == part.block.entry:
                    changed[part.block.exit] = values[part.block.entry]
                else:
                    changed |= walk.run(edit.nodes, {part.block.exit: edit.exit}, read)
            elif any(ref in changed for ref in part.reads):
                nodes = [self._by_batch(graph.by_name[name]) for name in part.nodes]
                changed |= walk.run(nodes, {ref: ref for ref in part.writes}, read)
            walk.release(parts[index + 1 :], changed, keep=self._original.values())
        return changed

    def _by_batch(self, node: Node) -> Node:
        # A norm that is called more than once keeps its statistics when a plan is merged, so here too.
        if not self._reestimate or node.kind != "BatchNormalization" or node.name not in self._blocks.graph.called_once:
            return node
        return replace(node, layer=_NormByBatch(node.layer), kind=_NormByBatch.__qualname__)


class _NormByBatch:
    """A BatchNormalization with the statistics of the batch at hand: hundreds of positions, and one pass."""

    def __init__(self, norm: Any) -> None:
        self._norm = norm

    def call(self, x: Any, training: bool = False, mask: Any = None) -> Any:
        norm, rank = self._norm, len(x.shape)
        axis = norm.axis % rank
        wide = keras.ops.cast(x, "float32")
        mean, variance = keras.ops.moments(wide, axes=[one for one in range(rank) if one != axis])
        y = keras.ops.batch_normalization(
            wide, mean, variance, axis=axis, offset=norm.beta, scale=norm.gamma, epsilon=norm.epsilon
        )
        return keras.ops.cast(y, x.dtype)

    __call__ = call


def total_divergence(original: Any, pruned: Any) -> float:
    """Return the sum of `divergence` over all outputs, nested as the models give them."""
    pairs = zip(keras.tree.flatten(original), keras.tree.flatten(pruned), strict=True)
    return float(sum(divergence(one, other) for one, other in pairs))


def divergence(original: np.ndarray, pruned: np.ndarray) -> float:
    """Return how far one output of a pruned model is from the original's; 0 where they are equal.

    Rows of probabilities (not negative, of sum 1) by the mean of KL(original || pruned); numbers between 0 and 1 as
    probabilities of their own, by the mean over images of the sum of their KL; anything else by the squared error over
    the variance.

    Args:
        original: of shape (n, ...).
        pruned: of the same shape.
    """
    p, q = original.astype(np.float64), pruned.astype(np.float64)
    if not are_probabilities(original):
        spread = float(np.square(p - p.mean(axis=0)).sum())
        return float(np.square(p - q).sum()) / (spread or 1.0)
    p, q = (np.clip(one, SMALLEST_PROBABILITY, 1.0) for one in (p, q))
    if sum_to_one(original):
        return float((p * np.log(p / q)).sum(axis=-1).mean())
    not_p, not_q = (np.clip(1.0 - one, SMALLEST_PROBABILITY, 1.0) for one in (p, q))
    both = p * np.log(p / q) + not_p * np.log(not_p / not_q)
    return float(both.sum() / len(p))


def are_probabilities(output: np.ndarray) -> bool:
    """True where all numbers lie between 0 and 1."""
    return bool((output >= 0).all() and (output <= 1 + 1e-3).all())


def sum_to_one(output: np.ndarray) -> bool:
    """True where the last axis holds the probabilities of classes."""
    return bool(output.shape[-1] > 1 and are_probabilities(output)) and bool(
        np.allclose(output.sum(axis=-1, dtype=np.float64), 1.0, atol=1e-2)
    )
