"""What the program says when a run fails: the message, and the user's own code that led to it."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from traceback import FrameSummary, TracebackException

from lightning.pytorch.utilities.exceptions import MisconfigurationException

_UNION = "Does not validate against any of the Union subtypes"
_PACKAGE = Path(__file__).parents[1]
_PLACES: tuple[str | Path, ...] = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    _PACKAGE,
)
_LIBRARIES = tuple(f"{Path(place).resolve()}{os.sep}" for place in _PLACES)


def whole_traceback() -> bool:
    """Return whether the environment asks for whole tracebacks, as it asks jsonargparse for them."""
    return os.environ.get("JSONARGPARSE_DEBUG") == "true"


def cause_of(error: BaseException) -> BaseException:
    """Return the error of a class in a config. The parser wraps it into a list of the types that it could have had."""
    while str(error).startswith(_UNION) and error.__cause__ is not None:
        error = error.__cause__
    return error


def describe(program: str, error: BaseException, rank: int) -> str:
    """Return what to print about the error that ended a run.

    Where somebody raised the error with a message, in this package or in the user's code, the message is enough, with
    the lines of the user's code. Elsewhere, as in a product of tensors of wrong shapes, it is a traceback without the
    frames of libraries. Ranks fail together, so only the first prints a traceback.

    Args:
        program: The name of the command.
        error: The error.
        rank: Of this process.
    """
    error = cause_of(error)
    found = TracebackException.from_exception(error)
    own = [frame for frame in found.stack if _is_own(frame)]
    place = f"  at {', called from '.join(_place(frame) for frame in reversed(own))}\n" if own else ""
    if rank or isinstance(error, MisconfigurationException) or _is_raised(found.stack[-1:]):
        notes = "".join(f"{note}\n" for note in getattr(error, "__notes__", ()))
        head = f"{program}: error: {f'[rank {rank}] ' if rank else ''}"
        return f"{head}{str(error).strip() or type(error).__name__}\n{notes}{place}"
    _leave_out_libraries(found)
    return f"{''.join(found.format())}Frames of libraries are left out: JSONARGPARSE_DEBUG=true shows all.\n"


def _is_own(frame: FrameSummary) -> bool:
    return not frame.filename.startswith("<") and not str(Path(frame.filename).resolve()).startswith(_LIBRARIES)


def _is_raised(last: Iterable[FrameSummary]) -> bool:
    """Return whether an error was raised by a statement of the user's code or of this package."""
    return any(
        (_is_own(frame) or frame.filename.startswith(str(_PACKAGE))) and (frame.line or "").startswith("raise ")
        for frame in last
    )


def _place(frame: FrameSummary) -> str:
    return f"{os.path.relpath(frame.filename)}:{frame.lineno} in {frame.name}"


def _leave_out_libraries(found: TracebackException) -> None:
    """Keep the frames of the user's code, and the innermost, of an error and of those that led to it."""
    kept = [frame for frame in found.stack[:-1] if _is_own(frame)]
    found.stack[:-1] = kept
    for before in (found.__cause__, found.__context__):
        if before is not None:
            _leave_out_libraries(before)
