"""Refuse models and callbacks that do not support sharding, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.fabric.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch import Callback, accelerators, callbacks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parameter import is_lazy

from lightning_memopt.sharding.wrapping import Unit

_ACCELERATORS = (CPUAccelerator, CUDAAccelerator, accelerators.CPUAccelerator, accelerators.CUDAAccelerator)


def refuse_accelerator(accelerator: object, strategy: str) -> None:
    """Refuse accelerators on which sharding is not supported.

    Args:
        accelerator: The accelerator of a Trainer or of Fabric.
        strategy: The name of the strategy.

    Raises:
        ValueError: If it is neither the CPU nor CUDA.
    """
    if not isinstance(accelerator, _ACCELERATORS):
        raise ValueError(
            f"{strategy} runs on CPUs and CUDA GPUs, got {type(accelerator).__name__}: set `accelerator='cpu'` or "
            "`accelerator='cuda'`."
        )


def refuse_callbacks(given: Iterable[Callback]) -> None:
    """Refuse callbacks that do not support a sharded model.

    Raises:
        TypeError: If a callback keeps a second model of plain tensors, or prunes weights that are sharded already.
    """
    given = list(given)
    if any(isinstance(callback, callbacks.StochasticWeightAveraging) for callback in given):
        raise TypeError(
            "The callback StochasticWeightAveraging averages full copies of the model, but `MemOptFSDPStrategy` keeps "
            "only a shard of it on each rank: use `WeightAveraging` or `EMAWeightAveraging`, whose average is sharded."
        )
    pruning = [type(callback).__name__ for callback in given if isinstance(callback, callbacks.ModelPruning)]
    if pruning:
        raise TypeError(
            f"The callback {' and '.join(pruning)} needs full weights, but `MemOptFSDPStrategy` keeps only a shard of "
            "each on a rank: prune with `torch.nn.utils.prune` when you create the model, which sharding keeps, or "
            "train with `strategy='ddp'`."
        )


def refuse_embeddings(model: nn.Module) -> None:
    """Refuse embeddings that change their weights in ``forward`` or have sparse gradients.

    Raises:
        ValueError: If there is one; the message names the weights.
    """
    found = [
        (f"{name}.weight" if name else "weight", module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    ]
    limited = [name for name, module in found if module.max_norm is not None]
    if limited:
        raise ValueError(
            f"Embeddings with `max_norm` change their weights in `forward`, which would change a gathered copy and be "
            f"lost: {', '.join(map(repr, limited))}. Leave `max_norm` out, and limit the vectors that were looked up, "
            "for example with `torch.renorm`."
        )
    sparse = [name for name, module in found if module.sparse and module.weight.requires_grad]
    if sparse:
        raise ValueError(
            f"Sparse gradients cannot be reduced over ranks: {', '.join(map(repr, sparse))}. Create the embedding with "
            "`sparse=False`."
        )


def refuse_fsdp1(model: nn.Module) -> None:
    """Refuse modules that FSDP1 wraps.

    Raises:
        TypeError: If there is one.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, FullyShardedDataParallel)]
    if names:
        raise TypeError(
            "Found modules that are wrapped with `torch.distributed.fsdp.FullyShardedDataParallel`: "
            f"{', '.join(map(repr, names))}. The `MemOptFSDPStrategy` only supports the new FSDP2 APIs in "
            "PyTorch >= 2.4: leave the model unwrapped, or call `fully_shard` in `configure_model`."
        )


def refuse_parameters(model: nn.Module, units: Iterable[Unit]) -> None:
    """Refuse parameters that ``fully_shard`` does not support, or whose hooks it would lose.

    Raises:
        ValueError: If a parameter is a scalar, has no shape yet, or has hooks.
    """
    held = {param for unit in units for param in unit.module.parameters()}
    named = [(name, param) for name, param in model.named_parameters() if is_lazy(param) or param in held]
    lazy = [name for name, param in named if is_lazy(param)]
    if lazy:
        raise ValueError(
            f"Parameters that have no shape yet cannot be sharded: {', '.join(map(repr, lazy))}. Call the lazy modules "
            "once in `configure_model`, or give them their sizes."
        )
    scalars = [name for name, param in named if param.ndim == 0]
    if scalars:
        raise ValueError(
            f"Scalar parameters cannot be sharded: {', '.join(map(repr, scalars))}. Give them the shape (1,), or put "
            "them on the LightningModule itself, where parameters are not sharded."
        )
    hooked = [name for name, param in named if param._backward_hooks or param._post_accumulate_grad_hooks]
    if hooked:
        raise ValueError(
            f"Hooks on parameters would be lost, because sharding replaces the parameters: "
            f"{', '.join(map(repr, hooked))}. Register them in `on_fit_start`."
        )
