"""Adam's second moment: one number per element."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_memopt.kinds.batch import Large, chunks
from lightning_memopt.kinds.linalg import store_, store_chunk_
from lightning_memopt.kinds.second_moment.base import SECOND_MOMENTS, Denominator, SecondMoment, State
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import ELEMENTWISE, Sizes


@SECOND_MOMENTS.register("dense")
@dataclass(frozen=True)
class DenseSecondMoment(SecondMoment):
    """V ← β₂ V + (1−β₂) G²,  D = √(V / (1−β₂ᵗ)) + ε.  State: ``exp_avg_sq``, m·n numbers, as in torch's AdamW."""

    name: ClassVar[str] = "dense"
    keys: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)
    squares: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)
    needs_matrix: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    batched: ClassVar[bool] = True

    def sizes(self, layout: Layout) -> dict[str, Sizes]:
        """Return ``exp_avg_sq``, with the shape of the block."""
        return {"exp_avg_sq": ELEMENTWISE}

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta2: float, eps: float, tick: Tick
    ) -> Generator[Any, Any, Denominator]:
        """Average in the squares."""
        yield from ()
        average = state["exp_avg_sq"].view(layout.local)
        noise = self.rounding(layout, tick, "exp_avg_sq")
        weight = 1 - beta2 if beta2 < 1 else 1.0
        for index in chunks(average):
            part = grad[index].to(layout.dtype)
            new = average[index].to(layout.dtype).mul_(beta2).addcmul_(part, part, value=weight)
            store_chunk_(average, index, new, noise)
        return self.over(average, beta2=beta2, eps=eps, tick=tick)

    def to_dense(self, state: State, layout: Layout) -> Tensor:
        """Return ``exp_avg_sq``."""
        return state["exp_avg_sq"].view(layout.local).to(layout.dtype)

    def from_dense(self, square: Tensor, layout: Layout) -> State:
        """Keep the second moment unchanged."""
        state = self.init(layout)
        store_(state["exp_avg_sq"].view(layout.local), square)
        return state
