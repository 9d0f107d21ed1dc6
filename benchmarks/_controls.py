"""Optimizers that only serve as controls: they exist to explain results, not to be used."""

from __future__ import annotations

from typing import Any

import torch


class QHAdam(torch.optim.Optimizer):
    """AdamW with a quasi-hyperbolic momentum: U = (1 − ν) G + ν M / (1 − β₁ᵗ) (Ma, Yarats, 2019, with ν₂ = 1).

    Every direction of a block gets the same mixture of gradient and momentum. Low-rank momentum mixes them by
    direction: momentum inside the subspace, gradients outside.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        nu: float = 0.7,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "nu": nu, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take one step."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
                state["step"] += 1
                momentum = state["exp_avg"].lerp_(param.grad, 1 - beta1)
                square = state["exp_avg_sq"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                direction = param.grad.lerp(momentum / (1 - beta1 ** state["step"]), group["nu"])
                root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                param.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(direction, root, value=-group["lr"])
