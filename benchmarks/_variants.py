"""The optimizers that benchmarks/quality.py compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

REFERENCE = "AdamW"
# The roles whose rate the ratio multiplies.
RATIO_ROLES = ("embedding", "vector")
ROLES = ("embedding", "query", "key", "value", "attention_output", "mlp", "head")
SPARED, NONE = ("embedding", "query", "key", "head"), {"momentum": "none"}
HIDDEN = ("query", "key", "value", "attention_output", "mlp")
Build = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Variant:
    """One optimizer.

    Attributes:
        name: Name in the results.
        recipe: A recipe's name, the content of a recipe file, or the name of one of torch's optimizers or the controls.
        betas: The optimizer's betas.
        options: Other arguments of the recipe's class.
    """

    name: str
    recipe: str | Mapping[str, Any]
    betas: tuple[float, float] = (0.9, 0.95)
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, model: nn.Module, lr: float, weight_decay: float, ratio: float = 1.0) -> torch.optim.Optimizer:
        """Return the optimizer of all parameters of a model.

        Args:
            model: The model.
            lr: Learning rate.
            weight_decay: Decoupled weight decay.
            ratio: Factor of the learning rate for embeddings and vectors.
        """
        shared: dict[str, Any] = {"lr": lr, "betas": self.betas, "weight_decay": weight_decay, **self.options}
        if isinstance(self.recipe, str) and self.recipe in _OTHERS:
            assert ratio == 1.0, f"{self.name} has one rate for all"
            return _OTHERS[self.recipe](model.parameters(), **shared)
        import _control_kinds  # noqa: F401 - registers the kind

        import lightning_memopt

        if ratio != 1.0:
            given = shared.get("overrides", {})
            rates = {role: {**given.get(role, {}), "lr_multiplier": ratio} for role in RATIO_ROLES}
            shared["overrides"] = {**given, **rates}
        if shared.pop("paper", False):
            optimizer: Any = lightning_memopt.AdamSNSM(model.named_parameters(), **shared, paper=True)
        else:
            optimizer = lightning_memopt.MemOpt(model.named_parameters(), self.recipe, **shared)
        optimizer.bind(model)
        return optimizer

    @property
    def is_whole(self) -> bool:
        """Whether this is a recipe, or an optimizer of torch, without other options."""
        return isinstance(self.recipe, str) and not set(self.options) - {"paper"} and self.recipe != "QHAdam"

    def definition(self) -> dict[str, Any]:
        """Return what defines a run's optimizer, besides its rates. A changed variant trains again."""
        return {**asdict(self), "betas": list(self.betas)}


def _qhadam(params: Any, **options: Any) -> torch.optim.Optimizer:
    from _controls import QHAdam

    return QHAdam(params, **options)


_OTHERS: dict[str, Build] = {
    "torch AdamW": lambda params, **options: torch.optim.AdamW(params, **options, fused=True),
    "torch NAdam": lambda params, **options: torch.optim.NAdam(params, **options, decoupled_weight_decay=True),
    "QHAdam": _qhadam,
}


def _mixed(momentum: Mapping[str, Any], second_moment: str = "factored") -> dict[str, Any]:
    """Return a recipe with the same kinds for all matrices."""
    kinds = {**momentum, "second_moment": second_moment}
    return {"name": "mixed", "base": "adamw", "roles": dict.fromkeys(ROLES, kinds)}


def _muon(momentum: Mapping[str, Any]) -> dict[str, Any]:
    """Return Muon with another momentum of hidden matrices."""
    return {"name": "muon", "base": "muon", "roles": dict.fromkeys(HIDDEN, momentum)}


def _control(mode: str, iterations: int = 1) -> dict[str, Any]:
    return _mixed({"momentum": "control", "rank": 4, "mode": mode, "iterations": iterations})


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(REFERENCE, "torch AdamW"),
        Variant("AdamW, beta1 0.8", "torch AdamW", betas=(0.8, 0.95)),
        Variant("AdamW, beta1 0.95", "torch AdamW", betas=(0.95, 0.95)),
        Variant("NAdam", "torch NAdam"),
        Variant("QHAdam, nu 0.7", "QHAdam"),
        # The control with rates by role: equal to torch's AdamW, as the tests show.
        Variant("adamw", "adamw"),
        *(Variant(f"adamw, beta1 {beta1}", "adamw", betas=(beta1, 0.95)) for beta1 in (0.8, 0.7, 0.6)),
        Variant("adapm_lean, beta1 0.8", "adapm_lean", betas=(0.8, 0.95)),
        Variant("adapm", "adapm"),
        Variant("adapm_mini", "adapm_mini"),
        Variant("adapm_lean", "adapm_lean"),
        *(Variant(f"adapm_lean, rank {rank}", "adapm_lean", options={"rank": rank}) for rank in (1, 2, 4, 8, 16, 32)),
        Variant("adam_sn", "adam_sn"),
        Variant("adam_snsm", "adam_snsm"),
        Variant("adam_snsm paper", "adam_snsm", (0.9, 0.999), {"paper": True}),
        Variant("adagrad_snsm", "adagrad_snsm", (0.9, 1.0)),
        Variant("rmsprop_sn", "rmsprop_sn", (0.0, 0.999)),
        Variant("adam_mini", "adam_mini"),
        Variant("adafactor", "adafactor"),
        Variant("dense x factored", _mixed({"momentum": "dense"})),
        Variant("snsm_lean", "snsm_lean"),
        Variant("snsm_lean, rank 4", "snsm_lean", options={"rank": 4}),
        *(Variant(f"snsm_lean, gap {gap}", "snsm_lean", options={"gap": gap}) for gap in (2, 40, 200)),
        *(Variant(f"snsm_lean, {name}", "snsm_lean", options={"handover": name}) for name in ("rotate", "keep")),
        Variant("scale", "scale"),
        Variant("galore", "galore"),
        Variant("fira", "fira"),
        Variant("apollo", "apollo"),
        # As often a new subspace as snsm_lean has; their authors' 200 steps make two in these short runs.
        *(Variant(f"{name}, gap 10", name, options={"gap": 10}) for name in ("galore", "fira", "apollo")),
        Variant("apollo_mini", "apollo_mini"),
        Variant("muon", "muon", betas=(0.95, 0.95)),
        Variant("muon, beta1 0.9", "muon", betas=(0.9, 0.95)),
        Variant("muon, low rank 1/32", _muon({"momentum": "low_rank", "rank": 1 / 32}), betas=(0.95, 0.95)),
        Variant("muon_lean", "muon_lean"),
        *(Variant(f"muon_lean, rank {rank}", "muon_lean", options={"rank": rank}) for rank in (1, 16)),
        *(
            Variant(f"muon_lean, {name}", "muon_lean", options={"overrides": dict.fromkeys(HIDDEN, kinds)})
            for name, kinds in (
                ("no momentum", {"momentum": "none"}),
                ("subspace 1/8", {"momentum": "subspace"}),
                ("dense", {"momentum": "dense", "nesterov": True}),
            )
        ),
        # How bfloat16 weights are kept.
        *(
            Variant(f"{name}, {label}", name, options=dict([option]))
            for name in ("adamw", "adapm_lean")
            for label, option in (
                ("to nearest", ("bf16_stochastic_round", False)),
                ("24 bits", ("master_weight_bits", 24)),
                ("32 bits", ("master_weight_bits", 32)),
            )
        ),
        # What explains adapm_lean.
        Variant("the same, written out", _control("low_rank")),
        Variant("two iterations a step", _control("low_rank", iterations=2)),
        Variant("the best basis", _control("best")),
        Variant("what is dropped, dropped for good", _control("inside")),
        Variant("momentum outside the subspace only", _control("inverse")),
        Variant("outside, the gradient as small as momentum", _control("small")),
        Variant("outside, momentum as large as the gradient", _control("averaged")),
        *(
            Variant(f"no momentum for {role}", "adapm_lean", options={"overrides": {role: {"momentum": "none"}}})
            for role in ROLES
        ),
        # Momentum only for the roles that lose most without it: three quarters of the bytes, and as many with rank 6.
        *(
            Variant(f"adapm_lean, {name}", "adapm_lean", options={"overrides": dict.fromkeys(SPARED, NONE), **rank})
            for name, rank in (("mlp, value, output", {}), ("rank 6: mlp, value, output", {"rank": 6}))
        ),
        *(Variant(f"max_update {bound}", "adapm_lean", options={"max_update": bound}) for bound in (None, 3.0, 1.0)),
        Variant("adapm_lean, clip_update 1.0", "adapm_lean", options={"clip_update": 1.0}),
    )
}
