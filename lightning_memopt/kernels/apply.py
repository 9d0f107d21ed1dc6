"""The update of weights from directions and denominators: one launch, one pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.kernels import tiles
from lightning_memopt.kernels.launching import element, on
from lightning_memopt.kernels.stack import Stack, numbers_on

_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Direction:
    """``scale · base + left @ right``.

    Attributes:
        base: ``b`` matrices ``[m, n]``.
        scale: Factor of ``base``.
        left: float32 ``[b, m, q]``, of any strides, or None.
        right: float32 ``[b, q, n]``, of any strides, or None.
    """

    base: Stack
    scale: float = 1.0
    left: Tensor | None = None
    right: Tensor | None = None


@dataclass(frozen=True)
class Denominator:
    """``√square · √square' / √correction + eps``, or 1 if there is no square.

    Attributes:
        squares: Up to two of: matrices ``[m, n]``; or a float32 tensor ``[b, m, 1]`` or ``[b, 1, n]``, or the first one
            ``[b, m, ceil(n / run)]``.
        correction: The bias correction of the second moment.
        eps: Added to the root.
        run: Columns to which every column of the first square applies, or None.
    """

    squares: Sequence[Stack | Tensor] = ()
    correction: float = 1.0
    eps: float = 0.0
    run: int | None = None


@dataclass(frozen=True)
class Rates:
    """The factors in the update, and its limits.

    Attributes:
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        max_update: Bound on every element of |U / D|, or None. It has no effect where D is 1.
        checked: Whether a weight that would leave the range of its dtype keeps its value, and is counted.
        counted: Whether to count the elements beyond the bound.
    """

    lr: float
    weight_decay: float = 0.0
    max_update: float | None = None
    checked: bool = False
    counted: bool = False


@dataclass(frozen=True)
class Rounding:
    """Random numbers by position, for the rounding of bfloat16 weights.

    Attributes:
        bases: For every matrix, the hashed number of its first element.
        strides: Those of a row and of a column in the whole tensor.
    """

    bases: tuple[int, ...]
    strides: tuple[int, int]

    @staticmethod
    def of(seed: int | tuple[int, ...], start: int, strides: Sequence[int], outer: Sequence[int]) -> Rounding:
        """Return the rounding for the fields of a ``kinds.noise.Noise``, and the sizes before ``[m, n]`` of a block."""
        seeds = seed if isinstance(seed, tuple) else (seed,)
        starts = [
            start + sum(position * stride for position, stride in zip(index, strides, strict=False))
            for index in itertools.product(*map(range, outer))
        ]
        bases = tuple(_signed(start * _STEP + seed) for seed in seeds for start in starts)
        return Rounding(bases, (strides[-2], strides[-1]))


def apply_(
    weights: Stack,
    direction: Direction,
    denominator: Denominator,
    rates: Rates,
    *,
    factors: Tensor | None = None,
    low: Stack | None = None,
    rounding: Rounding | None = None,
    precision: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """W ← (1 − ηλ) W − η · U / D, in float32. The last bit rounds to nearest, or of bfloat16 as ``rounding`` says.

    Returns the number of elements beyond the bound, if they are counted, and of weights that kept their value, if they
    are checked: int64.

    Args:
        weights: ``b`` matrices ``[m, n]``, updated in place.
        direction: U.
        denominator: D.
        rates: The factors in the update, and its limits.
        factors: float32 ``[b]``, contiguous: a factor on the bounded U / D of every matrix, or None for 1.
        low: The extra bits of bfloat16 weights: int8 or int16, updated in place.
        rounding: Random numbers for rounding, or None.
        precision: How to multiply, one of :data:`~lightning_memopt.kernels.project.PRECISIONS`.
    """
    b, m, n = len(weights.addresses), weights.m, weights.n
    base, left, right = direction.base, direction.left, direction.right
    q = 0 if left is None or right is None else left.shape[-1]
    bounded = rates.max_update is not None and len(denominator.squares) > 0
    hits, lost = (
        torch.zeros((), dtype=torch.int64, device=weights.device) if wanted else None
        for wanted in (bounded and rates.counted, rates.checked)
    )
    if weights.empty:
        return hits, lost
    squares = [_Square.of(square, b, m, denominator.run) for square in denominator.squares]
    first, second = (*squares, _Square(), _Square())[:2]
    scale = -direction.scale if base.negated else direction.scale
    factor = 1.0 if q else scale  # what U still lacks
    bound = math.inf if rates.max_update is None else rates.max_update
    bases, noise_strides = None, (0, 0)
    if rounding is not None and weights.dtype == torch.bfloat16:
        bases, noise_strides = _on_device(rounding.bases, weights), rounding.strides
    read: list[Any] = [weights, base, first, second, *([] if low is None else [low])]
    tile = tiles.of_apply(m, n, q)
    tiles_n = tiles.ceil(n, tile.n)
    from lightning_memopt.kernels.jit_apply import apply_kernel

    with on(weights.device):
        apply_kernel[(tiles.ceil(m, tile.m) * tiles_n, b)](
            weights.table, None if low is None else low.table, base.table, first.where, second.where, left, right,
            bases, factors, hits, lost,
            m, n, q, tiles_n,
            *weights.strides, *((0, 0) if low is None else low.strides), *base.strides, *first.strides, *second.strides,
            *(left.stride() if left is not None and q else (0, 0, 0)),
            *(right.stride() if right is not None and q else (0, 0, 0)),
            *noise_strides,
            float(1 - rates.lr * rates.weight_decay), float(scale), float(-rates.lr * factor),
            float(bound / abs(factor) if factor else math.inf), float(denominator.correction**0.5),
            float(denominator.eps), torch.finfo(weights.dtype).max,
            WEIGHT=element(weights.dtype), LOW=element(torch.int8 if low is None else low.dtype),
            EXTRA=0 if low is None else 8 * low.dtype.itemsize, BASE=element(base.dtype), FIRST=element(first.dtype),
            SECOND=element(second.dtype), FIRST_HOW=first.how, SECOND_HOW=second.how,
            ALIGNED=all(each.aligned for each in read),
            FACTORS=q > 0, BOUNDED=bounded, COUNTED=hits is not None, CHECKED=rates.checked, NOISY=bases is not None,
            SCALED=factors is not None,
            PRECISION=precision, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_Q=tile.inner, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    return hits, lost


@dataclass(frozen=True)
class _Square:
    """A square as the kernel reads it: a stack (``full``), or a tensor that it broadcasts (all other ways)."""

    how: str = "none"
    where: Any = None
    strides: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float32
    aligned: bool = True

    @staticmethod
    def of(square: Stack | Tensor, b: int, m: int, run: int | None) -> _Square:
        if isinstance(square, Stack):
            return _Square("full", square.table, square.strides, square.dtype, square.aligned)
        *_, rows, columns = square.shape
        if run is not None:
            return _Square("run", square.contiguous(), (columns, run), square.dtype)
        if columns == 1:
            return _Square("row", square.expand(b, m, 1).contiguous(), dtype=square.dtype)
        assert rows == 1, "a square of every element is a stack"
        return _Square("column", square.contiguous(), dtype=square.dtype)


def _on_device(numbers: tuple[int, ...], like: Stack) -> Tensor:
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.device.type == "cuda" else 0
    return numbers_on(numbers, like.device, stream)


def _signed(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >= 1 << 63 else number
