"""Large tensors of several blocks, seen as one tensor without a copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from lightning_memopt.kernels.stack import Stack

Index = tuple[int | slice, ...]

# Elements per chunk. On a CPU, small enough for the cache and large enough for efficient matrix products. The limit
# bounds temporary memory everywhere.
CPU_CHUNK = 1 << 20
GPU_CHUNK = 1 << 24
# Blocks of at most this many elements are stacked for a step. For larger ones, one operation each takes less time than
# the copy.
SMALL = 1 << 16


class Batch:
    """Tensors of equal shape ``[..., m, n]`` from two blocks or more, seen as ``[b, ..., m, n]``.

    Gradients, weights and elementwise state of a batch are too large to be stacked. The functions of ``linalg`` read
    and write them by the index of a chunk.

    Attributes:
        parts: One tensor per block.
        negated: Whether the elements are those of the parts with the opposite sign.
        transposed: Whether the matrices are those of the parts, transposed.
        fused: Whether to use kernels, which read the parts where they are. There may be a single part then.
        asked: The sums of squares (``rows``, ``columns``) that a kernel finds in the pass for another result.
        found: Those that it found.
    """

    def __init__(
        self, parts: Sequence[Tensor], *, negated: bool = False, transposed: bool = False, fused: bool = False
    ) -> None:
        """Combine tensors of the same shape, dtype and device."""
        self.parts, self.negated, self.transposed, self.fused = tuple(parts), negated, transposed, fused
        self.asked: tuple[str, ...] = ()
        self.found: dict[str, Tensor] = {}

    def part(self, position: int) -> Tensor:
        """Return the tensor of one block, as a view, with the sign of the parts."""
        return self.parts[position].mT if self.transposed else self.parts[position]

    @property
    def shape(self) -> torch.Size:
        """``[b, ..., m, n]``."""
        *stack, m, n = self.parts[0].shape
        return torch.Size((len(self.parts), *stack, *((n, m) if self.transposed else (m, n))))

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
        return Batch(self.parts, negated=self.negated, transposed=not self.transposed, fused=self.fused)

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
        parts = [self.part(position).view(tuple(shape[1:])) for position in range(len(self.parts))]
        return Batch(parts, negated=self.negated, fused=self.fused)

    def __getitem__(self, index: Index) -> Tensor:
        """Return one chunk, whose index starts with the position of a part: a view, or a copy if negated."""
        assert isinstance(index[0], int)
        chunk = self.part(index[0])[index[1:]] if len(index) > 1 else self.part(index[0])
        return chunk.neg() if self.negated else chunk


Large = Tensor | Batch


def limit(tensor: Large) -> int:
    """Return the largest number of elements of a chunk on the tensor's device."""
    return CPU_CHUNK if tensor.device.type == "cpu" else GPU_CHUNK


@contextmanager
def two_chunks() -> Iterator[None]:
    """Let loops over chunks and parts end after the second one: there they hold as much memory as in all others.

    Only for the meta device, where nothing is computed. It makes plans for large models fast.
    """
    token = _TWO.set(True)
    try:
        yield
    finally:
        _TWO.reset(token)


_TWO = ContextVar("two_chunks", default=False)


def _loop(indices: Iterator[Index]) -> Iterator[Index]:
    return itertools.islice(indices, 2) if _TWO.get() else indices


def chunks(tensor: Large, share: int = 1) -> Iterator[Index]:
    """Return indices that split ``[..., m, n]`` into runs of whole rows (or whole matrices) of bounded size.

    Args:
        tensor: The tensor.
        share: The size is the limit divided by this.
    """
    return _loop(_chunks(tensor, limit(tensor) // share))


def _chunks(tensor: Large, most: int) -> Iterator[Index]:
    if isinstance(tensor, Batch):
        for part in range(len(tensor.parts)):
            yield from ((part, *inner) for inner in _chunks(tensor.part(part), most))
        return
    *stack, m, n = tensor.shape
    rows = max(1, most // max(1, n))
    if rows < m:
        rows = -(-m // -(-m // rows))  # of almost equal size
        for position in itertools.product(*(range(size) for size in stack)):
            for start in range(0, m, rows):
                yield (*(slice(i, i + 1) for i in position), slice(start, min(start + rows, m)))
    elif stack:
        outer = max(1, stack[0])
        count = max(1, most // max(1, tensor.numel() // outer))
        for start in range(0, stack[0], count):
            yield (slice(start, min(start + count, stack[0])),)
    else:
        yield (slice(0, m),)


def parts(tensor: Large) -> Iterator[Index]:
    """Return the index of every part of a batch, or that of a whole tensor."""
    count = len(tensor.parts) if isinstance(tensor, Batch) else None
    return _loop(iter([()]) if count is None else ((position,) for position in range(count)))


class Scratch:
    """Memory for the intermediate results of a chunk, which the next chunk reuses.

    New memory for every result would cost as much as computing it, because the system clears its pages first.
    """

    def __init__(self, chunked: Large, dtype: torch.dtype) -> None:
        """Prepare for chunks of ``chunked`` and results of the given dtype. Allocates nothing yet."""
        self.dtype, self._chunked = dtype, chunked
        self._flat: dict[str, Tensor] = {}
        self._views: dict[tuple[str, torch.Size], Tensor] = {}

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """Return an uninitialized tensor. It shares its memory with all others of its name."""
        view = self._views.get((name, shape))
        if view is None:
            flat, count = self._flat.get(name), shape.numel()
            if flat is None or flat.numel() < count:
                flat = self._flat[name] = self._chunked.new_empty((count,), dtype=self.dtype)
            view = self._views[name, shape] = flat[:count].view(shape)
        return view

    def cast(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor in the dtype of the results: itself, or a copy."""
        return tensor if tensor.dtype == self.dtype else self.take(name, tensor.shape).copy_(tensor)


def stack_of(tensor: Large, dtype: torch.dtype) -> Stack | None:
    """Return the matrices as kernels read them, or None if no kernel computes with them in ``dtype``."""
    if not isinstance(tensor, Batch) or not tensor.fused or dtype != torch.float32 or not Stack.fits(tensor.parts):
        return None
    stack = Stack.of(tensor.parts, negated=tensor.negated)
    return stack.mT if tensor.transposed else stack


def take(tensor: Large, index: Index) -> Tensor:
    """Return the part of ``tensor`` that belongs to a chunk. ``tensor`` broadcasts against the chunked tensor."""
    return tensor[tuple(map(_within, tensor.shape, index))]


def _within(size: int, part: int | slice) -> int | slice:
    if size > 1:
        return part
    return 0 if isinstance(part, int) else slice(None)


def take_stack(tensor: Tensor, index: Index) -> Tensor:
    """Return the matrices of ``tensor`` that belong to a chunk, with all rows."""
    return tensor[index[: tensor.ndim - 2]]
