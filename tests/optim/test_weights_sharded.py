"""bfloat16 weights on several ranks: the same bits, and the same rounding, as on one."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import lightning_memopt as lm
from lightning_memopt.optim.weights import LOW_BITS
from tests._attempt import attempt
from tests._ranks import run_ranks
from tests.optim._sharded import grad_of, named, plain, sharded

pytestmark = pytest.mark.slow

STEPS = (1, 2, 3)
MESHES = {"two": (2,), "three": (3,), "hybrid": (2, 2)}
RECIPES = ("adapm_lean", "adam_snsm", "muon_lean")
BITS = (16, 24, 32)


def halved(params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(param.detach().bfloat16()) for name, param in params.items()}


def take(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], steps: tuple[int, ...]) -> None:
    for step in steps:
        for number, param in enumerate(params.values()):
            where = (param.device_mesh, param.placements) if isinstance(param, DTensor) else (None, None)
            param.grad = grad_of(tuple(param.shape), step, number, *where).bfloat16()
        optimizer.step()


def build(params: dict[str, nn.Parameter], recipe: str, bits: int) -> lm.MemOpt:
    return lm.MemOpt(named(params), recipe, lr=1e-2, weight_decay=0.1, master_weight_bits=bits)


def trained(recipe: str, bits: int) -> lm.MemOpt:
    params = halved(plain())
    optimizer = build(params, recipe, bits)
    take(optimizer, params, STEPS)
    return optimizer


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Sums over ranks differ in their last bits, which moves few numbers across a bound of rounding."""
    others = total = 0
    for name, weight in found.items():
        assert isinstance(weight, DTensor)
        whole = weight.full_tensor()
        torch.testing.assert_close(whole, expected[name], rtol=2**-6, atol=1e-6, msg=name)
        others += int((whole - expected[name]).abs().gt(1e-6 + expected[name].abs() * 2**-14).sum())
        total += whole.numel()
    assert others <= 1e-3 * total, f"{others} of {total} differ"


def on_a_rank(rank: int, world: int, expected: bytes) -> dict[str, Any]:
    wanted, found = pickle.loads(expected), {}
    for label, shape in MESHES.items():
        mesh = DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape))
        if mesh.get_coordinate() is None:
            continue
        for recipe in RECIPES:
            for bits in BITS:
                found[f"{label}, {recipe}, {bits} bits"] = attempt(compare, mesh, recipe, bits, wanted[recipe, bits])
        found[f"{label}, rebinding"] = attempt(rebinding, mesh, wanted["adapm_lean", 24])
    return found


def compare(mesh: DeviceMesh, recipe: str, bits: int, expected: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """The same weights after all steps, and after a resume from the state of one process."""
    params = halved(sharded(mesh))
    optimizer = build(params, recipe, bits)
    take(optimizer, params, STEPS)
    assert_same(optimizer.full_weights(), expected[0])
    for param in params.values():
        state = optimizer.state[param]
        assert (LOW_BITS in state) == (bits > 16)
        if bits > 16:
            assert state[LOW_BITS].placements == param.placements
            assert state[LOW_BITS].to_local().shape == param.to_local().shape
    again = build(params, recipe, bits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lm.ResumeWarning)
        again.load_state_dict(copy.deepcopy(expected[1]))
    assert_same(again.full_weights(), expected[0])


def rebinding(mesh: DeviceMesh, expected: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """Parameters are sharded after two steps, and the bits with them."""
    whole = halved(plain())
    optimizer = build(whole, "adapm_lean", 24)
    take(optimizer, whole, STEPS[:2])
    params = halved(sharded(mesh))
    for name, param in whole.items():
        placed = torch.distributed.tensor.distribute_tensor(
            param.detach(), mesh, params[name].placements, src_data_rank=None
        )
        params[name].to_local().data.copy_(placed.to_local())
    optimizer.rebind({param: params[name] for name, param in whole.items()})
    take(optimizer, params, STEPS[2:])
    assert_same(optimizer.full_weights(), expected[0])


def test_ranks_keep_and_round_the_same_bits():
    wanted = {}
    for recipe in RECIPES:
        for bits in BITS:
            optimizer = trained(recipe, bits)
            wanted[recipe, bits] = optimizer.full_weights(), optimizer.state_dict()
    results = run_ranks(on_a_rank, 4, pickle.dumps(wanted))
    assert not [(rank, key, error) for rank, result in enumerate(results) for key, error in result.items() if error]
    assert len(results[0]) == len(MESHES) * (len(RECIPES) * len(BITS) + 1)
