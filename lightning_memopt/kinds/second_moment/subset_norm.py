"""Subset-Norm: one step size per subset of a block."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_memopt._registry import unknown
from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.linalg import column_square_sums, row_square_sums, store_
from lightning_memopt.kinds.second_moment.base import SECOND_MOMENTS, Denominator, SecondMoment, State
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.collectives import Sum, request
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import Sizes

REDUCTIONS = ("mean", "sum")


@SECOND_MOMENTS.register("subset_norm")
@dataclass(frozen=True)
class SubsetNormSecondMoment(SecondMoment):
    """V ← β₂ V + (1−β₂) reduce(G²) over each subset, D = √(V / (1−β₂ᵗ)) + ε (SNSM, arXiv 2411.07120).

    By default a subset is a row of a tall block or a column of a wide one. State: ``subset_norm_sq`` of shape
    ``[..., m, 1]``, ``[..., 1, n]`` or ``[..., m, ceil(n / subset_size)]``. It holds the mean with either reduction.

    Attributes:
        reduction: ``mean`` keeps AdamW's learning rate. The paper's ``sum`` shrinks updates by √(subset's size).
        subset_size: Elements of a subset, which is a run along a row. The last run of a row may be shorter. A size of
            n or more makes every row one subset. None: the rows of a tall block, the columns of a wide one.
    """

    name: ClassVar[str] = "subset_norm"
    keys: ClassVar[tuple[str, ...]] = ("subset_norm_sq",)
    squares: ClassVar[tuple[str, ...]] = ("subset_norm_sq",)
    batched: ClassVar[bool] = True

    reduction: str = "mean"
    subset_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction not in REDUCTIONS:
            raise ValueError(unknown("reduction", self.reduction, list(REDUCTIONS)))
        size = self.subset_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"`subset_size` must be an integer of at least 1 (elements) or None, got {size!r}.")

    def sizes(self, layout: Layout) -> dict[str, Sizes]:
        """Return one number per subset."""
        m, n = layout.matrix[-2:]
        if self.subset_size is None:
            return {"subset_norm_sq": (-2, 1) if m >= n else (1, -1)}
        return {"subset_norm_sq": (-2, -(-n // max(1, min(self.subset_size, n))))}

    def needs_whole(self, layout: Layout) -> bool:
        """Return whether shards may split runs: there are runs, and rows are sharded along their length."""
        return self.subset_size is not None and layout.divides(-1)

    def sums(self, layout: Layout) -> tuple[str, ...]:
        """Return those of the subsets, unless they are runs."""
        m, n = layout.matrix[-2:]
        if self.subset_size is not None:
            return ()
        return ("rows",) if m >= n else ("columns",)

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta2: float, eps: float, tick: Tick
    ) -> Generator[Any, Any, Denominator]:
        """Average in the squares of the subsets."""
        m, n = layout.matrix[-2:]
        if self.subset_size is not None:
            value, over, run = (
                row_square_sums(grad, layout.dtype, self.subset_size),
                -1,
                max(1, min(self.subset_size, n)),
            )
        elif m >= n:
            value, over, run = row_square_sums(grad, layout.dtype), -1, None
        else:
            value, over, run = column_square_sums(grad, layout.dtype), -2, None
        (value,) = yield from request(Sum(value, layout, over))
        sizes = self._sizes(layout)
        square = self.accumulate_(state, "subset_norm_sq", value / sizes, beta2=beta2, layout=layout, tick=tick)
        # The state is the mean with either reduction, so a checkpoint does not depend on it.
        square = square * sizes if self.reduction == "sum" else square
        return self.over(square, beta2=beta2, eps=eps, tick=tick, run=run)

    def denominator(self, state: State, layout: Layout, *, beta2: float, eps: float, tick: Tick) -> Denominator:
        """Return the denominator of the last step again."""
        square = state["subset_norm_sq"].to(layout.dtype)
        square = square * self._sizes(layout) if self.reduction == "sum" else square
        dense = self.to_dense({"subset_norm_sq": square}, layout)
        return self.over(dense, beta2=beta2, eps=eps, tick=tick)

    def to_dense(self, state: State, layout: Layout) -> Tensor:
        """Spread each subset's mean over its elements."""
        square = state["subset_norm_sq"].to(layout.dtype)
        if self.subset_size is not None:
            run = min(self.subset_size, layout.matrix[-1])
            square = square.repeat_interleave(run, dim=-1)[..., : layout.matrix[-1]]
        return square.expand(layout.local).contiguous()

    def from_dense(self, square: Tensor, layout: Layout) -> State:
        """Keep the mean over each subset."""
        state = self.init(layout)
        m, n = layout.matrix[-2:]
        root = square.sqrt()
        if self.subset_size is None and m < n:
            value = column_square_sums(root, layout.dtype)
        else:
            value = row_square_sums(root, layout.dtype, self.subset_size)
        store_(state["subset_norm_sq"], value / self._sizes(layout))
        return state

    def _sizes(self, layout: Layout) -> Tensor | float:
        """Return the number of elements of each subset: a number, or a tensor that broadcasts against the state."""
        m, n = layout.matrix[-2:]
        if self.subset_size is None:
            return float(max(1, min(m, n)))
        run = max(1, min(self.subset_size, n))
        starts = torch.arange(0, n, run, device=layout.device)
        return (n - starts).clamp(max=run).to(layout.dtype)
