"""Which channels go together: every model of two zoos narrows to what the oracle says."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tests import zoo
from tests.isomorphic import narrow_zoo
from tests.isomorphic.oracle import check_against_oracle, cut_at
from updp_tf.errors import RuleError
from updp_tf.graph import read_graph
from updp_tf.isomorphic.coupling import ELEMENTWISE
from updp_tf.isomorphic.couplings import COUPLINGS, register_coupling
from updp_tf.isomorphic.dependency import find_dependencies
from updp_tf.rules import PASSIVE


def model_of(name: str) -> keras.Model:
    return narrow_zoo.logits_of(narrow_zoo.build(name) if name in narrow_zoo.ZOO else zoo.build(name))


OTHERS = [name for name in zoo.ZOO if name not in ("subclassed", *narrow_zoo.ZOO)]
NAMES = [*narrow_zoo.ZOO, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


@pytest.mark.parametrize("name", NAMES)
def test_a_narrowed_model_is_the_original_with_what_reads_cut_channels_zeroed(name):
    model = model_of(name)
    before = [keras.ops.convert_to_numpy(w) for w in model.weights]
    dependencies, cut, narrowed = cut_at(model, 0.45, importance="random")
    assert cut
    assert narrowed.count_params() < model.count_params()
    if name != "half":  # half precision has eight to eleven bits
        check_against_oracle(dependencies, cut, narrowed, zoo.inputs_of(model))
    for old, weight in zip(before, model.weights, strict=True):
        assert np.array_equal(old, keras.ops.convert_to_numpy(weight))


def dependencies_of(name: str):
    return find_dependencies(read_graph(model_of(name)))


def sizes_of(name: str) -> dict[str, tuple[int, int]]:
    return {group.name: (group.size, group.channels_per_unit) for group in dependencies_of(name).groups}


def members_of(name: str, group: str) -> list[str]:
    (found,) = (one for one in dependencies_of(name).groups if one.name == group)
    return [str(member) for member in found.members]


def test_the_gate_of_a_squeeze_excite_goes_with_its_trunk():
    members = members_of("squeeze_excite", "conv2d")
    assert members[0] == "conv2d out"
    assert {"conv2d_1 out", "conv2d_2 in", "dense out", "dense_1 in", "conv2d_3 in"} & set(members) >= {"conv2d_2 in"}


def test_groups_of_a_grouped_convolution_lose_the_same_places():
    assert sizes_of("grouped_and_depthwise") == {"conv2d": (4, 3), "conv2d_1": (6, 3), "conv2d_3": (8, 1)}


def test_heads_and_their_dimensions_are_groups_of_their_own():
    roles = {group.name: group.role for group in dependencies_of("attention").groups}
    assert roles["multi_head_attention heads"] == "heads"
    assert roles["multi_head_attention head dims"] == "head dims"
    assert roles["multi_head_attention value dims"] == "value dims"


def test_attention_written_out_has_the_same_axes():
    for name in ("attention_written_out", "attention_by_einsum"):
        roles = sorted(group.role for group in dependencies_of(name).groups)
        assert roles == ["head dims", "head dims", "heads", "out", "out"]


def test_isomorphic_blocks_have_equal_signatures():
    groups = {group.name: group for group in dependencies_of("vision_transformer").groups}
    assert groups["dense"].signature == groups["dense_2"].signature
    assert groups["multi_head_attention heads"].signature == groups["multi_head_attention_1 heads"].signature
    assert groups["dense"].signature != groups["multi_head_attention heads"].signature


def test_residual_streams_are_told_apart():
    streams = {group.name: group.is_stream for group in dependencies_of("attention").groups}
    assert streams["conv2d"]
    assert not streams["dense_1"]


def test_a_layer_without_a_rule_is_a_boundary_with_a_reason():
    dependencies = dependencies_of("unknown_layer")
    reasons = {refusal.site: refusal.reason for refusal in dependencies.boundaries}
    assert "no rule says how channels pass" in reasons["unknown"]
    assert "register_coupling" in reasons["unknown"]
    assert {group.name for group in dependencies.groups} == {"conv2d", "conv2d_2"}


def test_a_reshape_that_cannot_be_followed_is_named_with_its_shapes():
    inputs = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(6, 1)(inputs)
    x = keras.layers.Dense(5)(keras.layers.Reshape((16 * 2, 3))(keras.layers.Conv2D(6, 1)(x)))
    y = keras.layers.Reshape((12, 8))(keras.layers.Conv2D(6, 1)(inputs))  # 8 is neither 6 nor a part of it
    model = keras.Model(inputs, [keras.layers.Dense(2)(x), keras.layers.Dense(2)(y)])
    reasons = " ".join(str(refusal) for refusal in find_dependencies(read_graph(model)).boundaries)
    assert "reshapes (4, 4, 6) to (12, 8), whose axes cannot be followed" in reasons


def test_what_does_nothing_at_inference_passes_channels_on():
    """The libraries' own stochastic depths too: without a rule, `cv_mit` had 20 boundaries more."""
    assert {kind: COUPLINGS.get(kind) for kind in PASSIVE} == dict.fromkeys(PASSIVE, ELEMENTWISE)


def test_outputs_are_never_cut():
    model = model_of("output_in_the_middle")
    _, _, narrowed = cut_at(model, 0.7)
    assert [tuple(one.shape) for one in narrowed.outputs] == [tuple(one.shape) for one in model.outputs]


def test_a_rule_is_checked_when_it_is_registered():
    with pytest.raises(RuleError, match="has a rule already"):
        register_coupling(narrow_zoo.ClassToken, ELEMENTWISE)
    with pytest.raises(RuleError, match="is a Coupling. Received: str"):
        register_coupling(narrow_zoo.Unknown, "elementwise")
    with pytest.raises(RuleError, match="for a class of layers"):
        register_coupling("Unknown", ELEMENTWISE)
