"""Gradient release: units of a model are updated in the backward pass, and their gradients freed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from lightning_memopt.sharding.consensus import world_size
from lightning_memopt.sharding.tensors import is_dtensor, local_tensor
from lightning_memopt.sharding.wrapping import parameters_by_unit


class GradientRelease:
    """Updates every unit as soon as all of its gradients are complete.

    A unit is a module to which ``fully_shard`` was applied, or a layer: an element of a model's outermost list of equal
    modules. A parameter outside of them is a unit of its own. What has no gradient in a backward pass, or belongs to a
    unit with such a parameter, is left to ``optimizer.step()``. So are errors: an exception in the backward pass would
    leave FSDP2 half way. After one, the pass frees gradients and updates nothing.

    Attributes:
        active: Whether gradients are released.
        peak_bytes: The most bytes of gradients that existed at a time so far, on this rank.
    """

    def __init__(self, units: Sequence[Sequence[Tensor]], update: Callable[[Sequence[Tensor]], None]) -> None:
        """Register a hook on every parameter that trains.

        Args:
            units: The parameters of every unit.
            update: The method of the optimizer that updates parameters. The hooks do not keep the optimizer alive.
        """
        self._units, self._update = units, WeakMethod(update)
        self._handles: dict[Tensor, Any] = {}
        self._missing: list[set[Tensor]] = []
        self._seen: set[Tensor] = set()
        self._error: Exception | None = None
        self.active, self.peak_bytes, self._held = True, 0, 0
        self.start_over()

    def start_over(self) -> None:
        """Expect the gradients of the next backward pass, of all parameters that train now."""
        if not self.active:
            return
        self._seen.clear()
        self._held = 0
        self._missing = [{param for param in unit if param.requires_grad} for unit in self._units]
        for number, missing in enumerate(self._missing):
            for param in missing - self._handles.keys():
                self._handles[param] = param.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def end_step(self) -> None:
        """Raise what went wrong in the backward pass, or expect the next one.

        Raises:
            Exception: As the update of a layer raised it.
        """
        self.start_over()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def remove(self) -> None:
        """Leave all updates to ``optimizer.step()`` again."""
        self.active = False
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._units, self._missing, self._error = {}, (), [], None
        self._seen.clear()

    def holds(self, param: Tensor) -> bool:
        """Return whether a living optimizer releases the gradient of a parameter here."""
        return param in self._handles and self._update() is not None

    @torch.no_grad()
    def _arrived(self, number: int, param: Tensor) -> None:
        update = self._update()
        if update is None:  # the optimizer is gone
            self.remove()
            return
        if param in self._seen and self._error is None:
            self._error = RuntimeError(
                "A second backward pass reached a parameter whose gradient was released in the first: with "
                "`release_gradients`, call `optimizer.step()` after every backward pass (or `zero_grad()`, if it "
                "failed). To add up gradients of several passes, train without it. Reentrant activation checkpointing "
                "counts as a pass of its own: use `use_reentrant=False`. The second pass has updated nothing."
            )
        if param not in self._seen:
            self._held += _nbytes(param)
            self.peak_bytes = max(self.peak_bytes, self._held)
        self._seen.add(param)
        missing = self._missing[number]
        missing.discard(param)
        if self._error is not None:
            self._held -= _nbytes(param)
            param.grad = None
        elif not missing:
            try:
                update(self._units[number])
            except Exception as error:  # of any type: it is raised in the step
                self._error = error
            for each in self._units[number]:
                self._held -= _nbytes(each)
                each.grad = None


def _nbytes(param: Tensor) -> int:
    return 0 if param.grad is None else local_tensor(param.grad).nbytes


def units_of(model: nn.Module, mine: set[Tensor]) -> list[list[Tensor]]:
    """Return the units of a model, without parameters that are not ``mine``.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If there are several processes and nothing is sharded: another wrapper would average gradients after
            they were released. Also if no parameter of the model is the optimizer's, or if another optimizer releases
            its gradient.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be the module that the optimizer trains, got {type(model).__name__}.")
    alone = world_size() == 1
    units: list[list[Tensor]] = [
        [param for param in unit if param in mine and (alone or is_dtensor(param))]
        for unit in parameters_by_unit(model)
    ]
    units = [unit for unit in units if unit]
    if any(_is_released(param) for unit in units for param in unit):
        raise ValueError(
            "Another optimizer releases gradients of these parameters: call `remove()` of the handle that its "
            "`release_gradients` returned."
        )
    if units:
        return units
    if not alone and mine & set(model.parameters()):
        raise ValueError(
            f"`release_gradients` on {world_size()} processes needs sharded parameters, and {type(model).__name__} has "
            "none that train: gradients would be released before they are averaged. Apply `fully_shard` first, or "
            "train without `release_gradients`."
        )
    raise ValueError(
        f"No parameter of {type(model).__name__} trains with this optimizer: pass the module that it was created for."
    )


def _is_released(param: Tensor) -> bool:
    hooks = (getattr(param, "_post_accumulate_grad_hooks", None) or {}).values()
    owners = [getattr(getattr(hook, "func", None), "__self__", None) for hook in hooks]
    return any(isinstance(owner, GradientRelease) and owner.holds(param) for owner in owners)
