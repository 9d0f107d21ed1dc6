"""Precision plugins for sharded models."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.precision import HalfPrecision as FabricHalf
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixed
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.strategy.gradients import clip_grad_norm_, clip_grad_value_

SUPPORTED = ("32-true", "bf16-true", "bf16-mixed")


class _ClipsAll:
    """Clips sharded and plain gradients together."""

    main_params: Any

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        refuse_released(optimizer)
        clip_grad_norm_(self.main_params(optimizer), clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        refuse_released(optimizer)
        clip_grad_value_(self.main_params(optimizer), clip_val)


def refuse_released(optimizer: Optimizer) -> None:
    """Raise if the optimizer has released the gradients that are to be clipped.

    Raises:
        RuntimeError: If it has.
    """
    if isinstance(optimizer, MemOpt) and optimizer.releases_gradients:
        raise RuntimeError(
            "Gradients cannot be clipped: `gradient_release` has applied and freed them in the backward pass. Use "
            "`clip_update=1.0` of the optimizer, which bounds the update of each block, or train without "
            "`gradient_release`."
        )


class _Mixed:
    """Parameters in float32 and computation in bfloat16, by FSDP2's policy, or by autocast if the user sharded.

    Attributes:
        autocast: Whether ``torch.autocast`` is on. The strategy turns it off for models that it shards itself.
    """

    autocast = True

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        if self.autocast:
            with super().forward_context():  # type: ignore[misc]
                yield
        else:
            yield


class ShardedPrecision(_ClipsAll, Precision):
    """Everything in float32."""


class ShardedHalfPrecision(_ClipsAll, HalfPrecision):
    """Everything in bfloat16."""


class ShardedMixedPrecision(_Mixed, _ClipsAll, MixedPrecision):
    """Parameters in float32 and computation in bfloat16."""


class ShardedFabricMixedPrecision(_Mixed, FabricMixed):
    """The same for Fabric. Its strategies clip gradients, not its plugins."""


def sharded_plugin(plugin: Precision | None) -> Precision | None:
    """Return the counterpart of a Trainer's precision plugin for sharded models.

    Raises:
        ValueError: If the precision is not supported, or the plugin is not one of Lightning's own.
    """
    if plugin is None or isinstance(plugin, _ClipsAll):
        return plugin
    if type(plugin) is Precision:
        return ShardedPrecision()
    if type(plugin) is HalfPrecision and plugin.precision == "bf16-true":
        return ShardedHalfPrecision("bf16-true")
    if type(plugin) is MixedPrecision and plugin.precision == "bf16-mixed":
        return ShardedMixedPrecision("bf16-mixed", plugin.device)
    raise _unsupported(plugin, "MemOptFSDPStrategy")


def sharded_fabric_plugin(plugin: FabricPrecision | None) -> FabricPrecision | None:
    """Return the counterpart of Fabric's precision plugin for sharded models.

    Raises:
        ValueError: As for :func:`sharded_plugin`.
    """
    if plugin is None or type(plugin) in (FabricPrecision, ShardedFabricMixedPrecision):
        return plugin
    if type(plugin) is FabricHalf and plugin.precision == "bf16-true":
        return plugin
    if type(plugin) is FabricMixed and plugin.precision == "bf16-mixed":
        return ShardedFabricMixedPrecision("bf16-mixed", plugin.device)
    raise _unsupported(plugin, "MemOptFabricStrategy")


def _unsupported(plugin: FabricPrecision, strategy: str) -> ValueError:
    return ValueError(
        f"{strategy} supports the precisions {', '.join(SUPPORTED)} with Lightning's own plugins, got "
        f"{plugin.precision!r} ({type(plugin).__name__}). Choose `precision='bf16-mixed'` to compute in half precision."
    )


def sharding_policy(precision: str, *, outermost: bool) -> MixedPrecisionPolicy:
    """Return FSDP2's policy for a unit. Outermost units cast their outputs to float32."""
    if precision != "bf16-mixed":
        return MixedPrecisionPolicy()
    output = torch.float32 if outermost else None
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=output)
