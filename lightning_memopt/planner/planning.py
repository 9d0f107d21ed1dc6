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

from lightning_memopt.memory.sizes import parse_bytes
from lightning_memopt.memory.snapshot import Snapshot
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.optim.weights import weight_bits
from lightning_memopt.planner.activations import activations_of
from lightning_memopt.planner.architectures import find_model
from lightning_memopt.planner.memory_plan import ADAMW, MemoryPlan, RecipeMemory
from lightning_memopt.planner.planned import PlannedMesh, outline
from lightning_memopt.planner.scratch import step_scratch
from lightning_memopt.planner.settings import RunSettings
from lightning_memopt.planner.sharding import Sharding
from lightning_memopt.plans.plan import Plan
from lightning_memopt.plans.recipes import load_plan, recipe_names
from lightning_memopt.plans.roles import names_without_role
from lightning_memopt.sharding.tensors import local_tensor

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
    replicate_size: int = 1,
    cpu_offload: bool = False,
    averaged: bool = False,
    batch: tuple[int, int] | None = None,
    activation_checkpointing: bool = False,
) -> MemoryPlan:
    """Return the memory of the rank that holds the most, with AdamW and with recipes.

    No memory is allocated. The optimizer is built on the meta device, with parameters that are sharded and wrapped as
    in ``strategy="memopt_fsdp"``. So its state has exactly the bytes of a real run.

    Args:
        model: A name of ``lightning_memopt.planner.skeletons.model_names``; the path of a transformers
            configuration (``config.json``), or of the folder that holds it; or a module, which does not change.
        recipe: A recipe's name, the path or content of a recipe file, a plan, or a list of these. None means all named
            recipes.
        world_size: Number of ranks. With one rank, nothing is sharded, as with ``strategy="auto"``.
        gpu_memory: Memory of one device, such as "24GiB", or in bytes.
        precision: ``32-true`` and ``bf16-mixed`` keep parameters in the dtype of the module, which is float32 by
            default. ``bf16-true`` converts parameters, and so gradients and AdamW's state, but not that of recipes.
        gradient_release: Whether recipes release gradients in the backward pass, as the strategy's option does.
        master_weight_bits: Bits that recipes keep of every bfloat16 weight, as ``MemOpt`` takes it.
        replicate_size: Number of replicas of the sharded model, as the strategy takes it.
        cpu_offload: Whether parameters, gradients and optimizer state are in CPU memory, as the strategy takes it.
        averaged: Whether a callback such as Lightning's ``WeightAveraging`` keeps an average of the parameters.
        batch: Sequences and tokens per sequence on a rank, for activations. The model must be, or hold, a language
            model of transformers, which runs on fake tensors.
        activation_checkpointing: Whether the activations of blocks are recomputed, as the strategy takes it. It needs
            ``batch``.

    Raises:
        ValueError: If a name, a size or the precision is invalid; the message says which values are valid.
        TypeError: If an argument has the wrong type.
        FileNotFoundError: If a path does not exist.
        ImportError: If a configuration file is given and transformers is missing.

    Example:
        >>> plan = plan_memory("llama-130m", ["adam_mini", "adapm_lean"], world_size=2, gpu_memory="1GiB")
        >>> plan.parameters, plan.row("adapm_lean").state_bytes, plan.first_fit
        (134105856, 12108800, 'adapm_lean')
    """
    settings = RunSettings(
        world_size=world_size,
        replicate_size=replicate_size,
        precision=precision,
        gradient_release=gradient_release,
        master_weight_bits=master_weight_bits,
        cpu_offload=cpu_offload,
        averaged=averaged,
        batch=batch,
        activation_checkpointing=activation_checkpointing,
    )
    if activation_checkpointing and batch is None:
        raise ValueError(
            "`activation_checkpointing` changes activations only, which are planned for a `batch`: add one, such as "
            "`batch=(4, 512)`."
        )
    name, module = find_model(model)
    found = candidates(recipe, master_weight_bits=master_weight_bits)
    return plan_module(module, found, settings, name=name, gpu_memory=gpu_memory)


def sweep_memory(
    model: ModelT,
    recipe: RecipeT | Sequence[RecipeT] | None = None,
    *,
    world_sizes: Iterable[int] = (1, 2, 4, 8, 16, 32, 64),
    gpu_memory: str | int | None = None,
    **options: Any,
) -> tuple[MemoryPlan, ...]:
    """Return one plan per number of ranks that the replicas divide.

    ``options`` are the other arguments of :func:`plan_memory`.
    """
    name, module = find_model(model)
    replicas = options.get("replicate_size", 1)
    sizes = [size for size in world_sizes if replicas < 1 or size % replicas == 0]
    settings = [RunSettings(world_size=size, **options) for size in sizes]
    found = candidates(recipe, master_weight_bits=settings[0].master_weight_bits) if settings else []
    return tuple(plan_module(module, found, each, name=name, gpu_memory=gpu_memory) for each in settings)


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
    settings: RunSettings,
    *,
    name: str,
    rank: int = 0,
    gpu_memory: str | int | None = None,
) -> MemoryPlan:
    """Return the plan for one rank. If a dimension is sharded unevenly, the first ranks hold more than the last.

    Args:
        module: The model, which does not change.
        optimizers: The optimizers to compare, in addition to AdamW. They are created with the same number of
            ``master_weight_bits`` as the settings say.
        settings: The settings of the run.
        name: The name of the model.
        rank: The rank, among those that share one copy of the parameters.
        gpu_memory: See :func:`plan_memory`.

    Raises:
        ValueError: As for :func:`plan_memory`, and if the module has no parameters, or parameters without a shape.
    """
    _check(module)
    capacity = _capacity(gpu_memory)
    sharding = Sharding.of(module, name, PlannedMesh(settings.shards, rank), settings)
    twins = {param: sharding.planned(param) for param in sharding.params}
    copy, grads = outline(module, twins.__getitem__), outline(module, sharding.planned)
    for param, grad in zip(copy.parameters(), grads.parameters(), strict=True):
        param.grad = grad if param.requires_grad else None
    parameters, loose = sharding.stored(sharding.params), sharding.loose
    buffers = sum(buffer.numel() * sharding.dtype(buffer).itemsize for buffer in module.buffers())
    # A strategy makes the average in the dtype that parameters have before they are converted.
    average = sum(sharding.numbers(each) * each.itemsize for each in sharding.params) if settings.averaged else 0
    unsharded = sharding.unsharded()
    activations = None if settings.batch is None else activations_of(module, name, settings, set(sharding.outer))
    passing = unsharded if activations is None else sharding.passing(activations)
    gradients, kept = (sharding.held_gradients(release=release) for release in (False, settings.gradient_release))
    adamw = sum(2 * local_tensor(param).nbytes for param in copy.parameters() if param.requires_grad)
    # With CPU offloading, what is not sharded stays on the device, with gradients and at most AdamW's state.
    stays = sharding.stored(loose) + 3 * sharding.stored(param for param in loose if param.requires_grad)

    def row(label: str, state: int, grads: int, scratch: int, rates: tuple[str, ...] = ()) -> RecipeMemory:
        held = parameters + average + state + grads
        # With release, steps are a part of the backward pass.
        releases = settings.gradient_release and label != ADAMW
        total, host = held + buffers + max(passing + scratch * releases, scratch), 0
        if settings.cpu_offload:
            total, host = buffers + passing + stays, held + scratch
        left = None if capacity is None else capacity - total
        saved = 1 - state / adamw if adamw else 0.0
        fits = None if left is None else left > 0
        return RecipeMemory(label, state, total, saved, grads, scratch, host, left, fits, rates)

    released = sharding.updated_together if settings.gradient_release else []
    units: list[set[Tensor]] = [{twins[param] for param in unit} for unit in released]
    rows = [row(ADAMW, adamw, gradients, 0)]
    for entry in optimizers:
        optimizer = entry.build(list(copy.parameters()))
        optimizer.bind(copy)  # names and heads come first, so that state is created once
        facts = optimizer.snapshot()
        rows.append(row(entry.label, facts.local_bytes, kept, step_scratch(optimizer, units), _rates(facts)))
    return MemoryPlan(
        model=name,
        parameters=sum(param.numel() for param in sharding.params),
        world_size=settings.world_size,
        replicate_size=settings.replicate_size,
        precision=settings.precision,
        gradient_release=settings.gradient_release,
        master_weight_bits=settings.master_weight_bits,
        cpu_offload=settings.cpu_offload,
        gpu_memory=capacity,
        parameter_bytes=parameters,
        buffer_bytes=buffers,
        averaged_bytes=average,
        gradient_bytes=gradients,
        counter_bytes=torch.float32.itemsize * sum(param.requires_grad for param in sharding.params),
        unsharded_bytes=unsharded,
        sharded=not settings.alone,
        activation_bytes=None if activations is None else activations.peak,
        batch=settings.batch,
        activation_checkpointing=settings.activation_checkpointing,
        matrices=sum(param.ndim > 1 for param in sharding.params),
        unknown=tuple(names_without_role(module)),
        rows=tuple(rows),
    )


def _rates(snapshot: Snapshot) -> tuple[str, ...]:
    """Return in words how the rates of blocks differ from those of their parameter groups."""
    counts = Counter((block.rates, block.role) for block in snapshot.blocks if block.rates)
    return tuple(f"{rates} in {count} {role} block{'s' * (count > 1)}" for (rates, role), count in counts.items())


def _check(module: nn.Module) -> None:
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
