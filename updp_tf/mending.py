"""Repair a model after an edit: fold norms, renew their statistics, refit closing layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from updp_tf.blocks import find_blocks_in, prepared_graph
from updp_tf.console import shown
from updp_tf.errors import ModelError
from updp_tf.folding import fold_norms_in
from updp_tf.graph import build_model, read_graph
from updp_tf.memory import DEFAULT_LIMIT_BYTES, Memory
from updp_tf.refitting import refit_closing_layer
from updp_tf.structure import ModelGraph, Node
from updp_tf.walking import Walk, one_blas_thread, units


def fold_norms(model: Any) -> Any:
    """Return the model with every BatchNormalization folded that directly follows a linear layer.

    Outputs are equal up to float32 rounding (1e-4 relative for a network); the model can no longer be trained with
    batch statistics, so fold last.

    Args:
        model: a Functional or Sequential Keras 3 model; it is not changed.
    """
    return build_model(fold_norms_in(read_graph(model))[0])


def reestimate_norms(
    model: Any,
    data: Any,
    *,
    memory_bytes: int = DEFAULT_LIMIT_BYTES,
    verbose: bool = True,
) -> Any:
    """Return the model with the exact statistics of `data` in every BatchNormalization.

    In network order, each norm gets the mean and variance of its input with everything before it in inference mode
    (METHOD section 3): no moving averages. A norm that is called more than once keeps its statistics.

    Args:
        model: a Functional or Sequential Keras 3 model; it is not changed.
        data: images as the model reads them: an array or an iterable of batches.
        memory_bytes: activations beyond this go to disk.
        verbose: show progress on standard error.
    """
    graph = read_graph(model)
    own: dict[str, Node] = {}
    with Memory(memory_bytes) as memory, one_blas_thread(), shown(verbose) as progress:
        walk = Walk(graph, data, memory)
        parts = units(graph, find_blocks_in(graph))
        tensors = walk.start()
        for index, part in enumerate(parts):
            nodes = walk.renew_norms([graph.by_name[name] for name in part.nodes], tensors)
            own |= {node.name: node for node in nodes}
            tensors |= walk.run(nodes, {ref: ref for ref in part.writes}, tensors)
            walk.release(parts[index + 1 :], tensors)
            if progress is not None:
                progress(index + 1, len(parts), f"renew norms {part.name}")
    return build_model(replace(graph, nodes=tuple(own.get(node.name, node) for node in graph)))


def refit(
    student: Any,
    teacher: Any,
    calibration: Any,
    *,
    seed: int = 0,
    memory_bytes: int = DEFAULT_LIMIT_BYTES,
    verbose: bool = True,
) -> Any:
    """Return the student with the closing layers of its blocks refitted to the teacher's block outputs.

    In sequence along the network; each strength, "not at all" included, is chosen on held-out images. Blocks are
    matched by name, so the student is an edited copy of the teacher.

    Args:
        student: the edited model; it is not changed.
        teacher: the model it came from.
        calibration: images as both read them.
        seed: of the sampled positions.
        memory_bytes: activations of each beyond this go to disk.
        verbose: show progress on standard error.

    Raises:
        ModelError: the two have no block in common.
    """
    graphs = {"teacher": prepared_graph(teacher), "student": prepared_graph(student)}
    found = {key: find_blocks_in(graph) for key, graph in graphs.items()}
    wanted_blocks = {block.name: block for block in found["teacher"]}
    common = [
        block
        for block in found["student"]
        if block.name in wanted_blocks and block.exit_shape == wanted_blocks[block.name].exit_shape
    ]
    if not common:
        raise ModelError(
            f"'{student.name}' and '{teacher.name}' have no block of the same name and shape; nothing to refit."
        )
    own: dict[str, Node] = {}
    with (
        Memory(memory_bytes) as memory,
        Memory(memory_bytes) as wanted_memory,
        one_blas_thread(),
        shown(verbose) as progress,
    ):
        wanted = _block_outputs(graphs["teacher"], [wanted_blocks[b.name] for b in common], calibration, wanted_memory)
        graph = graphs["student"]
        walk = Walk(graph, calibration, memory)
        parts = units(graph, common)
        tensors = walk.start()
        for index, part in enumerate(parts):
            nodes = [graph.by_name[name] for name in part.nodes]
            if part.block is not None:
                target = wanted[part.block.name]
                result = refit_closing_layer(walk, part.block, nodes, target, tensors, seed=seed)
                nodes = nodes if result is None else list(result.nodes)
            own |= {node.name: node for node in nodes}
            tensors |= walk.run(nodes, {ref: ref for ref in part.writes}, tensors)
            walk.release(parts[index + 1 :], tensors)
            if progress is not None:
                progress(index + 1, len(parts), f"refit {part.name}")
    return build_model(replace(graph, nodes=tuple(own.get(node.name, node) for node in graph)))


def _block_outputs(graph: ModelGraph, blocks: list[Any], calibration: Any, memory: Memory) -> dict[str, np.ndarray]:
    """Return the outputs of some blocks over all images."""
    walk = Walk(graph, calibration, memory)
    parts = units(graph, blocks)
    tensors = walk.start()
    outputs: dict[str, np.ndarray] = {}
    for index, part in enumerate(parts):
        nodes = [graph.by_name[name] for name in part.nodes]
        tensors |= walk.run(nodes, {ref: ref for ref in part.writes}, tensors)
        if part.block is not None:
            outputs[part.block.name] = tensors[part.block.exit]
        walk.release(parts[index + 1 :], tensors, keep=outputs.values())
    return outputs
