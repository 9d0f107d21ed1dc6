"""What the program says when a run fails: the message, and the user's own code that led to it."""

from __future__ import annotations

import os
import re
import sysconfig
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
_INSTALLED = {"site-packages", "dist-packages"}  # of users and of distributions, too
# Types that say no more than "this cannot be": their messages stand alone.
_PLAIN = (ValueError, TypeError, NotImplementedError, FloatingPointError, OSError, MisconfigurationException)
_CALLERS = 4  # lines of the user's code that led to a message


def whole_traceback() -> bool:
    """Return whether the environment asks for whole tracebacks, as it asks jsonargparse for them."""
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true"


def cause_of(error: BaseException) -> BaseException:
    """Return the error of a class in a config. The parser wraps it into a list of the types that it could have had."""
    while str(error).startswith(_UNION) and error.__cause__ is not None:
        error = error.__cause__
    return error


def describe(program: str, error: BaseException, rank: int) -> str:
    """Return what to print about the error that ended a run.

    Where somebody raised the error with a message, in this package or in the user's code, the message is enough, with
    the lines of the user's code. Elsewhere, as in a product of tensors of wrong shapes, it is a traceback without the
    frames of libraries.

    Args:
        program: The name of the command.
        error: The error.
        rank: Of this process; every line of others than the first begins with it.
    """
    error = cause_of(error)
    found = TracebackException.from_exception(error)
    if isinstance(error, MisconfigurationException) or _is_raised(found):
        lines = [
            f"{program}: error: {_said(error)}",
            *getattr(error, "__notes__", ()),
            *_causes(error),
            *_places(found),
        ]
    else:
        _leave_out_libraries(found)
        hint = "Frames of libraries are left out: JSONARGPARSE_DEBUG=true shows all."
        lines = ["".join(found.format()).rstrip("\n"), hint]
    prefix = f"[rank {rank}] " if rank else ""
    return "".join(f"{prefix}{line}\n" for line in "\n".join(lines).splitlines())


def _said(error: BaseException) -> str:
    """Return an error's message, with its type where the message may be as little as a key."""
    text, kind = str(error).strip(), type(error).__name__
    return text if text and isinstance(error, _PLAIN) else f"{kind}: {text}" if text else kind


def _causes(error: BaseException) -> list[str]:
    """Return a line for each error that an error was raised from."""
    lines = []
    while (cause := error.__cause__) is not None:
        lines.append(f"  caused by {type(cause).__name__}: {cause}")
        error = cause
    return lines


def _places(found: TracebackException) -> list[str]:
    """Return a line with the user's code that led to an error, the innermost first, if any did."""
    own = [_place(frame) for frame in reversed(found.stack) if _is_own(frame)]
    more = [f"{len(own) - _CALLERS - 1} more"] if len(own) > _CALLERS + 1 else []
    return [f"  at {', called from '.join([*own[: _CALLERS + 1], *more])}"] if own else []


def _place(frame: FrameSummary) -> str:
    try:
        path = os.path.relpath(frame.filename)
    except (OSError, ValueError):  # the working directory is gone, or on another drive
        path = frame.filename
    return f"{path}:{frame.lineno} in {frame.name}"


def _is_own(frame: FrameSummary) -> bool:
    """Return whether a frame is neither of a library nor of this package."""
    path = Path(frame.filename)
    if frame.filename.startswith("<") or _INSTALLED & {*path.parts}:
        return False
    return not os.path.realpath(path).startswith(_LIBRARIES)


def _is_raised(found: TracebackException) -> bool:
    """Return whether an error was raised by a statement of the user's code or of this package."""
    return any(
        (_is_own(frame) or frame.filename.startswith(str(_PACKAGE))) and re.search(r"\braise\b", frame.line or "")
        for frame in found.stack[-1:]
    )


def _leave_out_libraries(found: TracebackException) -> None:
    """Keep the frames of the user's code, and the innermost, of an error and of those that led to it."""
    found.stack[:-1] = [frame for frame in found.stack[:-1] if _is_own(frame)]
    for before in (found.__cause__, found.__context__):
        if before is not None:
            _leave_out_libraries(before)
