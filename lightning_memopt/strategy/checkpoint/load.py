"""Loading a checkpoint, directory or file, on any number of ranks: all is checked before anything changes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import Metadata, load
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from lightning_memopt.optim.resuming import loading_from, notify
from lightning_memopt.strategy.agreement import describe, on_all, rank_and_size
from lightning_memopt.strategy.checkpoint.compatibility import check_family
from lightning_memopt.strategy.checkpoint.io import is_local, reads_plainly
from lightning_memopt.strategy.checkpoint.restore import (
    check_values,
    parts_of,
    prepare_optimizer,
    same_sort,
    write_weights,
)
from lightning_memopt.strategy.checkpoint.save import STATES, WEIGHTS
from lightning_memopt.strategy.checkpoint.states import allocated, by_position
from lightning_memopt.strategy.files import atomic
from lightning_memopt.strategy.files.opened_directory import OpenedDirectory, open_alone, open_together
from lightning_memopt.strategy.files.opened_file import OpenedFile
from lightning_memopt.strategy.files.reader import CheckedLoadPlanner, OpenedReader

Optimizers = Sequence[torch.optim.Optimizer]
T = TypeVar("T")
Adapting = Callable[[dict[str, Any]], AbstractContextManager[Any]]


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
        path: A directory or a file.
        model: The LightningModule, sharded or not.
        optimizers: Its optimizers; None loads the weights only.
        checkpoint_io: Lightning's CheckpointIO, which reads files.
        strict: Whether the model and the checkpoint must have the same names.
        weights_only: As for ``torch.load``.
        verify: Whether to read everything once before it is used, to compare checksums.
        group: The process group; None for all ranks.
        adapting: Given the rest of the checkpoint, prepares the optimizers for their states, and undoes that if these
            turn out not to fit.

    Raises:
        ValueError: If there is no complete and undamaged checkpoint, or its optimizers or their groups are others.
        RuntimeError: If names of weights are missing or too many under ``strict``, or shapes differ.
        KeyError: If there are optimizers, but no states in the checkpoint.
        pickle.UnpicklingError: If a file asks for objects that are not allowed.
    """
    if is_local(path) and (atomic.current(Path(path)).is_dir() or reads_plainly(checkpoint_io)):
        with closing(open_together(Path(path), lambda: _open(Path(path), weights_only, verify), group)) as opened:
            if isinstance(opened, OpenedDirectory):
                return _load_directory(opened, model, optimizers, strict, weights_only, group, adapting)
            checkpoint = _read_on_all(lambda: opened.read(weights_only=weights_only, verify=verify), group)
            return _load_whole(checkpoint, model, optimizers, strict, path, group, adapting)
    options = {} if weights_only is None else {"weights_only": weights_only}
    checkpoint = _read_on_all(lambda: checkpoint_io.load_checkpoint(path, **options), group)
    return _load_whole(checkpoint, model, optimizers, strict, path, group, adapting)


def load_weights(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Return the weights in a checkpoint of either format, whole and on the CPU, without a model or a Trainer.

    Args:
        path: A directory or a file that the Trainer has saved.
        verify: As in ``MemOptFSDPStrategy``.

    Returns:
        Name → tensor, as ``state_dict()`` of the LightningModule.

    Raises:
        ValueError: If there is no complete and undamaged checkpoint.
        pickle.UnpicklingError: If a file asks for objects that are not allowed.
    """
    path = Path(path)
    with closing(open_alone(path, lambda: _open(path, None, verify))) as opened:
        if isinstance(opened, OpenedFile):
            return dict(opened.read(verify=verify)[WEIGHTS])
        opened.check((0, 1))
        places = opened.index.planner_data.items()
        tensors = {place[1]: opened.whole(key) for key, place in places if place[0] == WEIGHTS and len(place) == 2}
        return tensors | _read_objects(opened, WEIGHTS)


def _open(path: Path, weights_only: bool | None, verify: bool) -> OpenedDirectory | OpenedFile:
    place = atomic.current(path)
    if place.is_dir():
        return OpenedDirectory(path, weights_only=weights_only, verify=verify)
    if not place.is_file():
        raise ValueError(
            f"The path {str(path)!r} does not point to a valid checkpoint: there is no file or directory of that name "
            f"(working directory: {Path.cwd()})."
        )
    return OpenedFile(path)


def _read_on_all(read: Callable[[], T], group: Any) -> T:
    """Read on every rank; the content stays where it was read."""
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
        _check_counts(states, optimizers)
        _check_weights(weights, ours, strict, fitting=bool(trained))
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


# ---------------------------------------------------------------------- a directory with the parts of all ranks


def _load_directory(
    opened: OpenedDirectory,
    model: nn.Module,
    optimizers: Optimizers | None,
    strict: bool,
    weights_only: bool | None,
    group: Any,
    adapting: Adapting,
) -> dict[str, Any]:
    share, index, trained = rank_and_size(group), opened.index, optimizers or ()
    on_all(lambda: opened.check(share), group)
    saved = _saved_optimizers(index)
    _check_counts(list(saved.values()), optimizers)
    ours: dict[str, Any] = get_model_state_dict(model)
    # Extra state that is nested has several entries, which its place in the state dict holds together.
    shapes = {place[1]: _template(index, key) for key, place in index.planner_data.items() if place[0] == WEIGHTS}
    _check_weights(shapes, ours, strict, fitting=bool(trained))
    if trained:
        _read_groups(opened, saved)
    restore: list[Callable[[], None]] = []
    # Everything is read and checked before anything is written, so weights are there twice for a while: as much memory
    # as gradients take in training.
    with adapting(opened.rest):
        ready = [
            _read_optimizer(opened, name, tree, optimizer, model, weights_only, group)
            for (name, tree), optimizer in zip(saved.items(), trained, strict=False)
        ]
        weights = {
            name: torch.empty_like(value)
            for name, value in ours.items()
            if isinstance(value, Tensor) and name in shapes
        }
        _read(opened, {WEIGHTS: weights}, weights_only, group)
        weights |= _read_objects(opened, WEIGHTS)

        def check() -> None:
            for (state, named), optimizer in zip(ready, trained, strict=False):
                restore.append(prepare_optimizer(state, optimizer, model, share, named=named, whole=False))
            check_values(weights, ours, model, share, opened.path)

        on_all(check, group)
    with loading_from(repr(str(opened.path))):
        for load_optimizer in restore:
            load_optimizer()
    write_weights(weights, ours, model)
    return opened.rest


def _read_objects(opened: OpenedDirectory, part: str) -> dict[str, Any]:
    """Return what is no tensor of a part of the state dict, such as the extra state of modules: whole on every rank."""
    found: dict[str, Any] = {}
    for key, place in opened.index.planner_data.items():
        if place[0] == part and (len(place) > 2 or _template(opened.index, key) is None):
            set_element(found, place, opened.whole(key))
    return found.get(part, {})


def _read_groups(opened: OpenedDirectory, trees: dict[str, dict[str, Any]]) -> None:
    """Fill in the hyperparameters, which are few and needed whole on every rank."""
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
    """Return the saved state of one optimizer, by position, each rank's part, and whether names decided the order."""
    state, named = by_position(tree, optimizer, model)
    check_family(state, optimizer)
    fresh = allocated(state, optimizer)
    # The same dicts of one parameter's state, under the names of the checkpoint.
    entries = dict(zip(tree["state"], (fresh["state"][index] for index in state["state"]), strict=True))
    _read(opened, {name: {"state": entries}}, weights_only, group)
    return fresh, named


def _saved_optimizers(index: Metadata) -> dict[str, dict[str, Any]]:
    """Return the trees of all saved optimizer states, in order: meta tensors for tensors, None for the rest."""
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


def _template(index: Metadata, key: str) -> Tensor | None:
    """Return what a weight looks like; None for extra state that is no tensor."""
    entry = index.state_dict_metadata[key]
    if not isinstance(entry, TensorStorageMetadata) or len(index.planner_data[key]) > 2:
        return None
    return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")


def _read(opened: OpenedDirectory, state: dict[str, Any], weights_only: bool | None, group: Any) -> None:
    """Read into the tensors of ``state``, and replace what is no tensor; every rank reads its part.

    Raises:
        ValueError: If a file cannot be read on any rank.
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


# ---------------------------------------------------------------------- whether it fits


def _check_counts(saved: Sequence[Mapping[str, Any]], optimizers: Optimizers | None) -> None:
    """Refuse optimizer states that are not of these optimizers; warn if there are states and nothing to train.

    Raises:
        KeyError: If there are none at all.
        ValueError: If there are more or fewer.
    """
    if optimizers is not None and not optimizers and saved:
        notify(
            f"The checkpoint has the states of {len(saved)} optimizers, but `configure_optimizers` returned None: they "
            "are not loaded, and the next checkpoint will not have them."
        )
    if optimizers and not saved:
        raise KeyError(
            "Trying to restore optimizer state but checkpoint contains only the model. This is probably due to "
            "`ModelCheckpoint.save_weights_only` being set to `True`; to start training from these weights, load them "
            "in the LightningModule."
        )
    if optimizers and len(saved) != len(optimizers):
        raise ValueError(
            f"The checkpoint has the states of {len(saved)} optimizers, but `configure_optimizers` returns "
            f"{len(optimizers)}: return those of the run that saved it."
        )


def _check_weights(saved: Mapping[str, Any], ours: Mapping[str, Any], strict: bool, *, fitting: bool) -> None:
    """Refuse weights of other names, shapes or sorts of numbers, told by tensors whose values do not matter."""
    problems = []
    if strict:
        problems += [f"missing in the checkpoint: {name!r}" for name in ours if name not in saved]
        problems += [f"not in the model: {name!r}" for name in saved if name not in ours]
    for name, value in ours.items():
        if name not in saved:
            continue
        there, here = (tuple(entry.shape) if isinstance(entry, Tensor) else None for entry in (saved[name], value))
        if there != here:
            problems.append(f"{name!r} has shape {there} in the checkpoint and {here} in the model")
        elif isinstance(value, Tensor) and not same_sort(saved[name].dtype, value.dtype):
            problems.append(f"{name!r} has dtype {saved[name].dtype} in the checkpoint and {value.dtype} in the model")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        way_out = (
            "Training goes on only with the model of the run that saved it; `strict_loading = False` helps `validate`, "
            "`test` and `predict`. To start training from these weights, load them in the LightningModule and leave "
            "out `ckpt_path`."
            if fitting
            else "To load what has the same name, set `strict_loading = False` on the LightningModule; shapes must be "
            "the same."
        )
        raise RuntimeError(
            f"The checkpoint does not fit the model: {'; '.join(problems[:5])}{more}. Nothing was loaded. {way_out}"
        )
