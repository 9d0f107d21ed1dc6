"""The program: choose the command, and end as shells expect."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from lightning_memopt._registry import unknown
from lightning_memopt._version import __version__
from lightning_memopt.cli.commands import COMMANDS
from lightning_memopt.planner.arguments import Configured

# The status of a program whose reader has gone, as in `| head`: 128 + SIGPIPE.
READER_GONE = 141
# That of a program that Ctrl-C has ended: 128 + SIGINT.
INTERRUPTED = 130

HELP = """\
usage: lightning-memopt COMMAND ...
       lightning-memopt COMMAND --help

Train with optimizers that compress their state, and plan the memory of a run.

commands:
{commands}

options:
  -h, --help           Show this and exit.
  --version            Show the versions of this package, PyTorch and Lightning.
  --parser_mode MODE   How fit, validate, test and predict read their configs:
                       yaml, or omegaconf or omegaconf+ for interpolations.
                       It comes before the command.

example:
  lightning-memopt fit --config config.yaml --optimizer.lr=1e-3
"""


def run() -> None:
    """Run the command line with the arguments of the process, and exit."""
    try:
        try:
            status = _run(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Otherwise the interpreter fails again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = READER_GONE
    except KeyboardInterrupt:
        status = INTERRUPTED
    except SystemExit as end:
        # Tables handle the error themselves, and end with status 1.
        if isinstance(end.__context__, BrokenPipeError):
            end.code = READER_GONE
        raise
    sys.exit(status)


def _run(args: list[str]) -> int:
    first = args[0] if args else "--help"
    name = next((arg for arg in args if arg in COMMANDS), None)
    before = args[: args.index(name)] if name is not None else args or [first]
    if {"-h", "--help"} & set(before):
        width = max(map(len, COMMANDS)) + 3
        rows = [f"  {name:<{width}}{command.does}" for name, command in COMMANDS.items()]
        print(HELP.format(commands="\n".join(rows)), end="", file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if first == "--version":
        print(_versions())
        return 0
    if not first.startswith("-") and first not in COMMANDS:
        return _refuse(unknown("command", first, list(COMMANDS)))
    if before and name is not None and COMMANDS[name].module is not None:
        return _refuse(f"{first} comes before `{name}`: put the command first, as in lightning-memopt {name} {first}.")
    command = COMMANDS.get(first)
    if command is None or command.module is None:
        return _run_lightning()
    try:
        main: Callable[..., int] = import_module(command.module).main
        return main(args[1:], _configured) if command.reads_configs else main(args[1:])
    except ImportError as error:
        return _refuse(str(error))


def _refuse(text: str) -> int:
    print(f"lightning-memopt: error: {text}", file=sys.stderr)
    return 2


def _run_lightning() -> int:
    """Run Lightning's commands. Modules in the working directory can be imported, as with ``python -m``."""
    try:
        from lightning_memopt.cli import MemOptCLI
    except ImportError as error:
        return _refuse(str(error))
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from lightning_memopt.cli.failures import describe, whole_traceback

    # Lightning's use of torch, which its users cannot change.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    _search_working_directory()
    try:
        MemOptCLI(parser_kwargs={"prog": "lightning-memopt"})
    except Exception as error:
        if isinstance(error, BrokenPipeError) or whole_traceback():
            raise
        # Written at once, because other ranks write, too.
        sys.stderr.write(describe("lightning-memopt", error, getattr(rank_zero_only, "rank", 0)))
        return 1
    return 0


def _configured(args: list[str]) -> Configured:
    from lightning_memopt.cli import MemOptCLI  # noqa: F401  its error names the extra
    from lightning_memopt.cli.configured import configured

    _search_working_directory()
    return configured(args)


def _search_working_directory() -> None:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())


def _versions() -> str:
    found = [f"lightning-memopt {__version__}"]
    for name in ("torch", "lightning"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
    return "\n".join([*found, f"Python {sys.version.split()[0]}"])
