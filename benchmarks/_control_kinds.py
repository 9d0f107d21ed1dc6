"""Momentum kinds that only serve as controls: they explain low-rank momentum, at the cost of a dense state."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.momentum import MOMENTA, Direction, Momentum
from lightning_memopt.kinds.momentum.rank import resolve_rank
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import ELEMENTWISE, Sizes


@MOMENTA.register("control")
@dataclass(frozen=True)
class ControlMomentum(Momentum):
    """Momentum M written out, and a basis Q of its leading directions.

    Attributes:
        rank: Number of directions.
        mode: ``low_rank``: what :class:`LowRankMomentum` does, to check this class. ``best``: the same with the best
            basis, from a singular value decomposition. ``inverse``: momentum everywhere but in the leading directions,
            where the direction is the gradient. ``inside``: momentum in the leading directions only, without what
            is dropped. ``small``: outside of them the gradient, as small as momentum makes noise. ``averaged``: outside
            of them momentum, as large as the gradient's noise.
        iterations: Power iterations per step.
    """

    name: ClassVar[str] = "control"
    keys: ClassVar[tuple[str, ...]] = ("control_m", "control_q")

    rank: int | float = 4
    mode: str = "low_rank"
    iterations: int = 1

    def resolve(self, layout: Layout) -> ControlMomentum:
        """Replace a fraction by the rank for this block."""
        return replace(self, rank=resolve_rank(self.rank, layout))

    def sizes(self, layout: Layout) -> dict[str, Sizes]:
        """Return M and Q."""
        return {"control_m": ELEMENTWISE, "control_q": (-2, resolve_rank(self.rank, layout))}

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta1: float, tick: Tick
    ) -> Generator[Any, Any, Direction]:
        """Return the direction of the mode."""
        yield from ()
        assert isinstance(grad, Tensor)
        gradient, momentum, basis = grad.float(), state["control_m"].view(layout.local), state["control_q"]
        new = momentum.lerp(gradient, 1 - beta1)
        basis.copy_(self._basis(new, momentum, basis))
        inside = basis @ (basis.mT @ new)
        correction = 1 - beta1**tick.step
        if self.mode == "inverse":
            direction = (new - inside) / correction + basis @ (basis.mT @ gradient)
            kept = new
        elif self.mode == "small":
            outside = gradient - basis @ (basis.mT @ gradient)
            direction, kept = inside / correction + noise_gain(beta1) * outside, new
        elif self.mode == "averaged":
            direction, kept = (inside + (new - inside) / noise_gain(beta1)) / correction, new
        elif self.mode == "inside":
            direction, kept = inside / correction, inside
        else:
            direction, kept = inside / correction + (new - inside) / (1 - beta1), inside
        momentum.copy_(kept)
        return Direction(direction)

    def _basis(self, new: Tensor, old: Tensor, basis: Tensor) -> Tensor:
        rank = basis.shape[-1]
        if self.mode == "best":
            return torch.linalg.svd(new, full_matrices=False)[0][..., :rank]
        rows = basis.mT @ old
        if not bool(rows.any()):
            rows = torch.randn(rank, new.shape[-1], generator=torch.Generator().manual_seed(0))
        for _ in range(self.iterations):
            sketch = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            found = torch.linalg.qr(new @ sketch.mT)[0]
            rows = found.mT @ new
        return found

    def to_dense(self, state: Any, layout: Layout) -> Tensor:
        """Return M."""
        return state["control_m"].view(layout.local)


def noise_gain(beta1: float) -> float:
    """Return the size of an average of noise, relative to the noise."""
    return math.sqrt((1 - beta1) / (1 + beta1))
