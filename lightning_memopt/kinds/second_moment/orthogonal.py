"""Orthogonalized momentum: a direction over the matrix root of its own squares, as in Muon."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_memopt._registry import unknown
from lightning_memopt.kinds.batch import Index, Large, Scratch, chunks, limit, take_stack
from lightning_memopt.kinds.direction import Direction
from lightning_memopt.kinds.newton_schulz import LARGEST, MOST_STEPS, inverse_root, reach
from lightning_memopt.kinds.second_moment.base import SECOND_MOMENTS, Denominator, SecondMoment, State
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.collectives import Sum, request
from lightning_memopt.sharding.layout import Layout

ADJUSTMENTS = ("match_rms_adamw", "original")


@dataclass(frozen=True, kw_only=True)
class Turned(Direction):
    """A direction times a matrix on its short side, computed one chunk at a time.

    Attributes:
        tall: The direction, transposed if the block is wide.
        matrix: ``[..., k, k]``, symmetric.
        wide: Whether the block is wide, so that the matrix multiplies from the left.
    """

    tall: Direction
    matrix: Tensor
    wide: bool

    @property
    def plain(self) -> bool:
        """Whether kernels can compute it: they do not multiply by the matrix."""
        return False

    def at(self, index: Index, scratch: Scratch) -> tuple[Tensor, float]:
        """Return one chunk of the direction, and the factor that it still needs."""
        if not self.wide:
            part, scale = self.tall.at(index, scratch)
            product = scratch.take("turned", part.shape)
            return torch.matmul(part, take_stack(self.matrix, index), out=product), scale
        stack = len(self.base.shape) - 2
        within: Index = (*index[:stack], *[slice(None)] * (stack - len(index)))
        matrix = take_stack(self.matrix, within)[..., index[stack] if len(index) > stack else slice(None)]
        *outer, k, rows = matrix.shape
        columns = self.base.shape[-1]
        product = scratch.take("turned", torch.Size((*outer, rows, columns)))
        panel, scale = max(1, limit(self.base) // max(1, k * math.prod(outer))), 1.0
        for start in range(0, columns, panel):
            stop = min(start + panel, columns)
            part, scale = self.tall.at((*within, slice(start, stop)), scratch)
            product[..., start:stop] = matrix.mT @ part.mT
        return product, scale


@dataclass(frozen=True, kw_only=True)
class Root(Denominator):
    """A denominator that is a matrix.

    Attributes:
        inverse: ``[..., k, k]``: its inverse, which multiplies the short side of the whole block; or ``[..., k, j]``,
            the columns for the part of the short side that this rank holds.
        wide: Whether the short side is that of the rows.
        complete: The direction along the whole short side, ``[..., rows, k]``, if this rank holds a part only.
    """

    inverse: Tensor
    wide: bool
    complete: Tensor | None = None

    def part(self, layout: Layout) -> Denominator:
        """Return what is left to divide by, given that the whole block has been turned: nothing."""
        return Denominator()

    def turned(self, direction: Direction) -> Direction:
        """Return the direction over the matrix."""
        if self.complete is not None:
            tall = Direction(direction.base.mT if self.wide else direction.base, 0.0, self.complete, self.inverse)
            return tall.mT if self.wide else tall
        tall = direction.mT if self.wide else direction
        return Turned(base=direction.base, tall=tall, matrix=self.inverse, wide=self.wide)


@SECOND_MOMENTS.register("orthogonal")
@dataclass(frozen=True)
class OrthogonalSecondMoment(SecondMoment):
    """D = (UᵀU)^½, so that U / D has singular values near 1 (Muon, kellerjordan.github.io/posts/muon).

    The inverse root is that of the iteration X ← a X + b X XᵀX + c X (XᵀX)², from X = U / ‖U‖. Of a wide block, it is
    that of U Uᵀ. No element of U / D exceeds the factor of ``adjust_lr_fn`` by more than a half. Keeps no state.

    Attributes:
        ns_coefficients: a, b, c. With the defaults, which are those of ``torch.optim.Muon``, singular values end
            between 0.7 and 1.2.
        ns_steps: Number of iterations. A singular value below 1/500 of ‖U‖ stays below 1 after five of them.
        adjust_lr_fn: ``match_rms_adamw``: times 0.2 √max(m, n), so that AdamW's learning rate and decay fit (arXiv
            2502.16982). ``original``: times √max(1, outputs / inputs), for learning rates such as 0.02.
    """

    name: ClassVar[str] = "orthogonal"
    of_direction: ClassVar[bool] = True
    restorable: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    ns_steps: int = 5
    adjust_lr_fn: str = "match_rms_adamw"

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, given = self.ns_steps, self.ns_coefficients
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
            raise ValueError(
                f"`ns_steps` must be an integer from 1 to {MOST_STEPS}, got {steps!r}; more would amplify roundings."
            )
        if self.adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(unknown("`adjust_lr_fn`", self.adjust_lr_fn, list(ADJUSTMENTS)))
        numbers = list(given) if isinstance(given, list | tuple) else []
        if len(numbers) != 3 or not all(isinstance(each, Real) and not isinstance(each, bool) for each in numbers):
            raise ValueError(f"`ns_coefficients` must be three numbers, got {given!r}.")
        coefficients = (float(numbers[0]), float(numbers[1]), float(numbers[2]))
        least, most = reach(coefficients, steps)
        if not (least > 0 and most <= LARGEST):
            raise ValueError(
                f"`ns_coefficients` must keep singular values between 0 and {LARGEST:g}, got {given!r}: {steps} steps "
                f"bring them from [0.01, 1] to [{least:.3g}, {most:.3g}]. Muon's are (3.4445, -4.775, 2.0315)."
            )
        object.__setattr__(self, "ns_coefficients", coefficients)  # YAML has lists, which cannot be hashed

    def scratch(self, layout: Layout, tick: Tick) -> int:
        """Return the bytes of the Gram matrix, and of the block where a rank needs more of the short side."""
        gathered = math.prod(layout.matrix[-2:]) * layout.dtype.itemsize if layout.divides(_sides(layout)[1]) else 0
        return math.prod(layout.matrix[:-2]) * (8 * layout.short_side**2 + gathered)

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta2: float, eps: float, tick: Tick
    ) -> Generator[Any, Any, Denominator]:
        """Return the root for the gradient, which is the direction where there is no momentum."""
        return (yield from self.of(Direction(grad), layout, eps=eps))

    def of(self, direction: Direction, layout: Layout, *, eps: float) -> Generator[Any, Any, Denominator]:
        """Return the root for a direction: one sum of a k × k matrix, where k is the short side.

        Parts of the short side are compared with each other. If ranks hold different ones, they first add up their
        rows, each with zeros for what others hold.
        """
        long, short = _sides(layout)
        tall, complete = direction if long == -2 else direction.mT, None
        if layout.group(short) is not None:
            (complete,) = yield from request(Sum(_placed(tall, layout, short), layout, short))
            tall = Direction(complete)
        (square,) = yield from request(Sum(_gram(tall, layout.dtype), layout, long))
        inverse = inverse_root(square, self.ns_coefficients, self.ns_steps).mul_(self._adjustment(layout))
        if complete is not None:
            inverse = layout.along(inverse, at=-1, dim=short)
        return Root(inverse=inverse.to(layout.dtype), wide=long == -1, complete=complete)

    def from_dense(self, square: Tensor, layout: Layout) -> State:
        """Drop the second moment."""
        return {}

    def _adjustment(self, layout: Layout) -> float:
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(layout.matrix[-2:]))
        outputs = layout.matrix[layout.output_dim]
        return math.sqrt(max(1.0, outputs / max(1, layout.matrix[-3 - layout.output_dim])))


def _placed(tall: Direction, layout: Layout, short: int) -> Tensor:
    """Return rows along the whole short side, zero where other ranks hold it."""
    rows = tall.base.new_zeros((*tall.base.shape[:-1], layout.matrix[short]), dtype=layout.dtype)
    mine, scratch = layout.along(rows, at=-1, dim=short), Scratch(tall.base, layout.dtype)
    for index in chunks(tall.base):
        part, scale = tall.at(index, scratch)
        torch.mul(part, scale, out=mine[index])
    return rows


def _gram(tall: Direction, dtype: torch.dtype) -> Tensor:
    """Return XᵀX in float64 of this rank's rows. Roundings in float32 would be amplified by the iteration."""
    shape = tall.base.shape
    out = tall.base.new_zeros((*shape[:-2], shape[-1], shape[-1]), dtype=torch.float64)
    scratch, wide = Scratch(tall.base, dtype), Scratch(tall.base, torch.float64)
    for index in chunks(tall.base):
        part, scale = tall.at(index, scratch)
        double = wide.take("part", part.shape).copy_(part).mul_(scale)
        take_stack(out, index).add_(double.mT @ double)
    return out


def _sides(layout: Layout) -> tuple[int, int]:
    """Return the long and the short dimension of the block, in this order. Of a square, the long one is sharded."""
    m, n = layout.matrix[-2:]
    return (-2, -1) if m > n or (m == n and not layout.divides(-1)) else (-1, -2)
