"""Normalized gradients: a direction over the norm of its own rows or columns."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_memopt._registry import unknown
from lightning_memopt.kinds.batch import Large, Scratch, chunks, take_stack
from lightning_memopt.kinds.direction import Direction
from lightning_memopt.kinds.linalg import column_square_sums, row_square_sums
from lightning_memopt.kinds.second_moment.base import SECOND_MOMENTS, Denominator, SecondMoment, State
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.collectives import Sum, request
from lightning_memopt.sharding.layout import Layout

SIDES = ("output", "input")


@SECOND_MOMENTS.register("normalized")
@dataclass(frozen=True)
class NormalizedSecondMoment(SecondMoment):
    """D = √mean(U²) + ε over each output or input (SCALE, arXiv 2506.16659). Keeps no state.

    The mean is that of the direction, not of the gradient: momentum is averaged first, then normalized. It bounds
    every element of U / D by the root of the number of elements that share it.

    Attributes:
        per: ``output``: one mean for each output of the layer (a row, or a column where weights are stored
            transposed); ``input``: one for each input. An embedding's rows, its tokens, count as outputs.
    """

    name: ClassVar[str] = "normalized"
    of_direction: ClassVar[bool] = True
    # As with `none`: a second moment that starts from zero in the middle of training makes the next updates huge.
    restorable: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    per: str = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in SIDES:
            raise ValueError(unknown("`per`", self.per, list(SIDES)))

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta2: float, eps: float, tick: Tick
    ) -> Generator[Any, Any, Denominator]:
        """Return the root mean squares of the gradient, which is the direction where there is no momentum."""
        return (yield from self.of(Direction(grad), layout, eps=eps))

    def of(self, direction: Direction, layout: Layout, *, eps: float) -> Generator[Any, Any, Denominator]:
        """Return the root mean squares of the direction."""
        rows = (layout.output_dim == -2) == (self.per == "output")
        over = -1 if rows else -2
        (square,) = yield from request(Sum(_square_sums(direction, over, layout.dtype), layout, over))
        return Denominator((square / max(1, layout.matrix[over]),), eps=eps)

    def from_dense(self, square: Tensor, layout: Layout) -> State:
        """Drop the second moment."""
        return {}


def _square_sums(direction: Direction, over: int, dtype: torch.dtype) -> Tensor:
    """Return the sums of squares of this rank's rows (``over`` −1) or columns (−2)."""
    base = direction.base
    if direction.plain and direction.left is None:
        sums = row_square_sums(base, dtype) if over == -1 else column_square_sums(base, dtype)
        return sums.mul_(direction.scale**2)
    shape = list(base.shape)
    shape[over] = 1
    out, scratch = base.new_zeros(shape, dtype=dtype), Scratch(base, dtype)
    for index in chunks(base):
        part, scale = direction.at(index, scratch)
        square = torch.square(part).sum(over, keepdim=True).mul_(scale**2)
        (out[index] if over == -1 else take_stack(out, index)).add_(square)
    return out
