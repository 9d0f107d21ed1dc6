"""A LightningCLI for this package's optimizers."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import sys
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerTypeUnion, ReduceLROnPlateau
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch.optim import Optimizer

# The command line knows a class by its short name once its module is imported.
import lightning_memopt.strategy  # noqa: F401
from lightning_memopt._registry import unknown
from lightning_memopt.callbacks import BindNames
from lightning_memopt.cli.class_paths import why_not
from lightning_memopt.cli.commands import COMMANDS
from lightning_memopt.cli.module_folders import search_folders_of
from lightning_memopt.cli.parser import RunParser
from lightning_memopt.cli.parser_mode import PARSER_MODES, SetParserMode, set_parser_mode
from lightning_memopt.cli.save_config import SaveConfig
from lightning_memopt.optim.schedule import WarmupSchedule

# An option of one override. The parser would drop the override's other options, and take numbers for texts.
_SPLIT = re.compile(r"--optimizer\.(init_args\.)?overrides\.[^.=]+\.")


class MemOptCLI(LightningCLI):
    """LightningCLI for this package's optimizers.

    It differs from LightningCLI in these ways:

    - It binds this package's optimizers to the parameter names, whether they come from
      ``--optimizer=lightning_memopt.AdaPM`` or from the module's ``configure_optimizers``.
    - A learning rate scheduler from the command line steps with the optimizer (``--scheduler_interval``), and a
      :class:`~lightning_memopt.WarmupSchedule` takes its length from the trainer.
    - Classes are also imported from the folder of a config and those above it, up to the top of its project.
    - ``--parser_mode`` selects how files are read.
    - A run never overwrites the config of another run.
    - The config alone says which model is built: hyperparameters in a checkpoint change nothing.
    - Mistakes in a command or a config are one line, which suggests what was meant.
    - A ``fit`` that fails or is interrupted names the checkpoint to continue from.

    Parser modes: ``yaml`` (default) does not resolve interpolations. ``omegaconf`` resolves interpolations such as
    ``${data.init_args.seq_len}`` when a file is read, so an override on the command line changes this key, but not the
    keys that refer to it. ``omegaconf+`` resolves interpolations at the end, so these keys follow the override.

    Args:
        *args: As in LightningCLI.
        parser_mode: The default of ``--parser_mode``.
        scheduler_interval: The default of ``--scheduler_interval``.
        **kwargs: As in LightningCLI.

    Raises:
        ValueError: If ``parser_mode`` or ``scheduler_interval`` is unknown.
    """

    def __init__(
        self,
        *args: Any,
        parser_mode: str = "yaml",
        scheduler_interval: Literal["step", "epoch"] = "step",
        **kwargs: Any,
    ) -> None:
        if parser_mode not in PARSER_MODES:
            raise ValueError(f"`parser_mode` must be one of {', '.join(PARSER_MODES)}, got {parser_mode!r}.")
        if scheduler_interval not in ("step", "epoch"):
            raise ValueError(f"`scheduler_interval` must be 'step' or 'epoch', got {scheduler_interval!r}.")
        self._parser_mode, self._scheduler_interval = parser_mode, scheduler_interval
        kwargs.setdefault("save_config_callback", SaveConfig)
        kwargs.setdefault("parser_class", RunParser)
        given = kwargs.get("parser_kwargs") or {}
        described = {name: {"description": COMMANDS[name].does} for name in self.subcommands() if name in COMMANDS}
        kwargs["parser_kwargs"] = given | {name: entry | given.get(name, {}) for name, entry in described.items()}
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser that knows ``--parser_mode``."""
        kwargs.setdefault("description", "Train with optimizers that compress their state.")
        kwargs.setdefault("allow_abbrev", False)  # --trainer.max_step would be --trainer.max_steps
        parser = super().init_parser(**kwargs)
        parser.add_argument(
            "--parser_mode",
            action=SetParserMode,
            metavar="{" + ",".join(PARSER_MODES) + "}",
            help="How to read the config files that follow. omegaconf: interpolations are resolved per file, overrides "
            f"are not followed; omegaconf+: overrides are followed (default: {self._parser_mode}).",
        )
        return parser

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Set up the parsers, with the default mode unless ``parser_kwargs`` set another."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        if "parser_mode" not in main_kwargs:
            set_parser_mode(self.parser, self._parser_mode)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--scheduler_interval`` to Lightning's own."""
        super().add_default_arguments_to_parser(parser)
        parser.add_argument(
            "--scheduler_interval",
            type=Literal["step", "epoch"],
            default=self._scheduler_interval,
            help="When the scheduler of `lr_scheduler` steps: after every optimizer step, or after every epoch. "
            "ReduceLROnPlateau always steps when its metric is known.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments. Classes are also searched in the folders of the config files."""
        words = sys.argv[1:] if args is None else args if isinstance(args, list) else []
        search_folders_of(words)
        if split := next(filter(_SPLIT.match, words), None):
            parser.error(
                f"{split}: options of an override cannot be set one by one, because patterns contain dots, too. Set a "
                "whole override, as in --optimizer.overrides.head='{rank: 8}', or all of them, as in "
                "--optimizer.overrides='{\"*.q_proj.weight\": {rank: 8}}'."
            )
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        config = self.config[command] if command else self.config
        if problem := _strategy_problem((config.get("trainer") or {}).get("strategy")):
            parser.error(f"--trainer.strategy: {problem}")

    def _parse_ckpt_path(self) -> None:
        """Read no hyperparameters from ``--ckpt_path``.

        Lightning lets those of a checkpoint file replace what the config says, the class of the model included: a file
        could name any class, which would be imported and called. Of a directory, it reads none.
        """

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command. If it is interrupted or fails, say where it can continue."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            path = newest_checkpoint(self.trainer) if subcommand == "fit" else ""
            if path:
                # Lightning's messages go there, too. A logger would need a configuration.
                rank_zero_only(print)(
                    f"To continue this run, repeat its command with --ckpt_path={shlex.quote(path)}", file=sys.stderr
                )
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer, with a callback that binds optimizers at the start of fit."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.insert(0, BindNames())  # type: ignore[attr-defined]
        return trainer

    def configure_optimizers(  # type: ignore[override]
        self,
        lightning_module: LightningModule,
        optimizer: Optimizer,
        lr_scheduler: LRSchedulerTypeUnion | None = None,
    ) -> Any:
        """Return the optimizer and the scheduler of the command line.

        Raises:
            MisconfigurationException: If a schedule needs the length of training, and it is unknown.
        """
        if lr_scheduler is None or isinstance(lr_scheduler, ReduceLROnPlateau):
            return super().configure_optimizers(lightning_module, optimizer, lr_scheduler)
        interval = self._get(self.config, "scheduler_interval")
        if isinstance(lr_scheduler, WarmupSchedule) and lr_scheduler.needs_total_steps:
            if interval != "step":
                raise MisconfigurationException(
                    "WarmupSchedule counts optimizer steps: leave out --scheduler_interval=epoch, or give "
                    "--lr_scheduler.total_steps in epochs."
                )
            trainer = lightning_module.trainer
            steps = trainer.estimated_stepping_batches if trainer.limit_train_batches else 0
            if steps < 0 or math.isinf(steps):  # -1 if the data have no length
                raise MisconfigurationException(
                    "Training has no end, or an epoch no known length, so the "
                    f"{lr_scheduler.decay} decay of WarmupSchedule has no length. Set --trainer.max_steps, or "
                    "--lr_scheduler.total_steps, or --lr_scheduler.decay=constant."
                )
            lr_scheduler.total_steps = max(1, int(steps))
            if lr_scheduler.warmup_steps >= lr_scheduler.total_steps:
                rank_zero_warn(
                    f"The warm-up of {lr_scheduler.warmup_steps} steps is as long as the whole training of "
                    f"{lr_scheduler.total_steps}, so the rate never falls, and may never reach its full value. "
                    "Train longer, or set --lr_scheduler.warmup_steps to a tenth of the steps or less."
                )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": interval}}

    def before_fit(self) -> None:
        """Check that there is an optimizer."""
        if not is_overridden("configure_optimizers", self.model):
            raise MisconfigurationException(
                f"There is no optimizer: {type(self.model).__name__} has no `configure_optimizers` and the command "
                "names none. Add for example --optimizer=lightning_memopt.AdaPMLean --optimizer.lr=1e-3, or an "
                "`optimizer:` section to the config."
            )


def newest_checkpoint(trainer: Trainer) -> str:
    """Return the path of the checkpoint that was saved last by a run, empty if there is none on this machine."""
    saved = [
        path
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
        for path in (callback.last_model_path, callback.best_model_path, *callback.best_k_models)
        if path
    ]
    times = {}
    for path in saved:
        with contextlib.suppress(OSError):  # deleted since, or at a URL
            times[path] = os.path.getmtime(path)
    return max(times, key=lambda path: times[path], default="")


def _strategy_problem(strategy: object) -> str:
    """Return what is wrong with the name of a strategy; empty if nothing is, or it is not a name."""
    known = ["auto", *StrategyRegistry.available_strategies()]
    if not isinstance(strategy, str) or strategy.lower() in known:
        return ""
    if "." in strategy:
        return why_not(strategy) or f"{strategy} is a class, not a name: give it as {{class_path: {strategy}}}."
    said = unknown("strategy", strategy, known).partition(" Available:")[0]
    return f"{said} Usual ones are auto, ddp, fsdp, memopt_fsdp and memopt_fsdp_offload."
