"""What every registered form promises, and that its layers in Keras compute and cost what it says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import keras
import numpy as np
import pytest

from tests import zoo
from tests.linear_blocks import make_block, output_of
from tests.strategies import random_map
from updp_tf import affine
from updp_tf.affine import AffineConv
from updp_tf.blocks import Blocks, find_blocks
from updp_tf.forms import (
    ConvForm,
    Form,
    RemoveForm,
    ScaleForm,
    SeparableForm,
    all_forms,
    fitted_from_arrays,
    fitted_to_arrays,
    layer_specs,
)
from updp_tf.graph import run_nodes
from updp_tf.merging import build_edit
from updp_tf.moments import Moments
from updp_tf.samples import Samples
from updp_tf.structure import Block, Cost, Refusal, as_images
from updp_tf.windows import draw

FORMS = {form.name: form for form in all_forms()}
MODELS = (
    "layer_norm",
    "tokens",
    "residual",
    "bottlenecks",
    "inverted_residuals",
    "mobilenet_v1",
    "vgg",
    "separable",
    "squeeze_excite",
    "dilated",
)

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_skip = pytest.mark.parametrize("skip", ["kept", "folded"])


@cache
def cases() -> list[tuple[Blocks, Block]]:
    return [(blocks, block) for name in MODELS for blocks in [find_blocks(zoo.shared(name))] for block in blocks]


def evidence_for(form: Form, block: Block, x: np.ndarray, y: np.ndarray):
    window = form.window(block)
    if window is None:
        return None
    empty = Samples.empty(window, x.shape[-1], y.shape[-1])
    seen = empty if form.evidence == "samples" else Moments(window, x.shape[-1], y.shape[-1])
    seen.add(draw(seen.window, as_images(x), as_images(y), n_positions=10**9, rng=np.random.default_rng(0)))
    return seen.centred() if isinstance(seen, Moments) else seen


def noise(shape, *, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, *shape[1:]))


def own_maps(form: Form, block: Block, rng: np.random.Generator) -> tuple[AffineConv, ...]:
    """Linear maps that this form can become."""
    window = form.window(block)
    place = {"strides": window.strides, "padding": window.padding}
    if isinstance(form, RemoveForm):
        return ()
    if isinstance(form, ScaleForm):
        return (affine.from_scale(rng.normal(size=block.c_in), rng.normal(size=block.c_in)),)
    if isinstance(form, SeparableForm):
        depthwise = replace(random_map(rng, window.kernel_size, block.c_in, block.c_in, groups=block.c_in), **place)
        return depthwise, random_map(rng, 1, block.c_in, block.c_out)
    assert isinstance(form, ConvForm), "a new form needs its maps here"
    return (replace(random_map(rng, window.kernel_size, block.c_in, block.c_out), **place),)


@every_form
def test_it_is_a_frozen_value_with_a_name(form: Form) -> None:
    assert isinstance(form, Form)
    assert form.name and form.name.isidentifier()
    assert form.evidence in ("moments", "samples")
    with pytest.raises(AttributeError):
        form.name = "another"
    assert hash(form) == hash(replace(form))


@every_form
@every_skip
def test_refusals_have_a_place_and_a_reason(form: Form, skip: str) -> None:
    blocks = [block for _, block in cases()] + [make_block(None), make_block(None, skip=affine.identity(4))]
    refusals = [refusal for block in blocks if (refusal := form.refuses(block, skip=skip)) is not None]
    assert refusals, "no block is refused: the test shows nothing"
    for refusal in refusals:
        assert isinstance(refusal, Refusal) and refusal.rule == form.name
        assert refusal.site in {block.name for block in blocks}
        assert len(refusal.reason) > 10 and not refusal.reason.endswith(".")


@every_form
@every_skip
def test_cost_is_what_its_layers_cost(form: Form, skip: str) -> None:
    n = 0
    for blocks, block in cases():
        if form.refuses(block, skip=skip) is not None:
            continue
        n += 1
        x, y = noise(block.entry_shape, n=2), noise(block.exit_shape, n=2, seed=1)
        fitted = form.fit(block, evidence_for(form, block, x, y), skip=skip, ridge=0.1)
        edit = build_edit(blocks.graph, block, fitted)
        stays = set(block.skip_nodes) if fitted.keeps_skip else set()
        cost = form.cost(block, skip=skip)
        params = macs = 0
        for node in edit.nodes:
            if not isinstance(node.layer, keras.Layer):
                continue
            params += node.layer.count_params()
            if node.kind in ("Conv2D", "DepthwiseConv2D", "Dense"):
                macs += int(np.prod(node.layer.kernel.shape)) * int(np.prod(node.shapes[0][1:-1]))
        assert isinstance(cost, Cost)
        assert (cost.macs, cost.params) == (macs, params), block.name
        assert stays <= {node.name for node in edit.nodes}
        assert type(cost.macs) is type(cost.params) is type(cost.activation_bytes) is int
    assert n > 0


@every_form
@pytest.mark.parametrize("size", [(9, 9), (10, 10), (9, 12)], ids=str)
@pytest.mark.parametrize("kind", ["no skip", "identity", "projection", "stride 2", "padded at one side"])
def test_a_block_of_its_own_kind_is_reproduced_border_included(form: Form, size, kind: str) -> None:
    rng = np.random.default_rng(0)
    strides = 2 if kind in ("stride 2", "padded at one side") else 1
    pads = (0, 1, 0, 1) if kind == "padded at one side" else (2, 3, 2, 3)
    k = 3 if kind == "padded at one side" else 7
    pads = (3, 3, 3, 3) if strides == 1 else pads
    skip = affine.identity(4) if kind == "identity" else None
    if kind == "projection":
        skip = random_map(rng, 1, 4, 6)
    block = make_block(
        affine.Geometry((k, k), (strides, strides), pads),
        c_out=4 if kind == "identity" else 6,
        size=size,
        skip=skip,
        projected=kind == "projection",
    )
    if (refusal := form.refuses(block, skip="kept")) is not None:
        if isinstance(form, RemoveForm):
            assert block.skip is None
        elif isinstance(form, ScaleForm):
            assert block.c_in != block.c_out or strides == 2
        elif form.kernel_size > k:
            assert "less than the form" in refusal.reason
        else:
            assert strides == 2 and form.kernel_size == 1 and "negative padding" in refusal.reason
        return
    truth = own_maps(form, block, rng)
    x, other = noise(block.entry_shape, n=40), noise(block.entry_shape, n=2, seed=5)
    assert output_of(truth, skip, x).shape == (40, *block.exit_shape[1:])

    for mode in ("kept", "folded"):
        fitted = form.fit(block, evidence_for(form, block, x, output_of(truth, skip, x)), skip=mode, ridge=1e-9)
        have = output_of(fitted.maps, skip if fitted.keeps_skip else None, other)
        want = output_of(truth, skip, other)
        # Linear regressions are exact; the alternating one is within some percent after its three rounds.
        tolerance = 0.1 if form.evidence == "samples" and truth else 1e-6
        assert np.abs(have - want).max() <= tolerance * np.abs(want).max()


@every_form
@every_skip
def test_its_layers_in_keras_compute_its_maps(form: Form, skip: str) -> None:
    for blocks, block in cases():
        if form.refuses(block, skip=skip) is not None:
            continue
        x, y = noise(block.entry_shape, n=3), noise(block.exit_shape, n=3, seed=1)
        fitted = form.fit(block, evidence_for(form, block, x, y), skip=skip, ridge=0.1)
        edit = build_edit(blocks.graph, block, fitted)
        values = {block.entry: keras.ops.convert_to_tensor(x.astype("float32"))}
        run_nodes(edit.nodes, values)
        have = keras.ops.convert_to_numpy(values[edit.exit])
        want = output_of(fitted.maps, block.skip if fitted.keeps_skip else None, as_images(x))
        assert have.shape == (3, *block.exit_shape[1:])
        assert np.abs(as_images(have) - want).max() <= 1e-5 * np.abs(want).max()  # float32, METHOD section 3
        assert all(type(node.layer).__module__.startswith("keras.") for node in edit.nodes)


@every_form
def test_what_was_fitted_survives_arrays(form: Form) -> None:
    block = next(block for _, block in cases() if form.refuses(block, skip="kept") is None)
    x, y = noise(block.entry_shape, n=2), noise(block.exit_shape, n=2, seed=1)
    fitted = form.fit(block, evidence_for(form, block, x, y), skip="kept", ridge=0.1)
    back = fitted_from_arrays(fitted_to_arrays(fitted), r2=fitted.r2)
    other = noise(block.entry_shape, n=1, seed=2)
    skip = block.skip if fitted.keeps_skip else None
    assert back.keeps_skip == fitted.keeps_skip
    np.testing.assert_array_equal(output_of(back.maps, skip, other), output_of(fitted.maps, skip, other))


@every_form
def test_without_images_it_gives_maps_or_says_why_not(form: Form) -> None:
    rng = np.random.default_rng(0)
    maps = (random_map(rng, 1, 4, 6), random_map(rng, 5, 6, 4, padding=2))
    block = make_block(maps, skip=affine.identity(4))
    found = form.from_maps(block, maps, skip="kept")
    if isinstance(found, Refusal):
        assert found.rule == form.name and found.reason
    else:
        assert found.maps and 0.0 <= found.dropped < 1.0 and found.r2 is None
        assert output_of(found.maps, block.skip, noise(block.entry_shape, n=1)).shape[1:] == block.exit_shape[1:]


# Layers as data


@pytest.mark.parametrize("size", [(9, 9), (10, 10), (8, 11)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": (0, 1, 0, 1), "strides": 2},
        {"kernel_size": 3, "padding": 1, "strides": 2},
        {"kernel_size": 5, "padding": (3, 0, 1, 2)},
        {"kernel_size": 3, "padding": 2, "dilation_rate": 2},
        {"kernel_size": 3, "padding": 1, "dilation_rate": 2, "strides": 2},
        {"kernel_size": (1, 5), "padding": (0, 0, 2, 2)},
        {"kernel_size": (2, 4), "padding": (0, 1, 1, 2)},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": 3, "padding": 1, "groups": 4, "c_out": 8, "strides": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 1, "strides": 2},
    ],
    ids=str,
)
def test_a_maps_layers_in_keras_compute_it(options: dict, size) -> None:
    options = {"c_in": 4, "c_out": 4, **options}
    one = random_map(np.random.default_rng(0), **options)
    x = noise((None, *size, 4), n=2)
    y = x.astype("float32")
    for spec in layer_specs(one, "new"):
        layer = getattr(keras.layers, spec.class_name)(**spec.config)
        layer.build(y.shape)
        if spec.weights:
            layer.set_weights(list(spec.weights))
        y = keras.ops.convert_to_numpy(layer(y))
    want = affine.apply(one, x)
    assert y.shape == want.shape
    assert np.abs(y - want).max() <= 1e-5 * np.abs(want).max()
