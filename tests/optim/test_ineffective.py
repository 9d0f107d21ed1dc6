"""Warnings about what has no effect: roles, overrides, ranks, sizes of heads, naming schemes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.plans.roles import NAMING_SCHEMES
from tests._models import fill_grads, tiny_gpt2, tiny_llama


def messages(optimizer: lm.MemOpt, steps: int = 2) -> list[str]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            fill_grads([param for param in params if param.requires_grad], step)
            optimizer.step()
    ours = [each for each in caught if isinstance(each.message, lm.PlanWarning)]
    assert all(each.filename == __file__ for each in ours), "the line that steps is shown"
    return [str(each.message) for each in ours]


def test_what_has_an_effect_is_no_reason_to_warn():
    options = {"rank": 8, "overrides": {"query": {"momentum": "dense"}}}
    assert messages(lm.AdaPMLean(tiny_llama().named_parameters(), **options)) == []


def test_roles_of_a_recipe_file_that_no_weight_has():
    recipe = {"base": "adapm_lean", "roles": {role: {"momentum": "dense"} for role in ("mlp", "router", "lora")}}
    (text,) = messages(lm.MemOpt(tiny_llama().named_parameters(), recipe))
    assert "has kinds for router, lora, but no weight with that role. Roles here: attention_output, embedding" in text


def test_a_rank_that_no_block_can_have_is_said_once():
    optimizer = lm.AdaPMLean(tiny_llama().named_parameters(), rank=1000)
    (text,) = messages(optimizer)
    matrices = [block for block in optimizer.snapshot().blocks if block.role != "vector"]
    assert f"`rank` 1000 is more than {len(matrices)} blocks can have, whose rank is their short side: " in text
    assert f"{matrices[0].name} ({matrices[0].rank})" in text
    assert messages(lm.AdaPMLean(tiny_llama().named_parameters(), rank=0.9)) == []
    (text,) = messages(lm.AdaPMLean(tiny_llama().named_parameters(), overrides={"head": {"rank": 99}}))
    assert "more than 1 block can have" in text


def test_a_head_of_two_classes_is_no_reason_to_warn():
    model = nn.ModuleDict({"up_proj": nn.Linear(32, 64), "token_type_embeddings": nn.Embedding(2, 32)})
    model["classifier"] = nn.Linear(32, 2)
    assert messages(lm.AdaPMLean(model.named_parameters(), rank=8)) == []


def test_overrides_of_weights_that_do_not_train():
    model = nn.ModuleDict({"q_proj": nn.Linear(16, 16), "lora_A": nn.Linear(16, 4), "lora_B": nn.Linear(4, 16)})
    model["q_proj"].requires_grad_(False)
    (text,) = messages(lm.AdaPMLean(model.named_parameters(), overrides={"query": {"lr_multiplier": 10}}))
    assert "The override 'query' has no effect: no weight that it matches trains (q_proj.weight)." in text
    assert "Adapters have the role 'lora'." in text
    assert messages(lm.AdaPMLean(model.named_parameters(), overrides={"lora": {"lr_multiplier": 10}})) == []
    del model["lora_A"], model["lora_B"]
    model["k_proj"] = nn.Linear(16, 16)
    (text,) = messages(lm.AdaPMLean(model.named_parameters(), overrides={"*q_proj*": {"lr_multiplier": 10}}))
    assert "Adapters" not in text


def test_sizes_of_heads_that_nothing_needs():
    (text,) = messages(lm.AdaPMLean(tiny_llama().named_parameters(), head_dim=8))
    assert (
        "`head_dim` 8 has no effect here: only queries and keys with the second moment 'blockwise', and fused" in text
    )
    assert messages(lm.AdaPMMini(tiny_llama().named_parameters(), head_dim=8)) == []
    fused = [("attn.query_key_value.weight", nn.Parameter(torch.ones(48, 16))), ("x", nn.Parameter(torch.ones(2)))]
    optimizer = lm.AdaPM(fused, head_dim=8)
    assert {block.role for block in optimizer.snapshot().blocks} >= {"query", "key", "value"}
    assert messages(optimizer) == [], "a fused weight is divided by it, whatever the second moment"


def test_naming_schemes_that_match_nothing():
    scheme = lm.NamingScheme("toy", (lm.Rule(r"\.mixer\.wq\.weight$", ("query",)),))
    lm.register_naming_scheme(scheme)
    try:
        (text,) = messages(lm.AdaPMLean(tiny_gpt2().named_parameters()))
        assert r"The naming scheme 'toy' matches no weight here. Its first pattern is '\\.mixer\\.wq\\.weight$'" in text
        assert "names here: transformer.h.0.attn.c_attn.bias, " in text
        assert messages(lm.AdaPMLean([("a.mixer.wq.weight", nn.Parameter(torch.ones(16, 16)))])) == []
    finally:
        NAMING_SCHEMES._entries.pop("toy")


def test_a_warning_that_is_an_error_changes_nothing():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), rank=1000)
    before = [param.clone() for param in model.parameters()]
    fill_grads(list(model.parameters()), 0)
    with warnings.catch_warnings(), pytest.raises(lm.PlanWarning):  # noqa: PT012
        warnings.simplefilter("error")
        optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


@pytest.mark.parametrize("recipe", ["galore", "fira", "apollo", "apollo_mini"])
def test_a_momentum_in_place_of_one_with_a_second_moment_of_its_own(recipe):
    def told(change, **options):
        return messages(lm.MemOpt(tiny_llama().named_parameters(), recipe, overrides={"mlp": change}, **options), 1)

    (text,) = told({"momentum": "low_rank"})
    assert "The momentum 'low_rank' has no second moment in model.layers.0.mlp." in text
    assert "Such weights move by plain gradients at Adam's learning rate. Add one where you choose 'low_rank'" in text
    assert told({"momentum": "low_rank", "second_moment": "factored"}) == []
    assert told({"momentum": "low_rank", "lr_multiplier": 100}) == []
    assert told({"rank": 1}) == []
    base = {"base": recipe, "roles": {"mlp": {"momentum": "none"}}}
    (text,) = messages(lm.MemOpt(tiny_llama().named_parameters(), base), 1)
    assert "The momentum 'none' has no second moment" in text
