"""Subspace-Momentum: momentum inside a subspace of the short side, the plain gradient outside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.kinds.reference.momentum import CUTOFF, orth

Draw = Callable[..., Tensor]


def power(grad: Tensor, basis: Tensor, draw: Draw) -> Tensor:
    dead = basis.norm(dim=0) == 0
    start = torch.where(dead, draw(*basis.shape), basis)
    return orth(grad.T @ orth(grad @ start))


def svd(grad: Tensor, basis: Tensor, draw: Draw) -> Tensor:
    _, s, vt = torch.linalg.svd(grad, full_matrices=False)
    rank = basis.shape[1]
    alive = s[:rank] > CUTOFF * s[0]
    return torch.where(alive, vt[:rank].T, 0.0)


def random(grad: Tensor, basis: Tensor, draw: Draw) -> Tensor:
    return orth(draw(*basis.shape))


def topk(grad: Tensor, basis: Tensor, draw: Draw) -> Tensor:
    norms = grad.norm(dim=0)
    best = torch.argsort(norms, descending=True)[: basis.shape[1]]
    return torch.eye(len(norms), dtype=torch.float64)[:, best] * (norms[best] > 0)


PROJECTIONS = {"power": power, "svd": svd, "random": random, "topk": topk}


class SubspaceMomentum:
    def __init__(
        self,
        shape: tuple[int, int],
        rank: int,
        gap: int,
        stagger: bool,
        projection: str,
        handover: str,
        bias_correction: bool,
        correct_complement: bool,
    ) -> None:
        self.tall = shape[0] >= shape[1]
        self.basis = torch.zeros(min(shape), rank, dtype=torch.float64)
        self.coordinates = torch.zeros(max(shape), rank, dtype=torch.float64)
        self.choose = PROJECTIONS[projection]
        self.handover = handover
        self.bias_correction = bias_correction
        self.correct_complement = correct_complement

    def update(
        self, grad: Tensor, *, beta1: float, step: int, due: bool, draw: Draw, like: dict[str, Tensor]
    ) -> Tensor:
        grad = grad if self.tall else grad.T
        if due:
            old, self.basis = self.basis, self.choose(grad, self.basis, draw)
            if self.handover == "reset":
                self.coordinates = torch.zeros_like(self.coordinates)
            elif self.handover == "rotate":
                self.coordinates = self.coordinates @ (old.T @ self.basis)
            else:  # The same numbers in a new basis: here, and only here, its signs and order matter.
                self.basis = self.basis @ (self.basis.T @ like["subspace_p"])
        p = self.basis
        self.coordinates = beta1 * self.coordinates + (1 - beta1) * grad @ p
        b1 = 1 - beta1**step if self.bias_correction else 1.0
        complement = grad - grad @ p @ p.T
        direction = self.coordinates @ p.T / b1 + complement / (b1 if self.correct_complement else 1.0)
        return direction if self.tall else direction.T
