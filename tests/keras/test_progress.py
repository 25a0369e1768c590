"""Students: equal to the model at blend 1, equal to what they merge to at blend 0, on every kind of block."""

import functools

import keras
import numpy as np
import pytest

import updp_tf
from tests import zoo
from updp_tf.blocks import network_cost, prepared_graph
from updp_tf.errors import CalibrationError, MergeError, PlanError, ScheduleError
from updp_tf.graph import fingerprint, weights_hash
from updp_tf.layers import BorderRing, TapsBlend
from updp_tf.planning import Edit, Plan
from updp_tf.training import blend_layers

DENSE, SEPARABLE = ("conv3", "conv5", "pointwise"), ("separable3", "separable7", "pointwise")
TOTAL = 6


@functools.cache
def plan_for(name, forms):
    """A plan that merges as many blocks of a network as these forms can."""
    model = zoo.shared(name)
    x = zoo.inputs_of(model, n=40)
    for n in range(len(updp_tf.find_blocks(model)), 0, -1):
        try:
            return updp_tf.search(model, calibration=x, budget={"merged": n}, forms=forms, verbose=False)
        except updp_tf.BudgetError:
            continue
    raise AssertionError("no block can be merged")


def outputs(model, x):
    return [np.asarray(one, "float32") for one in keras.tree.flatten(model(x, training=False))]


def finish(student):
    """Put every blend at 0, as the end of a training does."""
    for layer in blend_layers(student):
        layer.step.assign(TOTAL)
    return student


def shaken(student, seed=0):
    """Other weights than the fitted ones, as training leaves them."""
    rng = np.random.default_rng(seed)
    for variable in student.trainable_variables:
        variable.assign(np.asarray(variable) * rng.uniform(0.8, 1.2, variable.shape))
    return student


EXPANDED = {
    # name: forms, how many of its blocks can be expanded
    "residual": (DENSE, 4),
    "bottlenecks": (DENSE, 3),
    "inverted_residuals": (DENSE, 4),
    "squeeze_excite": (DENSE, 2),
    "preactivation": (DENSE, 3),
    "mobilenet_v1": (SEPARABLE, 3),
    "vgg": (DENSE, 2),
    "layer_norm": (SEPARABLE, 2),
    "tokens": (DENSE, 1),
    "dilated": (("conv5", "pointwise"), 1),
    "grouped": (DENSE, 1),
    "dynamic": (DENSE, 2),
    "operations": (DENSE, 1),
    "two_branches": (DENSE, 2),
    "dropout_and_noise": (DENSE, 1),
    "half": (DENSE, 2),
    "split_channels": (DENSE, 2),
}


WHOLE = ("residual", "squeeze_excite", "mobilenet_v1", "tokens", "half")
"""Networks whose blocks are blended whole in the default run: what is inside a block does not matter there."""


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=() if mode == "expanded" or name in WHOLE else pytest.mark.slow)
        for name in EXPANDED
        for mode in ("whole", "expanded")
    ],
)
def test_both_ends_of_every_kind_of_block(name, mode):
    model = zoo.build(name)
    x = zoo.inputs_of(model, n=40)
    forms, n_expanded = EXPANDED[name]
    plan = plan_for(name, forms)
    before = [np.array(weight) for weight in model.get_weights()]
    schedule = updp_tf.Schedule(total_steps=TOTAL, until=1.0)
    student = updp_tf.progressive(model, plan, calibration=x, mode=mode, schedule=schedule, verbose=False)
    for have, want in zip(outputs(student, x[:4]), outputs(model, x[:4]), strict=True):
        np.testing.assert_array_equal(have, want)
    for have, want in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(have, want)
    assert sum(one.mode == "expanded" for one in student.blending) == (n_expanded if mode == "expanded" else 0)
    assert all(one.mode == "expanded" or mode == "whole" or one.refusal is not None for one in student.blending)
    finish(shaken(student))
    small = updp_tf.merge(student)
    half = name == "half"
    for have, want in zip(outputs(small, x[:4]), outputs(student, x[:4]), strict=True):
        error = np.abs(have - want).max() / np.abs(want).max()
        assert error <= (2e-2 if half else 1e-5)
    assert not list(blend_layers(small))
    assert all(type(layer).__module__.startswith("keras") for layer in small.layers)
    assert network_cost(prepared_graph(small)).macs <= network_cost(prepared_graph(model)).macs


def test_a_kernel_larger_than_the_image_is_expanded():
    """Found on EfficientNetB0: without its padding, which moves to the front, 5x5 does not fit into 4x4 pixels."""
    inputs = keras.Input((4, 4, 6))
    y = keras.layers.ReLU()(zoo.conv_norm(inputs, 12, 1))
    y = keras.layers.BatchNormalization()(keras.layers.DepthwiseConv2D(5, padding="same", use_bias=False)(y))
    x = keras.layers.Add()([inputs, zoo.conv_norm(keras.layers.ReLU()(y), 6, 1)])
    model = zoo.randomise(keras.Model(inputs, zoo.head(keras.layers.ReLU()(x))))
    x = zoo.inputs_of(model, n=60)
    (block,) = updp_tf.find_blocks(model)
    edit = Edit((block.name,), block.nodes, "conv5", {"skip": "kept"})
    graph = prepared_graph(model)
    plan = Plan(fingerprint(graph), model.name, (edit,), weights=weights_hash(graph))
    schedule = updp_tf.Schedule(total_steps=TOTAL)
    student = updp_tf.progressive(model, plan, calibration=x, mode="expanded", schedule=schedule, verbose=False)
    assert [one.mode for one in student.blending] == ["expanded"]
    np.testing.assert_array_equal(outputs(student, x[:3])[0], outputs(model, x[:3])[0])
    small = updp_tf.merge(finish(student))
    np.testing.assert_allclose(outputs(small, x[:3])[0], outputs(student, x[:3])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernels", "made"),
    [(((7, 1), (1, 1)), (7, 1)), (((1, 1), (1, 7)), (1, 7)), (((1, 7), (7, 1)), (7, 7)), (((3, 1), (5, 1)), (7, 1))],
    ids=str,
)
def test_kernels_of_one_column_stay_of_one_column(kernels, made):
    """Found on InceptionV3: conv7 in the place of a 7x1 layer is 7x1, expanded and fitted alike."""
    inputs = x = keras.Input((9, 8, 6))
    for kernel in kernels:
        x = keras.layers.ReLU()(zoo.conv_norm(x, 6, kernel))
    model = zoo.randomise(keras.Model(inputs, zoo.head(keras.layers.MaxPooling2D()(x))))
    x = zoo.inputs_of(model, n=60)
    (block,) = updp_tf.find_blocks(model)
    assert block.geometry.kernel_size == made
    form = updp_tf.forms.form_by_name("conv7")
    assert form.refuses(block, skip="folded") is None
    assert form.cost(block, skip="folded").macs == made[0] * made[1] * 6 * 6 * 9 * 8
    edit = Edit((block.name,), block.nodes, "conv7", {"skip": "folded"})
    graph = prepared_graph(model)
    plan = Plan(fingerprint(graph), model.name, (edit,), weights=weights_hash(graph))
    schedule = updp_tf.Schedule(total_steps=TOTAL)
    for mode in ("expanded", "whole"):
        student = updp_tf.progressive(model, plan, calibration=x, mode=mode, schedule=schedule, verbose=False)
        assert [one.mode for one in student.blending] == [mode]
        np.testing.assert_array_equal(outputs(student, x[:3])[0], outputs(model, x[:3])[0])
        small = updp_tf.merge(finish(student))
        np.testing.assert_allclose(outputs(small, x[:3])[0], outputs(student, x[:3])[0], rtol=1e-5, atol=1e-5)
        assert small.get_layer(f"{block.name}_merged").kernel_size == made


def test_a_layer_that_does_not_tell_its_output_shape_is_expanded():
    """Found on ConvNeXtTiny: the LayerScale of keras.applications."""
    scale = next(
        type(layer)
        for layer in keras.applications.ConvNeXtTiny(weights=None, include_top=False, input_shape=(32, 32, 3)).layers
        if type(layer).__name__ == "LayerScale"
    )
    inputs = keras.Input((7, 7, 6))
    y = keras.layers.LayerNormalization()(keras.layers.DepthwiseConv2D(7, padding="same")(inputs))
    y = keras.layers.Dense(6)(keras.layers.Activation("gelu")(keras.layers.Dense(24)(y)))
    x = keras.layers.Add()([inputs, scale(0.5, 6)(y)])
    model = zoo.randomise(keras.Model(inputs, zoo.head(x)))
    x = zoo.inputs_of(model, n=60)
    plan = updp_tf.search(model, calibration=x, budget={"merged": 1}, forms=("separable7",), verbose=False)
    schedule = updp_tf.Schedule(total_steps=TOTAL)
    student = updp_tf.progressive(model, plan, calibration=x, mode="expanded", schedule=schedule, verbose=False)
    assert [one.mode for one in student.blending] == ["expanded"]
    small = updp_tf.merge(finish(student))
    np.testing.assert_allclose(outputs(small, x[:3])[0], outputs(student, x[:3])[0], rtol=1e-5, atol=1e-5)


def test_a_form_that_the_layers_do_not_compose_to_is_blended_whole_and_says_why():
    model = zoo.build("residual")
    x = zoo.inputs_of(model, n=40)
    plan = plan_for("residual", ("separable3",))
    student = updp_tf.progressive(model, plan, calibration=x, mode="expanded", verbose=False)
    assert {one.mode for one in student.blending} == {"whole"}
    assert all("do not compose" in one.refusal.reason for one in student.blending)


def test_two_kernels_become_one_of_their_own_size_by_losing_taps():
    model = zoo.build("residual")
    x = zoo.inputs_of(model, n=40)
    student = updp_tf.progressive(
        model, plan_for("residual", ("conv3",)), calibration=x, mode="expanded", verbose=False
    )
    kinds = [type(layer) for layer in student.layers]
    assert kinds.count(TapsBlend) == len(student.blending)
    assert BorderRing in kinds


@pytest.mark.parametrize("lines", ["identity", "gaussian", "least_squares"])
def test_where_lines_start(lines):
    model = zoo.build("inverted_residuals")
    x = zoo.inputs_of(model, n=200)
    plan = plan_for("inverted_residuals", ("conv3",))
    student = updp_tf.progressive(model, plan, calibration=x, mode="expanded", lines=lines, verbose=False)
    blend = next(layer for layer in blend_layers(student) if hasattr(layer, "slope"))
    inner = keras.Model(student.inputs[0], blend.input)
    z = np.asarray(inner(x), "float64")[:, 1:-1, 1:-1].reshape(-1, blend.slope.shape[0])
    f = np.asarray(blend.layer(z.astype("float32")), "float64")
    slope, offset = np.asarray(blend.slope, "float64"), np.asarray(blend.offset, "float64")
    if lines == "identity":
        assert (slope == 1).all() and (offset == 0).all()
        return
    want = [np.polyfit(z[:, c], f[:, c], 1) if z[:, c].std() > 0 else (0, f[0, c]) for c in range(z.shape[1])]
    error = np.square(f - slope * z - offset).mean()
    best = np.square(f - np.array([a for a, _ in want]) * z - np.array([b for _, b in want])).mean()
    # the norm's own statistics are random numbers, so only the regression is as good as the best line
    assert error <= best * 1.02 if lines == "least_squares" else error > best


def test_a_trained_student_merges_to_what_it_computes(tmp_path):
    model = zoo.build("squeeze_excite")
    x = zoo.inputs_of(model, n=64)
    plan = plan_for("squeeze_excite", ("conv3",))
    student = updp_tf.progressive(model, plan, calibration=x, mode="expanded", tail="relu", verbose=False)
    student.compile(keras.optimizers.Adam(1e-3), "mse")
    y = np.asarray(model(x, training=False))
    with pytest.raises(MergeError, match="blend of .* is 1, not 0"):
        updp_tf.merge(student)
    history = student.fit(x, y, batch_size=16, epochs=4, verbose=0, callbacks=[updp_tf.BlendSchedule()])
    blends = history.history["blend"]
    assert blends[-1] == 0.0 and blends[0] == pytest.approx(0.5)
    student.save(tmp_path / "student.keras")
    for one in (student, keras.models.load_model(tmp_path / "student.keras")):
        small = updp_tf.merge(one)
        np.testing.assert_allclose(outputs(small, x)[0], outputs(student, x)[0], rtol=1e-4, atol=1e-4)


def test_blends_inside_a_distiller_and_a_fit_that_is_too_short():
    model = zoo.build("residual")
    x = zoo.inputs_of(model, n=32)
    student = updp_tf.progressive(model, plan_for("residual", ("conv3",)), calibration=x, verbose=False)
    teacher = zoo.build("residual")
    loss = keras.distillation.FeatureDistillation(loss="mse")
    distiller = keras.distillation.Distiller(teacher, student, loss, student_loss_weight=0.0)
    distiller.compile("sgd", loss="mse")
    distiller.fit(x, batch_size=8, epochs=2, verbose=0, callbacks=[updp_tf.BlendSchedule()])
    updp_tf.merge(student)
    longer = updp_tf.progressive(
        model,
        plan_for("residual", ("conv3",)),
        calibration=x,
        schedule=updp_tf.Schedule(total_steps=100, until=0.5),
        verbose=False,
    )
    longer.compile("sgd", "mse")
    y = np.asarray(model(x, training=False))
    with pytest.raises(ScheduleError, match="reaches 0 at step 50, but the training ends after 4"):
        longer.fit(x, y, batch_size=8, verbose=0, callbacks=[updp_tf.BlendSchedule()])
    longer.fit(x, y, batch_size=8, verbose=0, callbacks=[updp_tf.BlendSchedule(goes_on=True)])


def test_training_without_a_length_names_the_way_out():
    model = zoo.build("residual")
    x = zoo.inputs_of(model, n=32)
    student = updp_tf.progressive(model, plan_for("residual", ("conv3",)), calibration=x, verbose=False)
    student.compile("sgd", "mse")
    with pytest.raises(ScheduleError, match="BlendSchedule"):
        student.fit(x, np.asarray(model(x, training=False)), verbose=0)


def test_norms_need_images():
    model = zoo.build("layer_norm")
    plan = plan_for("layer_norm", SEPARABLE)
    with pytest.raises(PlanError, match="without images"):
        updp_tf.progressive(model, plan, verbose=False)
    with pytest.raises(CalibrationError, match="give calibration images"):
        updp_tf.linearize(model)


@pytest.mark.parametrize("norms", ["sigma", "batch"])
def test_a_norm_starts_close_to_what_it_was(norms):
    model = zoo.build("layer_norm")
    x = zoo.inputs_of(model, n=60)
    plan = plan_for("layer_norm", SEPARABLE)
    student = updp_tf.progressive(model, plan, calibration=x, mode="expanded", norms=norms, verbose=False)
    blend = next(one for one in blend_layers(student) if type(one).__name__ in ("NormBlend", "NormToBatch"))
    read = np.asarray(keras.Model(student.inputs[0], blend.input)(x))
    was = np.asarray(blend.layer(read))
    blend.set_total_steps(1)
    blend.step.assign(1)
    now = np.asarray(blend(read))
    read, was, now = (one.astype("float64").reshape(-1, one.shape[-1]) for one in (read, was, now))
    gamma, beta = np.asarray(blend.layer.gamma), np.asarray(blend.layer.beta)
    for channel in range(read.shape[1]):
        centred = read[:, channel] - (read.mean(1) if norms == "sigma" else 0.0)
        if norms == "sigma":  # a line through the origin, of the normalized on the centred
            (rate,), *_ = np.linalg.lstsq(centred[:, None], (was[:, channel] - beta[channel]) / gamma[channel])
            best = gamma[channel] * rate * centred + beta[channel]
        else:
            best = np.polyval(np.polyfit(centred, was[:, channel], 1), centred)
        np.testing.assert_allclose(now[:, channel], best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["layer_norm", "tokens", "vgg"])
def test_linearize_leaves_only_what_every_target_runs(name):
    model = zoo.build(name)
    x = zoo.inputs_of(model, n=40)
    student = updp_tf.linearize(model, calibration=x, schedule=updp_tf.Schedule(total_steps=1, until=1.0))
    if name == "vgg" and not student.blending:
        assert not list(blend_layers(student))
        return
    np.testing.assert_array_equal(outputs(student, x[:3])[0], outputs(model, x[:3])[0])
    for layer in blend_layers(student):
        layer.step.assign(1)
    small = updp_tf.merge(student)
    np.testing.assert_allclose(outputs(small, x[:5])[0], outputs(student, x[:5])[0], rtol=1e-4, atol=1e-4)
    left = {type(layer).__name__ for layer in small.layers}
    assert not left & {"LayerNormalization", "GroupNormalization", "RMSNormalization"}
    assert not {getattr(getattr(layer, "activation", None), "__name__", "") for layer in small.layers} & {
        "gelu",
        "silu",
    }


def test_linearize_names_what_is_not_there():
    with pytest.raises(PlanError, match="no norms named nothing"):
        updp_tf.linearize(zoo.build("layer_norm"), norms=["nothing"], activations=None)


def test_a_plain_model_is_no_student():
    with pytest.raises(MergeError, match="holds no blend layers"):
        updp_tf.merge(zoo.build("residual"))
