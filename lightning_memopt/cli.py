"""The command line: a LightningCLI that binds this package's optimizers to parameter names.

``lightning-memopt fit --config config.yaml`` and ``python -m lightning_memopt fit --config config.yaml`` are the same.
``lightning-memopt plan`` plans the memory of a run, see :mod:`lightning_memopt.planner.plan_command`;
``lightning-memopt roles`` shows what a recipe knows of its weights, see :mod:`lightning_memopt.planner.roles_command`.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from argparse import SUPPRESS, Action
from importlib import import_module
from typing import Any

import torch

from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.planner import plan_command, roles_command
from lightning_memopt.planner.arguments import Configured
from lightning_memopt.planner.planning import Candidate
from lightning_memopt.sharding.wrapping import resolve_policy

try:
    import jsonargparse
    import omegaconf  # noqa: F401  the parser modes need it, and would fail only while reading a file
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.model_helpers import is_overridden

    # The command line knows a class by its short name once its module is imported.
    import lightning_memopt.strategy  # noqa: F401
    from lightning_memopt.strategy.averaging import AVERAGING
except ImportError as error:
    raise ImportError(
        f"The command line of lightning_memopt could not be imported ({error}). Its requirements are an extra: "
        'pip install "lightning-memopt[cli]"'
    ) from error

PARSER_MODES = ("yaml", "omegaconf", "omegaconf+")
# Arguments of optimizers that do not affect the size of their state.
RATES = ("lr", "betas", "eps", "weight_decay", "maximize", "max_update", "fused", "nonfinite", "seed")


class BindNames(Callback):
    """Bind every ``MemOpt`` of the trainer to the names of the module's parameters, before a checkpoint is restored.

    This covers optimizers from the command line and from the module's ``configure_optimizers``.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bind the optimizers."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, MemOpt):
                optimizer.bind(pl_module)


class SaveConfig(SaveConfigCallback):
    """Save the config of a run beside its logs, under a unique name.

    Lightning raises an error if ``config.yaml`` exists, or overwrites it. Without a logger, the directory is the
    working directory, so the second ``fit`` would fail or replace the user's own file. This class saves to
    ``config-v1.yaml`` instead, numbered as Lightning numbers checkpoints.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the file's name on rank 0 and save."""
        if not (self.already_saved or self.overwrite) and trainer.log_dir is not None:
            stem, suffix = os.path.splitext(self.config_filename)
            name, version = self.config_filename, 0
            while os.path.exists(os.path.join(trainer.log_dir, name)):
                version += 1
                name = f"{stem}-v{version}{suffix}"
            self.config_filename = trainer.strategy.broadcast(name)
        super().setup(trainer, pl_module, stage)


class _SetParserMode(Action):
    """The ``--parser_mode`` option. It takes effect immediately, so it must precede the files. It is not stored."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest=SUPPRESS, default=SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values not in PARSER_MODES:
            parser.error(f"{option_string} must be one of {', '.join(PARSER_MODES)}, got {values!r}.")
        if namespace.get("config"):
            parser.error(f"{option_string} {values} comes after a --config that was read without it; put it first.")
        _set_parser_mode(getattr(parser, "parent_parser", parser), values)


def _set_parser_mode(parser: Any, mode: str) -> None:
    if mode == "omegaconf+":
        # Otherwise ${data.seq_len} would have to be ${fit.data.seq_len}, and fit and validate could not share a file.
        jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    parser.parser_mode = mode


class MemOptCLI(LightningCLI):
    """LightningCLI for this package's optimizers.

    It differs from LightningCLI in four ways. It binds this package's optimizers to the parameter names, whether they
    come from ``--optimizer=lightning_memopt.AdaPM`` or from the module's ``configure_optimizers``. ``--parser_mode``
    selects how files are read. A run never overwrites the config of another run. The error about a missing optimizer
    names the option that adds one.

    Parser modes: ``yaml`` (default) does not resolve interpolations. ``omegaconf`` resolves interpolations such as
    ``${data.init_args.seq_len}`` when a file is read, so an override on the command line changes this key, but not the
    keys that refer to it. ``omegaconf+`` resolves interpolations at the end, so these keys follow the override.

    Args:
        *args: As in LightningCLI.
        parser_mode: The default of ``--parser_mode``.
        **kwargs: As in LightningCLI.

    Raises:
        ValueError: If ``parser_mode`` is unknown.
    """

    def __init__(self, *args: Any, parser_mode: str = "yaml", **kwargs: Any) -> None:
        if parser_mode not in PARSER_MODES:
            raise ValueError(f"`parser_mode` must be one of {', '.join(PARSER_MODES)}, got {parser_mode!r}.")
        self._parser_mode = parser_mode
        kwargs.setdefault("save_config_callback", SaveConfig)
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser that knows ``--parser_mode``."""
        parser = super().init_parser(**kwargs)
        parser.add_argument(
            "--parser_mode",
            action=_SetParserMode,
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
            _set_parser_mode(self.parser, self._parser_mode)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer, with a callback that binds optimizers at the start of fit."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.insert(0, BindNames())  # type: ignore[attr-defined]
        return trainer

    def before_fit(self) -> None:
        """Check that there is an optimizer."""
        if not is_overridden("configure_optimizers", self.model):
            raise MisconfigurationException(
                f"There is no optimizer: {type(self.model).__name__} has no `configure_optimizers` and the command "
                "names none. Add for example --optimizer=lightning_memopt.AdaPMLean --optimizer.lr=1e-3, or an "
                "`optimizer:` section to the config."
            )


class _ModelOnly(MemOptCLI):
    """Read a config as ``fit`` does, and instantiate only the model, on the meta device."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return ``fit`` alone: setting up the parsers of the other commands takes most of the time."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, and do not seed random number generators."""
        super().parse_arguments(parser, args)
        self.config[self.config.subcommand].seed_everything = False

    def instantiate_classes(self) -> None:
        """Instantiate the model."""
        command = str(self.subcommand)
        given = self.config[command]
        self.run = _settings_of(given.trainer)
        part = jsonargparse.Namespace(subcommand=command)
        part[command] = jsonargparse.Namespace(model=given.model, optimizer=given.get("optimizer"))
        try:
            with torch.device("meta"):
                # Optimizers are created later, with parameters, but files in their arguments are read here.
                made = self.parser.instantiate_classes(part)[command]
                self.model, self.optimizer = made.model, made.optimizer
                if is_overridden("configure_model", self.model):
                    self.model.configure_model()
        except Exception as error:
            raise ValueError(
                f"The model {given.model.get('class_path', '')} could not be created on the meta device "
                f"({type(error).__name__}: {error}). If it needs weights, data or the trainer, which are not available "
                "when a run is planned: load or request them in `setup`, not in `__init__` or `configure_model`."
            ) from error
        self.subcommand = None  # run no subcommand


def _configured(args: list[str]) -> Configured:
    """Return the settings of a run, given the arguments of ``lightning-memopt fit``."""
    quiet = {"exit_on_error": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
        cli = _ModelOnly(args=args, parser_kwargs={**quiet, "fit": quiet})
    optimizer = cli.optimizer
    if not optimizer:
        return Configured(cli.model, None, **cli.run)
    module, _, name = optimizer.class_path.rpartition(".")
    cls = getattr(import_module(module), name)
    if not issubclass(cls, MemOpt):
        return Configured(cli.model, None, **cli.run)
    options = optimizer.init_args.as_dict()
    defaults = {key: entry.default for key, entry in inspect.signature(cls).parameters.items()}
    shown = [
        f"{key}={value.get('name', '…') if isinstance(value, dict) else value}"
        for key, value in options.items()
        if key == "recipe" or (key not in RATES and value != defaults.get(key))
    ]
    label = f"config: {name}({', '.join(shown)})" if shown else f"config: {name}"
    return Configured(cli.model, Candidate(label, lambda params: cls(params, **options)), **cli.run)


def _settings_of(trainer: Any) -> dict[str, Any]:
    """Return the fields of :class:`Configured` that the trainer's section of a config sets."""
    devices, nodes, strategy = trainer.devices, trainer.num_nodes, trainer.strategy
    known = str(devices).isdigit() and int(devices) > 0
    found: dict[str, Any] = {"precision": trainer.precision, "ranks": int(devices) * nodes if known else None}
    name = strategy if isinstance(strategy, str) else strategy.get("class_path", "")
    options = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
    sharded = name in ("memopt_fsdp", "auto") or name.endswith(".MemOptFSDPStrategy")
    if not sharded:
        found["warning"] = f"The strategy {name!r} is planned as 'memopt_fsdp', which shards everything over all ranks."
    uncounted = [key for key in ("replicate_size", "tensor_parallel_size") if options.get(key, 1) != 1]
    uncounted += ["cpu_offload"] if options.get("cpu_offload") else []
    if uncounted:
        what = ", ".join(uncounted)
        found["warning"] = f"{what} of the strategy is not planned: everything is sharded over all ranks."
    return {**found, "averaged": _averages(trainer.callbacks), "wrap": resolve_policy("wrap", options.get("wrap"))}


def _averages(callbacks: Any) -> bool:
    """Return whether one of the callbacks in a config averages weights."""
    entries = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    paths = [entry.class_path.rpartition(".") for entry in entries]
    return any(issubclass(getattr(import_module(module), name), AVERAGING) for module, _, name in paths)


def main() -> None:
    """Run the command line. Modules in the working directory can be imported, as with ``python -m``."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    commands = {"plan": plan_command.main, "roles": roles_command.main}
    if sys.argv[1:2] and sys.argv[1] in commands:
        sys.exit(commands[sys.argv[1]](sys.argv[2:], _configured))
    epilog = (
        "lightning-memopt plan shows the memory that a run needs on every rank, and lightning-memopt roles the role of "
        "every weight: see --help of each."
    )
    MemOptCLI(parser_kwargs={"prog": "lightning-memopt", "epilog": epilog})
