"""Every kind, sharded in every way that is supported, equals the same kind unsharded.

The ranks compute both and compare their own part; one process group runs all cases, and each case is a test here.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import time
import traceback
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import lightning_memopt as lm
from lightning_memopt.kinds.base import Kind
from lightning_memopt.kinds.momentum import Momentum, NoMomentum
from lightning_memopt.kinds.second_moment import NoSecondMoment
from lightning_memopt.optim import update
from lightning_memopt.optim.block import Block
from lightning_memopt.optim.bounds import Watch
from lightning_memopt.optim.stepping import Step
from lightning_memopt.optim.update import Update
from lightning_memopt.plans.recipe import Recipe
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.slot import Slot
from tests._compare import assert_equal, relative_error
from tests._ranks import run_ranks
from tests.kinds.contract.cases import (
    BETAS,
    EPS,
    all_momenta,
    all_second_moments,
    gradient,
    is_basic,
    label,
    layout_of,
    tick_at,
    variants,
)
from tests.kinds.contract.running import Quotient, dense, step

pytestmark = pytest.mark.slow

STEPS = 7  # of which the subspaces, whose gap is 3, are chosen again in two
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A parameter's shape, its mesh and its placements.

    What the ranks hold, for example ``(5, 6)`` with ``Shard(0)`` on three ranks: rows 0–1 | 2–3 | 4.
    """

    name: str
    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    placements: tuple[Any, ...]
    facts: tuple[tuple[str, Any], ...] = ()

    @property
    def ranks(self) -> int:
        return torch.Size(self.mesh).numel()


CASES = [
    Case("rows", (12, 20), (2,), (Shard(0),)),
    Case("columns", (12, 20), (2,), (Shard(1),)),
    Case("rows of a tall one", (20, 12), (2,), (Shard(0),)),
    Case("columns of a tall one", (20, 12), (2,), (Shard(1),)),
    Case("uneven rows", (5, 6), (2,), (Shard(0),)),
    Case("one row", (1, 6), (2,), (Shard(0),)),
    Case("replicated", (6, 5), (2,), (Replicate(),)),
    Case("vector", (7,), (2,), (Shard(0),)),
    Case("stack", (4, 6, 9), (2,), (Shard(0),)),
    Case("rows of a stack", (2, 6, 9), (2,), (Shard(1),)),
    Case("columns of a stack", (2, 6, 9), (2,), (Shard(2),)),
    Case("convolution", (5, 3, 2, 2), (2,), (Shard(0),)),
    Case("transposed", (12, 20), (2,), (Shard(1),), (("output_dim", -1),)),
    Case("uneven rows on three", (5, 6), (3,), (Shard(0),)),
    Case("an empty shard", (4, 7), (3,), (Shard(0),)),
    Case("two empty shards", (1, 7), (3,), (Shard(0),)),
    Case("an empty shard of columns", (7, 4), (3,), (Shard(1),)),
    Case("an empty shard of a stack", (2, 6, 9), (3,), (Shard(0),)),
    Case("a vector with an empty shard", (2,), (3,), (Shard(0),)),
    Case("hybrid", (12, 20), (2, 2), (Replicate(), Shard(0))),
    Case("rows and columns", (12, 20), (2, 2), (Shard(0), Shard(1))),
    Case("columns and rows, uneven", (9, 5), (2, 2), (Shard(1), Shard(0))),
    Case("stack and columns", (3, 6, 8), (2, 2), (Shard(0), Shard(2))),
]

# What an option's value changes in the requests is to be seen here; plain numbers and switches change nothing in them.
PLAIN = ("bias_correction", "correct_complement", "correct_eps", "gap", "stagger")
KINDS = [
    kind
    for kind in all_momenta() + all_second_moments()
    if all(getattr(kind, name) == getattr(variants(type(kind))[0], name) for name in PLAIN if name in kind.options())
    and getattr(kind, "rank", 2) in (2, 1000)
]

# Where the options of every kind are varied; elsewhere the basic instance of each kind has to do.
THOROUGH = {
    "rows",
    "columns",
    "uneven rows on three",
    "an empty shard",
    "an empty shard of columns",
    "rows and columns",
}

Outcome = dict[str, str]


def kinds_for(case: Case) -> list[Kind]:
    """Return the kinds that are defined on the case's shape, sharded or not."""
    found = []
    for kind in KINDS if case.name in THOROUGH else filter(is_basic, KINDS):
        if len(case.shape) > 1 or not kind.needs_matrix:
            with contextlib.suppress(ValueError):
                kind.shapes(layout_of(case.shape, **dict(case.facts)))
                found.append(kind)
    return found


def title(kind: Kind) -> str:
    return f"{'momentum' if isinstance(kind, Momentum) else 'second moment'} {label(kind)}"


def unsharded(case: Case) -> dict[str, list[torch.Tensor]]:
    """Return what each kind gives on one process, for every step."""
    layout, found = layout_of(case.shape, **dict(case.facts)), {}
    for kind in kinds_for(case):
        state = kind.init(layout)
        found[title(kind)] = [
            step(kind, gradient(case.shape, number), state, layout, tick_at(number)) for number in range(1, STEPS + 1)
        ]
    return found


# --- on the ranks ----------------------------------------------------------------------------------------------------


def on_a_rank(rank: int, world: int, expected: bytes) -> dict[str, Outcome]:
    """Return for every case that this rank has a part in, and every kind, what is wrong, "refused: ..." or nothing."""
    results = torch.load(io.BytesIO(expected), weights_only=True)
    meshes = {}
    for shape in sorted({case.mesh for case in CASES}):
        meshes[shape] = DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape))
    found = {}
    for shape, mesh in meshes.items():
        if rank < mesh.size():
            found |= run_cases([case for case in CASES if case.mesh == shape], mesh, results)
    for extra in EXTRAS if rank < 2 else ():
        try:
            extra(meshes[(2,)])
            found[extra.__name__] = {}
        except Exception:
            found[extra.__name__] = {"": traceback.format_exc()}
    return found


RESULTS: dict[str, Any] = {}


def record(targets: Any, direction: Any, denominator: Any, *rates: Any, **options: Any) -> None:
    """Keep direction and denominator instead of updating weights, by block."""
    blocks = [each.block for each in targets]
    work, count = blocks[0].work, len(blocks)
    for position, block in enumerate(blocks):
        result = direction
        if "second moment" in block.name:
            norm = block.recipe.second_moment.of_direction
            result = Quotient(direction, denominator) if norm else denominator
        RESULTS[block.name] = dense(result, work.batched(count))[position] if count > 1 else dense(result, work)


def probe(kind: Kind, layout: Layout, name: str = "block") -> Block:
    recipe = Recipe(kind, NoSecondMoment()) if isinstance(kind, Momentum) else Recipe(NoMomentum(), kind)
    return Block(name, "other", recipe, layout, "", tick_at(1).key, 0, torch.float32, lm.load_plan("adamw"))


@dataclass
class Run:
    """One kind on one sharded parameter."""

    case: Case
    kind: Kind
    block: Block
    state: dict[str, Any]


GROUP = {"betas": BETAS, "eps": EPS, "maximize": False, "lr": 1.0, "weight_decay": 0.0, "max_update": 1.0}


def take_step(runs: list[Run], grads: dict[str, DTensor], number: int) -> None:
    """Take one step of all runs, as an optimizer does with its blocks: what they ask for shares collectives."""
    params = {name: torch.nn.Parameter(torch.zeros_like(grad)) for name, grad in grads.items()}
    for name, param in params.items():
        param.grad = grads[name]
    RESULTS.clear()
    updates = []
    for run in runs:
        updates.append(Update(run.block, params[run.case.name], run.state, GROUP, number))
    with mock.patch.object(update, "apply", record):
        Step(updates).run(Watch())


def run_cases(cases: list[Case], mesh: Any, expected: dict[str, dict[str, list[torch.Tensor]]]) -> dict[str, Outcome]:
    """Run all kinds on all parameters at once."""
    outcomes: dict[str, Outcome] = {case.name: {} for case in cases}
    runs = []
    for case in cases:
        layout = Layout.of(place(torch.zeros(case.shape), case, mesh), **dict(case.facts))
        whole = layout_of(case.shape, **dict(case.facts))
        for kind in kinds_for(case):
            name = f"{case.name}: {title(kind)}"
            try:
                block = probe(kind, layout, name)
                state = block.init()
            except NotImplementedError as error:
                outcomes[case.name][title(kind)] = f"refused: {error}"
                continue
            runs.append(Run(case, kind, block, state))
            outcomes[case.name][title(kind)] = compare_state(kind, state, kind.init(whole), layout)
    for number in range(1, STEPS + 1):
        take_step(runs, {case.name: place(gradient(case.shape, number), case, mesh) for case in cases}, number)
        for run in runs:
            outcome, name = outcomes[run.case.name], title(run.kind)
            full = expected[run.case.name][name][number - 1]
            error = float((RESULTS[run.block.name] - part_of(full, run.block.work)).norm() / full.norm())
            if not error <= TOLERANCE:
                outcome[name] = outcome[name] or f"step {number} differs by {error:.1e} of the whole's norm"
    return outcomes


def compare_state(kind: Kind, state: dict[str, Any], expected: dict[str, torch.Tensor], layout: Layout) -> str:
    """Check that state tensors are DTensors of the global shape, each rank's part exactly as large as it should be."""
    if kind.shapes(layout) != {key: tuple(value.shape) for key, value in expected.items()}:
        return f"shapes {kind.shapes(layout)}"
    for key, value in state.items():
        if not isinstance(value, DTensor) or value.shape != expected[key].shape:
            return f"{key} is {type(value).__name__} of shape {tuple(value.shape)}"
        again = distribute_tensor(expected[key], value.device_mesh, value.placements, src_data_rank=None)
        if again.to_local().shape != value.to_local().shape or again.stride() != value.stride():
            return f"{key}: local {tuple(value.to_local().shape)}, torch cuts {tuple(again.to_local().shape)}"
        local = value.to_local()
        if local.untyped_storage().nbytes() != local.numel() * local.element_size():
            return f"{key}: its storage is larger than it"
        if len(layout.shards()) == 1 and not any(placement.is_shard() for placement in value.placements):
            return f"{key} is not sharded: {value.placements}"
    return ""


def place(tensor: torch.Tensor, case: Case, mesh: Any) -> DTensor:
    return distribute_tensor(tensor, mesh, case.placements, src_data_rank=None)


def part_of(full: torch.Tensor, layout: Layout) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(layout.offset, layout.local, strict=True)):
        full = full.narrow(dim, start, length)
    return full


def fused_blocks_are_whole(mesh: Any) -> None:
    """A fused weight that is cut across its columns: each block's part is this rank's part of that block."""
    weight = gradient((12, 8), 1)
    sharded = distribute_tensor(weight, mesh, [Shard(1)], src_data_rank=None)
    for start in (0, 2, 4):
        for slot, rows in ((Slot(0, 2 * start, 4), slice(2 * start, 2 * start + 4)), (Slot(0, start, 2, period=6),
                            [start, start + 1, start + 6, start + 7])):  # fmt: skip
            layout = Layout.of(sharded, slot=slot)
            assert (layout.shape, layout.local) == ((4, 8), (4, 4))
            assert_equal(layout.take(sharded), part_of(weight[rows], layout))


def torn_fused_blocks(mesh: Any) -> None:
    """A fused weight that is cut across its blocks: each block is gathered, and every rank updates its rows.

    In rows of 12 with a period of 6, two ranks hold whole periods, three do not.
    """
    for size, period, lengths in (
        (9, None, (3, 3, 3)), (10, None, (6, 2, 2)), (7, None, (1, 5, 1)),
        (12, 6, (2, 2, 2)), (12, 3, (1, 1, 1)), (10, 5, (3, 1, 1)), (8, 4, (1, 3)),
    ):  # fmt: skip
        slots = [Slot(0, sum(lengths[:place]), length, period) for place, length in enumerate(lengths)]
        for kind in filter(is_basic, KINDS):
            recipe = probe(kind, layout_of((1, 8))).recipe
            weights = [torch.zeros(size, 8), distribute_tensor(torch.zeros(size, 8), mesh, [Shard(0)])]
            params = [torch.nn.Parameter(weight) for weight in weights]
            blocks = [[], []]
            for found, param in zip(blocks, params, strict=True):
                for slot in slots:
                    layout, name = Layout.of(param, slot=slot), f"{slot.start}"
                    plan = lm.load_plan("adamw")
                    found.append(
                        Block(name, "other", recipe.resolve(layout), layout, f"{name}.", 7, 0, torch.float32, plan)
                    )
            states = [{key: value for block in found for key, value in block.init().items()} for found in blocks]
            for number in range(1, 7):
                grad = gradient((size, 8), number)
                params[0].grad = grad
                params[1].grad = distribute_tensor(grad, mesh, [Shard(0)], src_data_rank=None)
                for found, param, state in zip(blocks, params, states, strict=True):
                    with torch.no_grad():
                        Step([Update(block, param, state, {**GROUP, "lr": 0.1}, number) for block in found]).run(
                            Watch()
                        )
            error = relative_error(params[1].full_tensor().detach(), params[0].detach())
            assert error <= TOLERANCE, f"{label(kind)} on {slots}: {error:.1e}"


def optimizers_on(mesh: Any, shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> list[Any]:
    """Return optimizers of one matrix with low-rank momentum: on one process, and sharded; with their parameters."""
    found = []
    for weight in (torch.zeros(shape, dtype=dtype), place_on(mesh, torch.zeros(shape, dtype=dtype))):
        param = torch.nn.Parameter(weight)
        change = {"*": {"momentum": "low_rank", "rank": 2}}
        found.append((lm.MemOpt([("mlp.up_proj.weight", param)], "adamw", overrides=change, **options), param))
    return found


def place_on(mesh: Any, tensor: torch.Tensor) -> DTensor:
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def bounded_updates_are_those_of_one_process(mesh: Any) -> None:
    """Every rank bounds its own elements, in steps and in the release of momentum."""
    optimizers = optimizers_on(mesh, (9, 8), torch.float64, lr=1.0, max_update=0.5)
    for number in range(1, 9):
        grad = gradient((9, 8), number).double() * (gradient((9, 8), number + 50) > 1)
        for optimizer, param in optimizers:
            param.grad = place_on(mesh, grad) if isinstance(param, DTensor) else grad
            optimizer.step()
            if number == 6:
                optimizer.reformat({"mlp.up_proj.weight": {"rank": 1}})
    (_, whole), (_, sharded) = optimizers
    error = relative_error(sharded.full_tensor().detach(), whole.detach())
    assert error <= TOLERANCE, f"{error:.1e}"


def a_release_over_a_norm_is_that_of_one_process(mesh: Any) -> None:
    """Its matrix root needs all of the short side, of which a rank holds a part in one of the shapes."""
    for shape, recipe in itertools.product([(6, 10), (10, 6)], ["muon", "scale"]):
        found = []
        for weight in (torch.zeros(shape), place_on(mesh, torch.zeros(shape))):
            param = torch.nn.Parameter(weight)
            name = "lm_head.weight" if recipe == "scale" else "mlp.up_proj.weight"
            optimizer = lm.MemOpt([(name, param)], recipe, lr=0.1)
            for number in range(1, 6):
                grad = gradient(shape, number)
                param.grad = place_on(mesh, grad) if isinstance(param, DTensor) else grad
                optimizer.step()
                if number == 3:
                    optimizer.reformat({name: {"momentum": "low_rank", "rank": 2}})
            found.append(param)
        whole, sharded = found
        error = relative_error(sharded.full_tensor().detach(), whole.detach())
        assert error <= TOLERANCE, f"{shape}, {recipe}: {error:.1e}"


def weights_that_leave_their_range_are_an_error_on_all_ranks(mesh: Any) -> None:
    """Also on the rank whose weights are fine: the first row is on one rank only."""
    (_, (optimizer, param)) = optimizers_on(mesh, (8, 4), torch.float16, lr=1e4, max_update=None)
    grad = torch.zeros(8, 4, dtype=torch.float16)
    grad[0] = 1.0
    with pytest.raises(FloatingPointError, match="become infinite or NaN in: mlp.up_proj.weight"):  # noqa: PT012
        for _ in range(20):
            param.grad = place_on(mesh, grad)
            optimizer.step()
    assert bool(param.to_local().isfinite().all())
    (_, (optimizer, param)) = optimizers_on(mesh, (8, 4), torch.float32)
    if mesh.get_local_rank() == 1:
        param.to_local().detach()[0, 0] = torch.nan
    param.grad = place_on(mesh, grad.float())
    with pytest.raises(FloatingPointError, match="Weights with non-finite elements before the first step in: mlp.up"):
        optimizer.step()


def rounding_is_that_of_one_process(mesh: Any) -> None:
    """State in bfloat16 is rounded by position, so that ranks round their parts as one process rounds the whole."""
    for placement in (Shard(0), Shard(1)):
        for kind in filter(is_basic, KINDS):
            whole_layout = layout_of((5, 7), state_dtype=torch.bfloat16)
            sharded = distribute_tensor(torch.zeros(5, 7), mesh, [placement], src_data_rank=None)
            layout = Layout.of(sharded, state_dtype=torch.bfloat16)
            case = Case("weight", (5, 7), (2,), (placement,))
            run, expected = Run(case, kind, probe(kind, layout), {}), kind.init(whole_layout)
            run.state.update(run.block.init())
            for number in range(1, 4):
                take_step([run], {"weight": place(gradient((5, 7), number), case, mesh)}, number)
                step(kind, gradient((5, 7), number), expected, whole_layout, tick_at(number))
            for key, value in expected.items():
                found = run.state[key].full_tensor()
                assert found.dtype == torch.bfloat16
                same = float((found == value).double().mean())
                # A sum in another order may cross a rounding threshold, rarely; other noise would agree on half.
                assert same > 0.9, f"{label(kind)}, {placement}: {key} agrees on {same:.0%}"


def other_placements_are_refused(mesh: Any) -> None:
    weight = DTensor.from_local(torch.zeros(4, 6), mesh, [Partial()])
    match = r"sharding of a parameter of shape \(4, 6\) is not supported: placements \(Partial"
    with pytest.raises(NotImplementedError, match=match):
        Layout.of(weight)
    conv = distribute_tensor(torch.zeros(4, 4, 2, 2), mesh, [Shard(1)], src_data_rank=None)
    with pytest.raises(
        NotImplementedError, match=r"placements \(Shard\(dim=1\),\)\. Supported: Replicate and one Shard"
    ):
        Layout.of(conv)


EXTRAS = [
    fused_blocks_are_whole,
    torn_fused_blocks,
    rounding_is_that_of_one_process,
    bounded_updates_are_those_of_one_process,
    a_release_over_a_norm_is_that_of_one_process,
    weights_that_leave_their_range_are_an_error_on_all_ranks,
    other_placements_are_refused,
]

# --- one test per case -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    """Return for every case what each rank found."""
    buffer = io.BytesIO()
    torch.save({case.name: unsharded(case) for case in CASES}, buffer)
    found: dict[str, list[Outcome]] = {}
    for by_case in run_ranks(on_a_rank, max(case.ranks for case in CASES), buffer.getvalue()):
        for name, outcome in by_case.items():
            found.setdefault(name, []).append(outcome)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_sharded_equals_unsharded(outcomes, case):
    by_rank = outcomes[case.name]
    assert len(by_rank) == case.ranks
    wrong = []
    for rank, outcome in enumerate(by_rank):
        assert list(outcome) == [title(kind) for kind in kinds_for(case)]
        for kind, message in outcome.items():
            if message.startswith("refused: "):
                assert str(case.placements) in message, f"the refusal of {kind} does not name the placements"
            elif message:
                wrong.append(f"rank {rank}, {kind}: {message}")
    assert not wrong, "\n".join(wrong)


def test_what_is_refused(outcomes):
    """Only what needs a dimension whole, only where that is cut, and on all ranks alike."""
    total, options = 0, {title(kind): kind.options() for kind in KINDS}
    for case in CASES:
        refused = [{kind for kind, text in o.items() if text.startswith("refused")} for o in outcomes[case.name]]
        assert all(names == refused[0] for names in refused)
        assert all({"projection", "outputs_per_number", "subset_size"} & {*options[name]} for name in refused[0])
        assert len(case.mesh) == 2 or not refused[0], "with one sharded dimension everything works"
        total += len(refused[0])
    assert 0 < total < 0.2 * sum(len(kinds_for(case)) for case in CASES)


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: extra.__name__)
def test_on_two_ranks(outcomes, extra):
    assert [list(outcome.values()) for outcome in outcomes[extra.__name__]] == [[], []]


def failing(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("this rank has had enough")
    torch.distributed.barrier()


def sleeping(rank: int, world: int) -> None:
    if rank == 0:
        torch.distributed.barrier()
    else:
        time.sleep(60)


def test_an_exception_on_a_rank_reaches_the_test():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="this rank has had enough"):
        run_ranks(failing, 2)


def test_ranks_that_hang_are_ended():
    with pytest.raises(TimeoutError, match="sleeping did not finish on 2 ranks within 2 s"):
        run_ranks(sleeping, 2, timeout=2)
