"""The policy `fidelity`: what it expects of a rank is what updates show, and its ranks are those of brute force."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.callbacks.policies import Candidate, Problem, fidelity
from lightning_memopt.callbacks.policies.fidelity import cosines
from lightning_memopt.optim.signals import BlockSignals, Probe
from tests.callbacks._allocation import taken
from tests.kinds.contract.cases import gradient

NOISE = 1 / 19  # the damping of pure noise with β₁ = 0.9


def block(name="a", *, m=16, n=16, rank=2, spectrum=(4.0, 2.0), energy=10.0, agreement=0.5, damping=0.1, count=1):
    signals = BlockSignals(-0.1, 1.0, energy, tuple(spectrum), agreement, damping, NOISE)
    return Candidate(name, "mlp", count, m, n, rank, signals=signals)


def random_block(rng: random.Random, name: str) -> Candidate:
    spectrum = sorted((rng.expovariate(1.0) for _ in range(rng.randint(1, 4))), reverse=True)
    agreement, damping = rng.uniform(-0.2, 0.95), rng.uniform(0.02, 1.0)
    options = {"agreement": agreement, "damping": damping, "energy": sum(spectrum) * rng.uniform(1, 3)}
    return block(name, m=rng.choice((6, 8, 20)), n=rng.choice((6, 12)), spectrum=spectrum, **options)


def value(blocks, ranks) -> float:
    return sum(b.count * b.m * b.n * cosines(b)[ranks[b.name]] for b in blocks)


def test_a_budget_is_spent_as_brute_force_would():
    """Up to one step of one block: what is left may be too little for the best next step."""
    for seed in range(40):
        rng = random.Random(seed)
        blocks = [random_block(rng, name) for name in "abc"]
        least = sum(b.nbytes(1) for b in blocks)
        budget = int(least + rng.random() * (sum(b.nbytes(99) for b in blocks) - least))
        ranks = fidelity(Problem(tuple(blocks), budget))
        assert taken(blocks, ranks) <= budget
        everything = itertools.product(*(range(1, b.dense_rank + 1) for b in blocks))
        choices = [dict(zip("abc", each, strict=True)) for each in everything]
        best = max(value(blocks, each) for each in choices if taken(blocks, each) <= budget)
        step = max(b.m * b.n * (1 - cosines(b)[1]) for b in blocks)
        found, floor = value(blocks, ranks), value(blocks, dict.fromkeys("abc", 1))
        assert best - step <= found <= best + 1e-9
        assert found - floor >= 0.5 * (best - floor) - 1e-9, seed


def test_more_bytes_never_lower_the_cosine():
    rng = random.Random(1)
    blocks = tuple(random_block(rng, name) for name in "abcd")
    least, most = (sum(b.nbytes(rank) for b in blocks) for rank in (1, 99))
    found = [value(blocks, fidelity(Problem(blocks, budget))) for budget in (*range(least, most, 64), most)]
    assert found[-1] == pytest.approx(sum(b.m * b.n for b in blocks)), "all dense"
    assert all(after >= before - 0.02 * found[-1] for before, after in itertools.pairwise(found))


@pytest.mark.parametrize("quality", [0.1, 0.5, 0.8, 1.0])
def test_without_a_budget_every_block_gets_the_smallest_rank_that_reaches_the_quality(quality):
    for seed in range(40):
        rng = random.Random(seed)
        blocks = tuple(random_block(rng, name) for name in "abc")
        ranks = fidelity(Problem(blocks, None, quality))
        for each in blocks:
            curve = cosines(each)
            enough = [rank for rank in range(1, each.dense_rank + 1) if curve[rank] >= quality - 1e-9]
            assert ranks[each.name] == min(enough) or (curve[0] >= quality - 1e-9 and ranks[each.name] == 1)


def test_both_ends_are_exact():
    """Without momentum the cosine is the one that was measured. Dense momentum is full Adam's."""
    for seed in range(100):
        each = random_block(random.Random(seed), "a")
        curve = cosines(each)
        assert len(curve) == each.dense_rank + 1
        assert curve[-1] == 1
        assert max(curve) <= 1 + 1e-9
        if each.signals.damping < 1:
            assert curve[0] == pytest.approx(each.signals.agreement)


def test_a_gradient_without_noise_needs_no_momentum():
    assert min(cosines(block(agreement=1.0, damping=1.0))) == pytest.approx(1)
    flat, noisy = block("flat", agreement=1.0, damping=1.0), block("noisy", agreement=0.44, damping=0.06)
    ranks = fidelity(Problem((flat, noisy), flat.nbytes(1) + noisy.nbytes(6)))
    assert ranks == {"flat": 1, "noisy": 6}


def test_blocks_that_are_unknown_keep_the_least():
    """Of an earlier version's checkpoint no block is known at first: an even division."""
    known, unknown = block("known"), block("unknown", damping=0.0)
    assert fidelity(Problem((known, unknown), known.nbytes(4) + unknown.nbytes(1)))["unknown"] == 1
    assert fidelity(Problem((known, unknown), None, 0.9))["unknown"] == 1
    assert fidelity(Problem((unknown, block("b", damping=0.0)), 6 * 128)) == {"unknown": 3, "b": 3}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(48, 32), (32, 96)], ids=str)
@pytest.mark.parametrize(("noise", "directions"), [(4.0, 1), (2.0, 4)])
def test_expected_cosines_are_those_of_updates(shape, noise, directions):
    """Of low-rank momentum, with a signal of few directions that turns slowly, in noise; compared over 60 steps."""
    name, ranks = "model.layers.0.mlp.up_proj.weight", (1, 4, 12)
    decay = (0.7 ** torch.arange(directions)).unsqueeze(1)
    right = gradient((directions, shape[1]), 1) * decay / math.sqrt(directions)
    params = {rank: nn.Parameter(torch.zeros(shape)) for rank in ranks}
    optimizers = {
        rank: lm.AdaPMLean([(name, param)], rank=rank, betas=(0.9, 0.95), max_update=None)
        for rank, param in params.items()
    }
    probes = {rank: Probe(optimizer) for rank, optimizer in optimizers.items()}
    left, average = gradient((shape[0], directions), 2), torch.zeros(shape)
    found: dict[int, list[float]] = {rank: [] for rank in ranks}
    for number in range(3, 103):
        left = 0.98 * left + math.sqrt(1 - 0.98**2) * gradient((shape[0], directions), number)
        grad = left @ right + noise * gradient(shape, 1000 + number)
        average = 0.9 * average + 0.1 * grad
        for rank, param in params.items():
            param.grad = grad.clone()
            before = param.detach().clone()
            optimizers[rank].step()
            row, column = (optimizers[rank].state[param][f"factored_{key}"] for key in ("row", "col"))
            update, adam = (before - param.detach()).flatten(), (average / (row * column).sqrt()).flatten()
            found[rank].append(float(torch.cosine_similarity(update, adam, dim=0)))
            if number in (42, 72):
                probes[rank].read()
    for rank in ranks:
        each = Candidate(name, "mlp", 1, *shape, rank, signals=probes[rank].read()[name])
        measured = sum(found[rank][40:]) / len(found[rank][40:])
        assert cosines(each)[rank] == pytest.approx(measured, abs=0.06), rank
