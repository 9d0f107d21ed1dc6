"""Pure tensor functions that the kinds build on. They work on ``[..., m, n]``; the large ones may be a batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_memopt.kernels.project import project
from lightning_memopt.kernels.project import rmatmul as fused_rmatmul
from lightning_memopt.kernels.stack import Stack
from lightning_memopt.kinds.batch import Batch, Index, Large, Scratch, chunks, limit, parts, stack_of, take_stack
from lightning_memopt.kinds.noise import Noise

# Squared singular values below this count as zero, relative to the largest after equilibration. A float64 Gram matrix
# resolves 1e-16, so the columns that remain are orthonormal to 1e-16 / 1e-10.
GRAM_CUTOFF = 1e-10


def matmul(matrix: Large, right: Tensor) -> Tensor:
    """Return ``matrix @ right`` in the dtype of ``right``, converting at most a chunk of ``matrix`` at a time.

    Shapes: ``[..., m, n]``, ``[..., n, r]`` → ``[..., m, r]``.
    """
    if isinstance(matrix, Batch) and (stack := stack_of(matrix, right.dtype)) is not None:
        product = _project(matrix, stack, right.flatten(0, -3))
        assert product is not None
        return product
    out = right.new_empty((*matrix.shape[:-1], right.shape[-1]))
    scratch = Scratch(matrix, right.dtype)
    for index in parts(matrix) if matrix.dtype == right.dtype else chunks(matrix):
        torch.matmul(scratch.cast("part", matrix[index]), take_stack(right, index), out=out[index])
    return out


def addmm_(out: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Out ← β out + α left @ right, in place.

    Shapes: ``[..., m, n]``, ``[..., m, r]``, ``[..., r, n]``.
    """
    if out.ndim == 2:
        return out.addmm_(left, right, beta=beta, alpha=alpha)
    if out.ndim == 3:
        return out.baddbmm_(left, right, beta=beta, alpha=alpha)
    return out.mul_(beta).add_(left @ right, alpha=alpha)


def rmatmul(left: Tensor, matrix: Large) -> Tensor:
    """Return ``leftᵀ @ matrix`` in the dtype of ``left``, converting at most a chunk of ``matrix`` at a time.

    Shapes: ``[..., m, r]``, ``[..., m, n]`` → ``[..., r, n]``.
    """
    stack = stack_of(matrix, left.dtype)
    if stack is not None:
        return fused_rmatmul(left.flatten(0, -3), stack).unflatten(0, matrix.shape[:-2])
    if matrix.dtype == left.dtype:
        # A quarter faster than leftᵀ @ matrix, whose result is short and wide.
        out = left.new_empty((*matrix.shape[:-2], matrix.shape[-1], left.shape[-1]))
        for index in parts(matrix):
            torch.matmul(matrix[index].mT, left[index], out=out[index])
        return out.mT
    out = left.new_zeros((*matrix.shape[:-2], left.shape[-1], matrix.shape[-1]))
    scratch = Scratch(matrix, left.dtype)
    for index in chunks(matrix):
        take_stack(out, index).add_(left[index].mT @ scratch.cast("part", matrix[index]))
    return out


def row_square_sums(matrix: Large, dtype: torch.dtype, run: int | None = None) -> Tensor:
    """Return the sum of squares of every row, or of every run of ``run`` consecutive elements of a row.

    Shapes: ``[..., m, n]`` → ``[..., m, ceil(n / run)]``. The last run of a row may be shorter.
    """
    n = matrix.shape[-1]
    if run is None or run >= n:
        if isinstance(matrix, Batch) and (stack := stack_of(matrix, dtype)) is not None:
            return _found(matrix, stack, "rows")
        out = matrix.new_empty((*matrix.shape[:-1], 1), dtype=dtype)
        for index in parts(matrix):
            torch.linalg.vector_norm(matrix[index], dim=-1, keepdim=True, dtype=dtype, out=out[index])
        return out.square_()
    whole = n // run
    out = matrix.new_empty((*matrix.shape[:-1], -(-n // run)), dtype=dtype)
    for index in chunks(matrix):
        square = matrix[index].to(dtype).square()
        out[index][..., :whole] = square[..., : whole * run].unflatten(-1, (whole, run)).sum(-1)
        if whole * run < n:
            out[index][..., whole] = square[..., whole * run :].sum(-1)
    return out


def column_square_sums(matrix: Large, dtype: torch.dtype) -> Tensor:
    """Return the sum of squares of every column: ``[..., m, n]`` → ``[..., 1, n]``.

    Panels of rows are accumulated in one panel that stays in the cache, so the squares never go to memory.
    """
    *stack, _, n = matrix.shape
    if isinstance(matrix, Batch) and (matrices := stack_of(matrix, dtype)) is not None:
        return _found(matrix, matrices, "columns")
    out = matrix.new_zeros((*stack, 1, n), dtype=dtype)
    scratch = Scratch(matrix, dtype)
    for index in parts(matrix):
        part = matrix[index]
        panel = max(1, limit(matrix) // 4 // max(1, part.shape[:-2].numel() * n))
        total = None
        for rows in part.split(panel, dim=-2) if part.shape[-2] else ():
            rows = scratch.cast("part", rows)
            if total is None:
                total = torch.mul(rows, rows, out=scratch.take("squares", rows.shape))
            else:
                total.narrow(-2, 0, rows.shape[-2]).addcmul_(rows, rows)
        if total is not None:
            torch.sum(total, -2, keepdim=True, out=out[index])
    return out


def _found(matrix: Batch, stack: Stack, name: str) -> Tensor:
    """Return sums of squares that an earlier pass of a kernel found, or that this one finds."""
    if name not in matrix.found:
        _project(matrix, stack, None, name)
    return matrix.found.pop(name)


def _project(matrix: Batch, stack: Stack, right: Tensor | None, *names: str) -> Tensor | None:
    """Return the product in one pass of a kernel, which also finds these sums of squares and those asked for."""
    wanted, matrix.asked = {*names, *matrix.asked}, ()
    found = project(stack, right, rows="rows" in wanted, columns="columns" in wanted)
    for name in wanted:
        matrix.found[name] = getattr(found, name).unflatten(0, matrix.shape[:-2])
    return None if found.product is None else found.product.unflatten(0, matrix.shape[:-2])


def gram(matrix: Large) -> Tensor:
    """Return ``matrixᵀ matrix`` in float64: ``[..., m, r]`` → ``[..., r, r]``."""
    out = matrix.new_zeros((*matrix.shape[:-2], matrix.shape[-1], matrix.shape[-1]), dtype=torch.float64)
    scratch = Scratch(matrix, torch.float64)
    for index in chunks(matrix):
        wide = scratch.cast("part", matrix[index])
        take_stack(out, index).add_(wide.mT @ wide)
    return out


def signed_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues in ascending order, and eigenvectors with the same signs on every sharding.

    LAPACK's signs change with the last bit of the matrix, and with them every coordinate stored in such a basis.
    """
    values, vectors = torch.linalg.eigh(gram)
    # Any fixed direction works if it is not orthogonal to likely eigenvectors, such as (1, 1) and (1, -1).
    weights = torch.arange(1, gram.shape[-1] + 1, dtype=gram.dtype, device=gram.device).rsqrt()
    return values, vectors * torch.where(weights @ vectors < 0, -1.0, 1.0).unsqueeze(-2)


def orthonormalize(matrix: Tensor, gram: Tensor) -> Tensor:
    """Return orthonormal columns with the span of ``matrix``, and zero columns where its rank falls short.

    Works through the Cholesky factor of the Gram matrix, so rows may be on different ranks: the caller sums the Gram
    matrix. Column by column, the result is that of Gram and Schmidt: a column that depends on those before it is zero.

    Args:
        matrix: ``[..., m, r]``; the local rows.
        gram: ``[..., r, r]`` float64, ``matrixᵀ matrix`` over *all* rows.

    Returns:
        ``[..., m, r]`` in the dtype of ``matrix``.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    alive = diagonal > 0
    # Column lengths differ widely (singular values enter squared). Without equilibration the cut-off drops short ones.
    scale = torch.where(alive, diagonal, 1.0).rsqrt()
    unit = scale.unsqueeze(-1) * gram * scale.unsqueeze(-2)
    kept = _independent(unit, alive)
    # A column that leans on a dependent one only seemed to depend, too: those that the kept ones do not span come back.
    basis = _inverse_cholesky(unit, kept, 0.0) * kept.unsqueeze(-1)
    outside = 1 - (basis @ unit).square().sum(-2)
    kept = _independent(unit, kept | (alive & (outside > 100 * GRAM_CUTOFF)))
    transform = scale.unsqueeze(-1) * _inverse_cholesky(unit, kept, 0.0).mT * kept.unsqueeze(-2)
    out = torch.empty_like(matrix)
    scratch = Scratch(matrix, torch.float64)
    for index in chunks(matrix):
        wide = scratch.cast("part", matrix[index])
        turned = torch.matmul(wide, take_stack(transform, index), out=scratch.take("turned", wide.shape))
        out[index].copy_(turned)
    return out


def _independent(unit: Tensor, alive: Tensor) -> Tensor:
    """Return which columns do not depend on earlier ones, given the Gram matrix of unit columns.

    A row of the inverse factor combines columns to an orthonormal one. If it is long, the columns cancel, and what is
    left is mostly rounding errors. Such a column would rotate those after it.
    """
    lengths = _inverse_cholesky(unit, alive, GRAM_CUTOFF).square().sum(-1)
    return alive & (lengths < 0.25 / GRAM_CUTOFF)


def _inverse_cholesky(unit: Tensor, alive: Tensor, shift: float) -> Tensor:
    """Return L⁻¹ for L Lᵀ = a Gram matrix of unit columns plus a shift of its diagonal, without the columns not alive.

    The host does not wait to learn whether the factorization succeeds. It does: with the shift for any columns, and
    without it for columns that are far from each other's span.
    """
    both = alive.unsqueeze(-1) & alive.unsqueeze(-2)
    kept = torch.where(both, unit, 0.0)
    kept.diagonal(dim1=-2, dim2=-1).add_(torch.where(alive, shift, 1.0))
    factor = torch.linalg.cholesky_ex(kept)[0]
    identity = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device).expand_as(unit)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def leading_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets in float64: ``[..., m, rank]``, ``[..., rank]``, ``[..., rank, n]``.

    Uses the float64 Gram matrix of the short side, one chunk of the matrix at a time: a full decomposition takes
    several times the memory of the matrix. Singular values that are zero up to rounding have no directions: their
    vectors are noise, and differ between machines. This function returns zeros for them.
    """
    if matrix.shape[-2] < matrix.shape[-1]:
        u, s, vt = leading_triplets(matrix.mT, rank)
        return vt.mT, s, u.mT
    values, vectors = signed_eigh(gram(matrix))
    values, v = values[..., -rank:].flip(-1), vectors[..., -rank:].flip(-1)
    resolution = (4 * torch.finfo(torch.float32).eps) ** 2
    alive = values > values[..., :1] * resolution
    v = v * alive.unsqueeze(-2)
    u = matmul(matrix, v)
    s = torch.linalg.vector_norm(u, dim=-2)
    return u / torch.where(s > 0, s, 1.0).unsqueeze(-2), s, v.mT


def store_(target: Tensor, value: Tensor, noise: Noise | None = None) -> None:
    """Write ``value`` into ``target``, which may have another dtype.

    Rounds to nearest, or stochastically if the target is bfloat16 and ``noise`` is given.

    Rounding to nearest stalls an average whose increments are below the last bit (2⁻⁸ relative), which is always
    so with β₂ = 0.999. Rounding up with the probability of the remainder keeps the average unbiased.
    """
    if noise is not None and target.dtype == torch.bfloat16 != value.dtype:
        for index in pieces(value):
            target[index].copy_(_rounded(value[index], noise.part(index)))
    elif value.data_ptr() != target.data_ptr() or value.dtype != target.dtype:
        target.copy_(value)


def pieces(tensor: Tensor) -> Iterator[Index]:
    """Return indices that split a tensor for work with random numbers, which take four times the memory of float32."""
    return chunks(tensor, share=8) if tensor.ndim > 1 else iter([()])


def store_chunk_(target: Large, index: Index, value: Tensor, noise: Noise | None = None) -> None:
    """Write ``value`` into a chunk of ``target``, as :func:`store_` does. ``noise`` is that of all of ``target``."""
    store_(target[index], value, noise and noise.part(index))


def _rounded(value: Tensor, noise: Noise) -> Tensor:
    """Return the value, stochastically rounded to a number of bfloat16."""
    single = value.float().contiguous()
    rounded = ((single.view(torch.int32) + noise.bits(single.shape, single.device)) & -65536).view(torch.float32)
    return torch.where(single.isfinite(), rounded, single)
