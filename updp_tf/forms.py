"""The forms a block can take: what each costs, when it refuses, how it is fitted, which layers it becomes.

Forms are free of Keras: they speak of arrays and of `LayerSpec`. `merging` builds the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from updp_tf import affine
from updp_tf.affine import AffineConv, Padding
from updp_tf.errors import FormError, ShapeError
from updp_tf.moments import Centred
from updp_tf.samples import Samples
from updp_tf.structure import Block, Cost, LayerSpec, Refusal
from updp_tf.windows import Window, weights_in

SkipMode = Literal["kept", "folded"]
Evidence = Literal["moments", "samples"]

NORM_EPSILON = 1e-3
"""Of the norm that a scale becomes: Keras' own default."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """Linear maps that replace a block's body.

    Attributes:
        maps: applied in order; empty means that nothing is left of the body.
        keeps_skip: the block's own skip is added to them, by the Add that was there.
        r2: explained part of the block's output, skip included; None where no image told it.
        dropped: part of the kernel's energy that was cropped away (starts without images only).
        border: constant map of shape (height, width, channels) that is added after them, or None: what the block's
            inner biases, which its own padding never sees, leave out at the border.
        statistics: mean and variance of each channel of the entry, each of shape (c_in,), or None where no image told
            them: a scale becomes a norm, which keeps true statistics.
    """

    maps: tuple[AffineConv, ...]
    keeps_skip: bool
    r2: float | None = None
    dropped: float = 0.0
    border: np.ndarray | None = None
    statistics: tuple[np.ndarray, np.ndarray] | None = None


def fitted_to_arrays(fitted: Fitted) -> dict[str, np.ndarray]:
    """Return fitted maps as named arrays; `fitted_from_arrays` reads them back."""
    arrays = {"keeps_skip": np.array(fitted.keeps_skip)}
    if fitted.border is not None:
        arrays["border"] = fitted.border
    if fitted.statistics is not None:
        arrays["mean"], arrays["variance"] = fitted.statistics
    for index, one in enumerate(fitted.maps):
        arrays[f"{index}/kernel"] = one.kernel
        arrays[f"{index}/bias"] = one.bias
        arrays[f"{index}/geometry"] = np.array([*one.strides, *one.dilation_rate, one.groups, *one.padding])
    return arrays


def fitted_from_arrays(arrays: Mapping[str, np.ndarray], *, r2: float | None) -> Fitted:
    """Return the maps that `fitted_to_arrays` wrote."""
    maps: list[AffineConv] = []
    while f"{len(maps)}/kernel" in arrays:
        part = f"{len(maps)}"
        geometry = [int(value) for value in arrays[f"{part}/geometry"]]
        maps.append(
            AffineConv(
                arrays[f"{part}/kernel"],
                arrays[f"{part}/bias"],
                strides=(geometry[0], geometry[1]),
                dilation_rate=(geometry[2], geometry[3]),
                groups=geometry[4],
                padding=(geometry[5], geometry[6], geometry[7], geometry[8]),
            )
        )
    statistics = (arrays["mean"], arrays["variance"]) if "mean" in arrays else None
    border = arrays.get("border")
    return Fitted(tuple(maps), bool(arrays["keeps_skip"]), r2, border=border, statistics=statistics)


@runtime_checkable
class Form(Protocol):
    """A form: a frozen value with a name. Register your own with `register_form`."""

    @property
    def name(self) -> str:
        """Unique name, as plans and tables show it."""

    def refuses(self, block: Block, *, skip: SkipMode) -> Refusal | None:
        """Why the block cannot take this form, or None."""

    def cost(self, block: Block, *, skip: SkipMode) -> Cost:
        """What the form costs in the block's place, a kept projection included."""

    def window(self, block: Block) -> Window | None:
        """The input pixels that it reads for an output pixel, or None if it needs no fit."""

    def sketch(self, block: Block, *, skip: SkipMode) -> Fitted:
        """Maps of the geometry that a fit would give, with random weights: what is timed before anything is fitted."""

    @property
    def evidence(self) -> Evidence:
        """What it is fitted to: `moments` for a linear regression, `samples` for everything else."""

    def fit(self, block: Block, evidence: Centred | Samples | None, *, skip: SkipMode, ridge: float) -> Fitted:
        """Fit by least squares to moments or samples of the form's own window."""

    def from_maps(
        self, block: Block, maps: Sequence[AffineConv], *, skip: SkipMode, exact_border: bool = False
    ) -> Fitted | Refusal:
        """Take over a linear map of the body that was found without images, border pixels too where asked."""


def kernel_within(kernel_size: int, own: Sequence[int]) -> tuple[int, int]:
    """Return the kernel that a form of size k has in a block: k x k, but nowhere larger than the block's own.

    What stands for a 7x1 layer is 7x1, not 7x7: a form never reads more than its block does.
    """
    return min(kernel_size, own[0]), min(kernel_size, own[1])


def _kernel_in(block: Block, kernel_size: int) -> tuple[int, int]:
    return kernel_within(kernel_size, (kernel_size,) * 2 if block.geometry is None else block.geometry.kernel_size)


def window_of_size(block: Block, kernel_size: int) -> Window | None:
    """Return the window of the kernel that a form of size k has, centred where the block's composed kernel is.

    Taking taps away from both sides of the composed kernel takes as much from its padding, so that outputs keep
    their number and place at every image size. None where that would need negative padding.
    """
    if block.geometry is None:
        return None
    kernel = _kernel_in(block, kernel_size)
    pads: list[int] = []
    for axis in (0, 1):
        surplus = block.geometry.kernel_size[axis] - kernel[axis]
        before = block.geometry.padding[2 * axis] - surplus // 2
        after = block.geometry.padding[2 * axis + 1] - (surplus - surplus // 2)
        size, written = block.entry_size[axis], block.exit_size[axis]
        if before < 0 or after < 0:
            if size is None or written is None:
                return None
            before, after = max(before, 0), max(after, 0)
            if (size + before + after - kernel[axis]) // block.geometry.strides[axis] + 1 != written:
                return None
        pads += [before, after]
    return Window(kernel, block.geometry.strides, (pads[0], pads[1], pads[2], pads[3]))


def _refuse_window(block: Block, name: str, kernel_size: int) -> Refusal | None:
    """Say why no kernel of this size can stand for the block, or None."""
    if block.geometry is None:
        refusal = block.geometry_refusal
        return Refusal(block.name, name, refusal.reason if refusal else "no window of its entry is known")
    if kernel_size > 1 and block.rank != 4:
        return Refusal(block.name, name, f"it reads {'tokens' if block.rank == 3 else 'vectors'}, not images")
    if kernel_size > max(block.geometry.kernel_size):
        own = _by(block.geometry.kernel_size)
        return Refusal(block.name, name, f"the block itself reads {own} pixels, less than the form")
    if window_of_size(block, kernel_size) is None:
        size = _by(_kernel_in(block, kernel_size))
        return Refusal(block.name, name, f"a {size} kernel would need negative padding to stay aligned")
    return None


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _positions(block: Block) -> int:
    height, width = block.exit_size
    return (height or 1) * (width or 1)


def _cost(
    block: Block, weights: int, biases: int, inner_bytes: int, *, window: Window | None, keeps_skip: bool
) -> Cost:
    """Return what layers of one window cost in the block's place; activation bytes are an upper bound.

    The input stays alive all the while, as if others read it.
    """
    exit_bytes = 4 * _positions(block) * block.c_out
    kept = block.skip_cost if keeps_skip else Cost()
    padded = _padded_bytes(block, window)
    running = max(padded + (inner_bytes or exit_bytes), inner_bytes + exit_bytes)
    # The Add reads the form's output and the skip's, and writes a third; an identity's is the input.
    adding = exit_bytes * ((3 if block.skip_kind == "projection" else 2) if keeps_skip else 1)
    return Cost(
        macs=weights * _positions(block) + kept.macs,
        params=weights + biases + kept.params,
        activation_bytes=block.live_bytes + max(running, adding),
    )


def cost_of_fitted(form: Form, block: Block, fitted: Fitted, *, skip: SkipMode) -> Cost:
    """Return what a form costs with the maps it was fitted to: a border is one more tensor written."""
    return with_border(form.cost(block, skip=skip), block, fitted)


def with_border(cost: Cost, block: Block, fitted: Fitted) -> Cost:
    """Return the cost of a form with that of the border it was fitted with, if any."""
    if fitted.border is None:
        return cost
    adding = block.live_bytes + 2 * 4 * _positions(block) * block.c_out
    return replace(cost, activation_bytes=max(cost.activation_bytes, adding))


def _padded_bytes(block: Block, window: Window | None) -> int:
    """Bytes that a padding layer writes, 0 where the convolution pads by itself."""
    if window is None or not any(window.padding):
        return 0
    if _is_same(window.kernel_size, (1, 1), window.strides, window.padding):
        return 0
    height, width = ((n or 1) + sum(window.padding[2 * i : 2 * i + 2]) for i, n in enumerate(block.entry_size))
    return 4 * height * width * block.c_in


def explained_by(block: Block, fitted: Fitted, samples: Samples) -> float | None:
    """Return R^2 of fitted maps on samples of their window, None where the window does not show the kept skip."""
    if fitted.keeps_skip and block.skip is not None and samples.window.skip_tap is None:
        return None
    predicted = np.zeros((samples.n, samples.c_out))
    if fitted.keeps_skip and block.skip is not None:
        predicted += samples.skip(block.skip)
    if len(fitted.maps) == 1:
        predicted += samples.convolve(fitted.maps[0])
    elif fitted.maps:
        depthwise, pointwise = fitted.maps
        predicted += (samples.convolve(depthwise) @ pointwise.kernel[0, 0]) + pointwise.bias
    return samples.explained(predicted)


@dataclass(frozen=True)
class ConvForm:
    """One dense k x k convolution (`kernel_within` says which axis is shorter); the skip is folded in or kept.

    With k = 1 it is the form `pointwise`: a 1x1 convolution, or a Dense layer on tokens and vectors.
    """

    kernel_size: int

    @property
    def name(self) -> str:
        """`pointwise`, or `conv` and the kernel size."""
        return "pointwise" if self.kernel_size == 1 else f"conv{self.kernel_size}"

    def refuses(self, block: Block, *, skip: SkipMode) -> Refusal | None:
        """Refuse where the kernel cannot be aligned, or where the skip's pixel lies outside it."""
        refusal = _refuse_window(block, self.name, self.kernel_size)
        if refusal is not None or block.skip is None:
            return refusal
        window = self.window(block)
        if window is None or window.skip_tap is None:
            return Refusal(block.name, self.name, "the pixel that the skip reads lies outside its kernel")
        if block.skip.strides != window.strides:
            return Refusal(block.name, self.name, f"its skip has strides {block.skip.strides}, not {window.strides}")
        return None

    def cost(self, block: Block, *, skip: SkipMode) -> Cost:
        """K * k * c_in * c_out weights and a bias."""
        height, width = _kernel_in(block, self.kernel_size)
        weights = height * width * block.c_in * block.c_out
        keeps_skip = skip == "kept" and block.skip is not None
        return _cost(block, weights, block.c_out, 0, window=self.window(block), keeps_skip=keeps_skip)

    def window(self, block: Block) -> Window | None:
        """The kernel's own window."""
        return window_of_size(block, self.kernel_size)

    def sketch(self, block: Block, *, skip: SkipMode) -> Fitted:
        """A dense kernel."""
        window = _window_or_raise(self, block)
        rng = np.random.default_rng(0)
        weights = _random(rng, window.n_taps * block.c_in, block.c_out)
        maps = (_as_map(window, weights, _random(rng, 1, block.c_out)[0]),)
        return Fitted(maps, keeps_skip=skip == "kept" and block.skip is not None)

    @property
    def evidence(self) -> Evidence:
        """Moments."""
        return "moments"

    def fit(self, block: Block, evidence: Centred | Samples | None, *, skip: SkipMode, ridge: float) -> Fitted:
        """Ridge regression of the output on patches, drawn towards the skip."""
        if evidence is None:
            raise FormError(f"'{self.name}' is fitted to images: give calibration images.")
        window = evidence.window
        prior = None if block.skip is None else weights_in(window, block.skip)
        r2: float | None = None
        if isinstance(evidence, Centred):
            weights = evidence.ridge_regression(prior=prior, ridge=ridge)
            bias, r2 = evidence.bias_of(weights), evidence.explained(weights)
        else:
            weights, bias = evidence.ridge_regression(prior=prior, ridge=ridge)
        keeps_skip = skip == "kept" and prior is not None
        body = weights - prior if keeps_skip and prior is not None else weights
        if keeps_skip and block.skip is not None:
            bias = bias - block.skip.bias
        fitted = Fitted((_as_map(window, body, bias),), keeps_skip, r2)
        return replace(fitted, r2=explained_by(block, fitted, evidence)) if isinstance(evidence, Samples) else fitted

    def from_maps(
        self, block: Block, maps: Sequence[AffineConv], *, skip: SkipMode, exact_border: bool = False
    ) -> Fitted | Refusal:
        """Compose the maps, padding moved to the front, and crop the kernel to k.

        With `exact_border` the maps are composed as they are: a constant map makes up for the inner biases that their
        own padding never sees. That needs a fixed size, a kernel that is not cropped, and 1x1 maps before the padding.
        """
        geometry = affine.composed_geometry(maps)
        if max(geometry.kernel_size) < self.kernel_size:
            return Refusal(block.name, self.name, f"its own kernel is {geometry.kernel_size}, smaller than the form")
        wanted = kernel_within(self.kernel_size, geometry.kernel_size)
        border: np.ndarray | None = None
        dropped = 0.0
        try:
            if exact_border:
                cropped, border = self._with_border(block, maps)
            else:
                composed = affine.regroup(affine.compose_all(affine.move_padding_to_front(maps)), 1)
                cropped, dropped = affine.crop_kernel(composed, wanted)
        except ShapeError as error:
            return Refusal(block.name, self.name, str(error))
        keeps_skip = skip == "kept" and block.skip is not None
        if block.skip is not None and not keeps_skip:
            cropped = fold_skip(cropped, block.skip)
        return Fitted((cropped,), keeps_skip, None, dropped, border)

    def _with_border(self, block: Block, maps: Sequence[AffineConv]) -> tuple[AffineConv, np.ndarray]:
        height, width = block.entry_size
        if height is None or width is None:
            raise ShapeError("an exact border needs a fixed size; the block's is dynamic")
        composed, border = affine.compose_with_border_map(maps, height, width)
        if composed.kernel_size != kernel_within(self.kernel_size, composed.kernel_size):
            raise ShapeError(f"an exact border needs the composed kernel {composed.kernel_size}, uncropped")
        return affine.regroup(composed, 1), border


@dataclass(frozen=True)
class SeparableForm:
    """A depthwise k x k and a pointwise convolution; a skip stays as an Add."""

    kernel_size: int

    @property
    def name(self) -> str:
        """`separable` and the kernel size."""
        return f"separable{self.kernel_size}"

    def refuses(self, block: Block, *, skip: SkipMode) -> Refusal | None:
        """Refuse where the kernel cannot be aligned."""
        refusal = _refuse_window(block, self.name, self.kernel_size)
        if refusal is not None or block.skip is None:
            return refusal
        window = self.window(block)
        if window is None or window.skip_tap is None:
            return Refusal(block.name, self.name, "the pixel that the skip reads lies outside its kernel")
        return None

    def cost(self, block: Block, *, skip: SkipMode) -> Cost:
        """K * k * c_in depthwise and c_in * c_out pointwise weights, and a bias."""
        height, width = _kernel_in(block, self.kernel_size)
        weights = height * width * block.c_in + block.c_in * block.c_out
        inner = 4 * _positions(block) * block.c_in
        return _cost(block, weights, block.c_out, inner, window=self.window(block), keeps_skip=block.skip is not None)

    def window(self, block: Block) -> Window | None:
        """The depthwise kernel's window."""
        return window_of_size(block, self.kernel_size)

    def sketch(self, block: Block, *, skip: SkipMode) -> Fitted:
        """A depthwise and a pointwise kernel."""
        window = _window_or_raise(self, block)
        rng = np.random.default_rng(0)
        depthwise = _depthwise_map(window, _random(rng, window.n_taps, block.c_in))
        pointwise = AffineConv(_random(rng, block.c_in, block.c_out)[None, None], _random(rng, 1, block.c_out)[0])
        return Fitted((depthwise, pointwise), keeps_skip=block.skip is not None)

    @property
    def evidence(self) -> Evidence:
        """Samples: the fit is bilinear."""
        return "samples"

    def fit(self, block: Block, evidence: Centred | Samples | None, *, skip: SkipMode, ridge: float) -> Fitted:
        """Alternating least squares of (output - skip) on depthwise patches."""
        if not isinstance(evidence, Samples):
            raise FormError(f"'{self.name}' is fitted to images: give calibration images.")
        skipped = 0.0 if block.skip is None else evidence.skip(block.skip)
        depthwise, pointwise, bias = evidence.fit_depthwise_pointwise(evidence.outputs - skipped, ridge=ridge)
        first = _depthwise_map(evidence.window, depthwise)
        fitted = Fitted((first, AffineConv(pointwise[None, None], bias)), block.skip is not None)
        return replace(fitted, r2=explained_by(block, fitted, evidence))

    def from_maps(
        self, block: Block, maps: Sequence[AffineConv], *, skip: SkipMode, exact_border: bool = False
    ) -> Fitted | Refusal:
        """Refused: a separable map is not what a block's own layers compose to."""
        return Refusal(block.name, self.name, "needs calibration images: it is only fitted")


@dataclass(frozen=True)
class ScaleForm:
    """One scale and one offset per channel; an identity skip is a part of them.

    It becomes a BatchNormalization with the true statistics of what it reads: the one stock layer of any rank whose
    scale and offset are trainable, and which a `.tflite` file holds as one MUL and one ADD, or as nothing where the
    layer in front absorbs it.
    """

    name: str = "scale"

    def refuses(self, block: Block, *, skip: SkipMode) -> Refusal | None:
        """Refuse a block that changes shape."""
        if (refusal := _refuse_window(block, self.name, 1)) is not None:
            return refusal
        window = self.window(block)
        if block.entry_shape != block.exit_shape or window != Window((1, 1), (1, 1), (0, 0, 0, 0)):
            return Refusal(block.name, self.name, "its entry and its exit have other shapes")
        return None

    def cost(self, block: Block, *, skip: SkipMode) -> Cost:
        """No multiplication that counts as one, and four numbers per channel: a norm's."""
        exit_bytes = 4 * _positions(block) * block.c_out
        return Cost(0, 4 * block.c_out, block.live_bytes + exit_bytes)

    def window(self, block: Block) -> Window | None:
        """A pixel."""
        return window_of_size(block, 1)

    def sketch(self, block: Block, *, skip: SkipMode) -> Fitted:
        """A scale and an offset that are not those of the identity."""
        rng = np.random.default_rng(0)
        map = affine.from_scale(1 + _random(rng, 1, block.c_in)[0], _random(rng, 1, block.c_in)[0])
        return Fitted((map,), keeps_skip=False, statistics=(np.zeros(block.c_in), np.ones(block.c_in)))

    @property
    def evidence(self) -> Evidence:
        """Moments."""
        return "moments"

    def fit(self, block: Block, evidence: Centred | Samples | None, *, skip: SkipMode, ridge: float) -> Fitted:
        """Ridge regression of each channel on itself, drawn towards the skip."""
        if not isinstance(evidence, Centred):
            raise FormError(f"'{self.name}' is fitted to images: give calibration images.")
        prior = 1.0 if block.skip_kind == "identity" else 0.0
        scale = evidence.scale_regression(prior=prior, ridge=ridge)
        weights = np.diag(scale)
        map = affine.from_scale(scale, evidence.bias_of(weights))
        statistics = (evidence.mean_x, np.maximum(np.diag(evidence.gram), 0.0))
        return Fitted((map,), False, evidence.explained(weights), statistics=statistics)

    def from_maps(
        self, block: Block, maps: Sequence[AffineConv], *, skip: SkipMode, exact_border: bool = False
    ) -> Fitted | Refusal:
        """Refused: a block's own layers mix channels."""
        return Refusal(block.name, self.name, "needs calibration images: it is only fitted")


@dataclass(frozen=True)
class RemoveForm:
    """Nothing: only the block's own skip is left."""

    name: str = "remove"

    def refuses(self, block: Block, *, skip: SkipMode) -> Refusal | None:
        """Refuse a block without a skip."""
        if block.skip is None:
            return Refusal(block.name, self.name, "it has no skip that could stay")
        return None

    def cost(self, block: Block, *, skip: SkipMode) -> Cost:
        """What the projection costs; nothing for an identity."""
        written = 4 * _positions(block) * block.c_out if block.skip_kind == "projection" else 0
        return Cost(block.skip_cost.macs, block.skip_cost.params, block.live_bytes + written)

    def window(self, block: Block) -> Window | None:
        """A 1x1 window where it can be had, so that R^2 can be told."""
        return window_of_size(block, 1)

    def sketch(self, block: Block, *, skip: SkipMode) -> Fitted:
        """Nothing but the skip."""
        return Fitted((), keeps_skip=True)

    @property
    def evidence(self) -> Evidence:
        """Samples: they tell what the skip alone explains."""
        return "samples"

    def fit(self, block: Block, evidence: Centred | Samples | None, *, skip: SkipMode, ridge: float) -> Fitted:
        """There is nothing to fit."""
        return Fitted((), keeps_skip=True)

    def from_maps(
        self, block: Block, maps: Sequence[AffineConv], *, skip: SkipMode, exact_border: bool = False
    ) -> Fitted | Refusal:
        """Nothing is taken over; without images nobody knows what it costs."""
        return Refusal(block.name, self.name, "needs calibration images: nothing else tells what the block does")


def _window_or_raise(form: Form, block: Block) -> Window:
    window = form.window(block)
    if window is None:
        raise FormError(f"'{block.name}' has no window for {form.name}.")
    return window


def _random(rng: np.random.Generator, n_in: int, n_out: int) -> np.ndarray:
    """Random weights of shape (n_in, n_out) that neither blow values up nor let them vanish."""
    return rng.standard_normal((n_in, n_out)) / np.sqrt(max(n_in, 4))


def _depthwise_map(window: Window, weights: np.ndarray) -> AffineConv:
    """Return the map of one kernel per channel, weights of shape (taps, c_in), without a bias."""
    return affine.from_depthwise(
        weights.reshape(*window.kernel_size, -1, 1),
        np.zeros(weights.shape[1]),
        strides=window.strides,
        padding=window.padding,
    )


def _as_map(window: Window, weights: np.ndarray, bias: np.ndarray) -> AffineConv:
    kernel = weights.reshape(*window.kernel_size, -1, weights.shape[-1])
    return AffineConv(kernel, bias, strides=window.strides, padding=window.padding)


def fold_skip(map: AffineConv, skip: AffineConv) -> AffineConv:
    """Return `map(x) + skip(x)` as one map."""
    if affine.is_identity(skip):
        return affine.add_identity_skip(map)
    return affine.add_projection_skip(map, affine.regroup(skip, 1))


def explains_all_of(larger: Form, smaller: Form, block: Block) -> bool:
    """True if every map of the smaller form is one of the larger's too, so that its fit cannot be better."""
    if isinstance(larger, ScaleForm):  # of 1, where the skip that is left by removing is the identity
        return isinstance(smaller, RemoveForm) and block.skip_kind == "identity"
    if not isinstance(larger, ConvForm) or larger == smaller:
        return False
    if isinstance(smaller, ConvForm | SeparableForm):
        return smaller.kernel_size <= larger.kernel_size
    return isinstance(smaller, RemoveForm | ScaleForm)


_registry: dict[str, Form] = {}


def register_form(form: Form) -> Form:
    """Add a form, so that `prune` and `search` consider it.

    Raises:
        FormError: it is no value with the methods of `Form`, or its name is taken.
    """
    if isinstance(form, type) or not isinstance(form, Form):
        raise FormError(f"{form!r} is a class, or lacks a method of `updp_tf.forms.Form`.")
    if form.name in _registry:
        raise FormError(f"A form named '{form.name}' is registered already; choose another name.")
    _registry[form.name] = form
    return form


def all_forms() -> tuple[Form, ...]:
    """The registered forms, built-ins first."""
    return tuple(_registry.values())


def form_by_name(name: str) -> Form:
    """Return a registered form.

    Raises:
        FormError: no form has that name.
    """
    if name not in _registry:
        raise FormError(f"No form is named '{name}'; the forms are: {', '.join(_registry)}.")
    return _registry[name]


BUILT_IN: tuple[Form, ...] = (
    ConvForm(3),
    ConvForm(5),
    ConvForm(7),
    SeparableForm(3),
    SeparableForm(5),
    SeparableForm(7),
    ConvForm(1),
    ScaleForm(),
    RemoveForm(),
)
for _form in BUILT_IN:
    register_form(_form)


def scale_spec(map: AffineConv, name: str, statistics: tuple[np.ndarray, np.ndarray] | None) -> LayerSpec:
    """Return the BatchNormalization of a map of each channel to itself, as data.

    Its statistics are those of what it reads, so that training may go on and statistics be re-estimated.
    """
    scale, shift = map.kernel[0, 0, 0], map.bias
    mean, variance = statistics or (np.zeros_like(scale), np.ones_like(scale))
    weights = (scale * np.sqrt(variance + NORM_EPSILON), shift + scale * mean, mean, variance)
    config = {"epsilon": NORM_EPSILON, "name": name}
    return LayerSpec("BatchNormalization", config, tuple(one.astype(np.float32) for one in weights))


def layer_specs(map: AffineConv, name: str, *, rank: int = 4) -> Iterator[LayerSpec]:
    """Yield the Keras layers of one linear map, as data: padding where the convolution has no word for it, and itself.

    Args:
        map: any map that Keras can run; strides and dilation over 1 together are written out.
        name: of the convolution.
        rank: of the tensors: on tokens and vectors a 1x1 convolution is a Dense layer.

    Raises:
        ShapeError: a map of a window on tensors that are no images.
    """
    if rank != 4:
        if not map.is_pointwise:
            raise ShapeError(f"{map!r} reads images, not tensors of rank {rank}.")
        kernel, bias = affine.regroup(map, 1).kernel[0, 0].astype(np.float32), map.bias.astype(np.float32)
        yield LayerSpec("Dense", {"units": map.c_out, "name": name}, (kernel, bias))
        return
    if max(map.strides) > 1 and max(map.dilation_rate) > 1:
        map = affine.write_out_dilation(map)
    padding = "same" if _is_same(map.kernel_size, map.dilation_rate, map.strides, map.padding) else "valid"
    if padding == "valid" and any(map.padding):
        top, bottom, left, right = map.padding
        yield LayerSpec("ZeroPadding2D", {"padding": ((top, bottom), (left, right)), "name": f"{name}_pad"})
    kernel, bias = map.kernel.astype(np.float32), map.bias.astype(np.float32)
    config: dict[str, object] = {
        "kernel_size": map.kernel_size,
        "strides": map.strides,
        "dilation_rate": map.dilation_rate,
        "padding": padding,
        "name": name,
    }
    if map.groups > 1 and map.groups == map.c_in:
        depthwise = kernel.reshape(*map.kernel_size, map.c_in, -1)
        config["depth_multiplier"] = depthwise.shape[-1]
        if not bias.any():  # the pointwise layer behind it has one
            yield LayerSpec("DepthwiseConv2D", {**config, "use_bias": False}, (depthwise,))
            return
        yield LayerSpec("DepthwiseConv2D", config, (depthwise, bias))
        return
    yield LayerSpec("Conv2D", {**config, "filters": map.c_out, "groups": map.groups}, (kernel, bias))


def _is_same(
    kernel_size: tuple[int, int], dilation_rate: tuple[int, int], strides: tuple[int, int], padding: Padding
) -> bool:
    """True if Keras' padding='same' pads exactly this at every image size."""
    if strides != (1, 1):
        return False
    extents = [d * (k - 1) for d, k in zip(dilation_rate, kernel_size, strict=True)]
    expected = tuple(pad for extent in extents for pad in (extent // 2, extent - extent // 2))
    return any(expected) and padding == expected
