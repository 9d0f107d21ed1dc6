from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests._commands import run_python
from tests._ranks import run_ranks

pytestmark = pytest.mark.slow

SMALL = ("--model=llama-1m", "--vocab-size=300", "--seq-len=16", "--batch-size=4", "--steps=20", "--save-every=10")


def trained(rank: int, world_size: int, given: list[str]) -> str:
    """Train on a process that has its group already, and return what it printed."""
    from examples.plain_pytorch.train import main

    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(given)
    return printed.getvalue()


def content(folder: Path) -> dict[str, Any]:
    """Return all that a checkpoint holds, as whole tensors."""
    path = folder.parent / f"{folder.name}.pt"
    dcp_to_torch_save(folder, path)
    return torch.load(path, weights_only=False)


def test_two_processes_then_one_train_as_two_do(texts, tmp_path, monkeypatch):
    args = [f"--root={texts}", *SMALL]
    (whole, silent) = run_ranks(trained, 2, [*args, f"--folder={tmp_path / 'whole'}"])
    assert silent == "", "rank 0 alone prints"
    assert whole.count("embed_tokens") == 1
    first, last = (content(tmp_path / "whole" / f"step-000000{step}") for step in (10, 20))

    (tmp_path / "moved").mkdir()
    shutil.copytree(tmp_path / "whole" / "step-00000010", tmp_path / "moved" / "step-00000010")
    (tmp_path / "moved" / "step-00000015").mkdir()  # an interrupted save
    # What torchrun sets for a single process.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    second = run_python("-m", "examples.plain_pytorch.train", *args, f"--folder={tmp_path / 'moved'}")
    assert second.returncode == 0, second.stderr[-3000:]
    assert second.stdout.startswith("continuing after step 10\nstep    20  loss ")
    assert second.stdout.splitlines()[-1] == whole.splitlines()[-1], "the same loss"

    again = content(tmp_path / "moved" / "step-00000020")
    assert again["step"] == last["step"] == 20
    assert again["schedule"] == last["schedule"]
    torch.testing.assert_close(again["model"], last["model"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first["model"]["lm_head.weight"], last["model"]["lm_head.weight"], atol=1e-3)


def test_a_start_without_torchrun_says_how():
    done = run_python("-m", "examples.plain_pytorch.train")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Start this with torchrun --nproc-per-node")
