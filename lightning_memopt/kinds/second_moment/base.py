"""The interface of second-moment kinds, which turn gradients into denominators."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_memopt._registry import Registry
from lightning_memopt.kinds.base import Kind, State
from lightning_memopt.kinds.batch import Index, Large, Scratch, take
from lightning_memopt.kinds.direction import Direction
from lightning_memopt.kinds.linalg import store_
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.layout import Layout

# What a kind imports from here.
__all__ = ["SECOND_MOMENTS", "Denominator", "SecondMoment", "State"]


@dataclass(frozen=True)
class Denominator:
    """A denominator ``√square · √square' / √correction + eps``, computed one chunk at a time.

    Attributes:
        squares: Up to two tensors that broadcast against the block ``[..., m, n]``. No tensors: the denominator is 1.
        correction: The bias correction of the second moment.
        eps: Added to the root.
        run: If given, every column of ``squares[0]`` applies to this many columns of the block.
    """

    squares: tuple[Large, Large] | tuple[Large] | tuple[()] = ()
    correction: float = 1.0
    eps: float = 0.0
    run: int | None = None

    def turned(self, direction: Direction) -> Direction:
        """Return the direction that remains to be divided element by element: by a number each, nothing else to do."""
        return direction

    def part(self, layout: Layout) -> Denominator:
        """Return the local part of the denominator of a whole block. The denominator must have no runs."""
        assert self.run is None
        return replace(self, squares=tuple(layout.part(square) for square in self.squares))  # type: ignore[arg-type]

    def at(self, index: Index, scratch: Scratch, columns: int) -> Tensor | None:
        """Return a tensor that broadcasts against one chunk of the block, or None if the denominator is 1.

        Only the scratch may be modified.
        """
        if not self.squares:
            return None
        if not self._vectors or self._vectors[0].dtype != scratch.dtype:
            first, *rest = (take(square, index) for square in self.squares)
            shape = torch.broadcast_shapes(first.shape, *(square.shape for square in rest))
            root = scratch.take("divisor", shape).copy_(first).sqrt_().div_(self.correction**0.5)
            for square in rest:
                root.mul_(square.to(root.dtype).sqrt())
            return root.add_(self.eps)
        first, *rest = (take(vector, index) for vector in self._vectors)
        if rest:
            shape = torch.broadcast_shapes(first.shape, rest[0].shape)
            return torch.mul(first, rest[0], out=scratch.take("divisor", shape)).add_(self.eps)
        return first if self.run is None else first.repeat_interleave(self.run, dim=-1)[..., :columns]

    @cached_property
    def _vectors(self) -> tuple[Tensor, ...]:
        """The roots of squares that many elements share, computed once for all chunks. None for elementwise squares."""
        shared = [isinstance(each, Tensor) and (self.run or min(each.shape[-2:]) <= 1) for each in self.squares]
        if not all(shared):
            return ()
        first, *rest = (square.sqrt() for square in self.squares)  # type: ignore[union-attr]
        first.div_(self.correction**0.5)
        return (first, *rest) if rest else (first.add_(self.eps),)


@dataclass(frozen=True)
class SecondMoment(Kind):
    """A second-moment kind: turns gradients into denominators. Its dense statistic is V, the average of the squares.

    Attributes:
        normalizes: Whether the denominator has the unit of a gradient, so that U / D has no unit and can be bounded.
        of_direction: Whether the denominator is a norm of the direction U itself, from :meth:`of`. It bounds U / D, so
            ``max_update`` does not.
        bias_correction: Divide by 1−β₂ᵗ, as Adam does. Has no effect with β₂ = 1, which accumulates.
        correct_eps: Divide ε by √(1−β₂ᵗ) too, as optimizers do that add it before the bias correction. In the first
            steps, ε is then larger.
    """

    normalizes: ClassVar[bool] = True
    of_direction: ClassVar[bool] = False

    bias_correction: bool = True
    correct_eps: bool = False

    @classmethod
    def options(cls) -> list[str]:
        """Return the names of the kind's options. Without an average there is nothing to correct."""
        return [name for name in super().options() if cls.keys or name not in ("bias_correction", "correct_eps")]

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta2: float, eps: float, tick: Tick
    ) -> Generator[Any, Any, Denominator]:
        """Process a gradient and return the denominator.

        Args:
            grad: ``[..., m, n]``, the local part, of any floating dtype; not modified. If the kind is ``batched``, this
                may be a batch ``[b, ..., m, n]``.
            state: The local tensors from :meth:`.init`; updated in place. For a batch, they are stacked, and those of
                the block's shape are batches.
            layout: The block's layout, or the batch's.
            beta2: Decay rate of the average, in [0, 1); 1 sums instead of averaging.
            eps: Added to the root.
            tick: The current step.
        """
        raise NotImplementedError

    def of(self, direction: Direction, layout: Layout, *, eps: float) -> Generator[Any, Any, Denominator]:
        """Return the denominator of a direction, if the kind reads that instead of the gradient.

        Args:
            direction: U.
            layout: The block's layout, or the batch's.
            eps: Added to the root.
        """
        raise NotImplementedError

    def sums(self, layout: Layout) -> tuple[str, ...]:
        """Return which sums of squares of the gradient :meth:`update` takes: of ``rows``, of ``columns``, or of both.

        A kernel then finds them in the pass that it makes for the momentum.
        """
        return ()

    def denominator(self, state: State, layout: Layout, *, beta2: float, eps: float, tick: Tick) -> Denominator:
        """Return the denominator of the last step again.

        State and layout describe a whole block on one process.
        """
        return self.over(self.to_dense(state, layout), beta2=beta2, eps=eps, tick=tick)

    def accumulate_(
        self, state: Mapping[str, Any], key: str, value: Tensor, *, beta2: float, layout: Layout, tick: Tick
    ) -> Tensor:
        """Average ``value`` into a state tensor of any dtype (with β₂ = 1, add it). Return the new value."""
        new = state[key].to(layout.dtype).mul_(beta2).add_(value, alpha=1 - beta2 if beta2 < 1 else 1.0)
        store_(state[key], new, self.rounding(layout, tick, key))
        return new

    def over(self, *squares: Large, beta2: float, eps: float, tick: Tick, run: int | None = None) -> Denominator:
        """Return the denominator with these squares, and with this step's bias correction and ε."""
        correction = 1 - beta2**tick.step if self.bias_correction and beta2 < 1 else 1.0
        return Denominator(squares, correction, eps / correction**0.5 if self.correct_eps else eps, run)  # type: ignore[arg-type]


SECOND_MOMENTS: Registry[type[SecondMoment]] = Registry("second-moment kind")
