"""The whole optimizer on DTensor parameters: the same steps at every world size, sharded state, few collectives."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import lightning_memopt as lm
from lightning_memopt.sharding import collectives
from tests._attempt import attempt
from tests._compare import assert_equal, relative_error
from tests._ranks import run_ranks
from tests._traffic import Traffic
from tests.kinds.contract.cases import gradient
from tests.optim._sharded import (
    assert_same_wholes,
    by_long_side,
    by_rows,
    collectives_so_far,
    fill,
    named,
    plain,
    sharded,
)

pytestmark = pytest.mark.slow

STEPS, GAP = (1, 2, 4, 6, 7), {"gap": 3}  # what `fill` gives; every subspace is chosen again, once or twice
TOLERANCE = 1e-5
MESHES = {"two": (2,), "three": (3,), "four": (4,), "hybrid": (2, 2)}


def recurs(name: str) -> bool:
    return any("gap" in recipe.options() for recipe in lm.load_plan(name).roles.values())


RECIPES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name: functools.partial(lm.MemOpt, recipe=name, lr=1e-2, weight_decay=0.1, **(GAP if recurs(name) else {}))
    for name in lm.recipe_names()
}
RATES: dict[str, dict[str, float]] = {
    "vector": {"weight_decay": 0},
    "query": {"lr_multiplier": 0.3},  # one part of a fused weight, too
    "*.layers.*": {"lr_multiplier": 3},
}
VARIANTS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamSNSM(paper=True)": lambda named: lm.AdamSNSM(named, lr=1e-3, paper=True, **GAP),
    "AdaGradSNSM(paper=True)": lambda named: lm.AdaGradSNSM(named, lr=1e-3, paper=True, **GAP),
    "rotate, gap 3": lambda named: lm.AdamSNSM(named, lr=1e-2, handover="rotate", **GAP),
    "GaLore, power": lambda named: lm.GaLore(named, lr=1e-2, projection="power", **GAP),
    "subset_size": lambda named: lm.AdamSN(named, lr=1e-2, subset_size=5),
    "heads": lambda named: lm.AdamMini(named, lr=1e-2, head_dim=2),
    "maximize": lambda named: lm.AdaPMLean(named, lr=1e-2, maximize=True),
    "rates": lambda named: lm.AdaPMLean(named, lr=1e-2, weight_decay=0.1, overrides=RATES),
}


# What one process finds, by name: computed once, and read by all ranks.
EXPECTED: dict[str, Any] = {}
REBOUND = (lm.AdaPMLean, lm.AdamSNSM, lm.AdamMini)
CONTINUED = ("adapm", "adapm_mini", "adapm_lean", "adam_snsm", "adamw", "galore", "apollo")
CHANGES: dict[str, dict[str, Any]] = {
    "model.layers.0.mlp.gate_proj.weight": {"rank": 7},
    "model.layers.0.self_attn.q_proj.weight": {"momentum": "dense"},
    "model.layers.0.self_attn.v_proj.weight": {"momentum": "none"},
    "lm_head.weight": {"momentum": "subspace", "rank": 3},
    "attention.in_proj_weight:key": {"second_moment": "dense"},
    "model.layers.0.experts.weight": {"second_moment": "subset_norm", "subset_size": 4},
}


def take_steps(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], steps: Iterable[int]) -> None:
    for step in steps:
        fill(params, step)
        optimizer.step()


def detached(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in params.items()}


def trajectory(builder: Callable[..., torch.optim.Optimizer], steps: Iterable[int] = STEPS) -> dict[str, Tensor]:
    """Return the weights after all steps on one process."""
    params = plain()
    take_steps(builder(named(params)), params, steps)
    return detached(params)


def all_expected() -> dict[str, Any]:
    """Return what ranks compare with."""
    found: dict[str, Any] = {name: trajectory(builder) for name, builder in (RECIPES | VARIANTS).items()}
    for builder in REBOUND:
        found[builder.__name__] = trajectory(functools.partial(builder, lr=1e-2))
    found["pieces"] = trajectory(functools.partial(lm.AdaPMLean, lr=1e-2), (1, 2))
    params = plain()
    optimizer = lm.AdaPMLean(named(params), lr=1e-2)
    take_steps(optimizer, params, (1, 2))
    optimizer.reformat(CHANGES)
    take_steps(optimizer, params, (4, 6, 7))
    found["reformat"] = detached(params), facts(optimizer)
    params = plain()
    adamw = torch.optim.AdamW(params.values(), lr=1e-2)
    take_steps(adamw, params, range(1, 6))
    found["state of AdamW"] = adamw.state_dict()
    for recipe in CONTINUED:
        params = plain()
        optimizer = lm.MemOpt(named(params), recipe=recipe, lr=1e-2)
        optimizer.load_state_dict(adamw.state_dict())
        take_steps(optimizer, params, (5, 6, 7))
        found[f"{recipe} after AdamW"] = detached(params)
    return found


def facts(optimizer: lm.MemOpt) -> list[dict[str, Any]]:
    """Return what a snapshot says of every block, but for what this rank holds."""
    return [block.__dict__ | {"local": None, "local_adamw_bytes": None} for block in optimizer.snapshot().blocks]


# --- on the ranks ----------------------------------------------------------------------------------------------------


def cases(mesh: str) -> list[tuple[Callable[..., int], str]]:
    """Return which placements and optimizers are tried on a mesh."""
    if mesh in ("three", "hybrid"):
        return [(by_long_side, name) for name in RECIPES | VARIANTS]
    return [(by_long_side, name) for name in RECIPES]


def on_a_rank(rank: int, world: int, expected: bytes) -> dict[str, Any]:
    """Return what is wrong, by check."""
    EXPECTED.update(pickle.loads(expected))
    found: dict[str, Any] = {}
    for label, shape in MESHES.items():
        mesh = DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape))
        if mesh.get_coordinate() is None:
            continue
        for choose, name in cases(label):
            key = f"{label}, {choose.__name__}, {name}"
            most = 6 if name == "muon_lean" else 5  # the root of a direction follows the momentum's sums
            found[key] = attempt(compare, mesh, choose, (RECIPES | VARIANTS)[name], EXPECTED[name], most)
        for check in CHECKS if label in ("three", "hybrid") else ():
            found[f"{label}, {check.__name__}"] = attempt(check, mesh)
    return found


def compare(
    mesh: DeviceMesh, choose: Callable[..., int], builder: Callable[..., Any], expected: Any, most: int
) -> None:
    """The same weights after all steps, state within its bounds, and few collectives in every step."""
    params = sharded(mesh, choose)
    optimizer = builder(named(params))
    for step in STEPS:
        fill(params, step)
        before = collectives_so_far(mesh)
        optimizer.step()
        assert 0 < collectives_so_far(mesh) - before <= most, f"step {step}: {collectives_so_far(mesh) - before}"
    assert_same_wholes(params, expected, tolerance=TOLERANCE)
    snapshot, count = optimizer.snapshot(), mesh.size(mesh.ndim - 1)
    assert snapshot.local_bytes <= 1.05 * snapshot.state_bytes / count + 4096
    for param in params.values():
        for key, value in optimizer.state[param].items():
            assert key == "step" or value.placements[-1].is_shard(), f"{key} is not sharded: {value.placements}"


def no_dtensor_operation_in_a_step(mesh: DeviceMesh) -> None:
    params = sharded(mesh)
    optimizer = lm.AdaPMLean(named(params), lr=1e-2)
    fill(params, 1)
    before = collectives_so_far(mesh)
    with CommDebugMode() as mode, Traffic() as traffic:
        optimizer.step()
    assert collectives_so_far(mesh) - before == traffic.total(), "two ways to count"
    assert 0 < mode.get_total_counts() <= 5
    assert mode.get_total_counts() == traffic.total()
    assert not traffic.dtensor_calls
    with Traffic() as other:
        params["lm_head.weight"].detach().add_(1)
    assert other.dtensor_calls, "such an operation would be seen"


def bytes_are_those_of_the_small_factors(mesh: DeviceMesh) -> None:
    """A weight [m, n] sharded by rows sends R, before and after, the r × r Gram matrices and two rows of statistics."""
    (m, n), rank, count = (48, 40), 4, mesh.size(mesh.ndim - 1)
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    weight = nn.Parameter(distribute_tensor(gradient((m, n), 1), mesh, placements, src_data_rank=None))
    optimizer = lm.AdaPMLean([("model.layers.0.mlp.up_proj.weight", weight)], lr=1e-2, rank=rank)
    for step in (1, 2):
        grad = gradient((m, n), step)
        weight.grad = distribute_tensor(grad, mesh, placements, src_data_rank=None)
        with Traffic() as traffic:
            optimizer.step()
    piece = 8 * -(-4 * rank * -(-n // count) // 8) + 8 * -(-4 * -(-n // count) // 8)
    assert traffic.nbytes["allgather_base"] == count * piece  # R, the columns' means
    verdict = 4 * (4 * 1 + 3)
    assert traffic.nbytes["allreduce"] == verdict + 4 * (rank * n + rank * rank + n) + 8 * (rank * rank + 1)


def payload_is_sent_in_bounded_pieces(mesh: DeviceMesh) -> None:
    limit, before = 1 << 12, collectives.MAX_PAYLOAD
    params = sharded(mesh)
    optimizer = lm.AdaPMLean(named(params), lr=1e-2)
    try:
        collectives.MAX_PAYLOAD = limit
        for step in (1, 2):
            fill(params, step)
            with Traffic() as traffic:
                optimizer.step()
            assert traffic.total() > 5
    finally:
        collectives.MAX_PAYLOAD = before
    assert_same_wholes(params, EXPECTED["pieces"], tolerance=TOLERANCE)


def unusable_gradients_change_nothing(mesh: DeviceMesh) -> None:
    """All ranks refuse a step because of one element on one of them."""
    params = sharded(mesh)
    optimizer = lm.AdaPM(named(params), lr=1e-2)
    fill(params, 1)
    optimizer.step()
    before = [param.to_local().clone() for param in params.values()]
    state = [
        value.to_local().clone() for entry in optimizer.state.values() for k, value in entry.items() if k != "step"
    ]
    fill(params, 2)
    gate = params["model.layers.0.mlp.gate_proj.weight"]
    gate.grad = gate.grad.clone()
    bad = gate.grad.to_local()
    if mesh.get_coordinate()[-1] == 1:
        bad.view(-1)[3] = float("inf")
    with pytest.raises(FloatingPointError, match=r"in: model\.layers\.0\.mlp\.gate_proj\.weight\. Weights and state"):
        optimizer.step()
    assert_equal([param.to_local() for param in params.values()], before)
    after = [value.to_local() for entry in optimizer.state.values() for k, value in entry.items() if k != "step"]
    assert_equal(after, state)
    assert {float(entry["step"]) for entry in optimizer.state.values()} == {1.0}


def rebinding_goes_on(mesh: DeviceMesh) -> None:
    """Parameters are replaced by their sharded selves after two steps; everything goes on as if nothing was."""
    for builder in REBOUND:
        whole = plain()
        optimizer = builder(named(whole), lr=1e-2)
        take_steps(optimizer, whole, STEPS[:2])
        params = sharded(mesh)
        for name, param in whole.items():
            value = distribute_tensor(param.detach(), mesh, params[name].placements, src_data_rank=None)
            params[name].to_local().data.copy_(value.to_local())
        optimizer.rebind({param: params[name] for name, param in whole.items()})
        take_steps(optimizer, params, STEPS[2:])
        assert_same_wholes(params, EXPECTED[builder.__name__], tolerance=TOLERANCE, message=builder.__name__)


def state_dicts_move_between_shardings(mesh: DeviceMesh) -> None:
    """Whole tensors load into shards, shards into shards of another placement, and shards into whole tensors."""
    reference = plain()
    source = lm.AdaPM(named(reference), lr=1e-2, rank=5)
    for step in range(1, 3):
        fill(reference, step)
        source.step()
    rows, columns, whole = (
        lm.AdaPM(named(params), lr=1e-2) for params in (sharded(mesh, by_rows), sharded(mesh), plain())
    )
    rows.load_state_dict(source.state_dict())
    columns.load_state_dict(rows.state_dict())
    saved = columns.state_dict()
    for index, entry in saved["state"].items():
        saved["state"][index] = {k: v if k == "step" else v.full_tensor() for k, v in entry.items()}
    whole.load_state_dict(saved)
    assert_equal(whole.state_dict()["state"], source.state_dict()["state"])
    allocated = columns.allocate_state_dict(
        {**saved, "state": {i: {k: v.to("meta") for k, v in e.items()} for i, e in saved["state"].items()}}
    )
    for index, entry in columns.state_dict()["state"].items():
        for key in set(entry) - {"step"}:
            target = allocated["state"][index][key]
            assert (target.shape, target.dtype, target.placements) == (
                entry[key].shape,
                entry[key].dtype,
                entry[key].placements,
            )


def reformat_equals_that_of_one_process(mesh: DeviceMesh) -> None:
    params = sharded(mesh)
    optimizer = lm.AdaPMLean(named(params), lr=1e-2)
    take_steps(optimizer, params, (1, 2))
    optimizer.reformat(CHANGES)
    take_steps(optimizer, params, (4, 6, 7))
    weights, blocks = EXPECTED["reformat"]
    assert_same_wholes(params, weights, tolerance=TOLERANCE)
    assert facts(optimizer) == blocks


def adamw_is_continued_compressed(mesh: DeviceMesh) -> None:
    """The state of torch's AdamW becomes that of every recipe, the same as on one process, and training goes on."""
    for recipe in CONTINUED:
        params = sharded(mesh)
        optimizer = lm.MemOpt(named(params), recipe=recipe, lr=1e-2)
        optimizer.load_state_dict(EXPECTED["state of AdamW"])
        assert optimizer.param_groups[0]["betas"] == optimizer.defaults["betas"] or recipe == "adamw"
        take_steps(optimizer, params, (5, 6, 7))
        assert_same_wholes(params, EXPECTED[f"{recipe} after AdamW"], tolerance=TOLERANCE, message=recipe)


def gradients_of_other_placements_are_reduced(mesh: DeviceMesh) -> None:
    """Autograd leaves a pending sum where nobody has reduced a gradient, for instance of a replicated weight."""
    value = gradient((24, 16), 1)
    reference, replicate = nn.Parameter(value), [Replicate()] * mesh.ndim
    weight = nn.Parameter(distribute_tensor(value, mesh, replicate, src_data_rank=None))
    one, two = (lm.AdaPMLean([("a.mlp.up_proj.weight", param)], lr=1e-2) for param in (reference, weight))
    for step in range(3):
        inputs = gradient((12, 24), 10 + step)
        (inputs @ reference).square().sum().backward()
        batch = [*replicate[:-1], Shard(0)]
        (distribute_tensor(inputs, mesh, batch, src_data_rank=None) @ weight).square().sum().backward()
        assert weight.grad.placements != weight.placements, "the case to be tested"
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()
    assert relative_error(weight.to_local().detach(), reference.detach()) <= TOLERANCE


def refusals_change_nothing(mesh: DeviceMesh) -> None:
    """An exact projection cannot be had where both sides are sharded; the optimizer that was asked goes on."""
    if mesh.ndim < 2:
        return
    whole = nn.Parameter(gradient((24, 16), 1))
    value = distribute_tensor(whole.detach(), mesh, [Shard(0), Shard(1)], src_data_rank=None)
    both = nn.Parameter(value)
    name = "a.mlp.up_proj.weight"
    exact = lm.AdamSNSM([(name, whole)], lr=1e-2, projection="svd")
    other = lm.AdamSNSM([(name, both)], lr=1e-2)
    for optimizer, param, ask in (
        (exact, whole, lambda optimizer: optimizer.rebind({whole: both})),
        (other, both, lambda optimizer: optimizer.reformat({name: {"projection": "svd"}})),
    ):
        param.grad = torch.ones_like(param)
        optimizer.step()
        state = dict(optimizer.state[param])
        before = repr(optimizer)
        with pytest.raises(NotImplementedError, match=r"several mesh dimensions: placements \(Shard\(dim=0"):
            ask(optimizer)
        assert repr(optimizer) == before
        assert all(optimizer.state[param][key] is entry for key, entry in state.items())
        optimizer.step()


def two_sharded_dimensions_take_four_collectives_each(mesh: DeviceMesh) -> None:
    """Whichever mesh dimension shards the rows. The gradient check is one collective of all ranks.

    Fira takes five: its limiter asks for a norm after all that a new subspace asks. Exact subspaces are refused here.
    Six where low-rank momentum is orthogonalized: the root follows the momentum.
    """
    if mesh.ndim < 2:
        return
    both, swapped = [Shard(0), Shard(1)], [Shard(1), Shard(0)]
    blocks = {
        "a.mlp.up_proj.weight": ((20, 12), both),
        "a.mlp.down_proj.weight": ((12, 20), swapped),
        "b.mlp.up_proj.weight": ((20, 12), swapped),
        "b.mlp.down_proj.weight": ((12, 20), both),
        "b.q_proj.weight": ((12, 12), both),
    }
    for recipe in RECIPES:
        reference = {name: nn.Parameter(gradient(shape, 3)) for name, (shape, _) in blocks.items()}
        params = {
            name: nn.Parameter(distribute_tensor(p.detach(), mesh, blocks[name][1], src_data_rank=None))
            for name, p in reference.items()
        }
        options = {"projection": "power"} if recipe in ("galore", "fira") else {}
        one, two = (RECIPES[recipe](named(each), **options) for each in (reference, params))
        for step in range(1, 6):
            fill(reference, step)
            fill(params, step)
            one.step()
            before = [group._get_sequence_number_for_group() for group in mesh.get_all_groups()]
            two.step()
            after = [group._get_sequence_number_for_group() for group in mesh.get_all_groups()]
            counts = [late - early for early, late in zip(before, after, strict=True)]
            assert max(counts) <= {"fira": 5, "muon_lean": 6}.get(recipe, 4), f"{recipe}, step {step}: {counts}"
        for name in params:
            assert relative_error(params[name].full_tensor().detach(), reference[name].detach()) <= TOLERANCE, recipe


def plans_and_draws_are_the_same_on_all_ranks(mesh: DeviceMesh) -> None:
    tables = [None] * dist.get_world_size(mesh.get_group(mesh.ndim - 1))
    optimizer = lm.AdaPMMini(named(sharded(mesh)))
    mine = [(b.name, b.role, b.momentum, b.rank, b.second_moment) for b in optimizer.snapshot().blocks]
    dist.all_gather_object(tables, mine, group=mesh.get_group(mesh.ndim - 1))
    assert all(table == mine for table in tables)
    whole = lm.AdaPMMini(named(plain()))
    assert mine == [(b.name, b.role, b.momentum, b.rank, b.second_moment) for b in whole.snapshot().blocks]


CHECKS = [
    no_dtensor_operation_in_a_step,
    bytes_are_those_of_the_small_factors,
    payload_is_sent_in_bounded_pieces,
    unusable_gradients_change_nothing,
    rebinding_goes_on,
    state_dicts_move_between_shardings,
    reformat_equals_that_of_one_process,
    adamw_is_continued_compressed,
    gradients_of_other_placements_are_reduced,
    refusals_change_nothing,
    two_sharded_dimensions_take_four_collectives_each,
    plans_and_draws_are_the_same_on_all_ranks,
]


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, str]]:
    return run_ranks(on_a_rank, 4, pickle.dumps(all_expected()), timeout=240)


def check_outcomes(outcomes: list[dict[str, str]], mesh: str, key: str) -> None:
    found = [outcome[key] for outcome in outcomes if key in outcome]
    assert len(found) == torch.Size(MESHES[mesh]).numel()
    assert not any(found), "\n".join(found)


@pytest.mark.parametrize(
    ("mesh", "choose", "name"), [(mesh, choose.__name__, name) for mesh in MESHES for choose, name in cases(mesh)]
)
def test_steps_are_the_same_at_every_world_size(outcomes, mesh, choose, name):
    check_outcomes(outcomes, mesh, f"{mesh}, {choose}, {name}")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("mesh", ["three", "hybrid"])
def test_on_ranks(outcomes, mesh, check):
    check_outcomes(outcomes, mesh, f"{mesh}, {check.__name__}")
