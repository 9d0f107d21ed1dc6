"""Large tensors of several blocks, seen as one tensor without a copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Index = tuple[int | slice, ...]

# Elements per chunk. On a CPU, small enough for the cache and large enough for efficient matrix products. The limit
# bounds temporary memory everywhere.
CPU_CHUNK = 1 << 19
GPU_CHUNK = 1 << 24
# Matrices of a batch that are smaller than this share of a chunk are copied together; one operation on each of the
# larger ones takes less time than the copy.
COPIED = 8


class Batch:
    """Tensors of equal shape ``[..., m, n]`` from two blocks or more, seen as ``[b, ..., m, n]``.

    Gradients, weights and elementwise state of a batch are too large to be stacked. The functions of ``linalg`` read
    and write them by the index of a chunk.

    Attributes:
        parts: One tensor per block.
        negated: Whether the elements are those of the parts with the opposite sign.
        transposed: Whether the matrices are those of the parts, transposed.
    """

    def __init__(self, parts: Sequence[Tensor], *, negated: bool = False, transposed: bool = False) -> None:
        """Combine tensors of the same shape, dtype and device."""
        self.parts, self.negated, self.transposed = tuple(parts), negated, transposed

    def part(self, position: int) -> Tensor:
        """Return the tensor of one block, as a view, with the sign of the parts."""
        return self.parts[position].mT if self.transposed else self.parts[position]

    @property
    def shape(self) -> torch.Size:
        """``[b, ..., m, n]``."""
        *stack, m, n = self.parts[0].shape
        return torch.Size((len(self.parts), *stack, *((n, m) if self.transposed else (m, n))))

    @property
    def ndim(self) -> int:
        """Number of dimensions, including the batch."""
        return self.parts[0].ndim + 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all parts."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of all parts."""
        return self.parts[0].device

    @property
    def mT(self) -> Batch:
        """The transposed matrices."""
        return Batch(self.parts, negated=self.negated, transposed=not self.transposed)

    def numel(self) -> int:
        """Return the number of all elements."""
        return len(self.parts) * self.parts[0].numel()

    def new_empty(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialized tensor on the device of the parts, as ``Tensor.new_empty`` does."""
        return self.parts[0].new_empty(tuple(shape), dtype=dtype)

    def new_zeros(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return zeros on the device of the parts, as ``Tensor.new_zeros`` does."""
        return self.parts[0].new_zeros(tuple(shape), dtype=dtype)

    def view(self, shape: Sequence[int]) -> Batch:
        """Return the batch with another shape ``[b, ...]``."""
        if tuple(shape) == self.shape:
            return self
        return Batch([self.part(position).view(tuple(shape[1:])) for position in range(len(self.parts))])

    def __getitem__(self, index: Index) -> Tensor:
        """Return one chunk: a view of a part, or a copy if it covers several parts or is negated."""
        first, rest = index[0], index[1:]
        if isinstance(first, int):
            chunk = self.part(first)[rest] if rest else self.part(first)
        else:
            chunk = torch.stack(self.parts[first])
            chunk = (chunk.mT if self.transposed else chunk)[(slice(None), *rest)]
        return chunk.neg() if self.negated else chunk

    def write(self, index: Index, value: Tensor) -> None:
        """Write one chunk: a part of a block, or all of several blocks. The value may have another dtype."""
        first, rest = index[0], index[1:]
        if isinstance(first, int):
            self.part(first)[rest].copy_(value)
        else:
            torch._foreach_copy_(self.parts[first], value.mT.unbind() if self.transposed else value.unbind())


Large = Tensor | Batch


def limit(tensor: Large) -> int:
    """Return the largest number of elements of a chunk on the tensor's device."""
    return CPU_CHUNK if tensor.device.type == "cpu" else GPU_CHUNK


def chunks(tensor: Large) -> Iterator[Index]:
    """Yield indices that split ``[..., m, n]`` into runs of whole rows (or whole matrices) of bounded size."""
    if isinstance(tensor, Batch):
        for index in whole_parts(tensor):
            if isinstance(index[0], int):
                yield from ((*index, *inner) for inner in chunks(tensor.part(0)))
            else:
                yield index
        return
    *stack, m, n = tensor.shape
    rows = max(1, limit(tensor) // max(1, n))
    if rows < m:
        for position in itertools.product(*(range(size) for size in stack)):
            for start in range(0, m, rows):
                yield (*(slice(i, i + 1) for i in position), slice(start, min(start + rows, m)))
    elif stack:
        outer = max(1, stack[0])
        count = max(1, limit(tensor) // max(1, tensor.numel() // outer))
        for start in range(0, stack[0], count):
            yield (slice(start, min(start + count, stack[0])),)
    else:
        yield (slice(0, m),)


def whole_parts(batch: Batch) -> Iterator[Index]:
    """Yield indices that split a batch into single parts, or into runs of small parts of at most a chunk."""
    count, each = len(batch.parts), max(1, batch.parts[0].numel())
    if each > limit(batch) // COPIED:
        yield from ((position,) for position in range(count))
        return
    run = limit(batch) // each
    for start in range(0, count, run):
        yield (slice(start, min(start + run, count)),)


def take(tensor: Large, index: Index) -> Tensor:
    """Return the part of ``tensor`` that belongs to a chunk. ``tensor`` broadcasts against the chunked tensor."""
    return tensor[tuple(slice(None) if size == 1 else part for size, part in zip(tensor.shape, index, strict=False))]


def take_stack(tensor: Tensor, index: Index) -> Tensor:
    """Return the matrices of ``tensor`` that belong to a chunk, with all rows."""
    return tensor[index[: tensor.ndim - 2]]
