"""The command lightning-memopt plan."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

import lightning_memopt as lm
from lightning_memopt.planner import plan_command
from lightning_memopt.planner.skeletons import ALIASES, MODELS

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "pretrain"


def test_the_command_sweeps(run):
    code, out, err = run("--model", "llama-60m", "--recipe", "adafactor", "--sweep", "--gpu-memory", "500MiB")
    assert (code, err) == (0, "")
    assert "Plot: plan-llama-60m.png" in out
    assert Path("plan-llama-60m.png").stat().st_size > 10_000
    header = next(line for line in out.splitlines() if line.split()[:1] == ["recipe"])
    assert header.split()[1:5] == ["1", "rank", "2", "ranks"]
    assert header.split()[-4:] == ["64", "ranks", "fits", "from"]
    line = next(line for line in out.splitlines() if line.split()[:1] == ["adafactor"])
    assert line.split()[-1] == "4"
    for most, sizes in ((5, [1, 2, 4, 5]), (8, [1, 2, 4, 8]), (100, [1, 2, 4, 8, 16, 32, 64, 100])):
        args = ["--recipe", "adafactor", "--sweep", "--world-size", str(most), "--json", "--plot", "x.png"]
        code, out, _ = run("--model", "llama-60m", *args)
        found = json.loads(out)
        assert [plan["world_size"] for plan in found["plans"]] == sizes
    assert found["plot"] == "x.png"
    assert Path("x.png").exists()


def test_the_command_says_what_fits(run):
    code, out, err = run("--model", "llama-7b", "--recipe", "adapm_lean", "--world-size", "8", "--gpu-memory", "12GiB")
    plan = lm.plan_memory("llama-7b", "adapm_lean", world_size=8, gpu_memory="12GiB")
    assert (code, err) == (0, "")
    assert "llama-7b: 6,738,415,616 parameters, 8 ranks, 32-true" in out
    for name, *cells in plan.cells():
        assert all(cell in out for cell in (name.replace("torch.optim.", "torch "), *cells))
    assert max(map(len, out.splitlines()[:8])) <= 80
    assert "adapm_lean fits in 12 GiB: " in out
    assert "First that fits in 12 GiB, keeping the most state: adapm_lean (" in out
    assert "✓" in out
    assert "✗" in out
    assert max(map(len, (line.rstrip() for line in out.splitlines()[:-2]))) <= 100


def test_the_command_says_with_which_settings_it_fits(run):
    given = ("--model", "llama-7b", "--recipe", "adapm_lean")
    _, out, _ = run(*given, "--gpu-memory", "24GiB")
    fits = "With --precision bf16-true --gradient-release, adapm_lean fits: 9.1 GiB left for activations."
    assert f"Nothing fits in 24 GiB: the smallest, adapm_lean, needs 51.9 GiB before activations. {fits}" in out
    _, out, _ = run(*given, "--gpu-memory", "40GiB")
    assert "With --gradient-release, adapm_lean fits: " in out
    _, out, _ = run(*given, "--gpu-memory", "24GiB", "--precision", "bf16-true")
    assert "With --gradient-release, adapm_lean fits: 9.1 GiB left" in out
    settings = ("--precision", "bf16-true", "--gradient-release", "--master-weight-bits", "24")
    _, out, _ = run(*given, "--gpu-memory", "24GiB", *settings)
    assert "1 rank, bf16-true, gradient release, 24 bits of each weight" in out
    assert "First that fits in 24 GiB, keeping the most state: adapm_lean (2.9 GiB" in out


def test_nothing_is_cut_in_a_narrow_terminal(run, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(plan_command, "console", lambda: Console(width=80))
    plan = lm.plan_memory("llama-7b", "adam_mini", world_size=8, gpu_memory="24GiB")
    _, out, _ = run("--model", "llama-7b", "--recipe", "adam_mini", "--world-size", "8", "--gpu-memory", "24GiB")
    for cells in plan.cells():
        assert all(cell in out for cell in cells[1:])
    assert "…" not in out


def test_the_command_says_when_nothing_fits(run):
    _, out, _ = run("--model", "llama-60m", "--recipe", "adapm", "--recipe", "adafactor", "--gpu-memory", "1MiB")
    assert "adapm does not fit in 1 MiB: it needs 802.5 MiB before activations." in out
    assert "Nothing fits in 1 MiB: the smallest, adafactor, needs 569.4 MiB before activations. Use more ranks" in out
    assert "--gradient-release" not in out, "it would not fit either"
    code, out, _ = run("--model", "llama-60m", "--recipe", "adapm")
    assert code == 0
    assert "left" not in out
    assert "fit" not in out


def test_several_recipes_and_a_size_in_g(run):
    code, out, _ = run("--model", "llama-60m", "--recipe", "adapm", "adafactor", "--gpu-memory", "1G", "--json")
    plan = json.loads(out)
    assert [row["recipe"] for row in plan["rows"]] == ["torch.optim.AdamW", "adapm", "adafactor"]
    assert plan["gpu_memory"] == 2**30


@pytest.mark.parametrize("args", [[], ["--sweep"]])
def test_tables_fit_a_terminal_of_80_columns(run, monkeypatch, args):
    monkeypatch.setenv("COLUMNS", "80")
    recipes = ["--recipe", "adamw", "adagrad_snsm"]
    _, out, _ = run("--model", "llama-130m", *recipes, "--world-size", "64", "--gpu-memory", "24GiB", *args)
    table = [line for line in out.splitlines() if "activations" not in line and not line.startswith("Shares")]
    assert max(map(len, table)) <= 80
    assert out.count("\n") < 70
    assert "torch AdamW " in out
    assert "adagrad_snsm " in out


def test_roles_fit_a_terminal_of_80_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for model in ("gpt2", "mixtral-8x7b"):
        _, out, _ = run("--model", model, command="roles")
        *lines, _ = out.splitlines()
        assert max(map(len, lines)) <= 80
    assert "model.layers.*.mlp.gate.weight (32): word gate\n  router " in out


def test_a_plan_prints_as_its_table():
    plan = lm.plan_memory("llama-60m", "adapm")
    assert str(plan) == plan.table()


def test_json_is_all_there_is(run):
    recipes = ["adapm", "adafactor"]
    given = ("--recipe", *recipes, "--json", "--world-size", "2", "--gpu-memory", "1GiB")
    code, out, err = run("--model", "llama-60m", *given)
    assert (code, err) == (0, "")
    plan = lm.plan_memory("llama-60m", recipes, world_size=2, gpu_memory="1GiB")
    assert json.loads(out) == json.loads(json.dumps(plan.to_dict()))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "lama-7b"], r"Unknown model 'lama-7b'\. Did you mean 'llama-7b'\?"),
        (["--model", "llama-60m", "--gpu-memory", "24Gigs"], "--gpu-memory: A size must be .* got '24Gigs'"),
        (["--model", "llama-60m", "--world-size", "two"], "--world-size: invalid int value: 'two'"),
        (["--model", "llama-60m", "--world-size", "-1"], "`world_size` must be at least 1, got -1"),
        (["--model", "llama-60m", "--recipe", "x.yaml"], r"no recipe file 'x\.yaml'"),
        (["--model", "llama-60m", "--precision", "8"], "Unknown precision '8'"),
        (["--model", "llama-60m", "--lr", "8"], "unrecognized arguments: --lr 8. Settings of a run need --config"),
        (["--model", "llama-60m", "--world_size", "8"], "arguments: --world_size 8. Did you mean --world-size?"),
        (["--model", "llama-60m", "--plot", "x.png"], "--plot draws a sweep: add --sweep"),
        (["--model", "llama-60m", "--sweep", "--plot", "no/x.png"], "--plot no/x.png: there is no folder 'no'"),
        ([], "one of the arguments --model --config is required"),
        (["--config", "nothere.yaml"], r"File does not exist: .*nothere\.yaml"),
        (["--config", f"{CONFIGS}/adamw.yaml"], r"The config has no `model:`: add it"),
        (["--config", f"{CONFIGS}/pretrain.yaml", "--optimizer.nothing=1"], "nothing"),
        (["--config", f"{CONFIGS}/pretrain.yaml", "--optimizer.gap=1"], "'gap' has no effect in the recipe"),
        (
            ["--config", f"{CONFIGS}/pretrain.yaml", "--model.model=llama-2m"],
            "LanguageModel could not be created on the meta",
        ),
    ],
)
def test_errors_are_one_line(run, args, message):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("lightning-memopt plan: error: ")
    assert err.count("\n") == 1
    assert re.search(message, err)


def test_help_lists_models_and_recipes(run):
    code, out, _ = run("--help")
    assert code == 0
    for name in (*MODELS, *ALIASES, *lm.recipe_names()):
        assert name in out


def test_a_built_in_name_is_no_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    code, out, _ = run("--model", "gpt2", "--recipe", "adapm")
    assert code == 0
    assert "124,439,808" in out


@pytest.mark.parametrize("path", ["noext", "picture.foo", "."])
def test_a_picture_of_no_known_kind_is_refused_at_once(run, path):
    code, _, error = run("--model", "llama-60m", "--sweep", "--plot", path)
    assert code == 2
    assert f"--plot {path}: name a file that ends in one of .png, .pdf, .svg" in error


def test_no_rank_at_all_is_refused(run):
    for size in ("0", "-2"):
        code, _, error = run("--model", "llama-60m", "--recipe", "adapm", "--world-size", size)
        assert code == 2
        assert f"`world_size` must be at least 1, got {size}" in error
