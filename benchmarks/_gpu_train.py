"""Sections of benchmarks/gpu.py that train under Lightning: train and guards."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _gpu_report import Report
from _gpu_step import CUDA, DEVICE
from _train import Settings, build_model, loss_of
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_memopt as lm

SETTINGS = Settings(hidden=256, intermediate=688, layers=3, heads=8, vocabulary=512, length=64, batch=8)
if not CUDA:
    SETTINGS = Settings(hidden=64, intermediate=172, layers=2, heads=4, vocabulary=128, length=16, batch=2)
STEPS = 12
RUNS = (
    *((recipe, "32-true") for recipe in ("adamw", "adapm", "adapm_mini", "adapm_lean", "adam_snsm", "adafactor")),
    *((recipe, precision) for recipe in ("adapm_lean", "adam_snsm") for precision in ("bf16-mixed", "bf16-true")),
)
Weights = dict[str, Tensor]


class Module(LightningModule):
    """A small LLaMA on random tokens, which depend only on the step, so that a resumed run sees the same ones."""

    def __init__(self, recipe: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model, self.recipe = build_model(SETTINGS), recipe
        shape = (STEPS, SETTINGS.batch, SETTINGS.length)
        self.tokens = torch.randint(SETTINGS.vocabulary, shape, generator=torch.Generator().manual_seed(0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return loss_of(self.model, self.tokens[self.trainer.global_step % STEPS].to(self.device))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return lm.MemOpt(self.named_parameters(), recipe=self.recipe, lr=2e-3)


def fit(
    recipe: str = "adapm_lean",
    *,
    steps: int = STEPS,
    precision: Any = "32-true",
    strategy: str | Strategy = "memopt_fsdp",
    callbacks: Sequence[Callback] = (),
    resume: Path | None = None,
    save: Path | None = None,
    root: Path | None = None,
) -> Weights:
    """Train and return the whole weights on the host; callbacks write to ``root``."""
    _be_quiet()
    module = Module(recipe)
    trainer = Trainer(
        accelerator=DEVICE,
        devices=1,
        strategy=strategy,
        precision=precision,
        max_steps=steps,
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        gradient_clip_val=1.0,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(torch.zeros(STEPS, 1)), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    whole = (
        (name, getattr(param, "full_tensor", lambda param=param: param)()) for name, param in module.named_parameters()
    )
    return {name: weight.detach().cpu().clone() for name, weight in whole}


def _be_quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for pattern in (".*does not have many workers.*", ".*LeafSpec.*", ".*dataloader is not resumable.*"):
        warnings.filterwarnings("ignore", pattern)


def _verdict(weights: Weights) -> str:
    return "finite" if all(weight.isfinite().all() for weight in weights.values()) else "NOT FINITE"


def train(report: Report, quick: bool) -> None:
    """Train with every recipe and precision, with offloading, without the strategy and with both callbacks."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()  # the monitor reports the peak since the process began
    table = report.table(f"{STEPS} steps of training", ["run", "precision", "weights", "seconds"])
    runs: list[tuple[str, dict[str, Any]]] = [
        (recipe, {"recipe": recipe, "precision": precision}) for recipe, precision in RUNS
    ]
    runs.append(("adapm_lean, offloaded", {"strategy": "memopt_fsdp_offload"}))
    runs.append(("adapm_lean, no strategy", {"strategy": "auto"}))
    adaptive = lm.AdaptiveMomentum(budget=0.05, policy="energy", every_n_steps=3)
    runs.append(("adapm_lean, callbacks", {"callbacks": (adaptive, lm.OptimizerMemoryMonitor(every_n_steps=4))}))
    for name, options in runs:
        precision = options.get("precision", "32-true")
        with table.attempt(name, precision):
            started = time.perf_counter()
            verdict = _verdict(fit(**options, root=report.folder))
            table.add(name, precision, verdict, f"{time.perf_counter() - started:.1f}")


def guards(report: Report, quick: bool) -> None:
    """Check that checkpoints of both formats resume exactly, and that a NaN gradient changes nothing."""
    table = report.table("Guards", ["check", "result"])
    for name, distributed in (("resume from a directory", True), ("resume from a file", False)):
        with table.attempt(name), TemporaryDirectory() as folder:
            path = Path(folder) / "half.ckpt"
            whole = fit(strategy=_strategy(distributed))
            fit(strategy=_strategy(distributed), steps=STEPS // 2, save=path)
            if path.is_dir() != distributed:
                raise RuntimeError(f"expected a {'directory' if distributed else 'file'} at {path.name}")
            table.add(name, _compared(whole, fit(strategy=_strategy(distributed), resume=path)))
    for recipe in ("adapm_lean", "adam_snsm", "adafactor"):
        with table.attempt(f"NaN, {recipe}"):
            table.add(f"NaN, {recipe}", _refused(recipe))


def _strategy(distributed: bool) -> Strategy:
    return lm.MemOptFSDPStrategy(save_distributed_checkpoint=distributed)


def _compared(expected: Weights, found: Weights) -> str:
    if all(torch.equal(expected[name], found[name]) for name in expected):
        return "equal bit for bit"
    worst = max(((expected[name] - found[name]).norm() / expected[name].norm()).item() for name in expected)
    return f"differs by {worst:.1e}"


def _refused(recipe: str) -> str:
    """Take a step on gradients with one NaN, and report what happened to weights and state."""
    torch.manual_seed(2)
    model = build_model(SETTINGS).to(DEVICE)
    optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe, lr=1e-3)
    for param in model.parameters():
        param.grad = torch.randn_like(param) * 1e-3
    optimizer.step()
    before = [tensor.clone() for tensor in _tensors(model, optimizer)]
    next(model.parameters()).grad.view(-1)[0] = float("nan")
    try:
        optimizer.step()
    except FloatingPointError:
        same = all(torch.equal(old, new) for old, new in zip(before, _tensors(model, optimizer), strict=True))
        return "refused, nothing changed" if same else "refused, but something CHANGED"
    return "NOT REFUSED"


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = (value for entry in optimizer.state.values() for value in entry.values())
    return [*model.parameters(), *(value for value in state if isinstance(value, Tensor))]
