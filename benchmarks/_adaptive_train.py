"""One training run of benchmarks/adaptive.py: a small model under the Lightning Trainer, on one core."""

from __future__ import annotations

import io
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
from _adaptive_models import FAMILIES
from _train import TOKENS, Settings, lr_factor
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_memopt
from lightning_memopt.optim.signals import Probe

ADAMW, LEAN, UNIFORM = "AdamW", "adapm_lean", "uniform"
REFERENCES = (ADAMW, LEAN)
POLICIES = (UNIFORM, "energy", "benefit", "fidelity", "schedule", "paper", "roles")
PLOTTED = "llama"  # the model whose ranks are drawn block by block
WARM_UP = 5  # steps that are not timed
BETAS = (0.9, 0.95)  # adapm_lean's

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")


@dataclass(frozen=True)
class AdaptiveSettings(Settings):
    """Settings that all runs of a comparison share; the last three belong to the callback."""

    steps: int = 250
    validation_tokens: int = 32768
    every_n_steps: int = 15
    start: int = 15
    freeze_after: float = 0.5


@dataclass(frozen=True)
class Run:
    """Key of one run; the references have no callback and no budget."""

    model: str
    policy: str
    budget: float | None
    lr: float
    seed: int
    ratio: float = 1.0  # of the rate of embeddings and norms to that of all others

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Run:
        """Return the run of a result. Earlier results have no ratio."""
        return cls(**{key: result[key] for key in cls.__dataclass_fields__ if key in result})

    @property
    def overrides(self) -> dict[str, Any] | None:
        """The rates by role."""
        if self.ratio == 1.0:
            return None
        return {role: {"lr_multiplier": self.ratio} for role in ("embedding", "vector")}

    def callback(self, settings: AdaptiveSettings) -> Any:
        """Return the callback, or None for a reference."""
        if self.budget is None:
            return None
        return lightning_memopt.AdaptiveMomentum(
            budget=self.budget,
            policy=self.policy,
            every_n_steps=settings.every_n_steps,
            start=settings.start,
            freeze_after=settings.freeze_after,
        )


@dataclass(frozen=True)
class Comparison:
    """A setting with its runs.

    Attributes:
        title: Heading on the page.
        suffix: Of the names of its plots.
        settings: What all runs share.
        models: The models.
        policies: The policies.
        budgets: Shares of AdamW's momentum.
        lrs: Learning rates to try with the uniform policy; None takes those of each model.
        ratios: Ratios of the rate of embeddings and norms to that of all others.
        shown: Policies whose ranks are drawn.
    """

    title: str
    suffix: str
    settings: AdaptiveSettings
    models: tuple[str, ...]
    policies: tuple[str, ...]
    budgets: tuple[float, ...]
    lrs: tuple[float, ...] | None = None
    ratios: tuple[float, ...] = (1.0,)
    shown: tuple[str, ...] = ("benefit", "energy")


# Weights, batches, schedule and validation of the large one are those of _train.py at its batch and number of steps.
COMPARISONS = {
    "4096": Comparison(
        "4,096 tokens a step, held-out text without copies",
        "_4096",
        AdaptiveSettings(steps=300, batch=32, validation_tokens=65536, distinct=True),
        models=("llama",),
        policies=(UNIFORM, "roles", "fidelity", "energy", "benefit"),
        budgets=(0.015, 0.025, 0.05),
        lrs=(2e-3,),
        ratios=(1.0, 11.3),
        shown=("fidelity", "energy"),
    ),
    "512": Comparison(
        "512 tokens a step",
        "",
        AdaptiveSettings(),
        models=("llama", "gpt2", "vit"),
        policies=POLICIES,
        budgets=(0.025, 0.05),
    ),
}


class Module(LightningModule):
    """One of the models, with its loss and optimizer."""

    def __init__(self, run: Run, settings: AdaptiveSettings) -> None:
        super().__init__()
        self.run, self.settings, self.family = run, settings, FAMILIES[run.model]
        torch.manual_seed(run.seed)
        self.model = self.family.build(settings).train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.family.loss(self.model, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss; all batches have the same size."""
        self.log("loss", self.family.loss(self.model, batch), batch_size=1)

    def configure_optimizers(self) -> Any:
        """Return the optimizer with warm-up and cosine."""
        options: dict[str, Any] = {"lr": self.run.lr, "betas": BETAS, "weight_decay": self.settings.weight_decay}
        if self.run.policy == ADAMW and self.run.overrides is None:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), **options, fused=True)
        else:
            recipe = "adamw" if self.run.policy == ADAMW else LEAN
            optimizer = lightning_memopt.MemOpt(
                self.model.named_parameters(), recipe, **options, overrides=self.run.overrides
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, self.settings))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Meter(Callback):
    """Record when each step starts and, on request, its momentum as a share of AdamW's."""

    def __init__(self, bytes_too: bool = True) -> None:
        self.bytes_too = bytes_too
        self.snapshot: lightning_memopt.Snapshot | None = None
        self.shares: list[float] = []
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the time and the momentum of this step."""
        self.starts.append(time.perf_counter())
        if self.bytes_too:
            self.measure(trainer.optimizers[0])

    def measure(self, optimizer: torch.optim.Optimizer) -> None:
        """Record the momentum."""
        if isinstance(optimizer, lightning_memopt.MemOpt):
            self.snapshot = optimizer.snapshot()
            self.shares.append(2 * self.snapshot.momentum_bytes / self.snapshot.adamw_bytes)
        else:
            self.shares.append(1.0)

    @property
    def seconds(self) -> list[float]:
        """Seconds from the start of each step to the start of the next, including all callbacks."""
        return [after - before for before, after in zip(self.starts, self.starts[1:], strict=False)]


def trainer(settings: AdaptiveSettings, callbacks: Sequence[Any]) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=settings.clip,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[callback for callback in callbacks if callback is not None],
    )


def loader(batches: Any) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)


def train(run: Run, settings: AdaptiveSettings) -> dict[str, Any]:
    """Train once and return the record for the results; the loss of a diverged run is None."""
    started = time.perf_counter()
    module, meter, callback = Module(run, settings), Meter(), run.callback(settings)
    held_out = module.family.held_out(TOKENS, settings)
    fit = trainer(settings, [meter, callback])
    try:
        with redirect_stdout(io.StringIO()):  # the callback prints what it does
            fit.fit(module, loader(module.family.training(TOKENS, settings, run.seed)), loader(held_out))
        loss = fit.callback_metrics["loss"].item()
    except FloatingPointError:
        loss = math.nan
    history = [] if callback is None else callback.history
    return {
        **asdict(run),
        "loss": loss if math.isfinite(loss) else None,
        "momentum_end": meter.shares[-1],
        "momentum_mean": sum(meter.shares) / len(meter.shares),
        "moves": sum(len(entry["moves"]) for entry in history if entry["step"] > 0),
        "ranks_by_role": ranks_by_role(meter.snapshot),
        "allocation": allocation(history) if run.model == PLOTTED else None,
        "seconds": round(time.perf_counter() - started, 1),
    }


def ranks_by_role(snapshot: lightning_memopt.Snapshot | None) -> dict[str, float]:
    """Return the mean rank of each role's matrices; dense momentum counts as the rank with equal memory."""
    ranks: dict[str, list[float]] = {}
    for block in () if snapshot is None else snapshot.blocks:
        if len(block.shape) > 1:
            dense = block.momentum_bytes / (block.adamw_bytes / 2) * _dense_rank(block.shape)
            ranks.setdefault(block.role, []).append(dense if block.rank is None else block.rank)
    return {role: round(sum(each) / len(each), 2) for role, each in ranks.items()}


def _dense_rank(shape: Sequence[int]) -> int:
    """Return the smallest rank whose factors take no less memory than the matrix."""
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) == 4 else shape[-2:]
    return -(-rows * columns // (rows + columns))


def allocation(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return steps, blocks, and the rank of each block from each step on; None without decisions."""
    if not history:
        return None
    blocks = list(history[0]["ranks"])
    ranks = [[entry["ranks"][block] for block in blocks] for entry in history]
    return {"steps": [entry["step"] for entry in history], "blocks": blocks, "ranks": ranks}


def cost(run: Run, settings: AdaptiveSettings, steps: int) -> dict[str, list[float]]:
    """Return the seconds of each step, of the callback's work after the optimizer's step, and of its other work.

    The timers are inside the callback: comparing runs with and without it would drown in the noise between runs.
    """
    brief = replace(settings, steps=steps, freeze_after=1.0)
    seconds: dict[str, list[float]] = {"signals": [], "decisions": []}

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name].append(time.perf_counter() - started)

        return wrapper

    module, meter, callback = Module(run, brief), Meter(bytes_too=False), run.callback(brief)
    batches = module.family.training(TOKENS, brief, run.seed)
    for hook in ("on_before_optimizer_step", "on_train_batch_end"):
        setattr(callback, hook, timed(getattr(callback, hook), "decisions"))
    with (
        redirect_stdout(io.StringIO()),
        mock.patch.object(Probe, "_after_update", timed(Probe._after_update, "signals")),
    ):
        trainer(brief, [meter, callback]).fit(module, loader(batches))
    return {"step": meter.seconds[WARM_UP:], **seconds}
