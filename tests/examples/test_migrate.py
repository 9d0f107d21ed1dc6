"""The script, and every claim of its README that names this package's arguments or errors."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_memopt as lm
from examples.migrate.figure import draw
from examples.migrate.migrate import Run, main
from tests._ranks import run_ranks
from tests.examples._run import EXAMPLES

pytestmark = pytest.mark.slow

README = (EXAMPLES / "migrate" / "README.md").read_text()
# The second column of the tables of arguments.
OPTIMIZERS = re.findall(r"^\| [^|]+ \| `(lm\.[^`|]+)` \|", README, re.MULTILINE)
PACKAGES = re.findall(r"^### (.+?) \(", README, re.MULTILINE)


def llama(width: int = 256, **kwargs: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=16, **sizes, **kwargs))


class Wrapped(torch.nn.Module):
    """Names a model's parameters as a LightningModule with the model in `model` does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama(16)


@pytest.fixture(scope="module")
def graded() -> LlamaForCausalLM:
    """A model with gradients; its heads have 64 outputs."""
    model = llama()
    tokens = torch.arange(16).view(2, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    return model


def test_the_readme_has_a_table_for_every_package():
    assert PACKAGES == ["torch.optim.AdamW", "GaLore", "Fira", "APOLLO", "Adam-mini", "bitsandbytes"]
    assert len(OPTIMIZERS) == len(re.findall(r"\| `lm\.\w+\(", README)) > 30


@pytest.mark.parametrize("code", OPTIMIZERS)
def test_every_optimizer_of_the_tables_exists_and_none_of_its_arguments_is_without_effect(
    code: str, graded: LlamaForCausalLM
):
    # A list does not know its model, as where `head_dim` is needed.
    names = {"lm": lm, "params": list(graded.named_parameters()), "__builtins__": {}}
    weights = {name: param.detach().clone() for name, param in graded.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", lm.PlanWarning)
        optimizer = eval(code, names)
        optimizer.step()
    assert all(param.isfinite().all() for param in graded.parameters())
    moved = {name for name, param in graded.named_parameters() if not torch.equal(param, weights[name])}
    assert moved == set(weights)
    for name, param in graded.named_parameters():
        param.data.copy_(weights[name])


@pytest.mark.parametrize(("options", "growth"), [({"growth": 1e9}, 1.9 / 1.999**0.5), ({}, 1.01)])
def test_a_large_limit_is_none(options: dict[str, float], growth: float):
    # With the same gradient twice, Adam's step grows from M / sqrt(V) = 0.1 / sqrt(0.001) to 0.19 / sqrt(0.001999).
    model = llama(16)
    optimizer = lm.Apollo(model.named_parameters(), **options)
    norms = []
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        norms.append(optimizer.state[model.model.layers[0].self_attn.q_proj.weight]["apollo_norm"].item())
    assert norms[1] / norms[0] == pytest.approx(growth, rel=1e-4)


def test_the_options_of_torch_that_have_no_counterpart_are_refused():
    model = llama(16)
    for option in ("amsgrad", "foreach", "capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"There is no option `{option}` as in torch's AdamW, since "):
            lm.AdaPMLean(model.named_parameters(), **{option: True})


def adamw_state(model: torch.nn.Module, **options: Any) -> dict[str, Any]:
    """Return the state of torch's AdamW after a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer.state_dict()


def refusal(state: dict[str, Any]) -> str:
    """Return the error with which `AdaPMLean` refuses a state dict."""
    with pytest.raises(ValueError, match=".") as raised:
        lm.AdaPMLean(Wrapped().named_parameters()).load_state_dict(state)
    return f"ValueError: {raised.value}"


def test_the_state_of_adamw_continues_and_that_with_amsgrad_without_its_maximum():
    state = adamw_state(Wrapped(), amsgrad=True)
    assert refusal(state) in README
    for entry in state["state"].values():
        del entry["max_exp_avg_sq"]
    optimizer = lm.AdaPMLean(Wrapped().named_parameters())
    with pytest.warns(lm.ResumeWarning, match="resumes from step 1 of a state dict, with state converted from AdamW"):
        optimizer.load_state_dict(state)


def test_states_of_others_are_refused_as_the_readme_says():
    # The keys of adam-mini 1.1.1 and bitsandbytes 0.50.2.
    state = adamw_state(Wrapped())
    (group,) = state["param_groups"]
    mini = {"name": "a", "weight_decay": 0.0, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    groups = [{**mini, "params": group["params"]}]
    found = {at: {"m": x["exp_avg"], "step": 1, "vmean": torch.ones(1)} for at, x in state["state"].items()}
    assert refusal({"state": found, "param_groups": groups}) in README
    eight = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    eight |= {"alpha": 0.0, "t_alpha": None, "t_beta3": None, "params": group["params"]}
    found = {at: {"step": 1, "state1": x["exp_avg"], "state2": x["exp_avg"]} for at, x in state["state"].items()}
    assert refusal({"state": found, "param_groups": [eight]}) in README


def test_projectors_are_refused_as_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The class and the keys of galore-torch 1.0.
    module = types.ModuleType("galore_torch.galore_projector")
    module.GaLoreProjector = type("GaLoreProjector", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, "galore_torch", types.ModuleType("galore_torch"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    wrapped = Wrapped()
    state = adamw_state(wrapped)
    names = [name for name, _ in wrapped.named_parameters()]
    state["state"][names.index("model.model.layers.0.self_attn.q_proj.weight")]["projector"] = module.GaLoreProjector()
    assert re.sub("0x[0-9a-f]+", "0x...", refusal(state)) in README
    torch.save({"state_dict": wrapped.state_dict(), "optimizer_states": [state]}, "last.ckpt")
    with pytest.raises(Exception, match="which is not allowed in a checkpoint") as raised:
        lm.load_weights("last.ckpt")
    first = f"{type(raised.value).__name__}: {raised.value}".partition(" Lightning's")[0]
    assert first in README
    assert torch.load("last.ckpt", weights_only=False)["state_dict"].keys() == wrapped.state_dict().keys()


def switch_on_ranks(rank: int, world_size: int, root: str, folder: str) -> tuple[dict[str, Run], str]:
    """Run the script on the ranks that `run_ranks` started, and return what it returns and prints."""
    os.chdir(folder)
    # Lightning joins the process group, and starts no processes.
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runs = main([f"--root={root}", "--steps=9", "--switch=6", f"--devices={world_size}"])
    return runs, printed.getvalue()


def test_the_script_switches_on_two_ranks(texts: Path, tmp_path: Path):
    (runs, printed), (others, silence) = run_ranks(switch_on_ranks, 2, str(texts), str(tmp_path))
    assert runs == others, "losses and bytes are those of both ranks"
    before, adamw, lean = runs["before"], runs["AdamW"], runs["adapm_lean"]
    assert [len(run.losses) for run in (before, adamw, lean)] == [6, 3, 3]
    assert lean.losses[0] == adamw.losses[0], "the weights and batches are the same until the first update"
    assert lean.losses == pytest.approx(adamw.losses, abs=0.1), "the switch does not throw the run back"
    assert before.state_bytes == adamw.state_bytes > 20 * lean.state_bytes
    assert "continued in two ways after step 6" in printed
    assert "continued in two ways" not in silence
    assert Path("runs/migrate/switch.png").stat().st_size > 1000


def test_a_switch_beyond_the_run_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--steps=10", "--switch=10"])
    assert "--switch must be between 0 and --steps (10), got 10." in capsys.readouterr().err


def test_the_figure_shows_steps_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: drawn.append(self))
    draw(tmp_path / "x.png", [5.0, 4.0, 3.0], {"AdamW": [2.0, 1.0], "adapm_lean": [2.5, 1.5]})
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    assert list(lines["adapm_lean"].get_xdata()) == [3, 4, 5]
    assert list(lines["adapm_lean"].get_ydata()) == pytest.approx([12 / 3, 14.5 / 4, 16 / 5])
    assert drawn[0].axes[1].get_xlim() == (1, 5)
    assert lines["AdamW"].get_linestyle() == "-"
    assert lines["adapm_lean"].get_linestyle() == "--", "it would hide the line below where both agree"
