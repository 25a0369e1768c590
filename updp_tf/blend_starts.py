"""Where blends start: lines for activations, constants for norms and gates, told by images or by norms in front."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import keras
import numpy as np

from updp_tf import affine, rules
from updp_tf.activations import gaussian_fit
from updp_tf.errors import CalibrationError
from updp_tf.layers import (
    NO_RING,
    ActivationBlend,
    GateBlend,
    NormBlend,
    NormToBatch,
    Pads,
    gamma_and_beta_arrays,
)
from updp_tf.memory import Memory
from updp_tf.structure import ModelGraph, Node, Ref, image_shape
from updp_tf.walking import Walk, as_float32

Lines = Literal["least_squares", "gaussian", "identity"]


def start(graph: ModelGraph, images: np.ndarray | None, lines: Lines, rings: Mapping[str, Pads]) -> None:
    """Give lines, norms and gates of a graph's blends their best constants; the layers are changed in place.

    Lines per channel: the regression of f(z) on z over images (`least_squares`) or under the distribution that the
    norm in front tells (`gaussian`). Norms: the regression of the normalized on the centred input, per channel, which
    is E[c^2 / sigma] / E[c^2]. Gates: their mean.

    Args:
        graph: with blends at 1.
        images: calibration images, shape (n, height, width, channels), or None.
        lines: where activations start.
        rings: how much of the border of a tensor is no image, by the node that writes it.

    Raises:
        CalibrationError: images are needed; the message names the layer.
    """
    told: dict[str, _Sums] = {}
    for node in graph:
        layer = node.layer
        if isinstance(layer, ActivationBlend) and layer.target is None:
            if lines == "gaussian":
                _start_gaussian(graph, node)
            elif lines == "least_squares":
                told[node.name] = _Line(layer.layer)
        elif isinstance(layer, NormBlend | NormToBatch):
            told[node.name] = _Scale(layer)
        elif isinstance(layer, GateBlend):
            told[node.name] = _Mean()
    if not told:
        return
    if images is None:
        name = next(iter(told))
        raise CalibrationError(f"Where the blend '{name}' starts is told by images alone: give calibration images.")
    reads = {name: graph.by_name[name].inputs[-1] for name in told}
    nodes = [node for node in graph if not node.is_input]
    with Memory(images.nbytes) as memory:
        walk = Walk(graph, images, memory)
        for _, batch in walk.stream(nodes, tuple(reads.values()), walk.start()):
            for (name, ref), tensor in zip(reads.items(), batch, strict=True):
                top, bottom, left, right = rings.get(ref.node, NO_RING)
                if tensor.ndim == 4:
                    tensor = tensor[:, top : tensor.shape[1] - bottom, left : tensor.shape[2] - right]
                told[name].add(tensor)
    for name, sums in told.items():
        sums.write(graph.by_name[name].layer)


class _Sums(ABC):
    """Sums over all images and positions of products of two tensors, per channel."""

    def __init__(self) -> None:
        self.n = 0
        self.parts: dict[str, Any] = {}

    @abstractmethod
    def add(self, tensor: np.ndarray) -> None:
        """Add a batch of what the blend reads."""

    @abstractmethod
    def write(self, layer: Any) -> None:
        """Set the blend's weights."""

    def _sum(self, **products: np.ndarray) -> None:
        for name, product in products.items():
            flat = product.reshape(-1, product.shape[-1])
            self.parts[name] = self.parts.get(name, 0.0) + flat.sum(axis=0, dtype=np.float64)
        self.n += flat.shape[0]


class _Line(_Sums):
    """Regression of an activation on what it reads."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def add(self, tensor: np.ndarray) -> None:
        z, f = tensor.astype(np.float64), as_float32(self.function(tensor)).astype(np.float64)
        self._sum(z=z, f=f, zz=z * z, zf=z * f)

    def write(self, layer: Any) -> None:
        z, f, zz, zf = (self.parts[name] / self.n for name in ("z", "f", "zz", "zf"))
        variance = np.maximum(zz - z * z, 0.0)
        slope = np.where(variance > 1e-12 * np.maximum(zz, 1e-30), (zf - z * f) / np.maximum(variance, 1e-300), 0.0)
        layer.slope.assign(slope.astype(np.float32))
        layer.offset.assign((f - slope * z).astype(np.float32))


class _Scale(_Sums):
    """Regression of a normalization, without its gamma and beta, on its centred input."""

    def __init__(self, blend: Any) -> None:
        super().__init__()
        self.blend = blend

    def add(self, tensor: np.ndarray) -> None:
        inner = self.blend.layer
        x = tensor.astype(np.float64)
        y = as_float32(inner(tensor)).astype(np.float64)
        gamma, beta = gamma_and_beta_arrays(inner, x.shape[-1])
        centre = x.mean(axis=-1, keepdims=True) if isinstance(inner, keras.layers.LayerNormalization) else 0.0
        c, normed = x - centre, (y - beta) / np.where(gamma == 0, 1.0, gamma)
        self._sum(x=x, xx=x * x, y=y, xy=x * y, c=c, cc=c * c, n=normed, cn=c * normed)

    def write(self, layer: Any) -> None:
        mean = {name: part / self.n for name, part in self.parts.items()}
        if isinstance(layer, NormToBatch):
            self._write_batch(layer, mean)
            return
        shift = mean["c"] if layer.has_centre else 0.0
        offset = mean["n"] if layer.has_centre else 0.0
        power = mean["cc"] - shift * mean["c"]
        rate = (mean["cn"] - offset * mean["c"]) / np.maximum(power, 1e-12)
        layer.rate.assign(rate.astype(np.float32))
        if layer.has_centre:
            layer.centre.assign((shift - offset / np.where(rate == 0, 1.0, rate)).astype(np.float32))

    def _write_batch(self, layer: Any, mean: Mapping[str, np.ndarray]) -> None:
        """Statistics of the input; gamma and beta such that each channel's output is the best line in its input."""
        target = layer.target
        variance = np.maximum(mean["xx"] - mean["x"] ** 2, 0.0)
        slope = (mean["xy"] - mean["x"] * mean["y"]) / np.maximum(variance, 1e-12)
        target.moving_mean.assign(mean["x"].astype(np.float32))
        target.moving_variance.assign(variance.astype(np.float32))
        target.gamma.assign((slope * np.sqrt(variance + target.epsilon)).astype(np.float32))
        target.beta.assign(mean["y"].astype(np.float32))


class _Mean(_Sums):
    """Mean of a gate."""

    def add(self, tensor: np.ndarray) -> None:
        self._sum(gate=tensor.astype(np.float64))

    def write(self, layer: Any) -> None:
        layer.mean.assign((self.parts["gate"] / self.n).astype(np.float32))


def _start_gaussian(graph: ModelGraph, node: Node) -> None:
    """Start a line under the distribution that the norm in front of it tells."""
    moments = _moments(graph, node.inputs[0])
    function = rules.activation_of(node.layer.layer)
    if moments is None or function is None:
        raise CalibrationError(
            f"The activation '{node.name}' has no normalization in front of it that tells its input's distribution: "
            "give calibration images."
        )
    slope, offset, _ = gaussian_fit(function, *moments)
    node.layer.slope.assign(slope.astype(np.float32))
    node.layer.offset.assign(offset.astype(np.float32))


def _moments(graph: ModelGraph, ref: Ref) -> tuple[np.ndarray, np.ndarray] | None:
    """Return mean and standard deviation of a tensor as the norm in front tells them, through a linear layer too."""
    node = graph.by_name[ref.node]
    layer = node.layer
    if isinstance(layer, keras.layers.BatchNormalization):
        norm = rules.NORMS["BatchNormalization"](layer, node.shapes[0])
        return norm.mean, norm.std
    if isinstance(layer, NormBlend):
        gamma, beta = gamma_and_beta_arrays(layer.layer, int(node.shapes[0][-1] or 0))
        return beta, np.abs(gamma)
    if node.kind in ("Dense", "Conv2D") and len(node.inputs) == 1:
        (one,) = rules.LINEAR[node.kind](layer, image_shape(graph.shape(node.inputs[0])))
        before = _moments(graph, node.inputs[0])
        if before is None or not one.is_pointwise:
            return None
        kernel = affine.regroup(one, 1).kernel[0, 0]
        return before[0] @ kernel + one.bias, np.sqrt(before[1] ** 2 @ kernel**2)
    return None
