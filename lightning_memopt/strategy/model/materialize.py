"""Replace the meta tensors of modules by real ones, with the initial values that the modules define."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_memopt.sharding.tensors import local_tensor

Modules = Sequence[tuple[str, nn.Module]]
Owners = Mapping[nn.Module, Any]


def refuse_uninitializable(modules: Modules, owners: Owners) -> None:
    """Refuse modules that hold meta tensors and have no initializer.

    Raises:
        ValueError: If there is one; the message names them all. Nothing has changed then. This differs from an
            initializer that leaves out a tensor, which is found only after it has run.
    """
    _refuse(
        (name, module, [key for key, tensor in _own(module) if tensor.is_meta])
        for name, module in modules
        if module not in owners and _initializer(module) is None
    )


def move(modules: Modules, device: torch.device, owners: Owners) -> dict[Tensor, Tensor]:
    """Move the tensors of modules to a device as new objects, and initialize those on the meta device.

    The old parameters do not change: an optimizer that holds them would otherwise keep full copies of the model on the
    device. Tensors that are on the device already stay.

    Args:
        modules: The modules with their full names, inner ones first. Tensors of their children are not moved.
        device: The target device.
        owners: The result of :func:`pretrained_owners`.

    Returns:
        The mapping old parameter or buffer → new one, for all that were replaced.

    Raises:
        ValueError: If a module does not initialize a tensor of its own that is on the meta device.
    """
    meta = {tensor for _, module in modules for _, tensor in _own(module) if tensor.is_meta}
    born = [(name, module) for name, module in modules if any(tensor in meta for _, tensor in _own(module))]
    replaced = _replace(modules, lambda tensor: _on(tensor, device))
    if meta:
        _initialize(modules, {replaced[tensor] for tensor in meta}, owners)
        _check_initialized(born, {replaced[tensor] for tensor in meta})
    return replaced


def materialize_sharded(modules: Modules, device: torch.device) -> None:
    """Initialize the meta tensors of a model whose parameters are sharded already.

    Args:
        modules: All modules of the model, inner ones first.
        device: The target device.

    Raises:
        ValueError: If a module does not initialize a tensor of its own that is on the meta device.
    """
    places = [(module, key) for _, module in modules for key, tensor in _own(module) if tensor.is_meta]
    if not places:
        return
    born = [(name, module) for name, module in modules if any(module is holder for holder, _ in places)]
    _replace(modules, lambda tensor: tensor if isinstance(tensor, DTensor) else _on(tensor, device))
    root = modules[-1][1]
    root._apply(lambda tensor: _on(tensor, device) if tensor.is_meta else tensor)
    fresh = {tensor for module, key in places for own, tensor in _own(module) if own == key}
    _initialize(modules, fresh, pretrained_owners(root))
    _check_initialized(born, fresh)


def pretrained_owners(root: nn.Module) -> dict[nn.Module, Any]:
    """Map each module inside a transformers model to the nearest such model, which can initialize it."""
    found: dict[nn.Module, Any] = {}
    for owner in root.modules():  # outer ones first
        # Compare by name, so that transformers need not be installed.
        if any(cls.__name__ == "PreTrainedModel" for cls in type(owner).__mro__):
            found.update(dict.fromkeys(owner.modules(), owner))
    return found


def convert(modules: Modules, dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """Convert floating-point parameters and buffers to new objects, and return the mapping old → new."""
    return _replace(modules, lambda tensor: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a module, without those of its children."""
    for table in (module._parameters, module._buffers):
        for key, tensor in table.items():
            if tensor is not None:
                yield key, tensor


def _replace(modules: Modules, make: Any) -> dict[Tensor, Tensor]:
    """Replace tensors. A tensor that several modules share is replaced by one new tensor."""
    replaced: dict[Tensor, Tensor] = {}
    for _, module in modules:
        for key, old in list(_own(module)):
            if old not in replaced:
                new = make(old)
                if isinstance(old, nn.Parameter) and new is not old:
                    new = nn.Parameter(new, requires_grad=old.requires_grad)
                replaced[old] = new
            table: Any = module._parameters if key in module._parameters else module._buffers
            table[key] = replaced[old]
    return {old: new for old, new in replaced.items() if old is not new}


@torch.no_grad()
def _on(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.is_meta:
        # Do not keep the strides of a meta tensor: `fully_shard` accepts contiguous parameters only.
        new = torch.empty_like(tensor, device=device, memory_format=torch.contiguous_format)
        return new.fill_(_sentinel(tensor.dtype))
    if tensor.device == device and tensor.is_contiguous():
        return tensor
    return tensor.detach().to(device).contiguous()


def _sentinel(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return False if dtype == torch.bool else torch.iinfo(dtype).min


def _initialize(modules: Modules, fresh: set[Tensor], owners: Owners) -> None:
    """Run the initializers of modules, and restore tensors that had values before."""
    kept = [tensor for _, module in modules for _, tensor in _own(module) if tensor not in fresh]
    values = [tensor.detach().clone() for tensor in kept]
    for param in modules[-1][1].parameters():
        if isinstance(param, DTensor) and param not in fresh:
            # Without this mark, transformers initializes the children again. Inner units have their values already.
            param._is_hf_initialized = True  # type: ignore[attr-defined]
    for _, module in modules:
        if module in owners:
            owners[module]._init_weights(module)
        elif any(tensor in fresh for _, tensor in _own(module)):
            initializer = _initializer(module)
            if initializer is not None:
                initializer()
    with torch.no_grad():
        for tensor, value in zip(kept, values, strict=True):
            tensor.copy_(value)


def _initializer(module: nn.Module) -> Callable[[], Any] | None:
    # torch.nn.MultiheadAttention has the name with the underscore.
    names = ("reset_parameters", "_reset_parameters")
    return next((method for name in names if callable(method := getattr(module, name, None))), None)


def _check_initialized(modules: Iterable[tuple[str, nn.Module]], fresh: set[Tensor]) -> None:
    _refuse(
        (name, module, [key for key, tensor in _own(module) if tensor in fresh and _has_sentinel(tensor)])
        for name, module in modules
    )


def _refuse(left: Iterable[tuple[str, nn.Module, list[str]]]) -> None:
    lines = [f"{name} ({type(module).__name__}): {', '.join(keys)}" for name, module, keys in left if keys]
    if lines:
        raise ValueError(
            "These modules were created on the meta device and do not initialize the tensors that they hold there: "
            f"{'; '.join(lines)}. Give them a `reset_parameters()` that does, create them outside of "
            "`trainer.init_module(empty_init=True)`, or load the weights in `configure_model`."
        )


def _has_sentinel(tensor: Tensor) -> bool:
    local = local_tensor(tensor)
    if local.dtype == torch.bool:
        return False
    if local.is_floating_point() or local.is_complex():
        return bool(local.isnan().any())
    return bool((local == torch.iinfo(local.dtype).min).any())
