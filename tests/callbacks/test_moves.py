"""Which blocks change in one event, and that changes come to an end."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from lightning_memopt.callbacks.moves import TRIFLE, moves
from lightning_memopt.callbacks.policies import POLICIES, Candidate, Problem
from tests.callbacks._allocation import problem, taken

RANK = 512


def blocks(**ranks):
    """Return blocks of 64 × 64: 512 bytes per rank, dense from 32 on."""
    return tuple(Candidate(name, "mlp", 1, 64, 64, rank) for name, rank in ranks.items())


def ranks_in(asked):
    return {block.name: block.rank for block in asked.blocks}


def after(asked, changes):
    return replace(asked, blocks=tuple(replace(b, rank=changes.get(b.name, b.rank)) for b in asked.blocks))


def is_trifle(block, rank):
    if {block.rank, rank} & {0, block.dense_rank}:
        return block.rank == rank
    return abs(block.rank - rank) < TRIFLE * max(block.rank, rank)


def any_rank(rng, block, min_rank):
    return rng.choice((0, block.dense_rank, rng.randint(min(min_rank, block.dense_rank), block.dense_rank)))


# --- decisions -------------------------------------------------------------------------------------------------------


def test_nothing_to_do():
    assert moves(Problem(blocks(a=4, b=0, c=32), None), {"a": 4, "b": 0, "c": 32}, 4) == {}


@pytest.mark.parametrize(
    ("old", "new", "moved"),
    [(16, 13, False), (16, 12, True), (13, 16, False), (12, 16, True), (31, 32, True), (32, 31, True), (0, 1, True)],
)
@pytest.mark.parametrize("budget", [None, 40 * RANK])
def test_trifles_stay(old, new, moved, budget):
    assert moves(Problem(blocks(a=old), budget), {"a": new}, 4) == ({"a": new} if moved else {})


def test_a_trifle_that_the_budget_needs():
    assert moves(Problem(blocks(a=16, b=16), 30 * RANK), {"a": 15, "b": 15}, 1) == {"a": 15, "b": 15}
    assert moves(Problem(blocks(a=16, b=16), 31 * RANK), {"a": 15, "b": 15}, 1) == {"a": 15}


def test_the_budget_overrides_the_number_of_moves():
    asked = Problem(blocks(a=16, b=16, c=16, d=0), 24 * RANK)
    assert moves(asked, {"a": 8, "b": 8, "c": 4, "d": 4}, 1) == {"c": 4, "a": 8, "b": 8}


def test_what_frees_bytes_comes_first():
    asked = Problem(blocks(a=4, b=16, c=0, d=32), None)
    changes = moves(asked, {"a": 8, "b": 4, "c": 2, "d": 8}, 9)
    assert list(changes.items()) == [("d", 8), ("b", 4), ("c", 2), ("a", 8)]


def test_growth_from_nothing_comes_before_large_growth():
    target = {"a": 16, "b": 32, "c": 2, "d": 1}
    asked = Problem(blocks(a=8, b=8, c=0, d=0), 100 * RANK)
    assert moves(asked, target, 1) == {"c": 2}
    assert list(moves(asked, target, 3)) == ["c", "d", "b"]


def test_growth_takes_all_moves_where_it_fits():
    asked = Problem(blocks(a=16, b=4, c=4), 100 * RANK)
    assert moves(asked, {"a": 4, "b": 8, "c": 8}, 2) == {"b": 8, "c": 8}
    assert moves(asked, {"a": 4, "b": 8, "c": 8}, 3) == {"a": 4, "b": 8, "c": 8}


def test_shrinks_and_growth_happen_together_where_growth_needs_them():
    asked = Problem(blocks(a=16, b=16, c=4, d=4), 40 * RANK)
    target = {"a": 8, "b": 4, "c": 14, "d": 14}
    assert moves(asked, target, 2) == {"b": 4, "c": 14}
    assert moves(asked, target, 1) == {"b": 4}, "with one move a time, room is made first"
    assert moves(asked, target, 4) == {"b": 4, "a": 8, "c": 14, "d": 14}


def test_growth_is_cut_to_what_fits():
    assert moves(Problem(blocks(a=4, b=0), 10 * RANK), {"a": 4, "b": 12}, 4) == {"b": 6}
    assert moves(Problem(blocks(a=4, b=4), 10 * RANK + 511), {"a": 4, "b": 20}, 4) == {"b": 6}
    assert moves(Problem(blocks(a=4, b=4), 9 * RANK), {"a": 4, "b": 20}, 4) == {}


def test_a_cut_that_leaves_a_trifle_is_none():
    assert moves(Problem(blocks(a=8), 10 * RANK), {"a": 20}, 4) == {}
    assert moves(Problem(blocks(a=8), 11 * RANK), {"a": 20}, 4) == {"a": 11}


def test_a_cut_below_the_least_rank_is_none():
    assert moves(Problem(blocks(a=0), 3 * RANK, min_rank=4), {"a": 8}, 4) == {}
    assert moves(Problem(blocks(a=0), 4 * RANK, min_rank=4), {"a": 8}, 4) == {"a": 4}


def test_many_trifles_make_room_for_a_block_without_momentum():
    """A full budget: nobody else has more than a trifle too much, and still the newcomer must get its share."""
    names = [f"b{index}" for index in range(20)]
    asked = Problem(blocks(**dict.fromkeys(names, 20), newcomer=0), 400 * RANK)
    target = {**dict.fromkeys(names, 19), "newcomer": 19}
    rounds = settle(asked, target, 4)
    assert ranks_in(rounds[-1])["newcomer"] >= 19 * (1 - TRIFLE)


def test_over_budget_nothing_grows():
    """A target that is beyond the budget itself: what can shrink shrinks."""
    asked = Problem(blocks(a=16, b=4), 10 * RANK)
    assert moves(asked, {"a": 14, "b": 8}, 4) == {"a": 14}


# --- properties ------------------------------------------------------------------------------------------------------


def settle(asked, target, max_moves):
    """Apply moves until there are none; check each round on the way."""
    seen = [asked]
    distance = sum(abs(block.rank - target[block.name]) for block in asked.blocks)
    while changes := moves(seen[-1], target, max_moves):
        seen.append(check_round(seen[-1], target, max_moves, changes))
        nearer = sum(abs(block.rank - target[block.name]) for block in seen[-1].blocks)
        assert nearer < distance, "every round comes nearer to the target, so that there is a last one"
        distance = nearer
    return seen


def check_round(asked, target, max_moves, changes):
    assert changes == moves(asked, target, max_moves), "the same moves again"
    now, size = dict(ranks_in(asked)), taken(asked.blocks, ranks_in(asked))
    by_name = {block.name: block for block in asked.blocks}
    within = asked.budget is None or size <= asked.budget
    growing = False
    for name, rank in changes.items():
        old = by_name[name].rank
        assert min(old, target[name]) <= rank <= max(old, target[name])
        assert rank != old
        assert rank == 0 or rank >= min(asked.min_rank, by_name[name].dense_rank)
        assert not (growing and rank < old), "shrinks come first"
        growing = rank > old
        now[name] = rank
        before, size = size, taken(asked.blocks, now)
        assert asked.budget is None or size <= asked.budget or size < before
    if within:
        assert len(changes) <= max_moves
    elif taken(asked.blocks, target) <= asked.budget:
        assert size <= asked.budget, "one event is enough to keep to the budget"
        last = [name for name, rank in changes.items() if rank < by_name[name].rank][-1]
        assert len(changes) <= max_moves or size + by_name[last].nbytes(by_name[last].rank) > asked.budget
    return after(asked, changes)


@pytest.mark.parametrize("limited", [True, False], ids=["budget", "quality"])
@pytest.mark.parametrize("policy", POLICIES.names())
def test_a_constant_target_is_reached(policy, limited):
    """But for trifles, in finitely many rounds, never beyond the budget on the way."""
    for seed in range(100):
        rng = random.Random(seed)
        asked = problem(rng, limited=limited, signals=True)
        target = POLICIES.get(policy)(asked)
        end = settle(asked, target, rng.randint(1, 6))[-1]
        assert all(is_trifle(block, target[block.name]) for block in end.blocks)


def test_any_target_comes_to_an_end():
    """Also one beyond the budget; within it things stay within."""
    for seed in range(300):
        rng = random.Random(seed)
        asked = problem(rng, limited=True, signals=False)
        target = {block.name: any_rank(rng, block, asked.min_rank) for block in asked.blocks}
        rounds = settle(asked, target, rng.randint(1, 4))
        sizes = [taken(entry.blocks, ranks_in(entry)) for entry in rounds]
        for before, now in itertools.pairwise(sizes):
            assert now <= max(before, asked.budget)
