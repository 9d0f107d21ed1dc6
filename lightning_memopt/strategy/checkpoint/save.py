"""Save a checkpoint as a directory that all ranks write to, or as one file that the first rank writes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from typing_extensions import override

from lightning_memopt.optim.groups import NAMES, plain_group
from lightning_memopt.strategy.agreement import describe, on_all, on_first, rank_and_size
from lightning_memopt.strategy.checkpoint.io import AtomicCheckpointIO, in_background, innermost, save_with_checksums
from lightning_memopt.strategy.checkpoint.states import by_name, gathered, names_of
from lightning_memopt.strategy.files import atomic
from lightning_memopt.strategy.files.checksums import Checksum
from lightning_memopt.strategy.files.destinations import Destination, destination
from lightning_memopt.strategy.files.directory import CHECKSUMS, check_replaceable
from lightning_memopt.strategy.files.places import place_of

WEIGHTS, STATES = "state_dict", "optimizer_states"
# The weights that train, if Lightning's averaging callbacks save the average, and how far that has come.
CURRENT, AVERAGING_STATE = "current_model_state", "averaging_state"
K = TypeVar("K")


def model_state(model: nn.Module, *, whole: bool, group: Any = None) -> dict[str, Any]:
    """Return the weights by name: local parts on each rank, or full weights on the first rank and none on the others.

    Args:
        model: The LightningModule.
        whole: Whether to gather the weights.
        group: The process group; None for all ranks.
    """
    state = get_model_state_dict(model)
    return _gather(state, rank_and_size(group)[0] == 0) if whole else state


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, whole: bool, group: Any = None
) -> dict[str, Any]:
    """Return the optimizer's state: each rank's local part by name, or a single-device state dict on the first rank.

    Args:
        optimizer: The optimizer itself, not Lightning's wrapper.
        model: The LightningModule.
        whole: Whether to gather the state. Ranks other than the first get an empty dict.
        group: The process group; None for all ranks.

    Raises:
        ValueError: If a parameter is not in the model.
    """
    if not whole:
        return by_name(optimizer, model)
    state = optimizer.state_dict()
    keep = rank_and_size(group)[0] == 0
    # All ranks must gather in the same order.
    entries = {(index, key): value for index in sorted(state["state"]) for key, value in state["state"][index].items()}
    states: dict[Any, dict[str, Any]] = {index: {} for index in sorted(state["state"])} if keep else {}
    for (index, key), value in _gather(entries, keep).items():
        states[index][key] = value
    groups = [_gather(plain_group(group), keep) for group in state["param_groups"]]
    # An optimizer of this package may have received other names. On a single device, state is matched by these.
    names = state.get(NAMES) or names_of(optimizer, model)
    return {"state": states, "param_groups": groups, NAMES: names} if keep else {}


def save_checkpoint(
    checkpoint: dict[str, Any], path: Any, checkpoint_io: Any, *, distributed: bool, storage_options: Any = None
) -> None:
    """Save a checkpoint as a directory or as one file.

    Args:
        checkpoint: Lightning's checkpoint, sharded for a directory, and complete on the first rank for a file.
        path: The same path on all ranks.
        checkpoint_io: Lightning's CheckpointIO, which writes files.
        distributed: Whether to save a directory.
        storage_options: Must be None.

    Raises:
        TypeError: If there are storage options.
        OSError: As for :func:`save_directory` and :func:`save_file`.
    """
    if storage_options is not None:
        raise TypeError(
            "`save_checkpoint(..., storage_options=...)` is not supported: pass them to a custom `CheckpointIO` plugin."
        )
    if distributed:
        if in_background(checkpoint_io) is not None:
            rank_zero_warn(
                "AsyncCheckpointIO has no effect on checkpoint directories, which all ranks write before training goes "
                "on: set `save_distributed_checkpoint=False` to save one file in the background."
            )
        save_directory(checkpoint, path)
    else:
        save_file(checkpoint, path, checkpoint_io)


def save_directory(checkpoint: Mapping[str, Any], path: str | Path, *, group: Any = None) -> None:
    """Save a checkpoint as a directory, and replace an existing checkpoint of this name.

    The layout is that of Lightning's ModelParallelStrategy: torch's distributed checkpoint with ``state_dict`` and
    ``optimizer_0``, ..., and everything else in ``meta.pt``.

    Args:
        checkpoint: Lightning's checkpoint, with sharded ``state_dict`` and ``optimizer_states`` by name.
        path: The directory, on a file system that all ranks share, or a URL that fsspec knows.
        group: The process group; None for all ranks.

    Raises:
        IsADirectoryError: If the path is a directory that holds something else.
        FileExistsError: If the URL is a file.
        OSError: If any rank cannot write. An existing checkpoint is unchanged then.
    """
    state = {key: checkpoint[key] for key in (WEIGHTS, CURRENT) if key in checkpoint}
    state |= {f"optimizer_{number}": entries for number, entries in enumerate(checkpoint.get(STATES, [])) if entries}
    rest = {key: value for key, value in checkpoint.items() if key not in (WEIGHTS, CURRENT, STATES)}

    to = destination(place_of(path))
    on_first(to.check_replaceable, group)
    new = None
    try:
        new = on_first(to.begin, group)
        parts = on_all(lambda: _write_shards(state, to, new, group), group)
        sums = {name: entry for part in parts for name, entry in part.items()}
        on_first(lambda: _finish(rest, to, new, sums), group)
    except (Exception, CheckpointException) as error:
        raise OSError(
            f"Saving {str(path)!r} failed: {describe(error)}. Any existing checkpoint of this name is unchanged."
        ) from error
    finally:
        if new is not None and rank_and_size(group)[0] == 0:
            to.abandon(new)


def save_file(checkpoint: dict[str, Any], path: Any, checkpoint_io: Any, *, group: Any = None) -> None:
    """Save a checkpoint as one file, written by the first rank.

    Args:
        checkpoint: Lightning's checkpoint, complete on the first rank.
        path: The file, or any path that the CheckpointIO accepts.
        checkpoint_io: Lightning's CheckpointIO.
        group: The process group; None for all ranks.

    Raises:
        IsADirectoryError: If the path is a directory that holds something else.
        OSError: If the first rank cannot write. With AtomicCheckpointIO, an existing checkpoint is unchanged then.
    """
    place = place_of(path)

    def write() -> None:
        if isinstance(place, Path):
            check_replaceable(place)
            if not isinstance(innermost(checkpoint_io), AtomicCheckpointIO) and place.is_dir():
                atomic.discard(place)  # a distributed checkpoint; a CheckpointIO expects a file
        checkpoint_io.save_checkpoint(checkpoint, path)

    on_first(write, group)


def _write_shards(state: dict[str, Any], to: Destination, new: Any, group: Any) -> dict[str, Checksum]:
    """Write this rank's files and return their checksums."""
    _, size = rank_and_size(group)
    writer, sums = to.writer(new)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(state, storage_writer=writer, planner=FirstRankPlanner(), process_group=group, no_dist=size == 1)
    return sums


def _finish(rest: dict[str, Any], to: Destination, new: Any, sums: dict[str, Checksum]) -> None:
    missing = [name for name in sums if not to.has(new, name)]
    if missing:
        raise OSError(
            f"{missing[0]!r} of another rank is missing: all ranks must save to a file system that they share"
        )
    to.commit(new, {**rest, CHECKSUMS: sums}, save_with_checksums)


def _gather(entries: Mapping[K, Any], keep: bool) -> dict[K, Any]:
    whole = gathered(list(entries.values()), keep)
    return dict(zip(entries, whole, strict=True)) if keep else {}


class FirstRankPlanner(DefaultSavePlanner):
    """Writes plain tensors from the first rank, and every shard from one of the ranks that hold it.

    The default planner writes each tensor from the rank with the least to write. If plain tensors differ between ranks,
    as running statistics do, the checkpoint mixes the ranks' values. (``dedup_save_to_lowest_rank`` avoids this, but
    the first replica then writes all shards of a replicated model.)
    """

    @override
    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        if self.is_coordinator:
            return plan
        self.plan = replace(plan, items=[item for item in plan.items if item.type == WriteItemType.SHARD])
        return self.plan
