"""Linear maps on images and their exact algebra: float64 NumPy, no Keras.

An `AffineConv` is a convolution with a bias. Depthwise, grouped, dilated and pointwise convolutions, Dense, a
normalization at inference, a scale, zero padding, an identity skip and a projection skip are all cases of it. Images
are (batch, height, width, channels), kernels (height, width, c_in // groups, c_out), as in Keras.

The trap of the whole project is padding between two maps: a `second` that pads meets 0 outside the image, where the
composed map shows it what `first` makes of zeros. `compose` agrees in the interior; `padding_is_exact` says whether it
agrees at the border, `compose_with_border_map` makes it agree where that is possible, and `move_padding_to_front`
changes the network into one that composes exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd

import numpy as np

from updp_tf.errors import ShapeError

Padding = tuple[int, int, int, int]

NO_PADDING: Padding = (0, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class AffineConv:
    """The map `y = bias + conv_valid(zero_pad(x), kernel)`.

    Groups are ordered as in Keras: output channels `[g * c_out // groups, (g + 1) * c_out // groups)` read input
    channels `[g * c_in // groups, (g + 1) * c_in // groups)`.

    Attributes:
        kernel: shape (kh, kw, c_in // groups, c_out), made float64 and read-only.
        bias: shape (c_out,), made float64 and read-only.
        strides: vertical, horizontal.
        dilation_rate: distance of neighbouring taps, vertical, horizontal.
        groups: number of independent channel groups.
        padding: rows and columns of zeros at the top, bottom, left and right.

    Raises:
        ShapeError: the arrays and numbers do not describe a convolution.

    Example:
        >>> AffineConv(np.ones((3, 3, 2, 4)), np.zeros(4), padding=(1, 1, 1, 1))
        AffineConv(3x3, 2 -> 4 channels, padding (1, 1, 1, 1))
    """

    kernel: np.ndarray
    bias: np.ndarray
    strides: tuple[int, int] = (1, 1)
    dilation_rate: tuple[int, int] = (1, 1)
    groups: int = 1
    padding: Padding = NO_PADDING

    def __post_init__(self) -> None:
        kernel, bias = _read_only(self.kernel), _read_only(self.bias)
        if kernel.ndim != 4 or 0 in kernel.shape:
            raise ShapeError(
                f"A kernel has shape (height, width, c_in // groups, c_out), none of them 0. Received: {kernel.shape}"
            )
        if bias.shape != kernel.shape[3:]:
            raise ShapeError(
                f"The bias of a kernel of shape {kernel.shape} has shape {kernel.shape[3:]}. Received: {bias.shape}"
            )
        (groups,) = _integers((self.groups,), name="groups", length=1, least=1)
        if kernel.shape[3] % groups:
            raise ShapeError(f"`groups` must divide the {kernel.shape[3]} output channels. Received: groups={groups}")
        object.__setattr__(self, "kernel", kernel)
        object.__setattr__(self, "bias", bias)
        object.__setattr__(self, "groups", groups)
        for name, length, least in (("strides", 2, 1), ("dilation_rate", 2, 1), ("padding", 4, 0)):
            object.__setattr__(self, name, _integers(getattr(self, name), name=name, length=length, least=least))

    def __repr__(self) -> str:
        height, width = self.kernel_size
        facts = [f"{height}x{width}", f"{self.c_in} -> {self.c_out} channels"]
        facts += [f"strides {self.strides}"] if self.strides != (1, 1) else []
        facts += [f"dilation_rate {self.dilation_rate}"] if self.dilation_rate != (1, 1) else []
        facts += [f"groups {self.groups}"] if self.groups != 1 else []
        facts += [f"padding {self.padding}"] if self.pads else []
        return f"AffineConv({', '.join(facts)})"

    @property
    def c_in(self) -> int:
        """Channels read."""
        return int(self.kernel.shape[2]) * self.groups

    @property
    def c_out(self) -> int:
        """Channels written."""
        return int(self.kernel.shape[3])

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Taps vertically and horizontally."""
        return int(self.kernel.shape[0]), int(self.kernel.shape[1])

    @property
    def effective_size(self) -> tuple[int, int]:
        """Rows and columns the kernel spans with its dilation."""
        height, width = ((k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation_rate, strict=True))
        return height, width

    @property
    def pads(self) -> bool:
        """True if any side is padded."""
        return self.padding != NO_PADDING

    @property
    def is_pointwise(self) -> bool:
        """True for a 1x1 kernel with stride 1 and no padding: a matrix on the channels of each pixel."""
        return self.kernel_size == (1, 1) and self.strides == (1, 1) and not self.pads


@dataclass(frozen=True)
class Geometry:
    """What a map reads of an image, apart from its weights; dilation is written out."""

    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: Padding


# Making maps


def identity(channels: int) -> AffineConv:
    """Return the map that changes nothing, as a depthwise 1x1 convolution."""
    return from_scale(np.ones(channels), np.zeros(channels))


def from_scale(scale: np.ndarray, shift: np.ndarray) -> AffineConv:
    """Return `scale * x + shift`, both of shape (channels,), as a depthwise 1x1 convolution.

    Raises:
        ShapeError: `scale` is no vector.
    """
    scale = np.asarray(scale, dtype=np.float64)
    if scale.ndim != 1:
        raise ShapeError(f"`scale` must have shape (channels,). Received: shape {scale.shape}")
    return AffineConv(scale.reshape(1, 1, 1, -1), shift, groups=scale.size)


def from_dense(kernel: np.ndarray, bias: np.ndarray) -> AffineConv:
    """Return a Dense layer on the channel axis, kernel (c_in, c_out) and bias (c_out,), as a 1x1 convolution.

    Raises:
        ShapeError: `kernel` is no matrix.
    """
    kernel = np.asarray(kernel, dtype=np.float64)
    if kernel.ndim != 2:
        raise ShapeError(f"The kernel of a Dense layer has shape (c_in, c_out). Received: shape {kernel.shape}")
    return AffineConv(kernel[None, None], bias)


def from_depthwise(
    kernel: np.ndarray,
    bias: np.ndarray,
    *,
    strides: tuple[int, int] = (1, 1),
    dilation_rate: tuple[int, int] = (1, 1),
    padding: Padding = NO_PADDING,
) -> AffineConv:
    """Return a Keras depthwise convolution as a grouped one.

    Args:
        kernel: shape (kh, kw, channels, multiplier).
        bias: shape (channels * multiplier,); output channel `c * multiplier + m` reads input channel `c`.
        strides: vertical, horizontal.
        dilation_rate: vertical, horizontal.
        padding: top, bottom, left, right.

    Raises:
        ShapeError: `kernel` is not of rank 4, or `bias` does not fit.
    """
    kernel = np.asarray(kernel, dtype=np.float64)
    if kernel.ndim != 4:
        raise ShapeError(f"A depthwise kernel has shape (kh, kw, channels, multiplier). Received: {kernel.shape}")
    height, width, channels, multiplier = kernel.shape
    return AffineConv(
        kernel.reshape(height, width, 1, channels * multiplier),
        bias,
        strides=strides,
        dilation_rate=dilation_rate,
        groups=channels,
        padding=padding,
    )


def from_padding(channels: int, padding: Padding) -> AffineConv:
    """Return zero padding (top, bottom, left, right) alone: an identity that pads."""
    return replace(identity(channels), padding=padding)


def is_identity(conv: AffineConv) -> bool:
    """Return whether a map is written as the identity: one 1 per channel, nothing else."""
    if conv.strides != (1, 1) or conv.kernel_size != (1, 1) or conv.pads or conv.c_in != conv.c_out:
        return False
    return conv.groups == conv.c_in and bool(np.all(conv.kernel == 1.0)) and not conv.bias.any()


# Using maps


def output_size(conv: AffineConv, height: int, width: int) -> tuple[int, int]:
    """Return the height and width of the output for an input of `height` x `width`.

    Raises:
        ShapeError: the padded input is smaller than the kernel.
    """
    top, bottom, left, right = conv.padding
    rows, columns = height + top + bottom - conv.effective_size[0], width + left + right - conv.effective_size[1]
    if rows < 0 or columns < 0:
        raise ShapeError(
            f"An input of {(height, width)} with padding {conv.padding} is smaller than the kernel, "
            f"which spans {conv.effective_size}."
        )
    return rows // conv.strides[0] + 1, columns // conv.strides[1] + 1


def apply(conv: AffineConv, x: np.ndarray) -> np.ndarray:
    """Return the map's output in float64.

    Args:
        conv: the map.
        x: images of shape (batch, height, width, c_in).

    Returns:
        Shape (batch, height', width', c_out).

    Raises:
        ShapeError: `x` is not of rank 4, has other channels, or is smaller than the kernel.

    Example:
        >>> box = AffineConv(np.ones((2, 2, 1, 1)), np.zeros(1))
        >>> apply(box, np.arange(9.0).reshape(1, 3, 3, 1))[0, :, :, 0]
        array([[ 8., 12.],
               [20., 24.]])
    """
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 4 or x.shape[3] != conv.c_in:
        raise ShapeError(f"Images must have shape (batch, height, width, {conv.c_in}). Received: {x.shape}")
    rows, columns = output_size(conv, x.shape[1], x.shape[2])
    top, bottom, left, right = conv.padding
    if conv.pads:
        x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.strides, conv.dilation_rate
    groups, per_group = conv.groups, conv.c_in // conv.groups
    taps = conv.kernel.reshape(kh, kw, per_group, groups, -1).transpose(0, 1, 3, 2, 4)
    out = np.zeros((x.shape[0] * rows * columns, groups, conv.c_out // groups))
    # One product per tap: a seventh of the memory of gathered patches at 7x7, and each is a matrix product.
    for i in range(kh):
        for j in range(kw):
            seen = x[:, i * dh :: sh, j * dw :: sw][:, :rows, :columns].reshape(-1, groups, per_group)
            if per_group == 1:
                out += seen * taps[i, j, :, 0]
            else:
                out += (seen.transpose(1, 0, 2) @ taps[i, j]).transpose(1, 0, 2)
    return out.reshape(x.shape[0], rows, columns, conv.c_out) + conv.bias


def macs(conv: AffineConv, height: int, width: int) -> int:
    """Return the multiply-accumulates for one image of `height` x `width` (the input's size)."""
    rows, columns = output_size(conv, height, width)
    return rows * columns * conv.kernel.size


# The same map, written differently


def write_out_dilation(conv: AffineConv) -> AffineConv:
    """Return the same map with dilation 1: zeros stand between the taps of the kernel."""
    if conv.dilation_rate == (1, 1):
        return conv
    kernel = np.zeros(conv.effective_size + conv.kernel.shape[2:])
    kernel[:: conv.dilation_rate[0], :: conv.dilation_rate[1]] = conv.kernel
    return replace(conv, kernel=_freeze(kernel), dilation_rate=(1, 1))


def regroup(conv: AffineConv, groups: int) -> AffineConv:
    """Return the same map with fewer groups: zeros connect the channels that did not meet.

    Args:
        conv: the map.
        groups: must divide `conv.groups`.

    Raises:
        ShapeError: `groups` does not divide `conv.groups`.

    Example:
        >>> regroup(identity(2), 1).kernel[0, 0]
        array([[1., 0.],
               [0., 1.]])
    """
    if groups < 1 or conv.groups % groups:
        raise ShapeError(f"`groups` must divide the {conv.groups} groups of the map. Received: groups={groups}")
    if groups == conv.groups:
        return conv
    (kh, kw), merged = conv.kernel_size, conv.groups // groups
    per_group, out_per_group = conv.c_in // conv.groups, conv.c_out // conv.groups
    kernel = np.zeros((kh, kw, merged * per_group, conv.c_out))
    blocks = kernel.reshape(kh, kw, merged, per_group, groups, merged, out_per_group)
    source = conv.kernel.reshape(kh, kw, per_group, groups, merged, out_per_group)
    for block in range(merged):
        blocks[:, :, block, :, :, block] = source[:, :, :, :, block]
    return replace(conv, kernel=_freeze(kernel), groups=groups)


def crop_kernel(conv: AffineConv, kernel_size: tuple[int, int]) -> tuple[AffineConv, float]:
    """Return the map with the outer taps cut off, and the part of the kernel's energy that was dropped.

    Of `K - k` taps, `(K - k) // 2` are cut off at the top (left) and the rest at the bottom (right). The padding
    shrinks with the kernel, so that the output keeps its size and every remaining tap its place on the image.

    Args:
        conv: the map.
        kernel_size: taps to keep, vertically and horizontally.

    Returns:
        The cropped map, and dropped squares over all squares of the kernel (0 where the kernel is all zero).

    Raises:
        ShapeError: `kernel_size` is larger than the kernel, or the padding is too small to shrink with it.
    """
    wanted = _integers(kernel_size, name="kernel_size", length=2, least=1)
    cuts: list[int] = []
    for size, keep in zip(conv.kernel_size, wanted, strict=True):
        if keep > size:
            raise ShapeError(f"A kernel of {conv.kernel_size} cannot be cropped to {wanted}, which is larger.")
        cuts += [(size - keep) // 2, size - keep - (size - keep) // 2]
    top, bottom, left, right = cuts
    rows, columns = conv.dilation_rate
    shrunk = np.subtract(conv.padding, (top * rows, bottom * rows, left * columns, right * columns))
    if shrunk.min() < 0:
        raise ShapeError(
            f"A kernel of {conv.kernel_size} with padding {conv.padding} cannot be cropped to {wanted}: "
            f"the padding would become {tuple(shrunk.tolist())}."
        )
    kernel = conv.kernel[top : top + wanted[0], left : left + wanted[1]]
    energy = float(np.sum(conv.kernel**2))
    dropped = 1.0 - float(np.sum(kernel**2)) / energy if energy > 0 else 0.0
    return replace(conv, kernel=kernel, padding=tuple(shrunk.tolist())), max(dropped, 0.0)


# Folding norms


def fold_norm_after(conv: AffineConv, scale: np.ndarray, shift: np.ndarray) -> AffineConv:
    """Return `scale * conv(x) + shift` as one map; exact.

    Args:
        conv: the map before the norm.
        scale: shape (c_out,); for a BatchNorm gamma / sqrt(variance + epsilon).
        shift: shape (c_out,); for a BatchNorm beta - mean * scale.

    Raises:
        ShapeError: `scale` or `shift` has another shape.
    """
    scale, shift = _per_channel(scale, conv.c_out, name="scale"), _per_channel(shift, conv.c_out, name="shift")
    return replace(conv, kernel=_freeze(conv.kernel * scale), bias=_freeze(conv.bias * scale + shift))


def fold_norm_before(conv: AffineConv, scale: np.ndarray, shift: np.ndarray) -> AffineConv:
    """Return `conv(scale * x + shift)` as one map; exact.

    Args:
        conv: the map after the norm.
        scale: shape (c_in,).
        shift: shape (c_in,); all 0 where the map pads, because the map pads with 0 and not with `shift`.

    Raises:
        ShapeError: `scale` or `shift` has another shape, or `shift` is not 0 and the map pads.
    """
    scale, shift = _per_channel(scale, conv.c_in, name="scale"), _per_channel(shift, conv.c_in, name="shift")
    if conv.pads and shift.any():
        raise ShapeError(
            f"A shift before a map with padding {conv.padding} cannot be folded: the map pads with 0, the folded "
            "bias would pad with the shift. Move the padding to the front, or fold the scale alone."
        )
    groups = conv.groups
    per_weight = np.repeat(scale.reshape(groups, -1).T, conv.c_out // groups, axis=1)
    bias = conv.bias + _reply_to_constant(conv, shift)
    return replace(conv, kernel=_freeze(conv.kernel * per_weight), bias=_freeze(bias))


# Composing


def compose(first: AffineConv, second: AffineConv) -> AffineConv:
    """Return the one convolution equal to `second(first(x))` wherever `second` does not meet its own padding.

    On each axis, with taps k, dilation d, stride s and padding p of the two maps: kernel
    `(k1 - 1) * d1 + s1 * (k2 - 1) * d2 + 1`, stride `s1 * s2`, padding `p1 + s1 * p2`, dilation 1 (dilated kernels are
    written out), groups `gcd(g1, g2)`, bias `K2 . b1 + b2`. The output always has the size of `second(first(x))`.
    Ask `padding_is_exact` whether the border agrees too.

    Args:
        first: applied first; kernel (kh1, kw1, c_in // g1, c_mid).
        second: applied to its output; kernel (kh2, kw2, c_mid // g2, c_out).

    Returns:
        A map with kernel (kh, kw, c_in // gcd(g1, g2), c_out).

    Raises:
        ShapeError: `second` reads another number of channels than `first` writes.

    Source: kernel merging as in UPDP (arXiv:2401.06426); the rules are derived in METHOD section 1.

    Example:
        >>> first = AffineConv(np.ones((1, 1, 2, 3)), np.zeros(3), strides=(2, 2))
        >>> second = AffineConv(np.ones((3, 3, 3, 4)), np.zeros(4), padding=(1, 1, 1, 1))
        >>> compose(first, second)
        AffineConv(5x5, 2 -> 4 channels, strides (2, 2), padding (2, 2, 2, 2))
    """
    geometry = composed_geometry((first, second))
    groups = gcd(first.groups, second.groups)
    if groups not in (first.groups, second.groups):
        first = regroup(first, groups)
    # Middle channels are indexed (group, split, m): the finer grouped map splits each group of the coarser one, so
    # one of `split1`, `split2` is 1, and no zero of a depthwise kernel is ever multiplied.
    split1, split2 = first.groups // groups, second.groups // groups
    m = first.c_out // (groups * split1 * split2)
    (kh1, kw1), (kh2, kw2) = first.kernel_size, second.kernel_size
    c1, c2 = first.c_in // first.groups, second.c_out // second.groups
    left = first.kernel.reshape(kh1, kw1, c1, groups, split1, split2, m).transpose(3, 4, 5, 0, 1, 2, 6)
    left = left.reshape(groups, split1, split2, kh1 * kw1 * c1, m)
    right = second.kernel.reshape(kh2, kw2, split1, m, groups, split2, c2).transpose(0, 1, 4, 2, 5, 3, 6)
    right = np.ascontiguousarray(right)

    kernel = np.zeros((*geometry.kernel_size, split1 * c1, second.c_out))
    blocks = kernel.reshape(*geometry.kernel_size, split1, c1, groups, split2, c2)
    (dh, dw), (eh, ew) = first.dilation_rate, first.effective_size
    for i in range(kh2):
        for j in range(kw2):
            product = left * right[i, j] if m == 1 else left @ right[i, j]
            product = product.reshape(groups, split1, split2, kh1, kw1, c1, c2).transpose(3, 4, 1, 5, 0, 2, 6)
            y = first.strides[0] * second.dilation_rate[0] * i
            x = first.strides[1] * second.dilation_rate[1] * j
            blocks[y : y + eh : dh, x : x + ew : dw] += product
    return AffineConv(
        _freeze(kernel),
        second.bias + _reply_to_constant(second, first.bias),
        strides=geometry.strides,
        groups=groups,
        padding=geometry.padding,
    )


def compose_all(maps: Iterable[AffineConv]) -> AffineConv:
    """Return the one convolution equal to applying `maps` in order, up to padding (see `compose`); dilation 1.

    The order in which neighbours are composed does not change the result; the one with the fewest multiplications is
    taken (matrix chain ordering), so that a depthwise kernel meets its pointwise neighbours before it is written out.

    Raises:
        ShapeError: there are no maps, or neighbours do not fit.
    """
    chain = tuple(maps)
    composed_geometry(chain)
    # best[a, b]: multiplications to compose chain[a:b], where to split it, and the shape facts of the result.
    best = {(a, a + 1): (0.0, a, _Cost.of(conv)) for a, conv in enumerate(chain)}
    for length in range(2, len(chain) + 1):
        for a in range(len(chain) - length + 1):
            b = a + length
            options = []
            for split in range(a + 1, b):
                (cost1, _, facts1), (cost2, _, facts2) = best[a, split], best[split, b]
                options.append((cost1 + cost2 + facts1.multiplications(facts2), split, facts1.then(facts2)))
            best[a, b] = min(options, key=lambda option: option[0])

    def build(a: int, b: int) -> AffineConv:
        if b == a + 1:
            return chain[a]
        split = best[a, b][1]
        return compose(build(a, split), build(split, b))

    return write_out_dilation(build(0, len(chain)))


def composed_geometry(maps: Iterable[AffineConv]) -> Geometry:
    """Return kernel size, strides and padding of `compose_all(maps)` without composing any kernel.

    Raises:
        ShapeError: there are no maps, or neighbours do not fit.
    """
    chain = tuple(maps)
    if not chain:
        raise ShapeError("There are no maps to compose.")
    for first, second in zip(chain, chain[1:], strict=False):
        if first.c_out != second.c_in:
            raise ShapeError(
                f"Cannot compose {first!r} with {second!r}: the first writes {first.c_out} channels, "
                f"the second reads {second.c_in}."
            )
    return reduce(compose_geometry, map(_geometry, chain))


def compose_geometry(first: Geometry, second: Geometry) -> Geometry:
    """Return what `second` after `first` reads: strides multiply, kernel and padding grow by the first one's stride."""
    (h1, w1), (h2, w2) = first.kernel_size, second.kernel_size
    sh, sw = first.strides
    inner, outer = first.padding, second.padding
    return Geometry(
        kernel_size=(h1 + sh * (h2 - 1), w1 + sw * (w2 - 1)),
        strides=(sh * second.strides[0], sw * second.strides[1]),
        padding=(
            inner[0] + sh * outer[0],
            inner[1] + sh * outer[1],
            inner[2] + sw * outer[2],
            inner[3] + sw * outer[3],
        ),
    )


# Borders


def padding_is_exact(
    first: AffineConv, second: AffineConv, *, height: int | None = None, width: int | None = None
) -> bool:
    """Return whether `compose(first, second)` equals `second(first(x))` at the border too, for every image x.

    Where `second` pads, it reads 0 outside of `first`'s output; the composed map shows it `first` evaluated there.
    They agree if `second` pads nothing, or if `first` has zero bias and, seen from every such place, reads zeros only:
    a 1x1 kernel of any stride does (padded or not), a larger kernel does only where its own padding is so wide that
    it has left the image already ('full' padding).

    Zero weights inside the kernels, and biases that cancel in the second kernel, are not looked at.

    Args:
        first: the map that is applied first.
        second: the map that is applied to its output.
        height: of the input of `first`; None for "at every height".
        width: of the input of `first`; None for "at every width".

    Raises:
        ShapeError: the maps do not fit together.

    Example:
        >>> expand = AffineConv(np.ones((1, 1, 2, 6)), np.zeros(6))
        >>> depthwise = from_depthwise(np.ones((3, 3, 6, 1)), np.zeros(6), padding=(1, 1, 1, 1))
        >>> padding_is_exact(expand, depthwise), padding_is_exact(depthwise, depthwise)
        (True, False)
        >>> padding_is_exact(fold_norm_after(expand, np.ones(6), np.ones(6)), depthwise)
        False
    """
    composed_geometry((first, second))
    if not second.pads:
        return True
    axes = [_reads_outside(_geometry(first), second, axis, size) for axis, size in enumerate((height, width))]
    if any(image for _, image in axes):
        return False
    return not (first.bias.any() and any(outside for outside, _ in axes))


def border_map(first: AffineConv, second: AffineConv, height: int, width: int) -> np.ndarray:
    """Return what has to be added to the bias-free `compose(first, second)` to equal `second(first(x))` everywhere.

    It is `b2 + conv(pad(b1), K2)`: constant inside, different at the border, where `second` reads its padding.

    Args:
        first: a map with a 1x1 kernel (or one that `padding_is_exact` accepts once its bias is 0).
        second: applied to its output, may pad.
        height: of the input of `first`.
        width: of the input of `first`.

    Returns:
        Shape (height', width', c_out): the size of the output.

    Raises:
        ShapeError: no such map exists, because `first` mixes pixels and `second` pads.

    Source: METHOD section 1, borders, (c).
    """
    _require_exact_but_for_biases((first, second), height, width)
    return _reply_to_zeros((first, second), height, width)


def compose_with_border_map(maps: Iterable[AffineConv], height: int, width: int) -> tuple[AffineConv, np.ndarray]:
    """Return one convolution without bias and a constant map whose sum equals `maps` applied in order, everywhere.

    That exists where every map that pads is preceded by maps with 1x1 kernels only, as in an inverted residual. All
    biases are in the constant map: it is what the chain answers to an image of zeros.

    Args:
        maps: applied in order.
        height: of the input.
        width: of the input.

    Returns:
        The composed map with bias 0, and the constant of shape (height', width', c_out).

    Raises:
        ShapeError: a map pads after another one has mixed pixels; the message names both.

    Source: METHOD section 1, borders, (c).

    Example:
        >>> expand = AffineConv(np.ones((1, 1, 1, 1)), np.ones(1))
        >>> blur = AffineConv(np.ones((3, 3, 1, 1)), np.zeros(1), padding=(1, 1, 1, 1))
        >>> merged, constant = compose_with_border_map((expand, blur), 3, 3)
        >>> constant[:, :, 0]
        array([[4., 6., 4.],
               [6., 9., 6.],
               [4., 6., 4.]])
    """
    chain = tuple(maps)
    _require_exact_but_for_biases(chain, height, width)
    merged = compose_all(_without_bias(conv) for conv in chain)
    return merged, _reply_to_zeros(chain, height, width)


def move_padding_to_front(maps: Iterable[AffineConv]) -> tuple[AffineConv, ...]:
    """Return the maps with all their padding on the first one, in pixels of its input; the others pad nothing.

    Sizes stay the same, the composed map stays the same, and composing becomes exact; but the new chain computes
    something else at the border than the old one did.

    Raises:
        ShapeError: there are no maps, or neighbours do not fit.

    Source: METHOD section 1, borders, (b).
    """
    chain = tuple(maps)
    padding = composed_geometry(chain).padding
    return replace(chain[0], padding=padding), *(replace(conv, padding=NO_PADDING) for conv in chain[1:])


# Skips


def add_identity_skip(conv: AffineConv) -> AffineConv:
    """Return `conv(x) + x` as one map: 1 is added at tap (pad_top, pad_left), which need not be the centre.

    Raises:
        ShapeError: the output has another shape than the input, or that tap lies outside the kernel.
    """
    if conv.c_in != conv.c_out or conv.strides != (1, 1):
        raise ShapeError(f"An identity skip needs equal channels and stride 1. Received: {conv!r}")
    conv, (row, column) = _skip_tap(conv)
    kernel = conv.kernel.copy()
    channel = np.arange(conv.c_out)
    kernel[row, column, channel % kernel.shape[2], channel] += 1.0
    return replace(conv, kernel=_freeze(kernel))


def add_projection_skip(conv: AffineConv, projection: AffineConv) -> AffineConv:
    """Return `conv(x) + projection(x)` as one map: the projection is added at tap (pad_top, pad_left).

    With stride over 1 the two outputs may have the same size at some input sizes only ('same' padding on even sizes
    pads (0, 1) and differs from a 1x1 on odd ones); the caller knows that the network adds them.

    Args:
        conv: the map of the body.
        projection: 1x1, unpadded, with the strides and channels of `conv`.

    Raises:
        ShapeError: the two have other shapes, the projection mixes pixels, or that tap lies outside the kernel.
    """
    if projection.kernel_size != (1, 1) or projection.pads:
        raise ShapeError(f"A projection skip must be 1x1 without padding. Received: {projection!r}")
    if (conv.c_in, conv.c_out, conv.strides) != (projection.c_in, projection.c_out, projection.strides):
        raise ShapeError(f"A projection skip must have the channels and strides of {conv!r}. Received: {projection!r}")
    conv, (row, column) = _skip_tap(conv)
    groups = gcd(conv.groups, projection.groups)
    conv = regroup(conv, groups)
    kernel = conv.kernel.copy()
    kernel[row, column] += regroup(projection, groups).kernel[0, 0]
    return replace(conv, kernel=_freeze(kernel), bias=conv.bias + projection.bias)


def add(first: AffineConv, second: AffineConv) -> AffineConv:
    """Return `first(x) + second(x)` as one map, borders included: the kernels lie where their paddings say.

    Args:
        first: any map.
        second: with the same strides and channels, reaching as far beyond its padding as the first one.

    Raises:
        ShapeError: the two have other strides or channels, or their outputs have other sizes.
    """
    if (first.c_in, first.c_out, first.strides) != (second.c_in, second.c_out, second.strides):
        raise ShapeError(f"Two maps are added that have other channels or strides: {first!r}, {second!r}")
    groups = gcd(first.groups, second.groups)
    top, bottom, left, right = (max(pair) for pair in zip(first.padding, second.padding, strict=True))
    grown: list[np.ndarray] = []
    for one in (first, second):
        one = regroup(write_out_dilation(one), groups)
        zeros = ((top - one.padding[0], bottom - one.padding[1]), (left - one.padding[2], right - one.padding[3]))
        grown.append(np.pad(one.kernel, (*zeros, (0, 0), (0, 0))))
    if grown[0].shape != grown[1].shape:
        raise ShapeError(f"The outputs of two maps that are added have other sizes: {first!r}, {second!r}")
    kernel, bias = _freeze(grown[0] + grown[1]), first.bias + second.bias
    return AffineConv(kernel, bias, strides=first.strides, groups=groups, padding=(top, bottom, left, right))


def _skip_tap(conv: AffineConv) -> tuple[AffineConv, tuple[int, int]]:
    """Return the map without dilation and the tap that reads the pixel a 1x1 of the same stride reads."""
    conv = write_out_dilation(conv)
    top, bottom, left, right = conv.padding
    for total, size, stride in (
        (top + bottom, conv.kernel_size[0], conv.strides[0]),
        (left + right, conv.kernel_size[1], conv.strides[1]),
    ):
        if abs(total - (size - 1)) >= stride:
            raise ShapeError(f"The output of {conv!r} never has the size of the skip's: it pads {conv.padding}.")
    if top >= conv.kernel_size[0] or left >= conv.kernel_size[1]:
        raise ShapeError(
            f"A skip belongs to tap {(top, left)} (top and left padding), outside the kernel of {conv.kernel_size}."
        )
    return conv, (top, left)


# Private


def _freeze(array: np.ndarray) -> np.ndarray:
    """Mark a fresh array read-only, so that `AffineConv` need not copy it."""
    array.flags.writeable = False
    return array


def _read_only(values: np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.flags.writeable or not array.flags.owndata:
        array = _freeze(np.array(array, order="C"))
    return array


def _integers(values: Sequence[int], *, name: str, length: int, least: int) -> tuple[int, ...]:
    try:
        numbers = tuple(int(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != length or min(numbers) < least or numbers != tuple(values):
        raise ShapeError(f"`{name}` must be {length} integers of at least {least}. Received: {name}={values}")
    return numbers


def _per_channel(values: np.ndarray, channels: int, *, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (channels,):
        raise ShapeError(f"`{name}` must have shape ({channels},). Received: shape {array.shape}")
    return array


def _without_bias(conv: AffineConv) -> AffineConv:
    return replace(conv, bias=np.zeros(conv.c_out))


def _reply_to_constant(conv: AffineConv, values: np.ndarray) -> np.ndarray:
    """Return what the kernel alone writes inside an image whose pixels all are `values` (c_in,)."""
    taps = conv.kernel.sum(axis=(0, 1)).reshape(-1, conv.groups, conv.c_out // conv.groups)
    return np.einsum("igo,gi->go", taps, values.reshape(conv.groups, -1)).reshape(-1)


def _reply_to_zeros(maps: Sequence[AffineConv], height: int, width: int) -> np.ndarray:
    x = np.zeros((1, height, width, maps[0].c_in))
    for conv in maps:
        x = apply(conv, x)
    return x[0]


def _geometry(conv: AffineConv) -> Geometry:
    return Geometry(conv.effective_size, conv.strides, conv.padding)


def _reads_outside(first: Geometry, second: AffineConv, axis: int, size: int | None) -> tuple[bool, bool]:
    """Say, on one axis, whether `second` reads outside of `first`'s output, and whether `first` sees the image there.

    Without a size, one whole period of sizes is tried, large enough that both ends of the image are far apart: other
    sizes meet the same cases, or fewer.
    """
    k1, s1, (a1, b1) = first.kernel_size[axis], first.strides[axis], first.padding[2 * axis : 2 * axis + 2]
    k2, s2, (a2, b2) = second.effective_size[axis], second.strides[axis], second.padding[2 * axis : 2 * axis + 2]
    large = k1 + s1 * (k2 + a2 + b2)
    reads, sees = False, False
    for n in range(large, large + s1 * s2) if size is None else (size,):
        n_mid = (n + a1 + b1 - k1) // s1 + 1
        n_out = (n_mid + a2 + b2 - k2) // s2 + 1
        if n_mid < 1 or n_out < 1:
            raise ShapeError(f"An input of {n} pixels is too small for kernels of {k1} and then {k2} pixels.")
        read = s2 * np.arange(n_out)[:, None] + np.arange(0, k2, second.dilation_rate[axis]) - a2
        outside = read[(read < 0) | (read >= n_mid)]
        seen = s1 * outside[:, None] + np.arange(k1) - a1
        reads |= outside.size > 0
        sees |= bool(np.any((seen >= 0) & (seen < n)))
    return reads, sees


def _require_exact_but_for_biases(maps: Sequence[AffineConv], height: int, width: int) -> None:
    """Raise unless the linear parts of the maps compose exactly, borders included, at this size."""
    composed_geometry(maps)
    prefix = _geometry(maps[0])
    for index, conv in enumerate(maps[1:], start=1):
        if conv.pads and any(_reads_outside(prefix, conv, axis, n)[1] for axis, n in enumerate((height, width))):
            raise ShapeError(
                f"No constant map repairs the border: map {index}, {conv!r}, pads what the maps before it have made of "
                f"{prefix.kernel_size} pixels each. Move the padding to the front, or fit instead of composing."
            )
        prefix = compose_geometry(prefix, _geometry(conv))


@dataclass(frozen=True)
class _Cost:
    """What decides how dear it is to compose a map with its neighbour."""

    size: tuple[int, int]
    taps: int  # equal to the area of `size` once dilation is written out
    strides: tuple[int, int]
    c_in: int
    c_out: int
    groups: int

    @staticmethod
    def of(conv: AffineConv) -> _Cost:
        height, width = conv.kernel_size
        return _Cost(conv.effective_size, height * width, conv.strides, conv.c_in, conv.c_out, conv.groups)

    def multiplications(self, other: _Cost) -> float:
        pairs = self.taps * other.taps
        return pairs * self.c_in * self.c_out * other.c_out / (self.groups * other.groups)

    def then(self, other: _Cost) -> _Cost:
        (h1, w1), (h2, w2), (sh, sw) = self.size, other.size, self.strides
        size = (h1 + sh * (h2 - 1), w1 + sw * (w2 - 1))
        strides = (sh * other.strides[0], sw * other.strides[1])
        return _Cost(size, size[0] * size[1], strides, self.c_in, other.c_out, gcd(self.groups, other.groups))
