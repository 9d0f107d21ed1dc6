"""GaLore, Fira and APOLLO: Adam on a projection of the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.kinds.reference.subspace import PROJECTIONS, Draw


class _Adam:
    """N = M / (√V + ε) without bias correction, which is a factor on the whole update."""

    def __init__(self, shape: tuple[int, int], rank: int) -> None:
        self.tall = shape[0] >= shape[1]
        self.rank, self.short = rank, min(shape)
        self.m = torch.zeros(max(shape), rank, dtype=torch.float64)
        self.v = torch.zeros(max(shape), rank, dtype=torch.float64)
        self.norm = 0.0

    def update(
        self,
        grad: Tensor,
        *,
        beta1: float,
        beta2: float,
        eps: float,
        step: int,
        due: bool,
        draw: Draw,
        like: dict[str, Tensor],
    ) -> Tensor:
        grad = grad if self.tall else grad.T
        self.choose(grad, due, draw, like)
        projected = grad @ self.basis
        self.m = beta1 * self.m + (1 - beta1) * projected
        self.v = beta2 * self.v + (1 - beta2) * projected**2
        corrected = math.sqrt(1 - beta2**step) / (1 - beta1**step)
        direction = corrected * self.direction(grad, projected, self.m / (self.v.sqrt() + eps))
        return direction if self.tall else direction.T

    def choose(self, grad: Tensor, due: bool, draw: Draw, like: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def direction(self, grad: Tensor, projected: Tensor, scaled: Tensor) -> Tensor:
        raise NotImplementedError

    def limited(self, update: Tensor, growth: float) -> Tensor:
        norm = float(update.norm())
        if self.norm > 0 and norm > growth * self.norm:
            update = update * (growth * self.norm / norm)
        self.norm = float(update.norm()) or self.norm
        return update


def ratio(scaled: Tensor, plain: Tensor) -> Tensor:
    return torch.where(plain > 0, scaled / plain, 0.0)


class GaLoreMomentum(_Adam):
    key = "galore_p"

    def __init__(self, shape: tuple[int, int], rank: int, gap: int, scale: float, projection: str) -> None:
        super().__init__(shape, rank)
        self.basis = torch.zeros(min(shape), rank, dtype=torch.float64)
        self.projection, self.scale = PROJECTIONS[projection], scale

    def choose(self, grad: Tensor, due: bool, draw: Draw, like: dict[str, Tensor]) -> None:
        if not due:
            return
        new = self.projection(grad, self.basis, draw)
        if new.any():
            self.basis = new
        elif not self.basis.any():
            self.basis = torch.eye(*self.basis.shape, dtype=torch.float64)
        # The averages refer to the columns of the basis, so their signs matter.
        self.basis = self.basis * (self.basis * like[self.key]).sum(0).sign()

    def direction(self, grad: Tensor, projected: Tensor, scaled: Tensor) -> Tensor:
        return self.scale * scaled @ self.basis.T


class FiraMomentum(GaLoreMomentum):
    key = "fira_p"

    def __init__(self, shape: tuple[int, int], growth: float, **options: object) -> None:
        super().__init__(shape, **options)
        self.growth = growth

    def direction(self, grad: Tensor, projected: Tensor, scaled: Tensor) -> Tensor:
        rest = grad - self.scale * projected @ self.basis.T
        rest = rest * ratio(scaled.norm(dim=1, keepdim=True), projected.norm(dim=1, keepdim=True))
        return super().direction(grad, projected, scaled) + self.limited(rest, self.growth)


class ApolloMomentum(_Adam):
    def __init__(self, shape: tuple[int, int], rank: int, gap: int, scale: float, scaling: str, growth: float) -> None:
        super().__init__(shape, rank)
        self.scale, self.scaling, self.growth = scale, scaling, growth

    def choose(self, grad: Tensor, due: bool, draw: Draw, like: dict[str, Tensor]) -> None:
        self.basis = draw(self.short, self.rank, shared=True) / math.sqrt(self.rank)

    def direction(self, grad: Tensor, projected: Tensor, scaled: Tensor) -> Tensor:
        dims = (1,) if self.scaling == "channel" else (0, 1)
        gains = ratio(scaled.norm(dim=dims, keepdim=True), projected.norm(dim=dims, keepdim=True))
        return self.scale * self.limited(gains * grad, self.growth)
