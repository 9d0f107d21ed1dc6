"""The parser of a run, with errors of one line."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_memopt.cli.failures import whole_traceback
from lightning_memopt.cli.messages import explain


class RunParser(LightningArgumentParser):
    """Lightning's parser. It says in one line what is wrong with a command, without the list of all options.

    With ``JSONARGPARSE_DEBUG=true`` in the environment, it shows the whole message, and where it comes from.
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print an error and exit with status 2, or raise it where the parser was told to."""
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        options = [action.dest for action in parser._actions]
        # A class in a config has a parser of its own, whose message becomes a part of the command's.
        if "config" not in options or whole_traceback():
            super().error(message, ex)
        text = explain(message, getattr(self, "args", None) or sys.argv[1:], options)
        if not self.exit_on_error:
            super().error(text, ex)
        self.exit(2, f"{parser.prog.replace(' [options]', '')}: error: {text}\n")
