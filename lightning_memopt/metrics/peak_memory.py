"""The parts of peak memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.figures.bars import bars
from lightning_memopt.memory.rows import HELD, PASSING, PEAK, REST, ROWS
from lightning_memopt.memory.snapshot import Snapshot
from lightning_memopt.metrics.base import Axes, SnapshotMetric, checked


def peak_memory(snapshot: Snapshot) -> dict[str, int]:
    """Return the peak of one process's memory and its parts, in bytes.

    Args:
        snapshot: A snapshot of this process that includes a module: ``take_snapshot(optimizer, module)``.

    Returns:
        Bytes by name.

        - ``peak``: On a GPU, the most that tensors took at a time (``torch.cuda.max_memory_allocated``); on a CPU, the
          largest resident set of the process. The others are its parts.
        - ``parameters``: Parameters of the module.
        - ``gradients``: Gradients that exist when the snapshot is taken, for example before an optimizer step; if they
          are released, the most that existed at a time.
        - ``buffers``: Buffers of the module.
        - ``optimizer_state``: Optimizer state, step counters included.
        - ``unsharded``: The most at a time of units that FSDP2 has gathered, prefetched ones too, their gradients
          before these are reduced, and the buffers of both, as :func:`~lightning_memopt.trace_step` found.
        - ``scratch``: The most at a time of temporaries of the optimizers' updates, as it found.
        - ``rest``: The peak minus the other parts, of ``unsharded`` and ``scratch`` the larger: activations, other
          temporaries and memory of the allocator, and on a CPU the interpreter and libraries. With gradient release,
          when both exist at a time, it includes the smaller of the two.

    Raises:
        ValueError: If the snapshot does not include a module.

    Example:
        >>> import torch, lightning_memopt as lm
        >>> model = torch.nn.Linear(100, 10)
        >>> optimizer = lm.MemOpt(model.named_parameters(), recipe="adamw")
        >>> found = peak_memory(lm.take_snapshot(optimizer, model))
        >>> found["parameters"], found["gradients"], found["optimizer_state"]
        (4040, 0, 8088)
        >>> found["unsharded"], found["scratch"]
        (0, 0)
    """
    *parts, peak = _sizes(snapshot)
    return _parts(parts, peak)


class PeakMemory(SnapshotMetric):
    """Peak memory and its parts, each the maximum over all snapshots and processes.

    Names are those of :func:`peak_memory`. ``rest`` is the maximum peak minus the other maxima.

    Args:
        **kwargs: As in ``torchmetrics.Metric``.

    Example:
        >>> import torch, lightning_memopt as lm
        >>> model = torch.nn.Linear(100, 10)
        >>> optimizer = lm.MemOpt(model.named_parameters(), recipe="adamw")
        >>> metric = PeakMemory()
        >>> metric.update(lm.take_snapshot(optimizer, model))
        >>> model(torch.ones(1, 100)).sum().backward()
        >>> metric.update(lm.take_snapshot(optimizer, model))
        >>> int(metric.compute()["gradients"])
        4040
    """

    higher_is_better = False

    most: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("most", torch.zeros(len(ROWS) + 1, dtype=torch.int64), dist_reduce_fx="max")

    def update(self, snapshot: Snapshot) -> None:
        """Update the maximum of every part with a snapshot.

        Raises:
            ValueError: If the snapshot does not include a module, or is from a job of another size.
        """
        sizes = torch.tensor(_sizes(checked(snapshot, state=False)), device=self.device)
        self.most = torch.maximum(self.most, sizes)

    def compute(self) -> dict[str, Tensor]:
        """Return all numbers by name, in bytes."""
        *parts, peak = self.most.tolist()
        return {name: torch.tensor(size, device=self.device) for name, size in _parts(parts, peak).items()}

    def _draw(self, val: Mapping[str, Tensor], ax: Axes) -> None:
        """Draw the parts as bars."""
        sizes = {text: float(val[name]) for name, text in {**ROWS, REST: REST, PEAK: PEAK}.items()}
        bars(ax, {"": sizes}, "Peak memory of one rank")


def _sizes(snapshot: Snapshot) -> list[int]:
    memory = snapshot.memory
    if memory is None:
        raise ValueError(
            "The snapshot contains only the optimizer's state: take it with the model, "
            "`lightning_memopt.take_snapshot(optimizer, model)`."
        )
    state = snapshot.local_bytes + snapshot.counter_bytes
    return [memory.parameters, memory.gradients, memory.buffers, state, memory.unsharded, memory.scratch, memory.peak]


def _parts(parts: Sequence[int], peak: int) -> dict[str, int]:
    found = dict(zip(ROWS, parts, strict=True))
    rest = peak - sum(found[name] for name in HELD) - max(found[name] for name in PASSING)
    return {PEAK: peak, **found, REST: max(0, rest)}
