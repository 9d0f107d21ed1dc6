"""Finds the module whose parameters an optimizer was given without names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import GeneratorType
from typing import Any

from torch import Tensor, nn


def owner_of(params: Any) -> nn.Module | None:
    """Return the module M if ``params`` is ``M.parameters()``, otherwise None.

    A LightningCLI calls ``AdaPMLean(module.parameters(), ...)`` itself, under any strategy, and so do most scripts. The
    generator knows its module. A Trainer's closure knows it, too, but not before a checkpoint is restored, and not with
    a gradient scaler, which steps without one.

    Args:
        params: What an optimizer is created from.
    """
    if isinstance(params, GeneratorType) and params.gi_code is nn.Module.parameters.__code__:
        return inspect.getgeneratorlocals(params).get("self")
    return None


def still_owns(owner: nn.Module | None, params: Iterable[Tensor]) -> bool:
    """Return whether all parameters are those of the module, and have not been replaced, as by a strategy."""
    return owner is not None and set(params) <= set(owner.parameters())
