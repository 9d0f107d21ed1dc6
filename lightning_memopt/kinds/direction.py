"""The result of a momentum kind: a direction, computed one chunk at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_memopt.kinds.batch import Index, Large, Scratch, take, take_stack


@dataclass(frozen=True)
class Direction:
    """A direction ``scale · gains · base + left @ right``, computed one chunk at a time.

    Attributes:
        base: ``[..., m, n]``; the gradient or a momentum, never a copy.
        scale: Factor of ``base``.
        left: ``[..., m, r]``, scaled already, or None.
        right: ``[..., r, n]``, or None.
        gains: Factors of the rows or columns of ``base``, or of all of it, that broadcast against it; None for 1.
    """

    base: Large
    scale: float = 1.0
    left: Tensor | None = None
    right: Tensor | None = None
    gains: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether this is ``scale · base + left @ right``, as kernels compute it."""
        return self.gains is None

    @property
    def mT(self) -> Direction:
        """The direction of the transposed block."""
        left, right, gains = (each if each is None else each.mT for each in (self.right, self.left, self.gains))
        return replace(self, base=self.base.mT, left=left, right=right, gains=gains)

    def at(self, index: Index, scratch: Scratch) -> tuple[Tensor, float]:
        """Return one chunk of the direction, and the factor that it still needs. Only the scratch may be modified."""
        base = scratch.cast("base", self.base[index])
        if self.gains is not None:
            base = torch.mul(base, take(self.gains, index), out=scratch.take("gained", base.shape))
        if self.left is None or self.right is None:
            return base, self.scale
        product = scratch.take("update", base.shape)
        torch.matmul(take(self.left, index), take_stack(self.right, index), out=product)
        return product.add_(base, alpha=self.scale), 1.0
