"""Put blends into a graph, block by block: beside what a whole block writes, or in the place of what is inside it.

A doubled block is blended with its form. An expanded one has blends for its activations, norms, gates and off-centre
taps, so that at blend 0 its layers compose to one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import keras

from updp_tf import affine, rules
from updp_tf.affine import AffineConv
from updp_tf.errors import ShapeError
from updp_tf.forms import ConvForm, Fitted, SeparableForm, form_by_name, kernel_within
from updp_tf.graph import clone_layer
from updp_tf.layers import (
    NO_RING,
    ActivationBlend,
    Blend,
    BlockBlend,
    BorderRing,
    GateBlend,
    InteriorNormalization,
    NormBlend,
    NormToBatch,
    Pads,
    TailBlend,
    TapsBlend,
)
from updp_tf.merging import build_edit, policy_of
from updp_tf.structure import Block, ModelGraph, Node, Ref, Refusal, Shape, image_shape, map_refs

Norms = Literal["sigma", "batch"]


class NotExpandable(Exception):
    """Why a block cannot be expanded; the message reads on from "it"."""


class Surgeon:
    """A graph whose blocks get blends one by one, front to back."""

    def __init__(self, graph: ModelGraph) -> None:
        self.original = graph
        self.graph = graph
        self.rings: dict[str, Pads] = {}
        """Width of the ring around what each blend reads, where there is one."""
        self._exits: dict[Ref, Ref] = {}

    def now(self, data: Any) -> Any:
        """Return refs of the original graph as they are called now."""
        return map_refs(data, lambda ref: self._exits.get(ref, ref))

    def node(self, layer: Any, refs: Sequence[Ref], shapes: Sequence[Shape], dtype: str) -> Node:
        """Return a call of a new layer."""
        read = shapes[0] if len(shapes) == 1 else list(shapes)
        if not layer.built:
            layer.build(read)
        args = (refs[0],) if len(refs) == 1 else (list(refs),)
        symbols = [keras.KerasTensor(shape, dtype) for shape in shapes]
        # Not `compute_output_shape`, which not every layer has.
        written = layer.compute_output_spec(symbols[0] if len(symbols) == 1 else symbols)
        return Node(layer.name, layer, rules.kind_of(layer), args, {}, (tuple(written.shape),), (dtype,))

    def double(self, block: Block, fitted: Fitted, options: Mapping[str, Any]) -> None:
        """Put a form beside a block, and a blend behind both."""
        edit = build_edit(self.original, block, fitted)
        added = Ref(f"{block.name}_merged_add")
        swap = lambda ref: added if block.join and ref == Ref(block.join) else self.now(ref)  # noqa: E731
        form: list[Node] = []
        for node in edit.nodes:
            if node.name in block.nodes and node.name != block.join:
                continue  # the skip's own calls, which are there already
            args, kwargs = map_refs(node.args, swap), map_refs(dict(node.kwargs), swap)
            if node.name == block.join:
                layer = keras.layers.Add(name=added.node, dtype=policy_of(self.original, block))
                node = replace(node, name=added.node, layer=layer, kind="Add")
                args, kwargs = ([*replace(node, args=args, kwargs=kwargs).inputs],), {}
            form.append(replace(node, args=args, kwargs=kwargs))
        layer = BlockBlend(name=f"{block.name}_blend", dtype=policy_of(self.original, block), **options)
        shape, dtype = block.exit_shape, self.original.dtype(block.exit)
        blend = self.node(layer, (block.exit, swap(edit.exit)), (shape, shape), dtype)
        own = [self.graph.by_name[name] for name in block.nodes]
        self._replace(block, (*own, *form, blend), Ref(blend.name))
        self._stop_dropping(block)

    def add_tail(self, block: Block, activation: str, options: Mapping[str, Any]) -> None:
        """Put an activation that starts as the identity behind a block."""
        exit = self.now(block.exit)
        last = self.graph.by_name[exit.node]
        inner = keras.layers.Activation(activation, name=f"{block.name}_tail_activation")
        layer = TailBlend(inner, name=f"{block.name}_tail", dtype=policy_of(self.original, block), **options)
        tail = self.node(layer, (exit,), (last.shapes[exit.index],), last.dtypes[exit.index])
        self.graph = self.graph.replace_site((last.name,), (last, tail), exit, Ref(tail.name))
        self._exits[block.exit] = Ref(tail.name)

    def expand(self, block: Block, form: str, skip: str, norms: Norms, options: Mapping[str, Any]) -> Refusal | None:
        """Put blends in the place of the activations, norms and gates of a block, or say why that cannot be."""
        try:
            nodes, exit, rings = _Expansion(self, block, form, skip, norms, options).run()
        except (NotExpandable, rules.Unsupported, ShapeError) as error:
            return Refusal(block.name, "expanded", str(error))
        self._replace(block, nodes, exit)
        self.rings |= rings
        return None

    def _replace(self, block: Block, nodes: Sequence[Node], exit: Ref) -> None:
        self.graph = self.graph.replace_site(block.nodes, nodes, block.exit, exit)
        self._exits[block.exit] = exit

    def _stop_dropping(self, block: Block) -> None:
        """Take the calls that only act in training out of a block: its form has none."""
        for name in block.nodes:
            node = self.graph.by_name[name]
            if rules.is_passive(node) and len(node.inputs) == 1 and Ref(name) != block.exit:
                self.graph = self.graph.replace_site((name,), (), Ref(name), node.inputs[0])


class _Expansion:
    """One block whose inside is blended.

    Where a layer behind the first one pads, all padding moves to the front of the block, so that at blend 0 the block
    is one convolution, borders included; a `BorderRing` before each layer that padded keeps blend 1 what it was.
    """

    def __init__(
        self, surgeon: Surgeon, block: Block, form: str, skip: str, norms: Norms, options: Mapping[str, Any]
    ) -> None:
        self.surgeon, self.graph, self.block = surgeon, surgeon.graph, block
        self.form, self.skip, self.norms, self.options = form, skip, norms, dict(options)
        self.policy = policy_of(surgeon.original, block)
        self.nodes: list[Node] = []
        self.rings: dict[str, Pads] = {}
        self.read: dict[Ref, Ref] = {}
        self.cropped: dict[Ref, Ref] = {}
        self.path = self._path()
        self.maps = {name: self._map(self.graph.by_name[name]) for name in self.path}
        self.tapped = self._tapped()
        self.moves = False

    def run(self) -> tuple[list[Node], Ref, dict[str, Pads]]:
        """Return the block's new calls, the tensor they write, and the rings around what they write."""
        used = [name for name in self.path if not rules.is_passive(self.graph.by_name[name])]
        self.moves = any(one.pads for name in used[1:] for one in self.maps[name])
        on_path = set(self.path)
        for name in self.block.nodes:
            node = self.graph.by_name[name]
            if name not in on_path:
                self._beside(node)
            elif name not in used:
                self.read[Ref(name)] = self._current(node.inputs[0])
            else:
                self._on_path(node, used[used.index(name) :], first=name == used[0])
        self._sign()
        return self.nodes, self._current(self.block.exit), self.rings

    # What the block is made of

    def _path(self) -> list[str]:
        """Return the calls from the entry to what the body writes; a gate is entered by what it multiplies."""
        block, graph = self.block, self.graph
        ref = block.exit
        if block.join is not None:
            body = set(block.body)
            (ref,) = [one for one in graph.by_name[block.join].inputs if one.node in body]
        entry = self.surgeon.now(block.entry)
        names: list[str] = []
        while ref != entry:
            node = graph.by_name[ref.node]
            if len(node.inputs) == 2 and node.kind == "Multiply":
                full = [one for one in node.inputs if graph.shape(one) == node.shapes[0]]
                if len(full) != 1:
                    raise NotExpandable(f"'{node.name}' in it multiplies two tensors of its own size")
                (ref,) = full
            elif len(node.inputs) == 1:
                (ref,) = node.inputs
            else:
                raise NotExpandable(f"'{node.name}' in it reads {len(node.inputs)} tensors")
            names.append(node.name)
        return names[::-1]

    def _map(self, node: Node) -> tuple[AffineConv, ...]:
        """Return the geometry that a call has at blend 0: its maps, none for what works pixel by pixel."""
        if rules.is_passive(node) or len(node.inputs) == 2 or node.kind in rules.ACTIVATIONS or node.kind == "PReLU":
            return ()
        if node.kind in rules.NORMS:
            return ()
        maps = rules.linear_maps(node, image_shape(self.graph.shape(node.inputs[0])))
        if maps is None:
            raise NotExpandable(f"'{node.name}' in it {rules.why_unknown(node)}")
        return maps

    def _padding(self, names: Sequence[str]) -> Pads:
        """Return how much the calls pad all together, in pixels of what the first of them reads."""
        maps = [one for name in names for one in self.maps[name]]
        return affine.composed_geometry(maps).padding if maps else NO_RING

    def _tapped(self) -> frozenset[str]:
        """Return the convolutions that must become 1x1 for the composed kernel to be the form's."""
        form = form_by_name(self.form)
        if not isinstance(form, ConvForm | SeparableForm):
            raise NotExpandable(f"it becomes '{self.form}', which is not what its own layers compose to")
        maps = [(name, one) for name in self.path for one in self.maps[name]]

        def composed(tapped: set[str]) -> tuple[int, int]:
            size, stride = [1, 1], [1, 1]
            for name, one in maps:
                for axis in (0, 1):
                    size[axis] += stride[axis] * (one.effective_size[axis] - 1) * (name not in tapped)
                    stride[axis] *= one.strides[axis]
            return size[0], size[1]

        able = [name for name, one in reversed(maps) if len(self.maps[name]) == 1 and _can_lose_taps(one)]
        choices = (set(names) for n in range(len(able) + 1) for names in itertools.combinations(able, n))
        wanted = kernel_within(form.kernel_size, composed(set()))
        tapped = next((names for names in choices if composed(names) == wanted), None)
        if tapped is None:
            raise NotExpandable(f"its layers do not compose to the kernel of '{self.form}', whatever taps are blended")
        if isinstance(form, SeparableForm):
            windows = [max(one.kernel_size) > 1 for _, one in maps]
            channelwise = [one.groups == one.c_in == one.c_out for _, one in maps]
            if True not in windows or not all(channelwise[: windows.index(True) + 1]) or sum(windows) > 1:
                raise NotExpandable(f"its layers do not compose to the two of '{self.form}'")
        return frozenset(tapped)

    # Its new calls

    def _add(self, layer: Any, refs: Sequence[Ref], ring: Pads) -> Ref:
        shapes = [self._shape(ref) for ref in refs]
        node = self.surgeon.node(layer, refs, shapes, self.surgeon.original.dtype(self.block.exit))
        self.nodes.append(node)
        if any(ring):
            self.rings[node.name] = ring
        return Ref(node.name)

    def _shape(self, ref: Ref) -> Shape:
        """Return the shape that a tensor has now, its ring included."""
        made = next((node for node in self.nodes if node.name == ref.node), None)
        return self.graph.shape(ref) if made is None else made.shapes[ref.index]

    def _blend_options(self, node: Node) -> dict[str, Any]:
        return {**self.options, "name": f"{node.name}_blend", "dtype": self.policy}

    def _current(self, ref: Ref) -> Ref:
        return self.read.get(ref, ref)

    def _on_path(self, node: Node, ahead: Sequence[str], *, first: bool) -> None:
        (old,) = [one for one in node.inputs if len(node.inputs) == 1 or self.graph.shape(one) == node.shapes[0]]
        read = self._current(old)
        ring, ring_after = (self._padding(ahead), self._padding(ahead[1:])) if self.moves else (NO_RING, NO_RING)
        maps = self.maps[node.name]
        if self.moves and first:
            pad = keras.layers.ZeroPadding2D((ring[:2], ring[2:]), name=f"{self.block.name}_pad", dtype=self.policy)
            read = self._add(pad, (read,), ring)
        elif any(one.pads for one in maps) and any(ring):
            layer = BorderRing(ring, **{**self._blend_options(node), "name": f"{node.name}_ring"})
            read = self._add(layer, (read,), ring)
        if len(node.inputs) == 2:
            (gate,) = [one for one in node.inputs if one != old]
            added = self._add(GateBlend(**self._blend_options(node)), (read, self._current(gate)), ring_after)
        elif maps and self.moves and node.kind == "ZeroPadding2D":
            self.read[Ref(node.name)] = read
            return
        elif maps:
            added = self._add(self._linear(node, self._shape(read)), (read,), ring_after)
        elif node.kind == "BatchNormalization":
            added = self._add(self._batch_norm(node, ring), (read,), ring_after)
        elif node.kind in rules.NORMS:
            added = self._add(self._norm(node), (read,), ring_after)
        else:
            layer = ActivationBlend(activation_layer(node, self.graph), **self._blend_options(node))
            added = self._add(layer, (read,), ring_after)
        self.read[Ref(node.name)] = added

    def _linear(self, node: Node, shape: Shape) -> Any:
        change = {"padding": "valid"} if self.moves and "padding" in node.layer.get_config() else {}
        layer = clone_layer(node.layer, node.name, input_shape=shape, **change)
        if node.name not in self.tapped:
            return layer
        return TapsBlend(layer, **self._blend_options(node))

    def _batch_norm(self, node: Node, ring: Pads) -> Any:
        shape = self.graph.shape(node.inputs[0])
        if not any(ring):
            return clone_layer(node.layer, node.name, input_shape=shape)
        config = node.layer.get_config() | {"name": node.name, "ring": ring}
        layer = InteriorNormalization(**config)
        layer.build(shape)
        layer.set_weights(node.layer.get_weights())
        return layer

    def _norm(self, node: Node) -> Any:
        shape = self.graph.shape(node.inputs[0])
        refuse_norm(node, shape)
        inner = clone_layer(node.layer, node.name, input_shape=shape)
        if self.norms == "sigma":
            return NormBlend(inner, **self._blend_options(node))
        target = keras.layers.BatchNormalization(name=f"{node.name}_batch", dtype=self.policy)
        return NormToBatch(inner, target, **self._blend_options(node))

    def _beside(self, node: Node) -> None:
        """Take over a call that is not on the path: a gate's, the skip's, the Add."""

        def current(ref: Ref) -> Ref:
            return self._current(ref) if node.name == self.block.join else self._crop(ref)

        args, kwargs = map_refs(node.args, current), map_refs(dict(node.kwargs), current)
        self.nodes.append(replace(node, args=args, kwargs=kwargs))

    def _crop(self, ref: Ref) -> Ref:
        """Return a tensor of the path without its ring, for a gate that is computed from it."""
        ring = self.rings.get(self._current(ref).node)
        if ring is None:
            return self._current(ref)
        if ref not in self.cropped:
            layer = keras.layers.Cropping2D((ring[:2], ring[2:]), name=f"{ref.node}_crop", dtype=self.policy)
            self.cropped[ref] = self._add(layer, (self._current(ref),), NO_RING)
        return self.cropped[ref]

    def _sign(self) -> None:
        """Write into the first blend what merging has to know of the block."""
        first = next((node.layer for node in self.nodes if isinstance(node.layer, Blend)), None)
        if first is None:
            raise NotExpandable("it has no activation, norm or gate: it is linear, and can be merged at once")
        first.site = {
            "nodes": [node.name for node in self.nodes],
            "skip_nodes": list(self.block.skip_nodes),
            "join": self.block.join,
            "form": self.form,
            "skip": self.skip,
        }


def _can_lose_taps(one: AffineConv) -> bool:
    """True where the centre tap alone is a 1x1 convolution."""
    if max(one.kernel_size) == 1 or not all(size % 2 for size in one.kernel_size):
        return False
    down, right = ((size - 1) // 2 for size in one.effective_size)
    return all(pad >= reach for pad, reach in zip(one.padding, (down, down, right, right), strict=True))


def activation_layer(node: Node, graph: ModelGraph) -> Any:
    """Return what applies an activation as a layer of its own."""
    if isinstance(node.layer, keras.layers.Layer):
        return clone_layer(node.layer, node.name, input_shape=graph.shape(node.inputs[0]))
    function = rules.activation(node)
    defaults = None if function is None else rules.named(function.name)
    if function is None or function != defaults:
        raise NotExpandable(f"'{node.name}' in it is an operation that is no layer's activation")
    return keras.layers.Activation(function.name, name=node.name)


def refuse_norm(node: Node, shape: Shape) -> None:
    """Raise if a normalization over each image's own statistics is of a kind that has no blend."""
    layer = node.layer
    last = (-1, len(shape) - 1, [-1], [len(shape) - 1], (-1,), (len(shape) - 1,))
    if node.kind not in ("LayerNormalization", "GroupNormalization", "RMSNormalization") or layer.axis not in last:
        raise NotExpandable(f"'{node.name}' in it is a {node.kind} that does not normalize the channels alone")
