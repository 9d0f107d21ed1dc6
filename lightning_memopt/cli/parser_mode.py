"""How config files are read: the option ``--parser_mode``."""

from __future__ import annotations

from argparse import SUPPRESS, Action
from typing import Any

import jsonargparse

PARSER_MODES = ("yaml", "omegaconf", "omegaconf+")


class SetParserMode(Action):
    """The ``--parser_mode`` option. It takes effect immediately, so it must precede the files. It is not stored."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest=SUPPRESS, default=SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Set the mode."""
        if values not in PARSER_MODES:
            parser.error(f"{option_string} must be one of {', '.join(PARSER_MODES)}, got {values!r}.")
        if namespace.get("config"):
            parser.error(f"{option_string} {values} comes after a --config that was read without it; put it first.")
        set_parser_mode(getattr(parser, "parent_parser", parser), values)


def set_parser_mode(parser: Any, mode: str) -> None:
    """Make a parser, and the parsers of its subcommands, read files in this mode."""
    if mode == "omegaconf+":
        # Otherwise ${data.seq_len} would have to be ${fit.data.seq_len}, and fit and validate could not share a file.
        jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    parser.parser_mode = mode
