"""Random numbers that depend only on a position in a whole tensor, so every sharding draws the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memopt.kinds.batch import Index
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import Sizes, origin, shape_of


@dataclass(frozen=True)
class Noise:
    """Random numbers for the elements of a tensor, or of a chunk of it.

    Attributes:
        seed: A 63-bit number, or one for each block of a batch, which is the first dimension then.
        start: Position of the first element in the whole tensor of a block.
        strides: Strides of the whole tensor, for all dimensions except the batch.
    """

    seed: int | tuple[int, ...]
    start: int
    strides: tuple[int, ...]

    @staticmethod
    def of(seed: int | tuple[int, ...], shape: Sequence[int], offset: Sequence[int]) -> Noise:
        """Return the numbers for a part that starts at ``offset`` in a whole tensor of a block."""
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return Noise(seed, sum(start * stride for start, stride in zip(offset, strides, strict=True)), strides)

    @staticmethod
    def like(layout: Layout, sizes: Sizes, tick: Tick, purpose: str = "") -> Noise:
        """Return the numbers for a tensor that is cut like a state tensor of these sizes."""
        shape, offset = shape_of(layout, sizes) if sizes else layout.matrix, origin(layout, sizes)
        first = 0 if layout.batch is None else 1
        return Noise.of(tick.salted(purpose), shape[first:], offset[first:])

    def part(self, index: Index) -> Noise:
        """Return the numbers of a chunk."""
        seed, rest = self.seed, index
        if isinstance(seed, tuple) and index:
            seed, rest = seed[index[0]], index[1:]
        start, strides = self.start, list(self.strides[len(rest) :])
        for entry, stride in reversed(list(zip(rest, self.strides, strict=False))):
            start += (entry if isinstance(entry, int) else entry.start or 0) * stride
            if not isinstance(entry, int):
                strides.insert(0, stride)
        return Noise(seed, start, tuple(strides))

    def bits(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return 16 random bits for each element, as int32."""
        return self._mixed(shape, device).bitwise_right_shift_(40).bitwise_and_(0xFFFF).to(torch.int32)

    def normal(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return a standard normal number for each element, in float64 (the transform of Box and Muller, 1958)."""
        mixed = self._mixed(shape, device)
        # Uniform in (0, 1] and [0, 1), from 31 bits each.
        first = ((mixed >> 33) & 0x7FFFFFFF).double().add_(1).mul_(2.0**-31)
        second = (mixed & 0x7FFFFFFF).double().mul_(2.0**-31)
        return first.log_().mul_(-2).sqrt_().mul_(second.mul_(2 * math.pi).cos_())

    def _seeds(self, device: torch.device) -> Tensor:
        # A tensor made on a GPU from numbers would wait for the GPU.
        return torch.tensor(self.seed, dtype=torch.int64, device="cpu").to(device, non_blocking=True)

    def _mixed(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return a hash of each position: the finalizer of splitmix64 (Steele, Lea, Flood 2014), in wrapping int64."""
        batched = isinstance(self.seed, tuple)
        sizes = shape[1:] if batched else shape
        # Multiplied before the dimensions are added up, and then in place: most of the time goes to memory.
        mixed = torch.full((), self.start, dtype=torch.int64, device=device).mul_(_STEP)
        if isinstance(self.seed, tuple):
            mixed = mixed + self._seeds(device).view(-1, *[1] * len(sizes))
        else:
            mixed = mixed + self.seed
        for dim, (size, stride) in enumerate(zip(sizes, self.strides, strict=True)):
            steps = torch.arange(size, device=device) * stride * _STEP
            mixed = mixed + steps.view(-1, *[1] * (len(sizes) - 1 - dim))
        high = torch.empty_like(mixed)
        for shift, factor in ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1)):
            torch.bitwise_right_shift(mixed, shift, out=high).bitwise_and_((1 << (64 - shift)) - 1)
            mixed.bitwise_xor_(high)
            if factor != 1:
                mixed.mul_(factor)
        return mixed


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


_STEP = _signed(0x9E3779B97F4A7C15)
