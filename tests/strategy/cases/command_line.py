"""The strategy on the command line."""

from __future__ import annotations

import contextlib
import io
import tempfile
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule

import lightning_memopt as lm
from tests.strategy._training import LanguageModule, Spawned, fit
from tests.strategy.cases.shared import case, close, same_everywhere, units_of


def _command(tmp: Path, config: str, cli: str = "lightning_memopt.cli.MemOptCLI") -> LightningModule:
    module, _, name = cli.rpartition(".")
    kind = getattr(import_module(module), name)

    class OfFit(kind):  # type: ignore[misc, valid-type]
        """Builds no parsers of the other subcommands, which takes longer than to train."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {"fit": kind.subcommands()["fit"]}

    path = tmp / f"rank{dist.get_rank()}.yaml"
    path.write_text(config)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "plugins": [Spawned()]}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 2, "num_sanity_val_steps": 0}
    with contextlib.redirect_stdout(io.StringIO()):
        made = OfFit(
            LanguageModule,
            args=["fit", "--config", str(path)],
            trainer_defaults={**quiet, "max_steps": 3},
            save_config_callback=None,
        )
    return made.model


@case(2)
def command_line() -> None:
    torch.manual_seed(0)
    by_hand = LanguageModule(optimizer=lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01))
    fit(by_hand)
    with tempfile.TemporaryDirectory() as folder:
        for strategy in (
            "memopt_fsdp",
            "{class_path: lightning_memopt.MemOptFSDPStrategy, init_args: "
            "{wrap: [tests.strategy._training.Block], activation_checkpointing: true, data_parallel_size: 2}}",
        ):
            config = (
                "seed_everything: false\n"
                f"trainer: {{strategy: {strategy}}}\n"
                "optimizer: {class_path: lightning_memopt.AdaPMLean, init_args: {lr: 0.01}}\n"
            )
            module = _command(Path(folder), config)
            same_everywhere(module)
            close(module, by_hand, 1e-6)


@case(2)
def command_line_of_lightning() -> None:
    """LightningCLI makes the optimizer of `parameters()` without names, and finds the strategy by its class."""
    options = "wrap: tests.strategy._training.Block, activation_checkpointing: torch.nn.Linear"
    strategy = f"{{class_path: lightning_memopt.MemOptFSDPStrategy, init_args: {{{options}}}}}"
    with tempfile.TemporaryDirectory() as folder:
        for path, kind in (("lightning_memopt.AdaPMLean", lm.AdaPMLean), ("torch.optim.AdamW", torch.optim.AdamW)):
            by_hand = LanguageModule(optimizer=lambda it, kind=kind: kind(it.parameters(), lr=0.01))
            fit(by_hand)
            optimizer = f"{{class_path: {path}, init_args: {{lr: 0.01}}}}"
            config = f"seed_everything: false\ntrainer: {{strategy: {strategy}}}\noptimizer: {optimizer}\n"
            module = _command(Path(folder), config, "lightning.pytorch.cli.LightningCLI")
            assert type(module.trainer.optimizers[0]) is kind
            assert {type(unit).__name__ for _, unit in units_of(module)} == {"FSDPBlock", "FSDPNetwork"}
            same_everywhere(module)
            close(module, by_hand, 1e-6)
