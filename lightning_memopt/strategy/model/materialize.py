"""Real tensors for modules that were made on the meta device, with the values that they would have been born with."""

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
    """Refuse modules that hold something on the meta device and have no initialiser at all.

    Raises:
        ValueError: With their names. Nothing has changed then, unlike where an initialiser leaves something out.
    """
    _refuse(
        (name, module, [key for key, tensor in _own(module) if tensor.is_meta])
        for name, module in modules
        if module not in owners and _initializer(module) is None
    )


def move(modules: Modules, device: torch.device, owners: Owners) -> dict[Tensor, Tensor]:
    """Put the tensors of modules on a device as new objects, and initialise those that are on the meta device.

    The old parameters are left as they are: an optimizer that holds them would otherwise keep whole copies of the
    model on the device. Tensors that are on the device already stay.

    Args:
        modules: With their full names, inner ones first. What they hold themselves is moved, not their children.
        device: Where to.
        owners: From :func:`pretrained_owners`.

    Returns:
        Old parameter or buffer → new one, for all that were replaced.

    Raises:
        ValueError: If something on the meta device is not initialised by its module.
    """
    meta = {tensor for _, module in modules for _, tensor in _own(module) if tensor.is_meta}
    born = [(name, module) for name, module in modules if any(tensor in meta for _, tensor in _own(module))]
    replaced = _replace(modules, lambda tensor: _on(tensor, device))
    if meta:
        _initialize(modules, {replaced[tensor] for tensor in meta}, owners)
        _check_initialized(born, {replaced[tensor] for tensor in meta})
    return replaced


def materialize_sharded(modules: Modules, device: torch.device) -> None:
    """Initialise what is on the meta device in a model whose parameters are sharded already.

    Args:
        modules: All of the model, inner ones first.
        device: Where to.

    Raises:
        ValueError: If something on the meta device is not initialised by its module.
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
    """Return the modules below models of transformers, each with the nearest of these: it knows how to initialise."""
    found: dict[nn.Module, Any] = {}
    for owner in root.modules():  # outer ones first
        # Told by name, so that transformers need not be installed.
        if any(cls.__name__ == "PreTrainedModel" for cls in type(owner).__mro__):
            found.update(dict.fromkeys(owner.modules(), owner))
    return found


def convert(modules: Modules, dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """Convert floating-point parameters and buffers, as new objects; return old → new."""
    return _replace(modules, lambda tensor: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a module itself holds."""
    for table in (module._parameters, module._buffers):
        for key, tensor in table.items():
            if tensor is not None:
                yield key, tensor


def _replace(modules: Modules, make: Any) -> dict[Tensor, Tensor]:
    """Replace tensors, those that several modules share by the same one."""
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
        # Not the strides of a meta tensor: fully_shard takes contiguous parameters only.
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
    """Run the initialisers of modules, and keep what they overwrite of tensors that had values."""
    kept = [tensor for _, module in modules for _, tensor in _own(module) if tensor not in fresh]
    values = [tensor.detach().clone() for tensor in kept]
    for param in modules[-1][1].parameters():
        if isinstance(param, DTensor) and param not in fresh:
            # Models of transformers also initialise what is below a module, unless it says so; inner units are done.
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
    # torch.nn.MultiheadAttention has the underscore.
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
            "These modules were made on the meta device and do not initialise what they hold there: "
            f"{'; '.join(lines)}. Give them a `reset_parameters()` that does, make them outside of "
            "`trainer.init_module(empty_init=True)`, or load the weights in `configure_model`."
        )


def _has_sentinel(tensor: Tensor) -> bool:
    local = local_tensor(tensor)
    if local.dtype == torch.bool:
        return False
    if local.is_floating_point() or local.is_complex():
        return bool(local.isnan().any())
    return bool((local == torch.iinfo(local.dtype).min).any())
