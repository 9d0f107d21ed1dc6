"""The kernel of products with a stack, and of its sums of squares. Importing this file imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def project_kernel(
    table,
    right,
    product,
    row_sums,
    column_sums,
    m,
    n,
    r,
    stride_m,
    stride_n,
    right_b,
    right_n,
    right_r,
    per_split,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Read a panel of rows once, tile by tile. A program writes what no other one does: sums have a fixed order.

    Grid: panels of ``BLOCK_M`` rows × blocks of ``BLOCK_R`` columns of ``right``, splits of the columns, matrices.
    Writes: ``product`` ``[splits, b, m, r]``, ``row_sums`` ``[splits, b, m]``, ``column_sums`` ``[panels, b, n]``.
    """
    blocks = tl.cdiv(r, BLOCK_R) if PRODUCT else 1
    panel = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    split = tl.program_id(1)
    # Offsets of whole tiles, which may be beyond 2³¹ elements, are wide; those inside a tile are not.
    matrix = tl.program_id(2).to(tl.int64)
    count = tl.num_programs(2).to(tl.int64)
    row = panel.to(tl.int64) * BLOCK_M
    inner_m = tl.arange(0, BLOCK_M)
    inner_n = tl.arange(0, BLOCK_N)
    ranks = block * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_m = row + inner_m < m
    start = tl.load(table + matrix).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    elements = start + row * stride_m + (inner_m[:, None] * stride_m + inner_n[None, :] * stride_n)
    factors = right
    if PRODUCT:
        factors = right + matrix * right_b + (inner_n[:, None] * right_n + ranks[None, :] * right_r)
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(split * per_split, min(n, (split + 1) * per_split), BLOCK_N):
        column = tl.cast(first, tl.int64)
        inside_n = first + inner_n < n
        tile = tl.load(elements + column * stride_n, mask=inside_m[:, None] & inside_n[None, :], other=0.0)
        tile = tile.to(tl.float32)
        if PRODUCT:
            mask = inside_n[:, None] & (ranks < r)[None, :]
            factor = tl.load(factors + column * right_n, mask=mask, other=0.0)
            total = tl.dot(tile, factor, total, input_precision=PRECISION)
        if ROWS:
            squares += tl.sum(tile * tile, axis=1)
        if COLUMNS:  # noqa: SIM102  the compiler drops the branch of a constant only
            if block == 0:
                to = column_sums + (panel * count + matrix) * n + column + inner_n
                tl.store(to, tl.sum(tile * tile, axis=0), mask=inside_n)
    rows = (split * count + matrix) * m + row + inner_m
    if PRODUCT:
        mask = inside_m[:, None] & (ranks < r)[None, :]
        tl.store(product + rows[:, None] * r + ranks[None, :], total, mask=mask)
    if ROWS:  # noqa: SIM102
        if block == 0:
            tl.store(row_sums + rows, squares, mask=inside_m)
