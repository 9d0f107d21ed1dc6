"""Snapshots of any optimizer, and of the memory of its model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_memopt.memory.snapshot import BlockFacts, PartBytes, ProcessMemory, Snapshot
from lightning_memopt.memory.storages import Storages
from lightning_memopt.memory.temporaries import StepMemory
from lightning_memopt.optim.checkpoint.values import described
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.plans.roles import Part, canonical_names, classify
from lightning_memopt.sharding.consensus import world_size
from lightning_memopt.sharding.layout import as_matrix
from lightning_memopt.sharding.tensors import local_tensor

# Names that the optimizers of torch.optim use for their statistics. All other keys count as other state.
MOMENTUM = ("exp_avg", "momentum_buffer")
SECOND_MOMENT = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "variance")
FACTORED = ("row_var", "col_var")
PROJECTION = ("projector",)  # GaLore's key for the object that holds its bases
OTHER = "other"


def take_snapshot(
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    module: nn.Module | None = None,
    *,
    step: StepMemory | None = None,
) -> Snapshot:
    """Return immutable facts about the state of optimizers, from this package or others, as one snapshot.

    Optimizers of this package know their blocks. In other optimizers, every parameter (every part of a fused one) is a
    block. Its role follows from its name, and its state is the content of ``optimizer.state``. A parameter without
    state, as before the first step of most optimizers, is left out of :attr:`Snapshot.saved`.

    Args:
        optimizers: One or several.
        module: The model. It gives names to parameters, and ``Snapshot.memory`` describes it.
        step: What :func:`~lightning_memopt.trace_step` found, for ``Snapshot.memory``.

    Raises:
        ValueError: If an optimizer of this package does not know the names of its parameters yet.
        TypeError: If an argument is not an optimizer.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(100, 10, bias=False)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(1, 100)).sum().backward()
        >>> optimizer.step()
        >>> snapshot = take_snapshot(optimizer, model)
        >>> snapshot.state_bytes, snapshot.adamw_bytes, snapshot.memory.parameters
        (8000, 8000, 4000)
    """
    given = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else _checked(optimizers)
    storages = Storages()
    memory = _memory(module, storages) if module is not None else None
    if memory is not None:
        handles = [optimizer.gradient_release for optimizer in given if isinstance(optimizer, MemOpt)]
        released = sum(handle.peak_bytes for handle in handles if handle is not None)
        memory = replace(memory, gradients=max(memory.gradients, released))
    if memory is not None and step is not None:
        memory = replace(memory, unsharded=step.unsharded, scratch=step.scratch)
    names = _names(module)
    found = [
        optimizer.snapshot() if isinstance(optimizer, MemOpt) else _foreign(optimizer, names, module, storages)
        for optimizer in given
    ]
    return Snapshot(
        blocks=tuple(_named_apart(found)),
        step=max((snapshot.step for snapshot in found), default=0),
        counter_bytes=sum(snapshot.counter_bytes for snapshot in found),
        skipped=sum(snapshot.skipped for snapshot in found),
        world_size=world_size(),
        memory=memory,
    )


def _checked(optimizers: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a sequence, without duplicates.

    Raises:
        TypeError: If an entry is not an optimizer.
    """
    entries = list(dict.fromkeys(optimizers)) if isinstance(optimizers, Iterable) else [optimizers]
    if not all(isinstance(entry, torch.optim.Optimizer) for entry in entries):
        raise TypeError(f"`optimizers` must be an optimizer or a list of them, got {described(optimizers)}.")
    return entries


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes.

    On a GPU: the memory of tensors, since the start or the last ``torch.cuda.reset_peak_memory_stats``. On a CPU: the
    resident set of the process, or 0 if the system does not report it.
    """
    backend: Any = getattr(torch, device.type, None)
    if hasattr(backend, "max_memory_allocated"):
        return backend.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    # Not getrusage first: a process inherits its maximum from the parent process.
    found = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    if found is not None:
        return int(found) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _memory(module: nn.Module, storages: Storages) -> ProcessMemory:
    params = list(module.parameters())
    device = params[0].device if params else torch.device("cpu")
    return ProcessMemory(
        device=str(device),
        parameters=storages.count(params),
        gradients=storages.count(param.grad for param in params if param.grad is not None),
        buffers=storages.count(module.buffers()),
        peak=peak_bytes(device),
    )


def _names(module: nn.Module | None) -> dict[Tensor, str]:
    named = list(module.named_parameters()) if module is not None else []
    return dict(zip((param for _, param in named), canonical_names(name for name, _ in named), strict=True))


def _named_apart(snapshots: Iterable[Snapshot]) -> Iterator[BlockFacts]:
    """Yield all blocks. If several optimizers train a block, append the optimizer's position to its name."""
    seen: set[str] = set()
    for position, snapshot in enumerate(snapshots):
        names = {block.name for block in snapshot.blocks}
        for block in snapshot.blocks:
            if block.name in seen:  # AdamW would keep its state only once
                block = replace(block, name=f"{block.name}@{position}", adamw_bytes=0, local_adamw_bytes=0)
            yield block
        seen |= names


def _foreign(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], module: nn.Module | None, storages: Storages
) -> Snapshot:
    while isinstance(getattr(optimizer, "optim", None), torch.optim.Optimizer):  # like ZeroRedundancyOptimizer
        optimizer = optimizer.optim  # type: ignore[attr-defined]
    params = [
        (names.get(param, f"param_groups.{group}.{position}"), param)
        for group, entry in enumerate(optimizer.param_groups)
        for position, param in enumerate(entry["params"])
    ]
    parts = _parts(tuple((name, tuple(param.shape)) for name, param in params)) if module is not None else {}
    blocks: list[BlockFacts] = []
    counters = step = 0
    for name, param in params:
        state = optimizer.state.get(param, {})
        if not (param.requires_grad or state):
            continue
        pending = not state and not _keeps_nothing(optimizer)
        scalars, tensors = _split(state)
        counters += storages.count(scalars.values())
        step = max(step, int(_number(state.get("step", 0))))
        found = _blocks(name, param, parts.get(name, (_unnamed(param),)), tensors, storages)
        blocks += (replace(block, pending=pending) for block in found)
    known = {id(param) for _, param in params}
    rest = {key: list(_tensors(value, set())) for key, value in optimizer.state.items() if id(key) not in known}
    blocks += [_apart(str(key), tensors, storages) for key, tensors in rest.items() if tensors]
    return Snapshot(tuple(blocks), step, counters)


def _keeps_nothing(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer never has state, so that AdamW's counts as saved instead of pending."""
    return isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups)


def _apart(name: str, tensors: Sequence[Tensor], storages: Storages) -> BlockFacts:
    """Return state that belongs to no parameter as a separate block."""
    local = storages.count(tensors)
    return BlockFacts(
        name=f"state.{name}",
        role="other",
        shape=(0,),
        full_rank=0,
        momentum="none",
        rank=None,
        second_moment="none",
        state=PartBytes(other=_whole(tensors, local)),
        local=PartBytes(other=local),
        adamw_bytes=0,
        local_adamw_bytes=0,
    )


@lru_cache(maxsize=16)
def _parts(named: tuple[tuple[str, tuple[int, ...]], ...]) -> Mapping[str, tuple[Part, ...]]:
    """Return the parts of parameters. Cached, since a training run asks for the same again and again."""
    return classify(named)


def _unnamed(param: Tensor) -> Part:
    return Part("vector" if param.ndim < 2 else "other")


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Return the scalar counters of a state, and lists of all other tensors, by key."""
    found = {key: list(_tensors(value, set())) for key, value in state.items()}
    statistics = MOMENTUM + SECOND_MOMENT  # these are scalars for a parameter without dimensions
    scalars = {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.ndim == 0 and key not in statistics
    }
    return scalars, {key: tensors for key, tensors in found.items() if key not in scalars}


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield all tensors in a value: in containers, and in attributes of objects, where some optimizers keep them."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, nn.Module):
            yield from (*leaf.parameters(), *leaf.buffers())
        elif id(leaf) not in seen and not isinstance(leaf, type | FunctionType | BuiltinFunctionType | ModuleType):
            seen.add(id(leaf))
            slots = (slot for cls in type(leaf).__mro__ for slot in getattr(cls, "__slots__", ()))
            held = [getattr(leaf, slot, None) for slot in slots] + list(getattr(leaf, "__dict__", {}).values())
            yield from _tensors(held, seen)


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)


def _blocks(
    name: str, param: Tensor, parts: Sequence[Part], tensors: Mapping[str, list[Tensor]], storages: Storages
) -> Iterator[BlockFacts]:
    """Yield one block per part of a parameter. The state of a fused parameter is divided evenly among its parts."""
    keys = {
        "momentum": [key for key in tensors if key in MOMENTUM],
        "projections": [key for key in tensors if key in PROJECTION],
        "second_moment": [key for key in tensors if key in SECOND_MOMENT + FACTORED],
    }
    keys["other"] = [key for key in tensors if not any(key in entry for entry in keys.values())]
    local = {part: [storages.count(tensors[key]) for key in entry] for part, entry in keys.items()}
    whole = {
        part: [_whole(tensors[key], mine) for key, mine in zip(keys[part], local[part], strict=True)] for part in keys
    }
    momentum, second_moment = (
        _kind([tensors[key] for key in keys[axis]], param) for axis in ("momentum", "second_moment")
    )
    if any(key in FACTORED for key in tensors):
        second_moment = "factored"
    size, count = param.element_size(), len(parts)
    for position, part in enumerate(parts):
        shape = tuple(param.shape) if part.slot is None else part.slot.shape_in(param.shape)
        yield BlockFacts(
            name=f"{name}:{part.role}" if count > 1 else name,
            role=part.role,
            shape=shape,
            split="" if part.slot is None else part.slot.text(len(shape)),
            why=part.why,
            head_dim=part.head_dim,
            full_rank=min(as_matrix(shape, part.flatten)[-2:]),
            momentum=momentum,
            rank=None,
            second_moment=second_moment,
            state=PartBytes(**{key: _share(sum(sizes), position, count) for key, sizes in whole.items()}),
            local=PartBytes(**{key: _share(sum(sizes), position, count) for key, sizes in local.items()}),
            adamw_bytes=2 * torch.Size(shape).numel() * size,
            local_adamw_bytes=_share(2 * local_tensor(param).numel() * size, position, count),
        )


def _whole(tensors: Sequence[Tensor], local: int) -> int:
    """Return the bytes of tensors if one process held all of them. ``local`` is what this process holds."""
    if all(local_tensor(tensor) is tensor for tensor in tensors):
        return local
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _kind(tensors: Sequence[Sequence[Tensor]], param: Tensor) -> str:
    """Return the kind of a statistic, judged by its size."""
    if not any(tensors):
        return "none"
    return "dense" if all(tensor.numel() == param.numel() for entry in tensors for tensor in entry) else OTHER


def _share(total: int, position: int, count: int) -> int:
    return total // count + (position < total % count)
