"""The metrics on one process: functions and classes agree, nothing counts twice, they behave as torchmetrics' do."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import pickle
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

from matplotlib import pyplot
from matplotlib.figure import Figure
from torchmetrics import Metric, MetricCollection

import lightning_memopt
import lightning_memopt as lm
from lightning_memopt.memory.snapshot import BlockFacts, PartBytes
from lightning_memopt.metrics import (
    MemorySavings,
    MomentumAllocation,
    OptimizerStateBytes,
    PeakMemory,
    heat_map,
    memory_savings,
    momentum_allocation,
    optimizer_state_bytes,
    peak_memory,
)
from tests._models import fill_grads

FUNCTIONS: dict[type[Metric], Callable[[lm.Snapshot], dict[str, Any]]] = {
    OptimizerStateBytes: optimizer_state_bytes,
    MemorySavings: memory_savings,
    PeakMemory: peak_memory,
    MomentumAllocation: momentum_allocation,
}
METRICS = list(FUNCTIONS)
NUMBERS = [OptimizerStateBytes, MemorySavings, PeakMemory]  # whose results are single numbers


@pytest.fixture(autouse=True)
def no_figures_left():
    pyplot.switch_backend("agg")
    pyplot.close("all")
    yield
    pyplot.close("all")


class Network(nn.Module):
    def __init__(self, layers: int = 1, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(40, 24)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(24, 2, 56) for _ in range(layers))
        self.lm_head = nn.Linear(24, 40, bias=False)
        self.to(dtype)


MODEL = Network()


def ours(recipe: str = "adapm_lean", model: nn.Module | None = None, **options: Any) -> lm.MemOpt:
    return lm.MemOpt((MODEL if model is None else model).named_parameters(), recipe, **options)


def adamw(model: nn.Module | None = None, **options: Any) -> torch.optim.AdamW:
    model = Network() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    fill_grads(list(model.parameters()), seed=0)
    optimizer.step()
    return optimizer


def snapshot(recipe: str = "adapm_lean", **options: Any) -> lm.Snapshot:
    return lm.take_snapshot(ours(recipe, **options), MODEL)


def values(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in result.items()}


def updated(kind: type[Metric], *snapshots: lm.Snapshot, **options: Any) -> Any:
    metric = kind(**options)
    for entry in snapshots:
        metric.update(entry)
    return metric


def computed(kind: type[Metric], *snapshots: lm.Snapshot) -> dict[str, Any]:
    return values(updated(kind, *snapshots).compute())


def history(metric: Any) -> dict[str, list[int]]:
    """Return the ranks of every block, also where one entry has made them a number."""
    return {name: ranks.reshape(-1).tolist() for name, ranks in metric.compute().items()}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return list(first) == list(second) and all(first[key] == pytest.approx(second[key], rel=1e-6) for key in first)


SNAPSHOTS: dict[str, Callable[[], lm.Snapshot]] = {
    **{recipe: (lambda recipe=recipe: snapshot(recipe)) for recipe in lm.recipe_names()},
    "torch's AdamW": lambda: lm.take_snapshot(adamw(MODEL), MODEL),
    "torch's Adafactor": lambda: lm.take_snapshot(other(torch.optim.Adafactor), MODEL),
    "RMSprop": lambda: lm.take_snapshot(other(torch.optim.RMSprop, centered=True, momentum=0.9), MODEL),
    "two optimizers": lambda: lm.take_snapshot([ours("adam_snsm"), other(torch.optim.SGD, momentum=0.9)], MODEL),
}


def other(kind: Any, **options: Any) -> torch.optim.Optimizer:
    model = MODEL
    optimizer = kind(model.parameters(), lr=0.0, **options)
    fill_grads(list(model.parameters()), seed=0)
    optimizer.step()
    return optimizer


# --- function and class ----------------------------------------------------------------------------------------------


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


def test_after_a_reset_the_allocation_knows_nothing_of_another_model():
    metric = updated(MomentumAllocation, lm.take_snapshot(ours(model=Network(3)), MODEL))
    metric.reset()
    taken = lm.take_snapshot(lm.AdaPMLean([("q_proj.weight", nn.Parameter(torch.zeros(30, 30)))], rank=4))
    metric.update(taken)
    assert history(metric) == {"q_proj.weight": [4]}
    assert metric.kinds() == {"q_proj.weight": ["low_rank"]}
    assert metric.matrices == ["q_proj.weight"]


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


# --- MetricCollection ------------------------------------------------------------------------------------------------


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


# --- OptimizerStateBytes ---------------------------------------------------------------------------------------------

ROLES = ["embedding", "query", "key", "value", "attention_output", "mlp", "head", "vector", "other"]
PARTS = ["momentum", "projections", "second_moment", "other"]
DOCUMENTED = ["total", *PARTS, "counters"]


def below(found: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def test_the_keys_are_always_the_same():
    keys = {tuple(computed(OptimizerStateBytes, make())) for make in SNAPSHOTS.values()}
    assert len(keys) == 1
    (found,) = keys
    assert list(found[:6]) == DOCUMENTED
    assert sorted(below(dict.fromkeys(found), "role/")) == sorted(ROLES)
    assert sorted(below(dict.fromkeys(found), "kind/momentum/")) == sorted(["other", *lm.MOMENTA.names()])
    assert sorted(below(dict.fromkeys(found), "kind/second_moment/")) == sorted(["other", *lm.SECOND_MOMENTS.names()])
    assert list(found[-2:]) == ["rank", "global"]
    assert tuple(optimizer_state_bytes(SNAPSHOTS["RMSprop"]())) == found[:-2]


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_parts_roles_and_kinds_add_up(name):
    found = computed(OptimizerStateBytes, SNAPSHOTS[name]())
    assert found["total"] == sum(found[key] for key in (*PARTS, "counters")) > 0
    assert sum(below(found, "role/").values()) == found["total"] - found["counters"]
    assert sum(below(found, "kind/momentum/").values()) == found["momentum"] + found["projections"]
    assert sum(below(found, "kind/second_moment/").values()) == found["second_moment"]
    assert found["kind/momentum/none"] == found["kind/second_moment/none"] == 0
    assert (found["projections"] > 0) == (name in ("adam_snsm", "adagrad_snsm", "two optimizers"))
    assert (found["other"] > 0) == (name == "RMSprop")


def tensors(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes under every key of the state, from the number of elements."""
    found: dict[str, int] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            key = key.rpartition(".")[2]
            found[key] = found.get(key, 0) + value.numel() * value.element_size()
    return found


def test_the_parts_of_our_state_by_its_keys():
    for recipe, keys in {
        "adam_snsm": (("exp_avg", "subspace_x"), ("subspace_p",)),
        "adamw": (("exp_avg",), ()),
        "adapm_lean": (("exp_avg", "lowrank_l", "lowrank_r"), ()),
    }.items():
        optimizer = ours(recipe)
        sizes, found = tensors(optimizer), computed(OptimizerStateBytes, optimizer.snapshot())
        assert found["counters"] == sizes.pop("step") == 4 * len(list(MODEL.parameters()))
        momentum = {key for key in sizes if key in keys[0] or key.startswith("low_rank")}
        assert found["projections"] == sum(sizes[key] for key in keys[1]), recipe
        assert found["second_moment"] == sum(
            size for key, size in sizes.items() if key not in momentum | set(keys[1])
        ), recipe
        assert found["momentum"] == sum(sizes[key] for key in momentum) > 0, recipe


def test_roles_and_kinds_of_adamw():
    found = computed(OptimizerStateBytes, SNAPSHOTS["torch's AdamW"]())
    state = 8
    assert found["role/embedding"] == found["role/head"] == state * 40 * 24
    assert found["role/query"] == found["role/key"] == found["role/value"] == state * 24 * 24
    assert found["role/mlp"] == state * 2 * 24 * 56
    assert found["role/vector"] == state * sum(p.numel() for p in MODEL.parameters() if p.ndim < 2)
    assert found["kind/momentum/dense"] == found["momentum"] == found["second_moment"]
    assert found["role/other"] == found["kind/momentum/other"] == 0


def test_a_kind_of_another_package_counts_as_other():
    class Halves(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})
            for param in self.param_groups[0]["params"]:
                self.state[param] = {"exp_avg": torch.zeros(5), "exp_avg_sq": torch.zeros(3), "extra": torch.zeros(2)}

    taken = lm.take_snapshot(Halves([nn.Parameter(torch.zeros(6, 7))]))
    found = computed(OptimizerStateBytes, taken)
    assert (found["kind/momentum/other"], found["kind/second_moment/other"], found["other"]) == (20, 12, 8)
    assert found["role/other"] == found["total"] == 40
    assert momentum_allocation(taken) == {"param_groups.0.0": ("other", -1)}


# --- MemorySavings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adamw_saves_nothing(dtype):
    model = Network(dtype=dtype)
    nothing = {"saved": 0.0, "saved_momentum": 0.0, "saved_second_moment": 0.0}
    assert computed(MemorySavings, lm.take_snapshot(adamw(model), model)) == nothing
    state_dtype = "bfloat16" if dtype == torch.bfloat16 else None
    assert computed(MemorySavings, ours("adamw", model, state_dtype=state_dtype).snapshot()) == nothing


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_saved_is_what_the_snapshot_says_and_what_both_optimizers_hold(recipe):
    optimizer = ours(recipe)
    mine, theirs = tensors(optimizer), tensors(adamw())
    mine.pop("step"), theirs.pop("step")
    expected = 1 - sum(mine.values()) / sum(theirs.values())
    found = computed(MemorySavings, optimizer.snapshot())
    assert found["saved"] == pytest.approx(expected, abs=1e-6)
    assert found["saved"] == pytest.approx(optimizer.snapshot().saved, abs=1e-6)
    assert found["saved"] == pytest.approx((found["saved_momentum"] + found["saved_second_moment"]) / 2, abs=1e-6)


def test_savings_of_momentum_and_second_moment():
    found = computed(MemorySavings, snapshot("adafactor"))
    vectors = sum(p.numel() for p in MODEL.parameters() if p.ndim < 2)
    assert 0.9 < found["saved_momentum"] <= 1
    assert 0.5 < found["saved_second_moment"] < 1
    found = computed(MemorySavings, lm.take_snapshot(adamw(MODEL, amsgrad=True), MODEL))
    assert found == {"saved": -0.5, "saved_momentum": 0.0, "saved_second_moment": -1.0}
    found = computed(MemorySavings, lm.take_snapshot(other(torch.optim.SGD, momentum=0.9), MODEL))
    assert found == {"saved": 0.5, "saved_momentum": 0.0, "saved_second_moment": 1.0}
    assert vectors > 0


# --- PeakMemory ------------------------------------------------------------------------------------------------------


def test_the_parts_of_the_peak_add_up():
    optimizer = ours()
    fill_grads(list(MODEL.parameters()), seed=0)
    found = computed(PeakMemory, lm.take_snapshot(optimizer, MODEL))
    size = 4 * sum(param.numel() for param in MODEL.parameters())
    assert list(found) == ["peak", "parameters", "gradients", "buffers", "optimizer_state", "rest"]
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


def test_the_rest_is_never_negative():
    taken = snapshot()
    found = computed(PeakMemory, replace(taken, memory=replace(taken.memory, peak=0)))
    assert (found["peak"], found["rest"]) == (0, 0)


def test_the_peak_needs_no_state():
    found = computed(PeakMemory, lm.take_snapshot(torch.optim.SGD(MODEL.parameters()), MODEL))
    assert found["optimizer_state"] == 0


# --- MomentumAllocation ----------------------------------------------------------------------------------------------

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def at(optimizer: lm.MemOpt, step: int) -> lm.Snapshot:
    return replace(optimizer.snapshot(), step=step)


def changed_over_steps() -> tuple[lm.MemOpt, Any]:
    """Rank 6, at step 3 rank 2, at step 7 none, at step 9 dense."""
    optimizer, metric = ours(rank=6), MomentumAllocation()
    metric.update(at(optimizer, 0))
    for step, change in ((3, {"rank": 2}), (7, {"momentum": "none"}), (9, {"momentum": "dense"})):
        metric.update(at(optimizer, step - 1))
        optimizer.reformat({HEAD: change})
        metric.update(at(optimizer, step))
    return optimizer, metric


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


# --- plots -----------------------------------------------------------------------------------------------------------


def drawn(ax: Any) -> int:
    """Return how many bars, cells, lines or points an axis shows."""
    return len(ax.patches) + len(ax.lines) + len(ax.collections)


def metric_of(kind: type[Metric]) -> Any:
    return changed_over_steps()[1] if kind is MomentumAllocation else updated(kind, snapshot())


@pytest.mark.parametrize("kind", METRICS)
def test_plot_draws_the_metric_as_it_is(kind):
    metric = metric_of(kind)
    figure, ax = metric.plot()
    assert ax in figure.axes
    assert drawn(ax) > 0
    assert [label.get_text() for label in ax.get_yticklabels()]
    figure.canvas.draw()
    pixels = torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8).reshape(-1, 4)
    assert len(pixels.unique(dim=0)) > 2, "there is something to see"


@pytest.mark.parametrize("kind", METRICS)
def test_plot_draws_a_result(kind):
    metric = metric_of(kind)
    figure, ax = metric.plot(metric.compute())
    assert ax in figure.axes
    assert drawn(ax) == drawn(metric.plot()[1]) > 0


@pytest.mark.parametrize("kind", METRICS)
def test_plot_draws_on_a_given_axis_and_leaves_no_figure_open(kind):
    metric, ax = metric_of(kind), Figure().add_subplot()
    figure, found = metric.plot(ax=ax)
    assert found is ax
    assert figure is ax.get_figure()
    assert drawn(ax) > 0
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("kind", NUMBERS)
def test_plot_draws_several_results_over_time(kind):
    metric = kind()
    results = [metric(snapshot(recipe)) for recipe in ("adapm_lean", "adam_snsm", "adamw")]
    for given in (results, tuple(results)):
        figure, ax = metric.plot(given)
        assert ax in figure.axes
        assert drawn(ax) >= len(kind.lines or results[0]), "a line or point per number"
    ax = Figure().add_subplot()
    pyplot.close("all")
    assert metric.plot(results, ax=ax)[1] is ax
    assert pyplot.get_fignums() == []


def test_bars_show_the_sizes():
    taken = SNAPSHOTS["adam_snsm"]()
    _, ax = updated(OptimizerStateBytes, taken).plot()
    shown = {label.get_text() for label in ax.get_yticklabels()}
    assert {"embedding", "head", "mlp", "subspace", "dense", "subset_norm"} <= shown
    assert "other" not in shown, "what there is none of is left out"
    widths = sorted(bar.get_width() for bar in ax.patches)
    found = optimizer_state_bytes(taken)
    largest = max(value for key, value in found.items() if "/" in key)
    assert ax.get_xlabel() in ("B", "KiB")
    assert widths[-1] * {"B": 1, "KiB": 1024}[ax.get_xlabel()] == pytest.approx(largest)
    _, ax = updated(MemorySavings, taken).plot()
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(list(memory_savings(taken).values()))
    _, ax = updated(PeakMemory, taken).plot()
    assert [label.get_text() for label in ax.get_yticklabels()][-1] == "peak"
    assert len(ax.patches) == 6


def test_more_state_than_adamws_shows_as_less_than_nothing():
    _, ax = updated(MemorySavings, lm.take_snapshot(adamw(MODEL, amsgrad=True), MODEL)).plot()
    assert ax.get_xlim()[0] < -1


def test_the_map_of_ranks_has_a_row_per_matrix_and_a_column_per_entry():
    _, metric = changed_over_steps()
    figure, ax = metric.plot()
    (mesh,) = ax.collections
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert f"{HEAD}  dense" in labels
    assert not any("norm" in label for label in labels), "vectors are left out"
    shown = mesh.get_array().reshape(len(labels), 4)
    row = shown[labels.index(f"{HEAD}  dense")]
    assert row.tolist()[:2] + row.tolist()[3:] == [6, 2, 24]
    assert not row[2] > 0, "no momentum stays white"
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 3, 7, 9, 10], "as wide as an entry was in force"
    assert len(figure.axes) == 2, "and a bar of colours"


def test_a_map_of_many_blocks_labels_some():
    ax = Figure().add_subplot()
    heat_map(ax, [0, 5], {f"block {count}": [count % 7, 3] for count in range(200)}, until=9)
    assert 30 <= len(ax.get_yticklabels()) <= 60


def test_a_loaded_history_takes_the_place_of_a_result_at_hand():
    _, metric = changed_over_steps()
    other = updated(MomentumAllocation, snapshot())
    other.compute()
    other.load_state_dict(metric.state_dict())
    assert history(other) == history(metric)
    other.plot()


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match="nothing to draw yet"), pytest.warns(UserWarning, match="before the ``upd"):
        MomentumAllocation().plot()
    vector = lm.AdaPMLean([("norm.weight", nn.Parameter(torch.zeros(5)))]).snapshot()
    with pytest.raises(ValueError, match="nothing to draw yet"):
        updated(MomentumAllocation, vector).plot()


# --- bad input -------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"job of 4 processes, this one has 1.*Take a new one here, or use the metric"):
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


def test_the_peak_needs_a_module():
    taken = ours().snapshot()
    for call in (PeakMemory().update, peak_memory):
        with pytest.raises(ValueError, match=r"knows nothing but .* take it with the model, .*take_snapshot\(optimiz"):
            call(taken)


# --- examples --------------------------------------------------------------------------------------------------------


def modules() -> list[str]:
    found = pkgutil.walk_packages(lightning_memopt.__path__, "lightning_memopt.")
    return ["lightning_memopt", *(entry.name for entry in found if not entry.name.endswith("__main__"))]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


WITH_EXAMPLES = ["measuring", "metrics.state_bytes", "metrics.savings", "metrics.peak_memory", "metrics.allocation"]


@pytest.mark.parametrize("name", modules())
def test_the_examples_in_docstrings_hold(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(verbose=False)
    for test in examples(module):
        output = io.StringIO()
        assert runner.run(test, out=output.write).failed == 0, output.getvalue()


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_these_modules_have_examples(name):
    found = examples(importlib.import_module(f"lightning_memopt.{name}"))
    assert sum(len(test.examples) for test in found) >= 5
    if name.startswith("metrics."):
        assert len(found) == 2, "the function and the class"


def test_blocks_as_facts_have_what_the_metrics_read():
    (block,) = lm.AdaPMLean([("q_proj.weight", nn.Parameter(torch.zeros(30, 20)))], rank=4).snapshot().blocks
    assert isinstance(block, BlockFacts)
    assert block.local_bytes == block.local.total == block.momentum_bytes + block.second_moment_bytes
