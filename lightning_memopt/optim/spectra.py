"""What blocks keep of momentum: the spectrum, from factors or from a sketch of dense momentum, and single elements."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.kinds.linalg import gram, matmul, orthonormalize, rmatmul
from lightning_memopt.kinds.momentum import DenseMomentum
from lightning_memopt.kinds.noise import Noise
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.optim.block import Block
from lightning_memopt.sharding.collectives import Sum, Task, gather, packed, request, run_tasks
from lightning_memopt.sharding.layout import Layout

# Number of singular values of dense momentum that are looked for. A policy extrapolates the others.
SKETCH = 64


@dataclass(frozen=True)
class Kept:
    """The momentum that a block keeps.

    Attributes:
        spectrum: Its squared singular values, in descending order; of dense momentum, the largest. In a stack, values
            of the same position are summed.
        elements: Those at the places asked for.
        complete: Whether the spectrum has all values that are not zero.
    """

    spectrum: tuple[float, ...]
    elements: Tensor
    complete: bool


def kept_momentum(
    blocks: Iterable[tuple[Any, Tensor, Block]],
    states: Mapping[Tensor, dict[str, Tensor]],
    places: Mapping[str, Sequence[Tensor]],
) -> dict[str, Kept]:
    """Return what these blocks keep of momentum. Blocks without momentum are left out. All ranks call it together.

    Args:
        blocks: Parameter groups, parameters and blocks.
        states: The optimizer's state.
        places: By block, places in the local part of its matrix, one index tensor per dimension.
    """
    found: dict[str, Kept] = {}
    wanted = [
        (block, states[param], block.requests_for(states[param], block.recipe.momentum.keys))
        for _, param, block in blocks
        if states.get(param) and block.name in places
    ]
    for wave in packed(wanted, lambda entry: sum(piece.nbytes for piece in entry[2])):
        gathered = gather([piece for *_, pieces in wave for piece in pieces])
        tasks = []
        for block, state, pieces in wave:
            mine, gathered = gathered[: len(pieces)], gathered[len(pieces) :]
            state = block.with_gathered(state, block.recipe.momentum.keys, mine)
            tasks.append(_kept(found, block, state, places[block.name]))
        run_tasks(tasks)
    return found


def _kept(found: dict[str, Kept], block: Block, state: dict[str, Tensor], places: Sequence[Tensor]) -> Task:
    momentum, layout = block.recipe.momentum, block.layout
    factors = momentum.factors(state, block.work)
    if factors is not None:
        left, right = (factors[0], factors[1].mT)
        row, column = (_at(each, dim, places, layout) for each, dim in ((left, -2), (right, -1)))
        elements = (row * column).sum(-1)
    elif isinstance(momentum, DenseMomentum):
        dense = state["exp_avg"].view(block.work.local)
        elements = dense[tuple(_placed(dense, dim, dim, places, layout) for dim in range(-dense.ndim, 0))]
        factors = yield from _sketched(block, dense)
    else:
        return
    squares = yield from _squares(factors, block.work)
    complete = not isinstance(momentum, DenseMomentum) or len(squares) == layout.short_side
    found[block.name] = Kept(tuple(squares.tolist()), elements.to(layout.dtype), complete)


def _squares(factors: tuple[Tensor, Tensor], layout: Layout) -> Generator[Any, Any, Tensor]:
    """Compute the eigenvalues of (LᵀL) (R Rᵀ), the squared singular values of L R."""
    rows, columns = (_mine(factor, dim, layout) for factor, dim in zip(factors, (-2, -1), strict=True))
    left, right = yield from request(Sum(gram(rows), layout, -2), Sum(gram(columns.mT), layout, -1))
    values, vectors = torch.linalg.eigh(left)
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    squares = torch.linalg.eigvalsh(root @ right @ root).clamp(min=0).flip(-1)
    squares = squares.reshape(-1, squares.shape[-1]).sum(0)
    if len(layout.matrix) > 2:
        (squares,) = yield from request(Sum(squares, layout, -3))
    return squares


def _at(factor: Tensor, dim: int, places: Sequence[Tensor], layout: Layout) -> Tensor:
    """Return the rows of a factor ``[..., size, rank]`` at places whose coordinate along the block's ``dim`` counts."""
    stack = range(-len(layout.matrix), -2)
    return factor[
        (*(_placed(factor, each, each, places, layout) for each in stack), _placed(factor, -2, dim, places, layout))
    ]


def _placed(tensor: Tensor, at: int, dim: int, places: Sequence[Tensor], layout: Layout) -> Tensor:
    """Return coordinates along the block's ``dim`` in a tensor that has them at ``at``, local or of the whole block."""
    whole = tensor.shape[at] == layout.matrix[dim]
    return places[dim] + layout.offset[dim] if whole else places[dim]


def _sketched(block: Block, momentum: Tensor) -> Generator[Any, Any, tuple[Tensor, Tensor]]:
    """Return factors of the leading part of a dense momentum, from two block power iterations on random rows.

    All of a momentum whose short side has no more than ``SKETCH`` elements.
    """
    layout, tick = block.work, Tick(0, block.key, block.index)
    rank = min(SKETCH, layout.short_side)
    noise = Noise.like(layout, (rank, -1), tick, "spectrum")
    right = noise.normal((*momentum.shape[:-2], rank, momentum.shape[-1]), momentum.device).to(layout.dtype)
    for _ in range(2):
        # Orthonormal rows: products with the momentum twice over would leave the range of float32.
        (square,) = yield from request(Sum(gram(right.mT), layout, -1))
        rows = orthonormalize(right.mT, square)
        (left,) = yield from request(Sum(matmul(momentum, rows), layout, -1))
        (square,) = yield from request(Sum(gram(left), layout, -2))
        left = orthonormalize(left, square)
        (right,) = yield from request(Sum(rmatmul(left, momentum), layout, -2))
    return left, right


def _mine(factor: Tensor, dim: int, layout: Layout) -> Tensor:
    """Return the local part of a factor along a dimension of the block. Some kinds keep it whole on every rank."""
    return layout.along(factor, at=dim, dim=dim) if factor.shape[dim] == layout.matrix[dim] else factor
