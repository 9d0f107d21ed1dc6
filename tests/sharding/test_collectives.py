"""Requests between ranks, in one process: the layouts only claim to be sharded, and the all-reduce is a stand-in."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lightning_memopt.sharding import collectives
from lightning_memopt.sharding.collectives import Sum, interleave, request, run_tasks
from tests._compare import assert_equal
from tests.kinds.contract.cases import layout_of


@dataclass(frozen=True)
class FakeLayout:
    """Says which groups shard each dimension, and nothing else."""

    sharded: tuple[tuple[int, str], ...] = ()

    def group(self, dim):
        return next((group for over, group in self.sharded if over == dim), None)

    def matrix_groups(self):
        return [group for _, group in self.sharded]


WHOLE, ROWS, COLUMNS = FakeLayout(), FakeLayout(((-2, "A"),)), FakeLayout(((-1, "B"),))
BOTH = FakeLayout(((-2, "A"), (-1, "B")))


@pytest.fixture
def flights(monkeypatch):
    """Replace the all-reduce by one over two ranks that hold the same; record what flew."""
    seen = []

    def all_reduce(flat, group):
        seen.append((group, flat.dtype, flat.numel()))
        flat.mul_(2)

    monkeypatch.setattr(collectives.dist, "all_reduce", all_reduce)
    return seen


def asking(log, name, layout, over=-2, rounds=1, size=1, dtype=torch.float32):
    """Make a task that asks a few times and logs when it runs."""

    def task():
        total = torch.zeros(size, dtype=dtype)
        for number in range(rounds):
            log.append(f"{name} asks {number}")
            (answer,) = yield from request(Sum(torch.full((size,), 1.0 + number, dtype=dtype), layout, over))
            total += answer
        log.append(f"{name} ends")
        return total

    return task()


def keeping(task, results, name):
    def wrapped():
        results[name] = yield from task

    return wrapped()


def test_nothing_sharded_runs_block_by_block(flights):
    log = []
    run_tasks([asking(log, "a", WHOLE, rounds=2), asking(log, "b", WHOLE)])
    assert log == ["a asks 0", "a asks 1", "a ends", "b asks 0", "b ends"]
    assert flights == []


def test_unsharded_request_is_the_same_tensor():
    value = torch.ones(3)
    task = request(Sum(value, layout_of((3, 4)), -2))
    with pytest.raises(StopIteration) as info:
        next(task)
    assert info.value.value[0] is value


def test_sharded_blocks_run_in_lockstep_with_one_collective_per_round(flights):
    log = []
    run_tasks(
        [asking(log, "a", ROWS, rounds=2, size=3), asking(log, "b", ROWS, size=5), asking(log, "c", ROWS, rounds=2)]
    )
    assert log == [
        *["a asks 0", "b asks 0", "c asks 0"],
        *["a asks 1", "b ends", "c asks 1"],
        *["a ends", "c ends"],
    ]
    assert flights == [("A", torch.float32, 9), ("A", torch.float32, 4)]


def test_unsharded_blocks_do_not_wait_for_sharded_ones(flights):
    log = []
    run_tasks([asking(log, "a", ROWS), asking(log, "b", WHOLE, rounds=2), asking(log, "c", ROWS)])
    assert log == ["a asks 0", "b asks 0", "b asks 1", "b ends", "c asks 0", "a ends", "c ends"]
    assert len(flights) == 1


def test_answers_reach_those_who_asked(flights):
    results = {}
    tasks = {
        "rows": asking([], "rows", ROWS, over=-2, rounds=2, size=2),
        "rows, asking for columns": asking([], "x", ROWS, over=-1, rounds=2),
        "columns": asking([], "columns", COLUMNS, over=-1),
        "whole": asking([], "whole", WHOLE, rounds=3),
        "wide": asking([], "wide", ROWS, size=4, dtype=torch.float64),
    }
    run_tasks([keeping(task, results, name) for name, task in tasks.items()])
    assert_equal(results["rows"], torch.full((2,), 6.0))
    assert_equal(results["rows, asking for columns"], torch.full((1,), 3.0))
    assert_equal(results["columns"], torch.full((1,), 2.0))
    assert_equal(results["whole"], torch.full((1,), 6.0))
    assert_equal(results["wide"], torch.full((4,), 2.0, dtype=torch.float64))


def test_one_collective_per_group_and_dtype(flights):
    tasks = [
        asking([], "a", ROWS, size=1),
        asking([], "b", BOTH, size=2),
        asking([], "c", COLUMNS, over=-1, size=4),
        asking([], "d", BOTH, over=-1, size=8),
        asking([], "e", ROWS, size=16, dtype=torch.float64),
    ]
    run_tasks(tasks)
    assert sorted(flights, key=str) == [
        ("A", torch.float32, 3),
        ("A", torch.float64, 16),
        ("B", torch.float32, 12),
    ]


WIDE, NARROW = torch.float64, torch.float32
LOW_RANK = [("B", WIDE), ("B", NARROW), ("A", WIDE), ("A", NARROW)]
NEW_SUBSPACE = [("A", NARROW), ("B", WIDE), ("B", NARROW), ("A", WIDE), ("A", NARROW)]


def exchanged(sums):
    return [("AB"[group == "A"], dtype) for group, dtype in sums]


@pytest.mark.parametrize(
    ("chains", "expected"),
    [
        ([LOW_RANK], "B64 B32 A64 A32"),
        ([NEW_SUBSPACE], "A32 B64 B32 A64 A32"),
        ([LOW_RANK, exchanged(LOW_RANK)], "B64 B32 A64 A32 B64 B32"),
        ([LOW_RANK, NEW_SUBSPACE], "A32 B64 B32 A64 A32"),
        ([NEW_SUBSPACE, exchanged(NEW_SUBSPACE)], "A32 B64 B32 A64 A32 B64 B32"),
        ([*map(exchanged, (LOW_RANK, NEW_SUBSPACE)), LOW_RANK, NEW_SUBSPACE], "A32 B64 B32 A64 A32 B64 B32"),
        ([[("A", WIDE), ("A", NARROW)], [("A", NARROW), ("A", WIDE), ("A", NARROW)]], "A32 A64 A32"),
        ([[("A", NARROW)] * 3], "A32 A32 A32"),
    ],
)
def test_groups_and_dtypes_take_turns(flights, chains, expected):
    def asks(chain):
        for group, dtype in chain:
            yield from request(Sum(torch.ones(1, dtype=dtype), BOTH, {"A": -2, "B": -1}[group]))

    run_tasks(asks(chain) for chain in chains)
    assert " ".join(f"{group}{8 * dtype.itemsize}" for group, dtype, _ in flights) == expected


@pytest.mark.parametrize(("leads", "expected"), [(True, "A32 A64 A32"), (False, "A64 A32 A64 A32")])
def test_a_sum_that_float64_follows_from_comes_first_beside_float64(flights, leads, expected):
    """As in a block with a new subspace and a factored second moment."""

    def chooses():
        yield from request(Sum(torch.ones(1), ROWS, -2, leads=leads))
        yield from request(Sum(torch.ones(1, dtype=WIDE), ROWS, -2))
        yield from request(Sum(torch.ones(1), ROWS, -2))

    run_tasks([interleave(chooses(), asking([], "total", ROWS, dtype=WIDE))])
    assert " ".join(f"{group}{8 * dtype.itemsize}" for group, dtype, _ in flights) == expected


def test_only_the_groups_of_that_dimension_are_asked(flights):
    results = {}
    run_tasks([keeping(asking([], "a", BOTH, over=-2), results, "rows")])
    assert_equal(results["rows"], torch.full((1,), 2.0))
    assert [group for group, *_ in flights] == ["A"]


def test_shapes_and_empty_parts_survive_the_flight(flights):
    shapes = [(2, 3), (1, 1), (0, 4), (2, 0, 5), ()]
    results = {}

    def task():
        results["all"] = yield from request(*(Sum(torch.ones(shape), ROWS, -2) for shape in shapes))

    run_tasks([task()])
    for answer, shape in zip(results["all"], shapes, strict=True):
        assert_equal(answer, torch.full(shape, 2.0))


def test_one_request_may_mix_sharded_and_whole(flights):
    results = {}

    def task():
        results["both"] = yield from request(Sum(torch.ones(2), ROWS, -2), Sum(torch.ones(3), ROWS, -1))

    run_tasks([task()])
    assert_equal(results["both"], (torch.full((2,), 2.0), torch.ones(3)))


def test_values_that_were_sent_are_not_changed(flights):
    value = torch.ones(4)

    def task():
        (answer,) = yield from request(Sum(value, ROWS, -2))
        answer.mul_(5)

    run_tasks([task()])
    assert_equal(value, torch.ones(4))


def test_interleaved_tasks_share_rounds_and_keep_order(flights):
    log, results = [], {}
    parts = (
        asking(log, "a", ROWS, rounds=1, size=2),
        asking(log, "b", WHOLE, rounds=2),
        asking(log, "c", ROWS, rounds=3),
    )
    run_tasks([keeping(interleave(*parts), results, "all")])
    assert_equal(results["all"], (torch.full((2,), 2.0), torch.full((1,), 3.0), torch.full((1,), 12.0)))
    assert [size for *_, size in flights] == [3, 1, 1]
    assert log == [
        *["a asks 0", "b asks 0", "b asks 1", "b ends", "c asks 0"],
        *["a ends", "c asks 1", "c asks 2", "c ends"],
    ]


def test_interleaving_of_nothing_sharded_never_suspends():
    task = interleave(asking([], "a", WHOLE), asking([], "b", WHOLE, rounds=2))
    with pytest.raises(StopIteration) as info:
        next(task)
    assert_equal(info.value.value, (torch.full((1,), 1.0), torch.full((1,), 3.0)))


def test_interleaved_tasks_in_interleaved_tasks(flights):
    results = {}
    inner = interleave(asking([], "a", ROWS), asking([], "b", ROWS, rounds=2))
    run_tasks([keeping(interleave(inner, asking([], "c", ROWS)), results, "all")])
    assert_equal(results["all"], ((torch.full((1,), 2.0), torch.full((1,), 6.0)), torch.full((1,), 2.0)))
    assert [size for *_, size in flights] == [3, 1]


def test_an_error_in_a_task_comes_through(flights):
    def failing():
        yield from request(Sum(torch.ones(1), ROWS, -2))
        raise RuntimeError("in the second half")

    with pytest.raises(RuntimeError, match="in the second half"):
        run_tasks([asking([], "a", ROWS), failing()])


def test_run_tasks_takes_any_iterable(flights):
    log = []
    run_tasks(asking(log, name, WHOLE) for name in "ab")
    assert log == ["a asks 0", "a ends", "b asks 0", "b ends"]
    run_tasks([])
