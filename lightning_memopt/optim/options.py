"""Checks the options of a whole optimizer, and answers those that other optimizers have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from lightning_memopt._registry import unknown
from lightning_memopt.plans.rates import RATES
from lightning_memopt.plans.recipe import AXES, known_options
from lightning_memopt.plans.roles import ROLES

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "maximize", "max_update")
NONFINITE = ("raise", "skip")
# Options of the whole optimizer, which a group cannot have.
OF_THE_OPTIMIZER = (
    "bf16_stochastic_round", "clip_update", "fused", "head_dim", "master_weight_bits", "nonfinite", "overrides", "seed",
    "state_dtype",
)  # fmt: skip
# Other names for options of the optimizer or of a group.
OTHER_NAMES = {"learning_rate": "lr", "wd": "weight_decay", "epsilon": "eps", "beta1": "betas", "beta2": "betas"}
OTHER_NAMES |= {"update_proj_gap": "gap", "proj_type": "projection"}  # GaLore's
OTHER_NAMES |= {"scale_type": "scaling", "alpha": "scale"}  # APOLLO's and Fira's
# Options of torch's AdamW without a meaning here, and why.
TORCHS = {
    "amsgrad": "no second moment keeps a maximum",
    "capturable": "a step cannot be captured in a CUDA graph",
    "decoupled_weight_decay": "weight decay is always decoupled",
    "differentiable": "a step has no gradient",
    "foreach": "equal blocks are always updated together",
}


def check_options(
    options: Mapping[str, Any], *, nonfinite: Any, seed: Any, head_dim: Any, fused: Any, clip_update: Any
) -> None:
    """Check the options of the whole optimizer.

    Raises:
        TypeError: If the seed is not an integer, or ``fused`` not one of its three values.
        ValueError: If a value is not valid, or an option is unknown.
    """
    if nonfinite not in NONFINITE:
        raise ValueError(unknown("value of `nonfinite`", nonfinite, list(NONFINITE)))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"`seed` must be an integer, got {seed!r}.")
    if head_dim is not None and (isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1):
        raise ValueError(f"`head_dim` must be an integer of at least 1 (outputs per attention head), got {head_dim!r}.")
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(f"`fused` must be True, False or None (where kernels are available), got {fused!r}.")
    number = isinstance(clip_update, Real) and not isinstance(clip_update, bool)
    if clip_update is not None and not (number and 0 < float(clip_update) < math.inf):
        raise ValueError(
            "`clip_update` must be a positive number (1.0 in Adafactor), or None for no bound on the root mean square "
            f"of a block's update, got {clip_update!r}."
        )
    known = known_options()
    for key, value in options.items():
        if key not in known:
            raise ValueError(_answer(key, value))


def _answer(key: str, value: Any) -> str:
    """Return the message for an option that does not exist."""
    if key in TORCHS:
        return f"There is no option `{key}` as in torch's AdamW, since {TORCHS[key]}. Leave it out, got {value!r}."
    if key in OTHER_NAMES:
        return f"Unknown option {key!r}. Did you mean {OTHER_NAMES[key]!r}?"
    if key in AXES:
        decay = " Its decay rate is the first of `betas`." if key == "momentum" else ""
        return (
            f"Unknown option {key!r}, got {value!r}: kinds of momentum and second moment come from `recipe`, and by "
            f"role or pattern from `overrides`, as in overrides={{'mlp': {{{key!r}: 'dense'}}}}.{decay}"
        )
    if key in RATES or key in ROLES:
        change = f"{{{key!r}: {value!r}}}" if key in ROLES else f"{{'embedding': {{{key!r}: {value!r}}}}}"
        return f"Unknown option {key!r}: put what differs by role or pattern into `overrides`: overrides={change}."
    return unknown("option", key, [*HYPERPARAMETERS, *OF_THE_OPTIMIZER, *known_options()])
