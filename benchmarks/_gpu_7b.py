"""A section of benchmarks/gpu.py: a LLaMA of 7 billion parameters in bfloat16 with gradient release, within 24 GiB."""

from __future__ import annotations

import gc
import math
import time

import torch
from _gpu_report import Report
from _gpu_step import CUDA, DEVICE
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_memopt as lm

LIMIT = 24 << 30
STEPS, BATCH, LENGTH = (20, 1, 512) if CUDA else (3, 1, 32)
SIZES = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
if not CUDA:
    SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}
SETTINGS = {"16 bits": {}, "24 bits": {"master_weight_bits": 24}}


def fits(report: Report, quick: bool) -> None:
    """Report tokens per second and peak memory of steps with random weights and tokens, beside the plan's peak."""
    size = f"{SIZES['num_hidden_layers']} layers of width {SIZES['hidden_size']:,}"
    table = report.table(
        f"A LLaMA with {size}: bfloat16, `adapm_lean`, gradient release, activation checkpointing, {BATCH} x {LENGTH} "
        f"tokens, {STEPS} steps, limited to {LIMIT >> 30} GiB",
        ["weights", "peak GiB", "planned GiB", "tokens/s", "first loss", "last loss"],
    )
    if CUDA:
        share = LIMIT / torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        for name, options in SETTINGS.items():
            with table.attempt(name):
                table.add(name, *measured(options))
            gc.collect()  # a model that ran out of memory
            if CUDA:
                torch.cuda.empty_cache()
    finally:
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)


def measured(options: dict[str, int]) -> list[str]:
    """Train, and return the cells of a row."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=32_000 if CUDA else 256, use_cache=False))
    finally:
        torch.set_default_dtype(before)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its newer name
    enable({"use_reentrant": False})
    model.train()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-3, **options)
    optimizer.release_gradients(model)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    losses: list[float] = []
    ids = torch.randint(0, 256, (BATCH, LENGTH), device=DEVICE)  # the same: a loss that falls
    started = time.perf_counter()
    for step in range(STEPS):
        if step == 2:
            _wait()
            started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    _wait()
    rate = BATCH * LENGTH * (STEPS - 2) / (time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else math.nan
    bits = options.get("master_weight_bits", 16)
    settings = {"precision": "bf16-true", "gradient_release": True, "master_weight_bits": bits}
    plan = lm.plan_memory(model, "adapm_lean", **settings, batch=(BATCH, LENGTH), activation_checkpointing=True)
    planned = plan.row("adapm_lean").total_bytes / 2**30
    return [f"{peak:.2f}", f"{planned:.2f}", f"{rate:.0f}", f"{losses[0]:.3f}", f"{losses[-1]:.3f}"]


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()
