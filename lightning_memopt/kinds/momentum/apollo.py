"""APOLLO: the gradient, scaled by what Adam does to the norms of a random sketch of it."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_memopt._registry import unknown
from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.linalg import matmul, row_square_sums, store_
from lightning_memopt.kinds.momentum.base import MOMENTA, Direction, State
from lightning_memopt.kinds.momentum.inner_adam import (
    InnerAdam,
    check_above,
    norm_ratio,
    projected_squares,
    square_sums,
)
from lightning_memopt.kinds.momentum.projections import sides
from lightning_memopt.kinds.noise import Noise
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.collectives import Sum, request
from lightning_memopt.sharding.layout import Layout

SCALINGS = ("channel", "tensor")


@MOMENTA.register("apollo")
@dataclass(frozen=True)
class ApolloMomentum(InnerAdam):
    """The gradient, scaled by norms of Adam's update in a random projection (APOLLO, arXiv 2412.05270).

    For a tall block, m ≥ n (a wide block is transposed), with one s for each row, or one for the matrix::

        every `gap` steps:  P with elements from N(0, 1/k)
        R = G P,  M ← β₁ M + (1−β₁) R,  V ← β₂ V + (1−β₂) R²,  N = M / (√V + ε)
        S = s G,  s = ‖N‖ / ‖R‖
        S ← S · min(1, `growth` ‖S₋‖ / ‖S‖)
        U = `scale` · √(1−β₂ᵗ) / (1−β₁ᵗ) · S

    P is not stored: it depends on the seed, the block and the number of the projection. All matrices of a stack share
    it. M and V keep their numbers in a new projection. The second moment of the block is ``none``.

    State: ``apollo_m`` and ``apollo_v`` ``[..., m, k]``, ``apollo_norm`` (‖S₋‖, one number).

    Attributes:
        scale: Factor on the update: the root of the option of that name in the authors' package.
        scaling: ``channel`` (one s for each row of a tall block, or column of a wide one) or ``tensor`` (a single s).
        growth: Bound on the growth of ‖S‖ from one step to the next.
    """

    name: ClassVar[str] = "apollo"
    keys: ClassVar[tuple[str, ...]] = ("apollo_m", "apollo_v", "apollo_norm")
    squares: ClassVar[tuple[str, ...]] = ("apollo_v", "apollo_norm")
    averages: ClassVar[tuple[str, str]] = ("apollo_m", "apollo_v")
    norm_key: ClassVar[str] = "apollo_norm"
    batched: ClassVar[bool] = True

    scaling: str = "channel"
    growth: float = 1.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaling not in SCALINGS:
            raise ValueError(unknown("value of `scaling`", self.scaling, list(SCALINGS)))
        check_above("growth", self.growth, 1)

    def phase(self, tick: Tick) -> Hashable:
        """Return the number of the projection, which a batch draws for all of its blocks."""
        return tick.of_period(self.gap).step

    def update(  # type: ignore[override]
        self,
        grad: Large,
        state: Mapping[str, Any],
        layout: Layout,
        *,
        beta1: float,
        beta2: float,
        eps: float,
        tick: Tick,
    ) -> Generator[Any, Any, Direction]:
        """Take a step of Adam on the sketch of the gradient, and scale the gradient like that step."""
        long, short = sides(layout)
        tall = grad if long == -2 else grad.mT
        rank = state["apollo_m"].shape[-1]
        sketch, lengths = yield from request(
            Sum(matmul(tall, projection(layout, short, rank, tick.of_period(self.gap))), layout, short),
            Sum(row_square_sums(tall, layout.dtype), layout, short),
        )
        step, correction = self.averaged_(state, sketch, layout, beta1=beta1, beta2=beta2, eps=eps, tick=tick)
        scaled, plain, lengths = square_sums(step), square_sums(sketch), lengths.double()
        if self.scaling == "tensor":
            scaled, plain, lengths = yield from request(
                *(Sum(each.sum(-2, keepdim=True), layout, long) for each in (scaled, plain, lengths))
            )
            gains = norm_ratio(scaled, plain, layout.dtype)
            square = gains.square() * lengths
        else:
            gains = norm_ratio(scaled, plain, layout.dtype)
            (square,) = yield from request(Sum((gains.square() * lengths).sum(-2, keepdim=True), layout, long))
        factor = self.limited_(state, square, layout, growth=self.growth, tick=tick)
        gains = (gains * factor).mul_(self.scale * correction).to(layout.dtype)
        return Direction(grad, gains=gains if long == -2 else gains.mT)

    def from_moments(
        self, momentum: Tensor, square: Tensor, layout: Layout, tick: Tick, weights: tuple[float, float]
    ) -> State:
        """Start M and V from what the next step's projection makes of the averages."""
        state, (long, short) = self.init(layout), sides(layout)
        tall, squares = ((each if long == -2 else each.mT).to(layout.dtype) for each in (momentum, square))
        basis = projection(layout, short, state["apollo_m"].shape[-1], tick.of_period(self.gap))
        values = tall @ basis, projected_squares(tall, squares, basis, weights)
        for key, value in zip(self.averages, values, strict=True):
            store_(state[key], value)
        return state


def projection(layout: Layout, short: int, rank: int, tick: Tick) -> Tensor:
    """Return this rank's rows of P, ``[..., n, k]``, which the tick alone determines."""
    noise = Noise.of(tick.salted(), (layout.matrix[short], rank), (layout.offset[short], 0))
    *stack, count = *layout.local[:-2], layout.local[short]
    batch = stack[:1] if layout.batch is not None else []
    draw = noise.normal((*batch, count, rank), layout.device).mul_(rank**-0.5).to(layout.dtype)
    return draw.view(*batch, *[1] * (len(stack) - len(batch)), count, rank).expand(*stack, count, rank)
