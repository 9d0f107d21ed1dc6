"""The update of weights by one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memopt.kernels import apply as kernel
from lightning_memopt.kernels.stack import Stack
from lightning_memopt.kinds.batch import Large, stack_of
from lightning_memopt.kinds.momentum import Direction
from lightning_memopt.kinds.second_moment import Denominator
from lightning_memopt.optim.bounds import Rates, Watch
from lightning_memopt.optim.weights import Weights

Fused = tuple[Stack, Stack | None, kernel.Direction, kernel.Denominator, kernel.Rounding | None]


def for_kernel(
    weights: Weights, direction: Direction, denominator: Denominator, rates: Rates, dtype: torch.dtype
) -> Fused | None:
    """Return the arguments of the kernel for an update in ``dtype``, or None if it has to be made without a kernel.

    The kernel knows no gains, and bounds quotients only.
    """
    stack, base = stack_of(weights.values, dtype), stack_of(direction.base, dtype)
    low = None if weights.low is None else stack_of(weights.low, dtype)
    if stack is None or base is None or (low is None) != (weights.low is None) or not direction.plain:
        return None
    if rates.max_update is not None and not denominator.squares:
        return None
    squares = [_square(square, weights.values.shape[:-2], dtype) for square in denominator.squares]
    if any(square is None for square in squares):
        return None
    left, right = (each if each is None else each.flatten(0, -3) for each in (direction.left, direction.right))
    return (
        stack,
        low,
        kernel.Direction(base, direction.scale, left, right),
        kernel.Denominator(squares, denominator.correction, denominator.eps, denominator.run),  # type: ignore[arg-type]
        _rounding(weights),
    )


def apply_fused_(arguments: Fused, rates: Rates, watch: Watch, factor: Tensor | None = None) -> Tensor | None:
    """Update the weights as :func:`~lightning_memopt.optim.update.apply_` does."""
    weights, low, direction, denominator, rounding = arguments
    limits = kernel.Rates(rates.lr, rates.weight_decay, rates.max_update, rates.checked, counted=watch.counting)
    if factor is not None:  # one for every matrix, of which a block may have several
        factor = factor.flatten().repeat_interleave(len(weights.addresses) // factor.numel()).float()
    hits, lost = kernel.apply_(weights, direction, denominator, limits, factors=factor, low=low, rounding=rounding)
    if hits is not None:
        watch.hits.append(hits)
        watch.elements += len(weights.addresses) * weights.m * weights.n
    return None if lost is None else lost.float()


def _rounding(weights: Weights) -> kernel.Rounding | None:
    if weights.noise is None:
        return None
    noise, shape = weights.noise, weights.values.shape
    return kernel.Rounding.of(noise.seed, noise.start, noise.strides, shape[1:-2])


def _square(square: Large, stack: torch.Size, dtype: torch.dtype) -> Stack | Tensor | None:
    if isinstance(square, Tensor):
        if square.dtype != dtype or square.ndim != len(stack) + 2:
            return None
        return square.expand(*stack, -1, -1).flatten(0, -3)
    return stack_of(square, dtype)
