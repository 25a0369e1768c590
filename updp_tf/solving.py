"""Solve the positive definite systems that the fits come down to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg

RIDGE = 1e-4
"""Ridge as a fraction of the mean eigenvalue of the centred Gram matrix (METHOD, section 2)."""


def solve_positive(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve a symmetric positive definite system: Cholesky alone, without the condition estimate of `solve`.

    The matrix is overwritten.
    """
    return scipy.linalg.cho_solve(scipy.linalg.cho_factor(matrix, lower=True, overwrite_a=True), right)


def conjugate_gradients(
    normal: Callable[[np.ndarray], np.ndarray], right: np.ndarray, n_steps: int, tolerance: float = 0.0
) -> np.ndarray:
    """Solve positive definite equations for each column of `right`, from zero, in at most `n_steps` steps.

    Args:
        normal: what the matrix makes of columns.
        right: shape (unknowns, columns).
        n_steps: at most.
        tolerance: squared residual, of the squared right side, at which a column is solved.
    """
    found = np.zeros_like(right)
    residual, direction = right.copy(), right.copy()
    energy = np.square(residual).sum(axis=0)
    small = tolerance * energy
    for _ in range(n_steps):
        if np.all(energy <= small):
            break
        image = normal(direction)
        curvature = np.einsum("uc,uc->c", direction, image)
        step = np.divide(energy, curvature, out=np.zeros_like(energy), where=curvature > 0)
        found += step * direction
        residual -= step * image
        before, energy = energy, np.square(residual).sum(axis=0)
        direction = residual + np.divide(energy, before, out=np.zeros_like(energy), where=before > 0) * direction
    return found
