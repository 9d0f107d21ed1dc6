"""Runs that are killed in a step go on where the last checkpoint was, to the last bit of their weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import ProcessExitedException

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_memopt as lm
from tests._ranks import run_ranks
from tests.strategy._training import LanguageModule, trainer, whole

pytestmark = pytest.mark.slow

STEPS, KILLED = 6, 4


class Killed(Callback):
    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def trained(rank: int, world: int, folder: str, options: dict[str, Any], kill: bool, resume: bool) -> dict[str, Tensor]:
    """Return the float32 weights at the end."""
    module = LanguageModule(batch_size=12)  # two steps an epoch: a loader starts over in an epoch that goes on
    module.make_optimizer = lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01, master_weight_bits=24)
    save = ModelCheckpoint(folder, filename="last", every_n_train_steps=2, enable_version_counter=False)
    callbacks: list[Callback] = [save, *([Killed()] if kill else [])]
    strategy = lm.MemOptFSDPStrategy(save_distributed_checkpoint=False, **options)
    made = trainer(strategy, max_steps=STEPS, precision="bf16-true", enable_checkpointing=True, callbacks=callbacks)
    made.fit(module, ckpt_path=f"{folder}/last.ckpt" if resume else None)
    assert made.global_step == STEPS
    (optimizer,) = made.optimizers
    return {name: whole(weight) for name, weight in optimizer.full_weights().items()}


@pytest.mark.parametrize("options", [{}, {"gradient_release": True}], ids=["step", "release"])
def test_extra_bits_survive_a_kill(tmp_path, options):
    expected = run_ranks(trained, 2, str(tmp_path / "whole"), options, False, False)[0]
    folder = tmp_path / "killed"
    with pytest.raises(ProcessExitedException):
        run_ranks(trained, 2, str(folder), options, True, False)
    saved = torch.load(Path(folder) / "last.ckpt", weights_only=True)
    assert saved["global_step"] == KILLED
    found = run_ranks(trained, 2, str(folder), options, False, True)[0]
    assert any((weight.bfloat16() != weight).any() for weight in found.values()), "no extra bits"
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)
