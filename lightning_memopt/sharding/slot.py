"""The part of a parameter that a block covers: the query, key or value of a fused weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """The part of a parameter that a block covers: entries of one dimension.

    Attributes:
        dim: The dimension.
        start: Its first entry.
        length: Number of entries, of every run if there are several.
        period: If it repeats, the number of entries from one run to the next: ``Slot(0, 8, 8, period=24)`` covers the
            rows 8 to 15, 32 to 39, and so on, the keys of heads of size 8 where every head holds query, key and value.
            None for one run.
    """

    dim: int
    start: int
    length: int
    period: int | None = None

    def text(self, ndim: int) -> str:
        """Return a description such as ``rows 8–15 of every 24``, for a parameter with ``ndim`` dimensions."""
        what = "columns" if self.dim % ndim == ndim - 1 else "rows"
        repeated = "" if self.period is None else f" of every {self.period}"
        return f"{what} {self.start}–{self.start + self.length - 1}{repeated}"

    def count(self, size: int) -> int:
        """Return the number of entries among the first ``size`` of the dimension."""
        if self.period is None:
            return min(max(0, size - self.start), self.length)
        periods, rest = divmod(size, self.period)
        return periods * self.length + min(max(0, rest - self.start), self.length)

    def shape_in(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of these entries of a parameter."""
        found = list(shape)
        found[self.dim] = self.count(found[self.dim])
        return tuple(found)

    def view(self, tensor: Tensor) -> Tensor:
        """Return these entries of a tensor as a view. Runs have a dimension of their own, before that of entries."""
        dim = self.dim % tensor.ndim
        if self.period is not None:
            tensor = tensor.unflatten(dim, (tensor.shape[dim] // self.period, self.period))
            dim += 1
        return tensor.narrow(dim, self.start, self.length)

    def within(self, start: int, size: int) -> tuple[Slot, ...]:
        """Return where these entries lie in the piece of ``size`` entries that begins at ``start``.

        That is one slot, or one per run if the piece begins or ends within a period.
        """
        if self.period is None:
            before = self.count(start)
            return (Slot(self.dim, min(max(0, self.start - start), size), self.count(start + size) - before),)
        if start % self.period == 0 and size % self.period == 0:
            return (self,)
        periods = range(start // self.period * self.period, start + size, self.period)
        runs = [Slot(self.dim, first + self.start, self.length).within(start, size)[0] for first in periods]
        return tuple(run for run in runs if run.length) or (Slot(self.dim, 0, 0),)
