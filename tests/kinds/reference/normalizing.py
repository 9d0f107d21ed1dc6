"""Second moments that are a norm of the direction: what they make of a gradient without momentum, U / D."""

from __future__ import annotations

import torch
from torch import Tensor


class NormalizedSecondMoment:
    def __init__(self, shape: tuple[int, int], per: str, output_dim: int, **_: object) -> None:
        self.inputs = 1 if (output_dim == -2) == (per == "output") else 0

    def update(self, grad: Tensor, *, eps: float, **_: object) -> Tensor:
        return grad / (grad.square().mean(self.inputs, keepdim=True).sqrt() + eps)


class OrthogonalSecondMoment:
    """The iteration on the singular values: the vectors stay as they are."""

    def __init__(
        self,
        shape: tuple[int, int],
        ns_coefficients: tuple[float, float, float],
        ns_steps: int,
        adjust_lr_fn: str,
        output_dim: int,
        **_: object,
    ) -> None:
        self.coefficients, self.steps = ns_coefficients, ns_steps
        outputs, inputs = shape if output_dim == -2 else shape[::-1]
        self.factor = max(1.0, outputs / inputs) ** 0.5 if adjust_lr_fn == "original" else 0.2 * max(shape) ** 0.5

    def update(self, grad: Tensor, **_: object) -> Tensor:
        if not grad.any():
            return torch.zeros_like(grad)
        u, s, vt = torch.linalg.svd(grad, full_matrices=False)
        s = s / s.norm()
        a, b, c = self.coefficients
        for _ in range(self.steps):
            s = a * s + b * s**3 + c * s**5
        return self.factor * (u * s) @ vt
