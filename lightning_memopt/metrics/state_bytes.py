"""Bytes of optimizer state by part, role and kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.figures.bars import bars
from lightning_memopt.kinds.momentum import MOMENTA
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS
from lightning_memopt.memory.snapshot import BlockFacts, Snapshot
from lightning_memopt.metrics.base import Axes, SnapshotMetric, checked, no_state
from lightning_memopt.plans.roles import ROLES

PARTS = ("momentum", "projections", "second_moment", "other")


def optimizer_state_bytes(snapshot: Snapshot) -> dict[str, int]:
    """Return the bytes of optimizer state that one process holds, with each storage counted once.

    Args:
        snapshot: A snapshot of this process.

    Returns:
        Bytes by name.

        - ``total``: All state, step counters included. The next five are its parts.
        - ``momentum``: Momentum, without projections.
        - ``projections``: Bases of the subspaces that momentum is projected on.
        - ``second_moment``: Second moments.
        - ``other``: All other state, such as the extra bits of bfloat16 weights.
        - ``counters``: Step counters.
        - ``role/<role>``: State of the blocks of a role, without counters.
        - ``kind/momentum/<kind>``: Momentum and projections of the blocks with a momentum kind.
        - ``kind/second_moment/<kind>``: Second moments of the blocks with a second-moment kind.

    Example:
        >>> import torch, lightning_memopt as lm
        >>> model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(1000, 64)})
        >>> optimizer = lm.AdaPMLean(model.named_parameters(), rank=2)
        >>> sizes = optimizer_state_bytes(optimizer.snapshot())
        >>> {name: sizes[name] for name in ("momentum", "second_moment", "counters", "total")}
        {'momentum': 8512, 'second_moment': 4256, 'counters': 4, 'total': 12772}
    """
    blocks = snapshot.blocks
    parts = {part: sum(getattr(block.local, part) for block in blocks) for part in PARTS}
    found = {"total": sum(parts.values()) + snapshot.counter_bytes, **parts, "counters": snapshot.counter_bytes}
    for role in ROLES:
        found[f"role/{role}"] = sum(block.local_bytes for block in blocks if block.role == role)
    for kind in _kinds(MOMENTA.names()):
        found[f"kind/momentum/{kind}"] = sum(_momentum(block) for block in blocks if block.momentum == kind)
    for kind in _kinds(SECOND_MOMENTS.names()):
        held = (block.local.second_moment for block in blocks if block.second_moment == kind)
        found[f"kind/second_moment/{kind}"] = sum(held)
    return found


class OptimizerStateBytes(SnapshotMetric):
    """Bytes of optimizer state over all processes.

    As :func:`optimizer_state_bytes`, summed over all processes. Replicated state counts once per process. In addition:

    - ``rank``: The ``total`` of the process that holds most.
    - ``global``: One full copy of the state, without counters.

    Under ``memopt_fsdp``, the local parts of all ranks add up to ``global``. Under DDP, every rank holds all state.

    Args:
        **kwargs: As in ``torchmetrics.Metric``.

    Example:
        >>> import torch, lightning_memopt as lm
        >>> model = torch.nn.TransformerEncoderLayer(64, 4, 256)
        >>> metric = OptimizerStateBytes()
        >>> metric.update(lm.AdaPMLean(model.named_parameters()).snapshot())
        >>> {name: int(metric.compute()[name]) for name in ("total", "rank", "role/value")}
        {'total': 29744, 'rank': 29744, 'role/value': 2560}
    """

    higher_is_better = False
    lines = ("total", *PARTS)

    held: Tensor
    most: Tensor
    whole: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._keys = list(optimizer_state_bytes(Snapshot(())))
        self.add_state("held", torch.zeros(len(self._keys), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("most", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("whole", torch.tensor(0), dist_reduce_fx="max")

    def update(self, snapshot: Snapshot) -> None:
        """Replace the last snapshot.

        Raises:
            ValueError: If there is no state, or the snapshot is from a job of another size.
        """
        sizes = optimizer_state_bytes(checked(snapshot))
        self.held = torch.tensor([sizes[key] for key in self._keys], device=self.device)
        self.most = torch.tensor(sizes["total"], device=self.device)
        self.whole = torch.tensor(snapshot.state_bytes, device=self.device)

    def compute(self) -> dict[str, Tensor]:
        """Return all numbers by name, in bytes.

        Raises:
            ValueError: If no process has any state.
        """
        if not self.held.any():
            raise no_state("on any process")
        return {**dict(zip(self._keys, self.held, strict=True)), "rank": self.most, "global": self.whole}

    def _draw(self, val: Mapping[str, Tensor], ax: Axes) -> None:
        """Draw the bytes by role and kind as bars."""
        groups = [
            ("role", {key.removeprefix("role/"): val[key] for key in val if key.startswith("role/")}),
            ("momentum", {key.rpartition("/")[2]: val[key] for key in val if key.startswith("kind/momentum/")}),
            ("second moment", {key.rpartition("/")[2]: val[key] for key in val if key.startswith("kind/second")}),
        ]
        sizes = {name: {key: float(x) for key, x in table.items() if x > 0} for name, table in groups}
        bars(ax, sizes, "Optimizer state of all ranks, by role and by kind")


def _momentum(block: BlockFacts) -> int:
    return block.local.momentum + block.local.projections


def _kinds(names: Iterable[str]) -> list[str]:
    """Return the kinds that a block may have: this package's, and "other" for other optimizers."""
    return [*names, "other"]
