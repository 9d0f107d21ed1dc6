"""What every policy must keep to, and the right decision of each on blocks whose structure is known."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from lightning_memopt.callbacks.budget import smallest
from lightning_memopt.callbacks.policies import POLICIES, Candidate, Problem
from lightning_memopt.callbacks.policies.spectra import Spectra, gains, tail
from lightning_memopt.optim.signals import BlockSignals
from lightning_memopt.plans.roles import ROLES
from tests.callbacks._allocation import problem, taken


def block(name, *, m=16, n=16, rank=1, role="mlp", oscillation=-0.2, spectrum=(), energy=1.0, count=1):
    signals = BlockSignals(oscillation, 1.0, energy, tuple(spectrum))
    return Candidate(name, role, count, m, n, rank, signals=signals)


def decide(policy, blocks, budget=None, **options):
    return POLICIES.get(policy)(Problem(tuple(blocks), budget, **options))


# --- every policy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signals", [True, False], ids=["signals", "first"])
@pytest.mark.parametrize("limited", [True, False], ids=["budget", "quality"])
@pytest.mark.parametrize("policy", POLICIES.names())
def test_every_policy(policy, limited, signals):
    for seed in range(100):
        asked = problem(random.Random(seed), limited=limited, signals=signals)
        ranks = POLICIES.get(policy)(asked)
        assert list(ranks) == [entry.name for entry in asked.blocks], "all blocks, in the model's order"
        for entry in asked.blocks:
            rank = ranks[entry.name]
            assert isinstance(rank, int)
            assert rank == 0 or min(asked.min_rank, entry.dense_rank) <= rank <= entry.dense_rank
        if limited:
            assert taken(asked.blocks, ranks) <= asked.budget
        assert POLICIES.get(policy)(asked) == ranks, "the same answer again"


@pytest.mark.parametrize("signals", [True, False], ids=["signals", "first"])
@pytest.mark.parametrize("policy", POLICIES.names())
def test_the_smallest_budget_is_enough(policy, signals):
    for seed in range(20):
        asked = problem(random.Random(seed), limited=True, signals=signals)
        asked = replace(asked, budget=smallest(asked.blocks, asked.min_rank))
        assert taken(asked.blocks, POLICIES.get(policy)(asked)) <= asked.budget


@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("policy", POLICIES.names())
def test_no_blocks(policy, budget):
    assert decide(policy, (), budget, progress=0.5) == {}


@pytest.mark.parametrize("budget", [1 << 20, None], ids=["budget", "quality"])
@pytest.mark.parametrize("policy", POLICIES.names())
def test_gradients_that_are_always_zero(policy, budget):
    blocks = [block(name, energy=0.0, oscillation=0.0, role=role) for name, role in (("a", "mlp"), ("b", "value"))]
    ranks = decide(policy, blocks, budget, min_rank=2, progress=0.0)
    assert all(rank >= 2 for rank in ranks.values())


@pytest.mark.parametrize("policy", ["uniform", "energy"])
def test_the_wanted_quality_is_reached_and_no_rank_beyond(policy):
    for seed in range(40):
        asked = problem(random.Random(seed), limited=False, signals=True)
        spectra, ranks = Spectra(asked.blocks), POLICIES.get(policy)(asked)
        # The energy policy leaves out directions below a millionth.
        assert spectra.kept(ranks) >= asked.quality - 1e-4
        highest = max(ranks.values())
        if highest > asked.min_rank:
            less = {name: min(rank, highest - 1) for name, rank in ranks.items()}
            assert policy == "energy" or spectra.kept(less) < asked.quality


# --- what is known of a spectrum -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("energy", "last", "count"), [(1.0, 1.0, 5), (0.1, 1.0, 9), (4.9, 1.0, 5), (3.0, 0.5, 100)])
def test_tail_falls_and_sums(energy, last, count):
    values = tail(energy, last, count)
    assert len(values) == count
    assert sum(values) == pytest.approx(energy)
    assert values[0] <= last
    assert values == sorted(values, reverse=True)


def test_tail_that_cannot_fall():
    assert tail(10.0, 1.0, 5) == [2.0] * 5
    assert tail(1.0, 0.0, 4) == [0.25] * 4
    assert tail(1.0, 1.0, 0) == []


def test_gains_of_what_is_known():
    entry = block("a", m=8, n=8, spectrum=(4, 2, 1), energy=7.0)
    assert entry.dense_rank == 4
    assert gains(entry) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])


@pytest.mark.parametrize("rank", [0, 4])
def test_gains_of_what_is_not_known(rank):
    """An even spread over the short side; the last rank is dense momentum, which keeps all the rest."""
    assert gains(block("a", m=8, n=8, rank=rank)) == pytest.approx([1 / 8, 1 / 8, 1 / 8, 5 / 8])


def test_gains_of_a_basis_that_has_only_just_begun():
    """What it does not hold yet must not hide behind its zeros."""
    assert gains(block("a", m=4, n=4, spectrum=(0.0,) * 4)) == pytest.approx([1 / 4, 3 / 4])
    assert gains(block("a", m=8, n=8, spectrum=(0.0, 0.0), energy=3.0)) == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


@pytest.mark.parametrize("energy", [7.0, 6.9, 7.5])
def test_gains_of_a_full_basis(energy):
    """Energies are estimated on a sample, and need not fit the spectrum exactly."""
    assert gains(block("a", m=4, n=4, spectrum=(4, 2, 1, 0), energy=energy)) == pytest.approx([4 / 7, 3 / 7])


def test_gains_fall_up_to_dense_momentum_and_sum_to_one():
    for seed in range(100):
        for entry in problem(random.Random(seed), limited=False, signals=True).blocks:
            values = gains(entry)
            assert len(values) == entry.dense_rank
            assert values[:-1] == sorted(values[:-1], reverse=True)
            assert sum(values) == pytest.approx(1) or entry.signals.momentum_energy == 0


# --- uniform ---------------------------------------------------------------------------------------------------------


def test_uniform_fills_the_budget_with_one_rank_and_gives_the_rest_in_order():
    # A rank costs 128 bytes in a and c, 256 in b, and 384 in d.
    blocks = [block("a"), block("b", m=32, n=32), block("c"), block("d", count=3)]
    ranks = decide("uniform", blocks, 3 * (128 + 256 + 128 + 384) + 300)
    assert ranks == {"a": 4, "b": 3, "c": 4, "d": 3}


def test_uniform_gives_tiny_blocks_dense_momentum():
    ranks = decide("uniform", [block("a"), block("row", m=1, n=9), block("b", m=3, n=5)], 2000, min_rank=4)
    assert ranks == {"a": 8, "row": 1, "b": 2}


def test_uniform_quality():
    spectrum = (8, 4, 2, 1, 1)
    blocks = [block("a", spectrum=spectrum, energy=16), block("b", spectrum=spectrum, energy=16)]
    for quality, rank in ((0.5, 1), (0.51, 2), (0.75, 2), (0.875, 3), (0.9, 4), (1.0, 5)):
        assert decide("uniform", blocks, quality=quality) == {"a": rank, "b": rank}
    assert decide("uniform", blocks, quality=0.5, min_rank=3) == {"a": 3, "b": 3}


def test_uniform_quality_does_not_depend_on_the_scale_of_gradients():
    one = [block("a", spectrum=(9, 1), energy=10), block("b", spectrum=(1, 1, 1, 1), energy=4)]
    other = [block("a", spectrum=(9e6, 1e6), energy=1e7), block("b", spectrum=(1, 1, 1, 1), energy=4)]
    assert decide("uniform", one, quality=0.8) == decide("uniform", other, quality=0.8)


@pytest.mark.parametrize("policy", ["uniform", "energy", "benefit"])
def test_quality_without_signals_changes_nothing(policy):
    blocks = [replace(block(name, rank=rank), signals=None) for name, rank in (("a", 0), ("b", 3), ("c", 8))]
    assert decide(policy, blocks) == {"a": 0, "b": 3, "c": 8}


# --- energy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5])
def test_energy_gives_an_exact_rank_and_no_more(count):
    low = block("low", spectrum=(1, 1, 1, 0, 0), energy=3.0, count=count)
    rich = block("rich", spectrum=(3, 2, 2, 2, 1), energy=15.0, count=count)
    budget = low.nbytes(3) + rich.nbytes(7)
    assert decide("energy", [low, rich], budget) == {"low": 3, "rich": 7}
    assert decide("uniform", [low, rich], budget) == {"low": 5, "rich": 5}
    assert decide("energy", [low, rich], 1 << 30) == {"low": 3, "rich": 8}
    assert decide("energy", [low], quality=1.0) == {"low": 3}


def test_energy_counts_bytes():
    """A stack costs and weighs as much as its matrices; a direction of a large block holds more, but for its price."""
    spectrum = (4, 4, 1, 1)
    stack = block("stack", spectrum=spectrum, energy=10, count=4)
    square = block("square", spectrum=spectrum, energy=10)
    assert decide("energy", [stack, square], stack.nbytes(2) + square.nbytes(2)) == {"stack": 2, "square": 2}
    large = block("large", m=64, spectrum=(2,) * 5, energy=10)
    assert decide("energy", [large, square], large.nbytes(2) + square.nbytes(1)) == {"large": 1, "square": 3}


def test_energy_ignores_the_scale_of_gradients():
    small, large = block("small", spectrum=(2, 1), energy=3), block("large", spectrum=(2e9, 1e9), energy=3e9)
    ranks = decide("energy", [small, large], 4 * 128)
    assert ranks == {"small": 2, "large": 2}


def test_energy_breaks_ties_by_the_order_of_the_model():
    blocks = [block(name, spectrum=(1, 1, 1), energy=3) for name in "abc"]
    assert decide("energy", blocks, 7 * 128) == {"a": 3, "b": 3, "c": 1}


def test_energy_gives_every_block_the_least_rank_first():
    blocks = [block("flat", spectrum=(1, 0), energy=1), block("rich", spectrum=(3, 3, 3), energy=9)]
    assert decide("energy", blocks, 5 * 128, min_rank=2) == {"flat": 2, "rich": 3}


def test_energy_stops_at_the_quality():
    blocks = [block("a", spectrum=(9, 1), energy=10), block("b", spectrum=(4, 3, 2, 1), energy=10)]
    assert decide("energy", blocks, quality=0.6) == {"a": 1, "b": 1}
    assert decide("energy", blocks, quality=0.8) == {"a": 1, "b": 2}
    assert decide("energy", blocks, quality=0.9) == {"a": 1, "b": 3}
    assert decide("energy", blocks, quality=1.0) == {"a": 2, "b": 4}


# --- benefit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1 << 20, 8 * 128, None])
def test_benefit_gives_momentum_to_what_oscillates(budget):
    blocks = [block("drifts", oscillation=0.3), block("swings", oscillation=-0.2), block("noise", oscillation=0.0)]
    ranks = decide("benefit", blocks, budget)
    assert ranks["swings"] > 0
    assert ranks["drifts"] == ranks["noise"] == 0
    if budget:
        assert ranks["swings"] == 8, "the others' bytes are its own"


@pytest.mark.parametrize("oscillation", [-0.03, -0.02, -0.01])
def test_benefit_leaves_a_block_between_the_thresholds_as_it_is(oscillation):
    sure = block("sure")
    for rank in (0, 3):
        ranks = decide("benefit", [sure, block("doubt", oscillation=oscillation, rank=rank)], 1 << 20)
        assert (ranks["doubt"] > 0) == (rank > 0)


def test_benefit_switches_beyond_the_thresholds():
    blocks = [block("a", oscillation=-0.031, rank=0), block("b", oscillation=-0.009, rank=8)]
    assert decide("benefit", blocks, 1 << 20) == {"a": 8, "b": 0}


def test_benefit_decides_nothing_while_few_oscillate():
    drifting = [block(name, oscillation=0.1, rank=rank) for name, rank in (("a", 2), ("b", 3), ("c", 0), ("d", 1))]
    kept = {"a": 2, "b": 3, "c": 0, "d": 1, "e": 1}
    swinging = block("e", oscillation=-0.3, rank=1)
    assert decide("benefit", [*drifting, swinging], 1 << 20) == kept, "one of five"
    assert decide("benefit", [*drifting[:3], swinging], 1 << 20)["a"] == 0, "one of four"
    assert decide("benefit", [*drifting, swinging], 5 * 128) == dict.fromkeys(kept, 1), "the budget comes first"


# --- schedule --------------------------------------------------------------------------------------------------------


def test_schedule_halves_the_budget_linearly():
    blocks = [block("a"), block("b")]
    for progress, rank in ((0.0, 8), (0.5, 6), (1.0, 4)):
        assert decide("schedule", blocks, 16 * 128, progress=progress) == {"a": rank, "b": rank}


def test_schedule_keeps_the_least_rank():
    ranks = decide("schedule", [block("a"), block("b")], 6 * 128, min_rank=3, progress=1.0)
    assert ranks == {"a": 3, "b": 3}


def test_schedule_halves_the_quality():
    blocks = [block("a", spectrum=(4, 2, 1, 1), energy=8)]
    assert decide("schedule", blocks, quality=1.0, progress=0.0) == {"a": 4}
    assert decide("schedule", blocks, quality=1.0, progress=1.0) == {"a": 1}


def test_schedule_needs_the_length_of_training():
    message = "The policy 'schedule' needs the length of training: set `max_steps` or `max_epochs`."
    with pytest.raises(ValueError, match=message):
        decide("schedule", [block("a")], 1 << 20)


# --- paper -----------------------------------------------------------------------------------------------------------


def test_paper_follows_the_roles():
    blocks = [block(role, role=role) for role in ROLES if role != "vector"]
    # Dense momentum of the value takes as much as 8 ranks; the other roles share the rest.
    special = {"embedding": 0, "value": 8, "attention_output": 0}
    shared = [each.role for each in blocks if each.role not in special]
    ranks = decide("paper", blocks, (8 + len(shared) * 3) * 128)
    assert ranks == {**special, **dict.fromkeys(shared, 3)}


def test_paper_gives_values_twice_the_rank_where_dense_does_not_fit():
    blocks = [block("embedding", role="embedding"), block("mlp"), block("value", role="value"), block("head")]
    assert decide("paper", blocks, 8 * 128) == {"embedding": 0, "mlp": 2, "value": 4, "head": 2}
    assert decide("paper", blocks, 9 * 128, min_rank=2) == {"embedding": 0, "mlp": 3, "value": 4, "head": 2}
    assert decide("paper", blocks, 10 * 128) == {"embedding": 0, "mlp": 1, "value": 8, "head": 1}
    assert decide("paper", blocks, 11 * 128) == {"embedding": 0, "mlp": 2, "value": 8, "head": 1}


def test_roles_that_do_without_momentum_get_none():
    blocks = [block(role, role=role) for role in ROLES if role != "vector"]
    spared = {"embedding": 0, "query": 0, "key": 0, "head": 0}
    paid = [role for role in ROLES if role not in (*spared, "vector")]
    assert decide("roles", blocks, 3 * len(paid) * 128) == {**dict.fromkeys(ROLES[:-2], 3), "other": 3, **spared}
    some = [block("query", role="query"), block("head", role="head")]
    assert decide("roles", some, 4 * 128) == {"query": 2, "head": 2}


def test_paper_quality():
    blocks = [block("embedding", role="embedding"), block("value", role="value")]
    blocks.append(block("mlp", spectrum=(4, 2, 1, 1), energy=8))
    assert decide("paper", blocks, quality=0.75) == {"embedding": 0, "value": 8, "mlp": 2}
