"""Adafactor's factored second moment."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.linalg import column_square_sums, row_square_sums, store_
from lightning_memopt.kinds.second_moment.base import SECOND_MOMENTS, Denominator, SecondMoment, State
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.collectives import Sum, request
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import Sizes


@SECOND_MOMENTS.register("factored")
@dataclass(frozen=True)
class FactoredSecondMoment(SecondMoment):
    """Row and column means of the squares (Adafactor, arXiv 1804.04235, without its schedule and clipping).

    a ← β₂ a + (1−β₂) mean_n(G²),  c ← β₂ c + (1−β₂) mean_m(G²),  V = a cᵀ / mean(a),  D = √(V / (1−β₂ᵗ)) + ε.

    State: ``factored_row`` ``[..., m, 1]`` and ``factored_col`` ``[..., 1, n]``.
    """

    name: ClassVar[str] = "factored"
    keys: ClassVar[tuple[str, ...]] = ("factored_row", "factored_col")
    squares: ClassVar[tuple[str, ...]] = ("factored_row", "factored_col")
    batched: ClassVar[bool] = True

    def sizes(self, layout: Layout) -> dict[str, Sizes]:
        """Return both means."""
        return {"factored_row": (-2, 1), "factored_col": (1, -1)}

    def sums(self, layout: Layout) -> tuple[str, ...]:
        """Return both."""
        return "rows", "columns"

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta2: float, eps: float, tick: Tick
    ) -> Generator[Any, Any, Denominator]:
        """Average in the mean squares of rows and columns."""
        m, n = layout.matrix[-2:]
        columns = column_square_sums(grad, layout.dtype)
        (rows,) = yield from request(Sum(row_square_sums(grad, layout.dtype), layout, -1))
        row = self.accumulate_(state, "factored_row", rows.div_(n), beta2=beta2, layout=layout, tick=tick)
        # The total is float64 so that it shares a collective with the Gram matrices of the momentum.
        columns, total = yield from request(
            Sum(columns, layout, -2), Sum(row.sum(-2, keepdim=True, dtype=torch.float64), layout, -2)
        )
        column = self.accumulate_(state, "factored_col", columns.div_(m), beta2=beta2, layout=layout, tick=tick)
        return self.over(row / _mean(total.to(row.dtype), m), column, beta2=beta2, eps=eps, tick=tick)

    def to_dense(self, state: State, layout: Layout) -> Tensor:
        """Return a cᵀ / mean(a)."""
        row, column = (state[key].to(layout.dtype) for key in self.keys)
        return row / _mean(row.sum(-2, keepdim=True), layout.matrix[-2]) * column

    def from_dense(self, square: Tensor, layout: Layout) -> State:
        """Keep the means over rows and columns."""
        state = self.init(layout)
        store_(state["factored_row"], square.mean(-1, keepdim=True))
        store_(state["factored_col"], square.mean(-2, keepdim=True))
        return state


def _mean(total: Tensor, count: int) -> Tensor:
    """Return a mean that is safe to divide by, even if all gradients so far were zero."""
    return (total / count).clamp(min=torch.finfo(total.dtype).tiny)
