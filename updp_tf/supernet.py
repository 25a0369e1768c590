"""A supernet: every block in every form that was fitted, with shared weights, trained together.

Behind every block a switch passes on what the block writes, or what one of its forms writes. The switches read a
tensor, so nothing is traced again when they change. Training takes the largest network, the smallest and two random
ones in every step (the sandwich rule), the original teaching; ordinary `compile` and `fit`, on every Keras backend.

Source: the supernet of UPDP (arXiv:2401.06426), whose code is not published; the sandwich rule of universally slimmable
networks (arXiv:1903.05134).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import ops

from updp_tf.blocks import Blocks, find_blocks, require_blocks
from updp_tf.compiling import jit_compile
from updp_tf.console import shown
from updp_tf.errors import CalibrationError, PlanError
from updp_tf.forms import Fitted, Form, all_forms, form_by_name
from updp_tf.graph import build_model, read_graph
from updp_tf.judging import divergence, sum_to_one
from updp_tf.memory import DEFAULT_LIMIT_BYTES, Memory, calibration_images
from updp_tf.mending import reestimate_norms
from updp_tf.merging import build_edit
from updp_tf.planning import Plan
from updp_tf.scoring import require_names, score
from updp_tf.solving import RIDGE
from updp_tf.structure import Candidate, ModelGraph, Node, Ref, block_name, map_refs

CHOICES = "choices"

N_RANDOM = 2
"""Random networks in every step besides the largest and the smallest."""

SMALLEST_PROBABILITY = 1e-7


@keras.saving.register_keras_serializable("updp_tf")
class Switch(keras.layers.Layer):
    """Passes on one of several tensors of one shape. Reads [choices, tensor 0, tensor 1, ...].

    Args:
        index: which of the choices is the number of the tensor.
    """

    def __init__(self, index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.index = index

    def call(self, inputs: Any) -> Any:
        """Return the chosen tensor; the others get no gradient."""
        choices, chosen, *others = inputs
        for number, other in enumerate(others, start=1):
            chosen = ops.where(choices[self.index] == number, other, chosen)
        return chosen

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the first tensor."""
        return input_shape[1]

    def get_config(self) -> dict[str, Any]:
        """Everything that the layer was made with."""
        return {**super().get_config(), "index": self.index}


@keras.saving.register_keras_serializable("updp_tf")
class Mixture(Switch):
    """The weighted sum of several tensors of one shape. Reads [weights by switch and number, tensor 0, ...]."""

    def call(self, inputs: Any) -> Any:
        """Return the sum."""
        weights, *tensors = inputs
        return sum(weights[self.index, number] * one for number, one in enumerate(tensors))


@dataclass(frozen=True)
class Site:
    """A switch: its call, and what it chooses from; number 0 is the block itself."""

    switch: str
    options: tuple[Candidate | None, ...]
    exits: tuple[Ref, ...]

    @property
    def smallest(self) -> int:
        """Number of the option with the fewest MACs; spans, which switch several blocks, aside."""
        costs = {
            number: one.cost.macs for number, one in enumerate(self.options) if one is not None and len(one.blocks) == 1
        }
        return min(costs, key=lambda number: (costs[number], number), default=0)


class Supernet(keras.Model):
    """A network in which every block can take any of its forms.

    `fit(images)` trains all forms to write what the original writes; with labels and a compiled loss, the network
    without forms learns from the labels besides. `choose` switches, after which `predict` and `evaluate` are those of
    the chosen network; `subnet` takes it out as a plain model.

    Args:
        model: a trained Functional or Sequential model with one input; it is not changed.
        calibration: images that the forms are fitted to, as `prune` reads them.
        forms: names of the forms; all registered ones where None.
        keep: names of blocks that get no forms.
        spans: up to how many consecutive blocks one form may replace.
        skip: `auto`, `kept` or `folded`: how dense forms treat a skip.
        unit: forms dearer than their block in it are left out.
        ridge: strength of the fits in mean eigenvalues.
        seed: of the fits and of the random networks.
        memory_bytes: activations beyond this go to disk.
        verbose: show progress on standard error.

    Raises:
        ModelError: the model cannot be read, or has no block.
        CalibrationError: images that do not fit the model, or no form that any block could take.
    """

    def __init__(
        self,
        model: Any,
        calibration: Any,
        *,
        forms: Sequence[str] | None = None,
        keep: Iterable[str] = (),
        spans: int = 1,
        skip: str = "auto",
        unit: str = "macs",
        ridge: float = RIDGE,
        seed: int = 0,
        memory_bytes: int = DEFAULT_LIMIT_BYTES,
        verbose: bool = True,
    ) -> None:
        blocks = find_blocks(model)
        require_blocks(blocks)
        keep = tuple(keep)
        require_names(keep, blocks)
        wanted: Sequence[Form] = all_forms() if forms is None else [form_by_name(name) for name in forms]
        if len(blocks.graph.input_refs) != 1:
            raise CalibrationError(f"'{model.name}' has {len(blocks.graph.input_refs)} inputs; a supernet takes one.")
        with Memory(memory_bytes) as memory, shown(verbose) as progress:
            images = calibration_images(
                calibration, shape=blocks.graph.shape(blocks.graph.input_refs[0]), memory=memory
            )
            scores = score(
                blocks,
                images,
                forms=wanted,
                keep=keep,
                skip=skip,
                unit=unit,
                spans=spans,
                ridge=ridge,
                seed=seed,
                memory_bytes=memory_bytes,
                progress=progress,
            )
            sample = np.array(images[:64])
        if not scores.candidates:
            reasons = "; ".join(str(refusal) for refusal in scores.refusals[:3])
            raise CalibrationError(f"No block of '{model.name}' can take any of the forms ({reasons}).")
        super().__init__(name=f"{model.name}_supernet")
        graph, sites = supergraph(blocks, scores.candidates, scores.fitted)
        self._graph, self._sites, self._model_name = graph, sites, model.name
        self.candidates = scores.candidates
        self.core = build_model(graph)
        self.teacher = build_model(read_graph(model))
        self.teacher.trainable = False
        outputs = [ops.convert_to_numpy(one) for one in keras.tree.flatten(self.teacher(sample, training=False))]
        # what each output is compared by: None for the probabilities of classes, else its variance
        self._scales = tuple(None if sum_to_one(one) else float(one.var()) or 1.0 for one in outputs)
        self.choices = self.add_weight(
            name=CHOICES, shape=(len(sites),), dtype="int32", initializer="zeros", trainable=False
        )
        self._n_options = np.array([len(site.options) for site in sites])
        self._smallest = np.array([site.smallest for site in sites], dtype="int32")
        self._random = keras.random.SeedGenerator(seed)
        self._has_loss = False
        self.built = True

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, **kwargs: Any) -> None:
        """Configure for training; without a loss the original alone teaches, and labels are not needed."""
        self._has_loss = loss is not None
        super().compile(optimizer=optimizer, loss=loss, **{"jit_compile": jit_compile(), **kwargs})

    def call(self, x: Any, training: Any = None) -> Any:
        """Return what the chosen network writes; in training, the largest."""
        choices = ops.zeros((len(self._sites),), dtype="int32") if training else self.choices + 0
        return self.core([x, choices], training=training)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the loss of the largest network, in training plus those of the smallest and of random ones."""
        wanted = self.teacher(x, training=False)
        if self._has_loss and y is not None:
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        else:
            loss = self._distance(wanted, y_pred)
            for one in self.losses:
                loss = loss + one
        if training:
            for choices in (ops.convert_to_tensor(self._smallest), *(self._drawn() for _ in range(N_RANDOM))):
                loss = loss + self._distance(wanted, self.core([x, choices], training=True))
        return loss

    def _drawn(self) -> Any:
        uniform = keras.random.uniform((len(self._n_options),), seed=self._random, dtype="float32")
        return ops.cast(ops.floor(uniform * ops.convert_to_tensor(self._n_options, "float32")), "int32")

    def _distance(self, wanted: Any, written: Any) -> Any:
        pairs = zip(keras.tree.flatten(wanted), keras.tree.flatten(written), self._scales, strict=True)
        return sum(distance(ops.stop_gradient(a), b, scale) for a, b, scale in pairs)

    def choose(self, chosen: Plan | Sequence[Candidate]) -> None:
        """Switch to the network with some forms in it, none for the original's structure.

        Raises:
            PlanError: a form that the supernet does not have.
        """
        self.choices.assign(self._numbers(chosen))

    def subnet(self, chosen: Plan | Sequence[Candidate]) -> Any:
        """Return the network with some forms in it as a plain Keras model, with the weights it has in the supernet.

        Norms have seen all networks: `reestimate_norms` it before it is used.

        Raises:
            PlanError: a form that the supernet does not have.
        """
        numbers = self._numbers(chosen)
        trained: dict[int, Any] = {}
        by_name = {one.name: one for one in self.core.operations}
        now: dict[Ref, Ref] = {}
        nodes: list[Node] = []
        exits = {site.switch: site.exits[number] for site, number in zip(self._sites, numbers, strict=True)}

        def current(ref: Ref) -> Ref:
            return now.get(ref, ref)

        for node in self._graph:
            if node.name in exits:
                now[Ref(node.name)] = current(exits[node.name])
            elif node.name != CHOICES:
                args, kwargs = (map_refs(data, current) for data in (node.args, dict(node.kwargs)))
                layer = None if node.is_input else trained.setdefault(id(node.layer), by_name.get(node.name))
                nodes.append(replace(node, layer=layer, args=args, kwargs=kwargs))
        inputs, _ = self._graph.inputs
        outputs = map_refs(self._graph.outputs, current)
        graph = ModelGraph(self._model_name, tuple(nodes), inputs, outputs)
        return build_model(replace(graph, nodes=_alive(graph)))

    def judge(self, images: Any, labels: Any = None, *, norms: Any) -> SubnetJudge:
        """Return what measures plans by the networks in here, for the `judge` of `prune` and `search`.

        Args:
            images: to validate on.
            labels: their classes: networks are measured by their error; without, by their divergence from the
                original's outputs.
            norms: images that norms are re-estimated with for every network: some of the training images.
        """
        return SubnetJudge(self, np.asarray(images), None if labels is None else np.asarray(labels), norms)

    def _numbers(self, chosen: Plan | Sequence[Candidate]) -> np.ndarray:
        if isinstance(chosen, Plan):
            keys = [f"{'+'.join(edit.blocks)}={edit.form}" for edit in chosen.edits]
        else:
            keys = [one.key for one in chosen]
        places = {
            one.key: (index, number)
            for index, site in enumerate(self._sites)
            for number, one in enumerate(site.options)
            if one is not None
        }
        numbers = np.zeros(len(self._sites), dtype="int32")
        for key in keys:
            if key not in places:
                raise PlanError(f"The supernet of '{self._model_name}' has no '{key}'; it has {', '.join(places)}.")
            index, number = places[key]
            numbers[index] = number
        return numbers


class SubnetJudge:
    """Measures plans by the networks of a supernet; see `Supernet.judge`."""

    def __init__(self, net: Supernet, images: np.ndarray, labels: np.ndarray | None, norms: Any) -> None:
        self._net, self._images, self._labels, self._norms = net, images, labels, norms
        self.n_images = len(images)
        self._wanted = None if labels is not None else _outputs(net.teacher, images)

    @property
    def measure(self) -> str:
        """What `loss` returns."""
        return "error" if self._wanted is None else "divergence"

    def loss(self, chosen: Sequence[Candidate]) -> float:
        """Return the error on the labels, or the divergence from the original, norms re-estimated."""
        small = reestimate_norms(self._net.subnet(chosen), self._norms, verbose=False)
        written = _outputs(small, self._images)
        if self._wanted is None:
            return float((written[0].argmax(axis=-1) != self._labels).mean())
        return float(sum(divergence(a, b) for a, b in zip(self._wanted, written, strict=True)))


def _outputs(model: Any, images: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(one) for one in keras.tree.flatten(model.predict(images, verbose=0))]


def distance(wanted: Any, written: Any, scale: float | None) -> Any:
    """KL(wanted || written) of rows of probabilities, else the squared error over the variance."""
    p, q = ops.cast(wanted, "float32"), ops.cast(written, "float32")
    if scale is not None:
        return ops.mean(ops.square(p - q)) / scale
    p, q = (ops.clip(one, SMALLEST_PROBABILITY, 1.0) for one in (p, q))
    return ops.mean(ops.sum(p * ops.log(p / q), axis=-1))


def supergraph(
    blocks: Blocks, candidates: Sequence[Candidate], fitted: Mapping[str, Fitted], *, mixed: bool = False
) -> tuple[ModelGraph, tuple[Site, ...]]:
    """Return the graph with every form of every block in it, and a switch, or a mixture, behind each block."""
    graph = blocks.graph
    ending: dict[str, list[Candidate]] = {}
    for one in candidates:
        ending.setdefault(blocks[one.blocks[-1]].nodes[-1], []).append(one)
    last = {block.nodes[-1]: block for block in blocks}
    names = [name for name in graph.position if name in ending]
    most = 1 + max(map(len, ending.values()))
    shape: tuple[int, ...] = (len(names), most) if mixed else (len(names),)
    choices = Node(CHOICES, None, "InputLayer", (), {}, (shape,), ("float32" if mixed else "int32",))
    nodes: list[Node] = [choices]
    sites: list[Site] = []
    now: dict[Ref, Ref] = {}

    def current(ref: Ref) -> Ref:
        return now.get(ref, ref)

    def placed(node: Node) -> Node:
        return replace(node, args=map_refs(node.args, current), kwargs=map_refs(dict(node.kwargs), current))

    for node in graph:
        nodes.append(placed(node))
        if node.name not in ending:
            continue
        block = last[node.name]
        options: list[Candidate | None] = [None]
        exits = [block.exit]
        for one in ending[node.name]:
            whole = blocks.joined([one.blocks])[block_name(one.blocks)]
            edit = build_edit(graph, whole, fitted[one.key])
            renamed = {Ref(new.name): Ref(f"{new.name}_{one.form}_{len(one.blocks)}") for new in edit.nodes}
            # a kept projection is in the network already; an Add is called once more
            added = [new for new in edit.nodes if new.name not in whole.skip_nodes]
            renamed = {Ref(new.name): renamed[Ref(new.name)] for new in added}

            def own(ref: Ref, renamed: Mapping[Ref, Ref] = renamed) -> Ref:
                return renamed.get(ref) or current(ref)

            for new in added:
                nodes.append(
                    replace(
                        new,
                        name=renamed[Ref(new.name)].node,
                        args=map_refs(new.args, own),
                        kwargs=map_refs(dict(new.kwargs), own),
                    )
                )
            options.append(one)
            exits.append(own(edit.exit))
        kind = Mixture if mixed else Switch
        switch = kind(len(sites), name=f"{block.name}_switch")
        shapes, dtypes = (graph.shape(block.exit),), (graph.dtype(block.exit),)
        nodes.append(Node(switch.name, switch, kind.__name__, ([Ref(CHOICES), *exits],), {}, shapes, dtypes))
        sites.append(Site(switch.name, tuple(options), tuple(exits)))
        now[block.exit] = Ref(switch.name)
    inputs = [graph.inputs if isinstance(graph.inputs, Ref) else graph.input_refs[0], Ref(CHOICES)]
    return ModelGraph(graph.name, tuple(nodes), inputs, map_refs(graph.outputs, current)), tuple(sites)


def _alive(graph: ModelGraph) -> tuple[Node, ...]:
    """Return the calls that an output depends on, and the inputs."""
    needed = {ref.node for ref in graph.output_refs}
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed |= {ref.node for ref in node.inputs}
    return tuple(node for node in graph if node.name in needed or node.is_input)
