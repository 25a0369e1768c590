"""How much each unit matters: a criterion summed over what a unit owns in each layer, averaged over the layers.

Every score is divided by the mean of its group, so that groups of different layers can be ranked together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import keras
import numpy as np

from updp_tf.errors import CalibrationError, ModelError
from updp_tf.graph import run_nodes
from updp_tf.isomorphic.dependency import Dependencies, Group, Member, Slice
from updp_tf.memory import image_batches
from updp_tf.structure import ModelGraph, Node, Ref

Importance = Literal["l1", "l2", "activation", "taylor", "hessian", "random"]

IMPORTANCES: tuple[Importance, ...] = ("l1", "l2", "activation", "taylor", "hessian", "random")

ArrayOf = Callable[[Member, int], np.ndarray]
"""Returns the criterion of every element of a member's variable, of that variable's shape."""

SumsOf = Callable[[Member, Slice], np.ndarray]
"""Returns the criterion summed over all axes of a variable but the slice's."""


def group_scores(
    dependencies: Dependencies,
    importance: Importance,
    *,
    images: Any = None,
    gradients: Mapping[int, Mapping[int, np.ndarray]] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return the scores of the units of every group, by the group's name; their mean in each group is 1.

    Args:
        dependencies: of the network.
        importance: `l1` and `l2` sum |w| and w^2 over what a unit owns, `activation` is the mean square of what is
            read of it (of heads inside a layer, which show no activation, w^2), `taylor` sums |w g|, `hessian`
            w^2 g^2, `random` ranks by chance.
        images: for `activation`.
        gradients: for `taylor` (sums over batches) and `hessian` (mean squares over images): by `id(layer)` and index
            of the variable.
        seed: of `random`.

    Raises:
        CalibrationError: `activation` without images.
        ModelError: a score is NaN or infinite.
    """
    if importance == "random":
        rng = np.random.default_rng(seed)
        return {group.name: _normalised(rng.random(len(group.units))) for group in dependencies.groups}
    if importance == "activation":
        energies = _energies(dependencies, images)
        by_group = {group.name: _by_activation(dependencies, group, energies) for group in dependencies.groups}
    else:
        sums_of = _summed(_criterion(importance, gradients or {}))
        by_group = {group.name: by_members(dependencies, group, sums_of) for group in dependencies.groups}
    for name, scores in by_group.items():
        if not np.isfinite(scores).all():
            raise ModelError(f"The importance of the channels of '{name}' is NaN or infinite; look at its weights.")
    return {name: _normalised(scores) for name, scores in by_group.items()}


def _normalised(scores: np.ndarray) -> np.ndarray:
    """Scores over their mean; a group that is zero throughout stays zero, and goes first."""
    return scores / (scores.mean() or 1.0)


def _criterion(importance: str, gradients: Mapping[int, Mapping[int, np.ndarray]]) -> ArrayOf:
    def weights(member: Member, index: int) -> np.ndarray:
        return np.asarray(keras.ops.convert_to_numpy(member.node.layer.variables[index]), dtype=np.float64)

    def gradient(member: Member, index: int) -> np.ndarray:
        return gradients.get(id(member.node.layer), {}).get(index, np.zeros(()))

    rules: dict[str, ArrayOf] = {
        "l1": lambda member, index: np.abs(weights(member, index)),
        "l2": lambda member, index: np.square(weights(member, index)),
        "taylor": lambda member, index: np.abs(weights(member, index) * gradient(member, index)),
        "hessian": lambda member, index: np.square(weights(member, index)) * gradient(member, index),
    }
    return rules[importance]


def _summed(array_of: ArrayOf) -> SumsOf:
    """Sum each variable once, however many groups have a part of it."""
    known: dict[tuple[int, int, int], np.ndarray] = {}

    def sums_of(member: Member, one: Slice) -> np.ndarray:
        key = (id(member.node.layer), one.variable, one.axis)
        if key not in known:
            array = array_of(member, one.variable)
            known[key] = array.sum(axis=tuple(axis for axis in range(array.ndim) if axis != one.axis))
        return known[key]

    return sums_of


def by_members(dependencies: Dependencies, group: Group, sums_of: SumsOf) -> np.ndarray:
    """Mean over a group's members of the criterion summed over what each unit owns there."""
    total, n_members = np.zeros(group.size), np.zeros(group.size)
    for member in group.members:
        own, seen = np.zeros(group.size), np.zeros(group.size, dtype=bool)
        for one in member.slices:
            if not one.scored:
                continue
            along = sums_of(member, one)
            for places in dependencies.places(one.labels, group):
                inside = places >= 0
                np.add.at(own, places[inside], along[inside])
                seen[places[inside]] = True
        total += own
        n_members += seen
    return total / np.maximum(n_members, 1)


def _energies(dependencies: Dependencies, images: Any) -> dict[Ref, np.ndarray]:
    """Mean square of every channel of the tensors that layers with weights read."""
    graph = dependencies.graph
    if images is None:
        raise CalibrationError("importance='activation' needs calibration images.")
    source = single_input(graph)
    wanted = {
        node.inputs[0]
        for node in graph
        if id(node.layer) in dependencies.slices and dependencies.axes[node.inputs[0]][-1] is not None
    }
    sums: dict[Ref, np.ndarray] = {ref: np.zeros(int(graph.shape(ref)[-1] or 0)) for ref in wanted}
    n = 0
    for batch in image_batches(images, shape=graph.shape(source), batch_size=16):
        values: dict[Ref, Any] = {source: keras.ops.convert_to_tensor(batch)}
        run_nodes(graph, values)
        for ref in wanted:
            array = keras.ops.convert_to_numpy(values[ref]).astype(np.float64)
            sums[ref] += np.square(array).mean(axis=tuple(range(1, array.ndim - 1))).sum(axis=0)
        n += len(batch)
    return {ref: total / n for ref, total in sums.items()}


def single_input(graph: ModelGraph) -> Ref:
    """The input of a network that has one; a `CalibrationError` for any other."""
    if len(graph.input_refs) != 1:
        raise CalibrationError(
            f"'{graph.name}' has {len(graph.input_refs)} inputs; calibration works for models with one input."
        )
    return graph.input_refs[0]


def _by_activation(dependencies: Dependencies, group: Group, energies: Mapping[Ref, np.ndarray]) -> np.ndarray:
    total, n_tensors = np.zeros(group.size), np.zeros(group.size)
    for ref, energy in energies.items():
        for places in dependencies.places(dependencies.axes[ref][-1], group):  # type: ignore[arg-type]
            inside = places >= 0
            np.add.at(total, places[inside], energy[inside])
            np.add.at(n_tensors, places[inside], 1)
    if not n_tensors.any():
        # heads inside a layer show no activation: what their weights say is all there is
        return by_members(dependencies, group, _summed(_criterion("l2", {})))
    return total / np.maximum(n_tensors, 1)


def weighted_layers(graph: ModelGraph) -> dict[int, Node]:
    """Layers with variables, by identity, with their first call."""
    found: dict[int, Node] = {}
    for node in graph:
        if getattr(node.layer, "variables", None):
            found.setdefault(id(node.layer), node)
    return found
