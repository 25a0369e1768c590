"""Parts of blocks: one layer goes, activations and skips stay, and the rest of the network computes what it did."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import updp_tf
from tests import zoo
from tests.keras.test_merging import images_for, random_fit, reference, relative_error
from updp_tf import scoring
from updp_tf.blocks import find_blocks
from updp_tf.errors import BudgetError
from updp_tf.forms import all_forms, form_by_name
from updp_tf.merging import Choice, merge_fitted, merge_in_sequence
from updp_tf.pruning import Options
from updp_tf.structure import Refusal

NETWORK = 1e-4  # relative, METHOD section 3


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("residual", [2, 2, 2, 2]),
        ("bottlenecks", [3, 3, 3]),
        ("squeeze_excite", [3, 2]),  # the gate's own layers are no parts
        ("vgg", [2, 2]),
        ("mobilenet_v1", [2, 2, 2]),
        ("tokens", [2, 2]),
        ("layer_norm", [3, 2]),
    ],
)
def test_parts_are_the_layers_that_everything_goes_through(name, parts):
    blocks = find_blocks(zoo.shared(name))
    found = blocks.in_parts()
    count = {block.name: sum(one.part_of == block.name for one in found) for block in blocks}
    assert [count[block.name] for block in blocks][: len(parts)] == parts
    for one in found:
        if one.part_of is not None:
            assert one.name in {f"{node}_part" for node in one.body[:2]}  # behind its padding, if it has any
            assert (
                (one.linearizable or one.rank < 4)
                and one.skip is None
                and set(one.nodes) <= set(blocks[one.part_of].body)
            )
    kept = {block.name for block in blocks} & {one.name for one in found}
    assert all(count[name] == 0 for name in kept)
    assert blocks.in_parts(having=[]) is blocks
    some = next(one for one in found if one.part_of is not None)
    assert {one.part_of for one in blocks.in_parts(having=[some.name])} - {None} == {some.part_of}


@pytest.mark.parametrize("name", ["residual", "bottlenecks", "squeeze_excite", "vgg", "mobilenet_v1", "tokens"])
def test_any_map_in_the_place_of_a_part(name):
    """Float64 sums of random maps in their place, everything else layer by layer."""
    model = zoo.shared(name)
    blocks = find_blocks(model).in_parts()
    rng = np.random.default_rng(0)
    form = form_by_name("pointwise")
    able = [one for one in blocks if one.part_of is not None and form.refuses(one, skip="kept") is None]
    fitted = {one.name: random_fit(one, rng, "pointwise") for one in able[::2]}
    assert fitted
    merged = merge_fitted(blocks, [Choice(one, "pointwise", "kept") for one in fitted], fitted, kind="fitted")
    x = images_for(model, n=3)
    for have, want in zip(zoo.outputs_of(merged.model, x), reference(blocks, fitted, x), strict=True):
        assert relative_error(have, want) <= NETWORK


def with_kernel(model, parts, kernel):
    """Give a block's second convolution a kernel, and let most of what it reads pass the ReLU in front of it."""
    first, second = ([model.get_layer(name) for name in part.nodes] for part in parts)
    second[0].set_weights([kernel.astype("float32"), *second[0].get_weights()[1:]])
    gamma, beta, mean, variance = first[1].get_weights()
    first[1].set_weights([gamma, np.ones_like(beta), mean, variance])


@pytest.mark.parametrize(("form", "start"), [("pointwise", None), ("pointwise", "identity"), ("scale", None)])
def test_a_convolution_that_does_less_than_it_could_is_dropped_exactly(form, start):
    """All of it in the middle tap: pointwise. A multiple of the identity: a scale, LayerMerge's dropped layer."""
    model = zoo.build("residual")
    parts = [one for one in find_blocks(model).in_parts() if one.part_of == "add"]
    kernel = np.zeros((3, 3, 6, 6))
    kernel[1, 1] = 0.7 * np.eye(6) if form == "scale" else np.random.default_rng(0).normal(size=(6, 6))
    with_kernel(model, parts, kernel)
    blocks = find_blocks(model).in_parts()
    part = blocks[parts[-1].name]
    x = images_for(model, n=60)
    if start is None:
        merged = merge_in_sequence(blocks, [Choice(part.name, form, "kept")], x, reestimate=False, ridge=0.0)
    else:
        found, _ = scoring.start_without_images(blocks.graph, part, form_by_name(form), "kept", start)
        assert not isinstance(found, Refusal) and found.dropped == 0.0
        merged = merge_fitted(blocks, [Choice(part.name, form, "kept")], {part.name: found}, kind="linearized")
        assert merged.blocks[0].kind == "exact"
    assert [one.name for one in merged.blocks] == [part.name]
    for have, want in zip(zoo.outputs_of(merged.model, x), zoo.outputs_of(model, x), strict=True):
        assert relative_error(have, want) <= 1e-5
    kinds = [type(layer).__name__ for layer in merged.model.layers]
    assert kinds.count("ReLU") == sum(isinstance(layer, keras.layers.ReLU) for layer in model.layers)


def test_forms_that_are_no_cheaper_than_the_layer_are_refused_with_the_reason():
    blocks = find_blocks(zoo.shared("bottlenecks")).in_parts()
    for part in blocks:
        able, refusals = scoring.eligible_forms(part, forms=all_forms(), skip="auto", unit="macs")
        told = {one.rule: one.reason for one in refusals}
        assert "skip" in told["remove"]
        if part.geometry.kernel_size == (1, 1):
            assert told["pointwise"] == "no cheaper than the layer itself"
        assert all(form.cost(part, skip=mode).macs < part.cost.macs for form, mode in able)


def test_the_search_chooses_among_layers_and_all_of_them_together(tmp_path):
    model = zoo.build("residual")  # a shared one has the kernels of whichever test asked first
    x = images_for(model, n=60)
    options = Options(parts=True, spans=2, refit=False)
    asked = {"calibration": x, "options": options, "verbose": False}
    names = {one.name for one in find_blocks(model).in_parts()}
    lengths = []
    for macs in (0.7, 0.9):
        asked["budget"] = {"macs": macs}
        plan = updp_tf.search(model, **asked, path=tmp_path / "plan.json", force=True)
        assert all(set(edit.blocks) <= names for edit in plan.edits)
        lengths.append([len(edit.blocks) for edit in plan.edits])
    assert lengths == [[2], [1]]
    whole = updp_tf.merge(model, tmp_path / "plan.json", verbose=False)
    small = updp_tf.prune(model, **asked)
    assert small.count_params() == whole.count_params() < model.count_params()
    assert [one.blocks for one in small.pruning.plan.edits] == [one.blocks for one in plan.edits]
    with pytest.raises(BudgetError, match="leave `parts` as it is"):
        updp_tf.prune(model, **asked, width=True)


def test_a_student_whose_part_is_blended_becomes_what_it_is_at_blend_0(tmp_path):
    model = zoo.build("residual")
    x = images_for(model, n=60)
    asked = {"budget": {"merged": 2}, "forms": ["pointwise"], "options": Options(parts=True)}
    plan = updp_tf.search(model, calibration=x, **asked, verbose=False)
    schedule = updp_tf.Schedule(total_steps=6)
    student = updp_tf.progressive(model, plan, calibration=x, mode="whole", schedule=schedule, verbose=False)
    np.testing.assert_array_equal(zoo.outputs_of(student, x[:3])[0], zoo.outputs_of(model, x[:3])[0])
    for layer in updp_tf.training.blend_layers(student):
        layer.step.assign(6)
    small = updp_tf.merge(student)
    assert relative_error(zoo.outputs_of(small, x[:3])[0], zoo.outputs_of(student, x[:3])[0]) <= 1e-5
