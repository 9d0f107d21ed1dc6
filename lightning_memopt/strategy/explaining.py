"""What torch's errors about sharded weights mean, told where they arise."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

_MIXED = "got mixed torch.Tensor and DTensor"


class ExplainingStrategy(ModelParallelStrategy):
    """ModelParallelStrategy that explains why a weight was not gathered."""

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with explained(self.model):
            return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with explained(self.model):
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with explained(self.model):
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with explained(self.model):
            return super().predict_step(*args, **kwargs)


@contextmanager
def explained(model: nn.Module | None) -> Generator[None, None, None]:
    """Add to the error of a weight that is used while it is sharded what gathers it."""
    try:
        yield
    except RuntimeError as error:
        if model is not None and _MIXED in str(error):
            units = ", ".join(repr(name) for name in outermost_units(model))
            error.add_note(
                f"The weights of {type(model).__name__} are sharded, and only gathered while the `forward` of a unit "
                f"runs; its outermost units are {units}. Call these instead of their submodules or weights, or let "
                "another method gather too: torch.distributed.fsdp.register_fsdp_forward_method(unit, 'method') in "
                "`on_fit_start`."
            )
        raise


def outermost_units(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Yield the names of the sharded modules that no other one holds."""
    for name, child in model.named_children():
        if isinstance(child, FSDPModule):
            yield prefix + name
        else:
            yield from outermost_units(child, f"{prefix}{name}.")
