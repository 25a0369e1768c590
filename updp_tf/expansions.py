"""Rewrite composite layers, which hide a whole block, into the standard layers they are made of.

A rule is written as the layer's own `call` would be: from Keras tensors to Keras tensors, with the layer's sublayers
and with stock layers and `keras.ops`. What it returns is read like a nested model, and compared with what the layer
computes before it takes its place. Sublayers stay the layer's own, with their weights; the calls that Keras records
on them meanwhile are taken back.

Rules for layers of keras_cv and keras_hub come with this package; they are found by name, so that neither library is
imported. Functions in `Lambda` layers are read where they are made of Keras operations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np

from updp_tf import _keras, rules
from updp_tf.errors import RuleError
from updp_tf.graph import copy_variables, read_calls, run_nodes
from updp_tf.structure import ModelGraph, Node, Ref, Refusal, Shape, map_refs

Rule = Callable[..., Any]

TOLERANCE = 1e-5
"""Largest difference of an expansion from its float32 layer, relative to the largest output."""

HALF_TOLERANCE = 2e-2
"""The same in half precision, where each layer rounds to its own eight to eleven bits."""


@dataclass(frozen=True)
class _Expansion:
    rule: Rule
    is_own: bool

    @property
    def name(self) -> str:
        return rules.rule_name(self.rule)


def own_call(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Expand a layer by its own `call`: right where that calls Keras layers and operations alone, on fixed ranks."""
    return layer.call(*args, **kwargs)


def register_expansion(layer_type: type, rule: Rule = own_call) -> None:
    """Tell which standard layers a composite layer of one's own is made of, so that blocks are found inside it.

    Args:
        layer_type: the composite layer's class.
        rule: called as `rule(layer, *args, **kwargs)` with a built layer and the arguments of its call, tensors among
            them as Keras tensors. Returns what the layer returns, made with its sublayers, stock layers and
            `keras.ops`; `None` in the place of an output that nobody reads. Raises `updp_tf.Unsupported("why")` for a
            configuration it does not cover. By default the layer's own `call` is taken.

    Raises:
        RuleError: `layer_type` is no class of layers or has a rule, or `rule` is not callable. Also when a model is
            read where the expansion has other shapes or values than the layer's outputs.

    Example:
        >>> def gate(layer, x):
        ...     return keras.layers.Multiply()([x, layer.dense(keras.ops.mean(x, axis=(1, 2), keepdims=True))])
        >>> updp_tf.register_expansion(Gate, gate)
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, keras.layers.Layer)):
        raise RuleError(f"An expansion is registered for a class of Keras layers. Received: {layer_type!r}")
    kind = _keras.kind_of(layer_type)
    if "." not in kind:
        raise RuleError(f"'{kind}' is Keras' own; expansions are registered for other classes.")
    if kind in EXPANSIONS:
        raise RuleError(f"'{kind}' has an expansion already.")
    if not callable(rule):
        raise RuleError(f"The expansion of '{kind}' must be callable. Received: {rule!r}")
    EXPANSIONS[kind] = _Expansion(rule, is_own=True)


def expand(graph: ModelGraph) -> ModelGraph:
    """Return the graph with every composite layer that has a rule replaced by what it is made of.

    Outputs are equal up to rounding. What could not be looked into is in the graph's `refused`, with the reason.

    Raises:
        RuleError: a registered rule is not what its layer computes.
    """
    expander = _Expander(graph)
    for node in graph:
        expander.add(node)
    outputs = expander.current(graph.outputs)
    left = {node.name for node in expander.nodes}
    refused = (*(refusal for refusal in graph.refused if refusal.site in left), *expander.refused)
    return replace(graph, nodes=tuple(expander.nodes), outputs=outputs, refused=refused)


class _Expander:
    def __init__(self, graph: ModelGraph) -> None:
        self.nodes: list[Node] = []
        self.refused: list[Refusal] = []
        self._taken = set(graph.by_name)
        self._renamed: dict[Ref, Ref] = {}
        self._read = set(graph.readers) | set(graph.output_refs)
        self._tensors: dict[Ref, tuple[Shape, str]] = {}
        self._sharper: set[Ref] = set()

    def current(self, data: Any) -> Any:
        return map_refs(data, lambda ref: self._renamed.get(ref, ref))

    def add(self, node: Node) -> None:
        """Add a node, or what it is made of."""
        node = replace(node, args=self.current(node.args), kwargs=self.current(dict(node.kwargs)))
        expansion = EXPANSIONS.get(node.kind)
        if expansion is not None:
            try:
                nodes, outputs = self._expanded(node, expansion)
            except rules.Unsupported as error:
                self.refused.append(Refusal(node.name, "expansion", f"'{node.name}' {error}"))
            else:
                for inner in nodes:
                    self.add(inner)
                for old, inner_ref in outputs.items():
                    new = self._renamed[old] = self.current(inner_ref)
                    if self._tensors[new][0] != node.shapes[old.index]:
                        self._sharper.add(new)
                return
        elif not rules.is_known(node) and not isinstance(node.layer, keras.Model):
            self.refused.append(Refusal(node.name, "unknown_layer", f"'{node.name}' {rules.why_unknown(node)}"))
        if self._sharper.intersection(node.inputs):
            node = self._sharpened(node)
        self.nodes.append(node)
        for index, (shape, dtype) in enumerate(zip(node.shapes, node.dtypes, strict=True)):
            self._tensors[Ref(node.name, index)] = (shape, dtype)

    def _sharpened(self, node: Node) -> Node:
        """Return a call with the shapes it has now that what it reads is known better than to the composite layer."""
        args, kwargs = (
            map_refs(data, lambda ref: keras.KerasTensor(*self._tensors[ref]))
            for data in (node.args, dict(node.kwargs))
        )
        written = keras.tree.flatten(node.layer.compute_output_spec(*args, **kwargs))
        shapes = tuple(tuple(tensor.shape) for tensor in written)
        self._sharper |= {Ref(node.name, i) for i, shape in enumerate(shapes) if shape != node.shapes[i]}
        return replace(node, shapes=shapes)

    def _expanded(self, node: Node, expansion: _Expansion) -> tuple[tuple[Node, ...], dict[Ref, Ref]]:
        """Return the nodes that stand for a call, and which tensors of theirs stand for its outputs."""
        if node.kwargs.get("training"):
            raise rules.Unsupported("is called with training=True")
        with _keras.calls_forgotten(node.layer):
            sources, made = self._traced(node, expansion)
            taken = set(self._taken)
            nodes, found = read_calls(sources, list(made.values()), name_of=_namer(node), taken=taken)
        outputs = {Ref(node.name, number): ref for number, ref in zip(made, found, strict=True)}
        self._check(node, expansion, nodes, outputs)
        self._taken = taken
        # Those inside may be expanded in turn, and ask who reads what.
        self._read |= {ref for inner in nodes for ref in inner.inputs} | set(found)
        return nodes, outputs

    def _traced(self, node: Node, expansion: _Expansion) -> tuple[list[tuple[Any, Ref]], dict[int, Any]]:
        """Call the rule on symbolic tensors; return those, and what it makes of each output that is read."""
        sources: dict[Ref, Any] = {}

        def source(ref: Ref) -> Any:
            if ref not in sources:
                shape, dtype = self._tensors[ref]
                sources[ref] = keras.Input(batch_shape=shape, dtype=dtype)
            return _as_the_layer_sees(node.layer, sources[ref])

        args = map_refs(node.args, source)
        # Keras records `mask=None` and `training` with some calls; a rule need not know of them.
        told = {key: value for key, value in node.kwargs.items() if value is not None and key != "training"}
        kwargs = map_refs(told, source)
        try:
            made = keras.tree.flatten(expansion.rule(node.layer, *args, **kwargs))
        except rules.Unsupported:
            raise
        except Exception as error:  # a rule is foreign code: whatever it raises, its message is kept
            if expansion.is_own:
                raise _wrong(node, expansion, f"it raises {type(error).__name__}: {error}") from error
            raise rules.Unsupported(f"cannot be read as Keras operations: {_first_line(error)}") from error
        if len(made) > len(node.shapes):
            raise _wrong(node, expansion, f"it returns {len(made)} tensors, the layer {len(node.shapes)}.")
        made += [None] * (len(node.shapes) - len(made))
        numbers = [number for number in range(len(made)) if Ref(node.name, number) in self._read]
        for number in numbers:
            if not isinstance(made[number], keras.KerasTensor):
                raise _wrong(node, expansion, f"it returns no Keras tensor as output {number}, which is read.")
            shape = tuple(made[number].shape)
            if len(shape) != len(node.shapes[number]) or any(
                a != b for a, b in zip(shape, node.shapes[number], strict=True) if a is not None and b is not None
            ):
                raise _wrong(
                    node,
                    expansion,
                    f"it returns a tensor of shape {shape}, the layer one of {node.shapes[number]}.",
                )
        return [(tensor, ref) for ref, tensor in sources.items()], {number: made[number] for number in numbers}

    def _check(self, node: Node, expansion: _Expansion, nodes: tuple[Node, ...], outputs: dict[Ref, Ref]) -> None:
        """Compare the expansion with the layer on random inputs; each layer and shape is compared once."""
        key = (expansion.name, *(self._tensors[ref] for ref in node.inputs), len(outputs))
        if key in (done := _checked.setdefault(node.layer, set())):
            return
        rng = np.random.default_rng(0)
        values = {ref: _probe(rng, *self._tensors[ref]) for ref in node.inputs}
        run_nodes([node], wanted := dict(values))
        run_nodes(nodes, values)
        half = "16" in str(getattr(node.layer, "compute_dtype", "float32"))
        for old, new in outputs.items():
            want, have = rules.as_array(wanted[old]), rules.as_array(values[new])
            if want.shape != have.shape:
                raise _wrong(node, expansion, f"it returns a tensor of shape {have.shape}, the layer {want.shape}.")
            error = np.abs(have - want).max() / max(np.abs(want).max(), np.finfo(np.float32).tiny)
            if not error <= (HALF_TOLERANCE if half else TOLERANCE):
                raise _wrong(
                    node, expansion, f"its values differ from the layer's by {error:.1e}, relative to the largest."
                )
        done.add(key)


_checked: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()
"""Layers whose expansions were compared with what they compute, with the inputs that were."""


def _wrong(node: Node, expansion: _Expansion, why: str) -> Exception:
    """A user's rule that is wrong stops everything; with one of ours the layer stays whole."""
    if expansion.is_own:
        return RuleError(f"The expansion '{expansion.name}' of '{node.kind}' is wrong for '{node.name}': {why}")
    return rules.Unsupported(f"is not what the rule for {node.kind} expects: {why}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _as_the_layer_sees(layer: Any, tensor: Any) -> Any:
    """Cast an input as the layer's own call would have: its sublayers may be less strict."""
    wanted = getattr(layer, "compute_dtype", None)
    if not getattr(layer, "autocast", False) or wanted is None or tensor.dtype == wanted:
        return tensor
    if "float" not in tensor.dtype:
        return tensor
    # Not `Identity`, which cannot be copied with a policy of its own.
    return keras.layers.Activation("linear", dtype=layer.dtype_policy)(tensor)


def _probe(rng: np.random.Generator, shape: Shape, dtype: str) -> Any:
    sizes = (shape[0] or 2, *(axis or 32 for axis in shape[1:]))
    values = rng.normal(size=sizes) if "float" in dtype else rng.integers(0, 2, size=sizes)
    return keras.ops.convert_to_tensor(values, dtype=dtype)


def _namer(node: Node) -> Callable[[Any], str]:
    """Name calls by where their layer lies in the composite one: given names hold counters of the process."""
    paths: dict[int, str] = {}
    _find_sublayers(node.layer, "", paths)

    def name_of(operation: Any) -> str:
        return f"{node.name}_{paths.get(id(operation)) or _snake_case(type(operation).__name__)}"

    return name_of


def _find_sublayers(holder: Any, path: str, paths: dict[int, str]) -> None:
    if _keras.as_functional(holder) is not None:
        held = {str(number): layer for number, layer in enumerate(holder.layers)}
    else:
        held = {name: value for name, value in vars(holder).items() if not name.startswith("_")}
    for name, value in held.items():
        is_list = isinstance(value, list | tuple)
        for number, layer in enumerate(value if is_list else [value]):
            if isinstance(layer, keras.layers.Layer) and id(layer) not in paths:
                own = (path, name, str(number)) if is_list else (path, name)
                paths[id(layer)] = "_".join(part for part in own if part)
                _find_sublayers(layer, paths[id(layer)], paths)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_", name).lower()


# The rules


def _lambda(layer: Any, inputs: Any) -> Any:
    if rules.is_own_activation(layer.function):
        return keras.layers.Activation(layer.function, dtype=layer.dtype_policy)(inputs)
    return layer.call(inputs)


def _squeeze_and_excite(layer: Any, inputs: Any) -> Any:
    gate = layer.global_average_pool(inputs)
    for conv in (layer.squeeze_conv, layer.excite_conv):
        if _keras.kind_of(type(conv.activation)) == _HARD_SIGMOID:
            # A layer that cannot be copied: its constructor takes no name.
            gate = keras.layers.Activation("hard_sigmoid", dtype=conv.dtype_policy)(_without_activation(conv)(gate))
        else:
            gate = conv(gate)
    return keras.ops.multiply(gate, inputs)


_HARD_SIGMOID = "keras_cv.src.models.backbones.mobilenet_v3.mobilenet_v3_backbone.HardSigmoidActivation"


def _without_activation(conv: Any) -> Any:
    """A copy of a convolution that applies no activation; the same one each time, so that what is shared stays so."""
    copy = _bare.get(conv)
    if copy is None:
        config = conv.get_config()
        config["activation"] = None
        copy = _bare[conv] = type(conv).from_config(config)
        copy.build(conv.get_build_config()["input_shape"])
    copy_variables(conv, copy)
    return copy


_bare: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _vit_embedding(layer: Any, inputs: Any) -> Any:
    tokens = [layer.class_token] if layer.use_class_token else []
    return _embedded(layer, inputs, tokens, layer.position_embedding.embeddings)


def _deit_embedding(layer: Any, inputs: Any, bool_masked_pos: Any = None) -> Any:
    if bool_masked_pos is not None:
        raise rules.Unsupported("is called with a mask of patches")
    embedded = _embedded(layer, inputs, [layer.class_token, layer.distillation_token], layer.position_embedding)
    return layer.dropout(embedded)


def _embedded(layer: Any, inputs: Any, tokens: list[Any], positions: Any) -> Any:
    """Patches with class tokens in front and position embeddings added, as one constant.

    No stock layer holds a trained constant; neither library's own layer can be loaded from its configuration.
    """
    if layer.data_format != "channels_last":
        raise rules.Unsupported("is channels_first")
    channels = layer.hidden_dim
    offset = rules.as_array(positions).reshape(-1, channels)
    for number, token in enumerate(tokens):
        offset[number] += rules.as_array(token).reshape(channels)
    patches = keras.layers.Reshape((-1, channels))(layer.patch_embedding(inputs))
    if tokens:
        patches = keras.layers.ZeroPadding1D((len(tokens), 0))(patches)
    return keras.layers.Rescaling(1.0, offset=offset.astype("float32"), dtype=layer.dtype_policy)(patches)


def _deit_block(layer: Any, x: Any, attention_mask: Any = None, return_attention_scores: bool = False) -> Any:
    if attention_mask is not None or return_attention_scores:
        raise rules.Unsupported("is called with an attention mask, or for its attention scores")
    y = layer.layer_norm_1(x)
    x = layer.mha(y, y) + x
    y = layer.output_layer.dense(layer.mlp.dense(layer.layer_norm_2(x)))
    return layer.output_layer.dropout(y) + x, None


def _deit_encoder(
    layer: Any,
    x: Any,
    attention_masks: Any = None,
    output_hidden_states: bool = False,
    return_attention_scores: bool = False,
) -> Any:
    if attention_masks is not None or output_hidden_states or return_attention_scores:
        raise rules.Unsupported("is called with attention masks, or for its hidden states or attention scores")
    for block in layer.encoder_layers:
        x, _ = _deit_block(block, x)
    return layer.layer_norm(x), None, None


def _cv_mix_transformer_attention(layer: Any, x: Any) -> Any:
    def reduced(x: Any) -> Any:
        # The layer writes the tokens transposed into the image, and reads them transposed out of it.
        channels, size = x.shape[2], _side(x.shape[1])
        image = keras.layers.Reshape((size, size, channels))(keras.layers.Permute((2, 1))(x))
        tokens = keras.layers.Reshape((channels, -1))(layer.sr(image))
        return layer.norm(keras.layers.Permute((2, 1))(tokens))

    y = _attention(layer, x, reduced(x) if layer.sr_ratio > 1 else x, lambda scores: scores)
    return layer.proj(y)


def _hub_mix_transformer_attention(layer: Any, x: Any) -> Any:
    def reduced(x: Any) -> Any:
        channels, size = x.shape[2], _side(x.shape[1])
        image = layer.sr(keras.layers.Reshape((size, size, channels))(x))
        return layer.norm(keras.layers.Reshape((-1, channels))(image))

    y = _attention(layer, x, reduced(x) if layer.sr_ratio > 1 else x, layer.dropout)
    return layer.proj_drop(layer.proj(y))


def _attention(layer: Any, x: Any, source: Any, dropout: Callable[[Any], Any]) -> Any:
    """Attention of tokens over the tokens of `source`, up to the projection."""
    tokens, channels = x.shape[1:]

    def heads(y: Any) -> Any:
        return keras.layers.Permute((2, 1, 3))(
            keras.layers.Reshape((-1, layer.num_heads, channels // layer.num_heads))(y)
        )

    query, key, value = heads(layer.q(x)), heads(layer.k(source)), heads(layer.v(source))
    scores = keras.ops.matmul(query, keras.layers.Permute((1, 3, 2))(key)) * layer.scale
    y = keras.ops.matmul(dropout(keras.layers.Softmax()(scores)), value)
    return keras.layers.Reshape((tokens, channels))(keras.layers.Permute((2, 1, 3))(y))


def _mix_transformer_mlp(layer: Any, x: Any) -> Any:
    x = layer.fc1(x)
    tokens, channels = x.shape[1:]
    size = _side(tokens)
    x = layer.dwconv(keras.layers.Reshape((size, size, channels))(x))
    return layer.fc2(keras.ops.gelu(keras.layers.Reshape((tokens, channels))(x)))


def _side(tokens: int | None) -> int:
    """Height and width of the square image that tokens stand for."""
    if tokens is None or math.isqrt(tokens) ** 2 != tokens:
        raise rules.Unsupported(f"reads {tokens} tokens, which are no square image")
    return math.isqrt(tokens)


def _ours(*rules_by_kind: tuple[str, Rule]) -> dict[str, _Expansion]:
    return {kind: _Expansion(rule, is_own=False) for kind, rule in rules_by_kind}


_CV, _HUB = "keras_cv.src.layers", "keras_hub.src.models"

EXPANSIONS: dict[str, _Expansion] = _ours(
    ("Lambda", _lambda),
    (f"{_CV}.fusedmbconv.FusedMBConvBlock", own_call),
    (f"{_CV}.mbconv.MBConvBlock", own_call),
    (f"{_CV}.regularization.squeeze_excite.SqueezeAndExcite2D", _squeeze_and_excite),
    ("keras_cv.src.models.backbones.csp_darknet.csp_darknet_utils.CrossStagePartial", own_call),
    (f"{_CV}.overlapping_patching_embedding.OverlappingPatchingAndEmbedding", own_call),
    (f"{_CV}.hierarchical_transformer_encoder.HierarchicalTransformerEncoder", own_call),
    (f"{_CV}.hierarchical_transformer_encoder.HierarchicalTransformerEncoder.MixFFN", _mix_transformer_mlp),
    (f"{_CV}.segformer_multihead_attention.SegFormerMultiheadAttention", _cv_mix_transformer_attention),
    (f"{_HUB}.deit.deit_layers.DeiTEmbeddings", _deit_embedding),
    (f"{_HUB}.deit.deit_layers.DeiTEncoder", _deit_encoder),
    (f"{_HUB}.deit.deit_layers.DeiTEncoderBlock", _deit_block),
    (f"{_HUB}.vit.vit_layers.ViTPatchingAndEmbedding", _vit_embedding),
    (f"{_HUB}.vit.vit_layers.ViTEncoder", own_call),
    (f"{_HUB}.vit.vit_layers.ViTEncoderBlock", own_call),
    (f"{_HUB}.vit.vit_layers.MLP", own_call),
    (f"{_HUB}.mit.mit_layers.OverlappingPatchingAndEmbedding", own_call),
    (f"{_HUB}.mit.mit_layers.HierarchicalTransformerEncoder", own_call),
    (f"{_HUB}.mit.mit_layers.MixFFN", _mix_transformer_mlp),
    (f"{_HUB}.mit.mit_layers.SegFormerMultiheadAttention", _hub_mix_transformer_attention),
)
"""The rule of each kind of composite layer."""
