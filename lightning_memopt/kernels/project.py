"""Products with a stack of matrices, and its sums of squares: one launch, one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.kernels import tiles
from lightning_memopt.kernels.launching import element, on
from lightning_memopt.kernels.stack import Stack

# "ieee" multiplies in float32. Tensor cores are faster: "tf32x3" keeps 22 bits of every factor, "tf32" 11 bits.
PRECISIONS = ("ieee", "tf32x3", "tf32")
SCRATCH = 64 << 20  # bytes of partial sums of columns: larger stacks take several launches


@dataclass(frozen=True)
class Projection:
    """What one pass found. A part that was not asked for is None.

    Attributes:
        product: ``matrices @ right``: ``[b, m, r]``.
        rows: The sum of squares of every row: ``[b, m, 1]``.
        columns: The sum of squares of every column: ``[b, 1, n]``.
    """

    product: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None


def project(
    stack: Stack, right: Tensor | None = None, *, rows: bool = False, columns: bool = False, precision: str = "ieee"
) -> Projection:
    """Read the matrices once, and return the product and the sums in float32. Equal inputs give equal bits.

    Args:
        stack: ``b`` matrices ``[m, n]``.
        right: float32 ``[b, n, r]``, of any strides, or None for no product.
        rows: Whether to sum the squares of rows.
        columns: Whether to sum the squares of columns.
        precision: How to multiply, one of ``PRECISIONS``.
    """
    b, m, n, r = len(stack.addresses), stack.m, stack.n, 0 if right is None else right.shape[-1]
    tile = tiles.of_project(n, r)
    most = max(1, SCRATCH // max(1, 4 * tiles.ceil(m, tile.m) * n)) if columns else max(1, b)
    if b > most:
        runs = [slice(start, start + most) for start in range(0, b, most)]
        options: dict[str, Any] = {"rows": rows, "columns": columns, "precision": precision}
        pieces = [project(stack.run(run), right if right is None else right[run], **options) for run in runs]
        product, row_sums, column_sums = (
            None if each[0] is None else torch.cat(each) for each in zip(*map(_fields, pieces), strict=True)
        )
        return Projection(product, row_sums, column_sums)
    blocks, panels = max(1, tiles.ceil(r, tile.inner)), tiles.ceil(m, tile.m)
    steps = max(1, tiles.ceil(n, tile.n))
    per_split = tiles.ceil(steps, tiles.splits(panels * blocks * b, n, tile.n)) * tile.n
    parts = max(1, tiles.ceil(n, per_split))

    def space(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=stack.device)

    product = space(parts, b, m, r) if right is not None else None
    row_sums = space(parts, b, m, 1) if rows else None
    column_sums = space(panels, b, 1, n) if columns else None
    found = (product, row_sums, column_sums)
    if stack.empty or (not r and not rows and not columns):
        return Projection(*(each if each is None else each.new_zeros(each.shape[1:]) for each in found))
    from lightning_memopt.kernels.jit_project import project_kernel

    with on(stack.device):
        project_kernel[(panels * blocks, parts, b)](
            stack.table, right, *found, m, n, r, *stack.strides, *((0, 0, 0) if right is None else right.stride()),
            per_split, ELEMENT=element(stack.dtype), ALIGNED=stack.aligned, PRODUCT=r > 0, ROWS=rows, COLUMNS=columns,
            PRECISION=precision, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_R=tile.inner, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    sums = [each if each is None else (each[0] if len(each) == 1 else each.sum(0)) for each in found]
    if stack.negated and sums[0] is not None:
        sums[0].neg_()
    return Projection(*sums)


def _fields(found: Projection) -> tuple[Any, Any, Any]:
    return found.product, found.rows, found.columns


def rmatmul(left: Tensor, stack: Stack, *, precision: str = "ieee") -> Tensor:
    """Return ``leftᵀ @ matrices`` in float32: ``[b, m, r]``, ``b × [m, n]`` → ``[b, r, n]``, transposed in memory."""
    product = project(stack.mT, left, precision=precision).product
    assert product is not None
    return product.mT
