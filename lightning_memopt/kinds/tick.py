"""What a kind may know of the present moment: the step and a source of repeatable random numbers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 63) - 1
_STEP_STRIDE = 0x9E3779B97F4A7C15


def block_key(seed: int, name: str) -> int:
    """Return a 63-bit number that depends on the seed and the block's name only."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _MASK


@dataclass(frozen=True)
class Tick:
    """One step of one block.

    Attributes:
        step: The step being taken, counted from 1 as in ``torch.optim.AdamW``.
        key: The block's :func:`block_key`.
        index: The block's position in the optimizer; staggers work that is done every few steps.
    """

    step: int
    key: int
    index: int

    def due(self, gap: int) -> bool:
        """Return whether work that recurs every ``gap`` steps falls on this one; always on step 1."""
        return self.step == 1 or (self.step + self.index) % gap == 0

    def salted(self, purpose: str = "") -> int:
        """Return a 63-bit number that depends on the block, the step and the purpose only."""
        salt = block_key(self.step, purpose) if purpose else 0
        return (self.key + self.step * _STEP_STRIDE + salt) & _MASK

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Draw standard normal numbers of a *global* shape: on the CPU, so that every device gets the same."""
        generator = torch.Generator("cpu").manual_seed(self.salted())
        draw = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return draw.to(dtype=like.dtype, device=like.device)
