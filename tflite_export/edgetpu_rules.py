"""What the Edge TPU asks of each operator: kinds, versions, types, shapes and parameters.

The rules are the vendor's table of supported operations for its last compiler (16, runtime 14) and the limits that its
issue tracker tells. Where table and compiler differ, the compiler's own logs decide; such rules say so.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tflite_export.flatbuffer import Operator, Subgraph, Tensor, read_constant

# The compiler's own words in its log.
MAPPED = "Mapped to Edge TPU"
OTHER_SUBGRAPH = "More than one subgraph is not supported"
NOT_SUPPORTED = "Operation not supported"
VERSION_NOT_SUPPORTED = "Operation version not supported"
UNSUPPORTED_TYPE = "Operation is working on an unsupported data type"
UNSUPPORTED_RANK = "Tensor has unsupported rank (up to 3 innermost dimensions mapped)"
UNSPECIFIED = "Operation is otherwise supported, but not mapped due to some unspecified limitation"
STATUSES = (
    MAPPED,
    OTHER_SUBGRAPH,
    NOT_SUPPORTED,
    VERSION_NOT_SUPPORTED,
    UNSUPPORTED_TYPE,
    UNSUPPORTED_RANK,
    UNSPECIFIED,
    "Only Strided-Slice with unitary strides supported",  # compiler 15 and before
)

ON_CHIP_BYTES = 8 * 2**20
"""On-chip memory of the Edge TPU, for the parameters and the executable together."""

# The greatest mean over space that logs show as refused is the smallest known to be: 256 x 128 (64 x 128 is mapped).
_MEAN_LIMIT = 256 * 128
_SOFTMAX_LIMIT = 16_000
# 2 is mapped everywhere; 16 and 33 are refused (to avoid a loss of precision, says the table, and gives no number).
_RESIZE_LIMIT = 8
_ACTIVATIONS = ("NONE", "RELU", "RELU_N1_TO_1", "RELU6")


# --- one operator ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """Why the Edge TPU does not run an operator: in the words of the compiler's log, and in plainer ones."""

    status: str
    reason: str


class Call:
    """An operator with its tensors, as the rules read them."""

    def __init__(self, data: bytes, graph: Subgraph, operator: Operator) -> None:
        self._data = data
        self.operator = operator
        self.inputs = [graph.tensors[index] if index >= 0 else None for index in operator.inputs]
        self.outputs = [graph.tensors[index] for index in operator.outputs]

    @property
    def name(self) -> str:
        """The kind of operator, as in the file's schema."""
        return self.operator.name

    def input(self, number: int) -> Tensor:
        """Return an input that its kind must have; `refusal_of` turns its absence into a reason."""
        tensor = self.inputs[number] if number < len(self.inputs) else None
        if tensor is None:
            raise _MissingInputError(f"it has no input {number}")
        return tensor

    def numbers(self, number: int) -> list[int] | None:
        """Return the values of an input as whole numbers; None where it is computed, or holds none."""
        tensor = self.input(number)
        if tensor.data is None or tensor.dtype not in ("int32", "int64"):
            return None
        return [int(value) for value in read_constant(self._data, tensor).ravel()]

    def is_zero(self, tensor: Tensor) -> bool:
        """Return whether a constant holds nothing but zeros, as real numbers."""
        return bool((read_constant(self._data, tensor) == (tensor.zero_points or (0,))[0]).all())


class _MissingInputError(Exception):
    """An operator that lacks an input which its kind must have."""


Check = Callable[[Call], str | None]
"""Return why the Edge TPU cannot run this call of an operator that it knows, or None."""


def refusal_of(call: Call) -> Refusal | None:
    """Return why the Edge TPU cannot run a call, or None.

    In the order of the compiler's answers: a custom operator on floats is told to have the wrong type, not to be
    unknown.
    """
    name, version = call.name, call.operator.version
    if not call.outputs:
        return Refusal(NOT_SUPPORTED, "it has no output")
    if reason := _wrong_type(call):
        # The compiler's words for the input of a float model, as its logs show.
        return Refusal(UNSPECIFIED if name == "QUANTIZE" else UNSUPPORTED_TYPE, reason)
    if call.operator.custom:
        return Refusal(NOT_SUPPORTED, f"the compiler does not know the custom operator '{short_name(name)}'")
    if name not in _RULES:
        return Refusal(NOT_SUPPORTED, _REPLACEMENTS.get(name, "it is not in the table of supported operations"))
    rule = _RULES[name]
    if version > rule.newest_version:
        reason = f"its version is {version}, the compiler knows it up to {rule.newest_version}"
        return Refusal(VERSION_NOT_SUPPORTED, f"{reason}{_VERSION_CAUSES.get(name, '')}")
    if reason := _wrong_rank(call):
        return Refusal(UNSUPPORTED_RANK, reason)
    try:
        for check in rule.checks:
            if reason := check(call):
                return Refusal(UNSPECIFIED, reason)
    except _MissingInputError as error:
        return Refusal(UNSPECIFIED, str(error))
    return None


def _wrong_type(call: Call) -> str | None:
    rule = _RULES.get(call.name)
    if rule and len(call.inputs) < len(rule.data_inputs or ()):
        return "it lacks inputs"
    numbers = range(len(call.inputs)) if rule is None or rule.data_inputs is None else rule.data_inputs
    tensors = [call.inputs[number] for number in numbers if number < len(call.inputs)]
    for tensor in (*tensors, *call.outputs):
        if tensor is None or (rule is None and tensor.constant):
            continue
        if tensor.dtype not in ("int8", "uint8"):
            return f"it computes on {tensor.dtype}; the Edge TPU knows int8 and uint8"
        if not tensor.scales:
            return f"it computes on {tensor.dtype} without a scale: that is not quantized"
    return None


def _wrong_rank(call: Call) -> str | None:
    rule = _RULES[call.name]
    numbers = range(len(call.inputs)) if rule.data_inputs is None else rule.data_inputs
    weights = rule.weights
    tensors = [call.inputs[number] for number in numbers if number < len(call.inputs) and number not in weights]
    for tensor in (*tensors, *call.outputs):
        if tensor is None:
            continue
        if 0 in tensor.shape:
            return f"'{short_name(tensor.name)}' has the shape {tensor.shape}, which holds nothing or is not known yet"
        if any(size > 1 for size in tensor.shape[:-3]):
            shape = f"'{short_name(tensor.name)}' has the shape {tensor.shape}"
            return f"{shape}: only the 3 innermost sizes may be above 1"
    return None


# --- limits of single operators --------------------------------------------------------------------------------------


def _constants(*numbers: int) -> Check:
    """Parameters that must be constants (an input that is left out is none)."""

    def check(call: Call) -> str | None:
        for number in numbers:
            tensor = call.inputs[number] if number < len(call.inputs) else None
            if tensor is not None and not tensor.constant:
                return f"its parameter '{short_name(tensor.name)}' is computed; it must be a constant"
        return None

    return check


def _fused(*allowed: str) -> Check:
    def check(call: Call) -> str | None:
        fused = call.operator.options.get("fused_activation_function", "NONE")
        return None if fused in allowed else f"its fused activation function {fused} is not supported"

    return check


def _same_dilation(call: Call) -> str | None:
    options = call.operator.options
    height, width = options.get("dilation_h_factor", 1), options.get("dilation_w_factor", 1)
    return None if height == width else f"its dilation is {height} x {width}; it must be the same in both directions"


def _one_group(call: Call) -> str | None:
    channels, per_kernel = (call.input(number).shape[-1:] for number in (0, 1))
    return None if channels == per_kernel else "it is a grouped convolution: use DepthwiseConv2D, or one group"


def _default_weights(call: Call) -> str | None:
    form = call.operator.options.get("weights_format", "DEFAULT")
    return None if form == "DEFAULT" else f"its weights have the format {form}, not the default one"


def _vector_output(call: Call) -> str | None:
    shape = call.outputs[0].shape
    if math.prod(shape[:-1]) <= 1:
        return None
    return f"its output has the shape {shape}; it must be one vector (a Dense on each position is a 1x1 convolution)"


def _axes(call: Call, number: int) -> list[int] | str:
    values, rank = call.numbers(number), len(call.input(0).shape)
    if values is None:
        return "its axes are computed; they must be constants"
    axes = [value + rank if value < 0 else value for value in values]
    return axes if all(0 <= axis < rank for axis in axes) else f"its axes {values} are none of a tensor of rank {rank}"


def _no_batch_reduction(call: Call) -> str | None:
    axes = _axes(call, 1)
    if isinstance(axes, str):
        return axes
    # axis 0 of a vector is no batch
    return "it reduces the batch dimension" if 0 in axes and len(call.input(0).shape) > 1 else None


def _mean_limits(call: Call) -> str | None:
    axes, shape = _axes(call, 1), call.input(0).shape
    if isinstance(axes, str):
        return axes
    if len(shape) - 1 in axes and shape[-1] % 4:
        return f"it averages over {shape[-1]} channels; the number must be a multiple of 4"
    positions = math.prod(shape[axis] for axis in axes)
    if positions >= _MEAN_LIMIT:
        return f"it averages {positions} values; 256 x 128 are known to be too many (average in two steps)"
    return None


def _concatenation(call: Call) -> str | None:
    constants = [tensor for tensor in call.inputs if tensor is not None and tensor.constant]
    if not constants:
        return None
    if len(call.inputs) != 2 or not all(call.is_zero(tensor) for tensor in constants):
        return "one of its inputs is a constant: then there must be two, and the constant all zeros"
    return None


def _no_batch_axis(call: Call) -> str | None:
    axis, rank = call.operator.options.get("axis", 0), len(call.outputs[0].shape)
    return "it packs in the batch dimension" if axis in (0, -rank) and rank > 1 else None


def _no_batch_split(call: Call) -> str | None:
    values = call.numbers(0)
    if not values:
        return "its axis is computed; it must be a constant"
    rank = len(call.input(1).shape)
    return "it splits the batch dimension" if values[0] in (0, -rank) and rank > 1 else None


def _no_batch_padding(call: Call) -> str | None:
    paddings = call.numbers(1)
    if paddings is None:
        return "its paddings are computed; they must be constants"
    return "it pads the batch dimension" if len(call.input(0).shape) > 1 and any(paddings[:2]) else None


def _vector_alpha(call: Call) -> str | None:
    shape = call.input(1).shape
    if math.prod(shape[:-1]) <= 1:
        return None
    return f"its alpha has the shape {shape}; it must be one vector (Keras: PReLU(shared_axes=[1, 2]))"


def _resize_limits(call: Call) -> str | None:
    before, after = call.input(0).shape, call.outputs[0].shape
    if len(before) != 4 or len(after) != 4:
        return f"it resizes {before} to {after}; both must be images"
    factors = [new / old for old, new in zip(before[1:3], after[1:3], strict=True)]
    if max(factors) > _RESIZE_LIMIT:
        return f"it enlarges {before[1:3]} to {after[1:3]}; so large a factor is refused to avoid a loss of precision"
    if math.prod(before) + math.prod(after) > ON_CHIP_BYTES:
        return f"input {before} and output {after} together do not fit into the on-chip memory"
    return None


def _softmax_limit(call: Call) -> str | None:
    # The table also wants one vector; logs of compiler 16 show SOFTMAX mapped on the boxes of YOLOv8, [1, 4, n, 16].
    size = (call.input(0).shape or (1,))[-1]
    return None if size <= _SOFTMAX_LIMIT else f"it runs over {size} values; {_SOFTMAX_LIMIT} are the most"


def _slice_masks(call: Call) -> str | None:
    # The table also wants strides of 1, and compiler 15 refused others in words of its own; compiler 16 maps the
    # strides of 2 in the same YOLOv5.
    options = call.operator.options
    for mask in ("ellipsis_mask", "new_axis_mask"):
        if options.get(mask):
            return f"its {mask} is {options[mask]}; it must be 0"
    strides = call.numbers(3)
    return "it reads backwards" if strides is not None and min(strides, default=1) < 1 else None


def _sequence_only(call: Call) -> str | None:
    weights = [tensor for tensor in call.inputs[1:9] if tensor is not None]
    return None if all(tensor.constant for tensor in weights) else "its weights are computed; they must be constants"


@dataclass(frozen=True)
class _Rule:
    """What the Edge TPU asks of one operator that it knows.

    Attributes:
        newest_version: the newest that the compiler takes.
        checks: its limits.
        data_inputs: the inputs that are quantized numbers; None: all. Others are shapes, axes and biases.
        weights: those of them that are weights, whose rank is free.
    """

    newest_version: int
    checks: tuple[Check, ...] = ()
    data_inputs: tuple[int, ...] | None = (0,)
    weights: tuple[int, ...] = ()


# Versions: those of TensorFlow 2.6 (July 2021, as the compiler), but for FULLY_CONNECTED, of which logs show versions
# above 4 refused. A newer version than TensorFlow 2.6 knows keeps the compiler from reading the file at all.
_RULES: Mapping[str, _Rule] = {
    "ADD": _Rule(4, (_fused(*_ACTIVATIONS),), None),
    "AVERAGE_POOL_2D": _Rule(3, (_fused("NONE"),)),
    "CONCATENATION": _Rule(3, (_fused("NONE"), _concatenation), None),
    "CONV_2D": _Rule(5, (_constants(1, 2), _fused(*_ACTIVATIONS), _same_dilation, _one_group), (0, 1), (1,)),
    "DEPTHWISE_CONV_2D": _Rule(6, (_constants(1, 2), _fused(*_ACTIVATIONS), _same_dilation), (0, 1), (1,)),
    "EXPAND_DIMS": _Rule(1, (_constants(1),)),
    "FULLY_CONNECTED": _Rule(
        4, (_constants(1, 2), _fused(*_ACTIVATIONS), _default_weights, _vector_output), (0, 1), (1,)
    ),
    "L2_NORMALIZATION": _Rule(2, (_fused("NONE"),)),
    "LOGISTIC": _Rule(3),
    "MAXIMUM": _Rule(4, (), None),
    "MAX_POOL_2D": _Rule(3, (_fused("NONE"),)),
    "MEAN": _Rule(3, (_no_batch_reduction, _mean_limits)),
    "MINIMUM": _Rule(4, (), None),
    "MUL": _Rule(5, (_fused(*_ACTIVATIONS),), None),
    "PACK": _Rule(3, (_no_batch_axis,), None),
    "PAD": _Rule(4, (_no_batch_padding,)),
    "PRELU": _Rule(1, (_constants(1), _vector_alpha), None, (1,)),
    "QUANTIZE": _Rule(2),
    "REDUCE_MAX": _Rule(3, (_no_batch_reduction,)),
    "REDUCE_MIN": _Rule(3, (_no_batch_reduction,)),
    "RELU": _Rule(3),
    "RELU6": _Rule(3),
    "RELU_N1_TO_1": _Rule(1),
    "RESHAPE": _Rule(1, (_constants(1),)),
    "RESIZE_BILINEAR": _Rule(4, (_constants(1), _resize_limits)),
    "RESIZE_NEAREST_NEIGHBOR": _Rule(4, (_constants(1), _resize_limits)),
    "RSQRT": _Rule(2),
    "SLICE": _Rule(5, (_constants(1, 2),)),
    "SOFTMAX": _Rule(3, (_softmax_limit,)),
    "SPACE_TO_DEPTH": _Rule(2),
    "SPLIT": _Rule(4, (_no_batch_split,), (1,)),
    "SQUARED_DIFFERENCE": _Rule(2, (), None),
    "SQUEEZE": _Rule(2),
    "STRIDED_SLICE": _Rule(6, (_constants(1, 2, 3), _slice_masks)),
    "SUB": _Rule(5, (_fused(*_ACTIVATIONS),), None),
    "SUM": _Rule(2, (_no_batch_reduction,)),
    "TANH": _Rule(3),
    "TRANSPOSE": _Rule(5, (_constants(1),)),
    "TRANSPOSE_CONV": _Rule(3, (_constants(0, 1, 3),), (1, 2), (1,)),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": _Rule(3, (_sequence_only,)),
}

# What brings the newer version about, where one thing does.
_VERSION_CAUSES: Mapping[str, str] = {
    "CONV_2D": " (one grouped convolution gives it to all: use DepthwiseConv2D, or one group)",
    "FULLY_CONNECTED": " (one Dense on an image or sequence gives it to all: use Conv2D(kernel_size=1) there)",
}

# What to have instead of common operators that the Edge TPU does not know.
_REPLACEMENTS: Mapping[str, str] = {
    "BATCH_MATMUL": "products of two activations (attention) are not supported",
    "DEQUANTIZE": "numbers on the Edge TPU are 8-bit: let the file have int8 or uint8 outputs",
    "GELU": "GELU is not supported: use ReLU or ReLU6 (updp_tf.linearize, or progressive with activations)",
    "HARD_SWISH": "hard swish is not supported: use ReLU6 (updp_tf.linearize, or progressive with activations)",
    "LEAKY_RELU": "leaky ReLU is not supported: use PReLU(shared_axes=[1, 2]) or ReLU",
}

# Newest versions in TensorFlow 2.6 of operators that got newer ones since; 0: the operator itself is newer.
_NEWEST_READABLE: Mapping[str, int] = {
    "ABS": 4,
    "ARG_MAX": 2,
    "ARG_MIN": 2,
    "CAST": 1,
    "DEQUANTIZE": 4,
    "EXP": 1,
    "FILL": 3,
    "FULLY_CONNECTED": 9,
    "GATHER": 5,
    "GELU": 0,
    "LOG": 1,
    "MIRROR_PAD": 2,
    "NEG": 1,
    "RELU_0_TO_1": 0,
    "SELECT": 2,
    "SIGN": 0,
    "SQRT": 1,
    "TILE": 2,
    "WHERE": 1,
}


def newest_readable(name: str) -> float:
    """Return the newest version of an operator that the compiler can parse, whether or not it runs it."""
    rule = _RULES.get(name)
    return _NEWEST_READABLE.get(name, rule.newest_version if rule else math.inf)


def macs_of(call: Call) -> int:
    """Return the multiplications of a linear operator by its shapes; of others 0."""
    if not call.outputs or len(call.inputs) < 2 or call.inputs[0] is None or call.inputs[1] is None:
        return 0
    left, right, out = call.inputs[0].shape, call.inputs[1].shape, call.outputs[0].shape
    if call.name in ("CONV_2D", "FULLY_CONNECTED"):
        return math.prod(out) * math.prod(right[1:])
    if call.name == "DEPTHWISE_CONV_2D":
        return math.prod(out) * math.prod(right[1:3])
    if call.name == "TRANSPOSE_CONV" and len(call.inputs) > 2 and call.inputs[2] is not None:
        return math.prod(call.inputs[2].shape[:3]) * math.prod(right)
    if call.name == "BATCH_MATMUL":
        inner = left[-2:-1] if call.operator.options.get("adj_x") else left[-1:]
        return math.prod(out) * math.prod(inner)
    if call.name == "UNIDIRECTIONAL_SEQUENCE_LSTM":
        gates = [tensor for tensor in call.inputs[1:9] if tensor is not None]
        return math.prod(left[:-1]) * sum(math.prod(tensor.shape) for tensor in gates)
    return 0


_PARAMETERS = {"CONV_2D": (1, 2), "DEPTHWISE_CONV_2D": (1, 2), "FULLY_CONNECTED": (1, 2), "TRANSPOSE_CONV": (1, 3)}
_PARAMETER_INPUTS = _PARAMETERS | {"UNIDIRECTIONAL_SEQUENCE_LSTM": tuple(range(1, 18)), "PRELU": (1,)}
_ELEMENTWISE = ("ADD", "MAXIMUM", "MINIMUM", "MUL", "SQUARED_DIFFERENCE", "SUB")


def parameter_bytes_of(calls: list[Call]) -> int:
    """Return the bytes of weights and biases, each counted once."""
    stored: set[tuple[int, int]] = set()
    for call in calls:
        for number in _PARAMETER_INPUTS.get(call.name, (0, 1) if call.name in _ELEMENTWISE else ()):
            tensor = call.inputs[number] if number < len(call.inputs) else None
            if tensor is not None and tensor.data:
                stored.add(tensor.data)
    return sum(stop - start for start, stop in stored)


def short_name(name: str) -> str:
    """Return a tensor's name, cut where it would fill a page."""
    return name if len(name) <= 80 else f"{name[:80]}..."
