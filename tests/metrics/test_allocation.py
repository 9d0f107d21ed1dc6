"""MomentumAllocation: the ranks of every block over time."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

import lightning_memopt as lm
from lightning_memopt.metrics import (
    MomentumAllocation,
    momentum_allocation,
)
from tests.metrics._measured import (
    EMBEDDING,
    HEAD,
    MODEL,
    Network,
    adamw,
    at,
    changed_over_steps,
    history,
    ours,
    updated,
    values,
)


def test_after_a_reset_the_allocation_knows_nothing_of_another_model():
    metric = updated(MomentumAllocation, lm.take_snapshot(ours(model=Network(3)), MODEL))
    metric.reset()
    taken = lm.take_snapshot(lm.AdaPMLean([("q_proj.weight", nn.Parameter(torch.zeros(30, 30)))], rank=4))
    metric.update(taken)
    assert history(metric) == {"q_proj.weight": [4]}
    assert metric.kinds() == {"q_proj.weight": ["low_rank"]}
    assert metric.matrices == ["q_proj.weight"]


def test_the_history_follows_reformats():
    optimizer, metric = changed_over_steps()
    assert metric.steps.tolist() == [0, 3, 7, 9]
    found = history(metric)
    assert found[HEAD] == [6, 2, 0, 24]
    assert metric.kinds()[HEAD] == ["low_rank", "low_rank", "none", "dense"]
    assert found[EMBEDDING] == [6] * 4
    assert found["layers.0.norm1.weight"] == [1] * 4
    assert list(found) == list(momentum_allocation(optimizer.snapshot())) == list(metric.kinds())


def test_the_history_does_not_grow_when_nothing_changes():
    optimizer, metric = ours(), MomentumAllocation()
    for step in range(500):
        metric.update(at(optimizer, step))
    assert metric.steps.tolist() == [0]
    assert all(len(ranks) == 1 for ranks in history(metric).values())
    assert int(metric.until) == 499
    assert sum(tensor.numel() for tensor in (metric.steps, metric.ranks, metric.kind_codes)) < 100


def test_a_change_of_kind_at_the_same_rank_is_one():
    optimizer, metric = ours(rank=6), MomentumAllocation()
    metric.update(at(optimizer, 0))
    optimizer.reformat({HEAD: {"momentum": "subspace", "rank": 6}})
    metric.update(at(optimizer, 2))
    assert (metric.steps.tolist(), history(metric)[HEAD]) == ([0, 2], [6, 6])
    assert metric.kinds()[HEAD] == ["low_rank", "subspace"]


def test_going_back_to_an_earlier_step_takes_back_what_came_later():
    _, metric = changed_over_steps()
    metric.update(at(ours(rank=6, overrides={HEAD: {"rank": 4}}), 5))
    assert (metric.steps.tolist(), history(metric)[HEAD]) == ([0, 3, 5], [6, 2, 4])
    assert int(metric.until) == 5
    _, metric = changed_over_steps()
    metric.update(at(ours(rank=6, overrides={HEAD: {"rank": 2}}), 5))
    assert (metric.steps.tolist(), history(metric)[HEAD]) == ([0, 3], [6, 2])
    _, metric = changed_over_steps()
    metric.update(at(ours(rank=5), 0))
    assert (metric.steps.tolist(), history(metric)[HEAD]) == ([0], [5])


def test_two_snapshots_of_one_step_are_one_entry():
    metric = MomentumAllocation()
    for rank in (2, 3, 4):
        metric.update(at(ours(rank=rank), 5))
    assert (metric.steps.tolist(), history(metric)[HEAD]) == ([5], [4])


def test_blocks_that_appear_later_were_not_there_before():
    model = Network(2)
    model.layers[1].requires_grad_(False)
    metric = updated(MomentumAllocation, at(ours(model=model, rank=3), 0))
    columns = len(metric.compute())
    model.layers[1].requires_grad_(True)
    metric.update(at(ours(model=model, rank=3), 4))
    found = values(metric.compute())
    assert len(found) > columns
    late = "layers.1.linear1.weight"
    assert (found[late], found["layers.0.linear1.weight"]) == ([-1, 3], [3, 3])
    assert metric.kinds()[late] == ["", "low_rank"]
    model.layers[0].requires_grad_(False)
    metric.update(at(ours(model=model, rank=3), 6))
    assert values(metric.compute())["layers.0.linear1.weight"] == [3, 3, -1]
    metric.update(at(ours(model=model, rank=3), 8))
    assert metric.steps.tolist() == [0, 4, 6]


def test_the_history_survives_a_file_of_tensors_only():
    optimizer, metric = changed_over_steps()
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    loaded = MomentumAllocation()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    loaded.update(at(optimizer, 9))  # where nothing has changed
    assert values(loaded.compute()) == values(metric.compute())
    assert (loaded.kinds(), loaded.matrices) == (metric.kinds(), metric.matrices)
    assert (loaded.steps.tolist(), int(loaded.until)) == ([0, 3, 7, 9], 9)
    loaded.update(at(optimizer, 20))
    assert loaded.steps.tolist() == [0, 3, 7, 9], "it goes on"
    assert (int(loaded.until), int(metric.until)) == (20, 9)
    loaded.update(at(ours(rank=1), 21))
    assert history(loaded)[HEAD] == [6, 2, 0, 24, 1]
    assert history(metric)[HEAD] == [6, 2, 0, 24]


@pytest.mark.parametrize("kind", ["dense", "none", "subspace"])
def test_the_rank_of_every_kind(kind):
    weight = nn.Parameter(torch.zeros(12, 30))
    optimizer = lm.MemOpt([("h.attn.q_proj.weight", weight)], overrides={"*": {"momentum": kind}})
    ((found, rank),) = momentum_allocation(optimizer.snapshot()).values()
    assert (found, rank) == (kind, {"dense": 12, "none": 0, "subspace": optimizer.snapshot().blocks[0].rank}[kind])
    assert momentum_allocation(lm.take_snapshot(adamw(MODEL), MODEL))[HEAD] == ("dense", 24)
