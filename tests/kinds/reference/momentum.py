"""Momentum none, dense and low_rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Singular values below this, relative to the largest, count as zero: the square root of the library's declared cut-off.
CUTOFF = 1e-5


def orth(matrix: Tensor) -> Tensor:
    """Return left singular vectors of the matrix with columns at unit length: zeros first where its rank falls short.

    The columns come in ascending order, so that the column that dies (and is drawn anew in the next step) is the first.
    """
    lengths = matrix.norm(dim=0)
    matrix = matrix / torch.where(lengths > 0, lengths, 1.0)
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    u = torch.where(s > CUTOFF * s[0], u, 0.0)
    missing = matrix.new_zeros(len(matrix), matrix.shape[1] - u.shape[1])
    return torch.cat((u, missing), dim=1).flip(1)


class NoMomentum:
    def __init__(self, shape: tuple[int, int]) -> None:
        pass

    def update(self, grad: Tensor, **_: Any) -> Tensor:
        return grad


class DenseMomentum:
    def __init__(self, shape: tuple[int, int], bias_correction: bool) -> None:
        self.average = torch.zeros(shape, dtype=torch.float64)
        self.bias_correction = bias_correction

    def update(self, grad: Tensor, *, beta1: float, step: int, **_: Any) -> Tensor:
        self.average = beta1 * self.average + (1 - beta1) * grad
        return self.average / (1 - beta1**step) if self.bias_correction else self.average


class LowRankMomentum:
    """AdaPM's bias-corrected low-rank momentum, with M formed."""

    def __init__(self, shape: tuple[int, int], rank: int) -> None:
        m, n = shape
        self.q = torch.zeros(m, rank, dtype=torch.float64)
        self.r = torch.zeros(rank, n, dtype=torch.float64)

    def update(
        self, grad: Tensor, *, beta1: float, step: int, draw: Callable[..., Tensor], due: bool, like: dict[str, Tensor]
    ) -> Tensor:
        momentum = beta1 * self.q @ self.r + (1 - beta1) * grad
        lengths = self.r.norm(dim=1, keepdim=True)
        dead = lengths == 0
        start = torch.where(dead, draw(*self.r.shape), self.r / torch.where(dead, 1.0, lengths))
        self.q = orth(momentum @ start.T)
        self.r = self.q.T @ momentum
        kept = self.q @ self.r
        return kept / (1 - beta1**step) + (momentum - kept) / (1 - beta1)
