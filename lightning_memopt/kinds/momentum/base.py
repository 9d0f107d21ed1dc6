"""The interface of momentum kinds, which turn gradients into directions."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_memopt._registry import Registry
from lightning_memopt.kinds.base import Kind, State
from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.direction import Direction
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.layout import Layout

# What a kind imports from here.
__all__ = ["MOMENTA", "Direction", "Momentum", "State"]


@dataclass(frozen=True)
class Momentum(Kind):
    """A momentum kind: turns gradients into directions. Its dense statistic is M, the average of the gradients.

    Attributes:
        projection_keys: The ``keys`` that hold the basis of a subspace. The basis is counted separately from the
            momentum inside the subspace.
        averages_squares: Whether the kind averages squares, too, inside of a projection, and divides by their root:
            its direction has no unit. Its ``update`` gets ``beta2`` and ``eps`` as well, and the second moment of its
            blocks is ``none``. It starts from both averages of another recipe (:meth:`from_moments`).
    """

    projection_keys: ClassVar[tuple[str, ...]] = ()
    averages_squares: ClassVar[bool] = False

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta1: float, tick: Tick
    ) -> Generator[Any, Any, Direction]:
        """Process a gradient and return the direction.

        Args:
            grad: ``[..., m, n]``, the local part, of any floating dtype; not modified. If the kind is ``batched``, this
                may be a batch ``[b, ..., m, n]``.
            state: The local tensors from :meth:`.init`; updated in place. For a batch, they are stacked, and those of
                the block's shape are batches.
            layout: The block's layout, or the batch's.
            beta1: Decay rate of the average, in [0, 1).
            tick: The current step.
        """
        raise NotImplementedError

    def factors(self, state: State, layout: Layout) -> tuple[Tensor, Tensor] | None:
        """Return ``[..., m, r]`` and ``[..., r, n]`` whose product is M, or None if the kind keeps no factors."""
        return None

    def to_dense(self, state: State, layout: Layout) -> Tensor:
        """Return M. For a kind that keeps factors, M is their product."""
        factors = self.factors(state, layout)
        if factors is None:
            raise NotImplementedError(f"The momentum kind {self.name!r} defines neither factors nor to_dense.")
        left, right = factors
        return left @ right

    def from_moments(
        self, momentum: Tensor, square: Tensor, layout: Layout, tick: Tick, weights: tuple[float, float]
    ) -> State:
        """Return the state that best approximates M and V, if the kind averages squares.

        State and layout describe a whole block on one process. The tick is that of the next step. The weights are those
        of all gradients in M and V, 1 − β₁ᵗ and 1 − β₂ᵗ.
        """
        raise NotImplementedError

    def resized(self, state: State, layout: Layout) -> State | None:
        """Return this kind's state at another rank, made from the old state, or None to convert through the dense form.

        A larger rank keeps M exactly; a smaller one keeps its best approximation. State and layout describe a whole
        block on one process.
        """
        return None


MOMENTA: Registry[type[Momentum]] = Registry("momentum kind")
