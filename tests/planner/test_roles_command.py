"""The command lightning-memopt roles, and roles in the plan."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

from lightning_memopt.planner.architectures import find_model
from lightning_memopt.planner.role_table import RoleTable

pytestmark = pytest.mark.slow


def test_equal_layers_are_one_row():
    _, module = find_model("gpt2")
    table = RoleTable.of("gpt2", module)
    rows = {row.name: row for row in table.rows}
    row = rows["transformer.h.*.attn.c_attn.weight:key"]
    assert (row.count, row.role, row.shape, row.head_dim) == (12, "key", (768, 768), 64)
    assert row.split == "columns 768–1535"
    assert rows["transformer.wte.weight"].count == 1
    assert sum(row.parameters for row in table.rows) == sum(param.numel() for param in module.parameters())
    assert sum(table.shares().values()) == pytest.approx(1)


def test_frozen_weights_are_left_out():
    _, module = find_model("llama-60m")
    module.lm_head.requires_grad_(False)
    assert "head" not in RoleTable.of("llama", module).shares()


def test_the_command_prints_every_row(run):
    code, out, err = run("--model", "llama-60m", command="roles")
    assert (code, err) == (0, "")
    assert "llama-60m: 58,073,600 parameters that train" in out
    for row in RoleTable.of(*find_model("llama-60m")).rows:
        line = next(line for line in out.splitlines() if line.startswith(row.name))
        assert row.role in line
        assert row.why in line
        assert f"{row.parameters:,}" in line
    assert "Shares: embedding 28.2%, query" in out


def test_json(run):
    _, out, _ = run("--model", "llama-60m", "--json", command="roles")
    found = json.loads(out)
    assert found["model"] == "llama-60m"
    assert found["rows"][0]["role"] == "embedding"
    assert found["rows"][0]["shape"] == [32000, 512]
    _, out, _ = run("--model", "llama-60m", "--recipe", "adapm", "--roles", "--json")
    assert json.loads(out)["roles"] == found


def test_a_plan_shows_roles(run):
    _, out, _ = run("--model", "llama-60m", "--recipe", "adapm", "--roles")
    assert out.index("adapm") < out.index("model.layers.*.self_attn.q_proj.weight (8)")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "lama-60m"], "Unknown model 'lama-60m'. Did you mean 'llama-60m'?"),
        (["--model", "llama-60m", "--recipe", "adapm"], "unrecognized arguments: --recipe adapm"),
        ([], "one of the arguments --model --config is required"),
    ],
)
def test_mistakes_are_one_line(run, args, message):
    code, out, err = run(*args, command="roles")
    assert (code, out) == (2, "")
    assert err.startswith("lightning-memopt roles: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_models_config_is_no_config_of_a_run(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    code, _, err = run("--config", str(tmp_path / "config.json"), command="roles")
    assert code == 2
    assert "is a transformers model configuration: give it with --model." in err


def test_the_width_of_a_pipe_can_be_set(run, monkeypatch):
    wide = run("--model", "llama-60m", command="roles")[1]
    monkeypatch.setenv("COLUMNS", "120")
    narrow = run("--model", "llama-60m", command="roles")[1]
    assert max(map(len, narrow.splitlines()[:-1])) <= 120 < max(map(len, wide.splitlines()[:-1]))
