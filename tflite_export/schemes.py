"""How a model is to be written: numbers, types of inputs and outputs, target, and what is done on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tflite_export.errors import OptionError
from tflite_export.post_training import DEFAULT_STEPS, EQUALIZE, RANGES, STEPS

INTEGER_SCHEMES = ("int8", "int16x8")

_DTYPES = {
    "float32": ("float32",),
    "float16": ("float32",),
    "dynamic": ("float32",),
    "int8": ("int8", "uint8", "float32"),
    "int16x8": ("int16", "float32"),
}
"""Types that inputs and outputs may have, the default first."""

_TARGETS = ("edgetpu",)
_INPUT_NORMALIZATION = ("fold", "keep")


@dataclass(frozen=True)
class Scheme:
    """The options of `export` that the converter goes by, as they are explained there.

    Raises:
        OptionError: one of them has an unknown value, or does not go with another.
    """

    quantize: str
    input_dtype: str | None
    target: str | None
    input_normalization: str
    clean: bool
    post_training: Sequence[str]
    float_below_db: float | None = None

    def __post_init__(self) -> None:
        quantize, target = self.quantize, self.target
        if quantize not in _DTYPES:
            raise OptionError(f"quantize must be one of {tuple(_DTYPES)}, not {quantize!r}.")
        if self.input_dtype not in (None, *_DTYPES[quantize]):
            raise OptionError(
                f"input_dtype must be one of {_DTYPES[quantize]} for {quantize}, not {self.input_dtype!r}."
            )
        if target not in (None, *_TARGETS):
            raise OptionError(f"target must be one of {_TARGETS} or None, not {target!r}.")
        if target == "edgetpu" and quantize != "int8":
            raise OptionError(f'the Edge TPU runs int8 alone: give quantize="int8", not {quantize!r}.')
        if self.input_normalization not in _INPUT_NORMALIZATION:
            raise OptionError(
                f"input_normalization must be one of {_INPUT_NORMALIZATION}, not {self.input_normalization!r}."
            )
        self._check_post_training()
        self._check_float()

    def _check_post_training(self) -> None:
        steps = self.post_training
        if isinstance(steps, str) or not set(steps) <= set(STEPS):
            raise OptionError(f"post_training must be a sequence of {STEPS}, not {steps!r}.")
        if len(set(RANGES) & set(steps)) > 1:
            raise OptionError(f"post_training takes one of {RANGES}, not several.")
        if EQUALIZE in steps and not self.clean and tuple(steps) != DEFAULT_STEPS:
            raise OptionError(f"{EQUALIZE!r} needs the norms folded: leave clean=True.")

    def _check_float(self) -> None:
        if self.float_below_db is None:
            return
        if not 0 < self.float_below_db < float("inf"):
            raise OptionError(f"float_below_db is a signal over noise in dB above 0, not {self.float_below_db!r}.")
        if self.quantize != "int8":
            raise OptionError(f"float_below_db is for int8, not {self.quantize!r}: leave it out.")
        if self.target == "edgetpu":
            raise OptionError(
                "float_below_db leaves operators in float, and the Edge TPU runs nothing behind the first of them: "
                "leave it out, or export without a target."
            )

    @property
    def integer(self) -> bool:
        """Whether ranges are set by calibration images."""
        return self.quantize in INTEGER_SCHEMES

    @property
    def io_dtype(self) -> str:
        """Type of inputs and outputs."""
        return self.input_dtype or _DTYPES[self.quantize][0]

    @property
    def accuracy_steps(self) -> tuple[str, ...]:
        """What is done for the accuracy of integers; nothing where there are none of 8 bits."""
        return tuple(self.post_training) if self.quantize == "int8" else ()

    def as_json(self) -> dict[str, Any]:
        """Return what the worker process reads."""
        return {
            "quantize": self.quantize,
            "input_dtype": self.io_dtype,
            "target": self.target,
            "input_normalization": self.input_normalization,
            "clean": self.clean,
            "post_training": list(self.accuracy_steps),
            "float_below_db": self.float_below_db,
        }
