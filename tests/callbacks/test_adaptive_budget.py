"""AdaptiveMomentum keeps to its budget after every step, or names the smallest that is possible."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning.pytorch")

from lightning_memopt import AdaptiveMomentum
from lightning_memopt.callbacks import POLICIES
from tests.callbacks._adaptive import Module, Watch, dense_bytes, fit, steps_of

pytestmark = pytest.mark.slow

RECIPES = ("adapm", "adapm_lean", "adam_snsm", "adamw", "adam_mini", "muon")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("policy", POLICIES.names())
def test_the_budget_holds_after_every_step(policy, recipe):
    module = Module(recipe)
    budget = int(0.25 * dense_bytes(module))
    callback = AdaptiveMomentum(0.25, policy, every_n_steps=2, freeze_after=None)
    watch = Watch(budget)
    fit(module, callback, watch, max_steps=7)
    assert len(watch.sizes) == 14
    assert steps_of(callback) == [0, 2, 4, 6]
    assert [entry["momentum_bytes"] for entry in callback.history[1:]] == watch.sizes[3::4]
    floor = 0.4 if policy in ("schedule", "paper") else 0.75  # the budget is made use of
    assert watch.sizes[0] >= (0.75 if policy != "paper" else 0.4) * budget
    assert watch.sizes[-1] >= floor * budget or policy == "benefit"


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_blocks_whose_rank_costs_more_than_dense_momentum(budget):
    """A recipe may give small blocks such a rank."""
    module = Module("adapm_lean", rank=20)
    watch = Watch(int(budget * dense_bytes(module)))
    fit(module, AdaptiveMomentum(budget, "energy", every_n_steps=2), watch, max_steps=4)


def test_no_budget_but_a_quality():
    for policy in POLICIES.names():
        sizes = []
        for quality in (0.1, 0.95):
            callback = AdaptiveMomentum(None, policy, quality=quality, every_n_steps=2, freeze_after=None, max_moves=99)
            fit(Module(), callback, max_steps=4)
            at = 1 if policy == "schedule" else -1  # which ends with little in any case
            sizes.append(callback.history[at]["momentum_bytes"])
        assert 0 < sizes[0] < sizes[1] <= dense_bytes(Module()), policy
        assert sizes[1] < dense_bytes(Module()) or policy == "fidelity", "such a cosine takes all of the momentum"


def test_quality_with_dense_blocks():
    """The spectrum of dense momentum is known, so it can shrink to what keeps the quality, with no budget to meet."""
    for policy in ("uniform", "energy", "fidelity"):
        callback = AdaptiveMomentum(None, policy, quality=0.5, every_n_steps=4, freeze_after=None, max_moves=99)
        fit(Module("adamw"), callback, max_steps=8)
        first, *_, last = callback.history
        assert first["momentum_bytes"] == dense_bytes(Module())
        assert last["momentum_bytes"] < 0.5 * dense_bytes(Module()), policy


@pytest.mark.parametrize("recipe", ["adapm_lean", "adam_snsm"])
def test_too_small_a_budget_is_refused_and_the_smallest_named(recipe, monkeypatch):
    seen = []
    monkeypatch.setattr(Module, "training_step", lambda self, *_: seen.append(1) or self.loss(0))
    for min_rank in (1, 2):
        with pytest.raises(ValueError, match=rf"`budget` is 1000 bytes .* but rank {min_rank} for every") as caught:
            fit(Module(recipe), AdaptiveMomentum(1000, min_rank=min_rank))
        assert not seen, "raised before the first batch"
        smallest = int(str(caught.value).split(" take ")[1].split(" bytes")[0])
        for policy in POLICIES.names():
            callback = AdaptiveMomentum(smallest, policy, min_rank=min_rank, every_n_steps=1, freeze_after=None)
            fit(Module(recipe), callback, Watch(smallest), max_steps=3)
        with pytest.raises(ValueError, match=f"take {smallest} bytes"):
            fit(Module(recipe), AdaptiveMomentum(smallest - 1, min_rank=min_rank))
        seen.clear()
