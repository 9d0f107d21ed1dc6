"""Pure tensor functions that the kinds build on. All of them work on ``[..., m, n]``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Index = tuple[slice, ...]

# Elements per chunk. On a CPU, small enough for the cache and large enough for efficient matrix products. The limit
# bounds temporary memory everywhere.
CPU_CHUNK = 1 << 19
GPU_CHUNK = 1 << 24

# Squared singular values below this count as zero, relative to the largest after equilibration. A float64 Gram matrix
# resolves 1e-16, so the columns that remain are orthonormal to 1e-16 / 1e-10.
GRAM_CUTOFF = 1e-10


def _limit(tensor: Tensor) -> int:
    """Return the largest number of elements of a chunk on the tensor's device."""
    return CPU_CHUNK if tensor.device.type == "cpu" else GPU_CHUNK


def chunks(tensor: Tensor) -> Iterator[Index]:
    """Yield indices that split ``[..., m, n]`` into runs of whole rows (or whole matrices) of bounded size."""
    *stack, m, n = tensor.shape
    limit = _limit(tensor)
    rows = max(1, limit // max(1, n))
    if rows < m:
        for position in itertools.product(*(range(size) for size in stack)):
            for start in range(0, m, rows):
                yield (*(slice(i, i + 1) for i in position), slice(start, min(start + rows, m)))
    elif stack:
        outer = max(1, stack[0])
        count = max(1, limit // max(1, tensor.numel() // outer))
        for start in range(0, stack[0], count):
            yield (slice(start, min(start + count, stack[0])),)
    else:
        yield (slice(0, m),)


def take(tensor: Tensor, index: Index) -> Tensor:
    """Return the part of ``tensor`` that belongs to a chunk. ``tensor`` broadcasts against the chunked tensor."""
    return tensor[tuple(slice(None) if size == 1 else part for size, part in zip(tensor.shape, index, strict=False))]


def take_stack(tensor: Tensor, index: Index) -> Tensor:
    """Return the matrices of ``tensor`` that belong to a chunk, with all rows."""
    return tensor[index[: tensor.ndim - 2]]


def matmul(matrix: Tensor, right: Tensor) -> Tensor:
    """Return ``matrix @ right`` in the dtype of ``right``, converting at most a chunk of ``matrix`` at a time.

    Shapes: ``[..., m, n]``, ``[..., n, r]`` → ``[..., m, r]``.
    """
    out = right.new_empty((*matrix.shape[:-1], right.shape[-1]))
    for index in chunks(matrix):
        out[index] = matrix[index].to(right.dtype) @ take_stack(right, index)
    return out


def rmatmul(left: Tensor, matrix: Tensor) -> Tensor:
    """Return ``leftᵀ @ matrix`` in the dtype of ``left``, converting at most a chunk of ``matrix`` at a time.

    Shapes: ``[..., m, r]``, ``[..., m, n]`` → ``[..., r, n]``.
    """
    if matrix.dtype == left.dtype:
        return (matrix.mT @ left).mT  # a quarter faster than leftᵀ @ matrix, whose result is short and wide
    out = left.new_zeros((*matrix.shape[:-2], left.shape[-1], matrix.shape[-1]))
    for index in chunks(matrix):
        take_stack(out, index).add_(left[index].mT @ matrix[index].to(left.dtype))
    return out


def row_square_sums(matrix: Tensor, dtype: torch.dtype, run: int | None = None) -> Tensor:
    """Return the sum of squares of every row, or of every run of ``run`` consecutive elements of a row.

    Shapes: ``[..., m, n]`` → ``[..., m, ceil(n / run)]``. The last run of a row may be shorter.
    """
    n = matrix.shape[-1]
    if run is None or run >= n:
        return torch.linalg.vector_norm(matrix, dim=-1, keepdim=True, dtype=dtype).square_()
    whole = n // run
    out = matrix.new_empty((*matrix.shape[:-1], -(-n // run)), dtype=dtype)
    for index in chunks(matrix):
        square = matrix[index].to(dtype).square()
        out[index][..., :whole] = square[..., : whole * run].unflatten(-1, (whole, run)).sum(-1)
        if whole * run < n:
            out[index][..., whole] = square[..., whole * run :].sum(-1)
    return out


def column_square_sums(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of squares of every column: ``[..., m, n]`` → ``[..., 1, n]``."""
    *stack, m, n = matrix.shape
    panel = max(1, _limit(matrix) // max(1, n))
    if m <= panel:
        out = matrix.new_zeros((*stack, 1, n), dtype=dtype)
        for index in chunks(matrix):
            take_stack(out, index).copy_(matrix[index].to(dtype).square().sum(-2, keepdim=True))
        return out
    # Accumulate panels of rows in one panel that stays in the cache, so the squares never go to memory.
    total = matrix.new_zeros((*stack, panel, n), dtype=dtype)
    for index in chunks(matrix):
        part = matrix[index].to(dtype)
        take_stack(total, index)[..., : part.shape[-2], :].addcmul_(part, part)
    return total.sum(-2, keepdim=True)


def gram(matrix: Tensor) -> Tensor:
    """Return ``matrixᵀ matrix`` in float64: ``[..., m, r]`` → ``[..., r, r]``."""
    out = matrix.new_zeros((*matrix.shape[:-2], matrix.shape[-1], matrix.shape[-1]), dtype=torch.float64)
    for index in chunks(matrix):
        wide = matrix[index].double()
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

    Works through the Gram matrix, so rows may be on different ranks: the caller sums the Gram matrix.

    Args:
        matrix: ``[..., m, r]``; the local rows.
        gram: ``[..., r, r]`` float64, ``matrixᵀ matrix`` over *all* rows.

    Returns:
        ``[..., m, r]`` in the dtype of ``matrix``.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    alive = diagonal > 0
    scale = torch.where(alive, diagonal, 1.0).rsqrt() * alive
    # Column lengths differ widely (singular values enter squared). Without equilibration the cut-off drops short ones.
    values, vectors = signed_eigh(scale.unsqueeze(-1) * gram * scale.unsqueeze(-2))
    keep = values > GRAM_CUTOFF * values[..., -1:].clamp(min=1.0)
    inverse = torch.where(keep, values, 1.0).rsqrt() * keep
    transform = scale.unsqueeze(-1) * vectors * inverse.unsqueeze(-2)
    return (matrix.double() @ transform).to(matrix.dtype)


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


@dataclass(frozen=True)
class Noise:
    """Uniform random bits, one number per element, that depend only on the element's position in a whole tensor.

    Attributes:
        seed: A 63-bit number.
        shape: Shape of the whole tensor.
        offset: Where the local part starts in the whole tensor.
    """

    seed: int
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    def part(self, index: Index) -> Noise:
        """Return the noise of one chunk of the local part."""
        starts = [part.start for part in index] + [0] * (len(self.shape) - len(index))
        return Noise(self.seed, self.shape, tuple(old + new for old, new in zip(self.offset, starts, strict=True)))

    def bits(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return 16 random bits for each of the first ``shape`` elements of the local part, as int32."""
        position = torch.zeros((), dtype=torch.int64, device=device)
        stride = 1
        for dim in reversed(range(len(shape))):
            steps = torch.arange(self.offset[dim], self.offset[dim] + shape[dim], device=device) * stride
            position = position + steps.view(-1, *[1] * (len(shape) - 1 - dim))
            stride *= self.shape[dim]
        # The finalizer of splitmix64 (Steele, Lea, Flood 2014), in wrapping int64 with logical shifts.
        mixed = position * _signed(0x9E3779B97F4A7C15) + self.seed
        mixed = (mixed ^ ((mixed >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ ((mixed >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
        return ((mixed >> 40) & 0xFFFF).to(torch.int32)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def store_(target: Tensor, value: Tensor, noise: Noise | None = None) -> None:
    """Write ``value`` into ``target``, which may have another dtype.

    Rounds to nearest, or stochastically if the target is bfloat16 and ``noise`` is given.

    Rounding to nearest stalls an average whose increments are below the last bit (2⁻⁸ relative), which is always
    so with β₂ = 0.999. Rounding up with the probability of the remainder keeps the average unbiased.
    """
    if value.data_ptr() == target.data_ptr() and value.dtype == target.dtype:
        return
    if noise is None or target.dtype != torch.bfloat16 or value.dtype == torch.bfloat16:
        target.copy_(value)
        return
    single = value.float().contiguous()
    rounded = ((single.view(torch.int32) + noise.bits(tuple(single.shape), single.device)) & -65536).view(torch.float32)
    target.copy_(torch.where(single.isfinite(), rounded, single))
