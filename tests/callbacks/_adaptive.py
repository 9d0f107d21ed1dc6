"""A small language model, and what tests of AdaptiveMomentum train it and look at it with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback, LightningModule, Trainer

import lightning_memopt as lm
from lightning_memopt import AdaptiveMomentum

VOCAB, LENGTH, WIDTH = 12, 6, 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.mlp = nn.LayerNorm(WIDTH), nn.Module()
        self.self_attn = nn.MultiheadAttention(WIDTH, 2, bias=False, batch_first=True)
        self.mlp.up_proj = nn.Linear(WIDTH, 2 * WIDTH)
        self.mlp.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        values = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(values, values, values, need_weights=False)[0]
        return hidden + self.mlp.down_proj(self.mlp.up_proj(hidden).relu())


class Network(nn.Module):
    """A small language model: two matrices, and six in every layer, of which three are fused.

    Two are enough, and much faster, where a test asks when decisions are made, not which.
    """

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.embed_tokens(batch)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.lm_head(self.norm(hidden))


def tokens(seed: int, count: int = 4) -> Tensor:
    return torch.randint(VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


class Module(LightningModule):
    """Learns a fixed set of sequences; the batch depends on the step only."""

    def __init__(self, recipe: str | Callable[..., Any] = "adapm_lean", layers: int = 1, **options: Any) -> None:
        super().__init__()
        self.model = Network(layers)
        self.recipe, self.options = recipe, {"lr": 1e-2, **options}

    def loss(self, seed: int) -> Tensor:
        batch = tokens(seed)
        return nn.functional.cross_entropy(self.model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(self.global_step % 7)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(100))

    def configure_optimizers(self) -> Any:
        if callable(self.recipe):
            return self.recipe(self)
        return lm.MemOpt(self.named_parameters(), self.recipe, **self.options)

    def train_dataloader(self) -> Any:
        return DataLoader(range(10), batch_size=1)

    val_dataloader = train_dataloader


class Watch(Callback):
    """Checks after every batch, and after every step, that momentum takes no more than the budget."""

    def __init__(self, budget: int | None = None, index: int = 0) -> None:
        self.budget, self.index, self.sizes = budget, index, []

    def on_before_zero_grad(self, trainer: Trainer, *args: Any) -> None:
        size = stored(trainer.optimizers[self.index])
        self.sizes.append(size)
        if self.budget is not None:
            assert size <= self.budget, trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.on_before_zero_grad(trainer)
        optimizer = trainer.optimizers[self.index]
        fresh = [
            block for _, param, block in optimizer.blocks() if param.requires_grad and not optimizer.state.get(param)
        ]
        planned = sum(block.recipe.momentum.nbytes(block.layout) for block in fresh)  # of those that have yet to train
        assert self.sizes[-1] == optimizer.snapshot().momentum_bytes - planned


def stored(optimizer: lm.MemOpt) -> int:
    """Return the bytes of all momentum, projections included, from the storages that are there."""
    total = 0
    for _, param, block in optimizer.blocks():
        keys = block.recipe.momentum.keys if optimizer.state.get(param) else ()
        tensors = [optimizer.state[param][block.prefix + key] for key in keys]
        total += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    return total


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, "devices": 1}
    return Trainer(**{**quiet, "callbacks": list(callbacks), **options})


def fit(module: LightningModule, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Trainer:
    made = trainer(*callbacks, **({} if {"max_epochs", "max_time"} & options.keys() else {"max_steps": 12}) | options)
    made.fit(module, ckpt_path=ckpt_path)
    return made


def dense_bytes(module: nn.Module) -> int:
    return 4 * sum(param.numel() for param in module.parameters())


def steps_of(callback: AdaptiveMomentum) -> list[int]:
    return [entry["step"] for entry in callback.history]


def moved(callback: AdaptiveMomentum) -> list[int]:
    """Return the number of moves of all decisions but the first."""
    return [len(entry["moves"]) for entry in callback.history[1:]]


def kept_rank(block: Any) -> int:
    if block.momentum == "dense":
        return -(-block.shape[0] * block.shape[1] // sum(block.shape))
    return block.rank or 0


class StopsAt(Callback):
    """Saves after some steps, and stops training after the last of them."""

    def __init__(self, *steps: int, path: Path) -> None:
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.path / f"{trainer.global_step}.ckpt")
            trainer.should_stop = trainer.global_step == self.steps[-1]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in module.named_parameters()}
