"""The known or estimated distribution of momentum's energy over the ranks of each block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

from lightning_memopt.callbacks.policies.base import Candidate


def known(blocks: Iterable[Candidate]) -> bool:
    """Return whether any block has seen gradients. Blocks that never get any count as blocks without energy."""
    return any(block.signals is not None for block in blocks)


# Shares are sums of many floats. Their rounding must not make an allocation miss the required share.
ROUNDING = 1e-9


class Spectra:
    """Shares of the momentum of a set of blocks.

    Updates are normalized, so the scale of a block's gradients does not matter. A block's weight is its number of
    elements, however small its energy is. A block whose momentum has always been 0 has weight 0.
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
    """Return the share of a block's energy that each additional rank keeps, up to dense momentum."""
    signals = block.signals
    if signals is None or signals.momentum_energy <= 0:
        return [0.0] * block.dense_rank
    first = list(signals.spectrum[: block.short])
    # Dense momentum and no momentum give no known directions. An even spread is the most cautious assumption.
    last = first[-1] if first else 0.0
    # A young basis need not hold the largest directions, but a basis of any rank converges to them, so sort.
    energies = sorted(first + tail(signals.residual_energy, last, block.short - len(first)), reverse=True)
    whole = sum(energies)
    shares = [energy / whole for energy in energies] if whole else [1 / block.short] * block.short
    # Dense momentum keeps everything that lower ranks do not.
    return [*shares[: block.dense_rank - 1], sum(shares[block.dense_rank - 1 :])]


def tail(energy: float, last: float, count: int) -> list[float]:
    """Return values that fall geometrically from ``last`` and sum to ``energy``; equal ones if ``last`` is too small.

    The values are last · q, last · q², …, with the q between 0 and 1 that gives this sum.
    """
    if last * count <= energy:
        return [energy / max(1, count)] * count
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        enough = last * middle * (1 - middle**count) / (1 - middle) >= energy if middle < 1 else True
        low, high = (low, middle) if enough else (middle, high)
    return [last * high ** (power + 1) for power in range(count)]
