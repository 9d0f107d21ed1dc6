"""Matrices anywhere in memory, as a kernel reads them: by a table of addresses, without a copy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXTRA_BITS = (torch.int8, torch.int16)  # of bfloat16 weights
ALIGNMENT = 16  # bytes; what a thread loads at once


@dataclass(frozen=True)
class Stack:
    """``b`` matrices ``[m, n]`` of equal strides.

    Attributes:
        parts: The tensors that hold the matrices, which keep their memory alive.
        addresses: One per matrix, in bytes.
        m: Rows.
        n: Columns.
        strides: Of rows and of columns, in elements; 0 where there is one row or one column.
        dtype: The dtype of the elements.
        device: The device of the memory.
        negated: Whether the elements are those in memory with the opposite sign.
    """

    parts: tuple[Tensor, ...]
    addresses: tuple[int, ...]
    m: int
    n: int
    strides: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    negated: bool = False

    @staticmethod
    def fits(parts: Sequence[Tensor]) -> bool:
        """Return whether the tensors can be a stack: ``[..., m, n]``, of a dtype kernels know and of equal strides."""
        first = parts[0]
        return (
            first.ndim >= 2
            and first.dtype in (*DTYPES, *EXTRA_BITS)
            and all(_strides(part) == _strides(first) for part in parts)
        )

    @staticmethod
    def of(parts: Sequence[Tensor], *, negated: bool = False) -> Stack:
        """Return the matrices of all tensors, which have the same shape ``[..., m, n]``, dtype and device."""
        first = parts[0]
        *stack, m, n = first.shape
        *outer, _, _ = first.stride()
        steps = [
            sum(position * stride for position, stride in zip(index, outer, strict=True)) * first.element_size()
            for index in itertools.product(*map(range, stack))
        ]
        addresses = tuple(part.data_ptr() + step for part in parts for step in steps)
        *_, down, along = _strides(first)
        return Stack(tuple(parts), addresses, m, n, (down, along), first.dtype, first.device, negated)

    def run(self, run: slice) -> Stack:
        """Return a run of the matrices."""
        return replace(self, addresses=self.addresses[run])

    @property
    def mT(self) -> Stack:
        """The transposed matrices."""
        return replace(self, m=self.n, n=self.m, strides=self.strides[::-1])

    @property
    def empty(self) -> bool:
        """Whether there are no elements."""
        return not (self.addresses and self.m and self.n)

    @property
    def aligned(self) -> bool:
        """Whether every matrix starts where a wide load can."""
        return all(address % ALIGNMENT == 0 for address in self.addresses)

    @property
    def table(self) -> Tensor:
        """The addresses on the device: int64 ``[b]``."""
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        return numbers_on(self.addresses, self.device, stream)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(stride if size != 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@lru_cache(maxsize=256)
def numbers_on(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Return integers on a device, as int64.

    Weights stay where they are, and gradients often return there: most steps copy nothing to the device. A copy is
    complete only for work on the stream that made it, so each stream has its own.
    """
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
