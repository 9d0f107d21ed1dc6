"""Names that parameters get from a model, and parameters that are replaced by others (bind and rebind)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from tests._compare import assert_equal, assert_same_weights
from tests._models import fill_grads, tiny_gpt2, tiny_llama, train


def test_bare_parameters_need_bind():
    model = tiny_llama()
    optimizer = lm.AdaPM(list(model.parameters()))
    fill_grads(list(model.parameters()), seed=0)
    for call in (optimizer.step, optimizer.snapshot, optimizer.plan_table):
        with pytest.raises(ValueError, match=r"has no name.*named_parameters\(\).*bind\(model\).*BindNames.*MemOptCLI"):
            call()
    assert "call bind(model)" in repr(optimizer)
    optimizer.bind(model)
    twin = tiny_llama()
    train(model, optimizer, 2)
    named = lm.AdaPM(twin.named_parameters())
    train(twin, named, 2)
    assert_same_weights(model, twin)


def test_the_module_whose_parameters_are_passed_gives_the_names():
    model, twin = tiny_gpt2(), tiny_gpt2()
    optimizer = lm.AdaPMMini(model.parameters())
    assert "call bind(model)" in repr(optimizer), "it is not asked before names are needed: bind may come first"
    train(model, optimizer, 2)
    bound = lm.AdaPMMini(twin.named_parameters()).bind(twin)
    train(twin, bound, 2)
    assert_same_weights(model, twin)
    assert optimizer.parameter_names() == bound.parameter_names()
    fresh = lm.AdaPMMini(tiny_gpt2().parameters())
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.snapshot() == optimizer.snapshot()


def test_a_state_dict_before_the_first_step_is_complete():
    model = tiny_llama()
    saved = lm.AdaPM(model.parameters()).state_dict()
    assert len(saved["state"]) == len(list(model.parameters()))
    assert saved["param_names"] == [[name for name, _ in model.named_parameters()]]


def test_bind_takes_precedence_over_the_module_whose_parameters_are_passed():
    model = nn.ModuleDict({"net": tiny_llama()})
    optimizer = lm.AdaPM(model["net"].parameters()).bind(model)
    assert optimizer.snapshot().blocks[0].name.startswith("net.")


def test_a_module_whose_parameters_have_been_replaced_is_not_asked():
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    optimizer = lm.AdaPM(model.parameters())
    old = list(model.parameters())
    model["q_proj"] = nn.Linear(8, 8)
    fill_grads(old, 0)
    with pytest.raises(ValueError, match="has no name"):
        optimizer.step()


def test_a_copy_of_an_optimizer_holds_no_model():
    model = tiny_llama()
    optimizer = lm.AdaPM(model.parameters())
    assert copy.deepcopy(optimizer)._binding.owner is None
    assert optimizer._binding.owner is model
    optimizer.snapshot()
    assert optimizer._binding.owner is None


def test_vectors_need_no_names():
    weight = nn.Parameter(torch.ones(5))
    optimizer = lm.MemOpt([weight], lr=0.1)
    fill_grads([weight], 0)
    optimizer.step()
    assert optimizer.snapshot().blocks[0].role == "vector"


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2).parameters(), "model", None], ids=["parameters", "str", "none"])
def test_bind_takes_a_module(wrong):
    with pytest.raises(TypeError, match="`model` must be a module, got .*: pass the model itself"):
        lm.AdaPM([nn.Parameter(torch.ones(2, 2))]).bind(wrong)


def test_bind_refuses_another_model_and_late_changes():
    model = tiny_llama()
    optimizer = lm.AdaPMMini(model.named_parameters())
    with pytest.raises(ValueError, match="not a parameter of the given GPT2LMHeadModel"):
        optimizer.bind(tiny_gpt2())
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="blocks that have taken steps already"):
        optimizer.bind(model)  # would bring in the size of the heads
    optimizer = lm.AdaPMMini(model.named_parameters(), head_dim=8)
    train(model, optimizer, 1)
    optimizer.bind(model)  # changes nothing


def test_bind_keeps_given_names_and_brings_head_sizes():
    model = nn.ModuleDict({"inner": tiny_llama()})
    named = model["inner"].named_parameters()
    optimizer = lm.AdamMini(named, overrides={"model.layers.0.self_attn.q_proj.weight": {"momentum": "none"}})
    optimizer.bind(model)
    query = model["inner"].model.layers[0].self_attn.q_proj.weight
    assert optimizer.state[query]["blockwise_sq"].shape == (4, 1)
    block = optimizer._binding.blocks[query][0]
    assert (block.name, block.recipe.momentum.name) == ("model.layers.0.self_attn.q_proj.weight", "none")


def test_bind_after_steps_leaves_blocks_of_unknown_role_alone():
    model = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
    optimizer = lm.AdaPM([*model["one"].named_parameters("one")])
    fill_grads(list(model.parameters()), 0)
    optimizer.step()
    optimizer.add_param_group({"params": [("two.weight", model["two"].weight)]})
    optimizer.bind(model)
    roles = {block.name: (block.role, block.momentum) for block in optimizer.snapshot().blocks}
    assert roles["one.weight"] == ("other", "dense")
    assert roles["two.weight"] == ("linear", "low_rank")


def test_bind_after_steps_refuses_to_split():
    attention = nn.Module()
    attention.num_heads, attention.head_dim, attention.query_key_value = 2, 4, nn.Linear(8, 24, bias=False)
    model = nn.ModuleDict({"attn": attention})
    optimizer = lm.AdaPM(model.named_parameters())
    fill_grads(list(model.parameters()), 0)
    optimizer.step()
    with pytest.raises(ValueError, match="would change names, splits or head sizes of blocks that have taken steps"):
        optimizer.bind(model)


def test_bind_after_a_reformat_changes_nothing():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.parameters())
    optimizer.bind(model)
    train(model, optimizer, 1)
    optimizer.reformat({"lm_head.weight": {"rank": 2}})
    before = optimizer.snapshot()
    optimizer.bind(model)
    assert optimizer.snapshot() == before


def test_two_parameters_with_one_canonical_name_are_refused():
    params = [("module.a", nn.Parameter(torch.ones(2, 2))), ("a", nn.Parameter(torch.ones(2, 2)))]
    assert len(lm.MemOpt(params).snapshot().blocks) == 2  # an attribute that is called module
    params = [("_orig_mod.a", params[0][1]), params[1]]
    with pytest.raises(ValueError, match="Two blocks have the name 'a'"):
        lm.MemOpt(params)


def test_tied_weights_are_one_block():
    model = tiny_gpt2()
    names = [block.name for block in lm.AdaPM(model.named_parameters()).snapshot().blocks]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_a_bare_matrix_added_to_vectors_is_refused():
    vector, matrix = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 4))
    optimizer = lm.MemOpt([vector])
    with pytest.raises(ValueError, match=r"shape \(4, 4\) has no name"):
        optimizer.add_param_group({"params": [matrix]})
    optimizer.param_groups[0]["params"].append(matrix)
    fill_grads([vector, matrix], 0)
    with pytest.raises(ValueError, match=r"shape \(4, 4\) has no name"):
        optimizer.step()


def test_names_do_not_depend_on_wrappers():
    one, other = tiny_llama(), tiny_llama()
    train(one, lm.AdaPMLean(one.named_parameters()), 2)
    wrapped = nn.ModuleDict({"module": other})
    train(other, lm.AdaPMLean(wrapped.named_parameters()), 2)
    assert_same_weights(one, other)


def test_the_wrapper_that_lightning_hands_out_binds_the_optimizer_itself():
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = tiny_llama()
    optimizer = lm.AdaPMMini(model.parameters())
    wrapper = LightningOptimizer(optimizer)
    wrapper.bind(model)
    assert optimizer.snapshot() == wrapper.snapshot()
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 1)
    wrapper.load_state_dict(saved)
    assert optimizer.snapshot().step == wrapper.snapshot().step == 2


# --- rebinding -------------------------------------------------------------------------------------------------------


def test_rebind_goes_on_with_other_parameters_of_the_same_weights():
    one, two, other = tiny_llama(), tiny_llama(), tiny_llama()
    first, second = lm.AdaPMLean(one.named_parameters()), lm.AdaPMLean(two.named_parameters())
    train(one, first, 2)
    train(two, second, 2)
    other.load_state_dict(two.state_dict())
    old = list(two.parameters())
    second.rebind(dict(zip(two.parameters(), other.parameters(), strict=True)))
    assert not set(old) & set(second.state)
    train(one, first, 2, seed=1)
    train(other, second, 2, seed=1)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert_equal(mine, theirs)


def test_rebind_leaves_the_meta_device():
    with torch.device("meta"):
        meta = torch.nn.Linear(8, 6)
    optimizer = lm.AdaPMLean(meta.named_parameters())
    real = torch.nn.Linear(8, 6)
    optimizer.rebind({meta.weight: real.weight, meta.bias: real.bias})
    assert {value.device.type for state in optimizer.state.values() for value in state.values()} == {"cpu"}
    fill_grads(list(real.parameters()), 1)
    optimizer.step()


def test_rebind_before_names_are_known():
    old, new = torch.nn.Linear(8, 6), torch.nn.Linear(8, 6)
    optimizer = lm.AdaPMLean(old.parameters())
    optimizer.rebind({old.weight: new.weight, old.bias: new.bias})
    optimizer.bind(new)
    assert [block.name for block in optimizer.snapshot().blocks] == ["weight", "bias"]


def test_rebind_refuses_other_shapes():
    model = torch.nn.Linear(8, 6)
    optimizer = lm.AdaPMLean(model.named_parameters())
    match = r"'weight' has shape \(6, 8\), but its replacement has shape \(8, 6\): rebind"
    with pytest.raises(ValueError, match=match):
        optimizer.rebind({model.weight: torch.nn.Parameter(torch.zeros(8, 6))})
    assert optimizer.param_groups[0]["params"][0] is model.weight


def test_rebind_refuses_one_for_two():
    model = torch.nn.ModuleList([torch.nn.Linear(8, 6, bias=False), torch.nn.Linear(8, 6, bias=False)])
    optimizer = lm.AdaPMLean(model.named_parameters())
    new = torch.nn.Parameter(torch.zeros(6, 8))
    with pytest.raises(ValueError, match="Two parameters have the same replacement"):
        optimizer.rebind({param: new for param in model.parameters()})
