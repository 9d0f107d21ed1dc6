"""Load a checkpoint directory: every rank reads its part, and nothing changes before all parts are checked."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import Metadata, load
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_memopt.optim.checkpoint.resume import loading_from
from lightning_memopt.strategy.agreement import describe, on_all, rank_and_size
from lightning_memopt.strategy.checkpoint.compatibility import Optimizers, check_counts, check_family, check_weights
from lightning_memopt.strategy.checkpoint.restore import (
    Adapting,
    check_values,
    prepare_optimizer,
    targets_of,
    write_weights,
)
from lightning_memopt.strategy.checkpoint.save import CURRENT, WEIGHTS
from lightning_memopt.strategy.checkpoint.states import allocated, by_position
from lightning_memopt.strategy.files.opened_directory import OpenedDirectory
from lightning_memopt.strategy.files.reader import CheckedLoadPlanner, OpenedReader


def load_directory(
    opened: OpenedDirectory,
    model: nn.Module,
    averaged: nn.Module | None,
    optimizers: Optimizers | None,
    strict: bool,
    weights_only: bool | None,
    group: Any,
    adapting: Adapting,
) -> dict[str, Any]:
    """Load from an open directory; arguments and errors as for ``load_checkpoint``."""
    share, index, trained = rank_and_size(group), opened.index, optimizers or ()
    on_all(lambda: opened.check(share), group)
    saved = _saved_optimizers(index)
    check_counts(list(saved.values()), optimizers)
    targets = targets_of(_templates(index, WEIGHTS), _templates(index, CURRENT), model, averaged)
    for target in targets.values():
        check_weights(target.saved, target.expected, strict, fitting=bool(trained))
    if trained:
        on_all(lambda: _read_groups(opened, saved), group)
    restore: list[Callable[[], None]] = []
    # Everything is read and checked before anything is written. So weights exist twice for a while, which takes as
    # much memory as gradients do in training.
    with adapting(opened.rest):
        ready = [
            _read_optimizer(opened, name, tree, optimizer, model, weights_only, group)
            for (name, tree), optimizer in zip(saved.items(), trained, strict=False)
        ]
        weights = {
            part: {
                name: torch.empty_like(value)
                for name, value in target.ours.items()
                if isinstance(value, Tensor) and name in target.saved
            }
            for part, target in targets.items()
        }
        _read(opened, weights, weights_only, group)

        def check() -> None:
            for part, found in weights.items():
                found |= read_objects(opened, part)
            for (state, named), optimizer in zip(ready, trained, strict=False):
                restore.append(prepare_optimizer(state, optimizer, model, share, named=named, whole=False))
            for part, target in targets.items():
                check_values(weights[part], target.ours, target.module, share, opened.path)

        on_all(check, group)
    with loading_from(repr(str(opened.path))):
        for load_optimizer in restore:
            load_optimizer()
    for part, target in targets.items():
        write_weights(weights[part], target.ours, target.module)
    return opened.rest


def read_objects(opened: OpenedDirectory, part: str) -> dict[str, Any]:
    """Return the non-tensor entries of a part of the state dict, such as extra state of modules, on every rank."""
    found: dict[str, Any] = {}
    for key, place in opened.index.planner_data.items():
        if place[0] == part and (len(place) > 2 or _template(opened.index, key) is None):
            set_element(found, place, opened.whole(key))
    return found.get(part, {})


def _read_groups(opened: OpenedDirectory, trees: dict[str, dict[str, Any]]) -> None:
    """Fill in the hyperparameters, which every rank needs."""
    for key, place in opened.index.planner_data.items():
        if place[0] in trees and place[1] == "param_groups":
            set_element(trees, place, opened.whole(key))


def _read_optimizer(
    opened: OpenedDirectory,
    name: str,
    tree: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    weights_only: bool | None,
    group: Any,
) -> tuple[dict[str, Any], bool]:
    """Return this rank's part of one optimizer's saved state, by position, and whether names decided the order."""
    state, named = by_position(tree, optimizer, model)
    check_family(state, optimizer)
    fresh = allocated(state, optimizer)
    # The same dicts of each parameter's state, under the names in the checkpoint.
    entries = dict(zip(tree["state"], (fresh["state"][index] for index in state["state"]), strict=True))
    _read(opened, {name: {"state": entries}}, weights_only, group)
    return fresh, named


def _saved_optimizers(index: Metadata) -> dict[str, dict[str, Any]]:
    """Return all saved optimizer states in order, with meta tensors for tensors and None for other entries."""
    trees: dict[str, dict[str, Any]] = {}
    for key, place in index.planner_data.items():
        if not re.fullmatch(r"optimizer_\d+", str(place[0])):
            continue
        entry, leaf = index.state_dict_metadata[key], None
        if isinstance(entry, TensorStorageMetadata):
            leaf = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        set_element(trees, place, leaf)
    ordered = sorted(trees, key=lambda name: int(name.removeprefix("optimizer_")))
    return {name: {"state": {}, "param_groups": [], **trees[name]} for name in ordered}


def _templates(index: Metadata, part: str) -> dict[str, Tensor | None]:
    """Return tensors with the shapes and dtypes of weights; None for extra state, whose entries share one key."""
    return {place[1]: _template(index, key) for key, place in index.planner_data.items() if place[0] == part}


def _template(index: Metadata, key: str) -> Tensor | None:
    """Return a tensor with the shape and dtype of a weight; None for extra state that is not a tensor."""
    entry = index.state_dict_metadata[key]
    if not isinstance(entry, TensorStorageMetadata) or len(index.planner_data[key]) > 2:
        return None
    return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")


def _read(opened: OpenedDirectory, state: dict[str, Any], weights_only: bool | None, group: Any) -> None:
    """Read this rank's part into the tensors of ``state``, and replace its non-tensor entries.

    Raises:
        ValueError: If any rank cannot read a file.
    """

    def read() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(
                state,
                storage_reader=OpenedReader(opened),
                planner=CheckedLoadPlanner(weights_only),
                process_group=group,
                no_dist=rank_and_size(group)[1] == 1,
            )

    try:
        on_all(read, group)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"Loading {str(opened.path)!r} failed: {describe(error)}.") from error
