"""The result of a momentum kind: a direction, computed one chunk at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_memopt.kinds.batch import Index, Large, Scratch, take, take_stack


@dataclass(frozen=True)
class Direction:
    """A direction ``scale · base + left @ right``, computed one chunk at a time.

    Attributes:
        plain: Whether that is all. A subclass may compute its chunks in another way, which kernels do not know.
        base: ``[..., m, n]``; the gradient or a momentum, never a copy.
        scale: Factor of ``base``.
        left: ``[..., m, r]``, scaled already, or None.
        right: ``[..., r, n]``, or None.
    """

    plain: ClassVar[bool] = True

    base: Large
    scale: float = 1.0
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def mT(self) -> Direction:
        """The direction of the transposed block."""
        left, right = (each if each is None else each.mT for each in (self.right, self.left))
        return replace(self, base=self.base.mT, left=left, right=right)

    def at(self, index: Index, scratch: Scratch) -> tuple[Tensor, float]:
        """Return one chunk of the direction, and the factor that it still needs. Only the scratch may be modified."""
        base = scratch.cast("base", self.base[index])
        if self.left is None or self.right is None:
            return base, self.scale
        product = scratch.take("update", base.shape)
        torch.matmul(take(self.left, index), take_stack(self.right, index), out=product)
        return product.add_(base, alpha=self.scale), 1.0
