"""The warning about weights whose role is unknown."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

import lightning_memopt as lm
from tests._models import tiny_gpt2, tiny_llama


def messages(optimizer: torch.optim.Optimizer, steps: int = 2) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.ones_like(param) if param.requires_grad else None
            optimizer.step()
    ours = [each for each in caught if isinstance(each.message, lm.RoleWarning)]
    assert all(each.filename == __file__ for each in ours), "the line that steps is shown"
    return [str(each.message) for each in ours]


def params(*shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layers.{place}.strange.weight", nn.Parameter(torch.ones(shape))) for place, shape in enumerate(shapes)]


def test_unknown_weights_are_named_once_with_two_ways_out():
    known = [("layers.0.mlp.up_proj.weight", nn.Parameter(torch.ones(20, 20)))]
    (text,) = messages(lm.AdaPM([*known, *params((4, 5), (30, 6))]))
    assert "33% of the parameters that train have no known role" in text
    assert "(layers.1.strange.weight, layers.0.strange.weight): the recipe 'adapm' gives" in text, "the largest first"
    assert "\n" not in text
    assert "overrides={'layers.*.strange.weight': {'momentum': 'low_rank'}}" in text
    assert "register_naming_scheme" in text


def test_the_override_of_the_message_works():
    optimizer = lm.AdaPM(params((8, 6)), overrides={"layers.*.strange.weight": {"momentum": "low_rank"}})
    assert optimizer.snapshot().blocks[0].momentum == "low_rank"
    assert messages(optimizer) == []
    (text,) = messages(lm.AdaPM(params((8, 6)), overrides={"layers.0.strange.weight": {"weight_decay": 0}}))
    assert "Call `optimizer.bind(model)` before the first step, which finds more" in text


def test_a_model_that_was_bound_is_not_asked_for_again():
    model = nn.ModuleDict({"strange": nn.Linear(8, 6, bias=False)})
    optimizer = lm.AdaPM(model.named_parameters())
    optimizer.bind(model)
    (text,) = messages(optimizer)
    assert "strange.weight" in text
    assert "bind" not in text


def test_little_is_no_reason_to_warn():
    known = [("layers.0.mlp.up_proj.weight", nn.Parameter(torch.ones(20, 20)))]
    assert messages(lm.AdaPM([*known, *params((4, 5))])) == []
    frozen = params((40, 50))
    frozen[0][1].requires_grad_(False)
    assert messages(lm.AdaPM([*known, *frozen])) == []
    assert messages(lm.AdaPM(tiny_llama().named_parameters())) == []


@pytest.mark.parametrize("recipe", ["adamw", "adapm_lean", "adafactor"])
def test_recipes_that_treat_all_matrices_alike_need_no_roles(recipe):
    assert messages(lm.MemOpt(params((8, 6)), recipe)) == []


def test_what_is_not_saved_is_said_with_its_share_and_a_way_that_works():
    model = nn.ModuleList(nn.ModuleDict({"strange": nn.Linear(64, 64)}) for _ in range(2))
    (text,) = messages(lm.AdamSNSM(model.named_parameters()))
    assert "98% of the parameters that train have no known role" in text
    assert "'adam_snsm' saves 0% of AdamW's state here; with known roles it would be 85%. Call" in text
    change = {"*.strange.weight": {"momentum": "subspace", "second_moment": "subset_norm"}}
    assert f"overrides={change}" in text
    optimizer = lm.AdamSNSM(model.named_parameters(), overrides=change)
    assert messages(optimizer) == []
    assert optimizer.snapshot().state_bytes < 0.2 * optimizer.snapshot().adamw_bytes
    assert messages(lm.AdamSNSM(model.named_parameters()).bind(model)) != [], (
        "known as linear layers, which it compresses"
    )


def test_few_unknown_weights_matter_where_they_are_all_that_could_be_saved():
    embedding = [("embed_tokens.weight", nn.Parameter(torch.ones(512, 32)))]
    (text,) = messages(lm.AdamSNSM([*embedding, *params((32, 32))]))
    assert "6% of the parameters that train have no known role" in text
    assert "saves 0% of AdamW's state here; with known roles it would be 5%" in text


def test_known_roles_that_would_save_nothing_are_no_way_out():
    conv = [("conv.weight", nn.Parameter(torch.ones(32, 16, 3, 3))), ("4.weight", nn.Parameter(torch.ones(10, 32)))]
    (text,) = messages(lm.AdaPM(conv, rank=8))
    assert "saves nothing of AdamW's state here, since it keeps dense averages of convolution" in text


def test_the_override_leaves_weights_with_a_role_alone():
    entries = [("conv.weight", nn.Parameter(torch.ones(4, 4, 3, 3))), ("4.weight", nn.Parameter(torch.ones(16, 16)))]
    (text,) = messages(lm.AdaPM(entries))
    assert "overrides={'4.weight': {'momentum': 'low_rank'}}" in text


@pytest.mark.parametrize(("recipe", "roles"), [("adam_snsm", "convolution, embedding"), ("adapm", "convolution")])
def test_a_recipe_that_compresses_nothing_of_a_model_says_so(recipe, roles):
    model = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3), "norm": nn.BatchNorm2d(8)})
    if "embedding" in roles:
        model["embed_tokens"] = nn.Embedding(8, 8)
    (text,) = messages(lm.MemOpt(model.named_parameters(), recipe).bind(model))
    assert (
        f"The recipe '{recipe}' saves nothing of AdamW's state here, since it keeps dense averages of {roles}" in text
    )
    assert messages(lm.MemOpt(model.named_parameters(), "adapm_lean").bind(model)) == []
    chosen = dict.fromkeys(roles.split(", "), {"momentum": "dense"})
    assert messages(lm.MemOpt(model.named_parameters(), recipe, overrides=chosen).bind(model)) == []


KNOWN = {
    "a classifier of images": nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3), "fc": nn.Linear(8, 4)}),
    "vectors": nn.ModuleDict({"norm": nn.LayerNorm(8), "scale": nn.BatchNorm1d(4)}),
    "embeddings that are compressed": nn.ModuleDict({"embed_tokens": nn.Embedding(64, 32)}),
    "small matrices": nn.ModuleDict({"up_proj": nn.Linear(3, 3), "v_proj": nn.Linear(2, 3)}),
    "a language model": tiny_llama(),
}


# Their authors leave all but linear weights of attention and MLP to Adam, which is said where there are none.
LAYERS_ONLY = ("galore", "fira", "apollo", "apollo_mini")


@pytest.mark.parametrize("model", KNOWN.values(), ids=KNOWN)
def test_models_whose_roles_are_known_are_no_reason_to_warn(model):
    recipes = ["adapm", "adapm_lean", "adapm_mini"] if "embed_tokens" in dict(model.named_children()) else []
    for recipe in recipes or lm.recipe_names():
        found = messages(lm.MemOpt(model.named_parameters(), recipe).bind(model), steps=1)
        if "conv" in dict(model.named_children()) and recipe in LAYERS_ONLY:
            assert len(found) == 1
            assert "keeps dense averages of convolution, head" in found[0]
        else:
            assert found == []


def test_adapters_are_no_reason_to_warn():
    model = nn.ModuleDict({"q_proj": nn.Linear(16, 16), "lora_A": nn.Linear(16, 4), "lora_B": nn.Linear(4, 16)})
    model["q_proj"].requires_grad_(False)
    for recipe in lm.recipe_names():
        found = messages(lm.MemOpt(model.named_parameters(), recipe).bind(model), steps=1)
        assert ["dense averages of lora" in text for text in found] == [True] * (recipe in LAYERS_ONLY)


def test_unknown_heads_matter_to_blockwise_second_moments():
    model = tiny_gpt2()
    (text,) = messages(lm.AdaPMMini(model.named_parameters()))
    assert "size of a head is unknown" in text
    assert "transformer.h.0.attn.c_attn.weight:query" in text
    assert "`optimizer.bind(model)`, or pass `head_dim`" in text
    bound = lm.AdaPMMini(model.named_parameters())
    bound.bind(model)
    assert messages(bound) == []
    assert messages(lm.AdaPMMini(model.named_parameters(), head_dim=8)) == []
    assert messages(lm.AdaPM(model.named_parameters())) == []


def test_a_warning_that_is_an_error_changes_nothing():
    entries = params((8, 6))
    optimizer = lm.AdaPM(entries)
    entries[0][1].grad = torch.ones(8, 6)
    with warnings.catch_warnings(), pytest.raises(lm.RoleWarning):  # noqa: PT012
        warnings.simplefilter("error")
        optimizer.step()
    assert float(optimizer.state[entries[0][1]]["step"]) == 0
    assert bool((entries[0][1] == 1).all())


def bloom() -> BloomForCausalLM:
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2))


def stepped(optimizer: lm.MemOpt) -> lm.MemOpt:
    messages(optimizer, steps=1)
    return optimizer


def test_fused_weights_that_stay_whole_say_why():
    (roles, heads) = messages(lm.AdaPMMini(bloom().named_parameters()))
    name = "transformer.h.0.self_attention.query_key_value.weight"
    assert f"{name} (not split: head_dim, heads unknown)" in roles
    assert f"every output gets a number of its own: {name}" in heads


def test_overrides_may_name_roles_that_a_model_has_yet_to_tell():
    model, change = bloom(), {"query": {"lr_multiplier": 0.5}}
    optimizer = lm.AdaPM(model.named_parameters(), overrides=change).bind(model)
    rates = {block.role: block.lr_multiplier for block in optimizer.snapshot().blocks}
    assert (rates["query"], rates["key"]) == (0.5, 1.0)
    unbound = lm.AdaPM(model.named_parameters(), overrides=change)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = {name: param.clone() for name, param in model.named_parameters()}
    with pytest.raises(ValueError, match="The override 'query' matches nothing"):
        unbound.step()
    assert all(bool((param == before[name]).all()) for name, param in model.named_parameters())
    with pytest.raises(ValueError, match="The override 'head' matches nothing"):  # the model's is tied
        lm.AdaPM(model.named_parameters(), overrides={"head": {"lr_multiplier": 2}}).bind(model)


def test_overrides_may_name_roles_that_only_modules_tell():
    model, change = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8)), {"embedding": {"lr_multiplier": 10}}
    bound = lm.AdaPMLean(model.named_parameters(), overrides=change).bind(model)
    assert [block.lr_multiplier for block in bound.snapshot().blocks if block.role == "embedding"] == [10.0]
    unbound = lm.AdaPMLean(model.named_parameters(), overrides=change)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(
        ValueError, match=r"'embedding' matches nothing.*no known role \(other\): `optimizer.bind\(model\)`"
    ):
        unbound.step()


def test_state_that_was_split_needs_the_model():
    model = bloom()
    saved = stepped(lm.AdaPM(model.named_parameters()).bind(model)).state_dict()
    with pytest.raises(ValueError, match="split into key and query and value .*not split: head_dim, heads unknown"):
        lm.AdaPM(model.named_parameters()).load_state_dict(saved)
    lm.AdaPM(model.named_parameters()).bind(model).load_state_dict(saved)


def test_blocks_are_reformatted_by_role_and_pattern():
    model = bloom()
    optimizer = stepped(lm.AdaPM(model.named_parameters()).bind(model))
    optimizer.reformat({"query": {"momentum": "dense"}, "*.h.1.*": {"momentum": "none"}})
    kinds = {block.name: (block.role, block.momentum) for block in optimizer.snapshot().blocks}
    layer = "transformer.h.{}.self_attention.query_key_value.weight:query"
    assert kinds[layer.format(0)] == ("query", "dense")
    assert kinds[layer.format(1)] == ("query", "none")
    assert kinds["transformer.h.1.input_layernorm.weight"] == ("vector", "dense")
    with pytest.raises(ValueError, match="Unknown block 'qury'"):
        optimizer.reformat({"qury": {"momentum": "dense"}})
