"""Checks of data read from a file, made before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memopt._registry import listed
from lightning_memopt.sharding.tensors import local_tensor

Share = tuple[int, int]


def check_structure(state_dict: Any, what: str = "state dict") -> None:
    """Check that an object has the structure of an optimizer's state dict.

    Raises:
        TypeError: If it, its state or its groups have the wrong type.
        ValueError: If ``state`` or ``param_groups`` is missing.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"The {what} must be a dict with 'state' and 'param_groups', got {described(state_dict)}.")
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if key not in state_dict:
            raise ValueError(
                f"The {what} has no key {key!r}, it has {_few(state_dict)}: pass the result of an optimizer's "
                "`state_dict()`."
            )
        if not isinstance(state_dict[key], kind) or isinstance(state_dict[key], str):
            raise TypeError(f"The {what} has {key!r} of the wrong type: {described(state_dict[key])}.")
    for number, group in enumerate(state_dict["param_groups"]):
        params = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(params, Sequence) or not all(isinstance(index, int | str) for index in params):
            raise TypeError(
                f"Parameter group {number} of the {what} must be a dict with a list under 'params', "
                f"of positions or names, got {described(group)}."
            )
    for index, entries in state_dict["state"].items():
        if not isinstance(entries, Mapping):
            raise TypeError(f"The {what} must have a dict of state for parameter {index!r}, got {described(entries)}.")


def check_step(value: Any, name: str) -> None:
    """Check that a step counter is a valid count.

    Raises:
        ValueError: If it is not a single finite whole number of at least 0.
    """
    tensor = value.detach() if isinstance(value, Tensor) else None
    if tensor is not None and (tensor.numel() != 1 or tensor.is_complex() or tensor.is_meta or tensor.is_sparse):
        raise ValueError(f"The saved state of {name!r} has a 'step' that is {described(value)}, not one number.")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"The saved state of {name!r} has a 'step' that is {described(value)}, not a number."
        ) from None
    if not (number >= 0 and number.is_integer()):
        raise ValueError(
            f"The saved state of {name!r} has 'step' = {number:g}: it must be a whole number of at least 0."
        )


def check_kind(tensor: Tensor, what: str) -> None:
    """Check that the elements of a tensor can be read as numbers.

    Raises:
        ValueError: If it is quantized by torchao, sparse, or on the meta device.
    """
    if type(tensor).__module__.partition(".")[0] == "torchao":  # few operations are defined on these
        raise ValueError(
            f"{what} is quantized ({type(tensor).__name__}) in the checkpoint: convert it with `dequantize()`."
        )
    if tensor.layout is not torch.strided:
        raise ValueError(f"{what} is sparse ({tensor.layout}) in the checkpoint: convert it with `to_dense()`.")
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device in the checkpoint: it has no values.")


class Values:
    """Tensors whose values are checked in one pass each, with one synchronization per device.

    Args:
        share: This process's position, and the number of processes that divide the work. One process checks each
            whole tensor, since all of them have it. Every process checks its own part of a sharded tensor.
    """

    def __init__(self, share: Share = (0, 1)) -> None:
        self._share = share
        self._entries: list[tuple[str, Tensor, bool, bool]] = []

    def add(self, what: str, tensor: Tensor, *, negative: bool = True, infinite: bool = False) -> None:
        """Add a tensor. NaN is never allowed; infinite or negative elements only if the flags allow them."""
        self._entries.append((what, tensor, negative, infinite))

    def check(self) -> None:
        """Check the values.

        Raises:
            ValueError: If a tensor has forbidden elements. The message names the first one.
        """
        rank, size = self._share
        mine = []
        for position, entry in enumerate(self._entries):
            whole = entry[1].detach()
            local = local_tensor(whole)
            if local.numel() and local.is_floating_point() and (local is not whole or position % size == rank):
                mine.append((entry, torch.stack(torch.aminmax(local)).double()))
        by_device: dict[torch.device, list[Tensor]] = {}
        for _, extremes in mine:
            by_device.setdefault(extremes.device, []).append(extremes)
        found = {device: iter(torch.stack(extremes).tolist()) for device, extremes in by_device.items()}
        for (what, _, negative, infinite), extremes in mine:
            low, high = next(found[extremes.device])
            if low != low:
                raise ValueError(_refusal(what, "NaN"))
            if not infinite and (low == -float("inf") or high == float("inf")):
                raise ValueError(_refusal(what, "infinite elements"))
            if not negative and low < 0:
                raise ValueError(_refusal(what, f"negative elements ({low:g}), but is an average of squares"))


def state_of(name: Any, key: str) -> str:
    """Return the name that messages use for a saved state tensor."""
    return f"The saved optimizer state {key!r} of {name!r}"


def _refusal(what: str, has: str) -> str:
    return f"{what} contains {has}: the run diverged, or the file is damaged. Resume from an earlier checkpoint."


def described(value: Any) -> str:
    """Describe a value of the wrong type briefly, without printing a model's numbers."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, Mapping):
        return f"a dict with {_few(value)}"
    if isinstance(value, list | tuple | set):
        return f"{type(value).__name__} of {len(value)}"
    return f"{type(value).__name__}: {' '.join(repr(value).split()):.60}"


def _few(keys: Iterable[Any]) -> str:
    return listed([repr(key) for key in keys]) or "nothing"
