"""Load a checkpoint directory or file on any number of ranks. Everything is checked before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lightning_memopt.optim.checkpoint.resume import loading_from
from lightning_memopt.strategy.agreement import on_all, rank_and_size
from lightning_memopt.strategy.checkpoint.compatibility import Optimizers, check_counts, check_family, check_weights
from lightning_memopt.strategy.checkpoint.io import in_background, reads_plainly, wait
from lightning_memopt.strategy.checkpoint.load_directory import load_directory, read_objects
from lightning_memopt.strategy.checkpoint.restore import (
    Adapting,
    check_values,
    parts_of,
    prepare_optimizer,
    targets_of,
    write_weights,
)
from lightning_memopt.strategy.checkpoint.save import CURRENT, STATES, WEIGHTS
from lightning_memopt.strategy.checkpoint.states import by_position
from lightning_memopt.strategy.files.opened_directory import OpenedDirectory
from lightning_memopt.strategy.files.opened_file import OpenedFile
from lightning_memopt.strategy.files.opening import is_directory, open_checkpoint
from lightning_memopt.strategy.files.places import is_web, place_of
from lightning_memopt.strategy.files.same_save import open_alone, open_together

T = TypeVar("T")


def load_checkpoint(
    path: Any,
    model: nn.Module,
    optimizers: Optimizers | None,
    checkpoint_io: Any,
    *,
    strict: bool = True,
    weights_only: bool | None = None,
    verify: bool = True,
    group: Any = None,
    adapting: Adapting = nullcontext,
    bare: bool = False,
    averaged: nn.Module | None = None,
) -> dict[str, Any]:
    """Load weights and optimizer states and return the rest of the checkpoint.

    Args:
        path: A directory or a file, or its URL.
        model: The LightningModule, sharded or not.
        optimizers: Its optimizers; None loads the weights only.
        checkpoint_io: Lightning's CheckpointIO, which reads files.
        strict: Whether the model and the checkpoint must have the same names.
        weights_only: As in ``torch.load``.
        verify: Whether to read everything once before it is used, to compare checksums.
        group: The process group; None for all ranks.
        adapting: A context manager that takes the rest of the checkpoint. It prepares the optimizers for their
            states, and undoes this if the states do not fit.
        bare: Whether a file may hold the weights and nothing else.
        averaged: A module for averaged weights, if the checkpoint has both these and the weights that train.

    Raises:
        ValueError: If the checkpoint is missing, incomplete or damaged, or if its optimizers or groups do not match.
        RuntimeError: If weights are missing or unexpected under ``strict``, or if shapes differ.
        KeyError: If there are optimizers, but the checkpoint has no optimizer states.
        pickle.UnpicklingError: If a file contains objects that are not allowed.
    """
    place = place_of(path)
    if in_background(checkpoint_io) is not None:
        on_all(lambda: wait(checkpoint_io), group)  # the checkpoint may be the one that the first rank still writes
    if not is_web(place) and (reads_plainly(checkpoint_io) or is_directory(place)):
        opening = partial(open_checkpoint, place, weights_only=weights_only, verify=verify)
        with closing(open_together(place, opening, group)) as opened:
            if isinstance(opened, OpenedDirectory):
                return load_directory(opened, model, averaged, optimizers, strict, weights_only, group, adapting)
            checkpoint = _read_on_all(lambda: opened.read(weights_only=weights_only, verify=verify), group)
            checkpoint = _filed(checkpoint) if bare else checkpoint
            return _load_whole(checkpoint, model, averaged, optimizers, strict, path, group, adapting)
    options = {} if weights_only is None else {"weights_only": weights_only}
    checkpoint = _read_on_all(lambda: checkpoint_io.load_checkpoint(path, **options), group)
    checkpoint = _filed(checkpoint) if bare else checkpoint
    return _load_whole(checkpoint, model, averaged, optimizers, strict, path, group, adapting)


def load_weights(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Return the full weights of a checkpoint of either format on the CPU, without a model or a Trainer.

    Args:
        path: A directory or a file that the Trainer saved, or its URL.
        verify: As in ``MemOptFSDPStrategy``.

    Returns:
        Name → tensor, as in the LightningModule's ``state_dict()``.

    Raises:
        ValueError: If the checkpoint is missing, incomplete or damaged.
        pickle.UnpicklingError: If a file contains objects that are not allowed.
    """
    place = place_of(path)
    with closing(open_alone(place, partial(open_checkpoint, place, verify=verify))) as opened:
        if isinstance(opened, OpenedFile):
            return dict(parts_of(opened.read(verify=verify), WEIGHTS, STATES)[0])
        opened.check((0, 1))
        places = opened.index.planner_data.items()
        tensors = {place[1]: opened.whole(key) for key, place in places if place[0] == WEIGHTS and len(place) == 2}
        return tensors | read_objects(opened, WEIGHTS)


def _read_on_all(read: Callable[[], T], group: Any) -> T:
    """Read on every rank and return this rank's result, which is not sent to other ranks."""
    mine: list[T] = []
    on_all(lambda: mine.append(read()), group)
    return mine[0]


# ---------------------------------------------------------------------- one file with whole tensors


def _filed(content: Any) -> Any:
    """Return bare weights as a checkpoint, and a checkpoint as it is."""
    return {WEIGHTS: content} if isinstance(content, Mapping) and WEIGHTS not in content else content


def _load_whole(
    checkpoint: Any,
    model: nn.Module,
    averaged: nn.Module | None,
    optimizers: Optimizers | None,
    strict: bool,
    path: Any,
    group: Any,
    adapting: Adapting,
) -> dict[str, Any]:
    share, trained = rank_and_size(group), optimizers or ()
    restore: list[Callable[[], None]] = []
    weights, states = parts_of(checkpoint, WEIGHTS, STATES)
    targets = targets_of(weights, checkpoint.get(CURRENT), model, averaged)
    rest = {key: value for key, value in checkpoint.items() if key not in (*targets, WEIGHTS, STATES)}

    def check() -> None:
        check_counts(states, optimizers)
        for target in targets.values():
            check_weights(target.saved, target.expected, strict, fitting=bool(trained))
        ordered = [by_position(state, opt, model) for state, opt in zip(states, trained, strict=False)]
        for (state, _), optimizer in zip(ordered, trained, strict=False):
            check_family(state, optimizer)
        for (state, named), optimizer in zip(ordered, trained, strict=False):
            restore.append(prepare_optimizer(state, optimizer, model, share, named=named, whole=True))
        for target in targets.values():
            check_values(target.saved, target.ours, target.module, share, path)

    with adapting(rest):
        on_all(check, group)
    with loading_from(repr(str(path))):
        for load_optimizer in restore:
            load_optimizer()
    for target in targets.values():
        write_weights(target.saved, target.ours, target.module)
    return rest
