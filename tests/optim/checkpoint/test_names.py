"""State goes to the parameter of its name; by position only where a file has no names, and never in silence."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import lightning_memopt as lm
from tests._compare import assert_equal
from tests._models import fill_grads


def network(seed: int = 0) -> nn.Sequential:
    """Two parameters of every shape."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


def stepped(make, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = make(list(model.named_parameters()))
    fill_grads([param for param in model.parameters()], 0)
    optimizer.step()
    return optimizer


def same_state(one: torch.optim.Optimizer, first: nn.Module, other: torch.optim.Optimizer, second: nn.Module) -> None:
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert_equal(dict(other.state[theirs]), dict(one.state[mine]))


@pytest.fixture
def saved(tmp_path):
    """A model, its optimizer after a step, and what a file has of it."""
    model = network()
    optimizer = stepped(lm.AdaPM, model)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    return model, optimizer, torch.load(tmp_path / "o.pt", weights_only=True)


def test_the_order_of_parameters_does_not_matter(saved):
    model, optimizer, state = saved
    assert state["param_names"] == [["0.weight", "0.bias", "1.weight", "1.bias"]]
    twin = network()
    reversed_ = lm.AdaPM(list(twin.named_parameters())[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reversed_.load_state_dict(state)
    same_state(optimizer, model, reversed_, twin)


def test_groups_are_told_by_their_parameters():
    def grouped(model: nn.Module, order: int) -> lm.MemOpt:
        pairs = list(model.named_parameters())
        groups = [{"params": pairs[:2], "lr": 0.1}, {"params": pairs[2:], "lr": 0.2}]
        return lm.AdaPM(groups[::order])

    model, twin = network(), network()
    optimizer, other = grouped(model, 1), grouped(twin, -1)
    fill_grads(list(model.parameters()), 0)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.2, 0.1]
    same_state(optimizer, model, other, twin)


@pytest.mark.parametrize("prefix_of", ["saved", "ours"])
def test_a_prefix_before_all_names_does_not_matter(prefix_of):
    """A LightningModule's parameters have the name of its attribute before their own."""
    model, twin = network(), network()
    pairs, prefixed = list(model.named_parameters()), [(f"net.{name}", p) for name, p in twin.named_parameters()]
    if prefix_of == "saved":
        pairs, prefixed = [(f"net.{name}", p) for name, p in pairs], list(twin.named_parameters())
    optimizer, other = lm.AdaPM(pairs), lm.AdaPM(prefixed[::-1])
    fill_grads(list(model.parameters()), 0)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    same_state(optimizer, model, other, twin)


def named(prefix: str, model: nn.Module) -> lm.MemOpt:
    return lm.AdaPM([(prefix + name, param) for name, param in model.named_parameters()])


def test_other_names_are_refused(saved):
    """Also those of a twin: an encoder's state fits a decoder of the same build in every shape."""
    _, optimizer, _ = saved
    before = copy.deepcopy(optimizer.state_dict()["state"])
    state = named("encoder.", network()).state_dict()
    with pytest.raises(ValueError, match=r"state for 'encoder\.0\.weight', which the optimizer does not train.*rename"):
        named("decoder.", network()).load_state_dict(state)
    fewer = lm.AdaPM(list(network().named_parameters())[:2]).state_dict()
    with pytest.raises(ValueError, match=r"has no optimizer state for '1\.bias', which the optimizer trains"):
        optimizer.load_state_dict(fewer)
    pairs = list(network().named_parameters())
    two = lm.AdaPM([{"params": pairs[:1]}, {"params": pairs[1:]}])
    three = lm.AdaPM([{"params": pairs[:2]}, {"params": pairs[2:]}])
    with pytest.raises(ValueError, match=r"Parameter group 0 of the optimizer and that of .* differ in '0\."):
        two.load_state_dict(three.state_dict())
    with pytest.raises(ValueError, match=r"has 2 parameter groups, the optimizer 1: .*add them in `configure_optim"):
        optimizer.load_state_dict(three.state_dict())
    assert_equal(optimizer.state_dict()["state"], before)


@pytest.mark.parametrize("names", [[["a", "b"]], [["a", "a", "b", "c"]]])
def test_names_that_do_not_fit_the_groups_are_refused(saved, names):
    _, optimizer, state = saved
    with pytest.raises(ValueError, match="remove 'param_names' from it to load it by position"):
        optimizer.load_state_dict({**state, "param_names": names})


def test_a_file_without_names_goes_by_position_and_says_so(saved):
    model, optimizer, state = saved
    del state["param_names"]
    twin = network()
    other = lm.AdaPM(twin.named_parameters())
    with pytest.warns(
        lm.ResumeWarning, match="The saved optimizer state has no parameter names, so state was assigned by position"
    ):
        other.load_state_dict(state)
    same_state(optimizer, model, other, twin)


@pytest.mark.parametrize("with_names", [True, False])
def test_names_of_torchs_optimizers_are_used(with_names):
    model, twin = network(), network()
    torchs = torch.optim.AdamW(model.named_parameters() if with_names else model.parameters(), lr=1e-3)
    fill_grads(list(model.parameters()), 0)
    torchs.step()
    ours = lm.MemOpt(list(twin.named_parameters())[::-1], "adamw")
    if not with_names:
        with pytest.raises(ValueError, match=r"'exp_avg' has shape \(6, 6\), expected \(6,\)"):
            ours.load_state_dict(torchs.state_dict())
        return
    ours.load_state_dict(torchs.state_dict())
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert_equal(ours.state[mine]["exp_avg"], torchs.state[theirs]["exp_avg"])


def test_torchs_optimizer_reads_ours_and_stays_without_names():
    """Names are beside the groups: in them, torch would refuse bare parameters that are added later."""
    model = network()
    state = stepped(lambda pairs: lm.MemOpt(pairs, "adamw"), model).state_dict()
    params = list(model.parameters())
    torchs = torch.optim.AdamW(params)
    torchs.load_state_dict(state)
    torchs.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert_equal(torchs.state[params[0]]["exp_avg"], state["state"][0]["exp_avg"])


@pytest.mark.parametrize("flatten", [False, True])
def test_torchs_distributed_checkpoints_know_no_names_of_ours(flatten, tmp_path):
    """So older checkpoints, which have none, still load; the names that torch puts in decide the order."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, twin = network(), network()
    optimizer = stepped(lm.AdaPM, model)
    other = lm.AdaPM([{"params": list(twin.named_parameters())[::-1], "lr_scale": 1.0}])
    optimizer.param_groups[0]["lr_scale"] = 0.5
    fill_grads(list(twin.parameters()), 1)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    assert "param_names" not in str(list(state)) + str(state.get("param_groups"))
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    target = get_optimizer_state_dict(twin, other, options=options)
    dcp.load({"optimizer": target}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.warns(lm.ResumeWarning) as told:
        set_optimizer_state_dict(twin, other, target, options=options)
    (line,) = [str(entry.message) for entry in told if entry.category is lm.ResumeWarning]
    assert "lr_scale 0.5 instead of 1" in line, "nothing goes by position"
    same_state(optimizer, model, other, twin)
    assert other.param_groups[0]["lr_scale"] == 0.5


def test_an_optimizer_without_names_says_so():
    vectors = [("a", nn.Parameter(torch.ones(3))), ("b", nn.Parameter(torch.ones(3)))]
    state = lm.AdaPM(vectors).state_dict()
    with pytest.warns(
        lm.ResumeWarning, match="The optimizer has no parameter names, so state was assigned by position"
    ):
        lm.AdaPM([param for _, param in vectors]).load_state_dict(state)


def test_an_optimizer_without_names_has_none_in_its_file():
    assert "param_names" not in lm.AdaPM([nn.Parameter(torch.ones(3))]).state_dict()
    assert "param_names" not in lm.AdaPM(list(network().parameters())).state_dict()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_state_of_other_optimizers_is_refused(kind):
    """Without momentum SGD has no state at all, and its learning rate would have been taken."""
    model = torch.nn.Linear(4, 4)
    saved = kind(model.named_parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    saved.step()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="AdaPMLean cannot resume from this checkpoint: .* lacks 'betas'"):
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_distributed_checkpoints_of_an_older_version_lack_keys(tmp_path):
    """Torch loads into what is there, and refuses a key that the file does not have."""
    model, saved = torch.nn.Linear(4, 4), {}
    for max_update in (10.0, 3.0):
        optimizer = lm.AdaPMLean(model.named_parameters(), max_update=max_update)
        fill_grads(list(model.parameters()), 0)
        optimizer.step()
        saved[max_update] = get_optimizer_state_dict(model, optimizer)
    for group in saved[10.0]["param_groups"]:
        del group["max_update"]
    dcp.save({"optimizer": saved[10.0]}, checkpoint_id=tmp_path)
    template = {"optimizer": saved[3.0]}
    dcp.load(template, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(model, optimizer, template["optimizer"])
    assert [group["max_update"] for group in optimizer.param_groups] == [3.0]
