"""Fira: Adam in the leading subspace of the gradient, and a scaled gradient outside it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.linalg import row_square_sums
from lightning_memopt.kinds.momentum.base import MOMENTA, Direction
from lightning_memopt.kinds.momentum.inner_adam import check_above, norm_ratio, square_sums
from lightning_memopt.kinds.momentum.projections import sides
from lightning_memopt.kinds.momentum.subspace_adam import SubspaceAdam
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.collectives import Sum, request
from lightning_memopt.sharding.layout import Layout


@MOMENTA.register("fira")
@dataclass(frozen=True)
class FiraMomentum(SubspaceAdam):
    """Adam inside a subspace of the short side, and the gradient outside it, scaled by norms (Fira, arXiv 2410.01623).

    For a tall block, m ≥ n (a wide block is transposed), with a = `scale` and one s for each row::

        every `gap` steps:  P ← `projection`(G)
        R = G P,  M ← β₁ M + (1−β₁) R,  V ← β₂ V + (1−β₂) R²,  N = M / (√V + ε)
        S = s (G − a R Pᵀ),  s = ‖N‖ / ‖R‖
        S ← S · min(1, `growth` ‖S₋‖ / ‖S‖)
        U = √(1−β₂ᵗ) / (1−β₁ᵗ) · (a N Pᵀ + S)

    As in the authors' code, a also multiplies what is taken from the gradient: with a below 1, S holds a part of the
    gradient inside the subspace. M and V keep their numbers in a new subspace. The second moment of the block is
    ``none``.

    State: ``fira_p`` ``[..., n, k]`` with orthonormal (or zero) columns, ``fira_m`` and ``fira_v`` ``[..., m, k]``,
    ``fira_norm`` (‖S₋‖, one number).

    Attributes:
        growth: Bound on the growth of ‖S‖ from one step to the next.
    """

    name: ClassVar[str] = "fira"
    keys: ClassVar[tuple[str, ...]] = ("fira_p", "fira_m", "fira_v", "fira_norm")
    squares: ClassVar[tuple[str, ...]] = ("fira_v", "fira_norm")
    averages: ClassVar[tuple[str, str]] = ("fira_m", "fira_v")
    norm_key: ClassVar[str] = "fira_norm"
    projection_keys: ClassVar[tuple[str, ...]] = ("fira_p",)
    batched: ClassVar[bool] = True

    growth: float = 1.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above("growth", self.growth, 1)

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
        """Refresh the subspace if due, take a step of Adam in it, and scale the rest of the gradient like that step."""
        long, short = sides(layout)
        tall = grad if long == -2 else grad.mT
        rows = Sum(row_square_sums(tall, layout.dtype), layout, short)
        basis, projected, lengths = yield from self.projected_(state, tall, layout, tick, rows)
        step, correction = self.averaged_(state, projected, layout, beta1=beta1, beta2=beta2, eps=eps, tick=tick)
        inside = square_sums(projected)
        gains = norm_ratio(square_sums(step), inside, layout.dtype)
        # ‖G − a R Pᵀ‖² of a row is ‖G‖² − (2a − a²) ‖R‖², since P is orthonormal.
        outside = (lengths.double() - (2 * self.scale - self.scale**2) * inside).clamp_(min=0)
        (square,) = yield from request(Sum((gains.square() * outside).sum(-2, keepdim=True), layout, long))
        factor = self.limited_(state, square, layout, growth=self.growth, tick=tick)
        gains = (gains * factor).to(layout.dtype)
        left = step.addcmul_(gains, projected, value=-1).mul_(self.scale * correction)
        gains, right = gains * correction, basis.mT
        if long == -2:
            return Direction(grad, 1.0, left, right, gains)
        return Direction(grad, 1.0, right.mT, left.mT, gains.mT)
