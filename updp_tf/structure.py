"""Frozen values that the other modules pass to each other: graphs, blocks, candidates, refusals.

Nothing here imports Keras. A `Node` carries its Keras layer as an opaque object, so that graphs can be edited,
compared and searched without the training stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from updp_tf import affine
from updp_tf.activations import Activation
from updp_tf.affine import AffineConv, Geometry
from updp_tf.errors import ModelError

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Ref:
    """A tensor of a graph: output number `index` of the call `node`."""

    node: str
    index: int = 0

    def __str__(self) -> str:
        return self.node if self.index == 0 else f"{self.node}:{self.index}"


def map_refs(data: Any, function: Callable[[Ref], Any]) -> Any:
    """Return nested lists, tuples and dicts with every `Ref` replaced by `function(ref)`.

    Dicts are visited in the order of their sorted keys, as Keras flattens them.
    """
    if isinstance(data, Ref):
        return function(data)
    if isinstance(data, tuple):
        return tuple(map_refs(item, function) for item in data)
    if isinstance(data, list):
        return [map_refs(item, function) for item in data]
    if isinstance(data, Mapping):
        mapped = {key: map_refs(data[key], function) for key in sorted(data)}
        return {key: mapped[key] for key in data}
    return data


def refs_in(data: Any) -> tuple[Ref, ...]:
    """Return every `Ref` in nested data, in order of appearance."""
    found: list[Ref] = []
    map_refs(data, found.append)
    return tuple(found)


@dataclass(frozen=True)
class Node:
    """One call of a layer (or operation): a layer called twice is two nodes sharing `layer`.

    Attributes:
        name: unique in its graph.
        layer: the Keras layer or operation, opaque here.
        kind: class name of a stock Keras layer; of any other layer the full name, module first.
        args: positional call arguments, tensors replaced by `Ref`.
        kwargs: keyword call arguments, the same way.
        shapes: shape of every output, batch axis first, `None` where dynamic.
        dtypes: dtype name of every output.
    """

    name: str
    layer: Any
    kind: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]

    @cached_property
    def inputs(self) -> tuple[Ref, ...]:
        """The tensors this call reads, in order of appearance."""
        return refs_in((self.args, dict(self.kwargs)))

    @property
    def is_input(self) -> bool:
        """True for an input of the model."""
        return self.kind == "InputLayer"


@dataclass(frozen=True)
class ModelGraph:
    """Calls in topological order, with the structure of the model's inputs and outputs.

    Attributes:
        name: of the model.
        nodes: every node after the nodes it reads.
        inputs: the model's inputs as nested data of `Ref`, as the model was built with.
        outputs: the model's outputs, the same way.
        refused: layers that could not be looked into while reading, with the reason.
    """

    name: str
    nodes: tuple[Node, ...]
    inputs: Any
    outputs: Any
    refused: tuple[Refusal, ...] = ()

    def __post_init__(self) -> None:
        seen: dict[str, Node] = {}
        for node in self.nodes:
            if node.name in seen:
                raise ModelError(f"The graph of '{self.name}' has two calls named '{node.name}'.")
            for ref in node.inputs:
                if ref.node not in seen or ref.index >= len(seen[ref.node].shapes):
                    raise ModelError(f"'{node.name}' reads '{ref}', which no call before it writes.")
            seen[node.name] = node
        for ref in refs_in((self.inputs, self.outputs)):
            if ref.node not in seen:
                raise ModelError(f"The graph of '{self.name}' names '{ref}', which no call writes.")

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    @cached_property
    def by_name(self) -> dict[str, Node]:
        """Node by name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def position(self) -> dict[str, int]:
        """Place of every node in topological order."""
        return {node.name: index for index, node in enumerate(self.nodes)}

    @cached_property
    def output_refs(self) -> tuple[Ref, ...]:
        """The model's outputs, flat."""
        return refs_in(self.outputs)

    @cached_property
    def input_refs(self) -> tuple[Ref, ...]:
        """The model's inputs, flat."""
        return refs_in(self.inputs)

    @cached_property
    def readers(self) -> dict[Ref, tuple[str, ...]]:
        """Names of the nodes that read each tensor; a tensor nobody reads is absent."""
        found: dict[Ref, list[str]] = {}
        for node in self.nodes:
            for ref in dict.fromkeys(node.inputs):
                found.setdefault(ref, []).append(node.name)
        return {ref: tuple(names) for ref, names in found.items()}

    @cached_property
    def called_once(self) -> frozenset[str]:
        """Names of the nodes whose layer no other node calls."""
        names_by_layer: dict[int, list[str]] = {}
        for node in self.nodes:
            names_by_layer.setdefault(id(node.layer), []).append(node.name)
        return frozenset(names[0] for names in names_by_layer.values() if len(names) == 1)

    def shape(self, ref: Ref) -> Shape:
        """Shape of a tensor, batch axis first."""
        return self.by_name[ref.node].shapes[ref.index]

    def dtype(self, ref: Ref) -> str:
        """Dtype name of a tensor."""
        return self.by_name[ref.node].dtypes[ref.index]

    def replace_site(self, site: Sequence[str], new_nodes: Sequence[Node], old_exit: Ref, new_exit: Ref) -> ModelGraph:
        """Return the graph with the nodes `site` taken out, `new_nodes` put in, `old_exit` read as `new_exit`.

        New nodes stand where the last node of the site stood; nodes outside may read nothing of the site but its
        exit (`ModelGraph` refuses otherwise).
        """
        gone = set(site)
        last = max(self.position[name] for name in site)
        kept_before = [node for node in self.nodes[: last + 1] if node.name not in gone]

        def redirect(node: Node) -> Node:
            if old_exit not in node.inputs:
                return node
            swap = lambda ref: new_exit if ref == old_exit else ref  # noqa: E731
            return replace(node, args=map_refs(node.args, swap), kwargs=map_refs(dict(node.kwargs), swap))

        after = [redirect(node) for node in self.nodes[last + 1 :] if node.name not in gone]
        outputs = map_refs(self.outputs, lambda ref: new_exit if ref == old_exit else ref)
        return replace(self, nodes=(*kept_before, *new_nodes, *after), outputs=outputs)


@dataclass(frozen=True)
class Refusal:
    """Something that was not done: where, by which rule, and why."""

    site: str
    rule: str
    reason: str

    def __str__(self) -> str:
        return f"{self.site}: {self.rule}: {self.reason}"


@dataclass(frozen=True)
class Cost:
    """What a network, a block or a form costs for one image.

    Attributes:
        macs: multiply-accumulate operations.
        params: weights and biases stored.
        activation_bytes: largest sum of float32 bytes of the tensors alive at the same time.
        latency_ns: nanoseconds that a latency table tells; 0 where there is no table.
        file_bytes: bytes in the `.tflite` file that the table's rows were measured with; 0 where there is no table.
    """

    macs: int = 0
    params: int = 0
    activation_bytes: int = 0
    latency_ns: int = 0
    file_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Costs of two parts that run one after the other."""
        return Cost(
            self.macs + other.macs,
            self.params + other.params,
            max(self.activation_bytes, other.activation_bytes),
            self.latency_ns + other.latency_ns,
            self.file_bytes + other.file_bytes,
        )

    def as_json(self) -> dict[str, int]:
        """Return the numbers by name, without those that need a table where there is none."""
        told = {"macs": self.macs, "params": self.params, "activation_bytes": self.activation_bytes}
        timed = {"latency_ns": self.latency_ns, "file_bytes": self.file_bytes}
        return told | (timed if any(timed.values()) else {})


@dataclass(frozen=True, eq=False)
class Stage:
    """The linear maps of a block up to an activation, and that activation.

    Attributes:
        maps: linear maps in order, each with the norms after it folded in; composed only where somebody asks.
        activation: what follows, or None.
        mean: expected value of what the activation reads, shape (c_out,), where a norm tells it.
        std: its standard deviation, the same way.
    """

    maps: tuple[AffineConv, ...]
    activation: Activation | None = None
    mean: np.ndarray | None = None
    std: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """A part of a graph with one tensor in and one out that a single layer might replace.

    Tensors are images (batch, height, width, channels), tokens (batch, tokens, channels), which count as images one
    pixel wide, or vectors (batch, channels), which count as one pixel.

    Attributes:
        name: of its last node; a span has a name of its own.
        nodes: names of its nodes, in topological order.
        body: names of the nodes that a form replaces, in order: all but the skip's and the Add; any graph of calls.
        entry: the tensor it reads; others outside may read it too.
        exit: the tensor it writes.
        entry_shape: batch axis first, channels last.
        exit_shape: the same, after.
        skip: the linear map that is added to the body: None, an identity, or a projection.
        skip_nodes: names of the skip's nodes: a projection's, or an identity's that only act in training.
        join: name of the Add, or None where there is no skip.
        geometry: window of entry pixels that an output pixel depends on; None where no window is known.
        linear_refusal: why the body has no linear map once activations are linear, or None.
        cost: of the block as it is.
        skip_cost: of the projection alone.
        live_bytes: float32 bytes of the tensors outside the block that are alive while it runs, its entry included.
        geometry_refusal: why no window is known, or None.
        skip_exit: the tensor that the Add reads as the skip, or None where there is no Add.
        special_tokens: numbers of the tokens that are no patches (class, distillation); negative ones from the end.
        members: names of the blocks that a span replaces; empty for a block.
        part_of: name of the block that it is one linear layer of, or None.
    """

    name: str
    nodes: tuple[str, ...]
    body: tuple[str, ...]
    entry: Ref
    exit: Ref
    entry_shape: Shape
    exit_shape: Shape
    skip: AffineConv | None
    skip_nodes: tuple[str, ...]
    join: str | None
    geometry: Geometry | None
    linear_refusal: Refusal | None
    cost: Cost
    skip_cost: Cost
    live_bytes: int
    geometry_refusal: Refusal | None = None
    skip_exit: Ref | None = None
    special_tokens: tuple[int, ...] = ()
    members: tuple[str, ...] = ()
    part_of: str | None = None

    @property
    def skip_kind(self) -> str:
        """`none`, `identity` or `projection`."""
        if self.skip is None:
            return "none"
        return "identity" if affine.is_identity(self.skip) else "projection"

    @property
    def linearizable(self) -> bool:
        """True where the body is one linear map once activations are: what the starts without images ask for."""
        return self.linear_refusal is None

    @property
    def rank(self) -> int:
        """Axes of its tensors: 4 for images, 3 for tokens, 2 for vectors."""
        return len(self.entry_shape)

    @property
    def covers(self) -> tuple[str, ...]:
        """Names of the blocks that it stands for: its own, or a span's members."""
        return self.members or (self.name,)

    @property
    def c_in(self) -> int:
        """Channels read."""
        return int(self.entry_shape[-1] or 0)

    @property
    def c_out(self) -> int:
        """Channels written."""
        return int(self.exit_shape[-1] or 0)

    @property
    def entry_size(self) -> tuple[int | None, int | None]:
        """Height and width of the entry, None where dynamic."""
        return image_size(self.entry_shape)

    @property
    def exit_size(self) -> tuple[int | None, int | None]:
        """Height and width of the exit, None where dynamic."""
        return image_size(self.exit_shape)


def block_name(members: Sequence[str]) -> str:
    """Return the name of the block that stands for some: its own, or a span's."""
    return members[0] if len(members) == 1 else f"{members[0]}_to_{members[-1]}"


def as_images(tensor: np.ndarray) -> np.ndarray:
    """Return tokens or vectors as images of one column or one pixel, and images as they are: a view."""
    return tensor.reshape(*tensor.shape[:-1], *(1,) * (4 - tensor.ndim), tensor.shape[-1])


def image_shape(shape: Shape) -> Shape:
    """Return the shape of a tensor as `as_images` gives it."""
    return (shape[0], *image_size(shape), shape[-1])


def image_size(shape: Shape) -> tuple[int | None, int | None]:
    """Height and width of a tensor: tokens are an image one pixel wide, a vector is one pixel."""
    height, width = (*shape[1:-1], 1, 1)[:2]
    return height, width


@dataclass(frozen=True)
class LayerSpec:
    """A Keras layer as data: class name, configuration and weights, before anything imports Keras."""

    class_name: str
    config: Mapping[str, Any]
    weights: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One form that one block could take.

    Attributes:
        blocks: names of the blocks it replaces (one, or the members of a span).
        form: name of the form; `keep` leaves the block as it is.
        score: what it costs in accuracy, lower is better; 0 for `keep`.
        cost: of the form in place of the block.
        options: of the form, for instance {"kernel_size": 3, "skip": "kept"}.
        r2: explained part of the block's output on held-out positions, None where nothing was measured.
        kl: rise of the KL divergence of the logits with this block alone replaced, None where not measured.
    """

    blocks: tuple[str, ...]
    form: str
    score: float
    cost: Cost
    options: Mapping[str, Any] = field(default_factory=dict)
    r2: float | None = None
    kl: float | None = None

    @property
    def key(self) -> str:
        """Name that is unique among the candidates of one model."""
        return f"{'+'.join(self.blocks)}={self.form}"
