"""Matches saved state to parameters: by name, or by position if there are no names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_memopt.optim.checkpoint.resume import notify
from lightning_memopt.optim.groups import NAMES

Names = Sequence[Sequence[str]]
_WAY_OUT = f" If only names have changed, rename them in {NAMES!r} of the saved optimizer state."


def saved_names(state_dict: Mapping[str, Any]) -> list[list[str]] | None:
    """Return the names of the parameters in every saved group, or None if some are missing.

    This package saves them beside the groups, under ``param_names``. torch's distributed checkpoints save them in place
    of positions, and torch's optimizers save them in the groups, under ``param_names``.

    Raises:
        ValueError: If the numbers of names and parameters differ, or a name occurs twice.
    """
    groups = state_dict["param_groups"]
    names: Any = state_dict.get(NAMES)
    if names is not None and not _are_names(names):
        raise ValueError(
            f"The state dict has no lists of names under {NAMES!r}: remove it to load the state by position."
        )
    if names is None:
        names = [group["params"] for group in groups]
        if not _are_names(names):
            names = [group.get(NAMES) or [] if group["params"] else [] for group in groups]
        if sum(map(len, names)) == 0 or not _are_names(names):
            return None
    counts, expected = [len(group) for group in names], [len(group["params"]) for group in groups]
    flat = [name for group in names for name in group]
    if counts != expected or len(set(flat)) != len(flat):
        raise ValueError(
            f"The state dict has {expected} parameters in its groups and {counts} names, {len(set(flat))} of them "
            f"distinct: remove {NAMES!r} from it to load it by position."
        )
    return [list(group) for group in names]


def places(saved: Names, ours: Names, what: str, optimizer: str = "the optimizer") -> list[tuple[int, list[int]]]:
    """Return, for each of our groups, the matching saved group and the positions of our parameters in it.

    Groups match if they have the same parameters, in any order. One side may have an extra prefix before all names,
    such as ``model.`` for the parameters of a LightningModule.

    Args:
        saved: The names in every saved group.
        ours: The names in every group of the optimizer.
        what: What was saved, for errors: ``state dict`` or ``checkpoint``.
        optimizer: The name of the optimizer in errors.

    Raises:
        ValueError: If groups or names differ. The message names the first parameter.
    """
    # A whole checkpoint also holds weights, whose names have been compared already, so renaming is no way out.
    way_out = _WAY_OUT if what == "state dict" else ""
    prefix = _prefix(saved, ours)
    if prefix is not None:
        ours = [[prefix + name for name in group] for group in ours]
    else:
        prefix = _prefix(ours, saved) or ""
        saved = [[prefix + name for name in group] for group in saved]
    if len(saved) != len(ours):
        raise ValueError(
            f"The {what} has {len(saved)} parameter groups, {optimizer} {len(ours)}: it was saved for another model, "
            "or with other groups. Groups that were added later (`add_param_group`) must exist before it is loaded: "
            "add them in `configure_optimizers` or `on_fit_start`."
        )
    where = {name: (group, place) for group, names in enumerate(saved) for place, name in enumerate(names)}
    mine = {name for names in ours for name in names}
    extra, missing = [name for name in where if name not in mine], [name for name in mine if name not in where]
    if extra:
        raise ValueError(
            f"The {what} has optimizer state for {extra[0]!r}, which {optimizer} does not train: create model and "
            f"optimizer as in the run that saved it.{way_out}"
        )
    if missing:
        raise ValueError(
            f"The {what} has no optimizer state for {sorted(missing)[0]!r}, which {optimizer} trains: create model "
            f"and optimizer as in the run that saved it.{way_out}"
        )
    found = []
    for number, names in enumerate(ours):
        group = where[names[0]][0] if names else number
        odd = sorted(set(names) ^ set(saved[group]))
        if odd:
            raise ValueError(
                f"Parameter group {number} of {optimizer} and that of the {what} differ in {odd[0]!r}: "
                "create the optimizer with the groups of the run that saved it."
            )
        found.append((group, [where[name][1] for name in names]))
    return found


def arranged(state_dict: Mapping[str, Any], found: Sequence[tuple[int, Sequence[int]]]) -> dict[str, Any]:
    """Return a state dict with groups and parameters in the order that :func:`places` found."""
    groups = []
    for number, order in found:
        group = state_dict["param_groups"][number]
        groups.append({**group, "params": [group["params"][place] for place in order]})
    return {"state": state_dict["state"], "param_groups": groups}


def warn_of_positions(state_dict: Mapping[str, Any]) -> None:
    """Warn that state was assigned by position because names are missing, if that can go wrong."""
    if state_dict["state"] and sum(len(group["params"]) for group in state_dict["param_groups"]) > 1:
        who = "saved optimizer state" if saved_names(state_dict) is None else "optimizer"
        notify(
            f"The {who} has no parameter names, so state was assigned by position. If the optimizer lists its "
            "parameters in a different order than the saved one, parameters of equal shape now have each other's "
            "state. Create the optimizer from named parameters and save again: new files contain names."
        )


def _are_names(entries: Any) -> bool:
    return isinstance(entries, list | tuple) and all(
        isinstance(group, list | tuple) and all(isinstance(entry, str) for entry in group) for group in entries
    )


def _prefix(longer: Names, shorter: Names) -> str | None:
    """Return the prefix that turns the names of ``shorter`` into those of ``longer``, or None if there is none.

    Never remove prefixes from both sides: an encoder's state would fit a decoder of the same structure.
    """
    long, short = ({name for group in names for name in group} for names in (longer, shorter))
    if not long or len(long) != len(short):
        return None
    if long == short:
        return ""
    last = min(short)
    candidates = {name.removesuffix(last) for name in long if name.endswith(f".{last}")}
    return next((prefix for prefix in sorted(candidates) if {prefix + name for name in short} == long), None)
