"""Every second-moment kind: reduce the squares as the kind says, average or add up, spread, divide by b2, root."""

from __future__ import annotations

import torch
from torch import Tensor


class _SecondMoment:
    """V ← β₂ V + (1−β₂) reduce(G²), or V ← V + reduce(G²) with β₂ = 1;  D = √(spread(V) / b₂) + ε.

    With ``correct_eps``, D = (√spread(V) + ε) / √b₂.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        bias_correction: bool,
        correct_eps: bool,
        outputs_per_number: int | None = None,
        output_dim: int = -2,
    ) -> None:
        self.shape = shape
        self.bias_correction = bias_correction
        self.correct_eps = correct_eps
        self.outputs_per_number = outputs_per_number
        self.output_dim = output_dim
        self.average = [torch.zeros_like(part) for part in self.reduce(torch.zeros(shape, dtype=torch.float64))]

    def update(self, grad: Tensor, *, beta2: float, eps: float, step: int) -> Tensor:
        weight = 1.0 if beta2 == 1 else 1 - beta2
        fresh = self.reduce(grad**2)
        self.average = [beta2 * old + weight * new for old, new in zip(self.average, fresh, strict=True)]
        b2 = 1 - beta2**step if self.bias_correction and beta2 < 1 else 1.0
        if self.correct_eps:
            return (self.spread(*self.average).sqrt() + eps) / b2**0.5
        return (self.spread(*self.average) / b2).sqrt() + eps

    def reduce(self, square: Tensor) -> list[Tensor]:
        return [square]

    def spread(self, *parts: Tensor) -> Tensor:
        return parts[0]


class NoSecondMoment(_SecondMoment):
    def update(self, grad: Tensor, **_: float) -> Tensor:
        return torch.ones_like(grad)


class DenseSecondMoment(_SecondMoment):
    pass


class FactoredSecondMoment(_SecondMoment):
    def reduce(self, square: Tensor) -> list[Tensor]:
        return [square.mean(1), square.mean(0)]

    def spread(self, *parts: Tensor) -> Tensor:
        row, column = parts
        return torch.outer(row, column) / row.mean() if row.mean() > 0 else torch.zeros(self.shape, dtype=row.dtype)


class BlockwiseSecondMoment(_SecondMoment):
    """One mean for each output (a row, or a column where weights are stored transposed), or for each head of them."""

    def reduce(self, square: Tensor) -> list[Tensor]:
        outputs = square if self.output_dim == -2 else square.T
        size = self.outputs_per_number or 1
        return [torch.stack([part.mean() for part in outputs.split(size)])]

    def spread(self, *parts: Tensor) -> Tensor:
        outputs = parts[0].repeat_interleave(self.outputs_per_number or 1)
        return outputs[:, None].expand(self.shape) if self.output_dim == -2 else outputs[None, :].expand(self.shape)


class SubsetNormSecondMoment(_SecondMoment):
    """One number for each row of a tall block, column of a wide one, or run of ``subset_size`` elements of a row."""

    def __init__(self, shape: tuple[int, int], reduction: str, subset_size: int | None, **options: bool) -> None:
        m, n = shape
        row, column = torch.arange(m)[:, None], torch.arange(n)
        self.subsets = (row if m >= n else column).expand(shape)
        if subset_size is not None:
            self.subsets = row * -(-n // subset_size) + column // subset_size
        self.reduction = reduction
        super().__init__(shape, **options)

    def reduce(self, square: Tensor) -> list[Tensor]:
        subsets = self.subsets.flatten()
        total = torch.zeros(int(subsets.max()) + 1, dtype=square.dtype).index_add(0, subsets, square.flatten())
        return [total / subsets.bincount() if self.reduction == "mean" else total]

    def spread(self, *parts: Tensor) -> Tensor:
        return parts[0][self.subsets]
