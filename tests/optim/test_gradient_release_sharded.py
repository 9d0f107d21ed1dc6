"""Gradient release under FSDP2: the updates of an ordinary step, at every number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import lightning_memopt as lm
from tests._attempt import attempt
from tests._compare import assert_equal
from tests._models import tiny_llama
from tests._ranks import run_ranks

pytestmark = pytest.mark.slow

MESHES = {"one": (1,), "two": (2,), "three": (3,), "hybrid": (2, 2)}
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "adamw": ("adamw", torch.float32, {}),
    "adapm_lean": ("adapm_lean", torch.float32, {}),
    "adam_snsm": ("adam_snsm", torch.float32, {"gap": 2}),
    "bfloat16": ("adapm_lean", torch.bfloat16, {"master_weight_bits": 24}),
}


def sharded(mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_llama().to(dtype)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(mesh: DeviceMesh, case: str, *, release: bool) -> lm.MemOpt:
    """Return an optimizer after three steps on batches that differ between ranks."""
    recipe, dtype, options = CASES[case]
    model = sharded(mesh, dtype)
    optimizer = lm.MemOpt(model.named_parameters(), recipe, lr=1e-2, weight_decay=0.1, **options)
    if release:
        optimizer.release_gradients(model)
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + mesh.get_rank())
        ids = torch.randint(0, 64, (2, 8), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        if release:
            assert all(param.grad is None for param in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def compare(mesh: DeviceMesh, case: str) -> None:
    found, expected = (trained(mesh, case, release=release).full_weights() for release in (True, False))
    tolerance = {"rtol": 2**-13, "atol": 1e-5} if case == "bfloat16" else {"rtol": 1e-5, "atol": 1e-6}
    for name, weight in found.items():
        one, other = weight.to_local(), expected[name].to_local()
        if case == "adamw":
            assert_equal(one, other, name)
        else:  # batches of other sizes add up in another order
            torch.testing.assert_close(one, other, **tolerance, msg=name)


def unusable(mesh: DeviceMesh) -> None:
    """All ranks raise in the step, and train on."""
    model = sharded(mesh, torch.float32)
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-2)
    optimizer.release_gradients(model)
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    for step in range(3):
        bad = step == 1 and mesh.get_local_rank() == 0
        (model(input_ids=ids, labels=ids).loss * (float("nan") if bad else 1.0)).backward()
        if step == 1:
            with pytest.raises(FloatingPointError, match="model.layers.1"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())


def on_a_rank(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for label, shape in MESHES.items():
        names = ("replicate", "shard")[-len(shape) :]
        mesh = DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape), mesh_dim_names=names)
        if mesh.get_coordinate() is None:
            continue
        for case in CASES:
            found[f"{label}, {case}"] = attempt(compare, mesh, case)
        if label == "two":
            found[f"{label}, unusable"] = attempt(unusable, mesh)
    found["not sharded"] = attempt(refused)
    return found


def refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="on 4 processes needs sharded parameters, and LlamaForCausalLM has none"):
        lm.AdaPMLean(model.named_parameters()).release_gradients(model)


def test_ranks_update_what_an_ordinary_step_does():
    results = run_ranks(on_a_rank, 4)
    assert not [(rank, key, error) for rank, result in enumerate(results) for key, error in result.items() if error]
    assert len(results[0]) == len(MESHES) * len(CASES) + 2
