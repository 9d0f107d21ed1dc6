"""No momentum: the direction is the gradient."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.momentum.base import MOMENTA, Direction, Momentum, State
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.layout import Layout


@MOMENTA.register("none")
@dataclass(frozen=True)
class NoMomentum(Momentum):
    """U = G. Keeps no state."""

    name: ClassVar[str] = "none"
    needs_matrix: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    batched: ClassVar[bool] = True

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta1: float, tick: Tick
    ) -> Generator[Any, Any, Direction]:
        """Return the gradient itself."""
        yield from ()
        return Direction(grad)

    def to_dense(self, state: State, layout: Layout) -> Tensor:
        """Return zeros, since nothing is kept."""
        return torch.zeros(layout.local, dtype=layout.dtype, device=layout.device)

    def from_dense(self, momentum: Tensor, layout: Layout) -> State:
        """Drop the momentum."""
        return {}
