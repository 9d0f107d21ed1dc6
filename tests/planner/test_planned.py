"""What is planned is what runs: every rank's bytes, of a model that the strategy's own functions have sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")

import lightning_memopt as lm
from lightning_memopt.memory.storages import Storages
from lightning_memopt.planner.memory_plan import ADAMW
from lightning_memopt.planner.planned import PlannedMesh
from lightning_memopt.planner.planning import candidates, plan_module
from lightning_memopt.planner.settings import RunSettings
from lightning_memopt.planner.sharding import Sharding as PlannedSharding
from lightning_memopt.sharding.wrapping import find_units
from lightning_memopt.strategy.model.shard import Sharding, shard
from tests._models import LENGTH, VOCAB, tiny_gpt2, tiny_llama
from tests._ranks import run_ranks

pytestmark = pytest.mark.slow

SOME = ("adapm_mini", "adapm_lean", "adam_snsm")


def cases(world: int) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return models, precisions and recipes: all recipes on two ranks."""
    return [
        ("llama", "32-true", tuple(lm.recipe_names()) if world == 2 else SOME),
        ("llama", "bf16-true", SOME),
        ("llama", "bf16-mixed", SOME),
        ("gpt2", "32-true", SOME),
    ]


class Held(nn.Module):
    """Stands for a LightningModule: a model, and a parameter of its own, which is in no unit."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.temperature = nn.Parameter(torch.ones(5))

    def training_step(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss * self.temperature.sum()


def held(name: str) -> Held:
    """Return a model whose sides 2 and 3 ranks do not divide evenly, or one with fused, tied and frozen weights."""
    if name == "llama":
        return Held(tiny_llama(hidden=40, intermediate=41, layers=2))
    module = Held(tiny_gpt2())
    module.model.transformer.wpe.weight.requires_grad_(False)
    return module


def state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for entry in optimizer.state.values() for key, value in entry.items() if key != "step"]


def measured(rank: int, world: int) -> list[dict[str, Any]]:
    """Return what this rank holds in every case."""
    found = []
    for name, precision, recipes in cases(world):
        module = held(name)
        mesh = init_device_mesh("cpu", (world,))
        sharding = Sharding(mesh, precision, False, torch.device("cpu"), None)
        shard(module, find_units(module), sharding)
        tokens = torch.randint(0, VOCAB, (2, LENGTH))
        module.training_step(tokens).backward()
        params = list(module.parameters())
        adamw = torch.optim.AdamW(params)
        adamw.step()
        entry: dict[str, Any] = {
            "parameters": Storages().count(params),
            "gradients": Storages().count(param.grad for param in params if param.grad is not None),
            ADAMW: Storages().count(state(adamw)),
            "whole": _unsharded(module),
        }
        for recipe in recipes:
            optimizer = lm.MemOpt(module.parameters(), recipe=recipe)
            optimizer.bind(module)
            entry[recipe] = (optimizer.snapshot().local_bytes, Storages().count(state(optimizer)))
        found.append(entry)
    return found


def _unsharded(module: nn.Module) -> int:
    """Return the bytes of the parameters of the largest unit while they are gathered."""
    most = 0
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.unshard()
            group = unit._get_fsdp_state()._fsdp_param_group
            whole = [tensor for param in group.fsdp_params for tensor in param.all_gather_outputs]
            most = max(most, Storages().count(whole))
            unit.reshard()
    return most


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_holds_what_was_planned(world):
    found = run_ranks(measured, world)
    assert found[0][0][ADAMW] > found[-1][0][ADAMW]
    for position, (name, precision, recipes) in enumerate(cases(world)):
        for rank in range(world):
            settings = RunSettings(world, precision=precision)
            plan = plan_module(held(name), candidates(recipes), settings, name=name, rank=rank)
            sharding = PlannedSharding.of(held(name), name, PlannedMesh(world, rank), settings)
            entry = found[rank][position]
            assert plan.parameter_bytes == entry["parameters"]
            assert plan.gradient_bytes == entry["gradients"]
            assert max(map(sharding.gathered, sharding.own.values())) == entry["whole"]
            assert plan.row(ADAMW).state_bytes == entry[ADAMW]
            assert {recipe: (plan.row(recipe).state_bytes,) * 2 for recipe in recipes} == {
                recipe: entry[recipe] for recipe in recipes
            }
