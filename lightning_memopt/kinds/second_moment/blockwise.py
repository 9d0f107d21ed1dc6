"""Adam-mini's second moment: one number per block of the Hessian's structure."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.linalg import column_square_sums, row_square_sums, store_
from lightning_memopt.kinds.second_moment.base import SECOND_MOMENTS, Denominator, SecondMoment, State
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.collectives import Sum, request
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import Sizes


@SECOND_MOMENTS.register("blockwise")
@dataclass(frozen=True)
class BlockwiseSecondMoment(SecondMoment):
    """V ← β₂ V + (1−β₂) mean(G²) over each head or output, D = √(V / (1−β₂ᵗ)) + ε (Adam-mini, arXiv 2406.16793).

    Query and key weights keep one number per attention head if the head size is known. All other weights keep one per
    output (for an embedding, per token). State: ``blockwise_sq``, one number per head or output.

    Attributes:
        outputs_per_number: Outputs that share a number. None means a head for queries and keys, and 1 elsewhere.
    """

    name: ClassVar[str] = "blockwise"
    keys: ClassVar[tuple[str, ...]] = ("blockwise_sq",)
    squares: ClassVar[tuple[str, ...]] = ("blockwise_sq",)
    batched: ClassVar[bool] = True

    outputs_per_number: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.outputs_per_number
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"`outputs_per_number` must be an integer of at least 1 or None, got {size!r}.")

    def resolve(self, layout: Layout) -> BlockwiseSecondMoment:
        """Take the head size from the layout if none was given."""
        return replace(self, outputs_per_number=self._run(layout))

    def sizes(self, layout: Layout) -> dict[str, Sizes]:
        """Return one number per head or output."""
        size, count = self._run(layout), layout.output_dim
        if size > 1:
            if layout.matrix[count] % size:
                raise ValueError(
                    f"`outputs_per_number` {size} does not divide the outputs of a block of shape {layout.shape}."
                )
            count = layout.matrix[count] // size
        return {"blockwise_sq": (count, 1) if layout.output_dim == -2 else (1, count)}

    def needs_whole(self, layout: Layout) -> bool:
        """Return whether shards may split heads: there are heads, and their outputs are sharded."""
        return self._run(layout) > 1 and layout.divides(layout.output_dim)

    def sums(self, layout: Layout) -> tuple[str, ...]:
        """Return those of the outputs."""
        return ("rows",) if layout.output_dim == -2 else ("columns",)

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta2: float, eps: float, tick: Tick
    ) -> Generator[Any, Any, Denominator]:
        """Average in the mean square of every head or output."""
        rows = layout.output_dim == -2
        sums, over = (row_square_sums, -1) if rows else (column_square_sums, -2)
        (value,) = yield from request(Sum(sums(grad, layout.dtype), layout, over))
        value = self._per_head(value / layout.matrix[over], layout)
        square = self.accumulate_(state, "blockwise_sq", value, beta2=beta2, layout=layout, tick=tick)
        return self.over(self._spread(square, layout), beta2=beta2, eps=eps, tick=tick)

    def to_dense(self, state: State, layout: Layout) -> Tensor:
        """Spread each mean over its head or output."""
        return self._spread(state["blockwise_sq"].to(layout.dtype), layout).expand(layout.local).contiguous()

    def from_dense(self, value: Tensor, layout: Layout) -> State:
        """Keep the mean over each head or output."""
        state = self.init(layout)
        mean = value.mean(-1 if layout.output_dim == -2 else -2, keepdim=True)
        store_(state["blockwise_sq"], self._per_head(mean, layout))
        return state

    def infer(self, state: Mapping[str, Tensor], layout: Layout) -> BlockwiseSecondMoment:
        """Infer the head size from the number of means."""
        count = max(1, int(state["blockwise_sq"].shape[layout.output_dim]))
        outputs = layout.matrix[layout.output_dim]
        kind = replace(self, outputs_per_number=max(1, outputs // count) if outputs % count == 0 else 1)
        return SecondMoment.infer(kind, state, layout)

    def _run(self, layout: Layout) -> int:
        return self.outputs_per_number or layout.head_dim or 1

    def _per_head(self, value: Tensor, layout: Layout) -> Tensor:
        """Average the outputs of each head."""
        size, dim = self._run(layout), layout.output_dim
        return value if size == 1 else value.unflatten(dim, (-1, size)).mean(dim)

    def _spread(self, value: Tensor, layout: Layout) -> Tensor:
        """Repeat the number of each head for all outputs of the head."""
        size = self._run(layout)
        return value if size == 1 else value.repeat_interleave(size, dim=layout.output_dim)
