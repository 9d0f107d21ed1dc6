"""The command ``lightning-memopt roles``, which shows the role of every weight and what decided it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from lightning_memopt.memory.sizes import format_share
from lightning_memopt.planner.arguments import (
    EPILOG,
    Configured,
    add_model_arguments,
    parse,
    read_model,
)
from lightning_memopt.planner.role_table import RoleRow, RoleTable
from lightning_memopt.terminal.parser import EXPECTED, Parser
from lightning_memopt.terminal.tables import console, table

# From this width on, a row fits one line.
WIDE = 100
COLUMNS = ("weights", "role", "decided by", "shape", "part", "head size", "parameters")


def main(args: Sequence[str], configured: Callable[[list[str]], Configured]) -> int:
    """Run the command and return its exit status.

    Args:
        args: The arguments after ``roles`` on the command line.
        configured: Converts arguments of ``lightning-memopt fit`` to the settings of a run.
    """
    parser = Parser(
        prog="lightning-memopt roles",
        allow_abbrev=False,
        description="Show the role of every weight that trains, and what decided it, without running anything.",
        epilog=EPILOG,
    )
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options, others = parse(parser, args)
    try:
        name, found = read_model(options, others, configured)
        roles = RoleTable.of(name, found.module)
    except EXPECTED as error:
        parser.error(" ".join(str(error).split()))
    if options.json:
        print(json.dumps(roles.to_dict(), indent=2))
    else:
        print_roles(roles)
    return 0


def _cells(row: RoleRow) -> tuple[str, ...]:
    times = f" ({row.count})" if row.count > 1 else ""
    shape = "×".join(map(str, row.shape)) or "1"
    head = "" if row.head_dim is None else str(row.head_dim)
    return row.name + times, row.role, row.why, shape, row.split, head, f"{row.parameters:,}"


def _two_lines_each(roles: RoleTable) -> list[str]:
    """Return the rows with each name in a line of its own, because names take half of a narrow terminal."""
    rows = [("weights", "role", "decided by", "shape", "part", "head", "parameters"), *map(_cells, roles.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, role, why, shape, part, head, size in rows:
        facts = " ".join(map(str.ljust, (role, shape, part), (widths[1], *widths[3:5])))
        lines += [f"{name}: {why}", f"  {facts} {head:>{widths[5]}} {size:>{widths[6]}}"]
    return lines


def print_roles(roles: RoleTable) -> None:
    """Print the table, and the share of all parameters that every role has."""
    shown = console()  # its error names the extra

    from rich.text import Text

    total = sum(row.parameters for row in roles.rows)
    shown.print(f"{roles.model}: {total:,} parameters that train", markup=False, soft_wrap=True)
    if shown.width < WIDE:
        shown.print("\n".join(_two_lines_each(roles)), markup=False, soft_wrap=True)
    else:
        found = table(COLUMNS, numbers=COLUMNS[-2:])
        for row in roles.rows:
            found.add_row(*map(Text, _cells(row)))
        shown.print(found)
    shares = ", ".join(f"{role} {format_share(share)}" for role, share in roles.shares().items())
    shown.print(f"Shares: {shares}.", markup=False, soft_wrap=True)
