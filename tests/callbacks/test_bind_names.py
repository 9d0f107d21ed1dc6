"""Names under a LightningCLI and a Trainer that know nothing of this package."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning.pytorch.cli")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

import lightning_memopt as lm
from tests._commands import keep_parsers

pytestmark = pytest.mark.slow

TRAINER = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
TRAINER |= {"enable_model_summary": False, "limit_train_batches": 2, "max_epochs": 1, "log_every_n_steps": 1}


class Tiny(LightningModule):
    """Without an optimizer: a LightningCLI adds the one of the config."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(16, 8)
        self.self_attn = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        self.lm_head = nn.Linear(8, 16, bias=False)

    def training_step(self, batch, batch_idx):
        hidden = self.embed_tokens(batch)
        hidden = hidden + self.self_attn(hidden, hidden, hidden, need_weights=False)[0]
        return nn.functional.cross_entropy(self.lm_head(hidden).flatten(0, 1), batch.flatten())

    def train_dataloader(self):
        return DataLoader(torch.randint(16, (8, 5), generator=torch.Generator().manual_seed(0)), batch_size=4)


class Bare(Tiny):
    """With an optimizer of parameters that know neither names nor a module."""

    def configure_optimizers(self):
        return lm.AdaPMMini([param for param in self.parameters() if param.requires_grad])


class OwnCLI(LightningCLI):
    """Somebody's own."""


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything writes these
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.chdir(tmp_path)
    keep_parsers(monkeypatch, "fit")


def fit(cli=OwnCLI, model=Tiny, **trainer):
    config = {"seed_everything": 0, "trainer": {**TRAINER, "enable_checkpointing": False, **trainer}}
    args = ["fit", "--config=config.yaml"]
    if model is Tiny:
        config["optimizer"] = {"class_path": "lightning_memopt.AdaPMMini", "init_args": {"lr": 0.01}}
    if "ckpt_path" in trainer:
        args.append(f"--ckpt_path={config['trainer'].pop('ckpt_path')}")
    Path("config.yaml").write_text(yaml.safe_dump(config))
    done = cli(model, args=args, save_config_callback=None)
    (optimizer,) = done.trainer.optimizers
    return done, optimizer.snapshot()


def heads(snapshot):
    return {block.role: block.head_dim for block in snapshot.blocks if block.role in ("query", "value")}


@pytest.mark.parametrize("cli", [LightningCLI, OwnCLI], ids=["plain", "own"])
@pytest.mark.parametrize("strategy", ["auto", "ddp", "memopt_fsdp"])
def test_somebodys_own_command_line_needs_no_names(cli, strategy):
    done, snapshot = fit(cli, strategy=strategy)
    assert {block.name.partition(":")[0] for block in snapshot.blocks} == {
        name for name, _ in done.model.named_parameters()
    }
    assert heads(snapshot) == {"query": 4, "value": None}, "the module was asked, not only its names"
    assert snapshot.step == 2


def test_somebodys_own_command_line_resumes():
    fit(enable_checkpointing=True)
    (checkpoint,) = Path.cwd().rglob("*.ckpt")
    _, snapshot = fit(max_epochs=2, ckpt_path=str(checkpoint))
    assert snapshot.step == 4


class Strange(LightningModule):
    """One matrix, whose name says nothing, in a recipe that compresses other linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.strange = nn.Linear(8, 16, bias=False)

    def training_step(self, batch, batch_idx):
        return self.strange(batch).square().mean()

    def train_dataloader(self):
        return DataLoader(torch.ones(8, 8), batch_size=4)

    def configure_optimizers(self):
        roles = {"linear": {"momentum": "dense", "second_moment": "dense"}}
        return lm.MemOpt(self.parameters(), {"base": "adam_snsm", "roles": roles})


@pytest.mark.parametrize("strategy", ["auto", "memopt_fsdp"])
def test_what_is_not_saved_is_said_once_under_a_trainer(strategy):
    trainer = Trainer(**TRAINER, strategy=strategy, enable_checkpointing=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Strange())
    assert trainer.global_step == 2
    (said,) = [str(each.message) for each in caught if isinstance(each.message, lm.RoleWarning)]
    assert "100% of the parameters that train have no known role" in said
    assert "saves 0% of AdamW's state here" in said


def test_a_gradient_scaler_steps_without_a_closure():
    optimizer = lm.AdaPMMini((model := Tiny()).parameters())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model.training_step(torch.arange(10).reshape(2, 5), 0)).backward()
    scaler.step(optimizer)
    assert optimizer.snapshot().step == 1


def test_one_line_of_yaml_gives_names_before_a_checkpoint_is_restored():
    with pytest.raises(ValueError, match=r"has no name.*BindNames.*MemOptCLI"):
        fit(model=Bare)
    callbacks = [{"class_path": "lightning_memopt.BindNames"}]
    _, first = fit(model=Bare, enable_checkpointing=True, callbacks=callbacks)
    assert heads(first) == {"query": 4, "value": None}
    (checkpoint,) = Path.cwd().rglob("*.ckpt")
    _, snapshot = fit(model=Bare, max_epochs=2, callbacks=callbacks, ckpt_path=str(checkpoint))
    assert snapshot.step == 4


def test_the_callback_serves_a_plain_trainer():
    model = Bare()
    trainer = Trainer(**TRAINER, enable_checkpointing=False, callbacks=[lm.BindNames()])
    trainer.fit(model)
    assert trainer.optimizers[0].snapshot().step == 2
