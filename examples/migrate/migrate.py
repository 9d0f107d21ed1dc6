"""Switch a run from AdamW to compressed optimizer state in the middle, and compare with going on.

Run ``python examples/migrate/migrate.py``. It trains a LLaMA with AdamW, saves a checkpoint at ``--switch``, and
continues from it twice: with AdamW, and with a recipe of this package, which converts AdamW's averages.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything  # noqa: E402
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import lightning_memopt as lm  # noqa: E402
from examples.migrate.figure import draw, mean  # noqa: E402
from examples.pretrain.data import TextDataModule  # noqa: E402
from examples.pretrain.model import LanguageModel  # noqa: E402

FOLDER = Path("runs/migrate")
ADAMW = "AdamW"
BATCH = 8  # sequences, over all processes
LR = 2e-3


@dataclass
class Run:
    """What a part of a run leaves.

    Attributes:
        losses: The loss of every step, over all processes.
        state_bytes: Bytes of optimizer state at its end, over all processes.
    """

    losses: list[float] = field(default_factory=list)
    state_bytes: int = 0


class LossHistory(Callback):
    """Keep the mean loss over all processes of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss of a step."""
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))


def main(given: list[str] | None = None) -> dict[str, Run]:
    """Train, switch, compare, and return what each part leaves."""
    args = arguments(given)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    saved = FOLDER / "adamw.ckpt"
    before = fit(ADAMW, args, until=args.switch, save=saved)
    after = {name: fit(name, args, until=args.steps, resume=saved) for name in (ADAMW, args.recipe)}
    if rank_zero_only.rank == 0:
        Console().print(table(before, after))
        draw(FOLDER / "switch.png", before.losses, {name: run.losses for name, run in after.items()})
        print(f"The curves are in {FOLDER / 'switch.png'}.")
    return {"before": before, **after}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Move a run of AdamW to compressed optimizer state in the middle.")
    parser.add_argument("--steps", type=int, default=400, help="steps of the whole run")
    parser.add_argument("--switch", type=int, default=200, help="steps with AdamW before the switch")
    parser.add_argument("--recipe", choices=[*lm.recipe_names()], default="adapm_lean", metavar="NAME")
    parser.add_argument("--root", help="a folder of text files; without one, Python's standard library")
    parser.add_argument("--devices", type=int, default=torch.cuda.device_count() or 1)
    args = parser.parse_args(given)
    if not 0 < args.switch < args.steps:
        parser.error(f"--switch must be between 0 and --steps ({args.steps}), got {args.switch}.")
    return args


def fit(
    name: str, args: argparse.Namespace, *, until: int, save: Path | None = None, resume: Path | None = None
) -> Run:
    """Train until a step with AdamW or a recipe, from the beginning or from a checkpoint and the next batch."""
    seed_everything(0, verbose=False)
    module = LanguageModel("llama-1m", vocab_size=1024, config={"num_hidden_layers": 2})
    module.configure_optimizers = lambda: optimizer_for(module, name, args.steps)
    data = TextDataModule(args.root, vocab_size=1024, batch_size=max(1, BATCH // args.devices))
    history = LossHistory()
    trainer = Trainer(
        strategy="memopt_fsdp", devices=args.devices, max_steps=until, gradient_clip_val=1.0, callbacks=[history],
        limit_val_batches=0, logger=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return Run(history.losses, state_bytes(trainer, module))


def optimizer_for(module: LightningModule, name: str, steps: int) -> dict[str, Any]:
    """Return the optimizer and a schedule over the whole run, which the checkpoint continues, too."""
    if name == ADAMW:
        # Names let the checkpoint say which state is whose.
        optimizer: Any = torch.optim.AdamW(module.named_parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    else:
        # lr, eps and weight_decay come from the checkpoint, betas from the recipe.
        optimizer = lm.MemOpt(module.named_parameters(), recipe=name, lr=LR)
    schedule = lm.WarmupSchedule(optimizer, 30, total_steps=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def state_bytes(trainer: Trainer, module: LightningModule) -> int:
    """Return the bytes of optimizer state that all processes hold together."""
    metric = lm.metrics.OptimizerStateBytes().to(module.device)
    metric.update(lm.take_snapshot(trainer.optimizers[0], module))
    return int(metric.compute()["total"])


def table(before: Run, after: dict[str, Run]) -> Table:
    """Return the comparison: the mean loss of ten steps, and bytes of optimizer state."""
    shown = Table(title=f"One run, continued in two ways after step {len(before.losses)}")
    columns = ("continued with", "loss before", "right after", "at the end", "state (MiB)")
    for column in columns:
        shown.add_column(column, justify="left" if column == columns[0] else "right", no_wrap=True)
    for name, run in after.items():
        losses = (mean(before.losses[-10:]), mean(run.losses[:10]), mean(run.losses[-10:]))
        sizes = (before.state_bytes, run.state_bytes)
        shown.add_row(name, *(f"{loss:.3f}" for loss in losses), " → ".join(f"{size / 2**20:.2f}" for size in sizes))
    return shown


if __name__ == "__main__":
    main()
