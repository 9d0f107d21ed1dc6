"""Sizes of tiles by shape. They are fixed: trying several out would make the host wait for the device in a step."""

from __future__ import annotations

from dataclasses import dataclass

# Programs that keep the 132 multiprocessors of an H100 busy to the end: four on each.
PROGRAMS = 528


@dataclass(frozen=True)
class Tile:
    """The tile of a program.

    Attributes:
        m: Rows, a power of two.
        n: Columns, a power of two.
        inner: The block of the dimension that a product adds up, or of the columns of a result; a power of two.
        warps: Warps that share the tile.
        stages: Tiles that are loaded ahead, counting the one in work.
    """

    m: int
    n: int
    inner: int
    warps: int
    stages: int


def power(number: int, low: int, high: int) -> int:
    """Return the smallest power of two of at least ``number``, between ``low`` and ``high``."""
    return min(high, max(low, 1 << max(0, number - 1).bit_length()))


def ceil(number: int, size: int) -> int:
    """Return how many pieces of a size cover a number."""
    return -(-number // size)


def of_project(n: int, r: int) -> Tile:
    """Return the tile for products ``[m, n] @ [n, r]``, and for sums alone with ``r = 0``."""
    if r == 0:
        return Tile(32, power(n, 16, 128), 16, 4, 3)
    inner = power(r, 16, 128)
    return Tile(64, 32, inner, 4 if inner <= 64 else 8, 3)


def splits(programs: int, length: int, block: int) -> int:
    """Return into how many parts to divide a loop over ``length``, so that there are enough programs."""
    return max(1, min(PROGRAMS // max(1, programs), ceil(length, 4 * block)))


def of_apply(m: int, n: int, q: int) -> Tile:
    """Return the tile for the update of ``[m, n]`` weights with factors of rank ``q``, or with none (0)."""
    if q == 0:
        columns = power(n, 1, 1024 if m < 4 else 256)
        return Tile(power(m, 1, 4096 // columns), columns, 16, 4, 1)
    return Tile(64, power(n, 16, 128), power(q, 16, 32), 8, 2)
