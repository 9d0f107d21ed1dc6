"""How the energy of momentum is spread over the ranks of each block, as far as that is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

from lightning_memopt.callbacks.policies.base import Candidate


def known(blocks: Iterable[Candidate]) -> bool:
    """Return whether gradients have been seen; blocks that never get any count as blocks without energy."""
    return any(block.signals is not None for block in blocks)


# Shares are sums of many floats: a wanted one must not be missed by their rounding.
ROUNDING = 1e-9


class Spectra:
    """Shares of the momentum of some blocks.

    Updates are normalised, so the scale of a block's gradients does not matter: its momentum weighs as much as it has
    elements, however small its energy. A block whose momentum has always been 0 weighs nothing.
    """

    def __init__(self, blocks: Iterable[Candidate]) -> None:
        self.gains = {block.name: gains(block) for block in blocks}
        weights = {block.name: block.count * block.m * block.n * any(self.gains[block.name]) for block in blocks}
        whole = sum(weights.values()) or 1
        self.weight = {name: weight / whole for name, weight in weights.items()}
        self._empty = not any(weights.values())
        self._kept = {name: [0.0, *accumulate(values)] for name, values in self.gains.items()}

    def kept(self, ranks: Mapping[str, int]) -> float:
        """Return the share of all momentum that these ranks keep, rounded up."""
        if self._empty:
            return 1.0
        return sum(self.weight[name] * kept[ranks[name]] for name, kept in self._kept.items()) + ROUNDING


def gains(block: Candidate) -> list[float]:
    """Return the share of a block's energy that every rank adds to the one before it, up to dense momentum."""
    signals = block.signals
    if signals is None or signals.momentum_energy <= 0:
        return [0.0] * block.dense_rank
    first = list(signals.spectrum[: block.short])
    # Of momentum that is dense or none no direction is known; the even spread promises least.
    last = first[-1] if first else 0.0
    # What a young basis keeps need not be the largest there is, but a basis of any rank comes to hold that.
    energies = sorted(first + tail(signals.residual_energy, last, block.short - len(first)), reverse=True)
    whole = sum(energies)
    shares = [energy / whole for energy in energies] if whole else [1 / block.short] * block.short
    # Dense momentum keeps what no lower rank does.
    return [*shares[: block.dense_rank - 1], sum(shares[block.dense_rank - 1 :])]


def tail(energy: float, last: float, count: int) -> list[float]:
    """Return values that fall geometrically, go on after ``last`` and sum to ``energy``; equal ones if it is too small.

    The values are last · q, last · q², …, with the one q between 0 and 1 for which the sum is right.
    """
    if last * count <= energy:
        return [energy / max(1, count)] * count
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        enough = last * middle * (1 - middle**count) / (1 - middle) >= energy if middle < 1 else True
        low, high = (low, middle) if enough else (middle, high)
    return [last * high ** (power + 1) for power in range(count)]
