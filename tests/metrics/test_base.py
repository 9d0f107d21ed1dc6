"""All metrics on one process: functions and classes agree, nothing counts twice, they behave as torchmetrics' do."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

from torchmetrics import MetricCollection

import lightning_memopt as lm
from lightning_memopt.memory.snapshot import PartBytes
from lightning_memopt.metrics import (
    MemorySavings,
    MomentumAllocation,
    OptimizerStateBytes,
    PeakMemory,
    memory_savings,
    momentum_allocation,
    optimizer_state_bytes,
    peak_memory,
)
from tests.metrics._measured import (
    FUNCTIONS,
    METRICS,
    MODEL,
    SNAPSHOTS,
    adamw,
    computed,
    history,
    ours,
    same,
    snapshot,
    updated,
    values,
)


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_on_one_process_the_class_computes_what_the_function_returns(name):
    taken = SNAPSHOTS[name]()
    found = computed(OptimizerStateBytes, taken)
    assert found.pop("rank") == found["total"]
    assert found.pop("global") == taken.state_bytes == found["total"] - found["counters"]
    assert found == optimizer_state_bytes(taken)
    assert same(computed(MemorySavings, taken), memory_savings(taken))
    assert computed(PeakMemory, taken) == peak_memory(taken)
    metric = updated(MomentumAllocation, taken)
    last = {name: ranks[-1] for name, ranks in history(metric).items()}
    kinds = {name: kinds[-1] for name, kinds in metric.kinds().items()}
    assert {name: (kinds[name], last[name]) for name in last} == momentum_allocation(taken)


@pytest.mark.parametrize("kind", METRICS)
def test_updating_twice_counts_nothing_twice(kind):
    taken = snapshot()
    assert computed(kind, taken) == computed(kind, taken, taken) == computed(kind, taken, taken, taken)


@pytest.mark.parametrize("kind", [OptimizerStateBytes, MemorySavings])
def test_the_last_snapshot_is_what_counts(kind):
    first, second = snapshot("adapm_lean"), snapshot("adamw")
    assert computed(kind, first, second) == computed(kind, second) != computed(kind, first)


@pytest.mark.parametrize("kind", METRICS)
def test_forward_returns_the_value_and_does_not_add_up(kind):
    metric, taken = kind(), snapshot()
    expected = computed(kind, taken)
    for _ in range(3):
        assert values(metric(taken)) == expected
    assert values(metric.compute()) == expected


@pytest.mark.parametrize("kind", METRICS)
def test_forward_returns_the_value_of_its_own_snapshot(kind):
    metric = kind()
    first, second = snapshot("adapm_lean"), replace(snapshot("adamw"), step=5)
    assert values(metric(first)) == computed(kind, first)
    assert values(metric(second)) == computed(kind, second)
    assert values(metric.compute()) == computed(kind, first, second), "and goes on as if it had been updated"


@pytest.mark.parametrize("kind", METRICS)
def test_after_a_reset_it_is_as_new(kind):
    metric, later = updated(kind, snapshot("adamw"), replace(snapshot(), step=9)), snapshot("adam_snsm")
    metric.reset()
    metric.update(later)
    assert values(metric.compute()) == computed(kind, later)


@pytest.mark.parametrize("kind", METRICS)
def test_results_are_tensors_on_the_device_of_the_metric(kind):
    metric = kind().to("cpu")
    metric.update(snapshot())
    assert all(isinstance(value, Tensor) and value.device.type == "cpu" for value in metric.compute().values())
    assert metric.to(torch.device("cpu")).compute().keys() == metric.compute().keys()


@pytest.mark.parametrize("kind", [OptimizerStateBytes, PeakMemory])
def test_bytes_are_exact_beyond_what_a_float_can_hold(kind):
    size = 2**40 + 1
    (block,) = lm.AdaPMLean([("q_proj.weight", nn.Parameter(torch.zeros(30, 30)))], rank=4).snapshot().blocks
    big = replace(block, local=PartBytes(momentum=size), state=PartBytes(momentum=size))
    taken = replace(snapshot(), blocks=(big,), counter_bytes=0)
    found = updated(kind, taken).double().half().compute()
    assert int(found["total" if kind is OptimizerStateBytes else "optimizer_state"]) == size


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.clone()])
@pytest.mark.parametrize("kind", METRICS)
def test_copies_go_on_by_themselves(kind, copied):
    first, second = snapshot("adapm_lean"), replace(snapshot("adamw"), step=5)
    metric = updated(kind, first)
    twin = copied(metric)
    assert values(twin.compute()) == computed(kind, first)
    twin.update(second)
    assert values(twin.compute()) == computed(kind, first, second)
    assert values(metric.compute()) == computed(kind, first)
    assert values(copied(kind())(second)) == computed(kind, second), "a fresh one, too"


@pytest.mark.parametrize("groups", [True, False])
def test_in_a_collection(groups):
    made = MetricCollection([kind() for kind in METRICS], compute_groups=groups)
    first, second = snapshot("adapm_lean"), replace(snapshot("adam_snsm"), step=4)
    for taken in (first, second, second):
        made.update(taken)
    found = values(made.compute())
    for kind in METRICS:
        expected = computed(kind, first, second)
        assert {key: found[key] for key in expected} == expected, kind.__name__
    assert len(found) == sum(len(computed(kind, first, second)) for kind in METRICS), "no key of one hides another's"
    made.reset()
    made.update(first)
    assert values(made.compute())["total"] == optimizer_state_bytes(first)["total"]


@pytest.mark.parametrize("groups", [True, False])
def test_forward_of_a_collection_and_of_its_clones(groups):
    made = MetricCollection([kind() for kind in METRICS], compute_groups=groups, prefix="a/")
    first, second = snapshot("adapm_lean"), replace(snapshot("adam_snsm"), step=4)
    found = values(made(first))
    assert found["a/total"] == optimizer_state_bytes(first)["total"]
    clone = made.clone(prefix="b/")
    assert values(clone(second))["b/total"] == optimizer_state_bytes(second)["total"]
    assert values(clone.compute())["b/lm_head.weight"] == computed(MomentumAllocation, first, second)["lm_head.weight"]
    assert values(made.compute())["a/total"] == optimizer_state_bytes(first)["total"]
    assert values(made(second))["a/saved"] == pytest.approx(memory_savings(second)["saved"])


def test_two_collections_with_names_of_their_own_compare_optimizers():
    made = MetricCollection({"ours": OptimizerStateBytes(), "theirs": OptimizerStateBytes()}, compute_groups=False)
    made["ours"].update(snapshot())
    made["theirs"].update(lm.take_snapshot(adamw(MODEL), MODEL))
    found = values(made.compute())
    assert found["ours_total"] < found["theirs_total"]


def test_it_is_a_metric_of_a_module():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.allocation, self.sizes = MomentumAllocation(), OptimizerStateBytes()

    holder = Holder()
    holder.allocation.update(snapshot())
    holder.sizes.update(snapshot())
    saved = holder.state_dict()
    assert {key.partition(".")[0] for key in saved} == {"allocation"}, "bytes are measured anew, the history is kept"
    fresh = Holder()
    fresh.load_state_dict(saved)
    fresh.allocation.update(snapshot())  # where nothing has changed
    assert values(fresh.allocation.compute()) == values(holder.allocation.compute())


@pytest.mark.parametrize("kind", [OptimizerStateBytes, MemorySavings, MomentumAllocation])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_a_snapshot_without_state_is_refused(kind, make):
    taken = lm.take_snapshot(make(MODEL.parameters()), MODEL)
    metric = updated(kind, snapshot())
    before = values(metric.compute())
    with pytest.raises(ValueError, match="no optimizer state to measure.*take the snapshot after it"):
        metric.update(taken)
    assert values(metric.compute()) == before


@pytest.mark.parametrize("kind", [OptimizerStateBytes, MemorySavings, MomentumAllocation])
def test_a_snapshot_of_no_optimizer_is_refused(kind):
    with pytest.raises(ValueError, match="no optimizer state to measure"):
        kind().update(lm.take_snapshot([], MODEL))


@pytest.mark.parametrize("kind", METRICS)
def test_a_snapshot_of_another_world_size_is_refused(kind):
    taken = replace(snapshot(), world_size=4)
    match = r"job of 4 processes, but this one has 1.*Take a new one here, or use the metric"
    with pytest.raises(ValueError, match=match):
        kind().update(taken)
    assert FUNCTIONS[kind](taken) == FUNCTIONS[kind](replace(taken, world_size=1)), "the function reads it"


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("given", [torch.ones(3), "optimizer", None])
def test_what_is_no_snapshot_is_refused(kind, given):
    match = rf"Snapshot, got {type(given).__name__}: take one with .optimizer\.snapshot\(\)., or .*take_snapshot"
    if kind is PeakMemory:
        match = rf"Snapshot, got {type(given).__name__}"
    with pytest.raises(TypeError, match=match):
        kind().update(given)
    with pytest.raises(TypeError, match="got MemOpt"):
        kind().update(ours())
