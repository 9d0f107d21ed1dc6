"""The command with --config: it plans what the config would run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

import lightning_memopt as lm
from lightning_memopt import _registration
from lightning_memopt.memory.temporaries import Temporaries
from lightning_memopt.planner.memory_plan import ADAMW

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "pretrain"
BASE = ["--config", str(CONFIGS / "pretrain.yaml")]
CONFIG_ARGS = {
    "pretrain.yaml": [],
    "interpolation.yaml": ["--parser_mode", "omegaconf+", "--data.vocab_size=3000"],
    "recipe.yaml": [*BASE, "--optimizer=lightning_memopt.MemOpt", f"--optimizer.recipe={CONFIGS / 'recipe.yaml'}"],
}
OWN_ROWS = {
    "interpolation.yaml": "config: MemOpt(recipe=adapm_lean)",
    "adamw.yaml": None,
    "adapm.yaml": "config: AdaPM",
    "adam_snsm.yaml": "config: AdamSNSM",
    "recipe.yaml": "config: MemOpt(recipe=wide_mlp)",
}


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_configs_of_the_examples(run, name):
    files = CONFIG_ARGS.get(name, BASE)
    own = [] if name == "recipe.yaml" else ["--config", str(CONFIGS / name)]
    code, out, err = run(*files[:2], *own, *files[2:], "--recipe", "adafactor", "--world-size", "2", "--json")
    assert code == 0, err
    plan = json.loads(out)
    rows = [row["recipe"] for row in plan["rows"]]
    assert rows == [ADAMW, *filter(None, [OWN_ROWS.get(name, "config: AdaPMLean")]), "adafactor"]
    assert plan["unknown"] == []
    if name == "interpolation.yaml":  # the model follows the override
        demo = json.loads(run("--config", str(CONFIGS / "pretrain.yaml"), "--json")[1])
        assert plan["parameters"] == demo["parameters"] + 2 * 256 * (3000 - 2048)


def test_the_optimizer_of_a_config_has_its_options(run):
    args = ["--config", str(CONFIGS / "pretrain.yaml"), "--optimizer.rank=8", "--optimizer.state_dtype=bfloat16"]
    _, out, err = run(*args, "--recipe", "adapm_lean", "--json")
    own, named_one = json.loads(out)["rows"][1:]
    assert own["recipe"] == "config: AdaPMLean(rank=8, state_dtype=bfloat16)"
    assert 0 < own["state_bytes"] < named_one["state_bytes"] / 2 * 1.5
    from examples.pretrain.model import LanguageModel

    with torch.device("meta"):
        module = LanguageModel()
    optimizer = lm.AdaPMLean(module.named_parameters(), rank=8, state_dtype="bfloat16")
    assert own["state_bytes"] == optimizer.snapshot().state_bytes


def test_activations_are_those_of_the_model_that_the_module_of_a_config_holds(run, tmp_path):
    from examples.pretrain.model import LanguageModel

    args = ["--config", str(CONFIGS / "pretrain.yaml"), "--recipe", "adafactor", "--batch", "4x64", "--json"]
    code, out, err = run(*args)
    assert code == 0, err
    found = json.loads(out)
    module = LanguageModel()
    for param in module.parameters():
        param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    with Temporaries() as temporaries:
        module.loss(torch.zeros(4, 64, dtype=torch.long)).backward()
    assert found["activation_bytes"] == pytest.approx(temporaries.peak, rel=0.05)

    checkpointed = {
        "class_path": "lightning_memopt.MemOptFSDPStrategy",
        "init_args": {"activation_checkpointing": True},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": checkpointed}}))
    less, more = (
        json.loads(run(*args, "--config", str(tmp_path / "run.yaml"), *given)[1])
        for given in ([], ["--no-activation-checkpointing"])
    )
    assert (less["activation_checkpointing"], more["activation_checkpointing"]) == (True, False)
    assert less["activation_bytes"] < 0.8 * more["activation_bytes"] == 0.8 * found["activation_bytes"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("self.net = torch.nn.Linear(4, 4)", "activations of Other are unknown: only language models of transformers"),
        ("self.a, self.b = tiny_llama(), tiny_llama()", "it holds several models ('a', 'b'), and a plan does not see"),
        ("self.vit = vit()", "its model 'vit' reads `pixel_values`, and `batch` means tokens. Leave `batch` out."),
    ],
)
def test_a_module_whose_activations_are_unknown_is_told(run, monkeypatch, body, message):
    Path("other_modules.py").write_text(OTHER.format(body=body))
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("x.yaml").write_text("model: {class_path: other_modules.Other}\n")
    code, _, err = run("--config", "x.yaml", "--batch", "2x8")
    sys.modules.pop("other_modules")
    assert code == 2
    assert message in err
    assert "Leave `batch` out" in err


OTHER = """
import lightning.pytorch as pl, torch, transformers
from tests._models import tiny_llama
def vit():
    config = transformers.ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    return transformers.ViTForImageClassification(config)
class Other(pl.LightningModule):
    def __init__(self):
        super().__init__()
        {body}
"""
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
    assert "noisy_modules.Loads could not be created on the meta device (" in err
    assert "load or request them in `setup`" in err
    sys.modules.pop("noisy_modules")


def test_the_precision_of_a_config_is_the_default(run):
    config = str(CONFIGS / "pretrain.yaml")
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


def test_the_strategy_and_the_devices_of_a_config_are_planned_or_named(run, tmp_path):
    def config(strategy: Any, devices: Any = 2) -> tuple[dict[str, Any], str]:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"trainer": {"strategy": strategy, "devices": devices}}))
        files = ["--config", str(CONFIGS / "pretrain.yaml"), "--config", str(path)]
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
    for name, value in (("replicate_size", 2), ("cpu_offload", True), ("gradient_release", True)):
        plan, error = config(ours(**{name: value}))
        assert (plan[name], error) == (value, "")
    assert config(ours(reshard_after_forward=False))[0]["unsharded_bytes"] > whole["unsharded_bytes"]
    alone, copied = (config(strategy, 1)[0] for strategy in ("auto", "memopt_fsdp"))
    assert (alone["unsharded_bytes"], alone["world_size"]) == (0, 1) != copied["unsharded_bytes"]
    for name, options in _registration.NAMES.items():
        plan, error = config(name)
        assert ({key: plan[key] for key in options}, error) == (options, "")
    _, error = config(ours(tensor_parallel_size=2))
    assert "Warning: tensor_parallel_size of the strategy is not planned" in error
    _, error = config("ddp")
    assert "Warning: The strategy 'ddp' is planned as 'memopt_fsdp'" in error
    assert config("memopt_fsdp", "auto")[0]["world_size"] == 1
    assert whole["averaged_bytes"] == 0


@pytest.mark.parametrize("name", ["lightning.pytorch.callbacks.WeightAveraging", "EMAWeightAveraging"])
def test_averaged_weights_of_a_config(run, name):
    args = ["--config", str(CONFIGS / "pretrain.yaml"), "--recipe", "adapm", f"--trainer.callbacks+={name}"]
    code, out, _ = run(*args)
    assert code == 0
    assert "parameters 13.2 MiB, averaged weights 13.2 MiB, buffers" in out
