from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from tests._commands import run_python
from tests._ranks import run_ranks

pytestmark = pytest.mark.slow

SMALL = ("--model=llama-1m", "--vocab-size=300", "--seq-len=16", "--batch-size=4", "--steps=20", "--save-every=10")


def on_rank(rank: int, world_size: int, given: list[str]) -> str:
    """Do as one process of torchrun does, in a process that has its group already, and return what it printed."""
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **sizes}
    from examples.hf_trainer.train import main

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(given)
    return printed.getvalue()


def run(*given: str) -> str:
    done = run_python("-m", "examples.hf_trainer.train", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def log(folder: Path) -> list[dict[str, Any]]:
    """Return what the Trainer logged at every tenth step."""
    return json.loads((folder / "checkpoint-20" / "trainer_state.json").read_text())["log_history"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(texts, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    args = [f"--root={texts}", *SMALL]
    table = run(*args, f"--folder={whole}")
    assert all(role in table for role in ("embedding", "query", "attention_output", "mlp", "head")), "roles are known"
    assert " other " not in table
    shutil.copytree(whole / "checkpoint-10", resumed / "checkpoint-10")
    assert run(*args, f"--folder={resumed}").startswith(f"continuing from {resumed / 'checkpoint-10'}\n")

    assert log(resumed) == log(whole)
    rates = [entry["learning_rate"] for entry in log(whole)]
    assert rates == pytest.approx([2e-3 * 10 / 21, 2e-3 * 20 / 21]), "the schedule took one step per step"
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    states = [torch.load(folder / "checkpoint-20" / "optimizer.pt", weights_only=True) for folder in (whole, resumed)]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)
    (names,) = states[0]["param_names"]
    assert set(names) == set(weights(whole))


def test_two_processes_train_as_one_does(texts, tmp_path):
    args = [f"--root={texts}", *SMALL]
    run(*args, f"--folder={tmp_path / 'one'}")
    printed = run_ranks(on_rank, 2, [*args, f"--folder={tmp_path / 'two'}"])
    assert ["query" in text for text in printed] == [True, False]
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-4, atol=1e-5)
