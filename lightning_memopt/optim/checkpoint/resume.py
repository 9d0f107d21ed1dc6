"""Reports in one line what loading a checkpoint changes in an optimizer."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from lightning_memopt.kinds.momentum import MOMENTA
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS
from lightning_memopt.optim.block import Block, all_layers
from lightning_memopt.optim.groups import NAMES
from lightning_memopt.sharding.consensus import rank

# Not reported: keys that say how to compute, keys that schedulers write, and keys reported elsewhere.
_NOT_REPORTED = {"params", "recipe", NAMES, "capturable", "differentiable", "foreach", "fused", "name", "swa_lr"}
_NOT_REPORTED |= {"lr", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
_MAX_LISTED, _MAX_CALLED = 6, 12
_source: ContextVar[str] = ContextVar("source", default="a state dict")


class ResumeWarning(UserWarning):
    """Warns of what loading an optimizer's state has changed, or could not check."""


@dataclass(frozen=True)
class Facts:
    """Settings of an optimizer, as configured or as loaded from a checkpoint.

    Attributes:
        groups: The hyperparameters of every group.
        scheduled: Whether a scheduler sets the learning rate.
        blocks: Block name → momentum kind, rank, second-moment kind, dtype of the state.
        roles: Block name → role.
    """

    groups: tuple[dict[str, Any], ...]
    scheduled: bool
    blocks: dict[str, tuple[str, int | None, str, str]]
    roles: dict[str, str]


def facts(groups: Iterable[Mapping[str, Any]], blocks: Iterable[Block] = ()) -> Facts:
    """Return the facts about an optimizer in its current state."""
    groups, blocks = list(groups), list(blocks)
    return Facts(
        tuple(_hyperparameters(group) for group in groups),
        any("initial_lr" in group for group in groups),
        {
            block.name: (
                block.recipe.momentum.name,
                getattr(block.recipe.momentum, "rank", None),
                block.recipe.second_moment.name,
                str(block.layout.state_dtype).removeprefix("torch."),
            )
            for block in blocks
        },
        {block.name: block.role for block in blocks},
    )


@contextmanager
def loading_from(source: str) -> Iterator[None]:
    """Let messages name the source of the state that is loaded in the body."""
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


def tell(optimizer: str, before: Facts, after: Facts, *, step: int, converted: bool = False) -> None:
    """Warn of configured settings that a checkpoint has replaced, if any.

    Args:
        optimizer: The name of the optimizer's class.
        before: The facts before loading.
        after: The facts after loading.
        step: The step from which training continues.
        converted: Whether the state was converted from AdamW's.
    """
    groups, blocks = _group_changes(before, after), _block_changes(before, after)
    if not (groups or blocks or converted):
        return
    made = ", with state converted from AdamW" if converted else ""
    decided = f". Its settings replace the configured ones: {_list([*groups, *blocks])}" if groups or blocks else ""
    calls = [*_group_calls(before, after), *_block_calls(before, after)]
    own = (
        f" To keep yours, call after loading (with a Trainer, in `on_train_start`): {'; '.join(calls)}."
        if calls
        else ""
    )
    if after.scheduled and any(change.startswith("lr ") for change in groups):
        own += " A scheduler sets `lr` again at its next step: set its `base_lrs` as well."
    if fixed := _fixed(before, after):
        own += (
            f" State of {' and '.join(fixed)} fits no other kind or rank: to use yours, create a new optimizer and "
            "load the weights only."
        )
    if any("state in" in change for change in blocks):
        own += " The dtype of state follows the checkpoint."
    notify(f"{optimizer} resumes from step {step} of {_source.get()}{made}{decided}.{own}")


def tell_of_dropped_bits(optimizer: str, dropped: Sequence[tuple[int, int]]) -> None:
    """Warn of extra bits of weights that are not kept: how many bits there were, and are, for each parameter."""
    if dropped:
        theirs, mine = dropped[0]
        notify(
            f"{optimizer} keeps {mine} bits of {len(dropped)} bfloat16 weights, of which {_source.get()} has {theirs}. "
            f"To continue with all of them, set `master_weight_bits={theirs}`, or load the float32 weights that "
            "`full_weights()` returns in the run that saved them."
        )


def tell_of_bits_apart(optimizer: str, dropped: Sequence[tuple[int, int]]) -> None:
    """Warn that bits of saved bfloat16 weights do not reach the weights, which have another dtype now."""
    if dropped:
        theirs = dropped[0][0]
        notify(
            f"{optimizer} does not load the bits of {len(dropped)} weights that {_source.get()} keeps beside them "
            f"({theirs} in all): they were bfloat16 and are not now. A checkpoint's weights have 16 bits; those of "
            "`full_weights()` in the run that saved them, or of `lightning-memopt export --dtype float32`, have all."
        )


def notify(text: str) -> None:
    """Warn on the first process of the job."""
    if rank() == 0:
        warnings.warn(text, ResumeWarning, stacklevel=3)


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    # Compare a scheduled learning rate by its initial value. OneCycleLR also sets the initial value and the first beta.
    values = {} if "max_lr" in group else {"lr": group.get("initial_lr", group.get("lr"))}
    ignored = _NOT_REPORTED | ({"betas", "momentum"} if "max_momentum" in group else set())
    values |= {key: value for key, value in group.items() if key not in ignored}
    return {key: _plain(value) for key, value in values.items()}


def _group_changes(before: Facts, after: Facts) -> list[str]:
    pairs = list(zip(before.groups, after.groups, strict=False))
    changes: dict[str, list[int]] = {}
    for number, (ours, theirs) in enumerate(pairs):
        for key in ours:
            if key in theirs and not _same(ours[key], theirs[key]):
                changes.setdefault(f"{key} {_text(theirs[key])} instead of {_text(ours[key])}", []).append(number)
    return [
        change if len(numbers) == len(pairs) else f"{change} in group {_numbers(numbers)}"
        for change, numbers in changes.items()
    ]


def _block_changes(before: Facts, after: Facts) -> list[str]:
    counts: Counter[str] = Counter()
    for name, ours in before.blocks.items():
        theirs = after.blocks.get(name, ours)
        if ours[0] != theirs[0]:
            counts[f"momentum {theirs[0]} instead of {ours[0]}"] += 1
        elif ours[1] != theirs[1]:
            counts[f"rank {theirs[1]} instead of {ours[1]}"] += 1
        if ours[2] != theirs[2]:
            counts[f"second moment {theirs[2]} instead of {ours[2]}"] += 1
        if ours[3] != theirs[3]:
            counts[f"state in {theirs[3]} instead of {ours[3]}"] += 1
    return [f"{change} in {count} block{'s' * (count > 1)}" for change, count in counts.items()]


def _group_calls(before: Facts, after: Facts) -> list[str]:
    """Return the code that sets the configured hyperparameters again."""
    wanted = [
        {key: ours[key] for key in ours if key in theirs and not _same(ours[key], theirs[key])}
        for ours, theirs in zip(before.groups, after.groups, strict=False)
    ]
    if wanted and wanted[0] and all(change == wanted[0] for change in wanted):
        return [f"`for group in optimizer.param_groups: group.update({wanted[0]})`"]
    return [f"`optimizer.param_groups[{at}].update({change})`" for at, change in enumerate(wanted) if change]


def _block_calls(before: Facts, after: Facts) -> list[str]:
    """Return the code that gives blocks their configured kinds again, by role or for all layers where that says it."""
    wanted: dict[str, dict[str, Any]] = {}
    stuck = _stuck(before, after)
    for name, ours in before.blocks.items():
        theirs = after.blocks.get(name, ours)
        if name in stuck:
            continue
        change: dict[str, Any] = {"momentum": ours[0]} if ours[0] != theirs[0] else {}
        change |= {"rank": ours[1]} if ours[1] is not None and ours[:2] != theirs[:2] else {}
        change |= {"second_moment": ours[2]} if ours[2] != theirs[2] else {}
        if change:
            wanted.setdefault(_widest(name, before, stuck), {}).update(change)
    calls: dict[str, list[str]] = {}
    for key, change in wanted.items():
        calls.setdefault(str(change), []).append(key)
    return [f"`optimizer.reformat({_mapping(keys, change)})`" for change, keys in calls.items()]


def _stuck(before: Facts, after: Facts) -> dict[str, list[str]]:
    """Return the kinds of each block that a checkpoint has brought and that cannot become the configured ones."""
    found = {}
    for name, ours in before.blocks.items():
        theirs = after.blocks.get(name, ours)
        needs_squares = ours[0] != theirs[0] and MOMENTA.get(ours[0]).averages_squares
        kinds = [theirs[0]] * (ours[:2] != theirs[:2] and not MOMENTA.get(theirs[0]).restorable)
        kinds += [theirs[2]] * (
            (ours[2] != theirs[2] or needs_squares) and not SECOND_MOMENTS.get(theirs[2]).restorable
        )
        if kinds:
            found[name] = kinds
    return found


def _fixed(before: Facts, after: Facts) -> list[str]:
    return list(dict.fromkeys(repr(kind) for kinds in _stuck(before, after).values() for kind in kinds))


def _widest(name: str, configured: Facts, stuck: Mapping[str, Any]) -> str:
    """Return the role, the pattern for all layers, or the name: the first that covers blocks of the same kinds only.

    It covers none of those whose state cannot change.
    """
    role, pattern = configured.roles[name], all_layers(name)
    alike = [other for other, its in configured.roles.items() if its == role]
    layers = [other for other in configured.blocks if fnmatchcase(other, pattern)]
    for key, covered in ((role, alike), (pattern, layers)):
        if len({configured.blocks[other][:3] for other in covered}) == 1 and stuck.keys().isdisjoint(covered):
            return key
    return name


def _mapping(keys: Sequence[str], change: str) -> str:
    more = ", ..." if len(keys) > _MAX_CALLED else ""
    names = ", ".join(map(repr, keys[:_MAX_CALLED]))
    return f"{{{names}: {change}}}" if len(keys) == 1 else f"dict.fromkeys([{names}{more}], {change})"


def _same(ours: Any, theirs: Any) -> bool:
    """Return whether two values are equal up to float32 precision, since a tensor may hold the learning rate."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else tuple(value.flatten().tolist())
    return tuple(_plain(entry) for entry in value) if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:_MAX_LISTED])) + (", ..." if len(numbers) > _MAX_LISTED else "")


def _list(entries: Sequence[str]) -> str:
    more = f" and {len(entries) - _MAX_LISTED} more" if len(entries) > _MAX_LISTED else ""
    return ", ".join(entries[:_MAX_LISTED]) + more
