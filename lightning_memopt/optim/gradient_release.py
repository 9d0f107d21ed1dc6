"""Gradient release: units of a model are updated in the backward pass, and their gradients freed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_memopt.sharding.consensus import world_size
from lightning_memopt.sharding.tensors import is_dtensor
from lightning_memopt.sharding.wrapping import parameters_by_unit


class GradientRelease:
    """Updates every unit as soon as all of its gradients are complete.

    A unit is a module to which ``fully_shard`` was applied, or a layer: an element of a model's outermost list of equal
    modules. A parameter outside of them is a unit of its own. What has no gradient in a backward pass, or belongs to a
    unit with such a parameter, is left to ``optimizer.step()``.
    """

    def __init__(self, units: Sequence[Sequence[Tensor]], update: Callable[[Sequence[Tensor]], None]) -> None:
        """Register a hook on every parameter.

        Args:
            units: The parameters of every unit.
            update: Updates parameters that have a gradient.
        """
        self._units, self._update = units, update
        self._missing: list[set[Tensor]] = []
        self._seen: set[Tensor] = set()
        self._handles = [
            param.register_post_accumulate_grad_hook(partial(self._arrived, number))
            for number, unit in enumerate(units)
            for param in unit
        ]
        self.start_over()

    def start_over(self) -> None:
        """Expect the gradients of the next backward pass."""
        self._seen.clear()
        self._missing = [set(unit) for unit in self._units]

    @property
    def active(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    def remove(self) -> None:
        """Leave all updates to ``optimizer.step()`` again."""
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def _arrived(self, number: int, param: Tensor) -> None:
        if param in self._seen:
            self.start_over()
            raise RuntimeError(
                "A second backward pass reached a parameter whose gradient was released in the first: with "
                "`release_gradients`, call `optimizer.step()` after every backward pass. To add up gradients of "
                "several passes, train without it."
            )
        self._seen.add(param)
        missing = self._missing[number]
        missing.discard(param)
        if missing:
            return
        try:
            self._update(self._units[number])
        except Exception:
            self.start_over()
            raise
        for each in self._units[number]:
            each.grad = None


def units_of(model: nn.Module, mine: set[Tensor]) -> list[list[Tensor]]:
    """Return the units of a model, without parameters that do not train or are not ``mine``.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If there are several processes and nothing is sharded: another wrapper would average gradients after
            they were released. Also if the model has no such parameter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be the module that the optimizer trains, got {type(model).__name__}.")
    alone = world_size() == 1
    units: list[list[Tensor]] = [
        [param for param in unit if param in mine and param.requires_grad and (alone or is_dtensor(param))]
        for unit in parameters_by_unit(model)
    ]
    units = [unit for unit in units if unit]
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
