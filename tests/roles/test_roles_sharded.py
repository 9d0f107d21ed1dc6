"""Fused weights on several ranks: trained, and continued from state that other numbers of ranks saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import lightning_memopt as lm
from lightning_memopt.plans.placement import shard_dims
from tests._attempt import attempt
from tests._compare import relative_error
from tests._ranks import run_ranks
from tests.kinds.contract.cases import gradient
from tests.roles._models import CASES

pytestmark = pytest.mark.slow

# Per head, per group of heads, in stripes, stacked with fewer keys than queries, latent.
NAMES = ("bloom", "falcon_40b", "codegen", "phi3", "deepseek_v3", "qwen3_next")
MODELS = {case.name: case for case in CASES if case.name in NAMES}
MESHES = {"two": (2,), "three": (3,), "two by two": (2, 2)}
TOLERANCE = 1e-5
STEPS = 3


def optimizer_of(model: nn.Module, recipe: str) -> lm.MemOpt:
    optimizer = lm.MemOpt(model.named_parameters(), recipe, lr=1e-2, weight_decay=0.1)
    optimizer.bind(model)
    return optimizer


def shard(model: nn.Module, mesh: DeviceMesh, *, by_rows: bool) -> None:
    """Replace parameters by sharded ones: along the dimensions that the strategy chooses, or all along the first.

    Three ranks divide none of the widths, so that they cut heads either way.
    """
    dims = shard_dims(model, mesh.size(mesh.ndim - 1))
    found: dict[Tensor, nn.Parameter] = {}  # tied weights stay tied
    for module in list(model.modules()):
        for name, param in list(module.named_parameters(recurse=False)):
            dim = 0 if by_rows else dims.get(param, 0)
            placements = [Replicate()] * (mesh.ndim - 1) + [Shard(dim)]
            value = distribute_tensor(param.detach(), mesh, placements, src_data_rank=None)
            module._parameters[name] = found.setdefault(param, nn.Parameter(value))


def step(model: nn.Module, optimizer: lm.MemOpt, number: int) -> None:
    for place, param in enumerate(model.parameters()):
        grad = gradient(tuple(param.shape), 1000 * number + place, scale=1e-2)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
        param.grad = grad
    optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def saved(optimizer: lm.MemOpt) -> dict[str, Any]:
    """Return the state dict with whole tensors, as one file holds them."""
    found = optimizer.state_dict()
    state = {place: {key: whole(value) for key, value in entries.items()} for place, entries in found["state"].items()}
    return {**found, "state": state}


def compare(mesh: DeviceMesh, name: str, recipe: str, by_rows: bool) -> None:
    alone, sharded = MODELS[name].build(), MODELS[name].build()
    shard(sharded, mesh, by_rows=by_rows)
    one, many = optimizer_of(alone, recipe), optimizer_of(sharded, recipe)
    for number in range(1, STEPS):
        step(alone, one, number)
        step(sharded, many, number)
    same(alone, sharded, "trained")
    before, after = saved(one), saved(many)
    one.load_state_dict(after)
    many.load_state_dict(before)
    step(alone, one, STEPS)
    step(sharded, many, STEPS)
    same(alone, sharded, "continued from each other's state")


def same(alone: nn.Module, sharded: nn.Module, when: str) -> None:
    for (name, expected), param in zip(alone.named_parameters(), sharded.parameters(), strict=True):
        error = relative_error(whole(param), expected.detach())
        assert error <= TOLERANCE, f"{when}: {name} {tuple(expected.shape)} {param.placements}: {error:.1e}"


def on_a_rank(rank: int, world: int) -> dict[str, Any]:
    found = {}
    for label, shape in MESHES.items():
        mesh = DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape))
        if mesh.get_coordinate() is None:
            continue
        # Rows are cut where the strategy would not.
        cases = [(recipe, False) for recipe in ("adapm_mini", "adapm_lean", "adam_snsm")] if label == "two" else []
        for name in MODELS:
            for recipe, by_rows in [*cases, ("adapm_lean", True)]:
                key = f"{label}, {name}, {recipe}, {'rows' if by_rows else 'chosen'}"
                found[key] = attempt(compare, mesh, name, recipe, by_rows)
    return found


def test_fused_weights_are_the_same_on_every_number_of_ranks():
    outcomes = run_ranks(on_a_rank, 4, timeout=200)
    wrong = {f"rank {rank}: {key}": text for rank, found in enumerate(outcomes) for key, text in found.items() if text}
    assert len(outcomes[0]) == 6 * len(MODELS) == 6 * len(NAMES)
    assert not wrong, "\n".join(f"{key}\n{text}" for key, text in list(wrong.items())[:3])
