"""OptimizerStateBytes: bytes of the state by part, role and kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

import lightning_memopt as lm
from lightning_memopt.metrics import (
    OptimizerStateBytes,
    momentum_allocation,
    optimizer_state_bytes,
)
from tests.metrics._measured import MODEL, SNAPSHOTS, computed, ours, tensors

ROLES = ["embedding", "query", "key", "value", "attention_output", "mlp", "head", "linear", "convolution", "router"]
ROLES += ["lora", "vector", "other"]
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
    subspaces = ("snsm_lean", "adam_snsm", "adagrad_snsm", "galore", "fira", "two optimizers")
    assert (found["projections"] > 0) == (name in subspaces)
    assert (found["other"] > 0) == (name == "RMSprop")


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
