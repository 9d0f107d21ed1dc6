"""The command ``lightning-memopt plan``, which shows the memory per rank and the first recipe that fits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_memopt.memory.sizes import format_bytes, parse_bytes
from lightning_memopt.optim.weights import SIZES
from lightning_memopt.planner.arguments import (
    EPILOG,
    Configured,
    add_model_arguments,
    parse,
    read_model,
)
from lightning_memopt.planner.figure import sweep_figure
from lightning_memopt.planner.memory_plan import ADAMW, HOST, MemoryPlan, remaining
from lightning_memopt.planner.planning import Candidate, candidates, plan_module
from lightning_memopt.planner.role_table import RoleTable
from lightning_memopt.planner.roles_command import print_roles
from lightning_memopt.planner.settings import PRECISIONS, RunSettings
from lightning_memopt.plans.recipes import recipe_names
from lightning_memopt.terminal.parser import EXPECTED, Parser
from lightning_memopt.terminal.tables import console, table

MOST_RANKS = 64
# Settings that take less memory: their values and flags.
_SAVING: dict[str, tuple[Any, str]] = {
    "activation_checkpointing": (True, "--activation-checkpointing"),
    "gradient_release": (True, "--gradient-release"),
    "precision": ("bf16-true", "--precision bf16-true"),
    "cpu_offload": (True, "--cpu-offload"),
}
# In the order in which they are tried.
_WAYS = (
    ("activation_checkpointing",),
    ("gradient_release",),
    ("precision",),
    ("precision", "activation_checkpointing"),
    ("precision", "gradient_release"),
    ("precision", "gradient_release", "activation_checkpointing"),
    ("cpu_offload",),
    ("precision", "cpu_offload", "activation_checkpointing"),
)
PICTURES = (".png", ".pdf", ".svg")
# Column headers that keep the table within 80 columns.
_BREAKS = {
    "gradients": "grads",
    "optimizer state": "optimizer\nstate",
    "left for activations": "left for\nactivations",
    HOST: "in CPU\nmemory",
}


def main(args: Sequence[str], configured: Callable[[list[str]], Configured]) -> int:
    """Run the command and return its exit status.

    Args:
        args: The arguments after ``plan`` on the command line.
        configured: Converts arguments of ``lightning-memopt fit`` to the settings of a run.
    """
    parser = _parser()
    options, others = parse(parser, args)
    if options.activation_checkpointing and options.batch is None:
        parser.error("--activation-checkpointing changes activations only: say for which --batch, such as 4x512.")
    if options.plot is not None and not options.sweep:
        parser.error("--plot draws a sweep: add --sweep.")
    if options.plot is not None and Path(options.plot).suffix not in PICTURES:
        parser.error(f"--plot {options.plot}: name a file that ends in one of {', '.join(PICTURES)}.")
    if options.plot is not None and not Path(options.plot).parent.is_dir():
        parser.error(f"--plot {options.plot}: there is no folder {str(Path(options.plot).parent)!r}; create it first.")
    try:
        candidates(options.recipe)  # an unknown recipe is an error before a config is read
        name, found = read_model(options, others, configured)
        settings = _settings(options, found)
        optimizers = candidates(options.recipe, master_weight_bits=settings.master_weight_bits)
        optimizers = [*([found.optimizer(options.master_weight_bits)] if found.optimizer else []), *optimizers]
        asked = _Question(name, found.module, optimizers, options.gpu_memory)
        sizes = _world_sizes(options.world_size, settings) if options.sweep else [settings.world_size]
        plans = [asked.plan(replace(settings, world_size=size)) for size in sizes]
        plot = _write_figure(options, plans) if options.sweep else None
        roles = RoleTable.of(name, found.module) if options.roles else None
        way_out = None if plot else _way_out(plans[0], asked, settings)
    except EXPECTED as error:
        parser.error(" ".join(str(error).split()))
    _warn(plans[0], found.warning)
    if options.json:
        shown: Any = {"plans": [plan.to_dict() for plan in plans], "plot": plot} if plot else plans[0].to_dict()
        print(json.dumps({**shown, **({"roles": roles.to_dict()} if roles else {})}, indent=2))
        return 0
    if plot:
        _print_sweep(plans, plot)
    else:
        _print(plans[0], [entry.label for entry in optimizers] if options.recipe else [], way_out)
    if roles:
        print()
        print_roles(roles)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="lightning-memopt plan",
        allow_abbrev=False,
        description=(
            "Show the peak memory per rank with AdamW and with recipes, without running or allocating anything: "
            "parameters, gradients, optimizer state, gathered units and the scratch of a step."
        ),
        epilog=EPILOG,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--recipe",
        action="extend",
        nargs="+",
        metavar="NAME|PATH",
        help=f"{', '.join(recipe_names())}; or recipe files. Several are compared; default: all.",
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="Number of ranks (default: the devices of the config, or 1)."
    )
    parser.add_argument(
        "--gpu-memory",
        type=_size,
        metavar="SIZE",
        help="Memory of one device: 24GiB, or 24G, which is the same; 24GB is 24 x 10^9 bytes.",
    )
    parser.add_argument(
        "--precision",
        metavar="{" + ",".join(PRECISIONS) + "}",
        help="As in the Trainer (default: that of the config, or 32-true).",
    )
    parser.add_argument(
        "--gradient-release",
        action=argparse.BooleanOptionalAction,
        help="Recipes release gradients in the backward pass, as MemOptFSDPStrategy(gradient_release=True) does.",
    )
    parser.add_argument(
        "--master-weight-bits",
        type=int,
        choices=SIZES,
        help="Bits that recipes keep of every bfloat16 weight (default: those of the config, or 16).",
    )
    parser.add_argument("--replicate-size", type=int, metavar="N", help="Number of replicas, as in MemOptFSDPStrategy.")
    parser.add_argument(
        "--cpu-offload",
        action=argparse.BooleanOptionalAction,
        help="Parameters, gradients and state are in CPU memory, as with MemOptFSDPStrategy(cpu_offload=True).",
    )
    parser.add_argument(
        "--batch",
        type=_batch,
        metavar="NxLENGTH",
        help="Sequences and tokens per sequence on a rank, such as 4x512: plan activations, too.",
    )
    parser.add_argument(
        "--activation-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="The activations of blocks are recomputed, as with MemOptFSDPStrategy(activation_checkpointing=True).",
    )
    parser.add_argument(
        "--roles", action="store_true", help="Also show the role of every weight, as `lightning-memopt roles` does."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON, sizes in bytes.")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help=f"Plan for 1, 2, 4 ... ranks, up to --world-size (default: {MOST_RANKS}), and plot it.",
    )
    parser.add_argument("--plot", metavar="PATH", help="Where to write the picture (default: plan-<model>.png).")
    return parser


def _batch(text: str) -> tuple[int, int]:
    count, _, length = text.lower().partition("x")
    if not (count.isdecimal() and length.isdecimal() and int(count) and int(length)):
        raise argparse.ArgumentTypeError(f"two numbers with an x between them, such as 4x512, are needed, got {text!r}")
    return int(count), int(length)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _settings(options: argparse.Namespace, found: Configured) -> RunSettings:
    """Return the settings of the config, changed by the options that were given."""
    names = ("world_size", "precision", "gradient_release", "master_weight_bits", "replicate_size", "cpu_offload")
    given = {name: getattr(options, name) for name in (*names, "batch", "activation_checkpointing")}
    merged = {**found.settings, **{name: value for name, value in given.items() if value is not None}}
    merged.setdefault("world_size", merged.get("replicate_size", 1))
    return RunSettings(**merged)


def _world_sizes(most: int | None, settings: RunSettings) -> list[int]:
    """Return the numbers of ranks of a sweep: powers of two, of those that the replicas divide, and the last one."""
    most = max(settings.world_size, MOST_RANKS) if most is None else most
    sizes = {*(1 << power for power in range(most.bit_length())), most}
    return sorted(size for size in sizes if size % settings.replicate_size == 0)


@dataclass(frozen=True)
class _Question:
    """What is asked: the name of a model, the model, the optimizers, and the memory of a device."""

    name: str
    module: nn.Module
    optimizers: list[Candidate]
    gpu_memory: int | None

    def plan(self, settings: RunSettings) -> MemoryPlan:
        return plan_module(self.module, self.optimizers, settings, name=self.name, gpu_memory=self.gpu_memory)


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


def _table(columns: Sequence[str]) -> Any:
    return table(columns, numbers=columns[1:], breaks=_BREAKS)


def _label(label: str) -> Any:
    """Return the label of a row, short enough for a table of 80 columns."""
    from rich.text import Text

    return Text("torch AdamW" if label == ADAMW else label)


def _print(plan: MemoryPlan, asked: list[str], way_out: str | None) -> None:
    shown, limited = console(), plan.gpu_memory is not None  # its error names the extra

    from rich.text import Text

    shown.print(f"{plan.title()}\n{plan.shared()}", markup=False, soft_wrap=True)
    found = _table(plan.columns())
    fits, not_fits = ("✓", "✗") if shown.encoding.startswith("utf") else ("fits", "does not fit")
    for row, cells in zip(plan.rows, plan.cells(), strict=True):
        shown_cells = [*map(Text, cells[1:])]
        if limited:
            where = plan.columns().index(plan.left)
            text = f"{cells[where]} {fits if row.fits else not_fits}"
            shown_cells[where - 1] = Text(text, "green" if row.fits else "red")
        found.add_row(_label(cells[0]), *shown_cells)
    shown.print(found)
    lines = [plan.note()]
    if limited:
        lines += [*(_verdict(plan, recipe) for recipe in asked), _answer(plan, way_out)]
    for line in filter(None, lines):
        shown.print(line, markup=False, soft_wrap=True)


def _verdict(plan: MemoryPlan, recipe: str) -> str:
    row = plan.row(recipe)
    assert plan.gpu_memory is not None
    assert row.remaining is not None
    memory = format_bytes(plan.gpu_memory)
    if row.fits:
        return f"{recipe} fits in {memory}: {_left(plan, recipe)}."
    return f"{recipe} does not fit in {memory}: it needs {format_bytes(row.total_bytes)}{_before(plan)}."


def _left(plan: MemoryPlan, recipe: str) -> str:
    row = plan.row(recipe)
    assert row.remaining is not None
    host = f", {format_bytes(row.host_bytes)} in CPU memory" if plan.cpu_offload else ""
    return f"{remaining(row.remaining)} left{' for activations' if plan.batch is None else ''}{host}"


def _before(plan: MemoryPlan) -> str:
    return " before activations" if plan.batch is None else ""


def _way_out(plan: MemoryPlan, asked: _Question, settings: RunSettings) -> str | None:
    """Return the first settings with which a recipe fits, if none does with those asked for."""
    if plan.gpu_memory is None or plan.first_fit is not None:
        return None
    least = plan.smallest.recipe
    smallest = [entry for entry in asked.optimizers if entry.label == least]
    tried: list[dict[str, Any]] = [{}]
    for way in _WAYS:
        names = [name for name in way if settings.batch is not None or name != "activation_checkpointing"]
        changes = {name: _SAVING[name][0] for name in names if getattr(settings, name) != _SAVING[name][0]}
        if changes in tried or ("gradient_release" in changes and settings.replicate_size > 1):
            continue
        tried.append(changes)
        wanted = replace(settings, **changes)
        # Most often nothing fits, which the smallest says.
        if replace(asked, optimizers=smallest).plan(wanted).first_fit is None:
            continue
        other = asked.plan(wanted)
        assert other.first_fit is not None
        flags = " ".join(_SAVING[name][1] for name in changes)
        return f"With {flags}, {other.first_fit} fits: {_left(other, other.first_fit)}."
    return None


def _answer(plan: MemoryPlan, way_out: str | None) -> str:
    assert plan.gpu_memory is not None
    memory = format_bytes(plan.gpu_memory)
    if plan.first_fit is not None:
        return f"First that fits in {memory}, keeping the most state: {plan.first_fit} ({_left(plan, plan.first_fit)})."
    smallest = plan.smallest
    needs = f"{format_bytes(smallest.total_bytes)}{_before(plan)}."
    advice = way_out or "Use more ranks (--world-size) or devices with more memory."
    return f"Nothing fits in {memory}: the smallest, {smallest.recipe}, needs {needs} {advice}"


def _gib(size: int) -> str:
    """Return a size in GiB with three significant digits, or as an integer from 100 GiB."""
    number = size / (1 << 30)
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def _print_sweep(plans: list[MemoryPlan], plot: str) -> None:
    shown = console()  # its error names the extra

    from rich.text import Text

    first, limited = plans[0], plans[0].gpu_memory is not None
    title = (
        f"{first.model}: {first.parameters:,} parameters, {', '.join(first.settings())}, GiB per rank{_before(first)}"
    )
    columns = ["recipe", *(f"{plan.world_size} rank{'s' * (plan.world_size > 1)}" for plan in plans)]
    shown.print(title, markup=False, soft_wrap=True)
    found = _table([*columns, "fits from"] if limited else columns)
    for position in range(len(first.rows)):
        rows = [plan.rows[position] for plan in plans]
        colours = {None: "", True: "green", False: "red"}
        cells = [
            _label(first.cells()[position][0]),
            *(Text(_gib(row.total_bytes), colours[row.fits]) for row in rows),
        ]
        if limited:
            enough = [plan.world_size for plan, row in zip(plans, rows, strict=True) if row.fits]
            cells.append(Text(str(enough[0]) if enough else "none"))
        found.add_row(*cells)
    shown.print(found)
    for line in filter(None, (first.note(), f"Plot: {plot}")):
        shown.print(line, markup=False, soft_wrap=True)
