"""The content of a checkpoint without a model: weights by name, optimizer states as on a single device, the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_memopt.optim.groups import NAMES
from lightning_memopt.strategy.checkpoint.restore import parts_of
from lightning_memopt.strategy.checkpoint.save import CURRENT, STATES, WEIGHTS
from lightning_memopt.strategy.files.opened_directory import OpenedDirectory
from lightning_memopt.strategy.files.opened_file import OpenedFile
from lightning_memopt.strategy.files.opening import open_checkpoint
from lightning_memopt.strategy.files.places import place_of
from lightning_memopt.strategy.files.same_save import open_alone

_OPTIMIZER = "optimizer_"


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        weights: Name → tensor, and extra state of modules.
        optimizers: A state dict per optimizer, as a single device saves it.
        rest: Everything else: counters, loops, callbacks, schedulers, hyperparameters, and the weights that train
            where the others are averaged.
    """

    weights: dict[str, Any]
    optimizers: list[dict[str, Any]]
    rest: dict[str, Any]

    def checkpoint(self) -> dict[str, Any]:
        """Return what a Trainer on a single device saves as one file."""
        return {**self.rest, WEIGHTS: self.weights, STATES: self.optimizers}


@contextmanager
def opened(path: str | Path, *, verify: bool) -> Generator[OpenedDirectory | OpenedFile, None, None]:
    """Open a checkpoint on this process, and compare its checksums if ``verify``.

    Raises:
        ValueError: If it is missing, incomplete or damaged.
        pickle.UnpicklingError: If a file contains objects that are not allowed.
    """
    place = place_of(path)
    with closing(open_alone(place, partial(open_checkpoint, place, verify=verify))) as found:
        if isinstance(found, OpenedDirectory):
            found.check((0, 1))
        yield found


def contents(found: OpenedDirectory | OpenedFile, *, verify: bool) -> Contents:
    """Return everything in an open checkpoint, on the CPU.

    Raises:
        ValueError: If it is damaged, or is not a checkpoint.
        TypeError: As above.
        pickle.UnpicklingError: If it contains objects that are not allowed.
    """
    return _in_file(found, verify) if isinstance(found, OpenedFile) else _in_directory(found, found.whole)


def outline(found: OpenedDirectory | OpenedFile, *, verify: bool) -> Contents:
    """Return the same without reading tensors of more than one number: they are on the meta device, or mapped files.

    Raises:
        ValueError: As for :func:`contents`.
        TypeError: As for :func:`contents`.
        pickle.UnpicklingError: As for :func:`contents`.
    """
    if isinstance(found, OpenedFile):
        return _in_file(found, verify)

    def template(key: str) -> Any:
        entry = found.index.state_dict_metadata[key]
        if not isinstance(entry, TensorStorageMetadata) or entry.size.numel() == 1:
            return found.whole(key)  # a learning rate may be a tensor
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    return _in_directory(found, template)


def _in_file(found: OpenedFile, verify: bool) -> Contents:
    checkpoint = found.read(verify=verify)
    weights, states = parts_of(checkpoint, WEIGHTS, STATES)
    rest = {key: value for key, value in checkpoint.items() if key not in (WEIGHTS, STATES)}
    return Contents(dict(weights), [dict(state) for state in states], rest)


def _in_directory(found: OpenedDirectory, value: Callable[[str], Any]) -> Contents:
    trees: dict[str, Any] = {}
    for key, place in found.index.planner_data.items():
        set_element(trees, place, value(key))
    names = [name for name in trees if name.startswith(_OPTIMIZER) and name.removeprefix(_OPTIMIZER).isdecimal()]
    ordered = sorted(names, key=lambda name: int(name.removeprefix(_OPTIMIZER)))
    rest = found.rest if CURRENT not in trees else {**found.rest, CURRENT: trees[CURRENT]}
    return Contents(trees.get(WEIGHTS, {}), [_by_position(trees[name]) for name in ordered], rest)


def _by_position(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return optimizer state by name as a state dict by position, with the names beside the groups.

    Raises:
        ValueError: If there is state of a parameter that no group lists.
    """
    groups = tree.get("param_groups", [])
    names = [list(group.get("params", [])) for group in groups]
    number = {name: position for position, name in enumerate(itertools.chain(*names))}
    unknown = next((name for name in tree.get("state", {}) if name not in number), None)
    if unknown is not None:
        raise ValueError(f"The checkpoint has optimizer state for parameter {unknown!r}, which no group lists.")
    return {
        "state": {number[name]: entries for name, entries in tree.get("state", {}).items()},
        "param_groups": [
            {**group, "params": [number[name] for name in own]} for group, own in zip(groups, names, strict=True)
        ],
        NAMES: names,
    }
