"""Blocks with anything inside: one tensor in, one out; forms are fitted to what they do, spans to what several do."""

from __future__ import annotations

import warnings
from collections import Counter

import keras
import numpy as np
import pytest
from keras import layers

from tests import zoo
from tests.keras.test_merging import reference
from tests.pure.test_fit import augmented
from updp_tf import moments, scoring
from updp_tf.affine import Geometry
from updp_tf.blocks import Blocks, find_blocks
from updp_tf.errors import BudgetError, ModelError
from updp_tf.forms import ConvForm, ScaleForm, SeparableForm, form_by_name
from updp_tf.graph import run_nodes
from updp_tf.merging import Choice, merge_fitted, merge_in_sequence
from updp_tf.pruning import Options, merge, prune, search
from updp_tf.scoring import Sampler, fit_forms, score
from updp_tf.structure import Block, Ref, as_images

RIDGE = 1e-3


class Shift(layers.Layer):
    """A layer that nothing is known of: it mixes neighbouring columns."""

    def call(self, x):
        return x + 0.3 * keras.ops.roll(x, 1, axis=2)


class LayerScale(layers.Layer):
    """One trainable number per channel, as user code has it."""

    def build(self, shape):
        self.gamma = self.add_weight(shape=(shape[-1],), name="gamma")

    def call(self, x):
        return x * self.gamma


class ClassToken(layers.Layer):
    """Puts a trainable token in front."""

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), name="token")

    def call(self, x):
        token = keras.ops.broadcast_to(self.token, (keras.ops.shape(x)[0], 1, x.shape[-1]))
        return keras.ops.concatenate([token, x], axis=1)


def gate(x, ratio: int = 4):
    """Squeeze-excite."""
    channels = x.shape[-1]
    y = layers.GlobalAveragePooling2D(keepdims=True)(x)
    y = layers.Conv2D(channels, 1, activation="sigmoid")(layers.Conv2D(channels // ratio, 1, activation="relu")(y))
    return layers.Multiply()([x, y])


def hard_swish(x):
    """As older code writes it."""
    return x * (keras.ops.relu6(x + 3.0) / 6.0)


def mbconv(x, filters: int, *, strides: int = 1, kernel_size: int = 3, activation=hard_swish):
    y = activation(zoo.conv_norm(x, 2 * x.shape[-1], 1))
    y = layers.DepthwiseConv2D(kernel_size, strides=strides, padding="same", use_bias=False)(y)
    y = gate(activation(layers.BatchNormalization()(y)))
    y = zoo.conv_norm(y, filters, 1)
    return layers.Add()([y, x]) if strides == 1 and filters == x.shape[-1] else y


def convnext(x):
    y = layers.Conv2D(x.shape[-1], 7, padding="same", groups=x.shape[-1])(x)
    y = layers.Dense(2 * x.shape[-1])(layers.LayerNormalization(epsilon=1e-6)(y))
    y = layers.Dense(x.shape[-1])(layers.Activation("gelu")(y))
    return layers.Add()([x, layers.Dropout(0.1, noise_shape=(None, 1, 1, 1))(LayerScale()(y))])


def encoder(x):
    y = layers.LayerNormalization()(x)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 4)(y, y)])
    y = layers.Dense(16)(layers.LayerNormalization()(x))
    return layers.Add()([x, layers.Dense(x.shape[-1])(keras.ops.gelu(y))])


def in_windows(x, window: int, shift: int):
    """Attention inside windows of a map that is rolled: reshapes that fold windows into the batch, as Swin has them."""
    ops = keras.ops
    _, height, width, channels = x.shape
    down, across = height // window, width // window
    y = ops.roll(x, (-shift, -shift), axis=(1, 2)) if shift else x
    y = ops.transpose(ops.reshape(y, (-1, down, window, across, window, channels)), (0, 1, 3, 2, 4, 5))
    y = ops.reshape(y, (-1, window * window, channels))
    y = layers.MultiHeadAttention(2, 4)(y, y)
    y = ops.transpose(ops.reshape(y, (-1, down, across, window, window, channels)), (0, 1, 3, 2, 4, 5))
    y = ops.reshape(y, (-1, height, width, channels))
    return ops.roll(y, (shift, shift), axis=(1, 2)) if shift else y


def swin(x, *, tapped: list | None = None):
    """Two stages of two blocks with patch merging in between; every second block is shifted by half a window."""
    for stage in range(2):
        if stage:
            x = layers.Concatenate()([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)])
            x = layers.Dense(2 * (x.shape[-1] // 4), use_bias=False)(layers.LayerNormalization()(x))
        for shift in (0, 2):
            y = in_windows(layers.LayerNormalization()(x), 4, shift)
            if tapped is not None:
                tapped.append(y)
            x = layers.Add()([x, y])
            y = layers.Dense(2 * x.shape[-1], activation="gelu")(layers.LayerNormalization()(x))
            x = layers.Add()([x, layers.Dense(x.shape[-1])(y)])
    return x


def model_of(build, size=(10, 10), channels: int = 6, seed: int = 0) -> keras.Model:
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((*size, channels))
    x = layers.Conv2D(channels, 3, padding="same")(inputs)
    return zoo.randomise(keras.Model(inputs, build(x)), seed=seed)


def vit(n_blocks: int = 2, *, token=None, channels: int = 8) -> keras.Model:
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((12, 12, 3))
    x = layers.Reshape((16, channels))(layers.Conv2D(channels, 3, strides=3)(inputs))
    x = token(x) if token else x
    for _ in range(n_blocks):
        x = encoder(x)
    return zoo.randomise(keras.Model(inputs, layers.Dense(5)(x[:, 0])))


def rows(model: keras.Model) -> list[tuple]:
    return [
        (
            block.skip_kind,
            block.geometry and (block.geometry.kernel_size[0], block.geometry.strides[0]),
            block.linearizable,
        )
        for block in find_blocks(model)
    ]


FOUND = {
    # builder -> skip, (kernel, strides) of the window, linearizable
    "gate and hard-swish": (lambda x: mbconv(x, 6), [("identity", (3, 1), False)]),
    "gate, no skip": (lambda x: mbconv(x, 8, strides=2, kernel_size=5), [("none", (5, 2), False)]),
    "two gated, no skip": (
        lambda x: mbconv(mbconv(x, 8), 6, strides=2),
        [("none", (3, 1), False), ("none", (3, 2), False)],
    ),
    "fused with a gate": (
        lambda x: layers.Add()([x, zoo.conv_norm(gate(layers.ReLU()(zoo.conv_norm(x, 12))), 6, 1)]),
        [("identity", (3, 1), False)],
    ),
    "PReLU": (
        lambda x: zoo.conv_norm(layers.PReLU(shared_axes=[1, 2])(zoo.conv_norm(x, 8)), 8),
        [("none", (5, 1), False)],
    ),
    "group norm": (
        lambda x: layers.Conv2D(8, 3)(layers.ReLU()(layers.GroupNormalization(2)(layers.Conv2D(8, 3)(x)))),
        [("none", (5, 1), False)],
    ),
    "ConvNeXt": (convnext, [("identity", (25, 1), False)]),  # an unknown layer may read any of 10 x 10 pixels
    "attention on images": (
        lambda x: layers.Add()(
            [x, layers.Reshape((10, 10, 6))(layers.Attention()([layers.Reshape((100, 6))(layers.Dense(6)(x))] * 2))]
        ),
        [("identity", (19, 1), False)],
    ),
    "pooling inside, stride 2": (
        lambda x: layers.Add()(
            [
                layers.Conv2D(8, 1, strides=2)(x),
                layers.MaxPooling2D(3, 2, "same")(zoo.conv_norm(layers.ReLU()(zoo.conv_norm(x, 8)), 8)),
            ]
        ),
        [("projection", (7, 2), False)],
    ),
    "a branching body": (
        lambda x: layers.Add()(
            [x, layers.Conv2D(6, 1)(layers.Concatenate()([zoo.conv_norm(x, 4), zoo.conv_norm(x, 4, 5)]))]
        ),
        [("identity", (5, 1), False)],
    ),
    "a skip that takes each second pixel": (
        lambda x: layers.Add()(
            [layers.MaxPooling2D(1, 2)(x), zoo.conv_norm(layers.ReLU()(zoo.conv_norm(x, 6)), 6, strides=2)]
        ),
        [("projection", (5, 2), True)],
    ),
    "an activation made of arithmetic": (
        lambda x: layers.Add()([x, layers.Conv2D(6, 1)(_tanh_gelu(layers.Conv2D(6, 3, padding="same")(x)))]),
        [("identity", (3, 1), False)],
    ),
}


def _tanh_gelu(x):
    return 0.5 * x * (1.0 + keras.ops.tanh(0.798 * (x + 0.0447 * keras.ops.power(x, 3))))


@pytest.mark.parametrize(("build", "wanted"), FOUND.values(), ids=FOUND)
def test_a_block_is_one_tensor_in_and_one_out(build, wanted) -> None:
    assert rows(model_of(build)) == wanted


def test_why_it_is_not_linear_names_the_layer_and_where_to_tell() -> None:
    (block,) = find_blocks(model_of(lambda x: layers.Add()([x, layers.Conv2D(6, 1)(Shift(name="odd")(x))])))
    assert "'odd' is a " in block.linear_refusal.reason and "register_linear" in block.linear_refusal.reason
    (block,) = find_blocks(model_of(lambda x: mbconv(x, 6)))
    assert "is on another branch" in block.linear_refusal.reason or "has no linear rule" in block.linear_refusal.reason


def test_arithmetic_is_no_block() -> None:
    blocks = find_blocks(model_of(lambda x: keras.ops.relu(x + 0.1 * keras.ops.square(x))))
    assert len(blocks) == 0 and blocks.skipped == ()


def test_a_window_that_cannot_be_told_is_refused_by_every_fitted_form() -> None:
    def enlarging(x):
        return layers.Add()([layers.UpSampling2D(2)(x), layers.Conv2DTranspose(6, 2, 2)(x)])

    assert [refusal.rule for refusal in find_blocks(model_of(enlarging)).skipped] == ["linear_skip"]
    block = find_blocks(zoo.shared("dynamic"))["add_1"]
    assert "pads 'same' with strides on a dynamic size" in block.geometry_refusal.reason
    for name in ("conv3", "separable3", "pointwise", "scale"):
        refusal = form_by_name(name).refuses(block, skip="kept")
        assert refusal.rule == name and "give the input a fixed size" in refusal.reason


# Fits, against numpy's least squares on explicit patches of what Keras computes


def tensors_of(model: keras.Model, block: Block, blocks: Blocks, n: int) -> tuple[np.ndarray, np.ndarray]:
    values = {
        ref: keras.ops.convert_to_tensor(array)
        for ref, array in zip(blocks.graph.input_refs, keras.tree.flatten(zoo.inputs_of(model, n=n)), strict=True)
    }
    run_nodes(blocks.graph, values)
    return tuple(keras.ops.convert_to_numpy(values[ref]) for ref in (block.entry, block.exit))


def explicit_patches(geometry: Geometry, kernel_size: int, x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Patches in the middle of a block's window, by plain loops: shape (images, rows, columns, k * k * channels)."""
    images, height, width, channels = x.shape
    out = np.zeros((images, *size, kernel_size, kernel_size, channels))
    shift = [(geometry.kernel_size[axis] - kernel_size) // 2 - geometry.padding[2 * axis] for axis in (0, 1)]
    shift = np.minimum(shift, 0)  # padding cannot be negative: the next pixel then
    for row, column, i, j in np.ndindex(*size, kernel_size, kernel_size):
        r, c = row * geometry.strides[0] + i + shift[0], column * geometry.strides[1] + j + shift[1]
        if 0 <= r < height and 0 <= c < width:
            out[:, row, column, i, j] = x[:, r, c]
    return out.reshape(images, *size, -1)


@pytest.mark.parametrize("form", [ConvForm(3), ConvForm(1), ScaleForm()], ids=lambda form: form.name)
@pytest.mark.parametrize("name", ["gate and hard-swish", "gate, no skip", "pooling inside, stride 2", "tokens"])
def test_a_fit_is_numpys_least_squares(name: str, form, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit(1) if name == "tokens" else model_of(FOUND[name][0], size=(9, 10))
    blocks = find_blocks(model)
    block = blocks[0]
    if form.refuses(block, skip="kept") is not None:
        assert form.name == "scale" or name == "tokens"
        return
    monkeypatch.setattr(scoring, "HOLD_OUT_EVERY", 10**6)
    x, y = (one.astype("float64") for one in tensors_of(model, block, blocks, 18))
    sampler = Sampler(18, positions_per_unknown=10**6)
    fits, missing = fit_forms(block, [(form, "kept")], x, y, sampler, ridge=RIDGE, parts=[slice(0, 7), slice(7, 18)])
    (one,) = fits[form.name].maps
    x, y = as_images(x), as_images(y)
    patches = explicit_patches(block.geometry, getattr(form, "kernel_size", 1), x, y.shape[1:3])
    flat, target = patches.reshape(-1, patches.shape[-1]), y.reshape(-1, y.shape[-1])
    skip = np.zeros_like(target)
    if block.skip is not None:
        strides = block.geometry.strides
        pixels = x[:, :: strides[0], :: strides[1]].reshape(len(target), -1)
        matrix = np.eye(pixels.shape[1]) if block.skip_kind == "identity" else block.skip.kernel[0, 0]
        skip = pixels @ matrix + block.skip.bias
    assert missing == 0
    if isinstance(form, ScaleForm):
        energy = np.var(flat, axis=0)
        have = flat * one.kernel[0, 0, 0] + one.bias
        for c in range(block.c_in):
            want = augmented(flat[:, c : c + 1], (target - skip)[:, c : c + 1], RIDGE * energy.mean() / energy[c])
            assert np.abs(have[:, c : c + 1] - want - skip[:, c : c + 1]).max() <= 1e-6 * np.abs(target).max()
        return
    # Drawn towards the skip: the ridge shrinks what is added to it.
    want = augmented(flat, target - skip, RIDGE)
    have = flat @ one.kernel.reshape(-1, one.c_out) + one.bias
    assert np.abs(have - want).max() <= 1e-6 * np.abs(want).max()
    assert fits[form.name].keeps_skip == (block.skip is not None)


def test_too_many_unknowns_for_a_matrix_are_solved_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(lambda x: mbconv(x, 6))
    blocks = find_blocks(model)
    x, y = tensors_of(model, blocks[0], blocks, 22)
    able = [(ConvForm(3), "kept"), (ConvForm(1), "folded")]
    sampler, parts = Sampler(22, positions_per_unknown=10**6), [slice(0, 10), slice(10, 22)]
    dense, _ = fit_forms(blocks[0], able, x, y, sampler, ridge=RIDGE, parts=parts)
    monkeypatch.setattr(scoring, "MAX_DENSE_UNKNOWNS", 10)
    steps, _ = fit_forms(blocks[0], able, x, y, sampler, ridge=RIDGE, parts=parts)
    assert steps["conv3"].r2 == pytest.approx(dense["conv3"].r2, abs=1e-4)
    assert steps["pointwise"].r2 == pytest.approx(dense["pointwise"].r2, abs=1e-4)


# Merging


@pytest.mark.parametrize("name", FOUND)
def test_every_form_that_fits_can_be_merged(name: str) -> None:
    """The built model is compared with the graph it came from, and each edit with its map, by `merge_in_sequence`."""
    model = model_of(FOUND[name][0])
    blocks = find_blocks(model)
    images = zoo.inputs_of(model, n=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scoring.CalibrationWarning)  # the maps need not be good ones
        scores = score(blocks, images, ridge=0.1)
    forms = {one.form for one in scores.candidates}
    assert forms & {"separable3", "separable5", "separable7", "pointwise"}
    for form in sorted(forms):
        choices = [Choice(one.blocks[0], form, one.options["skip"]) for one in scores.candidates if one.form == form]
        merged = merge_fitted(
            blocks, choices, {c.block: scores.fitted[f"{c.block}={form}"] for c in choices}, kind="fitted"
        )
        assert merged.error <= 1e-4
        kinds = {type(layer).__name__ for layer in merged.model.layers}
        assert ("BatchNormalization" in kinds) or form != "scale"


def test_a_scale_keeps_true_statistics() -> None:
    """Its norm tells the mean and variance of what it reads, so that re-estimating them changes nothing."""
    model = model_of(lambda x: mbconv(x, 6))
    blocks = find_blocks(model)
    images = zoo.inputs_of(model, n=64)
    merged = merge_in_sequence(blocks, [Choice(blocks[0].name, "scale", "kept")], images)
    (norm,) = [layer for layer in merged.model.layers if isinstance(layer, layers.BatchNormalization)]
    x, _ = tensors_of(model, blocks[0], blocks, 64)
    values = keras.ops.convert_to_numpy
    np.testing.assert_allclose(values(norm.moving_mean), x.mean(axis=(0, 1, 2)), atol=0.1 * x.std())
    np.testing.assert_allclose(values(norm.moving_variance), x.var(axis=(0, 1, 2)), rtol=0.3)
    assert not any(isinstance(layer, layers.Add) for layer in merged.model.layers)


# Tokens


def test_transformer_blocks_are_found_on_tokens() -> None:
    blocks = find_blocks(vit())
    assert [(block.skip_kind, block.rank, block.geometry.kernel_size[0]) for block in blocks] == [
        ("identity", 3, 31),
        ("identity", 3, 1),
    ] * 2
    assert all(
        form_by_name("conv3").refuses(block, skip="kept").reason.endswith("tokens, not images") for block in blocks
    )
    attention, mlp = blocks[0], blocks[1]
    assert form_by_name("pointwise").cost(mlp, skip="kept").macs == 16 * 8 * 8
    assert form_by_name("pointwise").cost(mlp, skip="kept").macs / mlp.cost.macs == 0.25
    assert form_by_name("pointwise").cost(attention, skip="kept").macs < attention.cost.macs


def _two_tokens(x):
    return layers.Concatenate(axis=1)([ClassToken()(x)[:, :1], ClassToken()(x)[:, :1], x])


@pytest.mark.parametrize(
    ("token", "wanted"),
    [
        (None, ()),
        (ClassToken(), (0,)),
        (_two_tokens, (0, 1)),
        (lambda x: layers.Concatenate(axis=1)([x, x[:, :3] * 2.0]), (-3, -2, -1)),
    ],
    ids=["none", "in a layer of its own", "concatenated", "at the end"],
)
def test_class_tokens_are_known(token, wanted: tuple[int, ...]) -> None:
    assert {block.special_tokens for block in find_blocks(vit(token=token))} == {wanted}


def test_an_encoder_is_merged_on_tokens() -> None:
    model = vit(2, token=ClassToken())
    blocks = find_blocks(model)
    images = zoo.inputs_of(model, n=30)
    scores = score(blocks, images)
    found = {
        name: {one.form for one in scores.candidates if one.blocks == (name,)} for name in (b.name for b in blocks)
    }
    assert set(map(frozenset, found.values())) == {frozenset({"pointwise", "scale", "remove"})}
    r2 = {one.form: one.r2 for one in scores.candidates if one.blocks == (blocks[1].name,)}
    assert r2["pointwise"] > r2["scale"] > r2["remove"]
    forms = ("pointwise", "scale", "remove", "pointwise")
    choices = [Choice(block.name, form, "kept") for block, form in zip(blocks, forms, strict=True)]
    merged = merge_in_sequence(blocks, choices, images)
    assert merged.error <= 1e-4
    assert sum(isinstance(layer, layers.Dense) for layer in merged.model.layers) == 3
    assert not any(isinstance(layer, layers.MultiHeadAttention) for layer in merged.model.layers)


# Spans


def test_attention_in_shifted_windows_is_merged_where_it_is_one_tensor_in_and_one_out() -> None:
    """Swin: eight blocks; what merges patches changes the size and is no residual, so it stays."""
    model = model_of(swin, size=(16, 8))
    blocks = find_blocks(model)
    assert [block.skip_kind for block in blocks] == ["identity"] * 8 and not blocks.skipped
    attention, mlp = blocks[::2], blocks[1::2]
    assert all(block.geometry.kernel_size == (1, 1) for block in mlp)
    assert [block.geometry.kernel_size for block in attention] == [(31, 15)] * 2 + [(15, 7)] * 2  # read from anywhere
    assert not any(block.linearizable for block in blocks)
    images = zoo.inputs_of(model, n=40)
    choices = [Choice(block.name, "conv3" if block in attention else "pointwise", "kept") for block in blocks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scoring.CalibrationWarning)
        merged = merge_in_sequence(blocks, choices, images, reestimate=False)
    assert not any(isinstance(layer, layers.MultiHeadAttention) for layer in merged.model.layers)
    pairs = zip(zoo.outputs_of(merged.model, images[:3]), reference(blocks, merged.fitted, images[:3]), strict=True)
    for have, want in pairs:
        assert np.abs(have - want).max() <= 1e-4 * np.abs(want).max()
    tapped: list = []
    build = lambda x: [swin(x, tapped=tapped), *tapped]  # noqa: E731
    found = find_blocks(model_of(build, size=(16, 8)))
    assert len(found) == 4 and all("is read outside, as an output" in one.reason for one in found.skipped)


def test_spans_are_runs_of_consecutive_blocks() -> None:
    blocks = find_blocks(vit(2))
    names = [block.name for block in blocks]
    spans = blocks.spans(max_length=3)
    assert [span.members for span in spans] == [tuple(names[i : i + n]) for i in range(4) for n in (2, 3) if i + n <= 4]
    assert all(span.skip_kind == "identity" and not span.linearizable for span in spans)
    assert spans[0].cost.macs == blocks[0].cost.macs + blocks[1].cost.macs
    assert (spans[0].entry, spans[0].exit) == (blocks[0].entry, blocks[1].exit)
    assert spans[0].covers == tuple(names[:2]) and blocks[0].covers == (names[0],)
    assert blocks.spans(max_length=1) == ()


def test_a_span_ends_where_others_read() -> None:
    """Activations may lie between; a feature that is tapped may not."""
    inside = find_blocks(zoo.shared("residual")).spans(max_length=2)
    assert [span.skip_kind for span in inside] == ["none"] * 3  # each holds a projection
    assert inside[0].geometry.strides == (2, 2)
    assert [span.members for span in find_blocks(zoo.shared("nested_twice")).spans()] == [
        ("inner_add", "inner_add_call1")
    ]

    def tapped(x):
        y = zoo.basic(x, 6)
        return [y, zoo.basic(y, 6)]

    assert find_blocks(model_of(tapped)).spans() == ()


def test_joined_blocks_hold_each_block_once() -> None:
    blocks = find_blocks(vit(2))
    a, b, c, d = (block.name for block in blocks)
    joined = blocks.joined([(b, c), (a,)])
    assert [block.covers for block in joined] == [(a,), (b, c), (d,)]
    for wrong in ([(a, c)], [(b, a)], [(a, b), (b, c)]):
        with pytest.raises(ModelError, match="are no consecutive blocks of"):
            blocks.joined(wrong)


@pytest.mark.parametrize("form", ["pointwise", "scale", "remove"])
def test_a_span_becomes_one_form(form: str) -> None:
    model = vit(2)
    blocks = find_blocks(model)
    images = zoo.inputs_of(model, n=24)
    scores = score(blocks, images, spans=2)
    members = tuple(block.name for block in blocks[:2])
    (found,) = [one for one in scores.candidates if one.blocks == members and one.form == form]
    assert found.key in scores.fitted and found.r2 == scores.fitted[found.key].r2
    joined = blocks.joined([members])
    merged = merge_in_sequence(joined, [Choice(joined[0].name, form, found.options["skip"])], images)
    assert merged.error <= 1e-4 and merged.blocks[0].name == joined[0].name
    x = images[:2]
    values = {Ref(blocks.graph.input_refs[0].node): keras.ops.convert_to_tensor(x)}
    run_nodes(blocks.graph, values)
    entry = as_images(keras.ops.convert_to_numpy(values[joined[0].entry]).astype("float64"))
    one = merged.fitted[joined[0].name]
    want = entry
    if one.maps:
        matrix = one.maps[0].kernel[0, 0] if form == "pointwise" else np.diag(one.maps[0].kernel[0, 0, 0])
        want = entry @ matrix + one.maps[0].bias + (entry if one.keeps_skip else 0.0)
    have = keras.Model(merged.model.input, merged.model.get_layer(blocks[2].nodes[0]).input)(x)
    assert np.abs(as_images(keras.ops.convert_to_numpy(have)) - want).max() <= 1e-4 * np.abs(want).max()


def test_a_span_with_strides_is_one_convolution() -> None:
    model = zoo.shared("residual")
    blocks = find_blocks(model)
    joined = blocks.joined([("add_1", "add_2")])
    images = zoo.inputs_of(model, n=60)
    merged = merge_in_sequence(joined, [Choice("add_1_to_add_2", "conv3", "folded")], images)
    assert merged.error <= 1e-4 and merged.blocks[0].r2 > 0.0
    assert merged.blocks[0].macs_after == 9 * 9 * 9 * 6 * 8
    assert sum(isinstance(layer, layers.Add) for layer in merged.model.layers) == 2


# Networks that Keras ships


FAMILIES = {
    "MobileNetV3Small": (11, {"none": 5, "identity": 6}, {}),
    "EfficientNetB0": (16, {"none": 7, "identity": 9}, {}),
    "EfficientNetV2B0": (21, {"none": 6, "identity": 15}, {}),
    "ConvNeXtTiny": (18, {"identity": 18}, {}),
    "Xception": (14, {"none": 2, "projection": 4, "identity": 8}, {}),
    "DenseNet121": (58, {"none": 58}, {}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "MobileNetV3Small" else pytest.mark.slow) for name in FAMILIES]
)
def test_networks_with_gates_norms_and_pooling_inside(name: str) -> None:
    keras.utils.clear_session(free_memory=False)
    build = getattr(keras.applications, name)
    blocks = find_blocks(build(weights=None, include_top=False, input_shape=(96, 96, 3)))
    n, skips, refused = FAMILIES[name]
    assert len(blocks) == n and Counter(block.skip_kind for block in blocks) == skips
    assert {refusal.site: refusal.rule for refusal in blocks.skipped} == refused
    for block in blocks:
        cheaper = [
            form.name
            for form in (ConvForm(3), SeparableForm(3), SeparableForm(7), ConvForm(1))
            if form.refuses(block, skip="kept") is None and form.cost(block, skip="kept").macs <= block.cost.macs
        ]
        assert cheaper, block.name


def test_a_form_dearer_than_its_block_is_listed_and_not_picked() -> None:
    blocks = find_blocks(model_of(convnext))
    able, refusals = scoring.eligible_forms(blocks[0], forms=[ConvForm(7), SeparableForm(7)], skip="auto", unit="macs")
    assert [form.name for form, _ in able] == ["separable7"]
    assert [(one.rule, one.reason.partition(":")[0]) for one in refusals] == [("conv7", "dearer than the block")]


@pytest.mark.parametrize("project", [False, True])
def test_a_scale_covers_removing_where_the_skip_is_the_identity(project: bool) -> None:
    """A projection stays when its block is removed, and mixes channels: no scale does that."""
    (block,) = find_blocks(model_of(lambda x: layers.Dense(2)(zoo.basic(x, 6, project=project))))
    forms = [ScaleForm(), form_by_name("remove")]
    able, refusals = scoring.eligible_forms(block, forms=forms, skip="auto", unit="macs", cheapest_too=False)
    assert [form.name for form, _ in able] == (["scale", "remove"] if project else ["scale"])
    assert [one.reason for one in refusals] == (
        [] if project else ["scale explains at least as much, and the budget limits no cost"]
    )


def test_the_largest_matrix_is_bounded() -> None:
    assert 8 * moments.MAX_DENSE_UNKNOWNS**2 <= 2**30


def test_a_plan_may_hold_spans(tmp_path) -> None:
    """So few MACs that four blocks need one form; the plan names them, and its file merges without images."""
    model = vit(2)
    images = zoo.inputs_of(model, n=60)
    asked = {"calibration": images, "budget": {"macs": 0.25}, "forms": ["pointwise"], "verbose": False}
    with pytest.raises(BudgetError, match="cannot be met"):
        search(model, **asked)
    options = Options(spans=4, refit=False)
    plan = search(model, **asked, options=options, path=tmp_path / "plan.json")
    names = [block.name for block in find_blocks(model)]
    assert any(len(edit.blocks) > 1 for edit in plan.edits)
    assert all(set(edit.blocks) <= set(names) for edit in plan.edits)
    small, again = prune(model, **asked, options=options), merge(model, tmp_path / "plan.json", verbose=False)
    assert [edit.blocks for edit in small.pruning.plan.edits] == [edit.blocks for edit in plan.edits]
    assert small.pruning.after.macs <= 0.25 * small.pruning.before.macs
    assert small.count_params() == again.count_params()
    assert zoo.outputs_of(again, images[:2])[0].shape == (2, 5)


class Salted(str):
    """A text whose place in a set is chosen here, as the hash seed of a process chooses it."""

    __slots__ = ("salt",)

    def __new__(cls, text: str, salt: int) -> Salted:
        one = super().__new__(cls, text)
        one.salt = salt
        return one

    def __hash__(self) -> int:
        return hash((self.salt, str(self) == "samples"))


def test_the_same_positions_are_drawn_in_every_process() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(40, 18, 18, 6)).astype("float32") for _ in range(2))
    window = ConvForm(3).window(find_blocks(zoo.shared("residual"))[0])
    drawn = []
    for salt in range(8):
        wanted = [(Salted(kind, salt), window) for kind in ("moments", "samples")]
        found = scoring.gather(wanted, x, y, Sampler(40, positions_per_unknown=4), [slice(0, 20), slice(20, 40)])
        drawn.append({str(kind): unseen.outputs for (kind, _), (_, unseen) in found.items()})
    for kind in ("moments", "samples"):
        assert all(np.array_equal(one[kind], drawn[0][kind]) for one in drawn)
