"""The current step as a kind sees it, with a source of reproducible random numbers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 63) - 1
_STEP_STRIDE = 0x9E3779B97F4A7C15


def block_key(seed: int, name: str) -> int:
    """Return a 63-bit number that depends only on the seed and the block's name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _MASK


@dataclass(frozen=True)
class Tick:
    """One step of one block.

    Attributes:
        step: The current step, counted from 1 as in ``torch.optim.AdamW``.
        key: The block's :func:`block_key`.
        index: The block's position in the optimizer. It staggers work that runs every few steps.
    """

    step: int
    key: int
    index: int

    def due(self, gap: int) -> bool:
        """Return whether work that recurs every ``gap`` steps is due now; always true at step 1."""
        return self.step == 1 or (self.step + self.index) % gap == 0

    def salted(self, purpose: str = "") -> int:
        """Return a 63-bit number that depends only on the block, the step and the purpose."""
        salt = block_key(self.step, purpose) if purpose else 0
        return (self.key + self.step * _STEP_STRIDE + salt) & _MASK

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Draw standard normal numbers of a *global* shape, on the CPU so that every device gets the same numbers."""
        generator = torch.Generator("cpu").manual_seed(self.salted())
        draw = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return draw.to(dtype=like.dtype, device=like.device)
