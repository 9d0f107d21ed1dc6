"""Small checkpoints of both formats, saved without a Trainer, and the commands on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memopt.strategy.checkpoint.io import AtomicCheckpointIO
from lightning_memopt.strategy.checkpoint.save import model_state, optimizer_state, save_directory, save_file
from tests._models import fill_grads

FORMATS = ("directory", "file")


def save(path: Path, model: nn.Module, *optimizers: torch.optim.Optimizer, format: str, **rest: Any) -> Path:
    """Take a step and save."""
    fill_grads(list(model.parameters()), 0)
    for optimizer in optimizers:
        optimizer.step()
    whole = format == "file"
    states = [optimizer_state(optimizer, model, whole=whole) for optimizer in optimizers]
    content = {"state_dict": model_state(model, whole=whole), "optimizer_states": states, **rest}
    if whole:
        save_file(content, path, AtomicCheckpointIO())
    else:
        save_directory(content, path)
    return path


def refused(main: Any, capsys: Any, *args: Any) -> str:
    """Run a command that fails, and return its message, one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    shown = capsys.readouterr()
    assert (stop.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    return shown.err
