"""The optimizers that benchmarks/convergence.py compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

# Sums over a subset of 128 elements instead of means shrink the update by sqrt(128).
_SUM = 11.3
_RATIO = {"overrides": {"embedding": {"lr_multiplier": _SUM}, "vector": {"lr_multiplier": _SUM}}}


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: Name in the results.
        recipe: The recipe, or ``"torch"`` for ``torch.optim.AdamW``.
        betas: The optimizer's betas.
        lr_multiplier: Factor on the grid of learning rates.
        options: Other arguments of the recipe's class.
    """

    name: str
    recipe: str
    betas: tuple[float, float] = (0.9, 0.95)
    lr_multiplier: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return the optimizer of all parameters of a model."""
        shared: dict[str, Any] = {"lr": lr, "betas": self.betas, "weight_decay": weight_decay}
        if self.recipe == "torch":
            return torch.optim.AdamW(model.parameters(), **shared, fused=True)
        import lightning_memopt

        if self.options.get("paper"):
            build: Callable[..., Any] = lightning_memopt.AdamSNSM
        else:
            build = partial(lightning_memopt.MemOpt, recipe=self.recipe)
        optimizer = build(model.named_parameters(), **shared, **self.options)
        optimizer.bind(model)
        return optimizer


REFERENCE = "AdamW"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(REFERENCE, "torch"),
        Variant("AdamW beta1=0.8", "torch", betas=(0.8, 0.95)),
        Variant("adapm", "adapm"),
        Variant("adapm_mini", "adapm_mini"),
        Variant("adapm_lean", "adapm_lean"),
        Variant("adam_sn", "adam_sn"),
        Variant("adam_snsm", "adam_snsm"),
        Variant("adam_snsm paper", "adam_snsm", (0.9, 0.999), _SUM, {"paper": True}),
        # AdaGrad also divides by the root of a sum over all steps so far.
        Variant("adagrad_snsm", "adagrad_snsm", (0.9, 1.0), 2 * _SUM),
        Variant("rmsprop_sn", "rmsprop_sn", (0.0, 0.999), _SUM),
        Variant("adam_mini", "adam_mini"),
        Variant("adafactor", "adafactor"),
        # The variants that sum over subsets have larger rates for embeddings and norms than for linear weights. Two
        # other variants get the same ratio, so that the ratio's effect is not taken for the method's.
        Variant("AdamW ratio 11.3", "adamw", options=_RATIO),
        Variant("adapm_lean ratio 11.3", "adapm_lean", options=_RATIO),
        # Runs only on request: equal to the control, as the tests show.
        Variant("adamw", "adamw"),
    )
}
DEFAULT = [name for name in VARIANTS if name != "adamw"]
