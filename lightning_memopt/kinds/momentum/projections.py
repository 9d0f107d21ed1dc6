"""How kinds choose the subspace of their momentum, and how Subspace-Momentum carries it over to a new one.

All functions see a tall block, ``[..., m, n]`` with m ≥ n. ``long`` and ``short`` are the dimensions of the original
block that correspond to m and n, so sums go over the right ranks. Projections take the whole previous basis and return
the part of the new one that this rank holds along the short side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from lightning_memopt._registry import Registry
from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.linalg import (
    GRAM_CUTOFF,
    column_square_sums,
    gram,
    matmul,
    orthonormalize,
    rmatmul,
    signed_eigh,
)
from lightning_memopt.kinds.noise import Noise
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.collectives import Sum, request
from lightning_memopt.sharding.layout import Layout

Basis = Generator[Any, Any, Tensor]
PROJECTIONS: Registry[Callable[..., Basis]] = Registry("projection")
HANDOVERS: Registry[Callable[..., Basis]] = Registry("handover")
# These compare all parts of the short side with each other, so no rank can work on its part alone.
NEED_SHORT_SIDE_WHOLE = ("svd", "topk")


def sides(layout: Layout) -> tuple[int, int]:
    """Return the long and the short dimension of the block, in this order."""
    m, n = layout.matrix[-2:]
    return (-2, -1) if m >= n else (-1, -2)


def scratch(projection: str, layout: Layout) -> int:
    """Return the bytes of the Gram matrix that ranks add up for ``svd``, which may be twice as large as the block."""
    return 8 * math.prod(layout.matrix[:-2]) * layout.short_side**2 if projection == "svd" else 0


def check_gap(gap: Any) -> None:
    """Check a number of steps between two choices of a projection.

    Raises:
        ValueError: If it is not an integer of at least 1.
    """
    if isinstance(gap, bool) or not isinstance(gap, int) or gap < 1:
        raise ValueError(f"`gap` must be an integer of at least 1 (steps), got {gap!r}.")


def axes(basis: Tensor, layout: Layout, short: int) -> Tensor:
    """Return this rank's part of the first unit vectors, as many as a basis has columns."""
    rows = torch.arange(basis.shape[-2], device=basis.device) + layout.offset[short]
    columns = torch.arange(basis.shape[-1], device=basis.device)
    return (rows.unsqueeze(-1) == columns).to(basis.dtype)


def _draw(basis: Tensor, layout: Layout, short: int, tick: Tick) -> Tensor:
    noise = Noise.like(layout, (short, basis.shape[-1]), tick)
    return noise.normal(basis.shape, basis.device).to(basis.dtype)


@PROJECTIONS.register("power")
def power(grad: Large, basis: Tensor, layout: Layout, long: int, short: int, tick: Tick) -> Basis:
    """Take one block power iteration from the previous basis, or from random columns where it is zero."""
    image = yield from _image(grad, basis, layout, short, tick)
    # Orthonormalize in between. GᵀG P squares the spread of the singular values and would lose columns below 1/300
    # of the largest.
    (square,) = yield from request(Sum(gram(image), layout, long))
    (back,) = yield from request(Sum(rmatmul(orthonormalize(image, square), grad), layout, long))
    back = back.mT
    (square,) = yield from request(Sum(gram(back), layout, short))
    return orthonormalize(back, square)


def _image(grad: Large, basis: Tensor, layout: Layout, short: int, tick: Tick) -> Basis:
    """Return G P, with random columns in place of the zero columns of P."""
    alive = basis.ne(0).any(-2, keepdim=True)
    if layout.group(short) is None:
        if basis.device.type != "cpu" or not bool(alive.all()):  # elsewhere, the host would wait for the answer
            basis = torch.where(alive, basis, _draw(basis, layout, short, tick))
        return matmul(grad, basis)
    # A column may be zero on this rank only. To ask first would cost a collective, so both products are summed.
    image, drawn, alive = yield from request(
        Sum(matmul(grad, basis), layout, short, leads=True),
        Sum(matmul(grad, _draw(basis, layout, short, tick)), layout, short),
        Sum(alive.to(basis.dtype), layout, short),
    )
    return torch.where(alive > 0, image, drawn)


@PROJECTIONS.register("svd")
def svd(grad: Large, basis: Tensor, layout: Layout, long: int, short: int, tick: Tick) -> Basis:
    """Take the leading right singular vectors exactly, through the n × n Gram matrix in float64."""
    (square,) = yield from request(Sum(gram(grad), layout, long))
    values, vectors = signed_eigh(square)
    # The vectors of zero singular values are noise and differ between shardings. Return zero columns instead.
    vectors = vectors * (values > GRAM_CUTOFF * values[..., -1:]).unsqueeze(-2)
    return vectors[..., -basis.shape[-1] :].flip(-1).to(basis.dtype)


@PROJECTIONS.register("random")
def random(grad: Large, basis: Tensor, layout: Layout, long: int, short: int, tick: Tick) -> Basis:
    """Draw a uniformly distributed subspace."""
    draw = _draw(basis, layout, short, tick)
    (square,) = yield from request(Sum(gram(draw), layout, short))
    return orthonormalize(draw, square)


@PROJECTIONS.register("topk")
def topk(grad: Large, basis: Tensor, layout: Layout, long: int, short: int, tick: Tick) -> Basis:
    """Select the coordinates of the short side along which the gradient's slices have the largest norms."""
    (norms,) = yield from request(Sum(column_square_sums(grad, layout.dtype), layout, long))
    largest, chosen = norms.topk(basis.shape[-1], dim=-1)
    return torch.zeros_like(basis).scatter_(-2, chosen, (largest > 0).to(basis.dtype))


@HANDOVERS.register("reset")
def reset(momentum: Tensor, old: Tensor, new: Tensor, layout: Layout, short: int) -> Basis:
    """Restart from zero."""
    yield from ()
    return torch.zeros_like(momentum)


@HANDOVERS.register("rotate")
def rotate(momentum: Tensor, old: Tensor, new: Tensor, layout: Layout, short: int) -> Basis:
    """Keep the part of the momentum that lies in the new subspace: X ← X (P₋ᵀ P)."""
    (turn,) = yield from request(Sum(old.mT @ new, layout, short))
    return momentum @ turn


@HANDOVERS.register("keep")
def keep(momentum: Tensor, old: Tensor, new: Tensor, layout: Layout, short: int) -> Basis:
    """Keep the numbers, which now refer to other directions."""
    yield from ()
    return momentum
