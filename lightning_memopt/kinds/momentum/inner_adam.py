"""Adam inside a projection: what the kinds have in common that average squares as well."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.linalg import row_square_sums, store_
from lightning_memopt.kinds.momentum.base import Direction, Momentum, State
from lightning_memopt.kinds.momentum.projections import check_gap, sides
from lightning_memopt.kinds.momentum.rank import check_rank, resolve_rank
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import Sizes


@dataclass(frozen=True)
class InnerAdam(Momentum):
    """Adam on a projection of the gradient.

    With R = G P for a tall block (a wide one is transposed)::

        M ← β₁ M + (1−β₁) R,  V ← β₂ V + (1−β₂) R²,  N = M / (√V + ε),  c = √(1−β₂ᵗ) / (1−β₁ᵗ)

    ε is added before the bias correction c, as the authors of all these kinds do.

    Attributes:
        averages: The ``keys`` of M and V.
        norm_key: The key of the norm that the growth limiter remembers; empty for a kind without one.
        rank: k: an integer, or a fraction of the short side (then at least 4).
        gap: Steps between two projections. Blocks take turns.
        scale: Factor on the update.
    """

    averages: ClassVar[tuple[str, str]]
    norm_key: ClassVar[str] = ""
    averages_squares: ClassVar[bool] = True
    # Other kinds cannot continue from it: squares in a projection say nothing of those of single elements.
    restorable: ClassVar[bool] = False

    rank: int | float = 1 / 4
    gap: int = 200
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)
        check_gap(self.gap)
        check_above("scale", self.scale, 0)

    def resolve(self, layout: Layout) -> Self:
        """Replace a fraction by the rank for this block."""
        return replace(self, rank=resolve_rank(self.rank, layout))

    def sizes(self, layout: Layout) -> dict[str, Sizes]:
        """Return the basis if it is stored, both averages, and the norm that the limiter remembers."""
        rank, (long, short) = resolve_rank(self.rank, layout), sides(layout)
        found: dict[str, Sizes] = {key: (short, rank) for key in self.projection_keys}
        found |= {key: (long, rank) for key in self.averages}
        return found | ({self.norm_key: (1, 1)} if self.norm_key else {})

    def phase(self, tick: Tick) -> Hashable:
        """Return whether a new projection is due."""
        return tick.due(self.gap)

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
        """Process a gradient as :meth:`Momentum.update` does, with the second moment's decay rate and ε."""
        raise NotImplementedError

    def averaged_(
        self,
        state: Mapping[str, Any],
        projected: Tensor,
        layout: Layout,
        *,
        beta1: float,
        beta2: float,
        eps: float,
        tick: Tick,
    ) -> tuple[Tensor, float]:
        """Average in the projected gradient R. Return N and c. With β₂ = 1, squares are added up."""
        first, second = (state[key].to(layout.dtype) for key in self.averages)
        first = first.lerp(projected, 1 - beta1)
        second = second.mul(beta2).addcmul_(projected, projected, value=1 - beta2 if beta2 < 1 else 1.0)
        for key, value in zip(self.averages, (first, second), strict=True):
            store_(state[key], value, self.rounding(layout, tick, key))
        root = second.sqrt_().add_(eps)
        correction = (1 - beta2**tick.step if beta2 < 1 else 1.0) ** 0.5 / (1 - beta1**tick.step)
        return first / torch.where(root > 0, root, 1.0), correction

    def limited_(
        self, state: Mapping[str, Any], square: Tensor, layout: Layout, *, growth: float, tick: Tick
    ) -> Tensor:
        """Return the factor that keeps the norm of an update within ``growth`` times that of the last one.

        An update of zero has no norm to remember, and one that follows none before it is not limited.

        Args:
            state: The state; the norm of the limited update is stored.
            square: The squared norm of the update, over all ranks: ``[..., 1, 1]``, float64.
            layout: The layout.
            growth: The largest factor between two norms.
            tick: The current step.
        """
        norm, before = square.sqrt(), state[self.norm_key].double()
        bound = growth * before
        factor = torch.where((before > 0) & (norm > bound), bound / torch.where(norm > 0, norm, 1.0), 1.0)
        kept = torch.where(norm > 0, norm * factor, before).to(layout.dtype)
        store_(state[self.norm_key], kept, self.rounding(layout, tick, self.norm_key))
        return factor

    def from_dense(self, momentum: Tensor, layout: Layout) -> State:
        """Return state of a momentum whose squares are all that is known of V, for a block without a name or a step."""
        return self.from_moments(momentum, momentum.square(), layout, Tick(1, 0, 0), (1.0, 1.0))

    def infer(self, state: Mapping[str, Tensor], layout: Layout) -> Self:
        """Infer the rank from the first of the state tensors, which all have it."""
        kind = replace(self, rank=max(1, int(state[self.keys[0]].shape[-1])))
        return Momentum.infer(kind, state, layout)


def projected_squares(momentum: Tensor, square: Tensor, basis: Tensor, weights: tuple[float, float]) -> Tensor:
    """Return the average squares of R = G P, from the averages of G and G² and their weights.

    Elements of G vary on their own, and their means add up: with M and V corrected, V ← (V − M²) P² + (M P)².
    """
    mean, square = momentum / weights[0], square / weights[1]
    return ((square - mean.square()).clamp_(min=0) @ basis.square() + (mean @ basis).square()).mul_(weights[1])


def norm_ratio(scaled: Tensor, plain: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ‖N‖ / ‖R‖ from sums of squares, in float64; 0 where R is 0.

    The ratio is bounded by the root of the largest number of ``dtype``: where a gradient of almost 0 follows larger
    ones, it would become infinite in ``dtype``, and NaN where it meets an element of 0.
    """
    ratio = torch.where(plain > 0, scaled / torch.where(plain > 0, plain, 1.0), 0.0).sqrt_()
    return ratio.clamp_(max=torch.finfo(dtype).max ** 0.5)


def square_sums(matrix: Tensor) -> Tensor:
    """Return the sums of squares of all rows of a small matrix: ``[..., m, k]`` → ``[..., m, 1]``.

    In float64, since the squares of large gradients overflow float32 where a projection has made them larger.
    """
    return row_square_sums(matrix, torch.float64)


def check_above(name: str, value: float, least: float) -> None:
    """Check that an option is a number above ``least``.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > least:
        raise ValueError(f"`{name}` must be a number above {least:g}, got {value!r}.")
