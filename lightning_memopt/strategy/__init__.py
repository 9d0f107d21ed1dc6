"""The strategy ``memopt_fsdp``: FSDP2 for LightningModules that do not shard themselves. Needs Lightning."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_memopt.strategy.checkpoint.load import load_weights
from lightning_memopt.strategy.strategy import MemOptFSDPStrategy
from lightning_memopt.strategy.unsharded import full_state_dict, grad_norm

__all__ = ["MemOptFSDPStrategy", "full_state_dict", "grad_norm", "load_weights", "register"]


def register() -> None:
    """Make the strategy known to Lightning by its names. A second call changes nothing."""
    for name, options in (("memopt_fsdp", {}), ("memopt_fsdp_offload", {"cpu_offload": True})):
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, MemOptFSDPStrategy, description=MemOptFSDPStrategy.__doc__, **options)
