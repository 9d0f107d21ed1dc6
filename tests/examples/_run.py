"""Run the configs of the examples: in this process, or on two ranks that exist already."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = ("adamw", "adapm", "adapm_lean", "adam_snsm")
QUIET = (
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", "--trainer.num_sanity_val_steps=0",
)  # fmt: skip


def configs(*names: str) -> list[str]:
    """Return the arguments for config files of the examples, such as ``sft/sft.yaml``."""
    return [f"--config={EXAMPLES / name}" for name in names]


def fit_command(*args: str, first: Sequence[str] = ()) -> Any:
    """Do as ``lightning-memopt *first fit *args`` does, with three steps on one device unless ``args`` differ."""
    from lightning_memopt.cli import MemOptCLI

    return MemOptCLI(args=[*first, "fit", *configs_first(args, [*QUIET, "--trainer.max_steps=3"])])


def configs_first(args: Sequence[str], defaults: Sequence[str]) -> list[str]:
    """Return configs, then defaults, then the other arguments, since the last one counts."""
    files = [arg for arg in args if arg.startswith("--config=")]
    return [*files, *defaults, *(arg for arg in args if arg not in files)]


def fit_on_ranks(rank: int, world_size: int, commands: list[list[str]], folder: str) -> list[dict[str, Any]]:
    """Run every command on the ranks that `run_ranks` started, and return its metrics and sharded parameters' share."""
    from examples.pretrain.compare import FitCLI
    from tests.strategy._training import Spawned

    os.chdir(folder)
    ranks = [f"--trainer.devices={world_size}", "--trainer.strategy=memopt_fsdp"]
    found = []
    for args in commands:
        given = ["fit", *configs_first(args, [*QUIET, "--trainer.max_steps=3", *ranks])]
        cli = FitCLI(trainer_defaults={"plugins": [Spawned()]}, args=given)
        (optimizer,) = cli.trainer.optimizers
        params = [param for group in optimizer.param_groups for param in group["params"]]
        sharded = sum(isinstance(param, DTensor) for param in params) / len(params)
        metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
        found.append({"steps": cli.trainer.global_step, "sharded": sharded, "metrics": metrics})
        assert all(torch.isfinite(param.to_local() if isinstance(param, DTensor) else param).all() for param in params)
    return found
