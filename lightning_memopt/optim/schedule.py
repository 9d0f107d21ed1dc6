"""A learning rate that warms up, and then falls until the end of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_memopt._registry import unknown

# How much of the decay is left, from 1 to 0, when a share of the steps after the warm-up is done.
DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
# What a run continues with. All else is what the code says now, so a resumed run can be longer than it was.
_STATE = ("base_lrs", "last_epoch", "_step_count", "_last_lr")


class WarmupSchedule(LRScheduler):
    """Raise every group's learning rate linearly to its full value, then lower it. Call ``step`` after every step.

    ``MemOptCLI`` takes ``total_steps`` from the trainer. Elsewhere, pass it; a Trainer steps the schedule per epoch
    unless ``configure_optimizers`` returns it with ``"interval": "step"``. The learning rate depends on nothing but
    the step, so resumed runs continue the schedule; they may change its settings.

    Args:
        optimizer: Any optimizer.
        warmup_steps: Number of steps below the full learning rate. Step ``n``, counted from 1, has the fraction
            ``n / (warmup_steps + 1)``.
        decay: ``cosine``, ``linear``, or ``constant``, which keeps the full learning rate.
        final: The learning rate at the end, as a fraction of the full one. ``constant`` does not use it.
        total_steps: Number of steps of the whole training, warm-up included. ``constant`` does not need it.
        last_epoch: As in torch's schedulers: the last step that was taken, or -1.

    Raises:
        TypeError: If a number of steps is not an integer.
        ValueError: If a value is out of range, or ``step`` is called while the length of a decay is unknown.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = WarmupSchedule(optimizer, 1, "linear", final=0.0, total_steps=5)
        >>> for _ in range(5):
        ...     print(schedule.get_last_lr())
        ...     optimizer.step()
        ...     schedule.step()
        [0.5]
        [1.0]
        [0.75]
        [0.5]
        [0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        decay: Literal["cosine", "linear", "constant"] = "cosine",
        *,
        final: float = 0.1,
        total_steps: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        for name, value in (("warmup_steps", warmup_steps), ("total_steps", 1 if total_steps is None else total_steps)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be a number of steps, not a share of them, got {value!r}.")
        if warmup_steps < 0:
            raise ValueError(f"`warmup_steps` must not be negative, got {warmup_steps}.")
        if decay not in DECAYS:
            raise ValueError(unknown("decay", decay, list(DECAYS)))
        if not 0 <= final <= 1:
            raise ValueError(f"`final` must be between 0 and 1, got {final}.")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"`total_steps` must be at least 1, or None, got {total_steps}.")
        self.warmup_steps, self.decay, self.final = warmup_steps, decay, final
        if total_steps is not None:
            self.total_steps = total_steps  # accelerate compares it with a count wherever there is such an attribute
        super().__init__(optimizer, last_epoch)

    @property
    def needs_total_steps(self) -> bool:
        """Whether the length of training is needed and not known yet."""
        return self._total is None and self.decay != "constant"

    @property
    def _total(self) -> int | None:
        return getattr(self, "total_steps", None)

    def factor(self, step: int) -> float:
        """Return the fraction of the full learning rate in a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        total = self._total
        if total is None or total <= self.warmup_steps:
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / (total - self.warmup_steps))
        left = DECAYS[self.decay](done)
        return left if self.decay == "constant" else self.final + (1 - self.final) * left

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of every group. Groups that were added later follow the schedule, too."""
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            rate = group["lr"]
            # A tensor is changed in place.
            rate = rate.clone() if isinstance(rate, Tensor) else rate
            self.base_lrs.append(group.setdefault("initial_lr", rate))
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rates of the next step."""
        if self._step_count and self.needs_total_steps:
            raise ValueError(
                f"WarmupSchedule does not know how long its {self.decay} decay is: pass `total_steps`, the number of "
                "optimizer steps. lightning_memopt.MemOptCLI takes it from the trainer."
            )
        super().step(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule and the full learning rates, without the settings."""
        return {key: getattr(self, key) for key in _STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a position, with the settings of now: if they have changed, so has the next learning rate.

        Raises:
            ValueError: If the schedule was saved with more parameter groups than the optimizer has.
        """
        groups = self.optimizer.param_groups
        if len(state_dict["base_lrs"]) > len(groups):
            raise ValueError(
                f"The schedule was saved with {len(state_dict['base_lrs'])} parameter groups, the optimizer has "
                f"{len(groups)}: add the missing groups before you load the schedule."
            )
        super().load_state_dict(state_dict)
        rates = self.get_lr()
        # Equal rates are left alone: another schedule, as in SequentialLR, may be the one that sets them now.
        if self.needs_total_steps or rates == self._last_lr:
            return
        self._last_lr = rates
        for group, rate in zip(groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
