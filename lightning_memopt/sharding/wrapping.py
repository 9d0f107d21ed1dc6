"""Chooses the modules to which ``fully_shard`` is applied, and their order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Chain = tuple[nn.Module, ...]


@dataclass(frozen=True)
class Policy:
    """A choice of modules. Errors name the argument that it comes from.

    Attributes:
        option: Name of the argument.
        value: What the user gave.
        chooses: Returns whether a module is chosen.
    """

    option: str
    value: Any
    chooses: Callable[[nn.Module], bool]


@dataclass(frozen=True)
class Unit:
    """A module whose parameters are gathered together, except those of units inside it.

    Attributes:
        name: Its name in the model; empty for the model itself.
        module: The module.
        outermost: Whether no other unit contains it, so that the user's code sees its inputs and outputs.
    """

    name: str
    module: nn.Module
    outermost: bool


def resolve_policy(option: str, value: Any) -> Policy | None:
    """Turn a class, an import path, a list of these, or a function into a policy.

    Args:
        option: Name of the argument, for errors.
        value: What the user gave; None stays None.

    Raises:
        TypeError: If the value has another type.
        ValueError: If a path cannot be imported.
    """
    if value is None:
        return None
    entries = [value] if isinstance(value, str | type) else value
    if isinstance(entries, Sequence):
        classes = tuple(_module_class(option, entry) for entry in entries)
        if not classes:
            raise ValueError(f"`{option}` is an empty list: name classes of modules, or leave it out.")
        return Policy(option, value, lambda module: isinstance(module, classes))
    if callable(value):
        return Policy(option, value, value)
    raise TypeError(
        f"`{option}` must be a class of modules, its import path, a list of these, or a function that takes a module "
        f"and returns a bool, got {value!r}."
    )


def _module_class(option: str, entry: Any) -> type[nn.Module]:
    if isinstance(entry, str):
        module, _, name = entry.rpartition(".")
        try:
            entry = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"`{option}` has {entry!r}, which cannot be imported ({error}): give the full path of a class, such as "
                "'torch.nn.TransformerEncoderLayer'."
            ) from error
    if not (isinstance(entry, type) and issubclass(entry, nn.Module)):
        raise TypeError(f"`{option}` must name classes of modules, got {entry!r}.")
    return entry


def find_units(root: nn.Module, policy: Policy | None = None, *, called: bool = False) -> list[Unit]:
    """Return the modules to which ``fully_shard`` should be applied, inner units first.

    These are the blocks (see :func:`blocks`) and the outermost modules with their own ``forward``. If a unit shares a
    parameter with a module outside it, only the unit that contains both remains.

    Args:
        root: The model.
        policy: Which blocks to choose.
        called: Whether the root's ``forward`` is called, so that the root can be a unit. A LightningModule is called
            through ``training_step``, which does not trigger gathering.

    Raises:
        ValueError: If the policy chooses nothing, or a module that cannot be called, or if modules share a parameter
            and no unit contains all of them.
    """
    tops = [root] if called and _is_callable(root) else list(_callable_children(root))
    return _ordered(root, _without_shared(root, {*tops, *blocks(root, policy)}))


def divided_by_dtype(root: nn.Module, units: Sequence[Unit]) -> list[Unit]:
    """Return the units, split further where parameters of several dtypes train.

    ``fully_shard`` reduces the gradients of a unit in one dtype. A unit keeps the dtype of the parameters that it holds
    itself, or else the dtype of most of its elements.

    Raises:
        ValueError: If parameters of several dtypes train that modules with a ``forward`` cannot separate.
    """
    chosen = {unit.module for unit in units}
    for unit in units:
        dtypes = _trained(own_modules(unit.module, chosen))
        if len(dtypes) > 1:
            held = _trained(_held(unit.module))
            chosen |= {*_of_other_dtypes(unit.module, max(held or dtypes, key=dtypes.__getitem__), chosen)}
    chosen = _without_shared(root, chosen)
    found = _ordered(root, chosen)
    for unit in found:
        names: dict[torch.dtype, str] = {}
        for name, module in own_modules(unit.module, chosen):
            for key, param in module.named_parameters(recurse=False):
                if param.requires_grad:
                    names.setdefault(param.dtype, ".".join(part for part in (unit.name, name, key) if part))
        if len(names) > 1:
            which = " and ".join(f"{name!r} ({dtype})" for dtype, name in names.items())
            raise ValueError(
                f"{unit.name!r} ({type(unit.module).__name__}) trains parameters of several dtypes, {which}, but "
                "`fully_shard` reduces the gradients of a unit in one dtype: put the parameters of each dtype into a "
                "separate module whose `forward` is called, convert them to one dtype, or freeze those of the other "
                "dtypes."
            )
    return found


def blocks(root: nn.Module, policy: Policy | None = None) -> list[nn.Module]:
    """Return the blocks of a model: the policy's choice, or the elements of its outermost homogeneous lists.

    Raises:
        ValueError: If the policy chooses nothing, or a module without a ``forward``.
    """
    if policy is None:
        return list(dict.fromkeys(_repeated(root)))
    inner = [(name, module) for name, module in root.named_modules() if module is not root and _has_params(module)]
    found = [(name, module) for name, module in inner if policy.chooses(module)]
    if not found:
        classes = sorted({type(module).__name__ for _, module in inner})
        raise ValueError(
            f"No module of {type(root).__name__} is chosen by `{policy.option}={policy.value!r}`: choose among its "
            f"modules, which are {', '.join(classes)}."
        )
    for name, module in found:
        if not _is_callable(module):
            raise ValueError(
                f"{name!r} ({type(module).__name__}) is chosen by `{policy.option}={policy.value!r}`, but has no "
                "`forward`, so nothing would gather its parameters: choose the modules that are called."
            )
    return [module for _, module in found]


def own_modules(unit: nn.Module, units: set[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Return a unit's modules with their names in it, inner ones first, without the modules of units inside it."""
    return list(_inner_first(unit, units - {unit}))


def parameters_by_unit(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of every unit of a model, each in one unit, and those of none alone.

    Units are the modules to which ``fully_shard`` was applied, or the model's blocks if there are none.
    """
    sharded = [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]
    modules = sharded or blocks(model)
    units: list[list[nn.Parameter]] = []
    seen: set[Tensor] = set()
    for unit in sorted(modules, key=lambda module: sum(other in modules for other in module.modules())):
        own = [param for _, module in own_modules(unit, set(modules)) for param in module.parameters(recurse=False)]
        units.append([param for param in dict.fromkeys(own) if param not in seen])
        seen.update(own)
    return [*units, *([param] for param in model.parameters() if param not in seen)]


def _callable_children(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules below this one that have parameters and can be called."""
    for child in module.children():
        if _is_callable(child) and _has_params(child):
            yield child
        else:
            yield from _callable_children(child)


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        elements = list(child.children())
        least = {nn.ModuleList: 1, nn.Sequential: 2}.get(type(child))
        if least and len(elements) >= least and len({*map(type, elements)}) == 1 and all(map(_has_params, elements)):
            for element in elements:
                yield from [element] if _is_callable(element) else _callable_children(element)
        else:
            yield from _repeated(child)


def _of_other_dtypes(module: nn.Module, dtype: torch.dtype, chosen: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules inside one that must become units so that it trains only this dtype."""
    for child in _callable_children(module):
        inside = _trained(own_modules(child, chosen)) if child not in chosen else {}
        held = _trained(_held(child))
        own = next(iter(held if len(held) == 1 else inside), dtype)
        if inside.keys() - {dtype} and own != dtype and 1 in (len(inside), len(held)):
            yield child
            yield from _of_other_dtypes(child, own, chosen)
        elif inside.keys() - {dtype}:
            yield from _of_other_dtypes(child, dtype, chosen)


def _held(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a module and its containers, whose parameters only the module uses."""
    return own_modules(module, {*_callable_children(module)})


def _trained(modules: Iterable[tuple[str, nn.Module]]) -> dict[torch.dtype, int]:
    """Return the number of trained elements per dtype, among the parameters that the modules hold directly."""
    counts: dict[torch.dtype, int] = defaultdict(int)
    for _, module in modules:
        for param in module.parameters(recurse=False):
            if param.requires_grad:
                counts[param.dtype] += param.numel()
    return counts


def _ordered(root: nn.Module, chosen: set[nn.Module]) -> list[Unit]:
    """Return modules as units, inner ones first."""
    order = [(name, module) for name, module in _inner_first(root) if module in chosen]
    inner = {module for _, unit in order for module in unit.modules() if module is not unit}
    return [Unit(name, module, module not in inner) for name, module in order]


def _is_callable(module: nn.Module) -> bool:
    """Return whether a module has its own forward. A wrapper from ``torch.compile`` does not count."""
    own = type(module).forward is not nn.Module.forward or "forward" in vars(module)
    return own and not hasattr(module, "_orig_mod")


def _has_params(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _inner_first(
    root: nn.Module, without: set[nn.Module] | frozenset[nn.Module] = frozenset()
) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once, after all modules inside it."""
    seen: set[nn.Module] = set(without)

    def visit(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        seen.add(module)
        for key, child in module.named_children():
            if child not in seen:
                yield from visit(f"{name}.{key}" if name else key, child)
        yield name, module

    yield from visit("", root)


def _without_shared(root: nn.Module, chosen: set[nn.Module]) -> set[nn.Module]:
    """Return the units without those that share a parameter with a module outside them."""
    while True:
        for places in _places(root, chosen).values():
            if len({chain[-1:] for _, chain in places}) > 1:
                common = _common([chain for _, chain in places])
                if not common:
                    raise ValueError(_shared_message(root, places))
                chosen = chosen - {unit for _, chain in places for unit in chain[len(common) :]}
                break
        else:
            return chosen


def _places(root: nn.Module, chosen: set[nn.Module]) -> dict[Tensor, list[tuple[str, Chain]]]:
    """Return, for every parameter, its names and the units that contain it there, outer units first."""
    found: dict[Tensor, list[tuple[str, Chain]]] = defaultdict(list)

    def visit(prefix: str, module: nn.Module, chain: Chain) -> None:
        chain = (*chain, module) if module in chosen else chain
        for key, param in module._parameters.items():
            if param is not None:
                found[param].append((prefix + key, chain))
        for key, child in module._modules.items():
            if child is not None:
                visit(f"{prefix}{key}.", child, chain)

    visit("", root, ())
    return found


def _common(chains: list[Chain]) -> Chain:
    length = 0
    while all(len(chain) > length for chain in chains) and len({chain[length] for chain in chains}) == 1:
        length += 1
    return chains[0][:length]


def _shared_message(root: nn.Module, places: list[tuple[str, Chain]]) -> str:
    names = {module: name for name, module in root.named_modules()}
    first, chain = places[0]
    second, other = next((name, units) for name, units in places if units[:1] != chain[:1])
    holders = [repr(names[units[0]]) if units else f"the {type(root).__name__} itself" for units in (chain, other)]
    return (
        f"{first!r} and {second!r} are the same parameter, but {' and '.join(holders)} are sharded separately, which "
        "would split it in two. Put both into one module of the LightningModule whose `forward` calls them, or do not "
        "share the parameter."
    )
