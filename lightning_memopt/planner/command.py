"""The command ``lightning-memopt plan``, which shows the memory per rank and the first recipe that fits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from lightning_memopt.memory.sizes import format_bytes, parse_bytes
from lightning_memopt.planner.architectures import find_model
from lightning_memopt.planner.figure import sweep_figure
from lightning_memopt.planner.memory_plan import COLUMNS, MemoryPlan, remaining
from lightning_memopt.planner.planning import PRECISIONS, Candidate, candidates, plan_module
from lightning_memopt.planner.skeletons import model_names
from lightning_memopt.plans.recipes import recipe_names
from lightning_memopt.sharding.wrapping import Policy

MOST_RANKS = 64
PICTURES = (".png", ".pdf", ".svg")
# Column headers with line breaks, which keep the table narrower than 100 characters.
_BREAKS = {"optimizer state": "optimizer\nstate", "largest block, unsharded": "largest\nblock,\nunsharded"}
_BREAKS |= {"left for activations": "left for\nactivations"}
_EXPECTED = (ValueError, TypeError, OSError, ImportError, NotImplementedError, argparse.ArgumentError)


@dataclass(frozen=True)
class Configured:
    """The settings of a run's config that determine its memory.

    Attributes:
        module: The LightningModule, on the meta device.
        optimizer: The optimizer, if it is one of this package.
        precision: The trainer's precision.
        ranks: The trainer's number of devices, if the config gives a number.
        wrap: The modules that the strategy gathers as units.
        warning: A warning about strategy settings that are not planned; empty if there are none.
    """

    module: nn.Module
    optimizer: Candidate | None
    precision: str | int | None = None
    ranks: int | None = None
    wrap: Policy | None = None
    warning: str = ""


class _Parser(argparse.ArgumentParser):
    """An argument parser that prints errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(args: Sequence[str], configured: Callable[[list[str]], Configured]) -> int:
    """Run the command and return its exit status.

    Args:
        args: The arguments after ``plan`` on the command line.
        configured: Converts arguments of ``lightning-memopt fit`` to the settings of a run.
    """
    parser = _parser()
    options, others = parser.parse_known_args(args)
    if others and not options.config:
        parser.error(f"unrecognized arguments: {' '.join(others)}. Settings of a run need --config.")
    if options.plot is not None and not options.sweep:
        parser.error("--plot draws a sweep: add --sweep.")
    if options.plot is not None and Path(options.plot).suffix not in PICTURES:
        parser.error(f"--plot {options.plot}: name a file that ends in one of {', '.join(PICTURES)}.")
    if options.plot is not None and not Path(options.plot).parent.is_dir():
        parser.error(f"--plot {options.plot}: there is no folder {str(Path(options.plot).parent)!r}; create it first.")
    try:
        # A module may print while it is created, but scripts read the output.
        with redirect_stdout(sys.stderr):
            name, found, optimizers = _read_options(options, others, configured)
        options.precision = options.precision or found.precision
        if options.world_size is None:
            options.world_size = found.ranks or 1
        plans = [_plan(options, name, found, optimizers, size) for size in _world_sizes(options)]
        plot = _write_figure(options, plans) if options.sweep else None
    except _EXPECTED as error:
        parser.error(" ".join(str(error).split()))
    _warn(plans[0], found.warning)
    if options.json:
        shown: Any = {"plans": [plan.to_dict() for plan in plans], "plot": plot} if plot else plans[0].to_dict()
        print(json.dumps(shown, indent=2))
    elif plot:
        _print_sweep(plans, plot)
    else:
        _print(plans[0], asked=[entry.label for entry in optimizers] if options.recipe else [])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lightning-memopt plan",
        allow_abbrev=False,
        description=(
            "Show the memory per rank of parameters, gradients and optimizer state, with AdamW and with recipes, "
            "without running or allocating anything."
        ),
        epilog="With --config, further arguments are those of `lightning-memopt fit`, such as "
        "--model.init_args.hidden_size=512.",
    )
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
        "--recipe",
        action="append",
        metavar="NAME|PATH",
        help=f"{', '.join(recipe_names())}; or a recipe file. Several are compared; default: all.",
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="Number of ranks (default: the devices of the config, or 1)."
    )
    parser.add_argument("--gpu-memory", type=_size, metavar="SIZE", help="Memory of one device, for example 24GiB.")
    parser.add_argument(
        "--precision",
        metavar="{" + ",".join(PRECISIONS) + "}",
        help="As in the Trainer (default: that of the config, or 32-true).",
    )
    parser.add_argument(
        "--parser_mode", metavar="MODE", help="How config files are read, as in `lightning-memopt --parser_mode`."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON, sizes in bytes.")
    parser.add_argument(
        "--sweep", action="store_true", help=f"Plan for 1, 2, 4 ... {MOST_RANKS} ranks, or --world-size, and plot it."
    )
    parser.add_argument("--plot", metavar="PATH", help="Where to write the picture (default: plan-<model>.png).")
    return parser


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _read_options(
    options: argparse.Namespace, others: list[str], configured: Callable[[list[str]], Configured]
) -> tuple[str, Configured, list[Candidate]]:
    """Return the model's name, the settings of the run, and the optimizers to compare."""
    optimizers = candidates(options.recipe)
    if not options.config:
        name, module = find_model(options.model)
        return name, Configured(module, None), optimizers
    mode = [f"--parser_mode={options.parser_mode}"] if options.parser_mode else []
    files = [f"--config={path}" for path in options.config]
    found = configured([*mode, "fit", *files, *others])
    own = [found.optimizer] if found.optimizer is not None else []
    return type(found.module).__name__, found, [*own, *optimizers]


def _world_sizes(options: argparse.Namespace) -> list[int]:
    if not options.sweep:
        return [options.world_size]
    most = max(options.world_size, MOST_RANKS)
    return sorted({*(1 << power for power in range(most.bit_length())), options.world_size})


def _plan(
    options: argparse.Namespace, name: str, found: Configured, optimizers: list[Candidate], world_size: int
) -> MemoryPlan:
    return plan_module(
        found.module,
        optimizers,
        name=name,
        world_size=world_size,
        gpu_memory=options.gpu_memory,
        precision=options.precision,
        wrap=found.wrap,
    )


def _write_figure(options: argparse.Namespace, plans: list[MemoryPlan]) -> str:
    path = options.plot or f"plan-{plans[0].model}.png"
    sweep_figure(plans).savefig(path, dpi=150)
    return path


def _warn(plan: MemoryPlan, warning: str) -> None:
    if warning:
        print(f"Warning: {warning}", file=sys.stderr)
    if plan.unknown:
        first = ", ".join(plan.unknown[:3]) + (", …" if len(plan.unknown) > 3 else "")
        print(
            f"Warning: {len(plan.unknown)} of {plan.matrices} matrices have no known role and count as 'other' "
            f"({first}): define their roles with lightning_memopt.register_naming_scheme.",
            file=sys.stderr,
        )


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def _table(console: Any, title: str, columns: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    gap = 1 if console.width >= 100 else 0
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, gap, 0, 0))
    for position, column in enumerate(columns):
        # A narrow terminal folds text, names of recipes first, and truncates nothing.
        justify: Any = "right" if position else "left"
        table.add_column(_BREAKS.get(column, column), justify=justify, overflow="fold")
    return table


def _print(plan: MemoryPlan, asked: list[str]) -> None:
    from rich.text import Text

    console, limited = _console(), plan.gpu_memory is not None
    table = _table(console, plan.title(), COLUMNS if limited else COLUMNS[:-1])
    fits, not_fits = ("✓", "✗") if console.encoding.startswith("utf") else ("fits", "does not fit")
    for row, cells in zip(plan.rows, plan.cells(), strict=True):
        mark = Text(f"{cells[-1]} {fits}", "green") if row.fits else Text(f"{cells[-1]} {not_fits}", "red")
        left = [mark] if limited else []
        table.add_row(*map(Text, cells[:-1]), *left)
    console.print(table)
    lines = [plan.note()]
    if limited:
        lines += [*(_verdict(plan, recipe) for recipe in asked), _answer(plan)]
    for line in filter(None, lines):
        console.print(line, markup=False, soft_wrap=True)


def _verdict(plan: MemoryPlan, recipe: str) -> str:
    row = plan.row(recipe)
    assert plan.gpu_memory is not None
    assert row.remaining is not None
    memory = format_bytes(plan.gpu_memory)
    if row.fits:
        return f"{recipe} fits in {memory}: {format_bytes(row.remaining)} left for activations."
    return f"{recipe} does not fit in {memory}: it needs {format_bytes(row.total_bytes)} before activations."


def _answer(plan: MemoryPlan) -> str:
    assert plan.gpu_memory is not None
    memory = format_bytes(plan.gpu_memory)
    if plan.first_fit is not None:
        left = plan.row(plan.first_fit).remaining
        assert left is not None
        return (
            f"First that fits in {memory}, keeping the most state: {plan.first_fit} ({remaining(left)} left for "
            "activations)."
        )
    smallest = min(plan.rows, key=lambda row: row.total_bytes)
    half = "" if plan.precision == "bf16-true" else ", bfloat16 parameters (--precision bf16-true)"
    return (
        f"Nothing fits in {memory}: the smallest, {smallest.recipe}, needs {format_bytes(smallest.total_bytes)} before "
        f"activations. Use more ranks (--world-size){half} or devices with more memory."
    )


def _gib(size: int) -> str:
    """Return a size in GiB with three significant digits, or as an integer from 100 GiB."""
    number = size / (1 << 30)
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def _print_sweep(plans: list[MemoryPlan], plot: str) -> None:
    from rich.text import Text

    first, limited = plans[0], plans[0].gpu_memory is not None
    title = f"{first.model}: {first.parameters:,} parameters, {first.precision}, GiB per rank before activations"
    columns = ["recipe", *(f"{plan.world_size} rank{'s' * (plan.world_size > 1)}" for plan in plans)]
    console = _console()
    table = _table(console, title, [*columns, "fits from"] if limited else columns)
    for position in range(len(first.rows)):
        rows = [plan.rows[position] for plan in plans]
        colours = {None: "", True: "green", False: "red"}
        cells = [Text(first.cells()[position][0]), *(Text(_gib(row.total_bytes), colours[row.fits]) for row in rows)]
        if limited:
            enough = [plan.world_size for plan, row in zip(plans, rows, strict=True) if row.fits]
            cells.append(Text(str(enough[0]) if enough else "none"))
        table.add_row(*cells)
    console.print(table)
    for line in filter(None, (first.note(), f"Plot: {plot}")):
        console.print(line, markup=False, soft_wrap=True)
