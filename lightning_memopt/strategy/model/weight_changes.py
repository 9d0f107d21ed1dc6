"""Detect modules that change their weights in ``forward``: they change a gathered copy, and the change is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_memopt.sharding.tensors import local_tensor
from lightning_memopt.sharding.wrapping import own_modules

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Seen:
    """A parameter at the beginning of a forward pass.

    Attributes:
        name: Its full name.
        module: The module that holds it.
        key: Its name in the module.
        param: The parameter.
        place: The address of its elements.
        version: The number of in-place changes.
        total: The sum of its elements, read as integers.
    """

    name: str
    module: nn.Module
    key: str
    param: Tensor
    place: int
    version: int
    total: Tensor

    def changed(self) -> Tensor | bool:
        """Return whether the parameter was replaced or changed; a tensor where only a comparison of sums decides."""
        now = self.module._parameters.get(self.key)
        if now is not self.param or _place(self.param) != self.place or _version(self.param) != self.version:
            return True
        return _total(self.param) != self.total


class Watch:
    """Compare a unit's weights before and after its first forward pass in training, and not again.

    In-place operations increment the version, except through ``.data``. So the sums of the elements are compared, too.
    """

    def __init__(self, name: str, unit: nn.Module, own: Sequence[tuple[str, nn.Module]]) -> None:
        """Register hooks that run while the weights are gathered.

        Args:
            name: The unit's name.
            unit: The unit. If it is not sharded yet, changes in users' hooks are detected, too.
            own: Its modules with their full names, without those of inner units.
        """
        self._name, self._unit, self._own = name, unit, own
        self._seen: list[_Seen] | None = None
        sharded = isinstance(unit, FSDPModule)
        before, after = torch.compiler.disable(self._before), torch.compiler.disable(self._after)
        # `fully_shard` gathers weights before the hooks that exist at that time, and frees them after these hooks.
        self._handles = (
            unit.register_forward_pre_hook(before, prepend=not sharded),
            unit.register_forward_hook(after, prepend=sharded),
        )

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        if not self._unit.training:
            return
        self._seen = [
            _Seen(f"{name}.{key}" if name else key, module, key, param, _place(param), _version(param), _total(param))
            for name, module in self._own
            for key, param in module._parameters.items()
            if param is not None and param.is_floating_point() and param.numel()
        ]

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        if self._seen is None:
            return
        seen, self._seen = self._seen, None
        for handle in self._handles:
            handle.remove()
        found = [entry.changed() for entry in seen]
        sums = [value for value in found if isinstance(value, Tensor)]
        differ = iter(torch.stack(sums).tolist() if sums else [])  # one synchronization for all
        lost = [entry for entry, value in zip(seen, found, strict=True) if value is True or next(differ)]
        if lost:
            names = ", ".join(f"{entry.name!r} ({type(entry.module).__name__})" for entry in lost)
            raise NotImplementedError(
                f"Weights change in the forward pass of {self._name!r}: {names}. There they are copies, gathered from "
                "all ranks for this pass, and the change would be lost. Compute with a changed value instead, such as "
                "`weight.clamp(min=0)` or `torch.nn.utils.parametrize`, or change the sharded parameter between steps, "
                "in `on_before_zero_grad`. This step has changed nothing."
            )


def watch(model: nn.Module) -> None:
    """Watch the units of a model that its user sharded."""
    names = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    units = {name: model.get_submodule(name) for name in names}
    for name, unit in units.items():
        own = own_modules(unit, {*units.values()})
        Watch(name, unit, [(".".join(part for part in (name, inner) if part), module) for inner, module in own])


def _place(param: Tensor) -> int:
    return local_tensor(param).data_ptr()


def _version(param: Tensor) -> int:
    return 0 if param.is_inference() else param._version


def _total(param: Tensor) -> Tensor:
    local = local_tensor(param).detach()
    numbers = local.view(_INTEGERS[local.element_size()])
    # Overflow does not matter. A sum in a wider dtype takes 25 times as long on a CPU.
    return numbers.sum(dtype=numbers.dtype)
