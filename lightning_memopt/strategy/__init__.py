"""The strategy ``memopt_fsdp``: FSDP2 for modules that do not shard themselves. Needs Lightning."""

from lightning_memopt.strategy.checkpoint.load import load_weights
from lightning_memopt.strategy.fabric import MemOptFabricStrategy
from lightning_memopt.strategy.strategy import MemOptFSDPStrategy
from lightning_memopt.strategy.unsharded import full_state_dict, grad_norm

__all__ = ["MemOptFSDPStrategy", "MemOptFabricStrategy", "full_state_dict", "grad_norm", "load_weights"]
