"""PeakMemory: the most that was in use, and its parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

import lightning_memopt as lm
from lightning_memopt.memory.rows import ROWS
from lightning_memopt.metrics import (
    PeakMemory,
    peak_memory,
)
from tests._models import fill_grads
from tests.metrics._measured import MODEL, Network, computed, ours, snapshot, tensors, values


def test_the_parts_of_the_peak_add_up():
    optimizer = ours()
    fill_grads(list(MODEL.parameters()), seed=0)
    found = computed(PeakMemory, lm.take_snapshot(optimizer, MODEL))
    size = 4 * sum(param.numel() for param in MODEL.parameters())
    assert list(found) == ["peak", *ROWS, "rest"]
    assert (found["parameters"], found["gradients"], found["buffers"]) == (size, size, 0)
    assert found["optimizer_state"] == sum(tensors(optimizer).values()), "counters included"
    assert found["peak"] == sum(found.values()) - found["peak"]
    assert found["rest"] > 0


def test_of_every_part_the_largest_of_all_snapshots_counts():
    model = Network()
    optimizer, metric = ours("adamw", model), PeakMemory()
    fill_grads(list(model.parameters()), seed=0)
    before = lm.take_snapshot([], model)
    metric.update(before)
    model.zero_grad()
    after = lm.take_snapshot(optimizer, model)
    metric.update(after)
    metric.update(replace(after, memory=replace(after.memory, peak=1, parameters=5, buffers=77)))
    found = values(metric.compute())
    assert after.memory.gradients == 0
    assert found["gradients"] == found["parameters"] == 4 * sum(param.numel() for param in model.parameters())
    assert found["optimizer_state"] == 2 * found["parameters"] + 4 * len(list(model.parameters()))
    assert found["buffers"] == 77
    assert found["peak"] == max(before.memory.peak, after.memory.peak)


@pytest.mark.parametrize(("unsharded", "scratch"), [(300, 70), (70, 300)])
def test_unsharded_units_and_scratch_do_not_exist_at_a_time(unsharded, scratch):
    taken = lm.take_snapshot(ours(), MODEL)
    held = taken.memory.parameters + taken.memory.gradients + taken.memory.buffers
    memory = replace(taken.memory, peak=10**6, unsharded=unsharded, scratch=scratch)
    found = computed(PeakMemory, replace(taken, memory=memory))
    assert (found["unsharded"], found["scratch"]) == (unsharded, scratch)
    assert found["rest"] == 10**6 - held - found["optimizer_state"] - 300


def test_the_rest_is_never_negative():
    taken = snapshot()
    found = computed(PeakMemory, replace(taken, memory=replace(taken.memory, peak=0)))
    assert (found["peak"], found["rest"]) == (0, 0)


def test_the_peak_needs_no_state():
    found = computed(PeakMemory, lm.take_snapshot(torch.optim.SGD(MODEL.parameters()), MODEL))
    assert found["optimizer_state"] == 0


def test_the_peak_needs_a_module():
    taken = ours().snapshot()
    match = r"contains only the optimizer's state: take it with the model, .*take_snapshot\(optimiz"
    for call in (PeakMemory().update, peak_memory):
        with pytest.raises(ValueError, match=match):
            call(taken)
