"""Recipes, plans, overrides, recipe files, and every message about bad configuration."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import lightning_memopt as lm
from lightning_memopt.kinds.momentum import LowRankMomentum
from lightning_memopt.optim.options import TORCHS
from lightning_memopt.plans.roles import ROLES
from tests._models import tiny_gpt2, tiny_llama


def kinds(recipe="adapm_lean", **options):
    optimizer = lm.MemOpt(tiny_llama().named_parameters(), recipe=recipe, **options)
    return {block.name: (block.momentum, block.rank, block.second_moment) for block in optimizer.snapshot().blocks}


def test_recipes_are_the_documented_ones():
    assert lm.recipe_names() == [
        "adamw", "adapm", "adapm_mini", "adapm_lean", "snsm_lean", "muon_lean", "adam_sn", "adam_snsm",
        "adagrad_snsm", "rmsprop_sn", "adam_mini", "adafactor", "scale", "muon", "galore", "fira", "apollo",
        "apollo_mini",
    ]  # fmt: skip


@pytest.mark.parametrize("name", lm.recipe_names())
def test_plans_survive_a_dict(name):
    plan = lm.load_plan(name)
    assert lm.Plan.from_dict(plan.to_dict()) == plan
    assert set(plan.roles) == set(ROLES)


@pytest.mark.parametrize("role", ["linear", "convolution", "router", "lora"])
def test_plans_from_before_a_role_treat_it_as_other(role):
    plan = lm.load_plan("adapm_mini")
    data = plan.to_dict()
    del data["roles"][role]
    assert lm.Plan.from_dict(data).roles[role] == plan.roles["other"]
    with pytest.raises(ValueError, match="The plan 'short' has no recipe for: .*linear, .*other"):
        lm.Plan("short", {"query": lm.Recipe("dense", "dense")})


def test_new_roles_in_recipes():
    roles = lm.load_plan("adapm").roles
    assert roles["linear"] == roles["mlp"] != roles["other"]
    assert roles["lora"] == lm.Recipe(LowRankMomentum(rank=2), "dense")
    assert roles["convolution"] == roles["router"] == roles["other"]
    for name in ("adam_sn", "adam_snsm", "adagrad_snsm", "rmsprop_sn"):
        roles = lm.load_plan(name).roles
        assert roles["linear"] == roles["mlp"] != roles["other"]
        assert roles["lora"].second_moment == roles["mlp"].second_moment
        assert roles["convolution"] == roles["router"] == roles["other"]


def test_plans_with_overrides_survive_a_dict():
    plan = lm.load_plan("adapm").updated(
        overrides={
            "head": lm.Recipe("dense", "factored"),
            "*.0.*": {"momentum": "low_rank", "rank": 3, "lr_multiplier": 2.5},
            "*.1.*": {"momentum": LowRankMomentum(rank=2), "weight_decay": 0},
        },
        options={"rank": 5},
    )
    assert lm.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_rank_is_an_integer_or_a_fraction_of_the_short_side():
    assert kinds(rank=6)["lm_head.weight"][1] == 6
    assert kinds(rank=1 / 4)["lm_head.weight"][1] == 8
    assert kinds(rank=1 / 64)["lm_head.weight"][1] == 4  # at least 4 when given as a fraction
    assert kinds(rank=1000)["lm_head.weight"][1] == 32  # at most the short side
    assert kinds(rank=1)["lm_head.weight"][1] == 1
    assert kinds(rank=1.0)["lm_head.weight"][1] == 32


def test_overrides_by_role_and_by_pattern_in_order():
    found = kinds(
        "adapm",
        overrides={
            "value": {"momentum": "low_rank", "rank": 2},
            "*.layers.1.*": {"second_moment": "factored"},
            "*.layers.1.mlp.up_proj.weight": {"momentum": "none"},
            "lm_head.weight": lm.Recipe(LowRankMomentum(rank=9), "blockwise"),
        },
    )
    assert found["model.layers.0.self_attn.v_proj.weight"] == ("low_rank", 2, "dense")
    assert found["model.layers.1.self_attn.v_proj.weight"] == ("low_rank", 2, "factored")
    assert found["model.layers.1.mlp.up_proj.weight"] == ("none", None, "factored")
    assert found["model.layers.1.input_layernorm.weight"] == ("dense", None, "dense")  # a vector keeps its recipe
    assert found["lm_head.weight"] == ("low_rank", 9, "blockwise")


def test_a_pattern_option_is_taken_by_the_blocks_that_have_it():
    found = kinds("adapm", overrides={"*.layers.0.*": {"rank": 6}})
    assert found["model.layers.0.mlp.up_proj.weight"][1] == 6
    assert found["model.layers.0.self_attn.o_proj.weight"] == ("none", None, "dense")
    assert found["model.layers.1.mlp.up_proj.weight"][1] == 4


def test_overrides_of_parts_of_a_fused_weight():
    model = tiny_gpt2()
    overrides = {"*.h.0.attn.c_attn.weight": {"rank": 5}, "*.h.1.attn.c_attn.weight:key": {"momentum": "none"}}
    blocks = lm.MemOpt(model.named_parameters(), overrides=overrides).snapshot().blocks
    found = {block.name: (block.momentum, block.rank) for block in blocks}
    assert {found[f"transformer.h.0.attn.c_attn.weight:{role}"] for role in ("query", "key", "value")} == {
        ("low_rank", 5)
    }
    assert found["transformer.h.1.attn.c_attn.weight:key"] == ("none", None)
    assert found["transformer.h.1.attn.c_attn.weight:query"] == ("low_rank", 4)


def test_a_kind_that_an_override_brings_is_the_plans():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(512, 512), "o_proj": nn.Linear(512, 512)})})
    overrides = {"attention_output": {"momentum": "low_rank"}}
    blocks = lm.AdaPM(model.named_parameters(), overrides=overrides).snapshot().blocks
    assert {block.rank for block in blocks if block.role != "vector"} == {8}  # 1/64, not the kind's own 1/32


def test_options_of_the_call_reach_new_kinds_and_undo_no_override():
    mine, name = {"value": {"rank": 2}}, "model.layers.0.self_attn.v_proj.weight"
    found = kinds(rank=6, overrides={**mine, "*.layers.0.*": {"second_moment": "dense"}})
    assert found[name] == ("low_rank", 2, "dense")
    assert found["model.layers.0.mlp.up_proj.weight"] == ("low_rank", 6, "dense")
    assert kinds(rank=6, overrides={"value": {"momentum": LowRankMomentum(rank=3)}})[name][1] == 3


def test_an_override_can_bring_a_kind_and_the_options_reach_it():
    found = kinds("adamw", overrides={"mlp": {"momentum": "low_rank"}}, rank=3)
    assert found["model.layers.0.mlp.up_proj.weight"] == ("low_rank", 3, "dense")
    assert found["lm_head.weight"] == ("dense", None, "dense")


def rates(**options):
    optimizer = lm.MemOpt(tiny_llama().named_parameters(), **{"recipe": "adapm", "weight_decay": 0.5, **options})
    return {block.name: (block.lr_multiplier, block.weight_decay) for block in optimizer.snapshot().blocks}


def test_rates_by_role_and_by_pattern_in_order_key_by_key():
    found = rates(
        overrides={
            "*": {"lr_multiplier": 3, "weight_decay": 0.2},
            "*.layers.1.*": {"lr_multiplier": 0.5},
            "vector": {"weight_decay": 0},
            "lm_head.weight": lm.Recipe("dense", "factored"),  # kinds alone
        }
    )
    assert found["model.layers.0.mlp.up_proj.weight"] == (3.0, 0.2)
    assert found["model.layers.1.mlp.up_proj.weight"] == (0.5, 0.2)
    assert found["model.layers.1.input_layernorm.weight"] == (0.5, 0.0)
    assert found["lm_head.weight"] == (3.0, 0.2)


def test_one_change_has_kinds_options_and_rates():
    """Where a kind is undefined on vectors, they take the rates alone."""
    overrides = {"*.layers.1.*": {"momentum": "low_rank", "rank": 3, "lr_multiplier": 3}}
    optimizer = lm.MemOpt(tiny_llama().named_parameters(), "adamw", overrides=overrides)
    found = {block.name: (block.momentum, block.rank, block.rates) for block in optimizer.snapshot().blocks}
    assert found["model.layers.1.mlp.up_proj.weight"] == ("low_rank", 3, "lr × 3")
    assert found["model.layers.1.input_layernorm.weight"] == ("dense", None, "lr × 3")
    assert found["model.layers.0.mlp.up_proj.weight"] == ("dense", None, "")


def test_overrides_of_one_pattern_keep_each_others_kinds_and_rates():
    plan = lm.load_plan(
        {
            "base": "adapm_lean",
            "overrides": {
                "mlp": {"momentum": "low_rank", "rank": 3, "lr_multiplier": 2},
                "head": {"weight_decay": 0},
                "vector": {"lr_multiplier": 2},
            },
        }
    )
    assert plan.updated(overrides={"mlp": {}}) == plan
    kind = LowRankMomentum(rank=3)
    given = {
        "mlp": {"momentum": "dense", "weight_decay": 0.1},  # the rank goes with its kind
        "head": lm.Recipe(kind, "dense"),
        "vector": {"lr_multiplier": 5},
        "value": {"rank": 2},
    }
    merged = plan.updated(overrides=given)
    assert merged.overrides == {
        "mlp": {"momentum": "dense", "lr_multiplier": 2, "weight_decay": 0.1},
        "head": {"momentum": kind, "second_moment": lm.Recipe("dense", "dense").second_moment, "weight_decay": 0},
        "vector": {"lr_multiplier": 5},
        "value": {"rank": 2},
    }
    assert merged.updated(overrides={"head": {"lr_multiplier": 4}}).recipe("h", "head") == given["head"]


@pytest.mark.parametrize("number", ["10", "1e1", "10.0", "+10"])
def test_rates_in_a_recipe_file(tmp_path, number):
    text = f"""
        base: adapm
        overrides:
          embedding: {{lr_multiplier: {number}, momentum: dense}}
          vector: {{weight_decay: 0}}
        """
    found = rates(recipe=write(tmp_path / "r.yaml", text), overrides={"query": {"lr_multiplier": 2}})
    assert found["model.embed_tokens.weight"] == (10.0, None)
    assert found["model.norm.weight"] == (1.0, 0.0)
    assert found["model.layers.0.self_attn.q_proj.weight"] == (2.0, None)


@pytest.mark.parametrize(
    ("overrides", "error", "match"),
    [
        ({"mlp": {"lr_multiplier": 0}}, ValueError, r"In the override 'mlp': `lr_multiplier` must be above 0, got 0: .*"
         r"Freeze the parameters instead \(requires_grad_\(False\)\)"),
        ({"mlp": {"lr_multiplier": -2}}, ValueError, "`lr_multiplier` must be finite and above 0, got -2"),
        ({"mlp": {"lr_multiplier": math.inf}}, ValueError, "`lr_multiplier` must be finite and above 0, got inf"),
        ({"mlp": {"lr_multiplier": math.nan}}, ValueError, "`lr_multiplier` must be finite and above 0, got nan"),
        ({"mlp": {"lr_multiplier": "1e1"}}, TypeError, "must be a number, got the text '1e1'. On a command .*as JSON"),
        ({"mlp": {"lr_multiplier": True}}, TypeError, "`lr_multiplier` must be a number, got True"),
        ({"*norm*": {"weight_decay": -1}}, ValueError, r"In the override '\*norm\*': `weight_decay` must be finite"),
        ({"mlp": {"weight_decay": None}}, TypeError, "`weight_decay` must be a number, got None"),
        ({"mlp": {"lr_mulitplier": 2}}, ValueError, "Unknown option 'lr_mulitplier'. Did you mean 'lr_multiplier'?"),
        ({"mlp": {"lr": 2}}, ValueError, "In the override 'mlp': Unknown option 'lr'. Did you mean 'lr_multiplier'"),
        ({"*.nothing": {"lr_multiplier": 2}}, ValueError, r"The override '\*.nothing' matches nothing"),
        ({"mlp": {"lr_multiplier": 2}, "*": {"lr_multiplier": 3}}, ValueError,
         "The override 'mlp' sets 'lr_multiplier' to 2, which none of the blocks it matches gets: a later override"),
    ],
)  # fmt: skip
def test_bad_rates_name_the_override_and_the_way_out(overrides, error, match):
    with pytest.raises(error, match=match):
        lm.MemOpt(tiny_llama().named_parameters(), overrides=overrides)


def test_a_recipe_has_no_rates():
    match = r"'weight_decay' is a rate of blocks, not a part of a recipe: set it in `overrides`, .*{'weight_decay': 0}"
    with pytest.raises(ValueError, match=match):
        lm.load_plan({"roles": {"mlp": {"weight_decay": 0}}})
    optimizer = lm.MemOpt(tiny_llama().named_parameters())
    with pytest.raises(ValueError, match="'lr_multiplier' is a rate of blocks"):
        optimizer.reformat({"lm_head.weight": {"lr_multiplier": 2}})


NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"recipe": "adapm_leen"}, ValueError, r"Unknown recipe 'adapm_leen'\. Did you mean 'adapm_lean'\?"),
        ({"recipe": "AdaPMLean"}, ValueError, r"Unknown recipe 'AdaPMLean'\. Did you mean 'adapm_lean'\?"),
        ({"recipe": lm.AdaPMLean}, TypeError, r"got the class AdaPMLean\. Did you mean 'adapm_lean'\?"),
        ({"recipe": None}, TypeError, "`recipe` must be a name, a path, a mapping or a Plan, got None"),
        ({"recipe": 1e-3}, TypeError, "`recipe` must be a name, got 0.001: if it is the learning rate, write lr=0.001"),
        ({"recipe": "missing.yaml"}, FileNotFoundError, "There is no recipe file 'missing.yaml'"),
        ({"rank": 0}, ValueError, "`rank` must be an integer of at least 1 .* got 0.*'none'"),
        ({"rank": -2}, ValueError, "got -2"),
        ({"rank": 1.5}, ValueError, "got 1.5"),
        ({"rank": NAN}, ValueError, "`rank` must be .* got nan"),
        ({"rank": "8"}, TypeError, "`rank` must be an integer or a fraction of the short side, got '8'"),
        ({"rank": True}, TypeError, "got True"),
        ({"gap": 5}, ValueError, "Option 'gap' has no effect in the recipe 'adapm_lean'.*momentum 'subspace'"),
        ({"recipe": "adam_snsm", "gap": 0}, ValueError, r"`gap` must be an integer of at least 1 \(steps\), got 0"),
        ({"recipe": "adam_snsm", "projection": "svdd"}, ValueError, "Unknown projection 'svdd'. Did you mean 'svd'"),
        ({"recipe": "adam_snsm", "handover": "spin"}, ValueError, "Unknown handover 'spin'.*reset, rotate, keep"),
        ({"recipe": "adam_sn", "reduction": "max"}, ValueError, "Unknown reduction 'max'.*mean, sum"),
        ({"recipe": "adam_sn", "subset_size": 0}, ValueError, "`subset_size` must be an integer of at least 1"),
        ({"learning_rate": 1}, ValueError, r"Unknown option 'learning_rate'\. Did you mean 'lr'\?"),
        ({"wd": 1}, ValueError, r"Unknown option 'wd'\. Did you mean 'weight_decay'\?"),
        ({"momentum": 0.9}, ValueError, "'momentum', got 0.9: .*`recipe`.*{'momentum': 'dense'}.* first of `betas`"),
        ({"second_moment": "dense"}, ValueError, r"'second_moment', got 'dense': .*{'second_moment': 'dense'}}\.$"),
        ({"lr_multiplier": 3}, ValueError, r"overrides={'embedding': {'lr_multiplier': 3}}\.$"),
        ({"mlp": {"rank": 3}}, ValueError, r"Unknown option 'mlp': .*overrides={'mlp': {'rank': 3}}\.$"),
        ({"update_proj_gap": 200}, ValueError, "Did you mean 'gap'"),
        ({"rnk": 3}, ValueError, r"Unknown option 'rnk'\. Did you mean 'rank'\? Available: lr, betas"),
        *(
            ({name: True}, ValueError, f"no option `{name}` as in torch's AdamW, since {why}. Leave it out, got True")
            for name, why in TORCHS.items()
        ),
        ({"lr": -1.0}, ValueError, "`lr` must be finite, at least 0, got -1.0"),
        ({"lr": NAN}, ValueError, "`lr` must be finite, at least 0, got nan"),
        ({"lr": math.inf}, ValueError, "`lr` must be finite, at least 0, got inf"),
        ({"lr": "fast"}, TypeError, "`lr` must be a number, got 'fast'"),
        ({"betas": (1.0, 0.9)}, ValueError, r"`betas\[0\]` must be finite, at least 0 and below 1, got 1.0"),
        ({"betas": (0.9, 1.1)}, ValueError, r"`betas\[1\]` must be finite, at least 0 and at most 1, got 1.1"),
        ({"betas": 0.9}, ValueError, "`betas` must be two numbers, got 0.9"),
        ({"eps": 0.0}, ValueError, "`eps` must be above 0, got 0"),
        ({"recipe": "adam_mini", "head_dim": 0}, ValueError, "`head_dim` must be an integer of at least 1 .* got 0"),
        ({"recipe": "adam_mini", "head_dim": "x"}, ValueError, "`head_dim` must be an integer .* got 'x'"),
        (
            {"overrides": {"*norm.weight": {"momentum": "low_rank"}}},
            ValueError,
            "requests momentum 'low_rank', but none",
        ),
        ({"eps": -1e-8}, ValueError, "`eps` must be finite, at least 0, got -1e-08"),
        ({"weight_decay": -0.1}, ValueError, "`weight_decay` must be finite, at least 0, got -0.1"),
        ({"maximize": 1}, TypeError, "`maximize` must be True or False, got 1"),
        ({"nonfinite": "ignore"}, ValueError, "Unknown value of `nonfinite` 'ignore'.*raise, skip"),
        ({"state_dtype": "int8"}, ValueError, "Unknown `state_dtype` 'int8'.*float32, bfloat16"),
        ({"seed": 0.5}, TypeError, "`seed` must be an integer, got 0.5"),
        ({"overrides": ["mlp"]}, TypeError, "`overrides` must map roles or name patterns to changes"),
        (
            {"overrides": {"lr_multiplier": 10}},
            TypeError,
            "name the blocks first, .*{'lr_multiplier': 10}",
        ),
        ({"overrides": {"momentum": "dense"}}, TypeError, "got 'momentum' with 'dense': name the blocks first"),
        ({"overrides": {nn.Linear(2, 2): {"rank": 2}}}, TypeError, "a key of type Linear: give the weight's name"),
        ({"overrides": {r".*q_proj\.weight$": {"rank": 2}}}, ValueError, r"Did you mean '\*q_proj\.weight'\?"),
        ({"overrides": {"vector": {"eps": 1}}}, ValueError, "'vector': 'eps' differs by parameter group only: give"),
        ({"overrides": {"q_proj": {"rank": 2}}}, ValueError, r"'q_proj' matches nothing\. Did you mean '\*q_proj\*'\?"),
        (
            {"overrides": {"mpl": {"rank": 2}}},
            ValueError,
            r"'mpl' matches nothing. Did you mean 'mlp'\? Roles here: .*mlp",
        ),
        ({"overrides": {"norm": {"weight_decay": 0}}}, ValueError, r"'norm' matches nothing. Did you mean 'vector'\?"),
        ({"overrides": {"q_proj.weight": {"rank": 2}}}, ValueError, r"matches nothing.*start with '\*'"),
        ({"overrides": {"mlp": {"momentum": "lowrank"}}}, ValueError, "In the override 'mlp': Unknown momentum kind"),
        ({"overrides": {"mlp": {"second_moment": "x"}}}, ValueError, "Unknown second-moment kind 'x'"),
        (
            {"overrides": {"mlp": {"rnk": 2}}},
            ValueError,
            "In the override 'mlp': Unknown option 'rnk'. Did you me",
        ),
        ({"overrides": {"mlp": {"rank": -2}}}, ValueError, "In the override 'mlp': `rank` must be .* got -2"),
        ({"overrides": {"mlp": 4}}, TypeError, "The override 'mlp' must be a Recipe or a mapping .* got 4"),
        ({"recipe": "adapm", "overrides": {"embedding": {"rank": 4}}}, ValueError, "sets 'rank', which has no effect"),
        ({"overrides": {"vector": {"momentum": "low_rank"}}}, ValueError, "'low_rank' needs a matrix"),
    ],
)
def test_bad_configuration_names_the_value_and_the_way_out(options, error, match):
    with pytest.raises(error, match=match):
        lm.MemOpt(tiny_llama().named_parameters(), **options)


def weight():
    return nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ([], ValueError, "empty parameter list"),
        (torch.ones(2, 2), TypeError, "got a single tensor"),
        ({"params": []}, TypeError, "got a dict: wrap it in a list"),
        (nn.Linear(2, 2).state_dict(), TypeError, r"got a dict: pass `model\.named_parameters\(\)`"),
        (nn.Linear(2, 2).named_modules(), TypeError, r"Expected a parameter, got Linear.*: pass `model\.named_param"),
        ([("a", weight()), ("a", weight())], ValueError, r"The name 'a' .*named_parameters\('head'\)`"),
        ([("a", weight()), weight()], ValueError, r"1 of the parameters have no name \(the first has shape \(4, 4\)"),
        ([("a", "b")], TypeError, "Expected a parameter for 'a', got str"),
        ([3], TypeError, "Expected a parameter, got int"),
        ([[weight(), weight()]], TypeError, "Expected a parameter, got list of 2"),
        (torch.nn.Linear(2, 2), TypeError, r"got the module Linear: pass `model\.named_parameters\(\)`"),
        (set(nn.Linear(2, 2).parameters()), TypeError, "a set has no order: use a list"),
        ([{"params": set(nn.Linear(2, 2).parameters())}], TypeError, "a set has no order: use a list"),
        ([{"lr": 1.0}], TypeError, "must be a dict such as .*, got a dict with 'lr'"),
        ([{"params": [("a", weight())], "momentum": 0.9}], ValueError, "In parameter group 0: Unknown key 'momentum'"),
        ([{"params": [("a", weight())], "lr": -1}], ValueError, "In parameter group 0: `lr` must be"),
        (
            [{"params": [("a", weight())], "lr_multiplier": 2}],
            ValueError,
            "Unknown key 'lr_multiplier': give the group its own `lr`, or set the multiplier by role or name in",
        ),
        ([{"params": [("a", weight())], "rank": 0}], ValueError, "`rank` must be"),
        ([{"params": [("a", weight())], "recipe": "x"}], ValueError, "Unknown recipe 'x'"),
    ],
)
def test_bad_parameters_are_named(params, error, match):
    with pytest.raises(error, match=match):
        lm.MemOpt(params)


def test_the_same_parameter_twice():
    param = weight()
    with pytest.raises(ValueError, match="'a' occurs twice"):
        lm.MemOpt([("a", param), ("b", param)])
    with pytest.raises(ValueError, match="more than one parameter group"):
        lm.MemOpt([{"params": [("a", param)]}, {"params": [("b", param)]}])


# ------------------------------------------------------------------------------------------------------- recipe files


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_recipe_file_is_a_recipe(tmp_path):
    path = write(
        tmp_path / "mine.yaml",
        """
        name: mine
        base: adapm
        betas: [0.85, 0.97]
        roles:
          mlp: {momentum: low_rank, rank: 6, second_moment: factored}
          head: {momentum: none}
        overrides:
          "*.layers.0.*": {momentum: dense}
        """,
    )
    optimizer = lm.MemOpt(tiny_llama().named_parameters(), recipe=path)
    assert optimizer.defaults["betas"] == (0.85, 0.97)
    assert optimizer.param_groups[0]["recipe"] == "mine"
    found = {block.name: (block.momentum, block.rank, block.second_moment) for block in optimizer.snapshot().blocks}
    assert found["model.layers.0.mlp.up_proj.weight"] == ("dense", None, "factored")
    assert found["lm_head.weight"] == ("none", None, "dense")
    assert found["model.layers.1.self_attn.q_proj.weight"] == ("low_rank", 4, "dense")


def test_an_option_of_the_call_wins_over_the_file(tmp_path):
    path = write(tmp_path / "r.yaml", "base: adapm_lean\nroles: {mlp: {rank: 6}}\n")
    for rank, expected in ((None, (6, 4)), (5, (5, 5))):
        optimizer = lm.MemOpt(tiny_llama().named_parameters(), path, rank=rank)
        found = {block.name: block.rank for block in optimizer.snapshot().blocks}
        assert (found["model.layers.0.mlp.up_proj.weight"], found["lm_head.weight"]) == expected


def test_a_recipe_file_can_interpolate(tmp_path):
    text = "base: adapm_lean\nroles: {mlp: {rank: 3}, head: {rank: '${roles.mlp.rank}'}}"
    optimizer = lm.MemOpt(tiny_llama().named_parameters(), write(tmp_path / "r.yaml", text))
    assert optimizer.snapshot().blocks[-1].rank == 3


@pytest.mark.parametrize(
    "text",
    [
        "name: '${oc.env:SECRET}'",
        "name: 'mine-${oc.env:SECRET,none}'",
        "{base: adapm_lean, roles: {mlp: {rank: '${oc.decode:${oc.env:SECRET}}'}}}",
        "{base: adapm_lean, overrides: {'${oc.env:SECRET}': {rank: 3}}}",
        "{name: '${${base}:SECRET}', base: adamw}",
        "{base: base.yaml}",
    ],
)
def test_a_recipe_file_reads_nothing_from_its_surroundings(tmp_path, monkeypatch, text):
    """Its name is stored in every checkpoint, and so would be a secret."""
    monkeypatch.setenv("SECRET", "8")
    write(tmp_path / "base.yaml", "name: '${oc.env:SECRET}'")
    with pytest.raises(ValueError, match=r"calls a resolver, whose result would be stored.* Write the value"):
        lm.load_plan(write(tmp_path / "r.yaml", text))
    with pytest.raises(ValueError, match="calls a resolver"):
        lm.load_plan(OmegaConf.create({"name": "${oc.env:SECRET}"}))


def test_a_config_of_omegaconf_is_a_recipe_too():
    config = OmegaConf.create({"base": "adapm_lean", "name": "${base}-mine", "roles": {"mlp": {"rank": 3}}})
    plan = lm.load_plan(config)
    assert (plan.name, plan.roles["mlp"].momentum.rank) == ("adapm_lean-mine", 3)


def test_a_plan_with_bad_betas_is_refused():
    with pytest.raises(ValueError, match=r"In the recipe 'mine': `betas\[1\]` must be finite"):
        dataclasses.replace(lm.load_plan("adamw"), name="mine", betas=(0.9, float("nan")))


def test_a_mapping_is_a_recipe_too():
    optimizer = lm.MemOpt(
        tiny_llama().named_parameters(), recipe={"base": "adapm_lean", "roles": {"embedding": {"rank": 2}}}
    )
    assert optimizer.snapshot().blocks[0].rank == 2


def test_the_base_of_a_file_is_relative_to_it(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "base.yaml", "base: adapm_lean\nroles: {mlp: {rank: 3}}")
    path = write(tmp_path / "sub" / "top.yaml", "base: base.yaml\nroles: {head: {rank: 2}}")
    assert [lm.load_plan(path).roles[role].momentum.rank for role in ("mlp", "head")] == [3, 2]
    loop = write(tmp_path / "loop.yaml", "base: loop.yaml")
    with pytest.raises(ValueError, match=r"'loop\.yaml' has a base itself; start from the name of a recipe"):
        lm.load_plan(loop)


def test_recipes_without_a_name_are_told_apart():
    names = {lm.load_plan({"base": base}).name for base in ("adamw", "adafactor", "adapm")}
    assert len(names) == 3
    assert (
        lm.load_plan({"base": "adapm_lean", "roles": {"mlp": {"rank": 3}}}).name
        == lm.load_plan({"base": "adapm_lean"}).name
    )


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("bse: adamw", ValueError, "Unknown key of a recipe file 'bse'. Did you mean 'base'"),
        ("base: adam", ValueError, "Unknown recipe 'adam'"),
        ("roles: {mpl: {rank: 2}}", ValueError, "Unknown role 'mpl'. Did you mean 'mlp'"),
        ("mlp: {rank: 2}", ValueError, "Unknown key of a recipe file 'mlp'.* A role belongs under 'roles'"),
        ("roles: {mlp: {momentum: low}}", ValueError, "In the role 'mlp': Unknown momentum kind 'low'"),
        ("roles: {mlp: {rank: 2}}", ValueError, "In the role 'mlp': Option 'rank' has no effect with momentum 'dense'"),
        ("base: adapm_lean\noverrides: {query: {rnk: 2}}", ValueError, "In the override 'query': Unknown option 'rnk'"),
        (
            "overrides:\n  *.bias: {weight_decay: 0}",
            ValueError,
            r"not valid YAML, line 2 \(\*\.bias: {weight_decay: 0}\): .* Put a pattern in quotes, as in '\*\.bias'",
        ),
        (
            "overrides:\n  *bias: {weight_decay: 0}",
            ValueError,
            "line 2 .*: found undefined alias. Put a pattern in",
        ),
        ("base: [1\n", ValueError, r"not valid YAML, line 2 \(its end\): [^*]*\.$"),
        ("base: '\x08'\n", ValueError, "not valid YAML: unacceptable character"),
        ("roles: 3", TypeError, "'roles' of a recipe file must be a mapping, got 3"),
        ("betas: 0.9", ValueError, "'betas' of a recipe file must be two numbers, got 0.9"),
        ("options: {rank: 2}", ValueError, "Unknown key of a recipe file 'options'"),
        ("- 1", TypeError, "must contain a mapping, found list"),
        ("betas: [.nan, 0.9]", ValueError, r"`betas\[0\]` must be finite, at least 0 and below 1, got nan"),
        ("betas: [0.9, .inf]", ValueError, r"`betas\[1\]` must be finite, at least 0 and at most 1, got inf"),
        ("betas: [1.0, 0.9]", ValueError, r"`betas\[0\]` must be finite, at least 0 and below 1, got 1\.0"),
        ("betas: ['0.9', 0.9]", TypeError, r"`betas\[0\]` must be a number, got '0\.9'"),
        ("betas: [true, 0.9]", TypeError, r"`betas\[0\]` must be a number, got True"),
        *(
            (f"base: adam_snsm\n{place}: {{value: {{{option}: {value}}}}}", ValueError, f"`{option}` must be {says}")
            for place in ("roles", "overrides")
            for option, value, says in (
                ("rank", 10**20, "at most 2,147,483,647, got 100000000000000000000"),
                ("rank", ".nan", "finite, got nan"),
                ("rank", -3, "an integer of at least 1 or a fraction"),
                ("gap", 10**20, "at most 2,147,483,647"),
                ("gap", 0, "an integer of at least 1"),
                ("subset_size", 10**20, "at most 2,147,483,647"),
                ("subset_size", ".inf", "finite, got inf"),
            )
        ),
    ],
)
def test_bad_recipe_files_are_refused(tmp_path, text, error, match):
    with pytest.raises(error, match=match) as caught:
        lm.load_plan(path := write(tmp_path / "bad.yaml", text))
    assert str(path) in str(caught.value)


def test_a_recipe_file_without_a_base_that_compresses_nothing_says_so(tmp_path):
    match = r"nothing.yaml' compresses nothing: it has no `base` and starts from 'adamw'. Add `base: adapm_lean`, or `b"
    with pytest.warns(lm.PlanWarning, match=match):
        lm.load_plan(write(tmp_path / "nothing.yaml", "roles: {mlp: {momentum: dense}}\noverrides: {query: {}}"))
    with pytest.warns(lm.PlanWarning, match="The recipe compresses nothing"):
        lm.load_plan({"overrides": {"vector": {"weight_decay": 0}}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.load_plan({"base": "adamw"})
        lm.load_plan({"base": "adamw", "roles": {"mlp": {"momentum": "none"}}})
        lm.load_plan({"roles": dict.fromkeys(ROLES, {"momentum": "none"})})


def test_a_recipe_file_without_a_base_names_the_one_that_its_other_roles_have(tmp_path):
    match = r"no `base`, so roles that it does not name \(embedding, .*\) are those of 'adamw'\. Add `base: adapm_lean`"
    for text in ("roles: {mlp: {momentum: none}}", "overrides: {mlp: {second_moment: factored}}"):
        with pytest.warns(lm.PlanWarning, match=match):
            lm.load_plan(write(tmp_path / "some.yaml", text))
