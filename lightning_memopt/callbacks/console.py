"""Print lines for the user, from one process."""

from __future__ import annotations

from lightning.pytorch.utilities.rank_zero import rank_zero_only


@rank_zero_only
def say(text: str) -> None:
    """Print a line, in color if rich is installed."""
    try:
        from rich.console import Console
    except ImportError:
        print(text)
    else:
        Console().print(text, markup=False, emoji=False, soft_wrap=True)
