"""What torch's errors about sharded weights mean."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule

_MIXED, _FREED = "got mixed torch.Tensor and DTensor", "its data is not allocated yet"


def explain(error: BaseException, model: nn.Module | None) -> None:
    """Add to the error of a weight that is used while it is sharded what gathers it, and to one of gradients."""
    if model is None or not isinstance(error, RuntimeError):
        return
    if _MIXED in str(error):
        units = ", ".join(repr(name) for name in outermost_units(model))
        error.add_note(
            f"The weights of {type(model).__name__} are sharded, and only gathered while the `forward` of a unit runs; "
            f"its outermost units are {units}. Call these instead of their submodules or weights, or let another "
            "method gather too: torch.distributed.fsdp.register_fsdp_forward_method(unit, 'method') in `on_fit_start`. "
            "`lightning_memopt.full_state_dict` gives whole weights."
        )
    elif _FREED in str(error):
        error.add_note(
            "Weights and gradients are sharded: `lightning_memopt.grad_norm(module)` takes the place of Lightning's "
            "`grad_norm`, and `lightning_memopt.full_state_dict(module)` gives whole weights."
        )


def outermost_units(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Yield the names of the sharded modules that no other one holds."""
    for name, child in model.named_children():
        if isinstance(child, FSDPModule):
            yield prefix + name
        else:
            yield from outermost_units(child, f"{prefix}{name}.")
