"""Whether a saved optimizer state is one that an optimizer can go on from, told before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import optim

from lightning_memopt.optimizer import MemOpt

_ADAM = frozenset(("step", "exp_avg", "exp_avg_sq"))
# What torch's own optimizers read without asking whether it is there.
_NEEDED: dict[type[optim.Optimizer], frozenset[str]] = {
    optim.Adam: _ADAM,  # AdamW is a subclass
    optim.NAdam: _ADAM | {"mu_product"},
    optim.RAdam: _ADAM,
    optim.Adamax: frozenset(("step", "exp_avg", "exp_inf")),
    optim.RMSprop: frozenset(("step", "square_avg")),
    optim.Adagrad: frozenset(("step", "sum")),
    optim.Adadelta: frozenset(("step", "square_avg", "acc_delta")),
    optim.Rprop: frozenset(("step", "prev", "step_size")),
    optim.ASGD: frozenset(("step", "eta", "mu", "ax")),
}


def check_family(saved: Mapping[str, Any], optimizer: optim.Optimizer) -> None:
    """Refuse the state of another kind of optimizer, which would fail in the first step.

    Args:
        saved: A state dict; only its keys and recipes matter.
        optimizer: The optimizer that is to load it.

    Raises:
        ValueError: If groups or states lack what the optimizer reads. Nothing has changed then.
    """
    recipes = dict.fromkeys(group["recipe"] for group in saved["param_groups"] if "recipe" in group)
    lacks = _memopt_lacks(saved) if isinstance(optimizer, MemOpt) else _torch_lacks(saved, optimizer)
    if isinstance(optimizer, MemOpt) and recipes:
        return  # it compares recipes and keys itself
    compressed = [recipe for recipe in recipes if recipe != "adamw"]
    if not lacks and not compressed:
        return
    by = f"recipe {' and '.join(map(repr, recipes))}" if recipes else f"an optimizer with {_described(saved)}"
    reason = f"which lacks {', '.join(map(repr, lacks))}" if lacks else "whose state is compressed"
    raise ValueError(
        f"The optimizer {type(optimizer).__name__} cannot go on from this checkpoint: its optimizer state was saved by "
        f"{by}, {reason}. Nothing was loaded. Use the optimizer of the run that saved it, or start anew from its "
        "weights: load them in the LightningModule, and leave out `ckpt_path`."
    )


def _torch_lacks(saved: Mapping[str, Any], optimizer: optim.Optimizer) -> list[str]:
    """Return the keys of groups, then those of states, that the optimizer reads and does not find."""
    groups = [{**group, "params": []} for group in saved["param_groups"]]
    probe = object.__new__(type(optimizer))
    vars(probe).update({**vars(optimizer), "defaults": dict(optimizer.defaults)})
    probe.__setstate__({"state": {}, "param_groups": groups})  # fills in what older versions have not saved
    needed = frozenset[str]().union(*(keys for kind, keys in _NEEDED.items() if isinstance(optimizer, kind)))
    missing = [key for key in optimizer.defaults if any(key not in group for group in groups)]
    return missing or sorted({key for entry in saved["state"].values() if entry for key in needed - entry.keys()})


def _memopt_lacks(saved: Mapping[str, Any]) -> list[str]:
    """Return the keys of torch's AdamW, from which every recipe can go on, that are not there."""
    missing = [key for key in ("betas", "eps") if any(key not in group for group in saved["param_groups"])]
    return missing or sorted({key for entry in saved["state"].values() if entry for key in _ADAM - entry.keys()})


def _described(saved: Mapping[str, Any]) -> str:
    keys = dict.fromkeys(key for group in saved["param_groups"] for key in group if key != "params")
    return f"the hyperparameters {', '.join(keys)}"
