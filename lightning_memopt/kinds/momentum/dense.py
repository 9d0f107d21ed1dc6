"""Adam's momentum: one number per element."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_memopt.kinds.batch import Index, Large, Scratch, chunks
from lightning_memopt.kinds.linalg import store_, store_chunk_
from lightning_memopt.kinds.momentum.base import MOMENTA, Direction, Momentum, State
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import ELEMENTWISE, Sizes


@dataclass(frozen=True, kw_only=True)
class Ahead(Direction):
    """A direction ``scale · (weight · base + (1 − weight) · fresh)``, computed one chunk at a time."""

    plain: ClassVar[bool] = False

    fresh: Large
    weight: float

    @property
    def mT(self) -> Ahead:
        """The direction of the transposed block."""
        return replace(self, base=self.base.mT, fresh=self.fresh.mT)

    def at(self, index: Index, scratch: Scratch) -> tuple[Tensor, float]:
        """Return one chunk of the direction without its scale, and the scale."""
        fresh, base = scratch.cast("fresh", self.fresh[index]), scratch.cast("base", self.base[index])
        return torch.lerp(fresh, base, self.weight, out=scratch.take("update", base.shape)), self.scale


@MOMENTA.register("dense")
@dataclass(frozen=True)
class DenseMomentum(Momentum):
    """M ← β₁ M + (1−β₁) G,  U = M / (1−β₁ᵗ).  State: ``exp_avg``, m·n numbers, as in ``torch.optim.AdamW``.

    Attributes:
        bias_correction: Divide by 1−β₁ᵗ, as Adam does; AdaGrad-style optimizers do not.
        nesterov: Look one step ahead, as if G came once more: U = (β₁ M + (1−β₁) G) / (1−β₁ᵗ⁺¹).
    """

    name: ClassVar[str] = "dense"
    keys: ClassVar[tuple[str, ...]] = ("exp_avg",)
    needs_matrix: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    batched: ClassVar[bool] = True

    bias_correction: bool = True
    nesterov: bool = False

    def sizes(self, layout: Layout) -> dict[str, Sizes]:
        """Return ``exp_avg``, with the shape of the block."""
        return {"exp_avg": ELEMENTWISE}

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta1: float, tick: Tick
    ) -> Generator[Any, Any, Direction]:
        """Average in the gradient."""
        yield from ()
        average = state["exp_avg"].view(layout.local)
        noise = self.rounding(layout, tick, "exp_avg")
        for index in chunks(average):
            part = average[index].to(layout.dtype).lerp_(grad[index].to(layout.dtype), 1 - beta1)
            store_chunk_(average, index, part, noise)
        steps = tick.step + self.nesterov
        scale = 1 / (1 - beta1**steps) if self.bias_correction else 1.0
        return (
            Ahead(base=average, scale=scale, fresh=grad, weight=beta1) if self.nesterov else Direction(average, scale)
        )

    def to_dense(self, state: State, layout: Layout) -> Tensor:
        """Return ``exp_avg``."""
        return state["exp_avg"].view(layout.local).to(layout.dtype)

    def from_dense(self, momentum: Tensor, layout: Layout) -> State:
        """Keep the momentum unchanged."""
        state = self.init(layout)
        store_(state["exp_avg"].view(layout.local), momentum)
        return state
