"""Plan the memory of a training run on every rank, with the optimizer itself on the meta device."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_memopt._registry import unknown
from lightning_memopt.memory.sizes import parse_bytes
from lightning_memopt.memory.snapshot import Snapshot
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.optim.weights import weight_bits
from lightning_memopt.planner.architectures import find_model
from lightning_memopt.planner.memory_plan import ADAMW, MemoryPlan, RecipeMemory
from lightning_memopt.planner.planned import PlannedMesh, outline, sharded_parameter, whole_parameter
from lightning_memopt.plans.placement import shard_dims
from lightning_memopt.plans.plan import Plan
from lightning_memopt.plans.recipes import load_plan, recipe_names
from lightning_memopt.plans.roles import names_without_role
from lightning_memopt.sharding.tensors import local_tensor
from lightning_memopt.sharding.wrapping import (
    Policy,
    Unit,
    divided_by_dtype,
    find_units,
    own_modules,
)

PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")
# Other forms that the Trainer accepts.
SHORT: dict[Any, str] = {None: "32-true", 32: "32-true", "32": "32-true", "bf16": "bf16-mixed"}
LEAST_MEMORY = 1 << 20
RecipeT = str | os.PathLike[str] | Mapping[str, Any] | Plan
ModelT = str | os.PathLike[str] | nn.Module


@dataclass(frozen=True)
class Candidate:
    """An optimizer to plan with.

    Attributes:
        label: Its label in the table.
        build: Creates it from parameters.
    """

    label: str
    build: Callable[[Iterable[Tensor]], MemOpt]


def plan_memory(
    model: ModelT,
    recipe: RecipeT | Sequence[RecipeT] | None = None,
    *,
    world_size: int = 1,
    gpu_memory: str | int | None = None,
    precision: str = "32-true",
    gradient_release: bool = False,
    master_weight_bits: int = 16,
    averaged: bool = False,
) -> MemoryPlan:
    """Return the memory of the rank that holds the most, with AdamW and with recipes.

    No memory is allocated. The optimizer is built on the meta device, with parameters that are sharded and wrapped as
    in ``strategy="memopt_fsdp"``. So its state has exactly the bytes of a real run.

    Args:
        model: A name of :func:`~lightning_memopt.planner.skeletons.model_names`; the path of a transformers
            configuration (``config.json``), or of the folder that holds it; or a module, which does not change.
        recipe: A recipe's name, the path or content of a recipe file, a plan, or a list of these. None means all named
            recipes.
        world_size: Number of ranks. With one rank, nothing is sharded.
        gpu_memory: Memory of one device, such as "24GiB", or in bytes.
        precision: ``32-true`` and ``bf16-mixed`` keep parameters in the dtype of the module, which is float32 by
            default. ``bf16-true`` converts parameters, and so gradients and AdamW's state, but not that of recipes.
        gradient_release: Whether recipes release gradients in the backward pass, as the strategy's option does.
        master_weight_bits: Bits that recipes keep of every bfloat16 weight, as ``MemOpt`` takes it.
        averaged: Whether a callback such as Lightning's ``WeightAveraging`` keeps an average of the parameters.

    Raises:
        ValueError: If a name, a size or the precision is invalid; the message says which values are valid.
        TypeError: If an argument has the wrong type.
        FileNotFoundError: If a path does not exist.
        ImportError: If a configuration file is given and transformers is missing.

    Example:
        >>> plan = plan_memory("llama-130m", ["adam_mini", "adapm_lean"], world_size=2, gpu_memory="1GiB")
        >>> plan.parameters, plan.row("adapm_lean").state_bytes, plan.first_fit
        (134105856, 12108800, 'adam_mini')
    """
    name, module = find_model(model)
    options: Any = {"gpu_memory": gpu_memory, "precision": precision, "averaged": averaged}
    options |= {"gradient_release": gradient_release, "master_weight_bits": master_weight_bits}
    found = candidates(recipe, master_weight_bits=master_weight_bits)
    return plan_module(module, found, name=name, world_size=world_size, **options)


def sweep_memory(
    model: ModelT,
    recipe: RecipeT | Sequence[RecipeT] | None = None,
    *,
    world_sizes: Iterable[int] = (1, 2, 4, 8, 16, 32, 64),
    gpu_memory: str | int | None = None,
    precision: str = "32-true",
    gradient_release: bool = False,
    master_weight_bits: int = 16,
) -> tuple[MemoryPlan, ...]:
    """Return one plan per number of ranks. The other arguments are those of :func:`plan_memory`."""
    name, module = find_model(model)
    options: Any = {"gpu_memory": gpu_memory, "precision": precision}
    options |= {"gradient_release": gradient_release, "master_weight_bits": master_weight_bits}
    found = candidates(recipe, master_weight_bits=master_weight_bits)
    return tuple(plan_module(module, found, name=name, world_size=size, **options) for size in world_sizes)


def candidates(recipe: RecipeT | Sequence[RecipeT] | None, *, master_weight_bits: int = 16) -> list[Candidate]:
    """Return the optimizers for recipes in the forms that :func:`plan_memory` accepts.

    Raises:
        ValueError: If the list is empty, or a recipe is unknown.
    """
    given: Any = recipe_names() if recipe is None else recipe
    entries = given if isinstance(given, list | tuple) else [given]
    if not entries:
        raise ValueError(f"`recipe` is an empty list: name some of {', '.join(recipe_names())}, or leave it out.")
    weight_bits(master_weight_bits, stochastic=True)  # raises
    return [_candidate(load_plan(entry), master_weight_bits) for entry in entries]


def _candidate(plan: Plan, bits: int) -> Candidate:
    return Candidate(plan.name, lambda params: MemOpt(params, recipe=plan, master_weight_bits=bits))


def plan_module(
    module: nn.Module,
    optimizers: Sequence[Candidate],
    *,
    name: str,
    world_size: int = 1,
    rank: int = 0,
    gpu_memory: str | int | None = None,
    precision: str | int | None = "32-true",
    wrap: Policy | None = None,
    gradient_release: bool = False,
    master_weight_bits: int = 16,
    averaged: bool = False,
) -> MemoryPlan:
    """Return the plan for one rank. If a dimension is sharded unevenly, the first ranks hold more than the last.

    Args:
        module: The model, which does not change.
        optimizers: The optimizers to compare, in addition to AdamW.
        name: The name of the model.
        world_size: See :func:`plan_memory`.
        rank: The rank.
        gpu_memory: See :func:`plan_memory`.
        precision: See :func:`plan_memory`.
        wrap: The modules to gather as units, as in the strategy's option.
        gradient_release: See :func:`plan_memory`.
        master_weight_bits: See :func:`plan_memory`; what the optimizers were created with.
        averaged: See :func:`plan_memory`.

    Raises:
        ValueError: As for :func:`plan_memory`, and if the module has no parameters, or parameters without a shape.
    """
    precision = _precision(precision)
    _check(module, world_size)
    capacity = _capacity(gpu_memory)
    sharding = _Sharding.of(module, name, PlannedMesh(world_size, rank), precision, wrap, release=gradient_release)
    largest = max(sharding.units, key=sharding.gathered, default=None)
    unsharded = sharding.gathered(largest) if largest is not None else 0
    params = list(module.parameters())
    stored = {param: sharding.stored(param) for param in params}
    gradients = sum(stored[param] for param in params if param.requires_grad)
    # A strategy makes the average in the dtype that parameters have before they are converted.
    average = sum(sharding.numbers(param) * param.itemsize for param in params) if averaged else 0
    fixed = sum(stored.values()) + average + unsharded
    kept = sharding.gradients_left(stored) if gradient_release else gradients
    copy = outline(module, sharding.planned)
    adamw = sum(
        2 * local_tensor(param).numel() * param.element_size() for param in copy.parameters() if param.requires_grad
    )

    def row(label: str, state: int, grads: int, rates: tuple[str, ...] = ()) -> RecipeMemory:
        total = fixed + grads + state
        left = None if capacity is None else capacity - total
        saved = 1 - state / adamw if adamw else 0.0
        return RecipeMemory(label, state, total, saved, grads, left, None if left is None else left > 0, rates)

    snapshots = [(entry.label, _snapshot(copy, entry)) for entry in optimizers]
    return MemoryPlan(
        model=name,
        parameters=sum(param.numel() for param in params),
        world_size=world_size,
        precision=precision,
        gpu_memory=capacity,
        parameter_bytes=sum(stored.values()),
        gradient_bytes=gradients,
        counter_bytes=torch.float32.itemsize * sum(param.requires_grad for param in params),
        unsharded_bytes=unsharded,
        largest_unit=largest.name if largest is not None else None,
        matrices=sum(param.ndim > 1 for param in params),
        unknown=tuple(names_without_role(module)),
        rows=(
            row(ADAMW, adamw, gradients),
            *(row(label, snapshot.local_bytes, kept, _rates(snapshot)) for label, snapshot in snapshots),
        ),
        averaged_bytes=average,
        gradient_release=gradient_release,
        master_weight_bits=master_weight_bits,
    )


@dataclass(frozen=True)
class _Sharding:
    """How the strategy would shard a module.

    Attributes:
        mesh: The ranks.
        precision: Lightning's name of the precision.
        units: The modules that are gathered as units; none on one rank.
        own: The parameters of every unit, without those of inner units.
        released: The same for the units whose gradients would be released, on one rank too; with whether they contain
            others.
        dims: The dimension along which every parameter of a unit is sharded.
    """

    mesh: PlannedMesh
    precision: str
    units: tuple[Unit, ...]
    own: dict[nn.Module, list[nn.Parameter]]
    released: tuple[tuple[list[nn.Parameter], bool], ...]
    dims: dict[Tensor, int]

    @staticmethod
    def of(
        module: nn.Module, name: str, mesh: PlannedMesh, precision: str, wrap: Policy | None, *, release: bool = False
    ) -> _Sharding:
        """Return how the strategy would shard a module."""
        alone = mesh.ranks == 1
        units = [] if alone and not release else _units(module, name, wrap, precision)
        own = _own(units)
        released = tuple(
            (own[unit.module], any(other in own for other in unit.module.modules() if other is not unit.module))
            for unit in units
        )
        if alone:
            return _Sharding(mesh, precision, (), {}, released, {})
        divided = {param for params in own.values() for param in params}
        dims = {param: dim for param, dim in shard_dims(module, mesh.ranks).items() if param in divided}
        return _Sharding(mesh, precision, tuple(units), own, released, dims)

    def planned(self, param: nn.Parameter) -> nn.Parameter:
        """Return the rank's planned parameter. Parameters outside all units are not sharded."""
        dtype = self._dtype(param)
        if param not in self.dims:
            return whole_parameter(param, dtype)
        return sharded_parameter(param, dtype, dim=self.dims[param], mesh=self.mesh)

    def stored(self, param: Tensor) -> int:
        """Return the bytes of a parameter, or its gradient, on every rank, padded to the size on the first."""
        return self.numbers(param) * self._dtype(param).itemsize

    def gradients_left(self, stored: Mapping[nn.Parameter, int]) -> int:
        """Return the bytes of gradients that may exist at a time if units release them, given those of parameters.

        These are the gradients of units that contain others, which end last; of the two largest others, since the next
        one may begin while one is applied; and of what is not sharded.
        """

        def size(params: Iterable[nn.Parameter]) -> int:
            return sum(stored[param] for param in params if param.requires_grad)

        inside = {param for params, _ in self.released for param in params}
        outer = sum(size(params) for params, contains in self.released if contains)
        inner = sorted(size(params) for params, contains in self.released if not contains)
        return outer + sum(inner[-2:]) + size(param for param in stored if param not in inside)

    def gathered(self, unit: Unit) -> int:
        """Return the bytes of a unit's gathered parameters."""
        half = self.precision == "bf16-mixed"
        return sum(
            self.numbers(param)
            * self.mesh.ranks
            * (torch.bfloat16 if half and param.is_floating_point() else self._dtype(param)).itemsize
            for param in self.own[unit.module]
        )

    def numbers(self, param: Tensor) -> int:
        """Return the number of elements of a parameter on every rank, padded to the number on the first."""
        if param not in self.dims:
            return param.numel()
        length = param.shape[self.dims[param]]
        return -(-length // self.mesh.ranks) * (param.numel() // max(1, length))

    def _dtype(self, param: Tensor) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16-true" and param.is_floating_point() else param.dtype


def _own(units: Sequence[Unit]) -> dict[nn.Module, list[nn.Parameter]]:
    """Return the parameters of every unit, without those of inner units."""
    modules = {unit.module for unit in units}
    return {
        unit.module: list(
            dict.fromkeys(
                param
                for _, inner in own_modules(unit.module, modules)
                for param in inner.parameters(recurse=False)
                if param.ndim > 0
            )
        )
        for unit in units
    }


def _units(module: nn.Module, name: str, wrap: Policy | None, precision: str) -> list[Unit]:
    """Return the units of a LightningModule, or of a wrapper around another module, whose unit is called ``name``."""
    alone = not hasattr(module, "training_step")
    root = nn.Module() if alone else module
    if alone:
        root.add_module("model", module)
    units = find_units(root, wrap)
    if precision != "bf16-true":  # bf16-true has one dtype
        units = divided_by_dtype(root, units)
    if not alone:
        return units
    return [
        Unit(unit.name.removeprefix("model").removeprefix(".") or name, unit.module, unit.outermost) for unit in units
    ]


def _snapshot(copy: nn.Module, candidate: Candidate) -> Snapshot:
    """Return the facts about an optimizer. Names and heads are bound first, so that state is created once."""
    optimizer = candidate.build(list(copy.parameters()))
    optimizer.bind(copy)
    return optimizer.snapshot()


def _rates(snapshot: Snapshot) -> tuple[str, ...]:
    """Return in words how the rates of blocks differ from those of their parameter groups."""
    counts = Counter((block.rates, block.role) for block in snapshot.blocks if block.rates)
    return tuple(f"{rates} in {count} {role} block{'s' * (count > 1)}" for (rates, role), count in counts.items())


def _precision(precision: str | int | None) -> str:
    found = SHORT.get(precision, precision)
    if found not in PRECISIONS:
        raise ValueError(
            f"{unknown('precision', str(precision), list(PRECISIONS))} For another precision, plan for the one with "
            "the same sizes, such as 'bf16-mixed' for '16-mixed'."
        )
    return str(found)


def _check(module: nn.Module, world_size: int) -> None:
    if isinstance(world_size, bool) or not isinstance(world_size, int):
        raise TypeError(f"`world_size` must be an integer, got {world_size!r}.")
    if world_size < 1:
        raise ValueError(f"`world_size` must be at least 1, got {world_size}.")
    named = list(module.named_parameters())
    if not named:
        raise ValueError(
            f"{type(module).__name__} has no parameters to plan for: create its layers in `__init__`, or first call "
            "the method that creates them, such as `configure_model`."
        )
    lazy = [name for name, param in named if is_lazy(param)]
    if lazy:
        raise ValueError(
            f"Parameters without a shape cannot be planned for: {', '.join(map(repr, lazy))}. Give the lazy modules "
            "their sizes, or call the module once."
        )


def _capacity(gpu_memory: str | int | None) -> int | None:
    if gpu_memory is None:
        return None
    size = gpu_memory if isinstance(gpu_memory, int) and not isinstance(gpu_memory, bool) else parse_bytes(gpu_memory)  # type: ignore[arg-type]
    if size < LEAST_MEMORY:
        raise ValueError(f"`gpu_memory` {gpu_memory!r} means {size} bytes, too few: add a unit, as in '24GiB'.")
    return size
