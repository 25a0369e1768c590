"""Fits to measured times: the levels of models in sittings that drift, and a correction of sums of parts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_NETWORKS = 3  # that a correction is fitted to
MIN_MODELS = 4  # in a sitting, so that its drift can be told from their times


@dataclass(frozen=True)
class Correction:
    """What turns a sum of parts into the time of a whole network.

    Attributes:
        scale: the sum is multiplied by it.
        offset_us: and this is added.
        n: number of networks that it was fitted to; below 3 nothing is corrected, nor where it would not help.
        error: median relative error of networks that were left out of the fit in turn; NaN where there is no fit.
        error_before: median relative error of the sums as they are; NaN where no network was measured.
    """

    scale: float = 1.0
    offset_us: float = 0.0
    n: int = 0
    error: float = math.nan
    error_before: float = math.nan

    def __str__(self) -> str:
        if self.n < MIN_NETWORKS:
            return "sums of parts, not corrected: too few whole networks were measured"
        if self.error >= self.error_before:
            return (
                f"sums of parts, off by {100 * self.error_before:.1f} % (median of {self.n} networks); not corrected, "
                f"which would give {100 * self.error:.1f} % on networks left out of the fit"
            )
        return (
            f"time = {self.scale:.3f} x sum of parts {self.offset_us:+.1f} us, fitted to {self.n} networks; median "
            f"error of networks left out of the fit {100 * self.error:.1f} % "
            f"(sums alone: {100 * self.error_before:.1f} %)"
        )


def fit_correction(pairs: Sequence[tuple[float, float]], exact: Sequence[tuple[float, float]] = ()) -> Correction:
    """Return the scale and offset that bring sums closest to measured times, by relative squared error.

    Args:
        pairs: (sum of parts, measured) of whole networks, in microseconds.
        exact: the same of networks whose sums are right by definition; they are fitted to, but tell no error.
    """
    if not pairs:
        return Correction()
    sums, measured = np.array([*pairs, *exact], np.float64).T
    errors = np.abs(sums / measured - 1)[: len(pairs)]
    before = float(np.median(errors))
    if len(pairs) < MIN_NETWORKS:
        return Correction(n=len(pairs), error_before=before)
    left_out = []
    for index in range(len(pairs)):
        others = np.arange(len(sums)) != index
        scale, offset = _scale_and_offset(sums[others], measured[others])
        left_out.append(abs((scale * sums[index] + offset) / measured[index] - 1))
    error = float(np.median(left_out))
    if error >= before:  # what is fitted to noise is worse than nothing
        return Correction(n=len(pairs), error=error, error_before=before)
    return Correction(*_scale_and_offset(sums, measured), len(pairs), error, before)


def _scale_and_offset(sums: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    if len(sums) < MIN_NETWORKS or np.ptp(sums) < 0.05 * float(np.mean(sums)):
        # networks of one size tell a scale, but no offset
        return float(np.mean(measured / sums)), 0.0
    design = np.stack([sums / measured, 1 / measured], axis=1)
    (scale, offset), *_ = np.linalg.lstsq(design, np.ones(len(sums)), rcond=None)
    if scale <= 0:
        return float(np.mean(measured / sums)), 0.0
    return float(scale), float(offset)


@dataclass(frozen=True)
class Level:
    """What sittings tell of one model: log of the time, half the width of its interval, number of sittings."""

    center: float
    half: float
    n: int

    @property
    def width(self) -> float:
        """Width of the interval as a part of the time; NaN with a single sitting."""
        return math.exp(self.half) - math.exp(-self.half)


def levels(log_times: Mapping[Any, Mapping[int, float]]) -> dict[Any, Level]:
    """Return the level of each model, with what is common to a sitting taken out.

    The log of a time is the model's level plus the sitting's, which is the median over its models; the sittings'
    levels are zero on average, so that models keep their times.

    Args:
        log_times: by model, then by number of the sitting; a model may be absent from some sittings.
    """
    from scipy.special import stdtrit

    numbers = sorted({number for times in log_times.values() for number in times})
    drift = dict.fromkeys(numbers, 0.0)
    center = {key: float(np.mean(list(times.values()))) for key, times in log_times.items()}
    if len(log_times) >= MIN_MODELS:
        for _ in range(20):
            for number in numbers:
                found = [times[number] - center[key] for key, times in log_times.items() if number in times]
                drift[number] = float(np.median(found))
            mean = float(np.mean(list(drift.values())))
            drift = {number: value - mean for number, value in drift.items()}
            center = {key: float(np.mean([v - drift[n] for n, v in t.items()])) for key, t in log_times.items()}
    found_levels = {}
    for key, times in log_times.items():
        left = np.array([value - drift[number] for number, value in times.items()])
        half = math.nan
        if len(left) > 1:
            half = float(stdtrit(len(left) - 1, 0.975) * np.std(left, ddof=1) / math.sqrt(len(left)))
        found_levels[key] = Level(center[key], half, len(left))
    return found_levels
