"""The settings of a run that determine its memory, read from its config without running it."""

from __future__ import annotations

import inspect
import warnings
from importlib import import_module
from typing import Any

import jsonargparse
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_memopt.cli.failures import cause_of
from lightning_memopt.cli.memopt_cli import MemOptCLI
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.planner.arguments import Configured
from lightning_memopt.planner.planning import Candidate
from lightning_memopt.sharding.wrapping import resolve_policy
from lightning_memopt.strategy.averaging import AVERAGING

# The registered names of the strategy, with their options.
NAMES: dict[str, dict[str, Any]] = {"memopt_fsdp": {}, "memopt_fsdp_offload": {"cpu_offload": True}}
# Arguments of optimizers that do not affect the size of their state.
RATES = (
    "lr", "betas", "eps", "weight_decay", "maximize", "max_update", "fused", "nonfinite", "seed",
    "bf16_stochastic_round", "clip_update",
)  # fmt: skip


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
        except Exception as wrapped:
            error = cause_of(wrapped)
            raise ValueError(
                f"The model {given.model.get('class_path', '')} could not be created on the meta device "
                f"({type(error).__name__}: {error}). If it needs weights, data or the trainer, which are not available "
                "when a run is planned: load or request them in `setup`, not in `__init__` or `configure_model`."
            ) from error
        self.subcommand = None  # run no subcommand


def configured(args: list[str]) -> Configured:
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
    cli.run["settings"]["master_weight_bits"] = options.get("master_weight_bits", 16)

    def candidate(bits: int | None) -> Candidate:
        changed = options if bits is None else {**options, "master_weight_bits": bits}
        return Candidate(_label(cls, changed), lambda params: cls(params, **changed))

    return Configured(cli.model, candidate, **cli.run)


def _label(cls: type[MemOpt], options: dict[str, Any]) -> str:
    """Return the class of an optimizer with the options that decide its state."""
    defaults = {
        key: entry.default for each in (MemOpt, cls) for key, entry in inspect.signature(each).parameters.items()
    }
    shown = [
        f"{key}={value.get('name', '…') if isinstance(value, dict) else value}"
        for key, value in options.items()
        if key == "recipe" or (key not in RATES and value != defaults.get(key))
    ]
    name = cls.__name__
    return f"config: {name}({', '.join(shown)})" if shown else f"config: {name}"


def _settings_of(trainer: Any) -> dict[str, Any]:
    """Return the fields of :class:`Configured` that the trainer's section of a config sets."""
    devices, nodes, strategy = trainer.devices, trainer.num_nodes, trainer.strategy
    name = strategy if isinstance(strategy, str) else strategy.get("class_path", "")
    options = NAMES.get(name, {}) if isinstance(strategy, str) else strategy.get("init_args") or {}
    fsdp = name in NAMES or name.endswith(".MemOptFSDPStrategy")
    reshard = options.get("reshard_after_forward")
    accumulates = (trainer.accumulate_grad_batches or 1) > 1
    found: dict[str, Any] = {
        "precision": trainer.precision,
        "fsdp": fsdp,
        "averaged": _averages(trainer.callbacks),
        "wrap": resolve_policy("wrap", options.get("wrap")),
        "gradient_release": bool(options.get("gradient_release")),
        "activation_checkpointing": options.get("activation_checkpointing") is True,
        "cpu_offload": bool(options.get("cpu_offload")),
        "replicate_size": options.get("replicate_size", 1),
        "reshard_after_forward": True if reshard is None else reshard,
        "unreduced": accumulates and options.get("sync_every_batch") is False,
    }
    size = options.get("data_parallel_size")
    if str(devices).isdigit() and int(devices) > 0:
        found["world_size"] = int(devices) * nodes
    elif isinstance(size, int) and options.get("tensor_parallel_size", 1) == 1:
        found["world_size"] = size
    warning = ""
    if not fsdp and name != "auto":
        warning = f"The strategy {name!r} is planned as 'memopt_fsdp', which shards everything over all ranks."
    if options.get("tensor_parallel_size", 1) != 1:
        warning = "tensor_parallel_size of the strategy is not planned: everything is sharded over all ranks."
    return {"settings": found, "warning": warning}


def _averages(callbacks: Any) -> bool:
    """Return whether one of the callbacks in a config averages weights."""
    entries = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    paths = [entry.class_path.rpartition(".") for entry in entries]
    return any(issubclass(getattr(import_module(module), name), AVERAGING) for module, _, name in paths)
