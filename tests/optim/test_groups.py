"""Parameter groups as people handle them: own rates and recipes, own keys, typos, numpy's numbers, replaced lists."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lightning_memopt as lm
from tests._compare import assert_equal
from tests._models import fill_grads, tiny_llama, train


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


def halves(model: nn.Module, **own) -> list[dict]:
    pairs = list(model.named_parameters())
    return [{"params": pairs[:2], **own}, {"params": pairs[2:]}]


def step(optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    fill_grads([param for group in optimizer.param_groups for param in group["params"]], seed)
    optimizer.step()


def on_disk(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


# --- own keys --------------------------------------------------------------------------------------------------------


OWN = {"lr_scale": 0.5, "rho": 0.05, "adaptive": False, "layer_id": 3, "name": "head", "weight_decay_scale": 2.0}


def test_own_keys_are_kept_saved_and_loaded(tmp_path):
    model = network()
    optimizer = lm.AdaPM(halves(model, **OWN))
    optimizer.param_groups[1]["tag"] = "later"  # as a scheduler or a callback adds one
    step(optimizer)
    assert {key: optimizer.param_groups[0][key] for key in OWN} == OWN
    again = lm.AdaPM(halves(model))
    again.load_state_dict(on_disk(optimizer.state_dict(), tmp_path / "o.pt"))
    assert {key: again.param_groups[0][key] for key in OWN} == OWN
    assert again.param_groups[1]["tag"] == "later"
    assert not OWN.keys() & again.param_groups[1].keys()
    optimizer.load_state_dict(optimizer.state_dict())


class SAM(torch.optim.Optimizer):
    """As its authors' repository has it: an optimizer around another one, whose groups they share."""

    def __init__(self, params, base, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, "adaptive": False, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    def step(self):
        self.base_optimizer.step()


def test_sam_goes_around_it():
    """Torch has put names into the groups that SAM hands on; they are used, and kept."""
    model = network()
    sam = SAM(model.named_parameters(), lm.AdaPM, lr=0.01)
    assert sam.param_groups[0]["rho"] == 0.05
    assert sam.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert sam.base_optimizer.parameter_names() == [sam.param_groups[0]["param_names"]]
    step(sam)
    twin = SAM(network().named_parameters(), lm.AdaPM, lr=0.02, rho=0.1)
    twin.base_optimizer.load_state_dict(sam.base_optimizer.state_dict())
    assert (twin.param_groups[0]["rho"], twin.param_groups[0]["lr"]) == (0.05, 0.01)


def test_names_in_groups_are_in_all_of_them_or_in_none():
    model = network()
    params = list(model.parameters())
    optimizer = lm.AdaPM([{"params": params[:2], "param_names": ["a", "b"]}])
    optimizer.add_param_group({"params": [("c", params[2])]})
    assert [group["param_names"] for group in optimizer.param_groups] == [["a", "b"], ["c"]]
    optimizer = lm.AdaPM([("a", params[0])])
    optimizer.add_param_group({"params": params[1:2], "param_names": ["b"]})
    assert not any("param_names" in group for group in optimizer.param_groups)
    assert optimizer.parameter_names() == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("weight_dacay", "weight_decay"),
        ("weightdecay", "weight_decay"),
        ("Lr", "lr"),
        ("learning_rate", "lr"),
        ("beta", "betas"),
        ("beta2", "betas"),
        ("ranks", "rank"),
        ("rnk", "rank"),
        ("projecton", "projection"),
        ("recipy", "recipe"),
    ],
)
def test_misspelt_options_are_refused(key, meant):
    model = network()
    with pytest.raises(
        ValueError, match=rf"In parameter group 0: Unknown key '{key}'. Did you mean '{meant}'\?.*custom key"
    ):
        lm.AdaPM(halves(model, **{key: 1}))
    optimizer = lm.AdaPM(halves(model)[:1])
    with pytest.raises(ValueError, match=rf"In parameter group 1: Unknown key '{key}'"):
        optimizer.add_param_group({**halves(model)[1], key: 1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("key", ["seed", "state_dtype", "nonfinite", "head_dim", "overrides", "momentum"])
def test_options_of_the_optimizer_are_none_of_a_group(key):
    with pytest.raises(ValueError, match=f"group 0: Unknown key '{key}': only the optimizer as a whole has"):
        lm.AdaPM(halves(network(), **{key: 1}))


def test_groups_of_torchs_adamw_make_an_optimizer():
    model = network()
    (group,) = torch.optim.AdamW(model.named_parameters(), lr=0.5).param_groups
    optimizer = lm.AdaPM([group])
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not {"amsgrad", "foreach", "fused"} & optimizer.param_groups[0].keys()
    with pytest.raises(ValueError, match="In parameter group 0: `amsgrad` is not supported"):
        lm.AdaPM([{**group, "amsgrad": True}])
    with pytest.raises(ValueError, match="has 4 parameters and 1 names in 'param_names'"):
        lm.AdaPM([{**group, "param_names": ["a"]}])


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lr", [np.float32(0.25), np.float64(0.25), np.int64(1), torch.tensor([0.25]), torch.tensor(0.25)], ids=repr
)
def test_a_learning_rate_may_be_numpys_or_a_tensor(lr, tmp_path):
    """In the constructor, and as a schedule writes it into the group."""
    model, twin = network(), network()
    optimizer, plain = lm.AdaPM(model.named_parameters(), lr=lr), lm.AdaPM(twin.named_parameters(), lr=float(lr))
    optimizer.param_groups[0] |= {"lr": lr, "weight_decay": np.float32(0.0), "betas": (np.float64(0.9), 0.95)}
    state = on_disk(optimizer.state_dict(), tmp_path / "o.pt")
    optimizer = lm.AdaPM(model.named_parameters(), lr=0.5)
    optimizer.load_state_dict(state)
    assert float(optimizer.param_groups[0]["lr"]) == float(lr)
    assert type(optimizer.param_groups[0]["lr"]) in (int, float, torch.Tensor)
    for one in (optimizer, plain):
        step(one)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_equal(mine, theirs)


def test_a_vector_is_no_learning_rate():
    with pytest.raises(TypeError, match="`lr` must be a number, got tensor"):
        lm.AdaPM(network().named_parameters(), lr=torch.ones(2))


# --- lists that are replaced -----------------------------------------------------------------------------------------


def bound(model: nn.Module) -> lm.MemOpt:
    """Of the first layer, with the names of all."""
    optimizer = lm.AdaPM(halves(model)[:1], lr=0.01)
    optimizer.bind(model)
    return optimizer


def replaced(optimizer: lm.MemOpt, model: nn.Module) -> None:
    """As Lightning's BaseFinetuning does on resume, from hyperparameters that it has saved."""
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    params = list(model.parameters())
    optimizer.param_groups = [{**group, "params": params[:2]}, {**group, "lr": 0.001, "params": params[2:]}]


@pytest.mark.parametrize(
    "use",
    [
        lambda optimizer, model: optimizer.snapshot(),
        lambda optimizer, model: repr(optimizer),
        lambda optimizer, model: optimizer.state_dict(),
        lambda optimizer, model: step(optimizer, 1),
        lambda optimizer, model: optimizer.bind(model),
        lambda optimizer, model: list(optimizer.blocks()),
        lambda optimizer, model: optimizer.reformat({"1.weight": {"second_moment": "factored"}}),
        lambda optimizer, model: optimizer.rebind({}),
        lambda optimizer, model: optimizer.load_state_dict(optimizer.state_dict()),
        lambda optimizer, model: copy.deepcopy(optimizer).snapshot(),
        lambda optimizer, model: optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(3)))]}),
    ],
)
def test_groups_of_known_parameters_are_adopted(use):
    model = network()
    optimizer = bound(model)
    step(optimizer)
    before = copy.deepcopy(dict(optimizer.state[model[0].weight]))
    replaced(optimizer, model)
    use(optimizer, model)
    step(optimizer, 2)
    assert [block.name for block in optimizer.snapshot().blocks][:4] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert optimizer.state_dict()["param_groups"][1]["lr"] == 0.001
    assert float(optimizer.state[model[0].weight]["step"]) > float(before["step"])
    assert float(optimizer.state[model[1].weight]["step"]) >= 1


def test_adopted_groups_load_what_was_saved_with_them():
    model, twin = network(), network()
    optimizer, other = bound(model), bound(twin)
    optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.001, "rank": 2})
    step(optimizer)
    replaced(other, twin)
    other.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_equal(dict(other.state[theirs]), dict(optimizer.state[mine]))


def test_groups_that_lack_hyperparameters_get_the_defaults():
    model = network()
    optimizer = bound(model)
    optimizer.param_groups = [{"params": list(model.parameters())}]
    step(optimizer)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["recipe"]) == (0.01, "adapm")
    optimizer.param_groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": -1.0}]
    with pytest.raises(ValueError, match="In parameter group 0: `lr` must be finite, at least 0"):
        optimizer.snapshot()


def test_a_group_is_a_dict():
    model = network()
    optimizer = lm.AdaPM(model.named_parameters())
    with pytest.raises(TypeError, match=r"A parameter group must be a dict such as .*got generator"):
        optimizer.add_param_group(nn.Linear(2, 2).parameters())


@pytest.mark.parametrize(
    "use", [lambda o: o.snapshot(), repr, lambda o: o.state_dict(), lambda o: o.load_state_dict(o.state_dict()), step]
)
def test_unknown_parameters_are_told_to_bind(use):
    """Without a tensor in the message."""
    model = network()
    optimizer = lm.AdaPM(halves(model)[:1])
    replaced(optimizer, model)
    with pytest.raises(ValueError, match=r"shape \(6, 6\) has no name.*call `optimizer\.bind\(model\)` first\. With"):
        use(optimizer)
    optimizer.bind(model)
    use(optimizer)


def test_bare_parameters_are_added_to_an_optimizer_of_names():
    model = network()
    optimizer = lm.AdaPM(halves(model)[:1])
    step(optimizer)
    with pytest.raises(ValueError, match=r"call `optimizer\.bind\(model\)` first"):
        optimizer.add_param_group({"params": list(model[1].parameters())})
    assert len(optimizer.param_groups) == 1
    optimizer.bind(model)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert optimizer.parameter_names() == [["0.weight", "0.bias"], ["1.weight", "1.bias"]]
    step(optimizer)


def test_a_parameter_without_a_group_is_not_saved():
    model = network()
    optimizer = lm.AdaPM(halves(model))
    step(optimizer)
    taken = optimizer.param_groups.pop()
    assert set(optimizer.state_dict()["state"]) == {0, 1}
    optimizer.param_groups.append(taken)
    assert float(optimizer.state_dict()["state"][3]["step"]) == 1


# --- several groups, and groups that come later ----------------------------------------------------------------------


def test_groups_have_their_own_hyperparameters_and_recipes():
    model = tiny_llama()
    decay = [(name, param) for name, param in model.named_parameters() if param.ndim > 1 and "lm_head" not in name]
    vectors = [(name, param) for name, param in model.named_parameters() if param.ndim < 2]
    head = [("lm_head.weight", model.lm_head.weight)]
    optimizer = lm.MemOpt(
        [
            {"params": decay, "weight_decay": 0.1, "rank": 7},
            {"params": vectors, "lr": 1e-2, "betas": (0.8, 0.99)},
            {"params": head, "recipe": "adam_snsm", "gap": 3},
        ],
        recipe="adapm_lean",
        lr=1e-3,
    )
    one, two, three = optimizer.param_groups
    assert (one["weight_decay"], two["lr"], two["betas"], three["recipe"]) == (0.1, 1e-2, (0.8, 0.99), "adam_snsm")
    assert three["betas"] == (0.9, 0.999)  # of its recipe
    assert one["betas"] == (0.9, 0.95)
    facts = {block.name: block for block in optimizer.snapshot().blocks}
    assert facts["model.layers.0.mlp.up_proj.weight"].rank == 7
    assert facts["lm_head.weight"].momentum == "subspace"
    assert optimizer._binding.blocks[model.lm_head.weight][0].recipe.momentum.gap == 3
    train(model, optimizer, 3)


def test_hyperparameters_of_a_group_reach_its_parameters_only():
    one, other = tiny_llama(), tiny_llama()
    grouped = [{"params": [entry], "lr": 0.0} for entry in one.named_parameters() if entry[0] == "lm_head.weight"]
    rest = [entry for entry in one.named_parameters() if entry[0] != "lm_head.weight"]
    first = lm.MemOpt([{"params": rest}, *grouped], lr=1e-3)
    second = lm.MemOpt(other.named_parameters(), lr=1e-3)
    head = one.lm_head.weight.detach().clone()
    for model, optimizer in ((one, first), (other, second)):
        fill_grads(list(model.parameters()), seed=0)
        optimizer.step()
    assert_equal(one.lm_head.weight.detach(), head)
    assert_equal(one.model.norm.weight, other.model.norm.weight)


def test_add_param_group():
    model = tiny_llama()
    named = list(model.named_parameters())
    optimizer = lm.MemOpt(named[:-1], recipe="adapm_lean")
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": named[-1:], "lr": 1e-4, "recipe": "adamw"})
    facts = optimizer.snapshot().blocks[-1]
    assert (facts.name, facts.role, facts.momentum) == ("lm_head.weight", "head", "dense")
    train(model, optimizer, 2)
    assert float(optimizer.state[model.lm_head.weight]["step"]) == 2
    assert float(optimizer.state[model.model.norm.weight]["step"]) == 4


def test_add_param_group_takes_names_from_a_bound_model():
    model = tiny_llama()
    optimizer = lm.MemOpt(list(model.model.parameters()))
    optimizer.bind(model)
    optimizer.add_param_group({"params": [model.lm_head.weight]})
    assert optimizer.snapshot().blocks[-1].name == "lm_head.weight"


def test_a_refused_group_changes_nothing():
    model = tiny_llama()
    named = list(model.named_parameters())
    optimizer = lm.MemOpt(named[:-1])
    before = repr(optimizer)
    with pytest.raises(ValueError, match=r"shape \(96, 32\) has no name"):
        optimizer.add_param_group({"params": [model.lm_head.weight]})
    with pytest.raises(ValueError, match="Unknown key 'learning_rate'"):
        optimizer.add_param_group({"params": named[-1:], "learning_rate": 1.0})
    assert repr(optimizer) == before
    train(model, optimizer, 1)


def test_groups_can_be_added_after_loading_and_copying():
    model = tiny_llama()
    named = list(model.named_parameters())
    optimizer = lm.AdaPMLean(named[:-1])
    optimizer.load_state_dict(optimizer.state_dict())
    model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.add_param_group({"params": [("lm_head.weight", model.lm_head.weight)]})
    assert set(optimizer.param_groups[1]) == {
        "params",
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "maximize",
        "max_update",
        "recipe",
    }
    train(model, optimizer, 1)


def test_groups_of_a_scheduled_optimizer_make_another():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=5)
    again = lm.AdaPMLean(optimizer.param_groups)
    again.bind(model)
    train(model, again, 1)
