"""Checks of numbers that users pass: finite, and in a meaningful range."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

# No dimension of a block and no step count is larger. Larger integers exceed the range of torch's.
LARGEST = 2**31 - 1


def check_number(name: str, value: Any, where: str, *, below: float = math.inf, at_most: float = math.inf) -> None:
    """Check that ``value`` is a number in [0, below) and at most ``at_most``.

    Args:
        name: The name of the number, for the message.
        value: The number.
        where: Where the number comes from, for the message.
        below: Exclusive upper bound.
        at_most: Inclusive upper bound.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"In {where}: `{name}` must be a number, got {value!r}.")
    if not (0 <= float(value) < below and float(value) <= at_most):
        top = f" and below {below:g}" if below < math.inf else f" and at most {at_most:g}" if at_most < math.inf else ""
        raise ValueError(f"In {where}: `{name}` must be finite, at least 0{top}, got {value!r}.")


def check_betas(betas: Any, where: str) -> None:
    """Check a pair of decay rates: the first in [0, 1), the second in [0, 1].

    Raises:
        TypeError: If one of them is not a number.
        ValueError: If they are not a pair, or one is out of range.
    """
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ValueError(f"In {where}: `betas` must be two numbers, got {betas!r}.")
    check_number("betas[0]", betas[0], where, below=1.0)
    check_number("betas[1]", betas[1], where, at_most=1.0)


def check_option(name: str, value: Any) -> None:
    """Check that a numeric option of a kind is finite and no larger than anything it could count.

    Raises:
        ValueError: If it is not finite, or too large.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value!r}.")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"`{name}` must be at most {LARGEST:,}, got {value!r}.")
