"""The inverse root of a Gram matrix by a polynomial iteration, as Muon takes it."""

from __future__ import annotations

import torch
from torch import Tensor

# A matrix whose norm is below this is treated as if it had this norm. Its inverse, times the slope of any iteration
# that is allowed, is in the range of float32.
SMALLEST = 1e-30
# Small singular values grow by the first coefficient in every step, and rounding errors of the Gram matrix by its
# square. Beyond ten steps, float64 would show them.
MOST_STEPS = 10
# Singular values that an iteration may end with.
LARGEST = 2.0


def inverse_root(gram: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Return P such that X P is X with its singular values moved towards 1.

    The iteration X ← a X + b X XᵀX + c X (XᵀX)² starts from X over its Frobenius norm. All that it does to X is to
    multiply it by a polynomial of XᵀX, so only the Gram matrix is iterated: rows of X may be on different ranks.
    No singular value, 0 included, grows by more than aˢᵗᵉᵖˢ.

    Three more matrices of its size are all that it needs.

    Args:
        gram: ``[..., k, k]`` float64, XᵀX over all rows; overwritten.
        coefficients: a, b, c.
        steps: Number of iterations.

    Returns:
        ``[..., k, k]`` float64, symmetric.
    """
    first, second, third = coefficients
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt().clamp(min=SMALLEST)[..., None, None]
    square, inverse = gram.div_(norm).div_(norm), 1 / norm
    factor, root, spare = (torch.empty_like(square) for _ in range(3))
    for step in range(steps):
        torch.matmul(square, square, out=factor).mul_(third).add_(square, alpha=second)
        factor.diagonal(dim1=-2, dim2=-1).add_(first)
        if step == 0:
            torch.mul(factor, inverse, out=root)
        else:
            root, spare = torch.matmul(root, factor, out=spare), root
        if step < steps - 1:  # they commute
            torch.matmul(torch.matmul(square, factor, out=spare), factor, out=square)
    return root


def reach(coefficients: tuple[float, float, float], steps: int) -> tuple[float, float]:
    """Return the smallest and the largest singular value after the iteration, of those that were in [0.01, 1]."""
    first, second, third = coefficients
    value = torch.linspace(0.01, 1, 1000, dtype=torch.float64)
    for _ in range(steps):
        value = value * (first + second * value**2 + third * value**4)
    return float(value.min()), float(value.max())
