"""Shares of roles, and the state of recipes, for public models at their real sizes, on the meta device."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _report import OUTPUT, markdown, provenance
from torch import nn

import lightning_memopt as lm

RECIPES = ("adapm", "adapm_mini", "adam_snsm")
UNKNOWN = ("linear", "other")


def transformers_model(architecture: str, **sizes: Any) -> Callable[[], nn.Module]:
    """Return a function that builds a model of transformers from its sizes."""

    def build() -> nn.Module:
        import transformers

        cls = getattr(transformers, architecture)
        return cls(cls.config_class(**sizes))

    return build


def litgpt_model(name: str) -> Callable[[], nn.Module]:
    """Return a function that builds a model of litgpt."""

    def build() -> nn.Module:
        from litgpt import GPT, Config

        return GPT(Config.from_name(name))

    return build


def stable_diffusion() -> nn.Module:
    """Return the UNet of Stable Diffusion 1.5."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "T5-base": transformers_model(
        "T5ForConditionalGeneration", d_model=768, d_ff=3072, num_layers=12, num_heads=12, d_kv=64, vocab_size=32128
    ),
    "Pythia-160M": transformers_model(
        "GPTNeoXForCausalLM", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        vocab_size=50304,
    ),
    "Falcon-7B": transformers_model(
        "FalconForCausalLM", hidden_size=4544, num_hidden_layers=32, num_attention_heads=71, vocab_size=65024
    ),
    "BLOOM-560M": transformers_model(
        "BloomForCausalLM", hidden_size=1024, n_layer=24, n_head=16, vocab_size=250880
    ),
    "ModernBERT-base": transformers_model("ModernBertForMaskedLM"),
    "BART-large": transformers_model("BartForConditionalGeneration"),
    "Llama-3.2-1B (litgpt)": litgpt_model("Llama-3.2-1B"),
    "ViT-B": transformers_model("ViTForImageClassification", num_labels=1000),
    "Stable Diffusion 1.5, UNet": stable_diffusion,
    "Mamba-130M": transformers_model("MambaForCausalLM", hidden_size=768, num_hidden_layers=24, vocab_size=50280),
}  # fmt: skip


def row(name: str, build: Callable[[], nn.Module]) -> list[str]:
    """Return one row of the table."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build()
    except ImportError as error:
        return [name, f"not measured: {error.name} is not installed", *[""] * (1 + len(RECIPES))]
    params = dict(zip(lm.classify(model), model.parameters(), strict=True))
    total = sum(param.numel() for param in params.values())
    unknown = sum(params[name].numel() for name, parts in lm.classify(model).items() if parts[0].role in UNKNOWN)
    plan = lm.plan_memory(model, list(RECIPES))
    shares = [f"{1 - plan.row(recipe).saved:.1%}" for recipe in RECIPES]
    return [name, f"{total / 1e6:,.0f}M", f"{unknown / total:.1%}", *shares]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    head = ["model", "parameters", "linear or other", *RECIPES]
    rows = [row(name, build) for name, build in MODELS.items()]
    page = f"""# Roles at real sizes

Models built from their public sizes on the meta device. "linear or other" is the share of parameters whose part in the
model is unknown. The other columns are optimizer state, as a share of AdamW's.

{markdown(head, rows)}

{provenance()}
"""
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "roles.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
