"""What becomes of the weights: decay, and U / D within its bound."""

from __future__ import annotations

from torch import Tensor


def update(
    weights: Tensor, direction: Tensor, denominator: Tensor, *, lr: float, weight_decay: float, max_update: float | None
) -> Tensor:
    """W ← (1 − ηλ) W − η min(max(U / D, −c), c)."""
    quotient = direction / denominator
    if max_update is not None:
        quotient = quotient.clamp(-max_update, max_update)
    return (1 - lr * weight_decay) * weights - lr * quotient
