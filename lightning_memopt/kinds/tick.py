"""The current step as a kind sees it, with seeds for reproducible random numbers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

_MASK = (1 << 63) - 1


def block_key(seed: int, name: str) -> int:
    """Return a 63-bit number that depends only on the seed and the block's name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _MASK


@dataclass(frozen=True)
class Tick:
    """One step of one block, or of a batch of blocks.

    Attributes:
        step: The current step, counted from 1 as in ``torch.optim.AdamW``.
        key: The block's :func:`block_key`, or those of all blocks of a batch.
        index: The block's position in the optimizer. It staggers work that runs every few steps.
    """

    step: int
    key: int | tuple[int, ...]
    index: int

    def due(self, gap: int, *, stagger: bool = True) -> bool:
        """Return whether work that recurs every ``gap`` steps is due now; always true at step 1.

        Staggered, blocks take turns; otherwise it is due for all of them at the multiples of ``gap``.
        """
        return self.step == 1 or (self.step + (self.index if stagger else 0)) % gap == 0

    def of_period(self, gap: int) -> Tick:
        """Return a tick for draws that last until work that recurs every ``gap`` steps is due again.

        Its step is the number of times that it was due after step 1.
        """
        return replace(self, step=(self.step + self.index % gap) // gap)

    def salted(self, purpose: str = "") -> int | tuple[int, ...]:
        """Return a 63-bit number that depends only on the block, the step and the purpose; one per block of a batch.

        The step is hashed. Numbers that differ by a multiple of the noise's stride would draw shifted copies.
        """
        salt = block_key(self.step, purpose)
        if isinstance(self.key, int):
            return (self.key + salt) & _MASK
        return tuple((key + salt) & _MASK for key in self.key)
