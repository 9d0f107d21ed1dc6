"""GaLore: Adam in the leading subspace of the gradient, and nothing outside it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.momentum.base import MOMENTA, Direction
from lightning_memopt.kinds.momentum.projections import sides
from lightning_memopt.kinds.momentum.subspace_adam import SubspaceAdam
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.layout import Layout


@MOMENTA.register("galore")
@dataclass(frozen=True)
class GaLoreMomentum(SubspaceAdam):
    """Adam inside a subspace of the short side (GaLore, arXiv 2403.03507).

    For a tall block, m ≥ n (a wide block is transposed)::

        every `gap` steps:  P ← `projection`(G)
        R = G P,  M ← β₁ M + (1−β₁) R,  V ← β₂ V + (1−β₂) R²
        U = `scale` · √(1−β₂ᵗ) / (1−β₁ᵗ) · M / (√V + ε) Pᵀ

    M and V keep their numbers in a new subspace, as in the authors' code. The second moment of the block is ``none``.

    State: ``galore_p`` ``[..., n, k]`` with orthonormal (or zero) columns, ``galore_m`` and ``galore_v``
    ``[..., m, k]``.
    """

    name: ClassVar[str] = "galore"
    keys: ClassVar[tuple[str, ...]] = ("galore_p", "galore_m", "galore_v")
    squares: ClassVar[tuple[str, ...]] = ("galore_v",)
    averages: ClassVar[tuple[str, str]] = ("galore_m", "galore_v")
    projection_keys: ClassVar[tuple[str, ...]] = ("galore_p",)
    batched: ClassVar[bool] = True

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
        """Refresh the subspace if due, then take a step of Adam in it."""
        long, _ = sides(layout)
        basis, projected = yield from self.projected_(state, grad if long == -2 else grad.mT, layout, tick)
        step, correction = self.averaged_(state, projected, layout, beta1=beta1, beta2=beta2, eps=eps, tick=tick)
        left, right = step.mul_(self.scale * correction), basis.mT
        return Direction(grad, 0.0, left, right) if long == -2 else Direction(grad, 0.0, right.mT, left.mT)
