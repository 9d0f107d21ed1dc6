"""Ranks that disagree about gradients: an error on all of them that says who and what, nothing changed, and go on."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import lightning_memopt as lm
from lightning_memopt.sharding import consensus
from lightning_memopt.sharding.tensors import local_tensor
from tests._compare import assert_equal, relative_error
from tests._ranks import run_ranks
from tests._traffic import Traffic
from tests.kinds.contract.cases import gradient

pytestmark = pytest.mark.slow

# The fourth rank holds nothing of the matrix with three rows.
SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.self_attn.q_proj.weight": (8, 10),
    "model.layers.0.mlp.up_proj.weight": (3, 7),
    "model.layers.0.input_layernorm.weight": (10,),
}
QUERY = "model.layers.0.self_attn.q_proj.weight"
MESHES = {"four": (4,), "three": (3,), "hybrid": (2, 2)}


def sharded(mesh: DeviceMesh | None) -> dict[str, nn.Parameter]:
    values = {name: gradient(shape, number) for number, (name, shape) in enumerate(SHAPES.items())}
    return {name: nn.Parameter(cut(value, mesh)) for name, value in values.items()}


def cut(value: Tensor, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return value
    return distribute_tensor(value, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)], src_data_rank=None)


def fill(params: dict[str, nn.Parameter], mesh: DeviceMesh | None, step: int) -> None:
    for number, param in enumerate(params.values()):
        param.grad = cut(gradient(tuple(param.shape), 100 * step + number, scale=1e-2), mesh)


def last(mesh: DeviceMesh) -> int:
    """Return the rank that has something else than the others: the last one, which is one replica of two."""
    return int(mesh.mesh.flatten()[-1])


def is_odd(mesh: DeviceMesh) -> bool:
    return dist.get_rank() == last(mesh)


@contextmanager
def unchanged(optimizer: lm.MemOpt, params: dict[str, nn.Parameter]) -> Iterator[None]:
    """Check that weights, states and gradients stay, and that the ranks can still talk to each other."""

    def now() -> Any:
        states = [{key: local_tensor(value).clone() for key, value in s.items()} for s in optimizer.state.values()]
        grads = [None if param.grad is None else local_tensor(param.grad).clone() for param in params.values()]
        return [local_tensor(param.detach()).clone() for param in params.values()], states, grads

    before = now()
    yield
    assert_equal(now(), before)


def goes_on(optimizer: lm.MemOpt, params: dict[str, nn.Parameter], mesh: DeviceMesh, steps: int) -> None:
    """Take the next step together; all steps give the weights of one process that took the same."""
    reference = sharded(None)
    other = type(optimizer)(reference.items(), lr=1e-2)
    for step in range(1, steps + 2):
        fill(reference, None, step)
        other.step()
    fill(params, mesh, steps + 1)
    optimizer.step()
    for name, param in params.items():
        assert relative_error(param.full_tensor().detach(), reference[name].detach()) < 1e-5, name


# --- on the ranks ----------------------------------------------------------------------------------------------------


def a_gradient_that_one_rank_lacks(mesh: DeviceMesh) -> None:
    for make in (lm.AdaPMLean, lm.AdamMini, lm.AdamSNSM):
        params = sharded(mesh)
        optimizer = make(params.items(), lr=1e-2)
        fill(params, mesh, 1)
        optimizer.step()
        fill(params, mesh, 2)
        if is_odd(mesh):
            params[QUERY].grad = None
        others = [rank for rank in mesh.mesh.flatten().tolist() if rank != last(mesh)]
        text = rf"a gradient: '{QUERY}' has one on rank {max(others)} and none on rank {last(mesh)}\. Weights and state"
        with unchanged(optimizer, params), pytest.raises(RuntimeError, match=text):
            optimizer.step()
        goes_on(optimizer, params, mesh, 1)


def a_rank_without_any_gradient(mesh: DeviceMesh) -> None:
    params = sharded(mesh)
    optimizer = lm.AdaPMLean(params.items(), lr=1e-2)
    fill(params, mesh, 1)
    if is_odd(mesh):
        optimizer.zero_grad()
    with unchanged(optimizer, params), pytest.raises(RuntimeError, match="embed_tokens.*q_proj.*up_proj.*layernorm"):
        optimizer.step(lambda: torch.zeros(()))
    goes_on(optimizer, params, mesh, 0)
    optimizer.zero_grad()
    with unchanged(optimizer, params), Traffic() as traffic:
        optimizer.step()
    assert dict(traffic.calls) == {"allreduce": 1}
    assert traffic.nbytes["allreduce"] == 4 * (4 * len(params) + 3)


def many_are_counted(mesh: DeviceMesh) -> None:
    params = {f"layers.{number}.weight": nn.Parameter(cut(torch.ones(4, 4), mesh)) for number in range(8)}
    optimizer = lm.AdaPMLean(params.items())
    if is_odd(mesh):
        fill(params, mesh, 1)
    with pytest.raises(RuntimeError, match=r"'layers\.4\.weight' has one on rank \d and none on rank \d; and 3 more"):
        optimizer.step()


def steps_are_skipped_together(mesh: DeviceMesh) -> None:
    """Also where only one replica has the infinite element."""
    params = sharded(mesh)
    optimizer = lm.AdaPMLean(params.items(), lr=1e-2, nonfinite="skip")
    fill(params, mesh, 1)
    if is_odd(mesh):
        local_tensor(params["model.embed_tokens.weight"].grad).fill_(torch.inf)
    with unchanged(optimizer, params):
        optimizer.step()
    assert optimizer.skipped == 1
    if is_odd(mesh):
        params[QUERY].grad = None
    with unchanged(optimizer, params), pytest.raises(RuntimeError, match="Ranks disagree about which parameters"):
        optimizer.step()
    assert optimizer.skipped == 1
    goes_on(optimizer, params, mesh, 0)


def what_one_rank_refuses_no_other_does(mesh: DeviceMesh) -> None:
    """A gradient that is sparse on one rank, of a parameter that is not sharded."""
    params = sharded(mesh)
    plain = nn.Parameter(torch.ones(4, 3))
    optimizer = lm.AdaPMLean([*params.items(), ("plain.weight", plain)], lr=1e-2)
    fill(params, mesh, 1)
    plain.grad = torch.ones(4, 3).to_sparse() if is_odd(mesh) else torch.ones(4, 3)
    error, text = RuntimeError, f"Rank {last(mesh)} cannot take this step; its own error says why. Weights and state"
    if is_odd(mesh):
        error, text = ValueError, "The gradient of 'plain.weight' is sparse"
    with unchanged(optimizer, params), pytest.raises(error, match=text):
        optimizer.step()
    plain.grad = torch.full((4, 3), torch.nan if is_odd(mesh) else 1.0)
    names = "plain.weight" if is_odd(mesh) else f"parameters of rank {last(mesh)} only"
    with unchanged(optimizer, params), pytest.raises(FloatingPointError, match=rf"elements in: {names}\. Weights"):
        optimizer.step()
    plain.grad = None if is_odd(mesh) else torch.ones(4, 3)  # nobody shares it
    goes_on(optimizer, params, mesh, 0)


def names_are_missed_on_all_ranks(mesh: DeviceMesh) -> None:
    params = sharded(mesh)
    optimizer = lm.AdaPMLean(params.values())
    if not is_odd(mesh):
        fill(params, mesh, 1)
    with pytest.raises(ValueError, match="bind"):
        optimizer.step()


def gradients_that_are_still_to_be_reduced(mesh: DeviceMesh) -> None:
    """To reduce them is a collective, which a rank without the gradient would not join."""
    params = sharded(mesh)
    optimizer = lm.AdaPMLean(params.items(), lr=1e-2)
    for odd in (True, False):
        fill(params, mesh, 1)
        whole = params[QUERY].grad.full_tensor()
        pending = [*params[QUERY].placements[:-1], Partial()]
        params[QUERY].grad = DTensor.from_local(whole / mesh.size(mesh.ndim - 1), mesh, pending)
        if odd and is_odd(mesh):
            params[QUERY].grad = None
        if odd:
            with unchanged(optimizer, params), pytest.raises(RuntimeError, match=f"{QUERY}' has one on rank"):
                optimizer.step()
    before = params[QUERY].full_tensor()
    optimizer.step()
    assert params[QUERY].grad.placements == params[QUERY].placements
    assert not torch.equal(params[QUERY].full_tensor(), before)


def a_parameter_that_was_frozen(mesh: DeviceMesh) -> None:
    """It gets no state on the ranks that have a gradient of it."""
    params = sharded(mesh)
    params[QUERY].requires_grad_(False)
    optimizer = lm.AdaPMLean(params.items(), lr=1e-2)
    params[QUERY].requires_grad_(True)
    fill(params, mesh, 1)
    if is_odd(mesh):
        params[QUERY].grad = None
    with unchanged(optimizer, params), pytest.raises(RuntimeError, match=f"{QUERY}' has one on rank"):
        optimizer.step()
    assert not optimizer.state.get(params[QUERY])
    goes_on(optimizer, params, mesh, 0)
    assert optimizer.state[params[QUERY]]


def several_meshes(mesh: DeviceMesh) -> None:
    """Ranks that hold other parameters, beside shared ones, hear of the trouble."""
    if mesh.ndim < 2:
        return
    row = mesh["shard"]
    params = sharded(mesh)
    own = nn.Parameter(cut(torch.ones(6, 4), row))
    # A gradient that only the ranks of one row have is fine: nothing connects the rows in this parameter.
    optimizer = lm.AdaPMLean([*params.items(), ("own.weight", own)], lr=1e-2)
    fill(params, mesh, 1)
    in_row = last(mesh) in row.mesh.flatten().tolist()
    own.grad = cut(torch.ones(6, 4), row) if in_row and not is_odd(mesh) else None
    text = "'own.weight' has one on rank 2 and none on rank 3" if in_row else "Rank 2 cannot take this step"
    with unchanged(optimizer, params), pytest.raises(RuntimeError, match=text):
        optimizer.step()
    own.grad = cut(torch.ones(6, 4), row) if in_row else None
    goes_on(optimizer, params, mesh, 0)


def a_mesh_that_is_a_part_of_the_job(mesh: DeviceMesh) -> None:
    """Where no group has all ranks of the mesh, they agree over one dimension after the other."""
    params = sharded(mesh)
    optimizer = lm.AdaPMLean(params.items(), lr=1e-2)
    with mock.patch.object(consensus, "world_size", return_value=99):
        with Traffic() as traffic:
            optimizer.step()
        assert traffic.calls["allreduce"] == mesh.ndim
        fill(params, mesh, 1)
        if is_odd(mesh):
            params[QUERY].grad = None
        with unchanged(optimizer, params), pytest.raises(RuntimeError, match=f"{QUERY}' has one on rank"):
            optimizer.step()
        goes_on(optimizer, params, mesh, 0)


def nothing_is_asked_where_nothing_is_sharded(mesh: DeviceMesh) -> None:
    for params in (
        sharded(None),
        {
            name: nn.Parameter(distribute_tensor(param.detach(), mesh, [Replicate()] * mesh.ndim, src_data_rank=None))
            for name, param in sharded(None).items()
        },
    ):
        optimizer = lm.AdaPMLean(params.items())
        for param in params.values():
            param.grad = torch.ones_like(param)
        with Traffic() as traffic:
            optimizer.step()
        assert traffic.total() == 0


def any_default_dtype(mesh: DeviceMesh) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        params = sharded(mesh)
        optimizer = lm.AdaPMLean(params.items(), lr=1e-2)
        fill(params, mesh, 1)
        if is_odd(mesh):
            optimizer.zero_grad()
        torch.set_default_dtype(dtype)
        try:
            with pytest.raises(RuntimeError, match=f"{QUERY}' has one on rank"):
                optimizer.step()
            fill(params, mesh, 1)
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)


CHECKS: list[Callable[[DeviceMesh], None]] = [
    a_gradient_that_one_rank_lacks,
    a_rank_without_any_gradient,
    many_are_counted,
    steps_are_skipped_together,
    what_one_rank_refuses_no_other_does,
    names_are_missed_on_all_ranks,
    gradients_that_are_still_to_be_reduced,
    a_parameter_that_was_frozen,
    several_meshes,
    a_mesh_that_is_a_part_of_the_job,
    any_default_dtype,
    nothing_is_asked_where_nothing_is_sharded,
]


def on_a_rank(rank: int, world: int) -> dict[str, str]:
    found = {}
    for label, shape in MESHES.items():
        names = ("replicate", "shard")[-len(shape) :]
        mesh = DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape), mesh_dim_names=names)
        for check in CHECKS if mesh.get_coordinate() is not None else ():
            key = f"{label}, {check.__name__}"
            try:
                check(mesh)
                found[key] = ""
            except (Exception, pytest.fail.Exception):
                found[key] = traceback.format_exc()
                # The others may wait until the time is up; what happened would be lost.
                print(f"rank {rank}, {key}:\n{found[key]}", flush=True)
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, str]]:
    return run_ranks(on_a_rank, 4, timeout=100)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("mesh", MESHES)
def test_on_ranks(outcomes, mesh, check):
    key = f"{mesh}, {check.__name__}"
    found = [outcome[key] for outcome in outcomes if key in outcome]
    assert len(found) == torch.Size(MESHES[mesh]).numel()
    assert not any(found), "\n".join(found)
