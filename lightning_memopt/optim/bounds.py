"""Limits on one step: the bound on |U / D|, and weights that stay finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_memopt._registry import listed
from lightning_memopt.optim.guards import agreed
from lightning_memopt.plans.rates import BlockRates
from lightning_memopt.sharding.consensus import rank
from lightning_memopt.sharding.layout import Layout

# If the bound changes this share of the elements, it has become a part of the method.
SHARE = 0.01
# Elements are counted every ten steps, from step 20 on. It is normal that the first steps of a low-rank momentum reach
# the bound, or that a spike does: only several counts in a row are significant.
EVERY, FIRST, COUNTED = 10, 20, 3


@dataclass(frozen=True)
class Rates:
    """The factors in the update of one block, and its limits.

    Attributes:
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        max_update: Bound on every element of |U / D|; None for no bound.
        checked: Whether a weight could become infinite or NaN, so that every weight must be checked.
    """

    lr: float
    weight_decay: float = 0.0
    max_update: float | None = None
    checked: bool = False

    @staticmethod
    def of(
        group: Mapping[str, Any], own: BlockRates, *, weights: torch.dtype, arithmetic: torch.dtype, bounded: bool
    ) -> Rates:
        """Return the rates of a block.

        Args:
            group: The parameter group of the block.
            own: How the block differs from it.
            weights: The dtype of its weights.
            arithmetic: The dtype of its arithmetic.
            bounded: Whether the bound applies to the block.
        """
        max_update = group["max_update"] if bounded else None
        decay = group["weight_decay"] if own.weight_decay is None else own.weight_decay
        rates = float(group["lr"]) * own.lr_multiplier, decay, max_update
        return _rates(*rates, group["betas"][0], group["eps"], weights, arithmetic)


@lru_cache
def _rates(
    lr: float,
    decay: float,
    max_update: float | None,
    beta1: float,
    eps: float,
    weights: torch.dtype,
    arithmetic: torch.dtype,
) -> Rates:
    wide, narrow = torch.finfo(arithmetic), torch.finfo(weights)
    # |U / D| at most. `guards` rejects gradients whose squares could overflow in a sum.
    reach = max_update if max_update is not None else 2 / (1 - beta1) * wide.max**0.5 / min(1.0, eps)
    # A finite weight stays finite if the update is less than half of its last bit: rounding absorbs it, even at the
    # largest number. This holds for float32 and bfloat16 with every kind, and for float16 under a bound. So no weight
    # has to be read. Only the rest is checked (float16 without a bound, or absurd rates).
    safe = lr * reach <= narrow.max * narrow.eps / 8 and lr * decay <= 2 and eps >= wide.tiny
    return Rates(lr, decay, max_update, checked=not safe)


@dataclass
class Watch:
    """Counts taken while weights are updated. They stay on the device until the end of the step.

    Attributes:
        counting: Whether to count elements at the bound.
        hits: Number of elements at the bound, one tensor per chunk.
        elements: Total number of elements counted.
        lost: For every checked block, its layout and the number of its weights that could not be updated.
    """

    counting: bool = False
    hits: list[Tensor] = field(default_factory=list)
    elements: int = 0
    lost: dict[str, tuple[Layout, Tensor]] = field(default_factory=dict)

    def require_finite(self) -> None:
        """Raise if a weight could not be updated, on all ranks that share the block.

        All other weights have taken the step. U / D is known only after state is updated, and holding all updates back
        until then would take a second copy of the weights. So a weight that would leave the range of its dtype keeps
        its value, and this error is raised before the step returns.

        Raises:
            FloatingPointError: If there are such weights. The message names the blocks.
        """
        if not self.lost:
            return
        layouts = [layout for layout, _ in self.lost.values()]
        names = list(self.lost)
        bad = [names[position] for position in agreed([count for _, count in self.lost.values()], layouts)]
        if bad:
            raise FloatingPointError(
                f"Weights would have become infinite or NaN in: {listed(bad)}. They keep their previous values; all "
                "other weights have taken the step. Lower the learning rate, set `max_update`, or keep the weights in "
                "float32."
            )


def limit_(quotient: Tensor, scale: float, bound: float, watch: Watch) -> Tensor:
    """Clamp a chunk of U / D in place, so that ``|scale · U / D|`` is within the bound."""
    limit = bound / abs(scale) if scale else math.inf
    if watch.counting:
        watch.hits.append((quotient.abs() > limit).sum())
        watch.elements += quotient.numel()
    return quotient.clamp_(-limit, limit)


class Tally:
    """Warns once if the bound changes more than ``SHARE`` of all elements.

    A count is read one step later, when the host waits for the device anyway. Every process counts its local elements,
    which are a sample of all blocks. The first process warns.
    """

    def __init__(self) -> None:
        """Start without counts."""
        self._pending: Watch | None = None
        self._counts: list[tuple[int, int]] = []
        self._warned = False

    def watch(self, step: int) -> Watch:
        """Return the watch for this step, the largest of the parameters' numbers of steps."""
        if self._warned:
            return Watch()
        return Watch(counting=step >= FIRST and step % EVERY == 0)

    def take(self, watch: Watch) -> None:
        """Keep the counts of an update for :meth:`read`, with those of other updates of the same step."""
        if watch.elements and self._pending is not None:
            self._pending.hits += watch.hits
            self._pending.elements += watch.elements
        elif watch.elements:
            self._pending = watch

    def read(self) -> None:
        """Read the last count. Warn if all of the most recent counts are above ``SHARE``."""
        if self._pending is None:
            return
        hits, elements = torch.stack(self._pending.hits).sum().item(), self._pending.elements
        self._pending = None
        self._counts = [*self._counts[1 - COUNTED :], (int(hits), elements)]
        shares = [hits / elements for hits, elements in self._counts]
        if len(shares) == COUNTED and min(shares) > SHARE:
            self._warned, self._counts = True, []
            if rank() == 0:
                warnings.warn(
                    f"`max_update` limited {sum(shares) / COUNTED:.1%} of all update elements in the last "
                    f"{EVERY * COUNTED} steps, which changes the method. Gradients may be mostly zero, or the "
                    "learning rate too high. A larger `max_update` is closer to the unbounded method. This warning is "
                    "shown once.",
                    stacklevel=4,
                )
