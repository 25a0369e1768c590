"""What a latency table is measured with, and what it says about blocks and forms.

A key is the signature of what is timed, never a name: blocks of equal layers and shapes share a row, in one network
and across networks. Forms are timed as sketches, with random weights, before anything is fitted.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from updp_tf import rules
from updp_tf.blocks import Blocks, require_blocks
from updp_tf.cost import is_dearer
from updp_tf.errors import MissingLatencyError, ModelError
from updp_tf.forms import Form, SkipMode
from updp_tf.graph import build_model, n_elements
from updp_tf.merging import assemble, build_edit
from updp_tf.scoring import FormCost, skip_mode
from updp_tf.structure import Block, Candidate, Cost, ModelGraph, Node, Ref, map_refs

NOTHING = "nothing"
"""Key of a block that is removed: it takes no time."""

NETWORKS = 6
"""Whole networks of random plans that the correction of a table is fitted to."""

_NOT_TIMED = ("name", "trainable", "dtype", "seed")
_NOT_TIMED_SUFFIXES = ("_initializer", "_regularizer", "_constraint")


class Latencies(Protocol):
    """The part of a latency table that is read here: see `tflite_export.LatencyTable`."""

    @property
    def source(self) -> str:
        """What to call it in messages."""

    @property
    def conditions(self) -> Any:
        """What it was measured on."""

    def __contains__(self, key: object) -> bool:
        """Whether it has a row."""

    def corrected_us(self, key: str) -> float:
        """Microseconds that a part adds to a network."""

    def size_bytes(self, key: str) -> int:
        """Bytes that it adds to a file."""


Item = tuple[str, Any, tuple[str, ...]]
"""Key, Keras model, and of a whole network the keys of its parts."""


def block_key(graph: ModelGraph, block: Block) -> str:
    """Return the key of a block as it is."""
    nodes = [graph.by_name[name] for name in block.nodes]
    return f"keep:{_shapes(block)}:{_digest(nodes, block.entry)}"


def form_key(graph: ModelGraph, form: Form, block: Block, mode: SkipMode) -> str:
    """Return the key of a form in the place of a block: equal where its layers are."""
    sketched_skip = block.skip_kind
    if sketched_skip == "projection":
        sketched_skip += "-" + _digest([graph.by_name[name] for name in block.skip_nodes], block.entry)
    if form.name == "remove" and block.skip_kind == "identity":
        return NOTHING
    window = form.window(block)
    geometry = "any" if window is None else f"s{_x(window.strides)}:p{'-'.join(map(str, window.padding))}"
    return f"{form.name}:{_shapes(block)}:{geometry}:{sketched_skip}:{mode}"


def network_key(graph: ModelGraph) -> str:
    """Return the key of a whole network."""
    shape = _x(graph.shape(graph.input_refs[0])[1:])
    return f"network:{shape}:{_digest([node for node in graph if not node.is_input], None)}"


def rest_key(graph: ModelGraph) -> str:
    """Return the key of what is left of a network without its blocks."""
    return "rest:" + network_key(graph).removeprefix("network:")


def plan_keys(blocks: Blocks, chosen: Iterable[Candidate], forms: Mapping[str, Form]) -> tuple[str, ...]:
    """Return the keys of the parts of a network with forms in it: the rest, kept blocks and forms.

    Args:
        blocks: of the model.
        chosen: forms that were picked.
        forms: all forms, by name.
    """
    chosen = tuple(chosen)
    joined = blocks.joined(one.blocks for one in chosen)
    form_by_members = {one.blocks: one for one in chosen}
    keys = [rest_key(blocks.graph)]
    for block in joined:
        one = form_by_members.get(block.covers)
        if one is None:
            keys.append(block_key(blocks.graph, block))
        else:
            keys.append(form_key(blocks.graph, forms[one.form], block, one.options["skip"]))
    return tuple(key for key in keys if key != NOTHING)


def depthwise_macs(graph: ModelGraph) -> tuple[int, int]:
    """Return the MACs of a graph's calls for one image, and those of them that are depthwise convolutions'."""
    total = depthwise = 0
    for node in graph:
        if not node.inputs:
            continue
        macs = rules.macs(node, tuple(graph.shape(ref) for ref in node.inputs))
        total += macs
        groups, c_in = getattr(node.layer, "groups", 1), graph.shape(node.inputs[0])[-1]
        if node.kind == "DepthwiseConv2D" or (node.kind == "Conv2D" and groups == c_in != 1):
            depthwise += macs
        elif node.kind == "SeparableConv2D":
            kernel = node.layer.depthwise_kernel.shape
            depthwise += math.prod(kernel) * n_elements((None, *node.shapes[0][1:-1]))
    return total, depthwise


def latency_items(
    blocks: Blocks,
    *,
    forms: Sequence[Form],
    skip: str = "auto",
    spans: int = 1,
    networks: int = NETWORKS,
    seed: int = 0,
) -> Iterator[Item]:
    """Yield what has to be timed: every block, every form it can take, the network, and networks of random plans.

    Models are built one at a time, as they are asked for. What has a key in common with another comes once.

    Args:
        blocks: of a model of fixed size.
        forms: to time.
        skip: `auto`, `kept` or `folded`: how dense forms treat a skip.
        spans: up to how many consecutive blocks one form may replace.
        networks: how many random plans.
        seed: of their choice.

    Raises:
        ModelError: there are no blocks, or a block has no fixed size.
    """
    require_blocks(blocks)
    graph = blocks.graph
    _require_fixed_sizes(blocks)
    seen = {NOTHING}
    for block in (*blocks, *blocks.spans(max_length=spans)):
        if not block.members and (key := block_key(graph, block)) not in seen:
            seen.add(key)
            nodes = [graph.by_name[name] for name in block.nodes]
            yield key, _model(graph, block, nodes, block.exit), ()
        for form, mode in _able(block, forms, skip):
            key = form_key(graph, form, block, mode)
            if key not in seen:
                seen.add(key)
                edit = build_edit(graph, block, form.sketch(block, skip=mode))
                yield key, _model(graph, block, edit.nodes, edit.exit), ()
    whole = network_key(graph)
    yield whole, build_model(graph), tuple(block_key(graph, block) for block in blocks)
    rng = np.random.default_rng(seed)
    for number in range(networks):
        fraction = (number + 1) / networks
        yield random_network(blocks, forms=forms, skip=skip, fraction=fraction, rng=rng)


def random_network(
    blocks: Blocks, *, forms: Sequence[Form], skip: str, fraction: float, rng: np.random.Generator
) -> Item:
    """Return a network with sketches of random forms in the place of some of its blocks.

    Forms with more MACs than their block are left alone, since plans hardly hold them.

    Args:
        blocks: of the model.
        forms: to choose from.
        skip: as for `latency_items`.
        fraction: part of the blocks that are replaced; at least one is.
        rng: of the choice.
    """
    graph = blocks.graph
    able = {block.name: _cheaper(block, forms, skip) for block in blocks}
    names = [name for name, found in able.items() if found]
    if not names:
        raise ModelError(f"'{graph.name}' has no block with a form of fewer MACs than its own.")
    count = max(1, round(fraction * len(names)))
    picked = set(rng.choice(names, size=count, replace=False).tolist())
    edits, parts = {}, [rest_key(graph)]
    for block in blocks:
        if block.name not in picked:
            parts.append(block_key(graph, block))
            continue
        form, mode = able[block.name][int(rng.integers(len(able[block.name])))]
        edits[block.name] = build_edit(graph, block, form.sketch(block, skip=mode))
        parts.append(form_key(graph, form, block, mode))
    edited = assemble(blocks, edits, {})
    return network_key(edited), build_model(edited), tuple(part for part in parts if part != NOTHING)


def with_latencies(
    blocks: Blocks, table: Latencies, *, forms: Sequence[Form], skip: str, spans: int = 1
) -> tuple[Blocks, FormCost]:
    """Return the blocks with the times and bytes of a table in their costs, and what tells those of forms.

    Raises:
        MissingLatencyError: a block or form has no row; all are counted, the first ones named.
        ModelError: a block has no fixed size.
    """
    _require_fixed_sizes(blocks)
    graph = blocks.graph
    wanted = {network_key(graph): "the network itself"}
    wanted |= {block_key(graph, block): f"block '{block.name}' as it is" for block in blocks}
    for block in (*blocks, *blocks.spans(max_length=spans)):
        for form, mode in _able(block, forms, skip):
            wanted.setdefault(form_key(graph, form, block, mode), f"{form.name} for '{block.name}'")
    missing = {key: what for key, what in wanted.items() if key != NOTHING and key not in table}
    if missing:
        named = "; ".join(f"{what} ({key})" for key, what in list(missing.items())[:3])
        raise MissingLatencyError(
            f"{table.source} ({table.conditions}) lacks {len(missing)} of the {len(wanted)} rows for '{graph.name}': "
            f"{named}{'; ...' if len(missing) > 3 else ''}. Measure them with updp_tf.measure_latency(model, out=...) "
            "(updp-tf latency MODEL.keras -o TABLE.csv), which adds what a table lacks."
        )
    costs = {block.name: _timed(block.cost, block_key(graph, block), table) for block in blocks}
    rest = _timed(Cost(), rest_key(graph), table)
    latency_ns = rest.latency_ns + sum(cost.latency_ns for cost in costs.values())
    file_bytes = rest.file_bytes + sum(cost.file_bytes for cost in costs.values())
    network = replace(blocks.network_cost, latency_ns=latency_ns, file_bytes=file_bytes)

    def form_cost(form: Form, block: Block, mode: SkipMode) -> Cost:
        return _timed(form.cost(block, skip=mode), form_key(graph, form, block, mode), table)

    return blocks.with_costs(costs, network), form_cost


def _timed(cost: Cost, key: str, table: Latencies) -> Cost:
    if key == NOTHING:
        return cost
    return replace(cost, latency_ns=round(1000 * table.corrected_us(key)), file_bytes=table.size_bytes(key))


def _able(block: Block, forms: Sequence[Form], skip: str) -> list[tuple[Form, SkipMode]]:
    mode = skip_mode(block, skip)
    return [(form, mode) for form in forms if form.refuses(block, skip=mode) is None]


def _cheaper(block: Block, forms: Sequence[Form], skip: str) -> list[tuple[Form, SkipMode]]:
    return [
        (form, mode)
        for form, mode in _able(block, forms, skip)
        if not is_dearer(form.cost(block, skip=mode), replace(block.cost, latency_ns=0), "macs")
    ]


def _require_fixed_sizes(blocks: Blocks) -> None:
    for ref in blocks.graph.input_refs:
        shape = blocks.graph.shape(ref)
        if None in shape[1:]:
            raise ModelError(
                f"'{blocks.graph.name}' takes images of any size ({_x(shape[1:])}), and a latency is that of one size: "
                "build it again with a fixed input shape."
            )


def _model(graph: ModelGraph, block: Block, nodes: Sequence[Node], exit: Ref) -> Any:
    """Return calls between a block's entry and its exit as a Keras model."""
    entry = Ref(block.entry.node)  # the call in front may write more tensors, of which the block reads one
    source = Node(entry.node, None, "InputLayer", (), {}, (block.entry_shape,), (graph.dtype(block.entry),))
    swap = lambda ref: entry if ref == block.entry else ref  # noqa: E731
    inside = [replace(one, args=map_refs(one.args, swap), kwargs=map_refs(dict(one.kwargs), swap)) for one in nodes]
    return build_model(ModelGraph("part", (source, *inside), inputs=entry, outputs=swap(exit)))


def _digest(nodes: Sequence[Node], entry: Ref | None) -> str:
    """Return a short hash of calls that is equal where the same work is done, whatever the names and weights."""
    number = {node.name: index for index, node in enumerate(nodes)}

    def place(ref: Ref) -> str:
        return "in" if ref == entry or ref.node not in number else f"{number[ref.node]}:{ref.index}"

    digest = hashlib.sha256()
    for node in nodes:
        config = {} if node.layer is None else _timed_config(node.layer.get_config())
        shapes = [tuple(weight.shape) for weight in getattr(node.layer, "weights", ())]
        args, kwargs = (map_refs(data, place) for data in (node.args, dict(node.kwargs)))
        record = (node.kind, config, args, kwargs, node.shapes, shapes)
        digest.update(json.dumps(record, sort_keys=True, default=_by_shape).encode())
    return digest.hexdigest()[:12]


def _timed_config(config: Any) -> Any:
    """Return a layer's configuration without what does not change how long it takes."""
    if isinstance(config, Mapping):
        return {
            key: _timed_config(value)
            for key, value in config.items()
            if key not in _NOT_TIMED and not str(key).endswith(_NOT_TIMED_SUFFIXES)
        }
    return [_timed_config(value) for value in config] if isinstance(config, list | tuple) else config


def _by_shape(value: Any) -> Any:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else ["array", *map(str, shape)]


def _shapes(block: Block) -> str:
    return f"{_x(block.entry_shape[1:])}:{_x(block.exit_shape[1:])}"


def _x(sizes: Iterable[int | None]) -> str:
    return "x".join("any" if size is None else str(size) for size in sizes)
