"""Shard a model, one unit at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lightning_memopt.plans.placement import renamed, shard_dims
from lightning_memopt.sharding.wrapping import Unit, own_modules
from lightning_memopt.strategy.mesh import shard_size
from lightning_memopt.strategy.model.materialize import (
    Modules,
    convert,
    materialize_sharded,
    move,
    pretrained_owners,
    refuse_uninitializable,
)
from lightning_memopt.strategy.model.precision import sharding_policy
from lightning_memopt.strategy.model.same_weights import broadcast, broadcast_replicas
from lightning_memopt.strategy.model.weight_changes import Watch, watch

_RECORD = "_memopt_sharding"


@dataclass(frozen=True)
class Sharding:
    """How the strategy sharded a model. A later fit of the same model must use the same settings."""

    mesh: DeviceMesh
    precision: str
    cpu_offload: bool
    device: torch.device
    reshard_after_forward: bool | int | None

    def check_same(self, other: Sharding) -> None:
        """Check that another fit uses the same settings.

        Raises:
            ValueError: If it does not; the message names the setting that differs.
        """
        for name in ("mesh", "precision", "cpu_offload", "device", "reshard_after_forward"):
            was, wanted = getattr(self, name), getattr(other, name)
            if was != wanted:
                raise ValueError(
                    f"The model was sharded by an earlier fit with {name}={was!r}, and sharding cannot be undone; this "
                    f"one has {name}={wanted!r}. Use the same settings, or create a new model."
                )


def is_sharded(model: nn.Module) -> bool:
    """Return whether any parameter is sharded."""
    return any(isinstance(param, DTensor) for param in model.parameters())


def earlier_sharding(model: nn.Module) -> Sharding | None:
    """Return how the strategy sharded this model in an earlier fit; None if it did not."""
    return getattr(model, _RECORD, None)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules to which ``fully_shard`` was applied."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def reduction_paused(model: nn.Module) -> Generator[None, None, None]:
    """Do not reduce gradients over ranks in the backward passes inside: they add up on every rank."""
    modules = sharded_modules(model)
    try:
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        yield
    finally:
        for module in modules:
            module.set_requires_gradient_sync(True, recurse=False)


def shard(
    model: nn.Module,
    units: Sequence[Unit],
    sharding: Sharding,
    checkpointed: Sequence[nn.Module] = (),
) -> None:
    """Shard a model. At any time, at most one unit has full tensors on the device that it did not have before.

    Args:
        model: The model. Tensors outside all units are moved to the device and broadcast, too.
        units: The result of :func:`find_units`.
        sharding: The settings.
        checkpointed: Modules whose activations are recomputed in the backward pass.
    """
    modules, owners = {unit.module for unit in units}, pretrained_owners(model)
    refuse_uninitializable(own_modules(model, set()), owners)
    for module in checkpointed:
        checkpoint(module)
    dims = shard_dims(model, shard_size(sharding.mesh))
    if type(sharding.reshard_after_forward) is int:
        dims = dict.fromkeys(dims, 0)  # FSDP2 cannot gather other dimensions from fewer ranks
    rest = () if model in modules else (Unit("", model, True),)
    for unit in (*units, *rest):
        prefix = f"{unit.name}." if unit.name else ""
        own = [(prefix + name if name else unit.name, module) for name, module in own_modules(unit.module, modules)]
        replaced = move(own, sharding.device, owners)
        if sharding.precision == "bf16-true":
            converted = convert(own, torch.bfloat16)
            replaced = {**converted, **{old: converted.get(new, new) for old, new in replaced.items()}}
        broadcast(_tensors(own))
        if unit.module in modules:
            Watch(unit.name, unit.module, own)
            _fully_shard(unit, sharding, renamed(dims, replaced))
    setattr(model, _RECORD, sharding)


@contextmanager
def attributes_kept(model: nn.Module) -> Generator[None, None, None]:
    """Keep the attributes that users set on parameters. torch loses them when it replaces parameters."""
    before = {name: dict(vars(param)) for name, param in model.named_parameters()}
    yield
    for name, param in model.named_parameters():
        vars(param).update({key: value for key, value in before[name].items() if key not in vars(param)})


def complete_sharding(model: nn.Module, device: torch.device) -> None:
    """Initialize a model that its user sharded on the meta device, and make replicas equal."""
    modules = own_modules(model, set())
    refuse_uninitializable(modules, pretrained_owners(model))
    materialize_sharded(modules, device)
    broadcast_replicas(model)
    watch(model)


def _fully_shard(unit: Unit, sharding: Sharding, dims: dict[Tensor, int]) -> None:
    fully_shard(
        unit.module,
        mesh=sharding.mesh,
        reshard_after_forward=sharding.reshard_after_forward,
        shard_placement_fn=lambda param: Shard(dims[param]),
        mp_policy=sharding_policy(sharding.precision, outermost=unit.outermost),
        offload_policy=CPUOffloadPolicy(pin_memory=sharding.device.type == "cuda")
        if sharding.cpu_offload
        else OffloadPolicy(),
        # The reduction in `fully_shard` fails on gradients without elements.
        ignored_params={param for param in unit.module.parameters() if not param.numel()},
    )


def _tensors(modules: Modules) -> Iterator[Tensor]:
    for _, module in modules:
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
