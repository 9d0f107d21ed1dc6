"""Models that a config file describes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

from transformers import LlamaConfig, MambaConfig, T5Config

import lightning_memopt as lm
from lightning_memopt.planner.architectures import find_model


def test_a_config_file_and_its_folder_are_the_built_in_model(tmp_path):
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path / "mine")
    built_in = lm.plan_memory("llama-60m", "adam_mini", world_size=4)
    for path in (tmp_path / "mine", str(tmp_path / "mine" / "config.json")):
        plan = lm.plan_memory(path, "adam_mini", world_size=4)
        assert plan.model == "mine"
        for row, theirs in zip(plan.rows, built_in.rows, strict=True):  # which have the angles of positions in addition
            assert row == replace(theirs, total_bytes=theirs.total_bytes + plan.buffer_bytes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is not JSON"),
        ("[]", "has no `model_type`, so it is not the config.json of a transformers model"),
        ('{"architectures": ["LlamaForCausalLM"]}', "has no `model_type`.*That of LlamaForCausalLM is 'llama'"),
        ('{"model_type": "nonsuch"}', "has the `model_type` 'nonsuch', which .* plan for the module itself"),
        ('{"model_type": "lama"}', "has the `model_type` 'lama', which .* Did you mean 'llama'?"),
        (
            '{"model_type": "llama", "architectures": ["LamaForCausalLM"]}',
            "names the architecture 'LamaForCausalLM', which does not exist.*Did you mean 'LlamaForCausalLM'?",
        ),
        (
            '{"model_type": "llama", "architectures": ["GPT2LMHeadModel"]}',
            "'GPT2LMHeadModel', which is no model with the `model_type` 'llama'.*remove `architectures`",
        ),
        (
            '{"model_type": "llama", "architectures": "LlamaConfig"}',
            "'LlamaConfig', which is no model with the `model_type` 'llama'",
        ),
        ('{"model_type": "llama", "hidden_size": 10}', "cannot create a model from 'config.json' .*correct the file"),
    ],
)
def test_bad_config_files(content, message):
    Path("config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        lm.plan_memory(Path("config.json"))


def test_usual_words_need_no_warning(run, tmp_path):
    T5Config(num_layers=1).save_pretrained(tmp_path / "usual")
    code, out, err = run("--model", str(tmp_path / "usual"), "--recipe", "adapm_lean")
    assert (code, err) == (0, "")
    assert "*" not in out


def test_weights_without_roles_are_planned_with_a_warning(run, tmp_path):
    MambaConfig(num_hidden_layers=2).save_pretrained(tmp_path / "strange")
    code, out, err = run("--model", str(tmp_path / "strange"), "--recipe", "adapm_lean", "--world-size", "2")
    plan = lm.plan_memory(tmp_path / "strange", "adapm_lean", world_size=2)
    assert code == 0
    assert 0 < len(plan.unknown) <= plan.matrices
    share = f"{len(plan.unknown)} of {plan.matrices} matrices have no known role and count as 'other'"
    assert f"Warning: {share} ({plan.unknown[0]}, " in err
    assert "register_naming_scheme" in err
    assert "adapm_lean *" in out
    assert f"* {share}" in out
    assert "adapm_lean *" in plan.table()
    code, out, err = run("--model", str(tmp_path / "strange"), "--recipe", "adapm_lean", "--json")
    assert json.loads(out)["unknown"] == list(plan.unknown)
    assert share in err


def test_without_an_architecture_it_is_the_language_model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    _, module = find_model(path)
    assert type(module).__name__ == "LlamaForCausalLM"


def test_a_name_of_a_hub_is_told_apart_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "Names of a hub are not looked up: download the model's config.json and give its path."
    with pytest.raises(FileNotFoundError, match=f"{message} The built-in model is called 'gpt2'"):
        lm.plan_memory("openai-community/gpt2")
    with pytest.raises(FileNotFoundError, match=f"{message}$"):
        lm.plan_memory("somebody/else")
    with pytest.raises(FileNotFoundError, match=r"\(working directory: [^ ]*\)\.$"):
        lm.plan_memory("somebody/config.json")
