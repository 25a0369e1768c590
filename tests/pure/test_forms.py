"""What each form refuses, how it aligns, what it fits: NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.linear_blocks import make_block, output_of
from tests.strategies import random_map
from updp_tf import affine, forms
from updp_tf.affine import AffineConv, Geometry
from updp_tf.errors import FormError, ShapeError
from updp_tf.forms import (
    ConvForm,
    Fitted,
    RemoveForm,
    ScaleForm,
    SeparableForm,
    all_forms,
    cost_of_fitted,
    explained_by,
    fitted_from_arrays,
    fitted_to_arrays,
    fold_skip,
    form_by_name,
    layer_specs,
    register_form,
    scale_spec,
    window_of_size,
)
from updp_tf.moments import Moments
from updp_tf.samples import Samples
from updp_tf.structure import Refusal
from updp_tf.windows import Window, draw

SAME3 = Geometry((3, 3), (1, 1), (1, 1, 1, 1))
SAME5 = Geometry((5, 5), (1, 1), (2, 2, 2, 2))
GEOMETRIES = {
    "3x3": SAME3,
    "5x5": SAME5,
    "7x7, stride 2": Geometry((7, 7), (2, 2), (3, 3, 3, 3)),
    "7x7, stride 2, 'same' on an even size": Geometry((7, 7), (2, 2), (2, 3, 2, 3)),
    "3x3, stride 2, padded at one side": Geometry((3, 3), (2, 2), (0, 1, 0, 1)),
    "5x5 valid": Geometry((5, 5), (1, 1), (0, 0, 0, 0)),
    "4x4, 'same'": Geometry((4, 4), (1, 1), (1, 2, 1, 2)),
    "6x6, stride 2": Geometry((6, 6), (2, 2), (3, 2, 3, 2)),
    "not square": Geometry((5, 3), (1, 2), (2, 2, 1, 1)),
}
SIZES = ((9, 9), (10, 10), (9, 12), (8, 11))


def evidence_for(form, block, x, y):
    window = form.window(block)
    if form.evidence == "samples":
        seen = Samples.empty(window, x.shape[-1], y.shape[-1])
    else:
        seen = Moments(window, x.shape[-1], y.shape[-1])
    seen.add(draw(seen.window, x, y, n_positions=10**9, rng=np.random.default_rng(0)))
    return seen.centred() if isinstance(seen, Moments) else seen


def embedded(one: AffineConv, geometry: Geometry) -> AffineConv:
    """A smaller kernel in the middle of a larger one, the odd row of taps before it."""
    kernel = np.zeros((*geometry.kernel_size, one.c_in, one.c_out))
    top, left = ((a - b) // 2 for a, b in zip(geometry.kernel_size, one.kernel_size, strict=True))
    kernel[top : top + one.kernel_size[0], left : left + one.kernel_size[1]] = one.kernel
    return AffineConv(kernel, one.bias, strides=geometry.strides, padding=geometry.padding)


# Alignment


@pytest.mark.parametrize(
    ("geometry", "kernel_size"),
    [(geometry, k) for geometry in GEOMETRIES.values() for k in (1, 3, 5) if k <= min(geometry.kernel_size)],
    ids=str,
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_fitted_convolution_is_aligned_at_every_size(geometry: Geometry, size, kernel_size: int) -> None:
    """A block that is linear with a smaller kernel in the middle is found exactly, borders included."""
    block = make_block(geometry, size=size)
    form = ConvForm(kernel_size)
    rng = np.random.default_rng(0)
    truth = embedded(random_map(rng, kernel_size, 4, 4), geometry)
    x = rng.normal(size=(12, *size, 4))
    y = affine.apply(truth, x)
    if (refusal := form.refuses(block, skip="kept")) is not None:
        assert "negative padding" in refusal.reason
        # Right: taking taps away would take more padding than there is, and moves or loses outputs.
        cut = [(n - kernel_size) // 2 for n in geometry.kernel_size]
        rest = [n - kernel_size - c for n, c in zip(geometry.kernel_size, cut, strict=True)]
        assert min(np.subtract(geometry.padding, (cut[0], rest[0], cut[1], rest[1]))) < 0
        return

    window = form.window(block)
    fitted = form.fit(block, evidence_for(form, block, x, y), skip="kept", ridge=0.0)

    (found,) = fitted.maps
    other = rng.normal(size=(2, *size, 4))
    have, want = affine.apply(found, other), affine.apply(truth, other)
    assert have.shape == want.shape
    cut = [(a - kernel_size) // 2 for a in geometry.kernel_size]
    # Where padding cannot be negative the window reads the next pixel: aligned, but another one.
    if (window.padding[0], window.padding[2]) == (geometry.padding[0] - cut[0], geometry.padding[2] - cut[1]):
        assert fitted.r2 == pytest.approx(1.0, abs=1e-9)
        np.testing.assert_allclose(have, want, atol=1e-7)


@pytest.mark.parametrize(
    ("geometry", "size", "kernel_size", "padding"),
    [
        (SAME5, (9, 9), 3, (1, 1, 1, 1)),
        (SAME5, (9, 9), 1, (0, 0, 0, 0)),
        (SAME3, (9, 9), 5, (1, 1, 1, 1)),  # never larger than the block's own
        (Geometry((7, 1), (1, 1), (3, 3, 0, 0)), (9, 9), 5, (2, 2, 0, 0)),
        (Geometry((7, 3), (1, 1), (3, 3, 1, 1)), (9, 9), 7, (3, 3, 1, 1)),
        (Geometry((7, 7), (2, 2), (2, 3, 2, 3)), (10, 10), 3, (0, 1, 0, 1)),
        (Geometry((3, 3), (2, 2), (0, 1, 0, 1)), (10, 10), 5, (0, 1, 0, 1)),
        # One pixel less at the top would be needed; none is there, and the outputs are as many without.
        (Geometry((3, 3), (2, 2), (0, 1, 0, 1)), (10, 10), 1, (0, 0, 0, 0)),
        (Geometry((3, 3), (2, 2), (0, 1, 0, 1)), (None, None), 1, None),
        (Geometry((5, 5), (1, 1), (0, 0, 0, 0)), (9, 9), 3, None),
        (Geometry((5, 5), (1, 1), (0, 0, 0, 0)), (9, 9), 5, (0, 0, 0, 0)),
        (SAME5, (None, None), 3, (1, 1, 1, 1)),
    ],
)
def test_windows_of_smaller_and_larger_kernels(geometry, size, kernel_size, padding) -> None:
    window = window_of_size(make_block(geometry, size=size), kernel_size)
    kernel = (min(kernel_size, geometry.kernel_size[0]), min(kernel_size, geometry.kernel_size[1]))
    wanted = None if padding is None else Window(kernel, geometry.strides, padding)
    assert window == wanted


@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES.values() if min(g.kernel_size) >= 3], ids=str)
def test_cropping_a_composed_kernel_uses_the_same_window(geometry: Geometry) -> None:
    block = make_block(geometry)
    form = ConvForm(3)
    rng = np.random.default_rng(0)
    whole = replace(random_map(rng, geometry.kernel_size, 4, 4), strides=geometry.strides, padding=geometry.padding)
    found = form.from_maps(block, (whole,), skip="kept")
    if isinstance(found, Refusal):
        assert form.refuses(block, skip="kept") is not None or "padding would become" in found.reason
        return
    window = form.window(block)
    (one,) = found.maps
    assert (one.kernel_size, one.strides, one.padding) == (window.kernel_size, window.strides, window.padding)
    energy = np.square(whole.kernel).sum()
    assert found.dropped == pytest.approx(1 - np.square(one.kernel).sum() / energy)


# Skips

IDENTITY = affine.identity(4)


def projection(rng: np.random.Generator, c_out: int, strides: int) -> AffineConv:
    return replace(random_map(rng, 1, 4, c_out), strides=(strides, strides))


@pytest.mark.parametrize("kind", ["identity", "projection", "strided projection"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_kept_and_folded_skips_are_the_same_fit(kind: str, kernel_size: int) -> None:
    rng = np.random.default_rng(1)
    geometry = Geometry((7, 7), (2, 2), (2, 3, 2, 3)) if kind == "strided projection" else SAME5
    skip = IDENTITY if kind == "identity" else projection(rng, 6, geometry.strides[0])
    block = make_block(geometry, c_out=skip.c_out, size=(10, 12), skip=skip, projected=kind != "identity")
    form = ConvForm(kernel_size)
    window = form.window(block)
    body = replace(random_map(rng, kernel_size, 4, skip.c_out), strides=window.strides, padding=window.padding)
    x = rng.normal(size=(10, 10, 12, 4))
    y = output_of((body,), skip, x) + np.maximum(x[:, :: geometry.strides[0], :: geometry.strides[1], :1], 0)
    seen = evidence_for(form, block, x, y)
    kept = form.fit(block, seen, skip="kept", ridge=1e-2)
    folded = form.fit(block, seen, skip="folded", ridge=1e-2)
    assert (kept.keeps_skip, folded.keeps_skip) == (True, False)
    assert kept.r2 == folded.r2 < 1
    other = rng.normal(size=(2, 10, 12, 4))
    np.testing.assert_allclose(output_of(kept.maps, skip, other), output_of(folded.maps, None, other), atol=1e-10)
    assert np.abs(kept.maps[0].kernel - folded.maps[0].kernel).max() > 0.1
    # What held-out samples say is what numpy says.
    y2 = output_of((body,), skip, other)
    samples = Samples.empty(window, 4, skip.c_out)
    samples.add(draw(samples.window, other, y2, n_positions=10**9, rng=rng))
    residual = np.square(output_of(kept.maps, skip, other) - y2).sum()
    direct = 1 - residual / np.square(y2 - y2.mean(axis=(0, 1, 2))).sum()
    for one in (kept, folded):
        assert explained_by(block, one, samples) == pytest.approx(direct, abs=1e-5)  # samples are float32


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_folding_a_skip_adds_it_at_its_tap(size) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 4))
    body = random_map(rng, 3, 4, 4, padding=1)
    for skip in (IDENTITY, projection(rng, 4, 1), affine.from_scale(rng.normal(size=4), rng.normal(size=4))):
        np.testing.assert_allclose(affine.apply(fold_skip(body, skip), x), output_of((body,), skip, x), atol=1e-12)


def test_a_large_ridge_leaves_the_skip() -> None:
    rng = np.random.default_rng(0)
    block = make_block(SAME3, skip=IDENTITY)
    x = rng.normal(size=(10, 9, 10, 4))
    y = np.tanh(x) + rng.normal(size=4)
    form = ConvForm(3)
    seen = evidence_for(form, block, x, y)
    kept = form.fit(block, seen, skip="kept", ridge=1e9)
    np.testing.assert_allclose(kept.maps[0].kernel, 0.0, atol=1e-6)
    folded = form.fit(block, seen, skip="folded", ridge=1e9)
    np.testing.assert_allclose(folded.maps[0].kernel[1, 1], np.eye(4), atol=1e-6)


# Refusals, each with a block that triggers exactly it


@pytest.mark.parametrize("form", [ConvForm(3), SeparableForm(3)], ids=lambda form: form.name)
@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (make_block(None), "it turns rank 4 into rank 2"),
        (make_block(Geometry((1, 1), (1, 1), (0, 0, 0, 0))), "the block itself reads 1x1 pixels, less than the form"),
        (
            make_block(Geometry((5, 5), (1, 1), (0, 0, 0, 0))),
            "a 3x3 kernel would need negative padding to stay aligned",
        ),
        (
            make_block(Geometry((3, 3), (1, 1), (3, 0, 1, 1)), skip=IDENTITY, exit_size=(10, 10), size=(10, 10)),
            "the pixel that the skip reads lies outside its kernel",
        ),
    ],
)
def test_dense_and_separable_forms_refuse(form, block, reason: str) -> None:
    refusal = form.refuses(block, skip="kept")
    assert refusal == Refusal("block", form.name, reason)


def test_a_skip_of_other_strides_is_refused() -> None:
    block = make_block(SAME3, skip=replace(IDENTITY, strides=(2, 2)), projected=True)
    assert "strides (2, 2), not (1, 1)" in ConvForm(3).refuses(block, skip="kept").reason


def test_remove_needs_a_skip() -> None:
    assert RemoveForm().refuses(make_block(SAME3, skip=IDENTITY), skip="kept") is None
    assert RemoveForm().refuses(make_block(None, skip=IDENTITY), skip="kept") is None
    assert RemoveForm().refuses(make_block(SAME3), skip="kept").reason == "it has no skip that could stay"


def test_forms_that_are_only_fitted_say_so() -> None:
    block = make_block(SAME3, skip=IDENTITY)
    maps = (random_map(np.random.default_rng(0), 3, 4, 4, padding=1),)
    for form in (SeparableForm(3), RemoveForm()):
        found = form.from_maps(block, maps, skip="kept")
        assert isinstance(found, Refusal) and "needs calibration images" in found.reason
    assert "smaller than the form" in ConvForm(5).from_maps(block, maps, skip="kept").reason
    for form in (ConvForm(3), SeparableForm(3)):
        with pytest.raises(FormError, match=f"'{form.name}' is fitted to images: give calibration images"):
            form.fit(block, None, skip="kept", ridge=1e-4)


# Maps of the block's own


def test_maps_of_the_block_are_composed_with_all_padding_in_front() -> None:
    rng = np.random.default_rng(0)
    maps = (random_map(rng, 1, 4, 6), random_map(rng, 3, 6, 4, padding=1))
    block = make_block(maps, skip=IDENTITY)
    x = rng.normal(size=(2, 9, 10, 4))
    wanted = output_of((affine.compose_all(affine.move_padding_to_front(maps)),), IDENTITY, x)
    kept = ConvForm(3).from_maps(block, maps, skip="kept")
    folded = ConvForm(3).from_maps(block, maps, skip="folded")
    assert kept.keeps_skip and not folded.keeps_skip and kept.dropped == folded.dropped == 0.0
    np.testing.assert_allclose(output_of(kept.maps, IDENTITY, x), wanted, atol=1e-12)
    np.testing.assert_allclose(output_of(folded.maps, None, x), wanted, atol=1e-12)
    # In the interior that is the block itself.
    inner = output_of(maps, IDENTITY, x)
    np.testing.assert_allclose(wanted[:, 1:-1, 1:-1], inner[:, 1:-1, 1:-1], atol=1e-12)


def test_depthwise_maps_are_written_out() -> None:
    rng = np.random.default_rng(0)
    maps = (random_map(rng, 3, 4, 4, padding=1, groups=4),)
    found = ConvForm(3).from_maps(make_block(maps), maps, skip="kept")
    x = rng.normal(size=(2, 9, 10, 4))
    assert found.maps[0].groups == 1
    np.testing.assert_allclose(affine.apply(found.maps[0], x), affine.apply(maps[0], x), atol=1e-12)


@pytest.mark.parametrize("skip", ["kept", "folded"])
def test_a_border_is_one_more_tensor(skip: str) -> None:
    """The Rescaling reads the convolution's output and writes another one of its size."""
    maps = (random_map(np.random.default_rng(0), 1, 4, 6), random_map(np.random.default_rng(1), 3, 6, 4, padding=1))
    block = make_block(maps, skip=IDENTITY, live_bytes=1000)
    form = ConvForm(3)
    exit_bytes = 4 * 9 * 10 * 4
    plain = form.from_maps(block, maps, skip=skip)
    bordered = form.from_maps(block, maps, skip=skip, exact_border=True)
    before, after = (cost_of_fitted(form, block, one, skip=skip) for one in (plain, bordered))
    assert before == form.cost(block, skip=skip)
    assert (after.macs, after.params) == (before.macs, before.params)
    assert after.activation_bytes == 1000 + 2 * exit_bytes


# Scales and tokens


def test_a_scale_is_a_norm_with_the_statistics_of_what_it_reads() -> None:
    rng = np.random.default_rng(0)
    scale, shift, mean, variance = rng.normal(size=(4, 5))
    variance = np.square(variance)
    spec = scale_spec(affine.from_scale(scale, shift), "new", (mean, variance))
    gamma, beta, moving_mean, moving_variance = (one.astype("float64") for one in spec.weights)
    assert spec.class_name == "BatchNormalization"
    np.testing.assert_allclose((moving_mean, moving_variance), (mean, variance), rtol=1e-6)
    x = rng.normal(size=(7, 5))
    written = gamma * (x - moving_mean) / np.sqrt(moving_variance + spec.config["epsilon"]) + beta
    np.testing.assert_allclose(written, scale * x + shift, atol=1e-5)
    arrays = fitted_to_arrays(Fitted((affine.from_scale(scale, shift),), False, statistics=(mean, variance)))
    np.testing.assert_array_equal(fitted_from_arrays(arrays, r2=None).statistics, (mean, variance))


def test_a_scale_draws_towards_an_identity_and_not_towards_a_projection() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 9, 10, 4))
    for skip, wanted in ((IDENTITY, 1.0), (projection(rng, 4, 1), 0.0)):
        block = make_block(SAME3, skip=skip, projected=wanted == 0.0)
        form = ScaleForm()
        assert form.refuses(block, skip="kept") is None
        fitted = form.fit(block, evidence_for(form, block, x, np.tanh(x)), skip="kept", ridge=1e9)
        assert not fitted.keeps_skip
        np.testing.assert_allclose(fitted.maps[0].kernel, wanted, atol=1e-6)


def test_on_tokens_and_vectors_a_matrix_is_a_dense_layer() -> None:
    one = random_map(np.random.default_rng(0), 1, 3, 5)
    for rank in (2, 3):
        (spec,) = layer_specs(one, "new", rank=rank)
        assert spec.class_name == "Dense" and spec.config["units"] == 5
        np.testing.assert_allclose(spec.weights[0], one.kernel[0, 0], rtol=1e-6)
    with pytest.raises(ShapeError, match="reads images, not tensors of rank 3"):
        list(layer_specs(random_map(np.random.default_rng(0), 3, 3, 5, padding=1), "new", rank=3))


# Arrays and layers


def test_fitted_maps_survive_arrays() -> None:
    rng = np.random.default_rng(0)
    maps = (
        random_map(rng, 3, 4, 8, strides=2, padding=(0, 1, 2, 3), groups=4),
        random_map(rng, (1, 5), 8, 2, dilation_rate=2),
    )
    for fitted in (Fitted(maps, True, 0.5), Fitted((), True, None), Fitted(maps[1:], False, 0.0)):
        arrays = fitted_to_arrays(fitted)
        assert all(isinstance(array, np.ndarray) and array.dtype != object for array in arrays.values())
        back = fitted_from_arrays(arrays, r2=fitted.r2)
        assert (back.keeps_skip, back.r2, len(back.maps)) == (fitted.keeps_skip, fitted.r2, len(fitted.maps))
        for a, b in zip(back.maps, fitted.maps, strict=True):
            np.testing.assert_array_equal(a.kernel, b.kernel)
            np.testing.assert_array_equal(a.bias, b.bias)
            for name in ("strides", "dilation_rate", "groups", "padding"):
                assert getattr(a, name) == getattr(b, name)


@pytest.mark.parametrize(
    ("options", "names", "padding"),
    [
        ({"padding": 1}, ["Conv2D"], "same"),
        ({"padding": 0}, ["Conv2D"], "valid"),
        ({"padding": 2}, ["ZeroPadding2D", "Conv2D"], "valid"),
        ({"padding": 1, "strides": 2}, ["ZeroPadding2D", "Conv2D"], "valid"),
        ({"padding": (0, 1, 0, 1)}, ["ZeroPadding2D", "Conv2D"], "valid"),
        ({"padding": 2, "dilation_rate": 2}, ["Conv2D"], "same"),
        ({"padding": 1, "dilation_rate": 2}, ["ZeroPadding2D", "Conv2D"], "valid"),
        ({"padding": 1, "groups": 4}, ["DepthwiseConv2D"], "same"),
        ({"padding": 1, "groups": 2}, ["Conv2D"], "same"),
    ],
)
def test_layers_pad_as_the_map_does(options: dict, names: list[str], padding: str) -> None:
    specs = list(layer_specs(random_map(np.random.default_rng(0), 3, 4, 4, **options), "new"))
    assert [spec.class_name for spec in specs] == names
    assert specs[-1].config["padding"] == padding and specs[-1].config["name"] == "new"


def test_strides_and_dilation_together_are_written_out() -> None:
    one = random_map(np.random.default_rng(0), 3, 4, 4, strides=2, dilation_rate=2)
    (spec,) = layer_specs(one, "new")
    assert (spec.config["kernel_size"], spec.config["dilation_rate"], spec.config["strides"]) == (
        (5, 5),
        (1, 1),
        (2, 2),
    )


# The registry


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_registry", dict(forms._registry))


def test_built_in_forms_come_first_and_have_names() -> None:
    names = [form.name for form in all_forms()]
    assert names[:6] == ["conv3", "conv5", "conv7", "separable3", "separable5", "separable7"]
    assert names[6:9] == ["pointwise", "scale", "remove"]
    assert len(set(names)) == len(names)
    assert all(form_by_name(name).name == name for name in names)


def test_a_name_cannot_be_taken_twice(registry: None) -> None:
    with pytest.raises(FormError, match="A form named 'conv3' is registered already; choose another name"):
        register_form(ConvForm(3))
    assert register_form(ConvForm(9)) is form_by_name("conv9")
    with pytest.raises(FormError, match="'conv9' is registered already"):
        register_form(ConvForm(9))


def test_an_object_without_the_methods_is_refused(registry: None) -> None:
    @dataclass(frozen=True)
    class Half:
        name: str = "half"

        def cost(self, block, *, skip):
            return None

    for thing in (Half(), "conv3", ConvForm):
        before = all_forms()
        with pytest.raises(FormError, match="lacks a method of `updp_tf.forms.Form`"):
            register_form(thing)
        assert all_forms() == before


def test_an_unknown_name_lists_the_forms() -> None:
    with pytest.raises(FormError, match="No form is named 'conv9'; the forms are: conv3, conv5"):
        form_by_name("conv9")
