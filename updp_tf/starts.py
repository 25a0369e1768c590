"""Linear maps of a block from its own weights, without images: identity and gaussian."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from updp_tf import affine
from updp_tf.activations import gaussian_fit, gaussian_moments
from updp_tf.affine import AffineConv
from updp_tf.errors import CalibrationError
from updp_tf.structure import Stage


@dataclass(frozen=True, eq=False)
class Linearized:
    """The linear map that replaces a block's stages without images.

    Attributes:
        maps: the stages' maps with each activation as slope and offset, in order.
        explained: what the slopes explain of the activations' variance, between 0 and 1; None where unknown.
    """

    maps: tuple[AffineConv, ...]
    explained: float | None


def identity_start(stages: Sequence[Stage]) -> Linearized:
    """Replace every activation by the identity (UPDP's end point)."""
    return Linearized(tuple(one for stage in stages for one in stage.maps), None)


def gaussian_start(stages: Sequence[Stage]) -> Linearized:
    """Replace every activation by its best affine stand-in under the distribution that the norm before it tells.

    Raises:
        CalibrationError: an activation has no norm in front of it; calibration images are needed.
    """
    maps: list[AffineConv] = []
    explained = 1.0
    for index, stage in enumerate(stages):
        maps += stage.maps
        if stage.activation is None:
            continue
        if stage.mean is None or stage.std is None:
            raise CalibrationError(
                f"The activation '{stage.activation.name}' has no normalization in front of it that tells its input's "
                "distribution: needs calibration images."
            )
        slope, offset, share = gaussian_fit(stage.activation, stage.mean, stage.std)
        variance = gaussian_moments(stage.activation, stage.mean, stage.std).variance
        explained *= _weighted_share(stages, index, variance, share)
        maps[-1] = affine.fold_norm_after(maps[-1], slope, offset)
    return Linearized(tuple(maps), explained)


def _weighted_share(stages: Sequence[Stage], index: int, variance: np.ndarray, share: np.ndarray) -> float:
    """Explained variance of one activation, weighted by the squared kernels of the layer that reads it."""
    if index + 1 < len(stages):
        variance = variance * _read_energy(stages[index + 1].maps[0])
    total = float(variance.sum())
    return 1.0 if total == 0.0 else float((variance * share).sum() / total)


def _read_energy(map: AffineConv) -> np.ndarray:
    """Squared norm of the kernel slice that reads each input channel, shape (c_in,)."""
    per_group = map.c_out // map.groups
    kernel = map.kernel.reshape(*map.kernel.shape[:3], map.groups, per_group)
    return np.square(kernel).sum(axis=(0, 1, 4)).T.ravel()
