"""Every kind, sharded in every way that is supported, equals the same kind unsharded.

The ranks compute both and compare their own part; one process group runs all cases, and each case is a test here.
"""

from __future__ import annotations

import contextlib
import io
import time
import traceback
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_memopt.collectives import drive, together
from lightning_memopt.kind import Kind
from lightning_memopt.layout import Layout, Slot
from lightning_memopt.momentum import Momentum
from tests._compare import assert_equal, relative_error
from tests._ranks import run_ranks
from tests.contract.cases import (
    all_momenta,
    all_second_moments,
    gradient,
    is_basic,
    label,
    layout_of,
    tick_at,
    variants,
)
from tests.contract.running import dense, local_state, step, task_of

STEPS = 15
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
PLAIN = ("bias_correction", "correct_complement", "gap")
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


@dataclass
class Run:
    """One kind on one sharded parameter."""

    case: Case
    kind: Kind
    layout: Layout
    state: dict[str, Any]
    result: Any = None

    def step(self, grad: DTensor, number: int) -> Any:
        mine, state = self.layout.take(grad), local_state(self.state)
        self.result = yield from task_of(self.kind, mine, state, self.layout, tick_at(number))


def run_cases(cases: list[Case], mesh: Any, expected: dict[str, dict[str, list[torch.Tensor]]]) -> dict[str, Outcome]:
    """Run all kinds on all parameters at once: their requests share rounds, as those of an optimizer's blocks do."""
    outcomes: dict[str, Outcome] = {case.name: {} for case in cases}
    runs = []
    for case in cases:
        layout = Layout.of(place(torch.zeros(case.shape), case, mesh), **dict(case.facts))
        whole = layout_of(case.shape, **dict(case.facts))
        for kind in kinds_for(case):
            message = refusal(kind, layout)
            if not message:
                runs.append(Run(case, kind, layout, kind.init(layout)))
                message = compare_state(kind, runs[-1].state, kind.init(whole), layout)
            outcomes[case.name][title(kind)] = message
    for number in range(1, STEPS + 1):
        grads = {case.name: place(gradient(case.shape, number), case, mesh) for case in cases}
        drive([run.step(grads[run.case.name], number) for run in runs])
        for run in runs:
            outcome, name = outcomes[run.case.name], title(run.kind)
            full = expected[run.case.name][name][number - 1]
            error = float((dense(run.result, run.layout) - part_of(full, run.layout)).norm() / full.norm())
            if not error <= TOLERANCE:
                outcome[name] = outcome[name] or f"step {number} differs by {error:.1e} of the whole's norm"
    return outcomes


def refusal(kind: Kind, layout: Layout) -> str:
    """Return how a kind refuses a layout, if it does: from ``init``, or before the first request of a step."""
    try:
        task = task_of(kind, torch.zeros(layout.local), local_state(kind.init(layout)), layout, tick_at(1))
        next(task)
    except StopIteration:
        return ""
    except NotImplementedError as error:
        return f"refused: {error}"
    task.close()
    return ""


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
    return ""


def place(tensor: torch.Tensor, case: Case, mesh: Any) -> DTensor:
    return distribute_tensor(tensor, mesh, case.placements, src_data_rank=None)


def part_of(full: torch.Tensor, layout: Layout) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(layout.offset, layout.local, strict=True)):
        full = full.narrow(dim, start, length)
    return full


def fused_blocks_are_whole(mesh: Any) -> None:
    """A fused weight that is cut across its columns: each block's view is this rank's part of that block."""
    weight = gradient((9, 8), 1)
    sharded = distribute_tensor(weight, mesh, [Shard(1)], src_data_rank=None)
    for number in range(3):
        slot = Slot(dim=0, start=3 * number, length=3)
        layout = Layout.of(sharded, slot=slot)
        assert (layout.shape, layout.local) == ((3, 8), (3, 4))
        assert_equal(layout.take(sharded), part_of(weight[3 * number : 3 * number + 3], layout))
    with pytest.raises(
        NotImplementedError, match=r"in the dimension that its fused blocks share: placements \(Shard\(dim=0"
    ):
        Layout.of(distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None), slot=Slot(0, 0, 3))


def rounding_agrees_on_all_ranks(mesh: Any) -> None:
    """Ranks round parts of different sizes, and yet what all of them hold stays the same on all of them."""
    for placement in (Shard(0), Shard(1)):
        for kind in KINDS:
            layout = Layout.of(
                distribute_tensor(torch.zeros(5, 7), mesh, [placement], src_data_rank=None), state_dtype=torch.bfloat16
            )
            try:
                state = kind.init(layout)
                if refusal(kind, layout):
                    continue
            except (NotImplementedError, ValueError):
                continue
            for number in range(1, 5):
                grad = distribute_tensor(gradient((5, 7), number), mesh, [placement], src_data_rank=None)
                drive([task_of(kind, layout.take(grad), local_state(state), layout, tick_at(number))])
            for key, value in state.items():
                if value.placements == (Replicate(),):
                    mine = value.to_local()
                    theirs = [torch.empty_like(mine) for _ in range(mesh.size())]
                    torch.distributed.all_gather(theirs, mine, group=mesh.get_group())
                    for other in theirs:
                        assert_equal(other, mine, message=f"{label(kind)}, {placement}: {key} differs between ranks")


def both_axes_of_a_block_share_rounds(mesh: Any) -> None:
    """Momentum and second moment side by side give what each gives alone."""
    weight = distribute_tensor(torch.zeros(5, 7), mesh, [Shard(0)], src_data_rank=None)
    layout, whole = Layout.of(weight), layout_of((5, 7))
    pairs = [(kind, kind.init(layout), kind.init(whole)) for kind in KINDS if kind.name in ("low_rank", "factored")][
        ::3
    ]
    results: list[Any] = []

    def keep(task: Any) -> Any:
        results.extend((yield from task))

    for number in range(1, 6):
        grad = gradient((5, 7), number)
        mine = layout.take(distribute_tensor(grad, mesh, [Shard(0)], src_data_rank=None))
        results.clear()
        tick = tick_at(number)
        drive([keep(together(*(task_of(kind, mine, local_state(state), layout, tick) for kind, state, _ in pairs)))])
        for (kind, _, state), result in zip(pairs, results, strict=True):
            expected = part_of(step(kind, grad, state, whole, tick), layout)
            assert relative_error(dense(result, layout), expected) <= TOLERANCE


def other_placements_are_refused(mesh: Any) -> None:
    weight = DTensor.from_local(torch.zeros(4, 6), mesh, [Partial()])
    with pytest.raises(NotImplementedError, match=r"shape \(4, 6\) is sharded in this way: placements \(Partial"):
        Layout.of(weight)
    conv = distribute_tensor(torch.zeros(4, 4, 2, 2), mesh, [Shard(1)], src_data_rank=None)
    with pytest.raises(
        NotImplementedError, match=r"placements \(Shard\(dim=1\),\)\. Supported: Replicate and one Shard"
    ):
        Layout.of(conv)


EXTRAS = [
    fused_blocks_are_whole,
    rounding_agrees_on_all_ranks,
    both_axes_of_a_block_share_rounds,
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
    total = 0
    for case in CASES:
        refused = [{kind for kind, text in o.items() if text.startswith("refused")} for o in outcomes[case.name]]
        assert all(names == refused[0] for names in refused)
        assert all(any(o in name for o in ("projection", "outputs_per_number", "subset_size")) for name in refused[0])
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
