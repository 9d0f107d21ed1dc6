"""Clipping of updates by their root mean square, as in Adafactor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import lightning_memopt as lm
from tests._attempt import attempt
from tests._ranks import run_ranks
from tests.optim._sharded import assert_same_wholes, fill, named, plain, sharded

CLIP = 0.01


def moved(recipe, *, clip=None, dtype=torch.float32, **options):
    """Return the change of every weight in the first step, for a learning rate of 1."""
    params = {name: nn.Parameter(param.detach().to(dtype)) for name, param in plain().items()}
    before = {name: param.detach().clone() for name, param in params.items()}
    optimizer = lm.MemOpt(named(params), recipe, lr=1.0, clip_update=clip, **options)
    fill(whole := plain(), 1)
    for name, param in params.items():
        param.grad = whole[name].grad.to(dtype)
    optimizer.step()
    return {
        name: (param.detach() - before[name]).double() for name, param in params.items() if param.numel()
    }, optimizer


def rms(value):
    return float(value.square().mean().sqrt())


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_updates_are_scaled_by_block(recipe):
    """In the direction of the update without it, by one factor per block, and only where that is too long."""
    dtype = torch.float64
    found, optimizer = moved(recipe, clip=CLIP, dtype=dtype)
    plain_moves, _ = moved(recipe, dtype=dtype)
    fused = {block.name.partition(":")[0] for _, _, block in optimizer.blocks() if block.prefix}
    clipped = 0
    for name, move in found.items():
        if name in fused:  # several blocks, each with a factor of its own
            continue
        expected = plain_moves[name] * min(1.0, CLIP / max(rms(plain_moves[name]), 1e-300))
        torch.testing.assert_close(move, expected, rtol=1e-9, atol=1e-12, msg=name)
        clipped += rms(plain_moves[name]) > CLIP
        assert rms(move) <= CLIP * (1 + 1e-9), name
    assert clipped > 5


def test_parts_of_a_fused_weight_are_clipped_apart():
    weight = nn.Parameter(torch.zeros(12, 4, dtype=torch.float64))
    optimizer = lm.MemOpt([("attention.in_proj_weight", weight)], "adafactor", lr=1.0, clip_update=CLIP)
    assert len(list(optimizer.blocks())) == 3
    weight.grad = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).double()
    optimizer.step()
    assert all(rms(part) == pytest.approx(CLIP, rel=1e-6) for part in weight.detach().split(4))


def test_a_spike_moves_no_more_than_any_other_step():
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = lm.MemOpt([("mlp.up_proj.weight", weight)], "adafactor", lr=1.0, clip_update=1.0, betas=(0.0, 0.999))
    for step in range(20):
        weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step)) * (1000 if step == 19 else 1)
        before = weight.detach().clone()
        optimizer.step()
    assert 0.5 < rms(weight.detach() - before) <= 1 + 1e-5


def test_an_update_of_zero_stays_zero():
    weight = nn.Parameter(torch.ones(8, 8))
    optimizer = lm.AdaPMLean([("mlp.up_proj.weight", weight)], lr=1.0, clip_update=1.0)
    weight.grad = torch.zeros(8, 8)
    optimizer.step()
    assert torch.equal(weight, torch.ones(8, 8))


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "1"])
def test_invalid_bounds(value):
    with pytest.raises(ValueError, match="`clip_update` must be a positive number"):
        lm.AdaPMLean([("mlp.up_proj.weight", nn.Parameter(torch.ones(8, 8)))], clip_update=value)


# --- on several ranks ------------------------------------------------------------------------------------------------


def after_steps(params: dict[str, nn.Parameter], recipe: str) -> dict[str, nn.Parameter]:
    optimizer = lm.MemOpt(named(params), recipe, lr=0.1, clip_update=CLIP)
    for step in (1, 2):
        fill(params, step)
        optimizer.step()
    return params


def compare(mesh: DeviceMesh, recipe: str) -> None:
    expected = {name: param.detach() for name, param in after_steps(plain(), recipe).items()}
    assert_same_wholes(after_steps(sharded(mesh), recipe), expected, tolerance=1e-5)


def on_a_rank(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for label, shape in {"two": (2,), "three": (3,), "hybrid": (2, 2)}.items():
        mesh = DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape))
        if mesh.get_coordinate() is None:
            continue
        for recipe in ("adamw", "adapm_lean", "adam_snsm", "adam_mini", "muon_lean"):
            found[f"{label}, {recipe}"] = attempt(compare, mesh, recipe)
    dist.barrier()
    return found


@pytest.mark.slow
def test_ranks_clip_as_one_process():
    results = run_ranks(on_a_rank, 4)
    assert not [(rank, key, error) for rank, result in enumerate(results) for key, error in result.items() if error]
    assert len(results[0]) == 15
