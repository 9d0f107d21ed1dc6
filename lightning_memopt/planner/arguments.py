"""Arguments that the commands on a model share: which model, and how its config is read."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lightning_memopt.planner.architectures import find_model
from lightning_memopt.planner.planning import Candidate
from lightning_memopt.planner.skeletons import model_names
from lightning_memopt.terminal.parser import Parser

EPILOG = (
    "With --config, further arguments are those of `lightning-memopt fit`, such as --model.init_args.hidden_size=512."
)


@dataclass(frozen=True)
class Configured:
    """The settings of a run's config that determine its memory.

    Attributes:
        module: The LightningModule, on the meta device.
        optimizer: Returns the optimizer, with another number of ``master_weight_bits`` if one is given; None if it is
            not of this package.
        settings: Those that the config decides, by their names in :class:`RunSettings`.
        warning: A warning about strategy settings that are not planned; empty if there are none.
    """

    module: nn.Module
    optimizer: Callable[[int | None], Candidate] | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    warning: str = ""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--config`` and ``--parser_mode``."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model",
        metavar="NAME|PATH",
        help=f"{', '.join(model_names())}; or a transformers config file, or the folder that holds config.json.",
    )
    model.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="A config of `lightning-memopt fit`. Its model is created on the meta device. Several configs are merged.",
    )
    parser.add_argument(
        "--parser_mode", metavar="MODE", help="How config files are read, as in `lightning-memopt --parser_mode`."
    )


def parse(parser: Parser, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the arguments that are left for the run of a config."""
    options, others = parser.parse_known_args(args)
    if others and not options.config:
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(others[0].partition("=")[0], known, n=1, cutoff=0.75)
        hint = f"Did you mean {close[0]}?" if close else "Settings of a run need --config."
        parser.error(f"unrecognized arguments: {' '.join(others)}. {hint}")
    return options, others


def read_model(
    options: argparse.Namespace, others: list[str], configured: Callable[[list[str]], Configured]
) -> tuple[str, Configured]:
    """Return the model's name, and the settings of the run."""
    # A module may print while it is created, but scripts read the output.
    with redirect_stdout(sys.stderr):
        if not options.config:
            name, module = find_model(options.model)
            return name, Configured(module, None)
        for path in options.config:
            if _is_model_config(path):
                raise ValueError(f"{path!r} is a transformers model configuration: give it with --model.")
        mode = [f"--parser_mode={options.parser_mode}"] if options.parser_mode else []
        files = [f"--config={path}" for path in options.config]
        found = configured([*mode, "fit", *files, *others])
    return type(found.module).__name__, found


def _is_model_config(path: str) -> bool:
    """Return whether a file is a model's ``config.json`` and no config of a run."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "model_type" in found
