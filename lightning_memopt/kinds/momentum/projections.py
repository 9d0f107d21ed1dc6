"""How Subspace-Momentum chooses its subspace, and what becomes of the momentum when it changes.

All functions see the block tall, ``[..., m, n]`` with m ≥ n; ``long`` and ``short`` name the block's own dimensions
that play the parts of m and n, so that sums go over the right ranks. They are given the whole basis that was, and
return this rank's part of the new one along the short side.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from lightning_memopt._registry import Registry
from lightning_memopt.kinds.linalg import (
    GRAM_CUTOFF,
    column_square_sums,
    gram,
    matmul,
    orthonormalize,
    rmatmul,
    signed_eigh,
)
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.collectives import Sum, request
from lightning_memopt.sharding.layout import Layout

Basis = Generator[Any, Any, Tensor]
PROJECTIONS: Registry[Callable[..., Basis]] = Registry("projection")
HANDOVERS: Registry[Callable[..., Basis]] = Registry("handover")
# They compare all parts of the short side with each other, so that no rank can work on its part alone.
NEED_SHORT_SIDE_WHOLE = ("svd", "topk")


def _draw(basis: Tensor, layout: Layout, short: int, tick: Tick) -> Tensor:
    shape = (*layout.matrix[:-2], layout.matrix[short], basis.shape[-1])
    return layout.part_of_stack(tick.normal(shape, basis))


@PROJECTIONS.register("power")
def power(grad: Tensor, basis: Tensor, layout: Layout, long: int, short: int, tick: Tick) -> Basis:
    """Take one block power iteration from the basis at hand; from random columns where there is none."""
    alive = basis.ne(0).any(-2, keepdim=True)
    if not bool(alive.all()):
        basis = torch.where(alive, basis, _draw(basis, layout, short, tick))
    basis = layout.along(basis, at=-2, dim=short)
    (image,) = yield from request(Sum(matmul(grad, basis), layout, short))
    # Orthonormal in between: GᵀG P itself squares the spread of the singular values, and columns of less than 1/300
    # of the largest would be lost.
    (square,) = yield from request(Sum(gram(image), layout, long))
    (back,) = yield from request(Sum(rmatmul(orthonormalize(image, square), grad), layout, long))
    back = back.mT
    (square,) = yield from request(Sum(gram(back), layout, short))
    return orthonormalize(back, square)


@PROJECTIONS.register("svd")
def svd(grad: Tensor, basis: Tensor, layout: Layout, long: int, short: int, tick: Tick) -> Basis:
    """Take the leading right singular vectors exactly, through the n × n Gram matrix in float64."""
    (square,) = yield from request(Sum(gram(grad), layout, long))
    values, vectors = signed_eigh(square)
    # Vectors of singular values that are zero are noise, different on every sharding: zero columns instead.
    vectors = vectors * (values > GRAM_CUTOFF * values[..., -1:]).unsqueeze(-2)
    return vectors[..., -basis.shape[-1] :].flip(-1).to(basis.dtype)


@PROJECTIONS.register("random")
def random(grad: Tensor, basis: Tensor, layout: Layout, long: int, short: int, tick: Tick) -> Basis:
    """Draw a uniformly distributed subspace."""
    draw = layout.along(_draw(basis, layout, short, tick), at=-2, dim=short)
    (square,) = yield from request(Sum(gram(draw), layout, short))
    return orthonormalize(draw, square)


@PROJECTIONS.register("topk")
def topk(grad: Tensor, basis: Tensor, layout: Layout, long: int, short: int, tick: Tick) -> Basis:
    """Select the coordinates of the short side whose slices of the gradient have the largest norm."""
    (norms,) = yield from request(Sum(column_square_sums(grad, layout.dtype), layout, long))
    largest, chosen = norms.topk(basis.shape[-1], dim=-1)
    return torch.zeros_like(basis).scatter_(-2, chosen, (largest > 0).to(basis.dtype))


@HANDOVERS.register("reset")
def reset(momentum: Tensor, old: Tensor, new: Tensor, layout: Layout, short: int) -> Basis:
    """Start again from zero."""
    yield from ()
    return torch.zeros_like(momentum)


@HANDOVERS.register("rotate")
def rotate(momentum: Tensor, old: Tensor, new: Tensor, layout: Layout, short: int) -> Basis:
    """Keep the part of the momentum that the new subspace can hold: X ← X (P₋ᵀ P)."""
    (turn,) = yield from request(Sum(old.mT @ new, layout, short))
    return momentum @ turn


@HANDOVERS.register("keep")
def keep(momentum: Tensor, old: Tensor, new: Tensor, layout: Layout, short: int) -> Basis:
    """Keep the numbers, which now mean other directions."""
    yield from ()
    return momentum
