"""Reformat of sharded weights: as on one process, agreed upon by all ranks first, with few collectives.

One process group of four runs everything; its first two and three ranks also serve as smaller meshes.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import lightning_memopt as lm
from lightning_memopt.sharding.tensors import full_tensor, local_tensor
from tests._attempt import attempt
from tests._compare import assert_equal, relative_error
from tests._ranks import run_ranks
from tests._traffic import Traffic
from tests.kinds.contract.cases import gradient
from tests.optim._reformatting import MOMENTA, PAIRS
from tests.optim._sharded import fill, named, plain, sharded

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
MESHES = {"two": (2,), "three": (3,), "hybrid": (2, 2)}
# Which runs are done on which mesh: all of them on three ranks, which leave shards empty. The last one is `GATHERED`.
RUNS_ON = {"two": (0, 1, 4), "three": (0, 1, 2, 3, 4), "hybrid": (2, 3, 4)}
VECTORS = ("model.layers.0.input_layernorm.weight", "model.layers.1.bias")
FUSED = "attention.in_proj_weight"
# Blocks, of uneven and of empty shards, torn ones among them. Each run gives each block another pair of kinds: all
# pairs have met several shapes after RUNS.
BLOCKS = [name for name in plain() if name not in (*VECTORS, FUSED)]
BLOCKS += [f"{FUSED}:{role}" for role in ("query", "key", "value")]
RUNS = 4
# What gathers blocks, and lets go of them: heads, runs along sharded rows, an exact projection.
GATHERED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model.layers.0.self_attn.q_proj.weight": (
        {"momentum": "dense", "second_moment": "blockwise", "outputs_per_number": 4},
        {"momentum": "low_rank", "rank": 3},
    ),
    "model.layers.0.self_attn.k_proj.weight": (
        {"momentum": "low_rank", "rank": 6, "second_moment": "factored"},
        {"rank": 2, "second_moment": "blockwise", "outputs_per_number": 4},
    ),
    "model.layers.0.self_attn.o_proj.weight": (
        {"momentum": "subspace", "rank": 8, "second_moment": "subset_norm", "subset_size": 5, "reduction": "sum"},
        {"rank": 3, "projection": "svd"},
    ),
    "model.layers.0.mlp.down_proj.weight": (
        {"momentum": "subspace", "rank": 8, "projection": "svd", "second_moment": "dense"},
        {"momentum": "low_rank", "rank": 4, "second_moment": "subset_norm", "subset_size": 5},
    ),
    f"{FUSED}:key": (
        {"momentum": "dense", "second_moment": "dense"},
        {"momentum": "none", "second_moment": "factored"},
    ),
    "model.layers.0.experts.weight": (
        {"momentum": "low_rank", "rank": 6, "second_moment": "blockwise"},
        {"momentum": "subspace", "rank": 2, "second_moment": "dense"},
    ),
}


def changes(run: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return the kinds of every block before and after."""
    if run == RUNS:
        return GATHERED
    pairs = [PAIRS[(index + run * len(BLOCKS)) * 7 % len(PAIRS)] for index in range(len(BLOCKS))]
    return {name: (MOMENTA[a], MOMENTA[b]) for name, (a, b) in zip(BLOCKS, pairs, strict=True)}


def trajectory(params: dict[str, nn.Parameter], run: int) -> list[dict[str, Tensor]]:
    """Return weights and dense momentum right after a reformat, and two steps later."""
    table, found = changes(run), []
    overrides = {name: {"second_moment": "factored", **before} for name, (before, _) in table.items()}
    optimizer = lm.MemOpt(named(params), "adamw", lr=1e-2, weight_decay=0.1, overrides=overrides)
    for step in (1, 2, 0, 6, 7):
        if step == 0:
            after = {name: change for name, (_, change) in table.items()}
            optimizer.reformat(after, dropped="discard" if run == 1 else "release")
            found.append(content(params, optimizer))
        else:
            fill(params, step)
            optimizer.step()
    snapshot = optimizer.snapshot()
    held = [v for state in optimizer.state.values() for key, v in state.items() if key != "step"]
    assert snapshot.local_bytes == sum(local_tensor(value).untyped_storage().nbytes() for value in held)
    assert snapshot.state_bytes == sum(value.numel() * value.element_size() for value in held)
    return [*found, content(params, optimizer)]


def content(params: dict[str, nn.Parameter], optimizer: lm.MemOpt) -> dict[str, Tensor]:
    """Return all weights as wholes, and the momentum and the second moment of every block."""
    found = {name: full_tensor(param.detach()).clone() for name, param in params.items()}
    for _, param, block in optimizer.blocks():
        for kind in block.kinds:
            if kind.name != "none":
                state = {key: full_tensor(optimizer.state[param][block.prefix + key]) for key in kind.keys}
                found[f"{block.name}, {kind.keys}"] = kind.to_dense(state, block.layout.whole()).clone()
    return found


# --- on the ranks ----------------------------------------------------------------------------------------------------


def on_a_rank(rank: int, world: int, path: str) -> dict[str, str]:
    """Return what is wrong, by check; the file has what is expected of every run."""
    found, expected = {}, torch.load(path)
    for label, shape in MESHES.items():
        mesh = DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape))
        if mesh.get_coordinate() is None:
            continue
        for run in RUNS_ON[label]:
            found[f"{label}, {run}"] = attempt(compare, mesh, run, expected[run])
        for check in CHECKS:
            found[f"{label}, {check.__name__}"] = attempt(check, mesh)
    return found


def compare(mesh: DeviceMesh, run: int, expected: list[dict[str, Tensor]]) -> None:
    """The same weights and the same state as on one process, right after the change and some steps later."""
    actual = trajectory(sharded(mesh), run)
    for when, one, other in zip(("at once", "later"), actual, expected, strict=True):
        assert one.keys() == other.keys()
        errors = {name: relative_error(one[name], other[name]) for name in other}
        wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= TOLERANCE}
        assert not wrong, f"{when}: {wrong}"


def weight_on(mesh: DeviceMesh, momentum: dict[str, Any], steps: int = 2) -> tuple[lm.MemOpt, nn.Parameter]:
    """Return an optimizer of one weight of 48 rows, sharded by rows, and the weight."""
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    param = nn.Parameter(distribute_tensor(gradient((48, 40), 1), mesh, placements, src_data_rank=None))
    overrides = {"mlp": {**momentum, "second_moment": "factored"}}
    optimizer = lm.MemOpt([(WEIGHT, param)], "adamw", lr=1e-2, overrides=overrides)
    for step in range(steps):
        param.grad = distribute_tensor(gradient((48, 40), 10 + step), mesh, placements, src_data_rank=None)
        optimizer.step()
    return optimizer, param


WEIGHT = "model.layers.0.mlp.up_proj.weight"
LOW, LOWER, DENSE = MOMENTA["low_rank 8"], MOMENTA["low_rank 3"], MOMENTA["dense"]


def collectives_are_counted(mesh: DeviceMesh) -> None:
    """16 bytes per mesh dimension to agree, and one all-gather per state tensor that changes or is divided by."""
    for before, after, dropped, gathers in (
        (LOWER, LOW, "release", 2),  # Q and R; a larger rank drops nothing
        (LOW, LOWER, "discard", 2),
        (LOW, LOWER, "release", 4),  # and both factors of the denominator
        (LOW, DENSE, "release", 2),
        (DENSE, LOW, "discard", 1),
        (DENSE, LOW, "release", 3),
        (DENSE, MOMENTA["none"], "discard", 1),
        (MOMENTA["none"], LOW, "release", 0),
        (LOW, {"second_moment": "dense"}, "release", 2),
        (MOMENTA["subspace 3"], {"gap": 7}, "release", 0),
        (LOW, {"rank": 8}, "release", 0),
    ):
        optimizer, _ = weight_on(mesh, before)
        with Traffic() as traffic:
            optimizer.reformat({WEIGHT: after}, dropped=dropped)
        assert traffic.calls["allreduce"] == mesh.ndim
        assert traffic.nbytes["allreduce"] == 16 * mesh.ndim
        calls = {
            name: count for name, count in traffic.calls.items() if name not in ("allreduce", "wrap_tensor_autograd")
        }
        expected = {"all_gather_into_tensor": gathers} if gathers else {}
        assert calls == expected, f"{before} to {after}, {dropped}: {calls}"


def many_blocks_agree_once(mesh: DeviceMesh) -> None:
    optimizer = lm.AdaPMLean(named(sharded(mesh)))
    with Traffic() as traffic:
        optimizer.reformat({block.name: {"rank": 3} for block in optimizer.snapshot().blocks if len(block.shape) > 1})
    assert traffic.calls["allreduce"] == mesh.ndim


def old_state_is_gone(mesh: DeviceMesh) -> None:
    """Nothing refers to its pieces any more, and what this rank holds is its part of what the plan says."""
    for before, after in PAIRS:
        optimizer, param = weight_on(mesh, MOMENTA[before], steps=1)
        keys = optimizer._binding.blocks[param][0].recipe.momentum.keys
        old = [weakref.ref(t) for key in keys for v in [optimizer.state[param][key]] for t in (v, v._local_tensor)]
        optimizer.reformat({WEIGHT: MOMENTA[after]})
        if any(ref() is not None for ref in old):
            gc.collect()  # DTensor's own dispatch leaves a circle now and then
        assert not any(ref() is not None for ref in old), f"{before} to {after}"
        held = 0
        for key, value in optimizer.state[param].items():
            if key != "step":
                assert isinstance(value, DTensor)
                assert value.to_local().untyped_storage().nbytes() == value.to_local().numel() * 4
                held += value.to_local().numel() * 4
        facts = optimizer.snapshot().blocks[0]
        assert facts.local_bytes == held
        assert held <= facts.momentum_bytes / mesh.size(mesh.ndim - 1) + facts.second_moment_bytes + 256


FEW = (VECTORS[0], FUSED, "model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight", "lm_head.weight")


def refused(mesh: DeviceMesh, ask: Any, error: type[Exception], match: str) -> None:
    """Check that this rank gets the error, and that nothing changes; training then goes on."""
    params = sharded(mesh, names=FEW)
    optimizer = lm.AdaPMLean(named(params), lr=1e-2, rank=5)
    fill(params, 1)
    optimizer.step()
    table, state = repr(optimizer), {param: dict(entry) for param, entry in optimizer.state.items()}
    before = [value.clone() for value in pieces(params, optimizer)]
    with pytest.raises(error, match=match):
        ask(optimizer)
    assert repr(optimizer) == table
    assert all(optimizer.state[param][key] is value for param, entry in state.items() for key, value in entry.items())
    assert_equal(pieces(params, optimizer), before)
    optimizer.reformat({"lm_head.weight": {"rank": 2}})  # and no rank waits for another
    fill(params, 2)
    optimizer.step()


def pieces(params: dict[str, nn.Parameter], optimizer: lm.MemOpt) -> list[Tensor]:
    """Return what this rank holds of weights and state."""
    states = [value for entry in optimizer.state.values() for value in entry.values()]
    return [local_tensor(value.detach()) for value in (*params.values(), *states)]


def ranks_that_disagree_all_refuse(mesh: DeviceMesh) -> None:
    last = mesh.size() - 1
    mine = dist.get_rank() == last
    good, gate = {"model.embed_tokens.weight": {"rank": 2}}, "model.layers.0.mlp.gate_proj.weight"

    def rank_differs(optimizer: lm.MemOpt) -> None:
        optimizer.reformat({**good, gate: {"rank": 4 if mine else 3}})

    def one_asks_for_more(optimizer: lm.MemOpt) -> None:
        optimizer.reformat({**good, gate: {"rank": 4}} if mine else good)

    def one_asks_for_nothing(optimizer: lm.MemOpt) -> None:
        optimizer.reformat({} if mine else good)

    def order_differs(optimizer: lm.MemOpt) -> None:
        pair = {**good, gate: {"rank": 4}}
        optimizer.reformat(dict(reversed(pair.items())) if mine else pair)

    def dropped_differs(optimizer: lm.MemOpt) -> None:
        optimizer.reformat(good, dropped="discard" if mine else "release")

    for ask, match in (
        (rank_differs, rf"rank 0 has '{gate}: LowRankMomentum\(rank=3\).*rank {last} has '{gate}: .*rank=4"),
        (one_asks_for_more, rf"rank 0 has 'dropped=release', rank {last} has '{gate}"),
        (one_asks_for_nothing, rf"rank 0 has 'model\.embed_tokens\.weight.*, rank {last} has 'dropped=release'"),
        (order_differs, rf"rank 0 has 'model\.embed_tokens\.weight.*, rank {last} has '{gate}"),
        (dropped_differs, rf"rank 0 has 'dropped=release', rank {last} has 'dropped=discard'"),
    ):
        refused(mesh, ask, RuntimeError, f"Ranks disagree about what to reformat: {match}")


def a_mistake_on_one_rank_stops_all(mesh: DeviceMesh) -> None:
    """That rank learns what is wrong; the others learn which rank has made which mistake."""
    last = mesh.size() - 1
    mine = dist.get_rank() == last
    good = {"model.embed_tokens.weight": {"rank": 2}}
    for bad, match in (
        ({"lm_head": {"rank": 2}}, "Unknown block 'lm_head'"),
        ({"lm_head.weight": {"rank": 0}}, "`rank` must be an integer of at least 1"),
        ({VECTORS[0]: {"momentum": "low_rank"}}, "'low_rank' needs a matrix"),
    ):
        refused(
            mesh,
            lambda optimizer, bad=bad: optimizer.reformat({**good, **bad} if mine else good),
            ValueError if mine else RuntimeError,
            match if mine else f"Rank {last} could not decide about what to reformat: ValueError: .*{match}",
        )
        refused(mesh, lambda optimizer, bad=bad: optimizer.reformat({**good, **bad}), ValueError, match)
    refused(mesh, lambda optimizer: optimizer.reformat(good, dropped="keep"), ValueError, "Unknown value of `dropped`")


CHECKS = [
    collectives_are_counted,
    many_blocks_agree_once,
    old_state_is_gone,
    ranks_that_disagree_all_refuse,
    a_mistake_on_one_rank_stops_all,
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, str]]:
    path = tmp_path_factory.mktemp("reformat") / "expected.pt"
    torch.save([trajectory(plain(), run) for run in range(RUNS + 1)], path)
    return run_ranks(on_a_rank, 4, str(path), timeout=240)


def check_outcomes(outcomes: list[dict[str, str]], mesh: str, key: str) -> None:
    found = [outcome[key] for outcome in outcomes if key in outcome]
    assert len(found) == torch.Size(MESHES[mesh]).numel()
    assert not any(found), "\n".join(found)


def test_all_pairs_meet_several_blocks():
    met = [pair for run in range(RUNS) for pair in map(str, changes(run).values())]
    assert min(met.count(str((MOMENTA[a], MOMENTA[b]))) for a, b in PAIRS) >= 2


@pytest.mark.parametrize(("mesh", "run"), [(mesh, run) for mesh, runs in RUNS_ON.items() for run in runs])
def test_every_pair_of_kinds_as_on_one_process(outcomes, mesh, run):
    check_outcomes(outcomes, mesh, f"{mesh}, {run}")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("mesh", MESHES)
def test_on_ranks(outcomes, mesh, check):
    check_outcomes(outcomes, mesh, f"{mesh}, {check.__name__}")
