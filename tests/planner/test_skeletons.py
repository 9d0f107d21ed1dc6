"""The built-in models are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

import lightning_memopt as lm
from lightning_memopt.planner.skeletons import ALIASES, MODELS, skeleton
from lightning_memopt.sharding.wrapping import find_units, own_modules

pytestmark = pytest.mark.slow


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
    "llama-2-13b": (lambda: llama(5120, 13824, 40, 40), "13016M"),
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


def test_every_matrix_of_a_built_in_model_is_known(run):
    for name in MODELS:
        assert lm.plan_memory(name, "adafactor").unknown == ()
    _, out, error = run("--model", "mixtral-8x7b", "--recipe", "adapm_lean")
    assert "Warning" not in error
    assert "*" not in out


def test_a_skeleton_cannot_be_called():
    with pytest.raises(NotImplementedError, match="This module is made for its sizes only; build the model with"):
        skeleton("llama-60m")(torch.zeros(1, 1))
