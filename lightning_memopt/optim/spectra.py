"""The spectra of momentum, from its factors, or from a sketch where it is dense."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
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


def spectra_of(
    blocks: Iterable[tuple[Any, Tensor, Block]], states: Mapping[Tensor, dict[str, Tensor]]
) -> dict[str, tuple[float, ...]]:
    """Return the squared singular values of all momentum, in descending order; of dense momentum, the largest.

    In a stack, values of the same position are summed. Blocks without momentum have none. All ranks call it together.
    """
    spectra: dict[str, Tensor] = {}
    wanted = [
        (block, states[param], block.requests_for(states[param], block.recipe.momentum.keys))
        for _, param, block in blocks
        if states.get(param)
    ]
    for wave in packed(wanted, lambda entry: sum(piece.nbytes for piece in entry[2])):
        found = gather([piece for *_, pieces in wave for piece in pieces])
        tasks = []
        for block, state, pieces in wave:
            mine, found = found[: len(pieces)], found[len(pieces) :]
            tasks.append(_spectrum(spectra, block, block.with_gathered(state, block.recipe.momentum.keys, mine)))
        run_tasks(tasks)
    return {name: tuple(values.tolist()) for name, values in spectra.items()}


def _spectrum(spectra: dict[str, Tensor], block: Block, state: dict[str, Tensor]) -> Task:
    """Compute the eigenvalues of (LᵀL) (R Rᵀ), the squared singular values of L R."""
    momentum = block.recipe.momentum
    factors = momentum.factors(state, block.work)
    if factors is None and isinstance(momentum, DenseMomentum):
        factors = yield from _sketched(block, state["exp_avg"].view(block.work.local))
    if factors is None:
        return
    rows, columns = (_mine(factor, dim, block.work) for factor, dim in zip(factors, (-2, -1), strict=True))
    left, right = yield from request(Sum(gram(rows), block.work, -2), Sum(gram(columns.mT), block.work, -1))
    values, vectors = torch.linalg.eigh(left)
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    squares = torch.linalg.eigvalsh(root @ right @ root).clamp(min=0).flip(-1)
    squares = squares.reshape(-1, squares.shape[-1]).sum(0)
    if len(block.work.matrix) > 2:
        (squares,) = yield from request(Sum(squares, block.work, -3))
    spectra[block.name] = squares


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
