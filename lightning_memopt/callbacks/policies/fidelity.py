"""Ranks that bring updates as near to full Adam's as bytes allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from itertools import accumulate

from lightning_memopt.callbacks.policies.base import POLICIES, Candidate, Problem
from lightning_memopt.callbacks.policies.filling import common, total
from lightning_memopt.callbacks.policies.spectra import ROUNDING, gains
from lightning_memopt.callbacks.policies.uniform import uniform

# A smaller gain of the cosine is no reason for bytes.
NEGLIGIBLE = 1e-6


@POLICIES.register("fidelity")
def fidelity(problem: Problem) -> Mapping[str, int]:
    """Raise the cosine between the model's update and full Adam's as far as the budget allows.

    A budget goes where the next bytes add most to the mean cosine of all blocks, weighted by their elements. As Adam's
    updates have about the same size in every element, that is the cosine of the whole model's update. The largest angle
    of a block would be the wrong aim: it belongs to the block with most noise, where rank changes least, and that block
    would take everything.

    Without a budget, every block gets the smallest rank whose cosine is at least `quality`.
    """
    curves = {block.name: cosines(block) for block in problem.blocks if _is_known(block)}
    if not curves:
        return uniform(problem)
    ranks = common(problem.blocks, problem.min_rank, problem.min_rank)
    if problem.budget is None:
        for name, curve in curves.items():
            wanted = next(rank for rank, cosine in enumerate(curve) if cosine >= problem.quality - ROUNDING)
            ranks[name] = max(ranks[name], wanted)
        return ranks
    _fill(problem, curves, ranks)
    return ranks


def cosines(block: Candidate) -> list[float]:
    """Return the expected cosine between the update and full Adam's for every rank, from none to dense momentum.

    Of M, a rank keeps a part of energy k and loses l = 1 − k. What it loses is released at once: outside of the kept
    directions, the update is the gradient itself. The gradient is a signal S, which M has in full, plus noise N, of
    which M has the share κ of the energy; ‖M‖² = S + κN = 1, ‖G‖² = S + N and ⟨G, M⟩ = S + cN give S, N and c. Outside,
    noise has at most the share of directions there, and no more than l leaves room for. The rest of l is signal::

        n = min(N (1 − rank / short), l / κ),   s = l − κ n
        cosine = (k + s + c n) / √(k + s + n)

    That is exact for no momentum (the measured cosine) and for dense momentum (1). It describes low-rank momentum. In a
    subspace, momentum that starts again at every choice comes less near.
    """
    signals = block.signals
    assert signals is not None
    gradient = 1 / signals.damping
    kept_noise = min(signals.noise_damping, signals.damping)
    noise = max(0.0, gradient - 1) / (1 - kept_noise) if kept_noise < 1 else 0.0
    signal = 1 - kept_noise * noise
    inner = (signals.agreement * math.sqrt(gradient) - signal) / noise if noise else 0.0
    found = []
    for rank, kept in enumerate(accumulate(gains(block), initial=0.0)):
        kept = min(1.0, kept)
        outside = noise * (1 - rank / block.short)
        if kept_noise > 0:
            outside = min(outside, (1 - kept) / kept_noise)
        held = kept + max(0.0, 1 - kept - kept_noise * outside)
        found.append(min(1.0, (held + inner * outside) / math.sqrt(held + outside)))
    return [*found[:-1], 1.0]


def _is_known(block: Candidate) -> bool:
    return block.signals is not None and block.signals.damping > 0 and any(gains(block))


def _fill(problem: Problem, curves: Mapping[str, Sequence[float]], ranks: dict[str, int]) -> None:
    """Give the bytes that are left to the steps that add most per byte. Changes ``ranks``."""
    assert problem.budget is not None
    left = problem.budget - total(problem.blocks, ranks)
    queue: list[tuple[float, int, list[int]]] = []
    by_place = dict(enumerate(problem.blocks))

    def offer(place: int, corners: list[int]) -> None:
        """Queue the next step of a block: the best first, ties in the model's order."""
        block = by_place[place]
        if corners:
            worth = _worth(block, curves[block.name], ranks[block.name], corners[0])
            heappush(queue, (-worth, place, corners))

    for place, block in by_place.items():
        if block.name in curves:
            offer(place, _corners(block, curves[block.name], ranks[block.name]))
    too_large = []
    while queue:
        _, place, (rank, *corners) = heappop(queue)
        block = by_place[place]
        cost = block.nbytes(rank) - block.nbytes(ranks[block.name])
        if cost > left:
            too_large.append((block, rank))
            continue
        ranks[block.name] = rank
        left -= cost
        offer(place, corners)
    for block, end in too_large:  # a part of a step is better than none
        curve, now = curves[block.name], ranks[block.name]
        fitting = [rank for rank in range(now, end) if block.nbytes(rank) - block.nbytes(now) <= left]
        ranks[block.name] = -max((curve[rank], -rank) for rank in fitting)[1]
        left -= block.nbytes(ranks[block.name]) - block.nbytes(now)


def _worth(block: Candidate, curve: Sequence[float], start: int, end: int) -> float:
    """Return what a step adds to the model's cosine per byte, up to a factor that all blocks share."""
    elements = block.count * block.m * block.n
    return elements * (curve[end] - curve[start]) / (block.nbytes(end) - block.nbytes(start))


def _corners(block: Candidate, curve: Sequence[float], start: int) -> list[int]:
    """Return the ranks from ``start`` on at which the concave hull of the curve over bytes turns, in ascending order.

    A cosine may rise slowly at first: near full rank, noise vanishes. Steps from corner to corner see beyond that.
    """
    hull = [start]
    for rank in range(start + 1, len(curve)):
        if curve[rank] <= curve[hull[-1]] + NEGLIGIBLE:
            continue
        while len(hull) > 1 and _worth(block, curve, hull[-2], hull[-1]) <= _worth(block, curve, hull[-1], rank):
            hull.pop()
        hull.append(rank)
    return hull[1:]
