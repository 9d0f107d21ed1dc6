"""Rates of blocks: what overrides change in the learning rate and the weight decay of a group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from lightning_memopt.kinds.ranges import check_number

RATES = ("lr_multiplier", "weight_decay")
# Hyperparameters that differ between parameter groups only.
OF_GROUPS = ("betas", "eps", "maximize", "max_update")
# What users may call them.
OTHER_NAMES = {**dict.fromkeys(("lr", "learning_rate", "lr_scale"), "lr_multiplier"), "wd": "weight_decay"}


@dataclass(frozen=True)
class BlockRates:
    """How the rates of a block differ from those of its parameter group.

    Attributes:
        lr_multiplier: Factor on the group's current learning rate, above 0.
        weight_decay: Decoupled weight decay in place of the group's, at least 0; None for the group's.
    """

    lr_multiplier: float = 1.0
    weight_decay: float | None = None

    def changed(self, change: Mapping[str, Any]) -> BlockRates:
        """Return the rates after an override. Its kinds and options are ignored."""
        return replace(self, **{key: float(change[key]) for key in RATES if key in change})


def check_rate(name: str, value: Any, where: str) -> None:
    """Check one rate of an override.

    Args:
        name: ``lr_multiplier`` or ``weight_decay``.
        value: Its value.
        where: Where it comes from, for the message.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If it is negative or not finite, or a multiplier is 0.
    """
    if isinstance(value, str):
        raise TypeError(
            f"In {where}: `{name}` must be a number, got the text {value!r}. On a command line, give all overrides at "
            'once, as JSON: --optimizer.init_args.overrides=\'{"vector": {"weight_decay": 0}}\'.'
        )
    if name == "lr_multiplier" and value == 0:
        raise ValueError(
            f"In {where}: `lr_multiplier` must be above 0, got 0: nothing would train, at the full cost of a step. "
            "Freeze the parameters instead (requires_grad_(False)); they then have no state either."
        )
    if name == "lr_multiplier" and isinstance(value, Real) and not 0 < float(value) < math.inf:
        raise ValueError(f"In {where}: `lr_multiplier` must be finite and above 0, got {value!r}.")
    check_number(name, value, where)
