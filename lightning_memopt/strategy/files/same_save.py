"""Open a checkpoint so that all ranks read the same save, even while another process replaces it."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lightning_memopt.strategy.agreement import on_all
from lightning_memopt.strategy.files.places import Place
from lightning_memopt.strategy.files.remote import version

_TRIES, _PAUSE = 60, 0.02


class Opened(Protocol):
    """An open checkpoint with an identity."""

    identity: str

    def close(self) -> None:
        """Close it."""


T = TypeVar("T", bound=Opened)


def open_together(path: Place, open_: Callable[[], T], group: Any = None) -> T:
    """Open the same save of a checkpoint on all ranks, even while another process replaces it.

    Args:
        path: The path of the checkpoint.
        open_: Opens the checkpoint.
        group: The process group; None for all ranks.

    Raises:
        Exception: The error that ``open_`` raised on a rank, on all ranks.
        ValueError: If ranks see different saves under the path, or it is replaced too often.
    """
    return _opened(path, open_, lambda action: on_all(action, group))


def open_alone(path: Place, open_: Callable[[], T]) -> T:
    """Open a checkpoint on this process only, even while another process replaces it.

    Raises:
        Exception: The error that ``open_`` raised.
        ValueError: If it is replaced too often.
    """
    return _opened(path, open_, lambda action: [action()])


def _opened(path: Place, open_: Callable[[], T], everywhere: Callable[[Callable[[], Any]], list[Any]]) -> T:
    error: Exception | None = None
    for attempt in range(_TRIES):
        mine, error, before = None, None, _version(path)
        try:
            mine = open_()
        except Exception as caught:
            error = caught
        replaced = error is not None and (_version(path) != before or getattr(error, "errno", None) == errno.ESTALE)
        mark = "replaced" if replaced else "failed" if mine is None else mine.identity
        seen = set(everywhere(partial(str, mark)))
        if mine is not None and len(seen) == 1:
            return mine
        if mine is not None:
            mine.close()
        if "failed" in seen and "replaced" not in seen:
            break
        time.sleep(_PAUSE * min(attempt, 10))
    everywhere(partial(_raise, error))
    raise ValueError(
        f"The ranks found different checkpoints under {str(path)!r}, {_TRIES} times: either the path is not on a file "
        "system that all ranks share, or another process keeps replacing it. Load a copy under another name."
    )


def _version(path: Place) -> object:
    """Return values that change when a path is replaced. Inode numbers alone are soon reused."""
    try:
        if not isinstance(path, Path):
            return version(path)
        found = path.stat()
    except Exception:  # opening raises it, on all ranks
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
