"""Momentum none, dense and low_rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Less than this share of a column, orthogonal to those before it, counts as nothing: the root of the library's cut-off.
CUTOFF = 1e-5


def orth(matrix: Tensor) -> Tensor:
    """Return the columns made orthonormal one by one; zero where a column lies in the span of those before it."""
    basis = torch.zeros_like(matrix)
    for position, column in enumerate(matrix.T):
        rest = column
        for _ in range(2):  # once more for the rounding errors of the first time
            rest = rest - basis @ (basis.T @ rest)
        if rest.norm() > CUTOFF * column.norm():
            basis[:, position] = rest / rest.norm()
    return basis


class NoMomentum:
    def __init__(self, shape: tuple[int, int]) -> None:
        pass

    def update(self, grad: Tensor, **_: Any) -> Tensor:
        return grad


class DenseMomentum:
    def __init__(self, shape: tuple[int, int], bias_correction: bool, nesterov: bool) -> None:
        self.average = torch.zeros(shape, dtype=torch.float64)
        self.bias_correction = bias_correction
        self.nesterov = nesterov

    def update(self, grad: Tensor, *, beta1: float, step: int, **_: Any) -> Tensor:
        self.average = beta1 * self.average + (1 - beta1) * grad
        ahead, step = (beta1 * self.average + (1 - beta1) * grad, step + 1) if self.nesterov else (self.average, step)
        return ahead / (1 - beta1**step) if self.bias_correction else ahead


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
