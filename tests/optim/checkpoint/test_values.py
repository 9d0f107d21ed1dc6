"""What is no optimizer state is refused before anything changes, in words that tell what and where."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS
from lightning_memopt.optim.binding import params_of
from tests._compare import assert_equal
from tests._models import fill_grads


def trained(recipe: str = "adapm_lean") -> lm.MemOpt:
    torch.manual_seed(0)
    optimizer = lm.MemOpt(nn.Linear(6, 5).named_parameters(), recipe)
    for seed in range(2):
        fill_grads(params_of(optimizer), seed)
        optimizer.step()
    return optimizer


def refused(optimizer, state, kind, match):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(kind, match=match):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert_equal(after["state"], before["state"])


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (lambda s: s["param_groups"][0].update(params=[[0], 1]), TypeError, "of positions or names"),
        (lambda s: s["state"].update(zz={}), ValueError, r"state for parameters \['zz'\] that no group lists"),
        (lambda s: s["state"].update({99: {}}), ValueError, r"state for parameters \[99\] that no group lists"),
        (lambda s: s.update(param_names=5), ValueError, "no lists of names under 'param_names'"),
        (lambda s: s.update(param_names=[5]), ValueError, "no lists of names under 'param_names'"),
    ],
)
def test_the_structure_is_checked(change, kind, match):
    optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    refused(optimizer, state, kind, match)


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (torch.tensor(float("nan")), "'step' = nan: it must be a whole number of at least 0"),
        (torch.tensor(float("inf")), "'step' = inf: it must be a whole number"),
        (torch.tensor(-1.0), "'step' = -1: it must be a whole number of at least 0"),
        (2.5, "'step' = 2.5: it must be a whole number"),
        (torch.ones(3), r"a tensor of shape \(3,\) and torch.float32, not one number"),
        (torch.tensor(1.0, device="meta"), r"a tensor of shape \(\) and torch.float32, not one number"),
        (torch.tensor(1.0 + 0j), r"torch.complex64, not one number"),
        ("many", "str: 'many', not a number"),
    ],
)
def test_counters_that_count_nothing(step, match):
    optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["step"] = step
    refused(optimizer, state, ValueError, f"The saved state of 'weight' has .*{match}")


def test_a_counter_of_one_element_is_a_number():
    optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["step"] = torch.tensor([2])
    optimizer.load_state_dict(state)
    assert_equal(optimizer.state_dict()["state"][0]["step"], torch.tensor(2.0))


KEYS = [(0, "low_rank_q"), (0, "factored_row"), (0, "factored_col"), (1, "exp_avg"), (1, "exp_avg_sq")]


@pytest.mark.parametrize(("index", "key"), KEYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0])
def test_values_that_no_state_has(index, key, value):
    optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][index][key].view(-1)[-1] = value
    name, has = ("weight", "bias")[index], "NaN" if value != value else "infinite elements"
    if value == -1.0 and key in ("low_rank_q", "exp_avg"):
        optimizer.load_state_dict(state)
        return
    if value == -1.0:
        has = r"negative elements \(-1\), but is an average of squares"
    refused(optimizer, state, ValueError, f"optimizer state '{key}' of '{name}' contains {has}: the run diverged")


def quantized(value):
    """As torchao's optimizers save: a tensor of a class of its own."""
    return value.as_subclass(type("Quantized", (torch.Tensor,), {"__module__": "torchao.optim.subclass_8bit"}))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda value: value.to_sparse(), r"is sparse \(torch.sparse_coo\) in the checkpoint"),
        (quantized, r"is quantized \(Quantized\) in the checkpoint: convert it with `dequantize\(\)`"),
        (lambda value: value.to("meta"), "is on the meta device in the checkpoint"),
        (lambda value: value.to(torch.complex64), "mixes dtypes or is not floating-point"),
        (lambda value: value.int(), "mixes dtypes or is not floating-point"),
    ],
)
def test_tensors_that_hold_no_numbers(change, match):
    optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["factored_row"] = change(state["state"][0]["factored_row"])
    refused(optimizer, state, ValueError, match)


def test_fused_state_of_adamw_is_looked_at():
    """It has one tensor for several blocks."""
    weight = nn.Parameter(torch.ones(24, 8))
    adamw = torch.optim.AdamW([("attn.in_proj_weight", weight)])
    fill_grads([weight], 0)
    adamw.step()
    optimizer = lm.AdaPM([("attn.in_proj_weight", weight)])
    assert len(list(optimizer.blocks())) == 3
    state = copy.deepcopy(adamw.state_dict())
    state["state"][0]["exp_avg_sq"][3, 3] = -1.0
    refused(optimizer, state, ValueError, "'exp_avg_sq' of 'attn.in_proj_weight' contains negative elements")


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (lambda s: None, TypeError, "must be a dict with 'state' and 'param_groups', got NoneType"),
        (lambda s: [s], TypeError, "must be a dict with 'state' and 'param_groups', got list"),
        (lambda s: torch.ones(2), TypeError, r"got a tensor of shape \(2,\)"),
        (lambda s: {"param_groups": s["param_groups"]}, ValueError, "has no key 'state', it has 'param_groups'"),
        (lambda s: {"model": 1}, ValueError, "has no key 'state', it has 'model'"),
        (lambda s: {"state": s["state"]}, ValueError, "has no key 'param_groups', it has 'state'"),
        (lambda s: {**s, "state": []}, TypeError, r"has 'state' of the wrong type: list of 0"),
        (lambda s: {**s, "param_groups": torch.ones(2)}, TypeError, "has 'param_groups' of the wrong type: a tensor"),
        (lambda s: {**s, "param_groups": [3]}, TypeError, "group 0 of the state dict must be a dict with a list"),
        (lambda s: {**s, "param_groups": [{"lr": 1}]}, TypeError, "must be a dict with a list .* a dict with 'lr'"),
        (lambda s: {**s, "state": {0: torch.ones(2)}}, TypeError, "have a dict of state for parameter 0, got a tensor"),
    ],
)
def test_what_is_no_state_dict(change, kind, match):
    optimizer = trained()
    refused(optimizer, change(optimizer.state_dict()), kind, match)


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_kinds_keep_their_word_about_squares(recipe):
    """What a kind calls an average of squares is one of its keys, and never negative."""
    optimizer = trained(recipe)
    for _, param, block in optimizer.blocks():
        assert block.squares <= {key for kind in block.kinds for key in kind.keys}
        for key in block.squares:
            assert float(optimizer.state[param][block.prefix + key].min()) >= 0


def test_every_second_moment_is_one_of_squares():
    for name in SECOND_MOMENTS.names():
        kind = SECOND_MOMENTS.get(name)
        if kind.__module__.startswith("lightning_memopt."):
            assert kind.squares == kind.keys


def test_state_of_an_unknown_kind_is_named():
    optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["mystery"] = torch.zeros(5, 6)
    refused(optimizer, state, ValueError, r"the state has unknown keys \['mystery'\]")
