"""The command ``lightning-memopt doctor``, which shows what works on this machine."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from lightning_memopt.cli.environment import Environment, examine
from lightning_memopt.terminal.parser import Parser

WIDTH = 80


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status: 1 if something that is installed does not work.

    Args:
        args: The arguments after ``doctor`` on the command line.
    """
    options = _parser().parse_args(args)
    found = examine()
    if options.json:
        print(json.dumps({**asdict(found), "to_install": found.to_install}, indent=2))
    else:
        print("\n".join(_lines(found)))
    return int(any(check.state == "fails" for check in found.checks))


def _parser() -> Parser:
    parser = Parser(
        prog="lightning-memopt doctor",
        allow_abbrev=False,
        description="Show which packages and devices are here, and try what works with them. Nothing is written.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    return parser


def _lines(found: Environment) -> list[str]:
    """Return the report. It uses the standard library alone, because packages may be missing."""
    lines = [f"lightning-memopt {found.version}, {found.system}", ""]
    for entry in found.packages:
        state = f"{entry.version or ''} {entry.problem}".strip()
        lines += _row(entry.name, state, f"for {entry.needed_by}", (14, 24))
    lines.append("")
    for extra in found.extras:
        state = "is incomplete" if extra.missing else "is complete"
        lacks = f" (lacks {', '.join(extra.missing)})" if extra.missing else ""
        lines += _row(f"[{extra.name}]", state, f"for {extra.enables}{lacks}", (14, 24))
    lines += ["", *_row("CUDA devices", "; ".join(found.devices) or "none", "", (14, 24))]
    lines += [*_row("backends", ", ".join(found.backends) or "none", "", (14, 24)), ""]
    for check in found.checks:
        lines += _row(check.state, check.name, check.detail, (10, 30))
    lines += ["", f"pip install {' '.join(found.to_install)}" if found.to_install else "Nothing needs to be installed."]
    return lines


def _row(first: str, second: str, third: str, widths: tuple[int, int]) -> list[str]:
    """Return a row, of which the last column is folded."""
    start = f"{first:<{widths[0]}}{second:<{widths[1]}}"
    if len(start) > sum(widths):
        start += "  "
    indent = " " * sum(widths)
    folded = textwrap.wrap(f"{start}{third}", WIDTH, subsequent_indent=indent, break_on_hyphens=False)
    return folded or [start.rstrip()]
