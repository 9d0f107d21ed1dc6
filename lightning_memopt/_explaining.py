"""Explain a checkpoint directory where Lightning reads a file: in ``load_from_checkpoint``, and under other strategies.

``torch.load`` itself has no place for this; the folder has a note.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Lightning's function that reads a file, and the modules that may have imported it already, under another name.
_PLACES = (
    ("lightning.fabric.utilities.cloud_io", "_load"),
    ("lightning.fabric.plugins.io.torch_io", "pl_load"),
    ("lightning.pytorch.core.saving", "pl_load"),
)


def explain_directories() -> None:
    """Let Lightning's error about a directory say what it is, in all modules that are imported. Twice has no effect."""
    for module, name in _PLACES:
        load = getattr(sys.modules.get(module), name, None)
        if load is not None and not hasattr(load, "__wrapped__"):
            setattr(sys.modules[module], name, _explaining(load))


def _explaining(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def explained(path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(path, *args, **kwargs)
        except (IsADirectoryError, FileNotFoundError) as error:  # object stores have no directories
            with contextlib.suppress(Exception):  # only Lightning's error counts
                if _is_checkpoint(path):
                    from lightning_memopt.strategy.files.directory import explanation

                    error.add_note(explanation(str(path)))
            raise

    return explained


def _is_checkpoint(path: Any) -> bool:
    from lightning_memopt.strategy.files.directory import REST, is_checkpoint
    from lightning_memopt.strategy.files.places import place_of
    from lightning_memopt.strategy.files.remote import connect

    place = place_of(path)
    if isinstance(place, Path):
        return is_checkpoint(place)
    fs, name = connect(place)
    return bool(fs.isfile(f"{name}/{REST}"))
