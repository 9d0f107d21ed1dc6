"""Train the same sharded model with AdamW and with compressed state, and compare.

Run ``make demo`` or ``python examples/pretrain/compare.py``. It uses all GPUs, or two CPU processes; Lightning starts
this file again for each further process. Other arguments go to both runs, as to ``lightning-memopt fit``::

    python examples/pretrain/compare.py --data.root DIR --trainer.max_steps 1000
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The configs import classes such as examples.pretrain.model.LanguageModel, in any working directory.
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torchmetrics import MetricCollection  # noqa: E402

import lightning_memopt as lm  # noqa: E402

DEMO = ["--config", str(HERE / "pretrain.yaml"), "--config", str(HERE / "demo.yaml")]
RUNS = {"AdamW": [*DEMO, "--config", str(HERE / "adamw.yaml")], "adapm_lean": DEMO}
BATCH = 8  # sequences, over all processes
WARMUP_STEPS = 5


@dataclass(frozen=True)
class Result:
    """The results of one run."""

    recipe: str
    val_loss: float
    state_bytes: int
    rank_bytes: int
    saved: float
    steps_per_second: float


class FitCLI(lm.MemOptCLI):
    """The command line with ``fit`` alone: setting up the parsers of the other commands takes seconds."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the arguments of ``fit`` that are not options."""
        return {"fit": lm.MemOptCLI.subcommands()["fit"]}


class StepTimer(Callback):
    """Measure training steps per second, without the first steps and without validation."""

    def __init__(self) -> None:
        self._steps, self._seconds, self._started = 0, 0.0, 0.0

    @property
    def steps_per_second(self) -> float:
        """Steps per second; NaN if the run is too short."""
        return self._steps / self._seconds if self._steps else float("nan")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        _wait(pl_module)
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock."""
        _wait(pl_module)
        if trainer.global_step > WARMUP_STEPS:
            self._steps += 1
            self._seconds += time.perf_counter() - self._started


def _wait(module: LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


def run(recipe: str, args: list[str]) -> Result:
    """Train as the command line does, and validate the result."""
    timer = StepTimer()
    cli = FitCLI(trainer_defaults={"callbacks": [timer]}, args=["fit", *RUNS[recipe], *processes(), *args])
    (optimizer,) = cli.trainer.optimizers
    (metrics,) = cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    snapshot = lm.take_snapshot(optimizer, cli.model)
    memory = MetricCollection([lm.metrics.OptimizerStateBytes(), lm.metrics.MemorySavings()]).to(cli.model.device)
    memory.update(snapshot)
    found = {name: value.item() for name, value in memory.compute().items()}
    return Result(recipe, metrics["val_loss"], found["total"], found["rank"], found["saved"], timer.steps_per_second)


def processes() -> list[str]:
    """Return the arguments for all GPUs, or for two CPU processes; the processes share the batch."""
    count = torch.cuda.device_count() or 2
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    batch = max(1, BATCH // count)
    return [f"--trainer.accelerator={accelerator}", f"--trainer.devices={count}", f"--data.batch_size={batch}"]


def table(results: list[Result]) -> Table:
    """Return the comparison; "saved" is relative to AdamW's state for the same parameters."""
    shown = Table(title="The same model, data and steps")
    for column in ("recipe", "val. loss", "state (MiB)", "per rank (MiB)", "saved", "steps/s"):
        shown.add_column(column, justify="left" if column == "recipe" else "right", no_wrap=True)
    for result in results:
        shown.add_row(
            result.recipe,
            f"{result.val_loss:.3f}",
            f"{result.state_bytes / 2**20:.2f}",
            f"{result.rank_bytes / 2**20:.2f}",
            f"{result.saved:.1%}",
            f"{result.steps_per_second:.2f}",
        )
    return shown


def main(args: list[str] | None = None) -> list[Result]:
    """Run all recipes, print the table and return its contents."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # This script's arguments are those of the runs; Lightning warns about having both.
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter is intended.*")
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    args = sys.argv[1:] if args is None else args
    results = []
    for recipe in RUNS:
        if rank_zero_only.rank == 0:
            Console().rule(recipe)
        results.append(run(recipe, args))
    if rank_zero_only.rank == 0:
        Console().print(table(results))
    return results


if __name__ == "__main__":
    main()
