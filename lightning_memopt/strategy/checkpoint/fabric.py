"""Save and load what Fabric is given, in the format of the Trainer's checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning
from lightning.fabric.utilities.types import _Stateful
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_memopt._registry import listed
from lightning_memopt.strategy.checkpoint.load import load_checkpoint
from lightning_memopt.strategy.checkpoint.save import (
    AVERAGING_STATE,
    CURRENT,
    STATES,
    WEIGHTS,
    model_state,
    optimizer_state,
    save_checkpoint,
)

SCHEDULERS, VERSION = "lr_schedulers", "pytorch-lightning_version"


@dataclass(frozen=True)
class _Contents:
    """The objects in a state of Fabric, by kind, with their keys and in their order.

    Attributes:
        model: The module that was set up, with its key.
        optimizers: The optimizers. A checkpoint stores them in order, without keys.
        schedulers: The learning rate schedulers, likewise.
        others: Everything else: objects with a ``state_dict``, and values.
    """

    model: tuple[str, nn.Module]
    optimizers: dict[str, Optimizer]
    schedulers: dict[str, LRScheduler]
    others: dict[str, Any]

    @staticmethod
    def of(state: Mapping[str, Any], modules: Collection[nn.Module]) -> _Contents:
        """Sort a state out.

        Args:
            state: What Fabric was given, unwrapped.
            modules: The modules that were set up.

        Raises:
            ValueError: If there is not exactly one of these modules, or if a key is needed for something else.
        """
        models = {key: value for key, value in state.items() if isinstance(value, nn.Module) and value in modules}
        if len(models) != 1:
            found = f"has {listed([repr(key) for key in models], 3)}" if models else "has none"
            raise ValueError(
                f"A checkpoint holds one module that was set up with this Fabric, and the state {found}: pass "
                "{'model': model, ...}, and save other models under names of their own."
            )
        optimizers = {key: value for key, value in state.items() if isinstance(value, Optimizer)}
        schedulers = {key: value for key, value in state.items() if isinstance(value, LRScheduler)}
        known = {*models, *optimizers, *schedulers}
        others = {key: value for key, value in state.items() if key not in known}
        taken = [key for key in (WEIGHTS, CURRENT, STATES) if key in others]
        if taken:
            raise ValueError(
                f"The key {taken[0]!r} of the state is where a checkpoint holds the module or its optimizers: give the "
                f"{type(others[taken[0]]).__name__} another key."
            )
        return _Contents(next(iter(models.items())), optimizers, schedulers, others)


def save_state(
    state: Mapping[str, Any],
    path: Any,
    modules: Collection[nn.Module],
    checkpoint_io: Any,
    *,
    filters: Mapping[str, Callable[[str, Any], bool]],
    distributed: bool,
    storage_options: Any = None,
) -> None:
    """Save a state so that a Trainer can continue with it, too.

    Args:
        state: Key → object, unwrapped.
        path: The same path on all ranks.
        modules: The modules that were set up.
        checkpoint_io: Lightning's CheckpointIO, which writes single files.
        filters: Key → whether to keep an entry of the object's state, given its name and value.
        distributed: Whether to save a directory or one file.
        storage_options: Refused, as by the Trainer's strategy.

    Raises:
        ValueError: If the state does not hold exactly one module that was set up.
        TypeError: If there are storage options, or a filter for something without entries.
        OSError: If any rank cannot write. An existing checkpoint is unchanged then.
    """
    contents = _Contents.of(state, modules)
    key, model = contents.model
    checkpoint: dict[str, Any] = {VERSION: lightning.__version__, SCHEDULERS: []}
    for name, value in contents.others.items():
        checkpoint[name] = _kept(name, value.state_dict() if isinstance(value, _Stateful) else value, filters)
    checkpoint[WEIGHTS] = _kept(key, model_state(model, whole=not distributed), filters)
    if contents.optimizers:
        checkpoint[STATES] = [
            _kept(name, optimizer_state(optimizer, model, whole=not distributed), filters)
            for name, optimizer in contents.optimizers.items()
        ]
    if contents.schedulers:
        states = ((name, scheduler.state_dict()) for name, scheduler in contents.schedulers.items())
        checkpoint[SCHEDULERS] = [_kept(name, value, filters) for name, value in states]
    save_checkpoint(checkpoint, path, checkpoint_io, distributed=distributed, storage_options=storage_options)


def load_state(
    state: Any,
    path: Any,
    modules: Collection[nn.Module],
    checkpoint_io: Any,
    *,
    strict: bool,
    weights_only: bool | None,
    verify: bool,
) -> dict[str, Any]:
    """Load a checkpoint of Fabric or of a Trainer into a state, and return what the state does not ask for.

    Args:
        state: Key → object, unwrapped; values are replaced in it. Or a module, which takes the weights of any
            checkpoint, and of a file that holds nothing else.
        path: The same path on all ranks.
        modules: The modules that were set up.
        checkpoint_io: Lightning's CheckpointIO, which reads single files.
        strict: Whether the checkpoint must have everything that the state asks for.
        weights_only: As in ``torch.load``.
        verify: Whether to compare checksums.

    Raises:
        ValueError: If the state is empty or has not exactly one module that was set up, or as in ``load_checkpoint``.
        KeyError: If something is missing under ``strict``.
        NotImplementedError: If the state is an optimizer alone.
    """
    options: dict[str, Any] = {"strict": strict, "weights_only": weights_only, "verify": verify}
    if isinstance(state, Optimizer):
        raise NotImplementedError(
            f"{type(state).__name__} cannot be loaded alone, because its parameters have names only in a model: use "
            "`fabric.load(path, {'model': model, 'optimizer': optimizer})`."
        )
    if not state:
        raise ValueError(
            f"`fabric.load` needs a state with the module to load into, got {state!r}: pass {{'model': model, ...}}. "
            "`lightning_memopt.load_weights(path)` returns the weights of a checkpoint."
        )
    if isinstance(state, nn.Module):
        _load(path, state, None, checkpoint_io, bare=True, **options)
        return {}
    contents = _Contents.of(state, modules)

    @contextmanager
    def checked(rest: Mapping[str, Any]) -> Iterator[None]:
        if strict:
            _require(rest, contents, path)
        yield

    optimizers = [*contents.optimizers.values()] or None
    rest = _load(path, contents.model[1], optimizers, checkpoint_io, adapting=checked, **options)
    if contents.schedulers:
        for scheduler, value in zip(contents.schedulers.values(), rest.pop(SCHEDULERS, []), strict=strict):
            scheduler.load_state_dict(value)
    _give(rest, contents.others, state)
    # Of an average that the module has taken and goes on from; passed on, a Trainer would take them for its average's.
    return {key: value for key, value in rest.items() if key not in (CURRENT, AVERAGING_STATE)}


def _load(path: Any, *args: Any, **options: Any) -> dict[str, Any]:
    try:
        return load_checkpoint(path, *args, **options)
    except RuntimeError as error:
        error.add_note("With Fabric, `strict=False` loads only the weights whose names match.")
        raise


def _require(rest: Mapping[str, Any], contents: _Contents, path: Any) -> None:
    """Refuse a checkpoint that lacks something, before anything is loaded."""
    missing = [key for key in contents.others if key not in rest]
    if missing:
        raise KeyError(
            f"The checkpoint {str(path)!r} has no {listed([repr(key) for key in missing], 3)}: leave it out of the "
            "state, or pass `strict=False`."
        )
    saved, given = len(rest.get(SCHEDULERS, [])), len(contents.schedulers)
    if given and saved != given:
        raise ValueError(
            f"The checkpoint {str(path)!r} has the states of {saved} learning rate schedulers, and the state has "
            f"{given}: pass those of the run that saved it, none, or `strict=False`."
        )


def _give(rest: dict[str, Any], others: Mapping[str, Any], state: MutableMapping[str, Any]) -> None:
    """Move what the state asks for from the checkpoint to the state."""
    for key, value in others.items():
        if key not in rest:
            continue
        if isinstance(value, _Stateful):
            value.load_state_dict(rest.pop(key))
        else:
            state[key] = rest.pop(key)


def _kept(key: str, value: Any, filters: Mapping[str, Callable[[str, Any], bool]]) -> Any:
    if key not in filters:
        return value
    if not isinstance(value, dict):
        raise TypeError(
            f"The filter for {key!r} needs an object whose state is a dict, got {type(value).__name__}: leave the "
            "filter out."
        )
    return {name: entry for name, entry in value.items() if filters[key](name, entry)}
