"""Human-readable sizes in bytes."""

from __future__ import annotations

import re
from decimal import Decimal

_BINARY = {unit: 1024**power for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))}
_DECIMAL = {unit: 1000**power for power, unit in enumerate(("kB", "MB", "GB", "TB"), start=1)}
_UNITS = _BINARY | _DECIMAL
# As the makers of GPUs use them: a device of "24G" has 24 GiB.
_SHORT = {unit[0].lower(): factor for unit, factor in _BINARY.items()}
_FACTORS = _SHORT | {unit.lower(): factor for unit, factor in _UNITS.items()}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([a-z]*)", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Return the number of bytes in a text such as "512MiB", "1.5 GB" or "300000".

    GB is 1000³ bytes and GiB is 1024³; G alone means GiB.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it is not a number with a unit, or a fractional number of bytes.
    """
    if not isinstance(text, str):
        raise TypeError(f"A size must be a string such as '512MiB', got {text!r}.")
    match = _SIZE.fullmatch(text.strip())
    factor = _FACTORS.get(match[2].lower() or "b") if match else None
    size = Decimal(match[1]) * factor if match and factor else None
    if size is None or (factor == 1 and size % 1):
        raise ValueError(
            f"A size must be a whole number of bytes, or a number and one of {', '.join(_UNITS)} (K, M, G and T mean "
            f"KiB, MiB, GiB and TiB), such as '512MiB' or '1.5 GB', got {text!r}."
        )
    return int(size)


def format_bytes(size: int) -> str:
    """Format a number of bytes in a suitable binary unit, rounded: "1.5 MiB"."""
    for unit, factor in _BINARY.items():
        number = f"{size / factor:.1f}".removesuffix(".0")
        if float(number) < 1024 or unit == "TiB":
            break
    return f"{number} {unit}"


def format_share(share: float) -> str:
    """Format a fraction as a percentage, rounded: "97.4%", and never "-0.0%"."""
    return f"{round(share, 3) + 0.0:.1%}"
