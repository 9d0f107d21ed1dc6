"""An argument parser for the commands of this package."""

from __future__ import annotations

import argparse
from typing import NoReturn

# What a command prints as an error in one line; anything else is a fault of ours, and shows its traceback.
EXPECTED = (ValueError, TypeError, OSError, ImportError, NotImplementedError, argparse.ArgumentError)


class Parser(argparse.ArgumentParser):
    """An argument parser that prints errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Print an error and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")
