"""Load a checkpoint directory or file on any number of ranks. Everything is checked before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from lightning_memopt.optim.checkpoint.resume import loading_from
from lightning_memopt.strategy.agreement import on_all, rank_and_size
from lightning_memopt.strategy.checkpoint.compatibility import Optimizers, check_counts, check_family, check_weights
from lightning_memopt.strategy.checkpoint.io import reads_plainly
from lightning_memopt.strategy.checkpoint.load_directory import load_directory, read_objects
from lightning_memopt.strategy.checkpoint.restore import (
    Adapting,
    check_values,
    parts_of,
    prepare_optimizer,
    write_weights,
)
from lightning_memopt.strategy.checkpoint.save import STATES, WEIGHTS
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

    Raises:
        ValueError: If the checkpoint is missing, incomplete or damaged, or if its optimizers or groups do not match.
        RuntimeError: If weights are missing or unexpected under ``strict``, or if shapes differ.
        KeyError: If there are optimizers, but the checkpoint has no optimizer states.
        pickle.UnpicklingError: If a file contains objects that are not allowed.
    """
    place = place_of(path)
    if not is_web(place) and (reads_plainly(checkpoint_io) or is_directory(place)):
        opening = partial(open_checkpoint, place, weights_only=weights_only, verify=verify)
        with closing(open_together(place, opening, group)) as opened:
            if isinstance(opened, OpenedDirectory):
                return load_directory(opened, model, optimizers, strict, weights_only, group, adapting)
            checkpoint = _read_on_all(lambda: opened.read(weights_only=weights_only, verify=verify), group)
            return _load_whole(checkpoint, model, optimizers, strict, path, group, adapting)
    options = {} if weights_only is None else {"weights_only": weights_only}
    checkpoint = _read_on_all(lambda: checkpoint_io.load_checkpoint(path, **options), group)
    return _load_whole(checkpoint, model, optimizers, strict, path, group, adapting)


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


def _load_whole(
    checkpoint: Any,
    model: nn.Module,
    optimizers: Optimizers | None,
    strict: bool,
    path: Any,
    group: Any,
    adapting: Adapting,
) -> dict[str, Any]:
    share, trained = rank_and_size(group), optimizers or ()
    ours: dict[str, Any] = get_model_state_dict(model)
    restore: list[Callable[[], None]] = []
    weights, states = parts_of(checkpoint, WEIGHTS, STATES)
    rest = {key: value for key, value in checkpoint.items() if key not in (WEIGHTS, STATES)}

    def check() -> None:
        check_counts(states, optimizers)
        check_weights(weights, ours, strict, fitting=bool(trained))
        ordered = [by_position(state, opt, model) for state, opt in zip(states, trained, strict=False)]
        for (state, _), optimizer in zip(ordered, trained, strict=False):
            check_family(state, optimizer)
        for (state, named), optimizer in zip(ordered, trained, strict=False):
            restore.append(prepare_optimizer(state, optimizer, model, share, named=named, whole=True))
        check_values(weights, ours, model, share, path)

    with adapting(rest):
        on_all(check, group)
    with loading_from(repr(str(path))):
        for load_optimizer in restore:
            load_optimizer()
    write_weights(weights, ours, model)
    return rest
