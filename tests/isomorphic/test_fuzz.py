"""Random graphs with concatenations, splits, reshapes, gates and groups, against the oracle.

uv run --frozen pytest tests/isomorphic/test_fuzz.py -m slow     # 1,000 examples
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers, ops

from tests import zoo
from tests.isomorphic.oracle import check_against_oracle, cut_at

SIZE = 5

STEPS = (
    "conv grouped depthwise separable norm group_norm layer_norm activation add concat split slice gate shuffle "
    "permute scale transpose_conv dense"
).split()

Program = list[tuple[str, int, int, int]]


@st.composite
def programs(draw) -> Program:
    """Steps with three numbers each: which tensors they read, and a choice of their own."""
    n = draw(st.integers(3, 7))
    number = st.integers(0, 7)
    return [(draw(st.sampled_from(STEPS)), draw(number), draw(number), draw(number)) for _ in range(n)]


def run_program(program: Program) -> keras.Model:
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((SIZE, SIZE, 3))
    tensors = [layers.Conv2D(8, 3, padding="same")(inputs), layers.Conv2D(12, 1, activation="relu")(inputs)]
    for step, first, second, choice in program:
        x, y = tensors[-1 - first % len(tensors)], tensors[-1 - second % len(tensors)]
        tensors += take_step(step, x, y, choice)
    flat = [layers.Flatten()(tensors[-1]), *(layers.GlobalAveragePooling2D()(one) for one in tensors[-3:-1])]
    return zoo.randomise(keras.Model(inputs, layers.Dense(4)(layers.Concatenate()(flat))), seed=len(program))


def take_step(step: str, x, y, choice: int) -> list:
    channels = x.shape[-1]
    if step in ("split", "slice") and channels < 3:
        return [x]
    divisor = next((n for n in (4, 3, 2) if channels % n == 0 and channels > n), 1)
    if step == "conv":
        return [layers.Conv2D(4 + choice, 1 + 2 * (choice % 2), padding="same")(x)]
    if step == "grouped":
        return [layers.Conv2D(divisor * (2 + choice % 3), 3, padding="same", groups=divisor)(x)]
    if step == "depthwise":
        return [layers.DepthwiseConv2D(3, padding="same", depth_multiplier=1 + choice % 2)(x)]
    if step == "separable":
        return [layers.SeparableConv2D(5 + choice, 3, padding="same")(x)]
    if step == "norm":
        return [layers.BatchNormalization()(x)]
    if step == "group_norm":
        return [layers.GroupNormalization(divisor, epsilon=1e-3)(x)]
    if step == "layer_norm":
        return [layers.LayerNormalization(epsilon=1e-3)(x)]
    if step == "activation":
        return [layers.ReLU()(x) if choice % 2 else ops.gelu(x)]
    if step == "add":
        return [x + (y if y.shape[-1] == channels else layers.Conv2D(channels, 1)(y))]
    if step == "concat":
        return [layers.Concatenate()([x, y])] if channels + y.shape[-1] < 64 else [x]
    if step == "split":
        return list(ops.split(x, [1 + choice % (channels - 1)], axis=-1))
    if step == "slice":
        return [x[..., choice % (channels - 2) :], x[:, :, :, : channels - choice % (channels - 1)]]
    if step == "gate":
        gate = layers.GlobalAveragePooling2D(keepdims=choice % 2 == 0)(x)
        gate = layers.Dense(channels, activation="sigmoid")(layers.Dense(3, activation="relu")(gate))
        return [layers.Multiply()([x, gate if choice % 2 == 0 else layers.Reshape((1, 1, channels))(gate)])]
    if step == "shuffle":
        one = ops.swapaxes(ops.reshape(x, (-1, SIZE, SIZE, divisor, channels // divisor)), 3, 4)
        return [layers.Reshape((SIZE, SIZE, channels))(one)]
    if step == "permute":
        one = layers.Permute((3, 1, 2))(x)
        return [layers.Permute((2, 3, 1))(layers.Dense(SIZE)(one) if choice % 2 else one)]
    if step == "scale":
        return [x * np.linspace(-1.0, 2.0, channels, dtype="float32")]
    if step == "transpose_conv":
        return [layers.Conv2DTranspose(4 + choice, 3, padding="same")(x)]
    return [layers.Dense(4 + choice, activation="relu")(x)]


def check(program: Program, ratio: float) -> None:
    model = run_program(program)
    dependencies, cut, narrowed = cut_at(model, ratio, importance="random", seed=len(program))
    check_against_oracle(dependencies, cut, narrowed, zoo.inputs_of(model, n=2), spend=True)


QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large)


@settings(max_examples=100, suppress_health_check=QUIET)
@given(programs(), st.sampled_from((0.3, 0.6)))
def test_random_graphs_are_what_the_oracle_says(program, ratio):
    check(program, ratio)


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=QUIET)
@given(programs(), st.floats(0.1, 0.9))
def test_many_random_graphs_are_what_the_oracle_says(program, ratio):
    check(program, ratio)


# What it found


def test_one_channel_that_is_taken_out_stays():
    """Axes of size 1 carry no labels: the channel was cut where it came from, and kept where it went to."""
    check([("grouped", 0, 0, 0), ("conv", 0, 0, 0), ("split", 1, 0, 0), ("conv", 0, 0, 0)], 0.5)
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(9, 3, padding="same")(inputs)
    pooled, one = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 1)(x)), layers.Flatten()(x[..., 2:3])
    model = zoo.randomise(keras.Model(inputs, layers.Dense(4)(layers.Concatenate()([pooled, one]))))
    for seed in range(3):
        dependencies, cut, narrowed = cut_at(model, 0.6, importance="random", seed=seed)
        check_against_oracle(dependencies, cut, narrowed, zoo.inputs_of(model, n=2), spend=True)
    assert narrowed.count_params() < model.count_params()
