"""Defects that the published implementation has, one test each: they are not repeated here."""

from __future__ import annotations

from dataclasses import replace

import keras
import numpy as np
import pytest
from keras import layers

from tests import zoo
from tests.isomorphic import narrow_zoo
from tests.isomorphic.oracle import check_against_oracle, cut_at
from tests.isomorphic.test_dependency import dependencies_of, model_of
from updp_tf.graph import read_graph
from updp_tf.isomorphic.dependency import find_dependencies
from updp_tf.isomorphic.gradients import gradient_statistics
from updp_tf.isomorphic.importance import group_scores
from updp_tf.isomorphic.scopes import choose_units
from updp_tf.narrowing import narrow


def array(variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable).astype("float64")


def group_named(dependencies, name):
    return next(group for group in dependencies.groups if group.name == name)


def sizes_after(dependencies, cut) -> dict[str, int]:
    return {group.name: group.size - len(cut & set(group.units)) for group in dependencies.groups}


def test_01_taylor_scores_batch_normalization():
    model = model_of("plain")
    dependencies = find_dependencies(read_graph(model))
    group = dependencies.groups[0]
    norm = next(member.node.layer for member in group.members if member.node.kind == "BatchNormalization")
    gradient = np.linspace(-1, 2, group.size)
    gradients = {id(norm): {[v.path for v in norm.variables].index(norm.gamma.path): gradient}}
    scores = group_scores(dependencies, "taylor", gradients=gradients)[group.name]
    wanted = np.abs(array(norm.gamma) * gradient)
    np.testing.assert_allclose(scores, wanted / wanted.mean(), rtol=1e-6)


def test_02_hessian_sums_over_all_samples():
    """Softmax regression has its gradients in closed form: x (p - y)^T, squared, averaged over the images."""
    inputs = keras.Input((7,))
    hidden = layers.Dense(5)(inputs)
    model = zoo.randomise(keras.Model(inputs, layers.Dense(3, activation="softmax")(hidden)))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 7)).astype("float32"), rng.integers(0, 3, 9)
    found = gradient_statistics(read_graph(model), "hessian", x, y, "sparse_categorical_crossentropy", seed=0)
    first, last = model.layers[1], model.layers[2]
    h = x @ array(first.kernel) + array(first.bias)
    logits = h @ array(last.kernel) + array(last.bias)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    errors = p / p.sum(-1, keepdims=True) - np.eye(3)[y]
    wanted = np.mean(np.square(h[:, :, None] * errors[:, None, :]), axis=0)
    np.testing.assert_allclose(found[id(last)][0], wanted, rtol=1e-3, atol=1e-6)
    inner = errors @ array(last.kernel).T
    wanted = np.mean(np.square(x[:, :, None] * inner[:, None, :]), axis=0)
    np.testing.assert_allclose(found[id(first)][0], wanted, rtol=1e-3, atol=1e-6)


def test_03_depthwise_kernels_norms_and_scales_are_scored():
    model = model_of("inverted_residuals")
    dependencies = find_dependencies(read_graph(model))
    group = next(g for g in dependencies.groups if any(m.node.kind == "DepthwiseConv2D" for m in g.members))
    parts = []
    for member in group.members:
        layer = member.node.layer
        if member.node.kind == "DepthwiseConv2D":
            parts.append(np.square(array(layer.kernel)).sum(axis=(0, 1, 3)))
        elif member.node.kind == "BatchNormalization":
            parts.append(np.square(array(layer.gamma)))
        else:
            axes = (0, 1, 2) if member.role == "out" else (0, 1, 3)
            parts.append(np.square(array(layer.kernel)).sum(axis=axes))
    wanted = np.mean(parts, axis=0)
    np.testing.assert_allclose(group_scores(dependencies, "l2")[group.name], wanted / wanted.mean(), rtol=1e-6)


def test_04_a_cut_is_clamped_never_skipped():
    model = model_of("residual")
    costs = []
    for ratio in (0.5, 0.9, 0.99):
        dependencies, cut, narrowed = cut_at(model, ratio, round_to=2)
        assert min(sizes_after(dependencies, cut).values()) >= 2
        costs.append(narrowed.count_params())
    assert costs == sorted(costs, reverse=True)
    assert set(sizes_after(dependencies, cut).values()) == {2}


def test_05_one_step_leaves_every_group_its_floor():
    dependencies = dependencies_of("residual")
    scores = group_scores(dependencies, "l2")
    first, *others = dependencies.groups
    scores[first.name] = scores[first.name] * 1e-9  # globally the worst by far
    cut = choose_units(dependencies.groups, scores, 0.5, scope="global", round_to=3)
    assert sizes_after(dependencies, cut)[first.name] == 3
    total = sum(group.size for group in dependencies.groups)
    assert abs(len(cut) - total // 2) <= 2 * len(dependencies.groups)  # the others give what it may not


def test_06_local_scope_cuts_the_worst_of_each_group():
    dependencies = dependencies_of("bottlenecks")
    scores = group_scores(dependencies, "random", seed=3)
    cut = choose_units(dependencies.groups, scores, 0.5, scope="local", round_to=1)
    for group in dependencies.groups:
        worst = np.argsort(scores[group.name])[: group.size // 2]
        assert {group.units[i] for i in worst} == cut & set(group.units)


def test_07_rounding_counts_heads_one_by_one_and_dimensions_per_head():
    inputs = keras.Input((6, 16))
    x = layers.MultiHeadAttention(6, 24, value_dim=16)(inputs, inputs)
    model = zoo.randomise(keras.Model(inputs, layers.Dense(3)(layers.Dense(16)(x))))
    dependencies, cut, narrowed = cut_at(model, 0.4, round_to=8)
    after = sizes_after(dependencies, cut)
    assert after["multi_head_attention heads"] == 4
    assert after["multi_head_attention head dims"] == 16
    assert after["multi_head_attention value dims"] == 8
    check_against_oracle(dependencies, cut, narrowed, zoo.inputs_of(model))


def test_08_a_group_of_zeros_goes_first_and_ties_go_by_index():
    model = model_of("plain")
    first = next(layer for layer in model.layers if isinstance(layer, layers.Conv2D))
    dependencies = find_dependencies(read_graph(model))
    group = dependencies.groups[0]
    for member in group.members:
        for one in member.slices:
            variable = member.node.layer.variables[one.variable]
            variable.assign(np.zeros(variable.shape))
    assert first.filters == group.size
    scores = group_scores(dependencies, "l2")
    assert np.array_equal(scores[group.name], np.zeros(group.size))
    cut = choose_units(dependencies.groups, scores, 0.5, scope="local", round_to=1)
    assert cut & set(group.units) == set(group.units[: group.size // 2])


@pytest.mark.parametrize("name", ["concat_and_split", "cross_stage"])
def test_09_splits_are_counted_anew_in_every_step(name):
    model = model_of(name)
    narrowed = narrow(model, ratio=0.5, steps=3, round_to=1, streams=True)
    assert narrowed.count_params() < 0.6 * model.count_params()
    again = narrow(narrowed, ratio=0.3, round_to=1, streams=True)
    assert again.count_params() < narrowed.count_params()


def test_10_the_same_tensor_twice_in_a_concatenation():
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((6, 6, 3))
    a, b = layers.Conv2D(5, 1)(inputs), layers.Conv2D(4, 1)(inputs)
    x = layers.Concatenate()([a, b, a, a])
    model = zoo.randomise(narrow_zoo.to_logits(inputs, layers.Conv2D(6, 1)(layers.BatchNormalization()(x))))
    dependencies, cut, narrowed = cut_at(model, 0.5, importance="random")
    check_against_oracle(dependencies, cut, narrowed, zoo.inputs_of(model))
    after = sizes_after(dependencies, cut)
    assert {group.name: group.size for group in dependencies.groups} == {"conv2d": 5, "conv2d_1": 4, "conv2d_2": 6}
    assert narrowed.get_layer("concatenate").output.shape[-1] == 3 * after["conv2d"] + after["conv2d_1"]


def test_11_a_broadcast_multiply_ties_nothing():
    dependencies = dependencies_of("broadcast_multiply")
    assert {group.name: group.size for group in dependencies.groups} == {"conv2d": 10, "conv2d_2": 6}


def test_12_a_group_made_by_hand_is_scored_like_any_other():
    dependencies = dependencies_of("residual")
    group = dependencies.groups[1]
    half = replace(group, units=group.units[::2], cells=group.cells[::2])
    by_hand = replace(dependencies, groups=(half,))
    whole, part = (group_scores(one, "l1")[group.name] for one in (dependencies, by_hand))
    np.testing.assert_allclose(part, whole[::2] / whole[::2].mean())
