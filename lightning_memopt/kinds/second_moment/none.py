"""No second moment: a denominator of 1, as in SGD."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.second_moment.base import SECOND_MOMENTS, Denominator, SecondMoment, State
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.layout import Layout


@SECOND_MOMENTS.register("none")
@dataclass(frozen=True)
class NoSecondMoment(SecondMoment):
    """D = 1. Keeps no state. The update has the unit of a gradient, so ``max_update`` does not bound it."""

    name: ClassVar[str] = "none"
    needs_matrix: ClassVar[bool] = False
    normalizes: ClassVar[bool] = False
    # A second moment that starts from zero in the middle of training makes the next updates huge.
    restorable: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta2: float, eps: float, tick: Tick
    ) -> Generator[Any, Any, Denominator]:
        """Return a denominator of 1."""
        yield from ()
        return Denominator()

    def denominator(self, state: State, layout: Layout, *, beta2: float, eps: float, tick: Tick) -> Denominator:
        """Return a denominator of 1."""
        return Denominator()

    def from_dense(self, square: Tensor, layout: Layout) -> State:
        """Drop the second moment."""
        return {}
