"""How far one step may move a weight: the bound on |U / D|, and weights that stay finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_memopt._registry import listed
from lightning_memopt.optim.guards import agreed
from lightning_memopt.sharding.consensus import rank
from lightning_memopt.sharding.layout import Layout

# Where the bound changes this share of the elements, it has become a part of the method.
SHARE = 0.01
# Elements are counted in one step of ten, from this step on: the first steps of a low-rank momentum may reach the bound
# without meaning anything. So may a spike: only several counts in a row say something.
EVERY, FIRST, COUNTED = 10, 20, 3


@dataclass(frozen=True)
class Rates:
    """What the update of one block is multiplied with, and how far it may go.

    Attributes:
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        max_update: Bound on every element of |U / D|; None for no bound.
        checked: Whether a weight could become infinite or undefined, so that every one has to be looked at.
    """

    lr: float
    weight_decay: float = 0.0
    max_update: float | None = None
    checked: bool = False

    @staticmethod
    def of(group: Mapping[str, Any], *, weights: torch.dtype, arithmetic: torch.dtype, bounded: bool) -> Rates:
        """Return the rates of a block.

        Args:
            group: Its hyperparameters.
            weights: The dtype of its weights.
            arithmetic: The dtype of its arithmetic.
            bounded: Whether the bound applies to it.
        """
        lr, decay, max_update = float(group["lr"]), group["weight_decay"], group["max_update"] if bounded else None
        reach = max_update if max_update is not None else _reach(arithmetic, group)
        # A finite weight to which less than half of its last bit is added stays finite, even the largest one: rounding
        # takes it back. This holds for float32 and bfloat16 whatever a kind does, and for float16 under a bound. So
        # nothing has to be read; only the rest is checked (float16 without a bound, or absurd rates).
        wide, narrow = torch.finfo(arithmetic), torch.finfo(weights)
        safe = lr * reach <= narrow.max * narrow.eps / 8 and lr * decay <= 2 and group["eps"] >= wide.tiny
        return Rates(lr, decay, max_update, checked=not safe)


def _reach(arithmetic: torch.dtype, group: Mapping[str, Any]) -> float:
    """Return what no |U / D| exceeds, since ``guards`` lets no gradient pass whose squares could overflow in a sum."""
    return 2 / (1 - group["betas"][0]) * torch.finfo(arithmetic).max ** 0.5 / min(1.0, group["eps"])


@dataclass
class Watch:
    """What is seen while weights are updated; it stays on the device until the step is over.

    Attributes:
        counting: Whether to count elements at the bound.
        hits: How many there were, one number per chunk.
        elements: Out of how many.
        lost: For every block that is checked, its layout and how many of its weights could not be updated.
    """

    counting: bool = False
    hits: list[Tensor] = field(default_factory=list)
    elements: int = 0
    lost: dict[str, tuple[Layout, Tensor]] = field(default_factory=dict)

    def require_finite(self) -> None:
        """Raise if a weight could not be updated: on all ranks that share the block.

        The step has been taken everywhere else. What U / D is, is known only once state has been updated; to hold all
        updates back until then would take a second copy of the weights. So weights that would have left the range of
        their dtype keep their value, and this error comes before the step returns.

        Raises:
            FloatingPointError: Naming the blocks.
        """
        if not self.lost:
            return
        layouts = [layout for layout, _ in self.lost.values()]
        names = list(self.lost)
        bad = [names[position] for position in agreed([count for _, count in self.lost.values()], layouts)]
        if bad:
            raise FloatingPointError(
                f"Weights would have become infinite or undefined in: {listed(bad)}. They keep their values of "
                "before the step; everything else has taken it. Lower the learning rate, set `max_update`, or keep "
                "the weights in float32."
            )


def limited(update: Tensor, scale: float, divisor: Tensor, bound: float, watch: Watch) -> Tensor:
    """Return a chunk of U / D, where no ``|scale · U / D|`` exceeds the bound; it may lie where D did."""
    quotient = torch.div(update, divisor, out=divisor if divisor.shape == update.shape else None)
    limit = bound / abs(scale) if scale else math.inf
    if watch.counting:
        watch.hits.append((quotient.abs() > limit).sum())
        watch.elements += quotient.numel()
    return quotient.clamp_(-limit, limit)


class Tally:
    """Says once that the bound changes more than ``SHARE`` of all elements.

    It reads in the step after the one that was counted, when the device has been waited for anyway. Every process
    counts what it holds, which is a sample of all blocks; the first one speaks.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        self._pending: Watch | None = None
        self._counts: list[tuple[int, int]] = []
        self._said = False

    def watch(self, counters: Iterable[Tensor]) -> Watch:
        """Return what is to watch this step, which the largest of the parameters' counters numbers."""
        if self._said:
            return Watch()
        step = max((int(counter.item()) for counter in counters), default=0)
        return Watch(counting=step >= FIRST and step % EVERY == 0)

    def take(self, watch: Watch) -> None:
        """Keep what a step has counted for :meth:`read`."""
        self._pending = watch if watch.elements else None

    def read(self) -> None:
        """Read the last count; warn where all of the last ones are above ``SHARE``."""
        if self._pending is None:
            return
        hits, elements = torch.stack(self._pending.hits).sum().item(), self._pending.elements
        self._pending = None
        self._counts = [*self._counts[1 - COUNTED :], (int(hits), elements)]
        shares = [hits / elements for hits, elements in self._counts]
        if len(shares) == COUNTED and min(shares) > SHARE:
            self._said, self._counts = True, []
            if rank() == 0:
                warnings.warn(
                    f"{sum(shares) / COUNTED:.1%} of all elements of the updates were above the bound `max_update` in "
                    f"the last {EVERY * COUNTED} steps, so that it has become a part of the method. Gradients may be "
                    "mostly zero, or the learning rate too high; a larger `max_update` is closer to the method without "
                    "a bound. This is said once.",
                    stacklevel=3,
                )
