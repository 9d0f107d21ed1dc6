"""Fine-tunes a small LLaMA with low-rank adapters (peft, r=16) under several kinds of state for the role ``lora``."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from _report import OUTPUT, ROOT, markdown, provenance
from _train import TOKENS, Settings, batches, build_model, loss_of, lr_factor, validate
from _variants import VARIANTS
from torch import Tensor, nn

import lightning_memopt as lm

RANK, ALPHA = 16, 32
LRS = (2e-3, 4e-3, 8e-3, 16e-3)
# Kinds for the adapters, from all of AdamW's state to almost none.
KINDS: dict[str, dict[str, Any]] = {
    "dense × dense (AdamW)": {},
    "dense × factored": {"second_moment": "factored"},
    "dense × blockwise": {"second_moment": "blockwise"},
    "low_rank r=4 × dense": {"momentum": "low_rank", "rank": 4},
    "low_rank r=1 × dense": {"momentum": "low_rank", "rank": 1},
    "low_rank r=4 × factored": {"momentum": "low_rank", "rank": 4, "second_moment": "factored"},
    "low_rank r=2 × factored": {"momentum": "low_rank", "rank": 2, "second_moment": "factored"},
    "low_rank r=1 × factored": {"momentum": "low_rank", "rank": 1, "second_moment": "factored"},
    "none × dense": {"momentum": "none"},
    "none × factored": {"momentum": "none", "second_moment": "factored"},
    "subspace r=4 × subset_norm": {"momentum": "subspace", "rank": 4, "second_moment": "subset_norm"},
    "subspace r=2 × subset_norm": {"momentum": "subspace", "rank": 2, "second_moment": "subset_norm"},
    "subspace r=1 × subset_norm": {"momentum": "subspace", "rank": 1, "second_moment": "subset_norm"},
}


def tokens_of_headers(settings: Settings) -> dict[str, dict[str, Tensor]]:
    """Return the tokens of Python's standard library and of torch's C++ headers, in the vocabulary of the first."""
    sys.path.insert(0, str(ROOT))
    from examples.pretrain.data import TextDataModule
    from examples.pretrain.texts import Texts

    data = TextDataModule(vocab_size=settings.vocabulary)
    data.prepare_data()
    data.setup("fit")
    headers = Texts(Path(torch.__file__).parent / "include" / "ATen", "**/*.h", 0.1, 2_000_000)
    assert data.tokenizer is not None
    encoded = {
        split: torch.cat([torch.tensor(data.tokenizer(text).input_ids) for text in headers.read(split)])
        for split in ("train", "val")
    }
    return {
        "base": {"train": data.tokens["train"][:].flatten(), "validation": data.tokens["val"][:].flatten()},
        "headers": {"train": encoded["train"], "validation": encoded["val"]},
    }


def run(model: nn.Module, optimizer: Any, lr: float, seed: int, settings: Settings) -> float:
    """Train a model in place and return its loss on held-out text; NaN if it diverged."""
    window = torch.arange(settings.length + 1)
    for step, starts in enumerate(batches(TOKENS["train"], seed, settings)):
        optimizer.param_groups[0]["lr"] = lr * lr_factor(step, settings)
        loss_of(model, TOKENS["train"][starts[:, None] + window].long()).backward()
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], settings.clip)
        if not torch.isfinite(norm):
            return math.nan
        optimizer.step()
        optimizer.zero_grad()
    return validate(model, TOKENS["validation"], settings, settings.validation_tokens)


def adapted(weights: dict[str, Tensor], seed: int, settings: Settings) -> nn.Module:
    """Return the base model with fresh adapters on all linear layers; nothing else trains."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = build_model(settings)
    model.load_state_dict(weights)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))


def main() -> None:
    """Run the comparison and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=float, nargs="+", default=list(LRS))
    parser.add_argument("--kinds", choices=list(KINDS), nargs="+", default=list(KINDS), metavar="KINDS")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(steps=options.steps, validation_tokens=16384)
    texts = tokens_of_headers(settings)

    base_settings = Settings(steps=options.base_steps)
    TOKENS.update(texts["base"])
    torch.manual_seed(0)
    base = build_model(base_settings)
    learned = run(base, VARIANTS["AdamW"].build(base, 2e-3, 0.0), 2e-3, 0, base_settings)
    TOKENS.update(texts["headers"])
    before = validate(base, TOKENS["validation"], settings, settings.validation_tokens)
    print(f"base model: {learned:.3f} on its text, {before:.3f} on headers", flush=True)
    weights = base.state_dict()

    def tuned(change: dict[str, Any], lr: float, seed: int) -> tuple[float, float]:
        model = adapted(weights, seed, settings)
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        overrides = {"*lora_*": change} if change else None
        optimizer = lm.MemOpt(named, "adamw", lr=lr, betas=(0.9, 0.95), overrides=overrides)
        facts = optimizer.snapshot()
        return run(model, optimizer, lr, seed, settings), facts.state_bytes / facts.adamw_bytes

    rows = []
    for name in options.kinds:
        change = KINDS[name]
        grid = {lr: tuned(change, lr, 0) for lr in options.lrs}
        best = min(grid, key=lambda lr: grid[lr][0] if math.isfinite(grid[lr][0]) else math.inf)
        losses = [grid[best][0], *(tuned(change, best, seed)[0] for seed in range(1, options.seeds))]
        shown = " / ".join(f"{grid[lr][0]:.3f}" for lr in options.lrs)
        shares = [f"{sum(losses) / len(losses):.3f}", f"{grid[best][1]:.1%}"]
        rows.append([name, f"{best:g}", *(f"{loss:.3f}" for loss in losses), *shares, shown])
        print(rows[-1], flush=True)
    header = ["kinds", "lr", *(f"seed {seed}" for seed in range(options.seeds)), "mean", "state", "seed 0 at every lr"]
    count = sum(param.numel() for name, param in adapted(weights, 0, settings).named_parameters() if "lora_" in name)
    rates = ", ".join(f"{lr:g}" for lr in options.lrs)
    page = f"""# State of low-rank adapters

A LLaMA (4 layers, width 128, vocabulary 1024) that was trained on the Python standard library is adapted to torch's C++
headers: peft's LoRA, r={RANK}, on all linear layers, {count:,} parameters that train, {settings.steps} steps of
{settings.batch} x {settings.length} tokens. The learning rate is the best of {rates} with seed 0. Loss: mean over
{settings.validation_tokens:,} held-out tokens. "state" is the share of AdamW's bytes. Before it is adapted, the model
has a loss of {before:.3f} on the headers.

{markdown(header, rows)}

{provenance(threads=1)}
"""
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "lora.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
