"""What FSDP2 holds beside shards during a pass, by storages."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memopt.memory.storages import storages_of

# FSDP2's methods that gather, free and reduce a unit. It allocates nowhere else.
METHODS = ("unshard", "pre_forward", "post_forward", "pre_backward", "post_backward")


class _Allocated(TorchDispatchMode):
    """Knows all storages that are made inside, and their present sizes: FSDP2 frees and allocates some again."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.peak, self.sampling, self._device = 0, True, device
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(storage) for storage in storages_of((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        self.add(storage for storage in storages_of(out) if id(storage) not in given)
        if self.sampling:
            self.sample()
        return out

    def add(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Count storages as long as they exist."""
        for storage in storages:
            key = id(storage)
            if key not in self._made and storage.device.type == self._device.type:
                self._made[key] = weakref.ref(storage, lambda _, key=key: self._made.pop(key, None))  # type: ignore[misc]

    def leave_out(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """No longer count storages."""
        for storage in storages:
            self._made.pop(id(storage), None)

    def sample(self, more: int = 0) -> None:
        """Compare what exists now, and ``more`` bytes, with the peak."""
        alive = [reference() for reference in list(self._made.values())]
        self.peak = max(self.peak, more + sum(storage.nbytes() for storage in alive if storage is not None))


@contextmanager
def trace_unsharded(module: nn.Module) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the most bytes so far that FSDP2 held beside shards.

    These are gathered parameters, gradients before they are reduced, and the buffers of both. A dispatch mode sees what
    is made, and would keep ``torch.compile`` from compiling: it is active only inside of FSDP2's own methods, which are
    never compiled. So a gradient counts from the first of these calls after it was made, and the moment in which
    autograd adds two gradients of one weight does not count.

    Args:
        module: The module whose units are sharded. Without any, the result is 0.
    """
    groups = _groups(module)
    if not groups:
        yield lambda: 0
        return
    tracer = _Tracer(groups)
    places = [(group, name, vars(group).get(name)) for group in groups for name in METHODS]
    for group, name, _ in places:
        # On the instance, in front of the class's method.
        setattr(group, name, partial(tracer.call, group, name, getattr(group, name)))
    try:
        yield lambda: tracer.allocated.peak
    finally:
        for group, name, before in places:
            if before is None:
                delattr(group, name)
            else:  # of a trace around this one
                setattr(group, name, before)


class _Tracer:
    """Calls FSDP2's methods, and samples what exists before, during and after them."""

    def __init__(self, groups: list[Any]) -> None:
        self._groups, self.allocated, self._inside = groups, _Allocated(groups[0].device), False
        # FSDP2 keeps these from its first pass on, and gives them memory again in every pass.
        for param in _params(groups):
            self.allocated.add(storages_of(getattr(param, "all_gather_outputs", ())))

    def call(self, group: Any, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of a group."""
        if self._inside:  # one method called another one
            return method(*args, **kwargs)
        allocated, reduces = self.allocated, name == "post_backward"
        allocated.add(_unreduced(self._groups))
        allocated.sample()
        own = sum(storage.nbytes() for storage in _unreduced([group])) if reduces else 0
        # There the optimizer may also take a step, with gradient release.
        allocated.sampling, self._inside = not reduces, True
        try:
            with allocated:
                result = method(*args, **kwargs)
        finally:
            self._inside = False
        if reduces:
            reduced = (param.sharded_param.grad for param in _params([group]))
            allocated.leave_out(storages_of([grad for grad in reduced if grad is not None]))
            # The buffer of a reduction exists together with the gradients that are copied into it.
            allocated.sample(own if group.reduce_grads else 0)
        return result


def _unreduced(groups: list[Any]) -> list[torch.UntypedStorage]:
    """Return the storages of gradients of gathered parameters."""
    params = [param for param in _params(groups) if hasattr(param, "_unsharded_param")]
    grads = [grad for param in params for grad in (param._unsharded_param.grad, param.unsharded_accumulated_grad)]
    return storages_of([grad for grad in grads if grad is not None])


def _params(groups: list[Any]) -> list[Any]:
    return [param for group in groups for param in group.fsdp_params]


def _groups(module: nn.Module) -> list[Any]:
    """Return FSDP2's groups of parameters, of every unit in the module."""
    units: list[Any] = [unit for unit in module.modules() if hasattr(unit, "_get_fsdp_state")]
    found: list[Any] = []
    for state in (unit._get_fsdp_state() for unit in units):
        several = getattr(state, "_fsdp_param_groups", None)  # since torch 2.13
        found += [state._fsdp_param_group] if several is None else several
    return list({id(group): group for group in found if group is not None}.values())
