"""Replaces parameters of an optimizer by others that hold the same weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer

from lightning_memopt.optim.binding import Binding, params_of
from lightning_memopt.optim.checkpoint.saved_state import relocated


def rebind(optimizer: Optimizer, binding: Binding, params: Mapping[Tensor, Tensor]) -> None:
    """Replace parameters; see :meth:`MemOpt.rebind`."""
    binding.build_missing(optimizer)
    table = {old: params.get(old, old) for old in params_of(optimizer)}
    for old, new in table.items():
        if old.shape != new.shape:
            raise ValueError(
                f"{binding.names.get(old, 'A parameter')!r} has shape {tuple(old.shape)}, but its replacement has "
                f"shape {tuple(new.shape)}: rebind needs replacements that hold the same weights."
            )
    if len(set(table.values())) < len(table):
        raise ValueError("Two parameters have the same replacement: rebind needs a different one for each.")
    blocks = {new: tuple(block.moved(new) for block in binding.blocks.get(old, ())) for old, new in table.items()}
    names = {table.get(param, param): name for param, name in binding.names.items()}
    states = {
        table[param]: relocated(blocks[table[param]], state) if blocks[table[param]] else state
        for param, state in optimizer.state.items()
        if param in table
    }
    plans = {table.get(param, param): plan for param, plan in binding.plans.items()}
    kept = {param: entries for param, entries in blocks.items() if entries}
    for own, entries in ((binding.names, names), (binding.plans, plans), (binding.blocks, kept)):
        own.clear()
        own.update(entries)  # type: ignore[arg-type]
    for group in optimizer.param_groups:
        group["params"] = [table[param] for param in group["params"]]
    optimizer.state.clear()
    optimizer.state.update(states)
