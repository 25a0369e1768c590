"""Cut units out of a graph: shorter weights, configurations that fit them, and what the result costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np

from updp_tf.errors import MergeError
from updp_tf.isomorphic.coupling import Axes, Cut, Resized
from updp_tf.isomorphic.couplings import COUPLINGS
from updp_tf.isomorphic.dependency import Dependencies
from updp_tf.structure import ModelGraph, Node, Ref, Shape, map_refs

Units = frozenset[int]


def cut_units(dependencies: Dependencies, cut: Units) -> ModelGraph:
    """Return the graph without some units: every layer that changes is a new one, with the kept slices.

    Args:
        dependencies: of the graph.
        cut: units that go.

    Raises:
        MergeError: a rule's new configuration does not give the shapes that the labels say.
    """
    cutter = _Cutter(dependencies, cut)
    return replace(dependencies.graph, nodes=tuple(cutter.node(node) for node in dependencies.graph))


def resized_graph(dependencies: Dependencies, cut: Units) -> ModelGraph:
    """Return a graph of the shapes that a cut leaves, to be counted and never run: no weight is touched."""
    cutter = _Cutter(dependencies, cut)
    return replace(dependencies.graph, nodes=tuple(cutter.outline(node) for node in dependencies.graph))


def kept_of(dependencies: Dependencies, ref: Ref, cut: Units) -> np.ndarray:
    """Return the indices of a tensor's last axis that are kept."""
    labels = dependencies.axes[ref][-1]
    if labels is None:
        return np.arange(dependencies.graph.shape(ref)[-1] or 0)
    return np.flatnonzero(dependencies.units.kept(labels, cut))


class _Cutter:
    def __init__(self, dependencies: Dependencies, cut: Units) -> None:
        self.dependencies, self.cut = dependencies, cut
        self._layers: dict[int, Any] = {}
        self._outlines: dict[int, Any] = {}
        self._tensors: dict[Ref, Any] = {}
        self._masks: dict[Ref, tuple[np.ndarray | None, ...]] = {}

    def masks(self, ref: Ref) -> tuple[np.ndarray | None, ...]:
        """Which indices of every axis of a tensor are kept; None for all."""
        if ref not in self._masks:
            self._masks[ref] = self._masks_of(self.dependencies.axes[ref])
        return self._masks[ref]

    def _masks_of(self, axes: Axes) -> tuple[np.ndarray | None, ...]:
        return tuple(None if labels is None else self._mask(labels) for labels in axes)

    def _mask(self, labels: np.ndarray) -> np.ndarray | None:
        mask = self.dependencies.units.kept(labels, self.cut)
        return None if mask.all() else mask

    def shape(self, ref: Ref) -> Shape:
        """New shape of a tensor."""
        old = self.dependencies.graph.shape(ref)
        return tuple(size if mask is None else int(mask.sum()) for size, mask in zip(old, self.masks(ref), strict=True))

    def weight_masks(self, layer: Any) -> dict[tuple[int, int], np.ndarray]:
        """Which indices of the axes of a layer's variables are kept, where not all are."""
        found = {}
        for one in self.dependencies.slices.get(id(layer), ()):
            if (mask := self._mask(one.labels)) is not None:
                found[one.variable, one.axis] = mask
        return found

    def change(self, node: Node) -> tuple[Resized, dict[tuple[int, int], np.ndarray], tuple[Shape, ...]]:
        """What becomes of a call: its changed configuration, its masks, its new shapes."""
        refs = [Ref(node.name, index) for index in range(len(node.shapes))]
        shapes = tuple(self.shape(ref) for ref in refs)
        masks = self.weight_masks(node.layer)
        kept, written = (tuple(self.masks(ref) for ref in group) for group in (node.inputs, refs))
        touched = masks or any(mask is not None for masks in (*kept, *written) for mask in masks)
        if node.is_input or not touched or node.kind not in COUPLINGS:
            return Resized(), masks, shapes
        return COUPLINGS[node.kind].resize(Cut(node, kept, written, shapes, masks)), masks, shapes

    def node(self, node: Node) -> Node:
        resized, masks, shapes = self.change(node)
        args = node.args if resized.args is None else resized.args
        changed = replace(node, args=args, shapes=shapes)
        for index, (shape, dtype) in enumerate(zip(shapes, node.dtypes, strict=True)):
            self._tensors[Ref(node.name, index)] = keras.KerasTensor(shape, dtype=dtype)
        if not masks and not resized.config:
            return changed
        # a layer with weights that is called twice stays one layer
        layer = self._layers.get(id(node.layer)) if masks else None
        if layer is None:
            layer = self._rebuilt(changed, resized, masks)
            if masks:
                self._layers[id(node.layer)] = layer
        return replace(changed, layer=layer)

    def _rebuilt(self, node: Node, resized: Resized, masks: Mapping[tuple[int, int], np.ndarray]) -> Any:
        config = {**node.layer.get_config(), **resized.config}
        layer = type(node.layer).from_config(config)
        args, kwargs = (map_refs(data, self._tensors.__getitem__) for data in (node.args, dict(node.kwargs)))
        written = [tuple(tensor.shape) for tensor in keras.tree.flatten(layer(*args, **kwargs))]
        if written != list(node.shapes):
            raise MergeError(f"'{node.name}' writes {written} when narrowed, not {list(node.shapes)}.")
        for index, (old, new) in enumerate(zip(_variables(node.layer), _variables(layer), strict=True)):
            here = {axis: mask for (variable, axis), mask in masks.items() if variable == index}
            if not here and index not in resized.scaled:
                new.assign(old)
                continue
            array = keras.ops.convert_to_numpy(old)
            for axis, mask in here.items():
                array = np.compress(mask, array, axis=axis)
            new.assign(array * np.asarray(resized.scaled.get(index, 1.0), dtype=array.dtype))
        return layer

    def outline(self, node: Node) -> Node:
        resized, masks, shapes = self.change(node)
        layer = node.layer
        if masks:
            layer = self._outlines.setdefault(id(layer), _Outline(layer, resized.config, masks))
        return replace(node, layer=layer, shapes=shapes)


def _variables(layer: Any) -> list[Any]:
    """Variables of a layer; operations have none."""
    return list(getattr(layer, "variables", ()))


class _Outline:
    """A layer as the rules that count see it: the shapes of a narrowed one, without its weights."""

    def __init__(self, layer: Any, config: Mapping[str, Any], masks: Mapping[tuple[int, int], np.ndarray]) -> None:
        self._layer, self._config = layer, config
        shapes = [list(one.shape) for one in layer.variables]
        for (variable, axis), mask in masks.items():
            shapes[variable][axis] = int(mask.sum())
        self._by_id = {
            id(one): SimpleNamespace(shape=tuple(shape), path=one.path)
            for one, shape in zip(layer.variables, shapes, strict=True)
        }

    @property
    def weights(self) -> list[Any]:
        return [self._by_id[id(one)] for one in self._layer.weights]

    def count_params(self) -> int:
        return sum(int(np.prod(one.shape)) for one in self.weights)

    def __getattr__(self, name: str) -> Any:
        if name in self._config:
            return self._config[name]
        value = getattr(self._layer, name)
        return self._by_id.get(id(value), value)
