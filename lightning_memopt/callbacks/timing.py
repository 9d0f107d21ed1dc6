"""When AdaptiveMomentum decides, and when the allocation freezes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class Timing:
    """The steps at which decisions are due, and the time at which the allocation freezes.

    Attributes:
        every: Steps between two decisions.
        start: Step of the first decision.
        freeze_after: A fraction of the training, or a number of steps; None means never.
        length: Number of steps of all optimizers in the whole training; infinity if it is unknown.
        optimizers: Number of optimizers.
        before: Steps of the training before the first one that is counted.
    """

    every: int
    start: int
    freeze_after: int | float | None
    length: float
    optimizers: int
    before: int = 0

    def decisions(self, steps: int) -> int:
        """Return the number of decisions that are due in the first ``steps`` steps."""
        return 0 if steps < self.start else (steps - self.start) // self.every + 1

    def until_frozen(self, steps: int, done: int) -> float | None:
        """Return the completed fraction of the time until the allocation freezes, or training ends; None if unknown.

        Args:
            steps: Completed steps of the optimizer.
            done: Completed steps of all optimizers.
        """
        if isinstance(self.freeze_after, int):
            return min(1.0, steps / self.freeze_after)
        if not self.is_known:
            return None
        progress = min(1.0, done / max(1, self.length))
        return min(1.0, progress / (self.freeze_after or 1.0))

    def is_over(self, steps: int, done: int) -> bool:
        """Return whether the allocation is to freeze, after these steps."""
        return self.freeze_after is not None and (self.until_frozen(steps, done) or 0.0) >= 1

    @property
    def is_known(self) -> bool:
        """Whether the length of the training is known."""
        return self.length < math.inf

    @property
    def end(self) -> tuple[float, bool]:
        """The step after which nothing changes, infinity if it is unknown, and whether the allocation freezes then."""
        length = self.length / self.optimizers
        share = self.freeze_after if isinstance(self.freeze_after, float) else 1.0
        length, freeze = length - self.before, share * length - self.before
        if isinstance(self.freeze_after, int):
            freeze = self.freeze_after
        return min(freeze, length), self.freeze_after is not None and freeze <= length and freeze < math.inf


def check_freeze(freeze_after: int | float | None) -> None:
    """Check when the allocation is to freeze.

    Raises:
        ValueError: If it is neither a fraction nor a number of steps, or could be both.
    """
    if freeze_after is None:
        return
    if type(freeze_after) is int and freeze_after == 1:
        raise ValueError(
            "`freeze_after` 1 could mean one step or the whole training: write 1.0 for the whole training, or a number "
            "of steps from 2 on."
        )
    number = isinstance(freeze_after, int | float) and not isinstance(freeze_after, bool)
    if not number or not (freeze_after > 1 if isinstance(freeze_after, int) else 0 < freeze_after <= 1):
        raise ValueError(
            "`freeze_after` must be a fraction of the training in (0, 1], a number of steps from 2 on, or None, got "
            f"{freeze_after!r}."
        )


def length_of(trainer: Trainer) -> float:
    """Return the number of steps of all optimizers in the whole training; infinity if it is unknown."""
    limit = math.inf if trainer.max_steps == -1 else trainer.max_steps
    # The estimate is for one optimizer, and -1 if the data have no length.
    estimate = trainer.estimated_stepping_batches
    return limit if estimate == -1 else min(limit, estimate * len(trainer.optimizers))
