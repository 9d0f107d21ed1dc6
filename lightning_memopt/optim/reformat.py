"""Changes kinds or ranks of blocks between two steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memopt._registry import unknown
from lightning_memopt.optim.binding import Binding
from lightning_memopt.optim.block import Block
from lightning_memopt.optim.bounds import Watch
from lightning_memopt.optim.conversion import converted, require_squares
from lightning_memopt.optim.release import DROPPED, release
from lightning_memopt.plans.hints import unknown_block
from lightning_memopt.plans.plan import applies
from lightning_memopt.plans.recipe import located
from lightning_memopt.sharding.consensus import decided_alike

# Group, parameter, the current block, and the new block.
Change = tuple[dict[str, Any], Tensor, Block, Block]


@torch.no_grad()
def reformat(optimizer: Optimizer, binding: Binding, changes: Mapping[str, Any], dropped: str) -> None:
    """Change kinds or ranks of blocks; see :meth:`MemOpt.reformat`."""
    binding.require_names(optimizer)
    watch = Watch()
    for group, param, old, new in _agreed(optimizer, binding, changes, dropped):
        state = optimizer.state.get(param, {})
        if state:
            nothing_to_release = dropped == "discard" or float(state["step"]) == 0
            on_loss = None if nothing_to_release else release(old, new, param, state, group, watch)
            fresh = converted(old, new, state, keep=True, on_loss=on_loss, group=group, betas=group["betas"])
            for kind in old.kinds:
                for key in kind.keys:
                    del state[old.prefix + key]
            state.update(fresh)
        binding.reformatted[old.name] = new.recipe
        binding.blocks[param] = tuple(new if entry is old else entry for entry in binding.blocks[param])
    watch.require_finite()


def _agreed(optimizer: Optimizer, binding: Binding, changes: Mapping[str, Any], dropped: str) -> list[Change]:
    """Return the changes after all ranks that share parameters agree on them, or raise on all ranks."""
    layouts = [block.layout for blocks in binding.blocks.values() for block in blocks]
    groups = {id(group): (group, layout.device) for layout in layouts for group in layout.mesh_groups()}
    return decided_alike(
        "what to reformat",
        lambda: _planned(optimizer, binding, changes, dropped),
        lambda planned: [
            *(f"{new.name}: {new.recipe.momentum}, {new.recipe.second_moment}" for *_, new in planned),
            f"dropped={dropped}",
        ],
        [group for group, _ in groups.values()],
        next((device for _, device in groups.values()), torch.device("cpu")),
    )


def _planned(optimizer: Optimizer, binding: Binding, changes: Mapping[str, Any], dropped: str) -> list[Change]:
    """Check and return the changes."""
    if dropped not in DROPPED:
        raise ValueError(unknown("value of `dropped`", dropped, list(DROPPED)))
    if not isinstance(changes, Mapping):
        raise TypeError(
            f"`changes` must map blocks, roles or patterns to changes, as {{'query': {{'rank': 8}}}}, got {changes!r}."
        )
    places = {block.name: (group, param, block) for group, param, block in binding.entries(optimizer)}
    planned = []
    for name, change in by_block((block for *_, block in places.values()), changes).items():
        group, param, old = places[name]
        with located(f"the change of {name!r}"):
            new = old.changed(change)
        for old_kind, new_kind in zip(old.kinds, new.kinds, strict=True):
            if not old_kind.restorable and not new_kind.keeps_state_of(old_kind, old.layout):
                other = "another rank" if new_kind.name == old_kind.name else repr(new_kind.name)
                raise ValueError(
                    f"The block {name!r} has kind {old_kind.name!r}, which keeps no state that {other} could continue "
                    "from; create a new optimizer instead."
                )
        require_squares(old, new)
        new.check()
        if new.recipe != old.recipe:
            planned.append((group, param, old, new))
    return planned


def by_block(blocks: Iterable[Block], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the change of every block that changes of blocks, roles or patterns cover; later ones win.

    Raises:
        ValueError: If a change covers no block.
    """
    known = {block.name: block for block in blocks}
    wanted: dict[str, Any] = {}
    for key, change in changes.items():
        names = [key] if key in known else [name for name, block in known.items() if _applies(key, block)]
        if not names:
            raise ValueError(unknown_block(key, list(known)))
        wanted.update(dict.fromkeys(names, change))
    return wanted


def _applies(key: str, block: Block) -> bool:
    """Return whether a role or pattern covers a block. Patterns leave vectors alone: most kinds are undefined there."""
    return applies(key, block.name, block.role) and (key == "vector" or not block.layout.vector)
