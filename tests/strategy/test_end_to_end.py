"""Training on more ranks differs as little as with DDP and AdamW: by the order of sums in the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import lightning_memopt as lm
from lightning_memopt.plans.placement import shard_dims
from lightning_memopt.sharding.wrapping import find_units
from tests._models import LENGTH, VOCAB, tiny_llama
from tests._ranks import run_ranks
from tests.strategy._training import whole_weights

pytestmark = pytest.mark.slow

STEPS, BATCH, LR = 4, 12, 1e-3
FLOOR = torch.finfo(torch.float32).eps  # smaller differences between weights are no differences
SIZES = (1, 2, 3, 4)
RECIPES = lm.recipe_names()
Weights = dict[str, Tensor]


def llama() -> nn.Module:
    """Return a LLaMA with sides that 3 and 4 ranks do not divide evenly."""
    return tiny_llama(hidden=24, intermediate=41, layers=1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh, average: bool) -> Weights:
    """Take all steps on batches that the ranks of a mesh share; return the whole weights."""
    rank, count = mesh.get_local_rank(), mesh.size()
    for step in range(STEPS):
        tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
        mine = tokens.chunk(count)[rank]
        optimizer.zero_grad()
        model(input_ids=mine, labels=mine, use_cache=False).loss.backward()
        for param in model.parameters() if average else ():  # as DDP does
            dist.all_reduce(param.grad.div_(count), group=mesh.get_group())
        optimizer.step()
    return whole_weights(model)


def sharded(mesh: DeviceMesh) -> nn.Module:
    """Return the model as the strategy shards it."""
    model = llama()
    root = nn.ModuleList([model])
    dims = shard_dims(root, mesh.size())
    for unit in find_units(root):
        fully_shard(unit.module, mesh=mesh, shard_placement_fn=lambda param: Shard(dims[param]))
    return model


def with_ddp(mesh: DeviceMesh) -> Weights:
    model = llama()
    return train(model, torch.optim.AdamW(model.parameters(), lr=LR), mesh, average=True)


def with_recipe(recipe: str) -> Callable[[DeviceMesh], Weights]:
    def run(mesh: DeviceMesh) -> Weights:
        model = sharded(mesh)
        optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe, lr=LR)
        return train(model, optimizer, mesh, average=False)

    return run


def distance(one: Weights, two: Weights) -> float:
    """Return the norm of the difference over the norm, over all weights together."""
    difference = sum(float((one[name].double() - two[name].double()).square().sum()) for name in two)
    return (difference / sum(float(value.double().square().sum()) for value in two.values())) ** 0.5


def on_a_rank(rank: int, world: int) -> dict[str, list[float]]:
    """Return, for DDP and every recipe, how far each world size is from one rank."""
    meshes = [DeviceMesh("cpu", torch.arange(size)) for size in SIZES]
    runs: dict[str, Any] = {"DDP": with_ddp, **{recipe: with_recipe(recipe) for recipe in RECIPES}}
    found: dict[str, list[float]] = {}
    for name, run in runs.items():
        alone = run(meshes[0]) if rank == 0 else None
        for mesh in meshes[1:]:
            if mesh.get_coordinate() is not None:
                weights = run(mesh)
                if alone is not None:
                    found.setdefault(name, []).append(distance(weights, alone))
    return found


@pytest.fixture(scope="module")
def distances() -> dict[str, list[float]]:
    return run_ranks(on_a_rank, 4, timeout=240)[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_world_sizes_differ_as_little_as_with_ddp(distances, recipe):
    for size, mine, theirs in zip(SIZES[1:], distances[recipe], distances["DDP"], strict=True):
        assert mine <= 3 * max(theirs, FLOOR), f"{size} ranks: {mine:.1e}, DDP with AdamW {theirs:.1e}"
