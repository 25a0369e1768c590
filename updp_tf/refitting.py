"""Refit the linear layer that closes a kept block, so that it repairs what earlier edits changed.

The layer is solved by least squares from the student's inner activations to what the block lacks of the teacher's
output, drawn towards the kernel it has. How strongly is chosen on held-out images, "not at all" included: a late layer
that is fitted to few classes forgets the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from updp_tf import affine, rules
from updp_tf.affine import AffineConv
from updp_tf.graph import clone_layer, copy_variables
from updp_tf.moments import Centred, Moments
from updp_tf.samples import Samples
from updp_tf.scoring import Sampler, add_batch
from updp_tf.structure import Block, Node, Ref, Shape
from updp_tf.walking import Tensors, Walk
from updp_tf.windows import Window

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths that are tried, in mean eigenvalues of the Gram matrix; none at all is tried as well."""

N_PARTS = 20
"""Parts that held-out samples are cut into, to see how much their errors vary."""

ROUNDING = 1e-8
"""Unexplained variance of a layer that is right already, with samples in float32."""


@dataclass(frozen=True, eq=False)
class Refitted:
    """A kept block's calls with a refitted layer.

    Attributes:
        nodes: the block's calls.
        layer: name of the layer that was refitted.
        ridge: strength that held-out images chose.
    """

    nodes: tuple[Node, ...]
    layer: str
    ridge: float


@dataclass(frozen=True, eq=False)
class _Closing:
    """The last linear layer of a block's body, the norm behind it, and both as one map."""

    node: Node
    norm: Node | None
    map: AffineConv


def refit_closing_layer(
    walk: Walk,
    block: Block,
    nodes: Sequence[Node],
    wanted: np.ndarray,
    student: Tensors,
    *,
    seed: int,
) -> Refitted | None:
    """Return the block with its closing layer refitted, or None where held-out images do not gain by it.

    Args:
        walk: over the calibration images.
        block: that is kept.
        nodes: the student's calls of it.
        wanted: the teacher's block output, shape (images, height, width, c_out).
        student: the student's tensors.
        seed: of the sampled positions.
    """
    sampler = Sampler(walk.n, seed=seed)
    closing = _closing_layer(walk, block, nodes)
    if closing is None or not sampler.holds_out:
        return None
    window = Window(closing.map.kernel_size, closing.map.strides, closing.map.padding)
    seen = Moments(window, closing.map.c_in, closing.map.c_out)
    unseen = Samples.empty(window, closing.map.c_in, closing.map.c_out)
    rng = np.random.default_rng(seed)
    refs = (closing.node.inputs[0], Ref(block.body[-1]), block.exit)
    for part, (inner, body, written) in walk.stream(nodes, refs, student):
        target = np.asarray(wanted[part]) - (written - body)
        add_batch(seen, unseen, inner, target, sampler.held_out(part), sampler, rng)
    ridge = _best_ridge(closing.map, seen.centred(), unseen)
    if ridge is None:
        return None
    # The strength is chosen: now every image may help.
    seen.add_all(unseen)
    every = seen.centred()
    weights = every.ridge_regression(prior=closing.map.kernel.reshape(-1, closing.map.c_out), ridge=ridge)
    changed = {node.name: node for node in _with_weights(walk, closing, weights, every)}
    return Refitted(tuple(changed.get(node.name, node) for node in nodes), closing.node.name, ridge)


def _closing_layer(walk: Walk, block: Block, nodes: Sequence[Node]) -> _Closing | None:
    by_name = {node.name: node for node in nodes}
    norm: Node | None = None
    for name in reversed(block.body):
        node = by_name[name]
        if node.kind == "BatchNormalization" and norm is None and node.layer.scale and node.layer.center:
            norm = node
        elif node.kind in ("Conv2D", "Dense") and getattr(node.layer, "groups", 1) == 1:
            alone = {node.name, (norm or node).name} <= walk.graph.called_once
            return _closing(node, norm, walk.graph.shape(node.inputs[0])) if alone else None
        elif not rules.is_passive(node):
            return None
    return None


def _closing(node: Node, norm_node: Node | None, shape: Shape) -> _Closing | None:
    try:
        maps = rules.linear_maps(node, shape)
        norm = rules.norm(norm_node, node.shapes[0]) if norm_node is not None else None
    except rules.Unsupported:
        return None
    if maps is None or max(maps[0].dilation_rate) > 1:
        return None
    one = maps[0] if norm is None else affine.fold_norm_after(maps[0], norm.scale, norm.shift)
    return _Closing(node, norm_node, one)


def _best_ridge(now: AffineConv, seen: Centred, unseen: Samples) -> float | None:
    """Return the strength that held-out images ask for, None for the old weights.

    Of all that explain them as well as the best one, give or take a standard error, the one that stays closest
    to the old weights: a layer that is fitted to few classes forgets the others.
    """
    old = now.kernel.reshape(-1, now.c_out)
    before = _errors(unseen, now)
    if before.sum() < ROUNDING:
        return None
    solve = seen.ridge_path(prior=old)
    tried: list[tuple[float | None, np.ndarray]] = [(None, before)]
    for ridge in sorted(RIDGES, reverse=True):
        weights = solve(ridge)
        one = replace(now, kernel=weights.reshape(now.kernel.shape), bias=seen.bias_of(weights))
        tried.append((ridge, _errors(unseen, one)))
    best = min((errors for _, errors in tried), key=np.sum)
    return next(ridge for ridge, errors in tried if _is_as_good(errors, best))


def _errors(unseen: Samples, one: AffineConv) -> np.ndarray:
    """Unexplained variance of held-out samples, cut into parts that are added up.

    Samples lie image by image: positions of one image resemble each other, the parts hardly do.
    """
    total = float(np.square(unseen.outputs - unseen.outputs.mean(axis=0)).sum()) or 1.0
    squares = np.square(unseen.outputs - unseen.convolve(one)).sum(axis=1) / total
    return np.array([part.sum() for part in np.array_split(squares, N_PARTS)])


def _is_as_good(errors: np.ndarray, best: np.ndarray) -> bool:
    worse = errors - best
    return bool(worse.sum() <= worse.std(ddof=1) * np.sqrt(N_PARTS))


def _with_weights(walk: Walk, closing: _Closing, weights: np.ndarray, seen: Centred) -> tuple[Node, ...]:
    """Return the layer, and the norm behind it, computing `weights` and the best bias to them.

    The norm keeps true statistics of what it reads, so that training may go on from here.
    """
    node = closing.node
    bias = seen.bias_of(weights)
    kernel = weights.reshape(closing.map.kernel.shape).reshape(node.layer.kernel.shape)
    if closing.norm is None:
        return (replace(node, layer=_with_bias(node.layer, kernel, bias, walk.graph.shape(node.inputs[0]))),)
    layer = clone_layer(node.layer, node.layer.name, input_shape=walk.graph.shape(node.inputs[0]))
    layer.kernel.assign(kernel)
    if layer.use_bias:
        layer.bias.assign(np.zeros(layer.bias.shape))
    norm = clone_layer(closing.norm.layer, closing.norm.layer.name, input_shape=node.shapes[0])
    mean = seen.mean_x @ weights
    variance = np.maximum(np.sum(weights * (seen.gram @ weights), axis=0), 0.0)
    norm.moving_mean.assign(mean)
    norm.moving_variance.assign(variance)
    norm.gamma.assign(np.sqrt(variance + norm.epsilon))
    norm.beta.assign(bias + mean)
    return replace(node, layer=layer), replace(closing.norm, layer=norm)


def _with_bias(layer: Any, kernel: np.ndarray, bias: np.ndarray, shape: Shape) -> Any:
    config = layer.get_config()
    config["use_bias"] = True
    clone = type(layer).from_config(config)
    clone.build(shape)
    if layer.use_bias:
        copy_variables(layer, clone)
    clone.kernel.assign(kernel)
    clone.bias.assign(bias)
    return clone
