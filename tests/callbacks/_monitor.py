"""A small language model, and what tests of OptimizerMemoryMonitor train it and look at it with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning.pytorch")
pytest.importorskip("matplotlib")

from lightning.pytorch import Callback, LightningModule, Trainer

import lightning_memopt as lm
from lightning_memopt import OptimizerMemoryMonitor

WIDTH, VOCAB = 16, 20
SCALARS = {
    *("state_bytes", "state_bytes_rank", "state_bytes_global"),
    *("momentum_bytes", "projection_bytes", "second_moment_bytes", "other_bytes"),
    *("saved", "saved_momentum", "saved_second_moment"),
    *("peak_bytes", "parameter_bytes", "gradient_bytes", "buffer_bytes", "unsharded_bytes", "scratch_bytes"),
    "rest_bytes",
}
FILES = {"memory.json", "memory.png", "momentum.png"}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("scale", torch.ones(5))

    def forward(self, batch: Tensor) -> Tensor:
        return self.lm_head(self.layer(self.embed_tokens(batch)))


class Module(LightningModule):
    def __init__(self, optimizer: Callable[[LightningModule], Any]) -> None:
        super().__init__()
        self.model, self.make = Network(), optimizer

    def loss(self, seed: int) -> Tensor:
        batch = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(seed))
        return nn.functional.cross_entropy(self.model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(100))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.loss(100))

    def configure_optimizers(self) -> Any:
        return self.make(self)

    def train_dataloader(self) -> Any:
        return DataLoader(range(10), batch_size=1)

    val_dataloader = test_dataloader = train_dataloader


def lean(module: LightningModule) -> lm.MemOpt:
    return lm.AdaPMLean(module.named_parameters(), lr=1e-3, rank=4)


def adamw(module: LightningModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def sgd(module: LightningModule) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-3)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, "devices": 1}
    return Trainer(**{**quiet, "callbacks": list(callbacks), **options})


def fit(make: Callable[..., Any], *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Trainer:
    made = trainer(*callbacks, **({} if "max_epochs" in options else {"max_steps": 7}) | options)
    made.fit(make if isinstance(make, LightningModule) else Module(make), ckpt_path=ckpt_path)
    return made


def kept(*optimizers: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in the optimizers' state, counted without this package."""
    return sum(
        value.numel() * value.element_size()
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def numel(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def steps(callback: OptimizerMemoryMonitor) -> list[int]:
    return [entry["step"] for entry in callback.history]


def tables(out: str) -> int:
    return out.count("Optimizer state of ")


def summaries(out: str) -> int:
    return out.count("Optimizer state: ")


def below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


class Counts(Callback):
    """Counts what the first optimizer holds after every batch, by step."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.sizes.setdefault(trainer.global_step, kept(*trainer.optimizers))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.sizes[trainer.global_step] = kept(*trainer.optimizers)


def snapshot_of(made: Trainer) -> lm.Snapshot:
    return lm.take_snapshot(made.optimizers, made.lightning_module)
