"""The command line: Lightning's commands with this package's optimizers, and commands of its own.

``lightning-memopt`` and ``python -m lightning_memopt`` are the same. :mod:`lightning_memopt.cli.program` lists the
commands.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_memopt.cli.memopt_cli import MemOptCLI
    from lightning_memopt.cli.save_config import SaveConfig

# These need Lightning and its parser, which commands such as `plan` and `doctor` do without.
_LAZY = {"MemOptCLI": "memopt_cli", "SaveConfig": "save_config"}

__all__ = ["MemOptCLI", "SaveConfig", "main"]


if not TYPE_CHECKING:  # otherwise every misspelt name would be Any

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            import omegaconf  # noqa: F401  the parser modes need it, and would fail only while reading a file

            return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
        except ImportError as error:
            raise ImportError(
                f"The command line of lightning_memopt could not be imported ({error}). Its requirements are an extra: "
                'pip install "lightning-memopt[cli]"'
            ) from error


def main() -> None:
    """Run the command line with the arguments of the process."""
    from lightning_memopt.cli.program import run

    run()
