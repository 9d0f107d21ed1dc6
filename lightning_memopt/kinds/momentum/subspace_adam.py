"""Adam in the leading subspace of the gradient: what the kinds have in common that store a basis."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.linalg import leading_triplets, matmul, store_
from lightning_memopt.kinds.momentum.base import State
from lightning_memopt.kinds.momentum.inner_adam import InnerAdam, projected_squares
from lightning_memopt.kinds.momentum.projections import NEED_SHORT_SIDE_WHOLE, PROJECTIONS, axes, scratch, sides
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.collectives import Sum, request
from lightning_memopt.sharding.layout import Layout


@dataclass(frozen=True)
class SubspaceAdam(InnerAdam):
    """Adam in a subspace of the short side, whose basis P is stored under the only one of the ``projection_keys``.

    M and V keep their numbers in a new subspace, as in the code of the authors of these kinds.

    Attributes:
        rank: k: an integer, or a fraction of the short side (then at least 4).
        gap: Steps between two choices of the subspace. Blocks take turns.
        scale: Factor on the part of the update inside the subspace.
        projection: ``svd`` (exact), ``power`` (warm-started power iteration), ``random``, ``topk`` (coordinates).
    """

    scale: float = 0.25
    projection: str = "svd"

    def __post_init__(self) -> None:
        super().__post_init__()
        PROJECTIONS.get(self.projection)

    def needs_whole(self, layout: Layout) -> bool:
        """Return whether the projection compares parts of the short side that different ranks hold."""
        return self.projection in NEED_SHORT_SIDE_WHOLE and layout.divides(sides(layout)[1])

    def scratch(self, layout: Layout, tick: Tick) -> int:
        """Return the bytes that a choice of the subspace needs, in the steps in which it is due."""
        return scratch(self.projection, layout) if self.phase(tick) else 0

    def projected_(
        self, state: Mapping[str, Any], tall: Large, layout: Layout, tick: Tick, *more: Sum
    ) -> Generator[Any, Any, tuple[Tensor, ...]]:
        """Return P, a new one if it is due, and R = G P; and the answers to further requests."""
        (key,), (long, short) = self.projection_keys, sides(layout)
        old: Tensor = state[key].to(layout.dtype)
        if not tick.due(self.gap):
            return old, *(yield from request(Sum(matmul(tall, old), layout, short), *more))
        new = yield from PROJECTIONS.get(self.projection)(tall, old, layout, long, short, tick)
        projected, alive, was_alive, *rest = yield from request(
            Sum(matmul(tall, new), layout, short),
            *(Sum(basis.square().sum((-2, -1), keepdim=True), layout, short) for basis in (new, old)),
            *more,
        )
        # A gradient of zero has no subspace, and R is zero in any. With none at all, nothing would move until the next
        # refresh.
        basis = torch.where(alive > 0, new, torch.where(was_alive > 0, old, axes(new, layout, short)))
        store_(state[key], basis, self.rounding(layout, tick, key))
        return basis, projected, *rest

    def factors(self, state: State, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return M and Pᵀ, or P and Mᵀ for a wide block."""
        basis, momentum = (state[key].to(layout.dtype) for key in (*self.projection_keys, self.averages[0]))
        return (momentum, basis.mT) if sides(layout)[0] == -2 else (basis, momentum.mT)

    def from_moments(
        self, momentum: Tensor, square: Tensor, layout: Layout, tick: Tick, weights: tuple[float, float]
    ) -> State:
        """Keep the part of the momentum that its leading singular vectors P span, and the squares that R has there."""
        state = self.init(layout)
        tall, squares = ((each if sides(layout)[0] == -2 else each.mT).to(layout.dtype) for each in (momentum, square))
        basis = leading_triplets(tall, state[self.averages[0]].shape[-1])[2].mT.to(layout.dtype)
        values = (basis, tall @ basis, projected_squares(tall, squares, basis, weights))
        for key, value in zip((*self.projection_keys, *self.averages), values, strict=True):
            store_(state[key], value)
        return state
