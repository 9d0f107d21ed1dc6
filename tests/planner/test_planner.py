"""The planner, without a real run beside it: see tests/planner/test_planner_sharded.py for that."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, MixtralConfig, T5Config

import lightning_memopt as lm
from lightning_memopt import cli as cli_module
from lightning_memopt.memory.sizes import parse_bytes
from lightning_memopt.planner import command as plan_command
from lightning_memopt.planner import planning, sweep_memory
from lightning_memopt.planner.figure import sweep_figure
from lightning_memopt.planner.memory_plan import ADAMW, COLUMNS
from lightning_memopt.planner.skeletons import ALIASES, MODELS, skeleton
from lightning_memopt.sharding.wrapping import find_units, own_modules
from tests._models import tiny_gpt2, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "configs"


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv: int | None = None, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        **more,
    )


# From the papers and the models' pages; the number of parameters as these give it, where they do.
PUBLIC = {
    "llama-60m": (lambda: llama(512, 1376, 8, 8), "58M"),
    "llama-130m": (lambda: llama(768, 2048, 12, 12), "134M"),
    "llama-350m": (lambda: llama(1024, 2736, 24, 16), "368M"),
    "llama-1b": (lambda: llama(2048, 5461, 24, 32), "1339M"),
    "llama-2-7b": (lambda: llama(4096, 11008, 32, 32), "6738M"),
    "llama-2-70b": (lambda: llama(8192, 28672, 80, 64, 8), "68977M"),
    "llama-3-8b": (lambda: llama(4096, 14336, 32, 32, 8, vocab_size=128256), "8030M"),
    "llama-3-70b": (lambda: llama(8192, 28672, 80, 64, 8, vocab_size=128256), "70554M"),
    "gpt2": (lambda: GPT2Config(), "124M"),
    "gpt2-xl": (lambda: GPT2Config(n_embd=1600, n_layer=48, n_head=25), "1558M"),
    "mixtral-8x7b": (
        lambda: MixtralConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, num_local_experts=8, vocab_size=32000,
        ),
        "46703M",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    yield
    cli_module.jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=False)


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs the command and returns its exit status, output and errors."""

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lightning-memopt", "plan", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as raised:
            cli_module.main()
        shown = capsys.readouterr()
        return raised.value.code, shown.out, shown.err

    return call


def named(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, param.shape) for name, param in model.named_parameters()]


def tied(model: nn.Module) -> list[set[str]]:
    """Return the names of every parameter that has several."""
    names: dict[nn.Parameter, set[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, set()).add(name)
    return [entry for entry in names.values() if len(entry) > 1]


def units(model: nn.Module) -> list[tuple[str, int]]:
    """Return names of units and the numbers that they gather."""
    root = nn.Module()
    root.model = model
    found = find_units(root)
    modules = {unit.module for unit in found}
    sizes = {
        unit.name: {p for _, inner in own_modules(unit.module, modules) for p in inner.parameters(recurse=False)}
        for unit in found
    }
    return [(name, sum(param.numel() for param in params)) for name, params in sizes.items()]


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize("name", MODELS)
def test_built_in_models_are_those_of_transformers(name):
    make, count = PUBLIC[name]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(make())
    ours = skeleton(name.upper())
    assert named(ours) == named(theirs)
    assert tied(ours) == tied(theirs)
    assert units(ours) == units(theirs)
    assert lm.classify(ours) == lm.classify(theirs)
    assert f"{sum(param.numel() for param in ours.parameters()) / 1e6:.0f}M" == count


def test_aliases_are_names_of_models():
    assert set(ALIASES.values()) <= set(MODELS) == set(PUBLIC)
    assert named(skeleton("llama-7b")) == named(skeleton("llama-2-7b"))
    with pytest.raises(NotImplementedError, match="sizes only"):
        skeleton("llama-60m")()


def test_a_config_file_and_its_folder_are_the_built_in_model(tmp_path):
    config = llama(512, 1376, 8, 8, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path / "mine")
    built_in = lm.plan_memory("llama-60m", "adam_mini", world_size=4)
    for path in (tmp_path / "mine", str(tmp_path / "mine" / "config.json")):
        plan = lm.plan_memory(path, "adam_mini", world_size=4)
        assert plan.model == "mine"
        assert plan.rows == built_in.rows


def test_a_module_stays_as_it_is():
    model = tiny_gpt2()
    before = {name: (param, param.clone()) for name, param in model.named_parameters(remove_duplicate=False)}
    attributes = set(vars(model))
    plan = lm.plan_memory(model, "adapm_mini", world_size=2, precision="bf16-true")
    assert plan.parameters == sum(param.numel() for param in model.parameters())
    assert set(vars(model)) == attributes
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    for name, (param, value) in before.items():
        assert after[name] is param
        torch.testing.assert_close(param, value, rtol=0, atol=0)
    model(input_ids=torch.zeros(1, 4, dtype=torch.long))


def test_a_module_may_be_on_the_meta_device_or_compiled():
    with torch.device("meta"):
        meta = tiny_llama()
    expected = lm.plan_memory(tiny_llama(), "adapm_mini", world_size=3)
    assert lm.plan_memory(meta, "adapm_mini", world_size=3) == expected
    assert lm.plan_memory(torch.compile(meta), "adapm_mini", world_size=3).rows == expected.rows


# ---------------------------------------------------------------------- numbers


def test_one_rank_holds_what_the_optimizer_says():
    model = tiny_llama()
    for recipe in lm.recipe_names():
        plan = lm.plan_memory(model, recipe)
        optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe)
        optimizer.bind(model)
        snapshot = optimizer.snapshot()
        assert plan.rows[1].state_bytes == snapshot.state_bytes
        assert plan.rows[1].saved == snapshot.saved
        assert plan.rows[0].state_bytes == snapshot.adamw_bytes
    size = 4 * sum(param.numel() for param in model.parameters())
    assert (plan.parameter_bytes, plan.gradient_bytes, plan.unsharded_bytes, plan.largest_unit) == (size, size, 0, None)
    assert plan.rows[0].total_bytes == 4 * size


def test_frozen_parameters_have_neither_gradient_nor_state():
    model = tiny_llama()
    all_of_it = lm.plan_memory(model, "adapm_lean", world_size=2)
    model.model.embed_tokens.weight.requires_grad_(False)
    plan = lm.plan_memory(model, "adapm_lean", world_size=2)
    frozen = 2 * model.model.embed_tokens.weight.numel()
    assert plan.parameter_bytes == all_of_it.parameter_bytes
    assert plan.unsharded_bytes == all_of_it.unsharded_bytes
    assert plan.gradient_bytes == all_of_it.gradient_bytes - frozen
    assert plan.row(ADAMW).state_bytes == all_of_it.row(ADAMW).state_bytes - 2 * frozen
    assert plan.row("adapm_lean").state_bytes < all_of_it.row("adapm_lean").state_bytes
    nothing = lm.plan_memory(nn.Linear(4, 4).requires_grad_(False), "adapm_lean")
    assert [(row.state_bytes, row.saved) for row in nothing.rows] == [(0, 0.0)] * 2


def test_precisions():
    whole, true, mixed = (
        lm.plan_memory("llama-60m", "adapm_lean", world_size=4, precision=precision)
        for precision in ("32-true", "bf16-true", "bf16-mixed")
    )
    assert true.parameter_bytes * 2 == whole.parameter_bytes == mixed.parameter_bytes
    assert true.gradient_bytes * 2 == whole.gradient_bytes == mixed.gradient_bytes
    assert true.unsharded_bytes * 2 == whole.unsharded_bytes == mixed.unsharded_bytes * 2
    assert true.row(ADAMW).state_bytes * 2 == whole.row(ADAMW).state_bytes == mixed.row(ADAMW).state_bytes
    assert len({plan.row("adapm_lean").state_bytes for plan in (whole, true, mixed)}) == 1


def test_the_first_that_fits_keeps_the_most_state():
    recipes = ["adafactor", "adam_sn", "adapm"]

    def plan(memory: str | int) -> lm.MemoryPlan:
        return lm.plan_memory("llama-60m", recipes, world_size=2, gpu_memory=memory)

    sizes = {row.recipe: row.total_bytes for row in plan("1GiB").rows}
    assert plan(sizes[ADAMW] + 1).first_fit == ADAMW
    assert plan(sizes[ADAMW] + 1).rows[0].remaining == 1
    tight = plan(sizes[ADAMW])
    assert (tight.rows[0].remaining, tight.rows[0].fits, tight.first_fit) == (0, False, "adam_sn")
    assert plan(sizes["adam_sn"]).first_fit == "adapm"
    nothing = plan("1MiB")
    assert nothing.first_fit is None
    assert nothing.rows[0].remaining == parse_bytes("1MiB") - sizes[ADAMW]
    assert lm.plan_memory("llama-60m", recipes).first_fit is None


def test_recipes_in_every_form(tmp_path):
    Path("mine.yaml").write_text("base: adapm_lean\nroles: {mlp: {momentum: dense}}\n")
    given = ["adam_mini", Path("mine.yaml"), {"name": "other", "base": "adamw"}, lm.load_plan("adafactor")]
    plan = lm.plan_memory("llama-60m", given)
    assert [row.recipe for row in plan.rows] == [ADAMW, "adam_mini", "mine", "other", "adafactor"]
    assert plan.row("other").state_bytes == plan.row(ADAMW).state_bytes
    assert [row.recipe for row in lm.plan_memory("llama-60m").rows[1:]] == lm.recipe_names()


def test_to_dict_is_json_and_the_table_has_every_number():
    plan = lm.plan_memory("llama-60m", "adapm_lean", world_size=2, gpu_memory="1GiB")
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["rows"][1]["state_bytes"] == plan.row("adapm_lean").state_bytes
    assert data["first_fit"] == ADAMW
    table = plan.table()
    for text in (*COLUMNS, "llama-60m", "58,073,600", "2 ranks", *plan.cells()[1]):
        assert text in table
    assert COLUMNS[-1] not in lm.plan_memory("llama-60m", "adapm_lean").table()


def test_the_example_in_the_docstring():
    assert doctest.testmod(planning) == (0, 2)


def test_a_model_of_70_billion_parameters_needs_little_memory():
    program = """
import lightning_memopt as lm
plan = lm.plan_memory("llama-3-70b", world_size=64)
assert len(plan.rows) == 1 + len(lm.recipe_names())
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell how much memory a process used")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 << 20


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"Unknown model 'lama-7b'. Did you mean 'llama-7b'\?.*mixtral.*config file", {"model": "lama-7b"}),
        (TypeError, "`model` must be a name.*got 3", {"model": 3}),
        (FileNotFoundError, "no model configuration 'nowhere/config.json'", {"model": "nowhere/config.json"}),
        (ValueError, "Unknown recipe 'adapm_leen'.*adapm_lean", {"recipe": "adapm_leen"}),
        (ValueError, "`recipe` is an empty list: name some of adamw", {"recipe": []}),
        (ValueError, "`world_size` must be at least 1, got 0", {"world_size": 0}),
        (TypeError, "`world_size` must be an integer, got 2.5", {"world_size": 2.5}),
        (ValueError, "such as '512MiB'.*got '24 gigs'", {"gpu_memory": "24 gigs"}),
        (ValueError, "`gpu_memory` 0 means 0 bytes, too few", {"gpu_memory": 0}),
        (TypeError, "A size must be a text.*got 2.5", {"gpu_memory": 2.5}),
        (ValueError, "Unknown precision '16-mixed'.*bf16-mixed", {"precision": "16-mixed"}),
        (ValueError, "ReLU has no parameters.*configure_model", {"model": nn.ReLU()}),
        (ValueError, "without a shape cannot be planned for: 'weight', 'bias'", {"model": nn.LazyLinear(3)}),
    ],
)
def test_bad_input_names_the_value_and_the_way_out(error, message, options):
    with pytest.raises(error, match=message):
        lm.plan_memory(**{"model": "llama-60m", "recipe": "adafactor", **options})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is not JSON"),
        ("[]", "has the `model_type` None"),
        (
            '{"model_type": "nonsuch"}',
            "has the `model_type` 'nonsuch', which .* plan for the module itself",
        ),
        ('{"model_type": "llama", "hidden_size": 10}', "makes no model of 'config.json' .*correct the file"),
    ],
)
def test_bad_config_files(content, message):
    Path("config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        lm.plan_memory(Path("config.json"))


def test_what_is_missing_is_named(monkeypatch):
    Path("config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        lm.plan_memory("config.json")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        sweep_figure(sweep_memory("llama-60m", "adafactor", world_sizes=[1]))
    with pytest.raises(KeyError, match="'adapm' was not planned; there are torch.optim.AdamW, adafactor"):
        lm.plan_memory("llama-60m", "adafactor").row("adapm")


# ---------------------------------------------------------------------- sweeps


def test_a_sweep_and_its_figure():
    pytest.importorskip("matplotlib")
    plans = sweep_memory("llama-60m", ["adam_mini", "adafactor", "adamw"], world_sizes=(1, 2, 8), gpu_memory="512MiB")
    assert [plan.world_size for plan in plans] == [1, 2, 8]
    assert plans[1] == lm.plan_memory(
        "llama-60m", ["adam_mini", "adafactor", "adamw"], world_size=2, gpu_memory="512MiB"
    )
    whole, state = sweep_figure(plans).axes
    assert [line.get_label() for line in whole.lines] == [
        f"{ADAMW}\n= adamw", "adam_mini", "adafactor", "512 MiB per device",
    ]  # fmt: skip
    assert list(whole.lines[1].get_ydata()) == [plan.row("adam_mini").total_bytes for plan in plans]
    assert list(state.lines[2].get_ydata()) == [plan.row("adafactor").state_bytes for plan in plans]
    with pytest.raises(ValueError, match="nothing to plot"):
        sweep_figure([])


def test_the_command_sweeps(run):
    code, out, err = run("--model", "llama-60m", "--recipe", "adafactor", "--sweep", "--gpu-memory", "500MiB")
    assert (code, err) == (0, "")
    assert "Plot: plan-llama-60m.png" in out
    assert Path("plan-llama-60m.png").stat().st_size > 10_000
    header = next(line for line in out.splitlines() if line.split()[:1] == ["recipe"])
    assert header.split()[1:5] == ["1", "rank", "2", "ranks"]
    assert header.split()[-4:] == ["64", "ranks", "fits", "from"]
    line = next(line for line in out.splitlines() if line.split()[:1] == ["adafactor"])
    assert line.split()[-1] == "1"
    code, out, _ = run(
        "--model", "llama-60m", "--recipe", "adafactor", "--sweep", "--world-size", "100", "--json", "--plot", "x.png"
    )
    found = json.loads(out)
    assert [plan["world_size"] for plan in found["plans"]] == [1, 2, 4, 8, 16, 32, 64, 100]
    assert found["plot"] == "x.png"
    assert Path("x.png").exists()


# ---------------------------------------------------------------------- the command


def test_the_command_says_what_fits(run):
    code, out, err = run("--model", "llama-7b", "--recipe", "adapm_lean", "--world-size", "8", "--gpu-memory", "8GiB")
    plan = lm.plan_memory("llama-7b", "adapm_lean", world_size=8, gpu_memory="8GiB")
    assert (code, err) == (0, "")
    assert "llama-7b: 6,738,415,616 parameters, 8 ranks, 32-true" in out
    for cells in plan.cells():
        assert all(cell in out for cell in cells)
    assert "adapm_lean fits in 8 GiB: " in out
    assert "First that fits in 8 GiB, keeping the most state: adapm_lean (" in out
    assert "✓" in out
    assert "✗" in out
    assert max(map(len, (line.rstrip() for line in out.splitlines()[:-2]))) <= 100


def test_nothing_is_cut_in_a_narrow_terminal(run, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(plan_command, "_console", lambda: Console(width=80))
    plan = lm.plan_memory("llama-7b", "adam_mini", world_size=8, gpu_memory="24GiB")
    _, out, _ = run("--model", "llama-7b", "--recipe", "adam_mini", "--world-size", "8", "--gpu-memory", "24GiB")
    for cells in plan.cells():
        assert all(cell in out for cell in cells[1:])
    assert "…" not in out


def test_the_command_says_when_nothing_fits(run):
    _, out, _ = run("--model", "llama-60m", "--recipe", "adapm", "--recipe", "adafactor", "--gpu-memory", "1MiB")
    assert "adapm does not fit in 1 MiB: it needs 675.5 MiB before activations." in out
    assert "Nothing fits in 1 MiB: the smallest, adafactor, needs 443.7 MiB before activations. Use more ranks" in out
    assert "bf16-true" in out
    _, out, _ = run("--model", "llama-60m", "--recipe", "adapm", "--gpu-memory", "1MiB", "--precision", "bf16-true")
    assert "--precision" not in out
    code, out, _ = run("--model", "llama-60m", "--recipe", "adapm")
    assert code == 0
    assert "left" not in out
    assert "fit" not in out


def test_json_is_all_there_is(run):
    code, out, err = run("--model", "llama-60m", "--json", "--world-size", "2", "--gpu-memory", "1GiB")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(
        json.dumps(lm.plan_memory("llama-60m", world_size=2, gpu_memory="1GiB").to_dict())
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "lama-7b"], r"Unknown model 'lama-7b'\. Did you mean 'llama-7b'\?"),
        (["--model", "llama-60m", "--gpu-memory", "24Gigs"], "--gpu-memory: A size must be .* got '24Gigs'"),
        (["--model", "llama-60m", "--world-size", "two"], "--world-size: invalid int value: 'two'"),
        (["--model", "llama-60m", "--world-size", "-1"], "`world_size` must be at least 1, got -1"),
        (["--model", "llama-60m", "--recipe", "x.yaml"], r"no recipe file 'x\.yaml'"),
        (["--model", "llama-60m", "--precision", "8"], "Unknown precision '8'"),
        (["--model", "llama-60m", "--lr", "8"], "unrecognized arguments: --lr 8. Settings of a run go with --config"),
        (["--model", "llama-60m", "--plot", "x.png"], "--plot is the picture of a sweep: add --sweep"),
        (["--model", "llama-60m", "--sweep", "--plot", "no/x.png"], "--plot no/x.png: there is no folder 'no'"),
        ([], "one of the arguments --model --config is required"),
        (["--config", "nothere.yaml"], r"File does not exist: .*nothere\.yaml"),
        (["--config", f"{CONFIGS}/adamw.yaml"], r"required: fit\.model"),
        (["--config", f"{CONFIGS}/demo.yaml", "--optimizer.nothing=1"], "nothing"),
        (["--config", f"{CONFIGS}/demo.yaml", "--optimizer.gap=1"], "'gap' has no effect in the recipe 'adapm_lean'"),
        (
            ["--config", f"{CONFIGS}/demo.yaml", "--model.num_attention_heads=7"],
            "LlamaModule could not be made on the meta",
        ),
    ],
)
def test_errors_are_one_line(run, args, message):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("lightning-memopt plan: error: ")
    assert err.count("\n") == 1
    assert re.search(message, err)


@pytest.mark.parametrize("config", [T5Config(num_layers=1), MambaConfig(num_hidden_layers=1)])
def test_architectures_without_roles_are_planned_with_a_warning(run, config, tmp_path):
    config.save_pretrained(tmp_path / "strange")
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


CONFIG_ARGS = {
    "demo.yaml": [],
    "gpt2.yaml": [],
    "interpolation.yaml": ["--parser_mode", "omegaconf+", "--data.vocab_size=3000"],
    "adaptive.yaml": ["--config", str(CONFIGS / "demo.yaml")],
    "adamw.yaml": ["--config", str(CONFIGS / "demo.yaml")],
    "recipe.yaml": ["--config", str(CONFIGS / "demo.yaml"), "--optimizer=lightning_memopt.MemOpt",
                    f"--optimizer.recipe={CONFIGS / 'recipe.yaml'}"],
}  # fmt: skip
OWN_ROWS = {
    "demo.yaml": "config: AdaPMLean",
    "gpt2.yaml": "config: AdaPMMini",
    "interpolation.yaml": "config: MemOpt(recipe=adapm_lean)",
    "adaptive.yaml": "config: AdaPMLean",
    "adamw.yaml": None,
    "recipe.yaml": "config: MemOpt(recipe=wide_mlp)",
}


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_configs_of_the_examples(run, name):
    files = CONFIG_ARGS[name]
    own = [] if name == "recipe.yaml" else ["--config", str(CONFIGS / name)]
    code, out, err = run(*files[:2], *own, *files[2:], "--recipe", "adafactor", "--world-size", "2", "--json")
    assert code == 0, err
    plan = json.loads(out)
    rows = [row["recipe"] for row in plan["rows"]]
    assert rows == [ADAMW, *filter(None, [OWN_ROWS[name]]), "adafactor"]
    assert plan["unknown"] == []
    if name == "interpolation.yaml":  # the model follows the override
        demo = json.loads(run("--config", str(CONFIGS / "demo.yaml"), "--json")[1])
        assert plan["parameters"] == demo["parameters"] + 2 * 256 * (3000 - 2048)


def test_the_optimizer_of_a_config_has_its_options(run):
    args = ["--config", str(CONFIGS / "demo.yaml"), "--optimizer.rank=8", "--optimizer.state_dtype=bfloat16"]
    _, out, err = run(*args, "--recipe", "adapm_lean", "--json")
    own, named_one = json.loads(out)["rows"][1:]
    assert own["recipe"] == "config: AdaPMLean(rank=8, state_dtype=bfloat16)"
    assert 0 < own["state_bytes"] < named_one["state_bytes"] / 2 * 1.5
    import examples.llama

    with torch.device("meta"):
        module = examples.llama.LlamaModule()
    optimizer = lm.AdaPMLean(module.named_parameters(), rank=8, state_dtype="bfloat16")
    assert own["state_bytes"] == optimizer.snapshot().state_bytes


NOISY = """
import lightning.pytorch as pl, torch
class Noisy(pl.LightningModule):
    def configure_model(self):
        print("making it")
        self.net = torch.nn.Linear(4, 4)
class Loads(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 4)
        self.scale = float(self.net.weight.sum())
"""


def test_modules_that_are_made_later_or_need_values(run, monkeypatch):
    Path("noisy_modules.py").write_text(NOISY)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("x.yaml").write_text("model: {class_path: noisy_modules.Noisy}\nseed_everything: 3\n")
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    state = torch.get_rng_state()
    code, out, err = run("--config", "x.yaml", "--json", "--recipe", "adafactor")
    assert (code, "making it" in err) == (0, True)
    assert json.loads(out)["parameters"] == 20
    assert torch.equal(torch.get_rng_state(), state)
    Path("y.yaml").write_text("model: {class_path: noisy_modules.Loads}\n")
    code, _, err = run("--config", "y.yaml")
    assert code == 2
    assert "noisy_modules.Loads could not be made on the meta device (" in err
    assert "load and ask for them in `setup`" in err
    sys.modules.pop("noisy_modules")


def test_help_mentions_the_command(monkeypatch, capsys, run):
    code, out, _ = run("--help")
    assert code == 0
    for name in (*MODELS, *ALIASES, *lm.recipe_names()):
        assert name in out
    monkeypatch.setattr(sys, "argv", ["lightning-memopt", "--help"])
    with pytest.raises(SystemExit):
        cli_module.main()
    assert "lightning-memopt plan tells what a run will need on every rank" in capsys.readouterr().out


def test_the_precision_of_a_config_is_the_default(run):
    config = str(CONFIGS / "demo.yaml")
    for value, name in (("bf16", "bf16-mixed"), ("bf16-true", "bf16-true"), ("32", "32-true")):
        _, out, _ = run("--config", config, f"--trainer.precision={value}", "--recipe", "adapm_lean", "--json")
        assert json.loads(out)["precision"] == name
    _, out, _ = run(
        "--config", config, "--trainer.precision=bf16", "--precision", "32-true", "--recipe", "adapm", "--json"
    )
    assert json.loads(out)["precision"] == "32-true"
    code, _, error = run("--config", config, "--trainer.precision=16-mixed")
    assert code == 2
    assert "Unknown precision '16-mixed'" in error


def test_every_matrix_of_a_built_in_model_is_known(run):
    for name in MODELS:
        assert lm.plan_memory(name, "adafactor").unknown == ()
    _, out, error = run("--model", "mixtral-8x7b", "--recipe", "adapm_lean")
    assert "Warning" not in error
    assert "*" not in out


def test_counters_are_told_apart():
    model = tiny_llama()
    plan = lm.plan_memory(model, "adapm_lean")
    optimizer = lm.AdaPMLean(model.named_parameters())
    assert plan.counter_bytes == optimizer.snapshot().counter_bytes == 4 * len(list(model.parameters()))


def test_the_strategy_and_the_devices_of_a_config_are_planned_or_named(run, tmp_path):
    def config(strategy: Any, devices: Any = 2) -> tuple[dict[str, Any], str]:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"trainer": {"strategy": strategy, "devices": devices}}))
        files = ["--config", str(CONFIGS / "demo.yaml"), "--config", str(path)]
        code, out, error = run(*files, "--recipe", "adapm", "--json")
        assert code == 0
        return json.loads(out), error

    def ours(**options: Any) -> dict[str, Any]:
        return {"class_path": "lightning_memopt.MemOptFSDPStrategy", "init_args": options}

    whole, error = config("memopt_fsdp")
    assert whole["world_size"] == 2
    assert error == ""
    small, error = config(ours(wrap="torch.nn.Linear"))
    assert small["unsharded_bytes"] != whole["unsharded_bytes"], "other modules are gathered together"
    assert error == ""
    for name, value in (("replicate_size", 2), ("cpu_offload", True)):
        _, error = config(ours(**{name: value}))
        assert f"Warning: {name} of the strategy is not planned" in error
    _, error = config("ddp")
    assert "Warning: The strategy 'ddp' is planned as 'memopt_fsdp'" in error
    assert config("memopt_fsdp", "auto")[0]["world_size"] == 1


def test_a_built_in_name_is_no_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    code, out, _ = run("--model", "gpt2", "--recipe", "adapm")
    assert code == 0
    assert "124,439,808" in out


def test_an_architecture_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1, "architectures": ["NoSuchModel"]}))
    with pytest.warns(UserWarning, match="no NoSuchModel.*planned is LlamaForCausalLM"):
        lm.plan_memory(path, "adapm")


def test_short_forms_of_precision_and_sizes_without_a_unit():
    assert lm.plan_memory("llama-60m", "adapm", precision="bf16").precision == "bf16-mixed"
    with pytest.raises(ValueError, match="'16-mixed' as 'bf16-mixed'"):
        lm.plan_memory("llama-60m", "adapm", precision="16-mixed")
    with pytest.raises(ValueError, match="`gpu_memory` '24' means 24 bytes.*'24GiB'"):
        lm.plan_memory("llama-60m", "adapm", gpu_memory="24")


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
