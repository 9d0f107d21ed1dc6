"""Which momentum every block has, over the steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.memory.snapshot import BlockFacts, Snapshot
from lightning_memopt.metrics.base import Axes, SnapshotMetric, checked
from lightning_memopt.metrics.heat_map import heat_map

UNKNOWN = -1


def momentum_allocation(snapshot: Snapshot) -> dict[str, tuple[str, int]]:
    """Return kind and rank of every block's momentum, by the block's name.

    The rank of no momentum is 0, that of dense momentum the short side of the block, and -1 stands for a kind of
    another package's optimizer whose rank is not known.

    Example:
        >>> import torch, lightning_memopt as lm
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 64), "lm_head": torch.nn.Linear(64, 1000)})
        >>> none = {"q_proj.weight": {"momentum": "none"}}
        >>> optimizer = lm.AdaPMLean(model.named_parameters(), rank=8, overrides=none)
        >>> allocation = momentum_allocation(optimizer.snapshot())
        >>> allocation["q_proj.weight"], allocation["lm_head.weight"], allocation["lm_head.bias"]
        (('none', 0), ('low_rank', 8), ('dense', 1))
    """
    return {block.name: (block.momentum, _rank(block)) for block in snapshot.blocks}


class MomentumAllocation(SnapshotMetric):
    """Kind and rank of every block's momentum, over the steps at which snapshots were taken.

    A snapshot in which no block has changed only moves the end of the last entry on: the history is as long as the
    number of changes. One of an earlier step, as after a restart from a checkpoint, takes back what came later. All
    processes have the same plan and must be updated alike. The history is part of the metric's ``state_dict``.
    :meth:`plot` draws the ranks of all matrices over the steps as a heat map.

    Attributes:
        steps: The steps since which the entries hold, ``[entries]``.

    Args:
        **kwargs: As in ``torchmetrics.Metric``.

    Example:
        >>> import torch, lightning_memopt as lm
        >>> model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(64, 1000, bias=False)})
        >>> optimizer, metric = lm.AdaPMLean(model.named_parameters(), rank=8), MomentumAllocation()
        >>> metric.update(optimizer.snapshot())
        >>> model["lm_head"](torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.reformat({"lm_head.weight": {"rank": 2}})
        >>> metric.update(optimizer.snapshot())
        >>> metric.compute()["lm_head.weight"].tolist(), metric.steps.tolist()
        ([8, 2], [0, 1])
        >>> metric.kinds()["lm_head.weight"]
        ['low_rank', 'low_rank']
    """

    steps: Tensor
    ranks: Tensor
    kind_codes: Tensor
    until: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._names: list[str] = []
        self._drawn: list[str] = []
        self._kinds: list[str] = []
        same: dict[str, Any] = {"dist_reduce_fx": "max", "persistent": True}
        self.add_state("steps", torch.zeros(0, dtype=torch.int64), **same)
        self.add_state("ranks", torch.zeros(0, 0, dtype=torch.int64), **same)
        self.add_state("kind_codes", torch.zeros(0, 0, dtype=torch.int64), **same)
        self.add_state("until", torch.tensor(0), **same)

    def update(self, snapshot: Snapshot) -> None:
        """Take a snapshot.

        Raises:
            ValueError: If there is no state, or it is from a job of another size.
        """
        found = momentum_allocation(checked(snapshot))
        _extend(self._names, found)
        _extend(self._drawn, (block.name for block in snapshot.blocks if block.role != "vector"))
        _extend(self._kinds, (kind for kind, _ in found.values()))
        absent = ("", UNKNOWN)
        ranks = [found.get(name, absent)[1] for name in self._names]
        codes = [self._kinds.index(found[name][0]) if name in found else UNKNOWN for name in self._names]
        self.until = torch.tensor(snapshot.step, device=self.device)
        earlier = int((self.steps < snapshot.step).sum())
        if earlier and self._row(self.ranks, earlier) == ranks and self._row(self.kind_codes, earlier) == codes:
            self.steps, self.ranks, self.kind_codes = (
                table[:earlier] for table in (self.steps, self.ranks, self.kind_codes)
            )
            return
        self.steps = torch.cat([self.steps[:earlier], self.until[None]])
        self.ranks = self._with_row(self.ranks[:earlier], ranks)
        self.kind_codes = self._with_row(self.kind_codes[:earlier], codes)

    def compute(self) -> dict[str, Tensor]:
        """Return the ranks of every block, ``[entries]`` (a number where there is one entry).

        -1 stands for a block that was not there yet, or whose rank is not known.
        """
        return {name: self.ranks[:, column] for column, name in self._columns()}

    def kinds(self) -> dict[str, list[str]]:
        """Return the momentum kinds of every block, one per entry; empty where the block was not there yet."""
        names = [*self._kinds, ""]
        return {name: [names[code] for code in self.kind_codes[:, column].tolist()] for column, name in self._columns()}

    def _draw(self, val: Mapping[str, Tensor], ax: Axes) -> None:
        """Draw the ranks of the metric as it is now; raises ValueError if there is no matrix."""
        kinds, drawn = self.kinds(), set(self._drawn)
        table = {
            f"{name}  {kinds[name][-1]}": ranks.reshape(-1).tolist() for name, ranks in val.items() if name in drawn
        }
        heat_map(ax, self.steps.tolist(), table, until=int(self.until))

    def _columns(self) -> list[tuple[int, str]]:
        """Return place and name of the blocks that the history knows: names outlive a reset, as forward() needs it."""
        known = (self.kind_codes != UNKNOWN).any(0).tolist()
        return [(column, name) for column, name in enumerate(self._names[: len(known)]) if known[column]]

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks."""
        return [name for _, name in self._columns()]

    @property
    def matrices(self) -> list[str]:
        """Names of the blocks that are no vectors: what :meth:`plot` draws."""
        drawn = set(self._drawn)
        return [name for name in self.blocks if name in drawn]

    def get_extra_state(self) -> dict[str, list[str]]:
        """Return the names that the numbers in the state stand for."""
        return {"blocks": list(self._names), "matrices": list(self._drawn), "kinds": list(self._kinds)}

    def set_extra_state(self, state: dict[str, list[str]]) -> None:
        """Take what :meth:`get_extra_state` returned."""
        self._computed = None  # that of the history before
        self._names, self._drawn, self._kinds = (list(state[key]) for key in ("blocks", "matrices", "kinds"))

    def _row(self, table: Tensor, count: int) -> list[int]:
        """Return the last of ``count`` rows, as long as there are blocks now."""
        row = table[count - 1].tolist()
        return row + [UNKNOWN] * (len(self._names) - len(row))

    def _with_row(self, table: Tensor, row: list[int]) -> Tensor:
        wide = torch.full((len(table) + 1, len(row)), UNKNOWN, device=self.device)
        wide[:-1, : table.shape[1]] = table
        wide[-1] = torch.tensor(row, device=self.device)
        return wide


def _extend(names: list[str], more: Iterable[str]) -> None:
    """Add the names that are new, in their order."""
    known = set(names)
    names += dict.fromkeys(name for name in more if name not in known)


def _rank(block: BlockFacts) -> int:
    if block.momentum == "none":
        return 0
    if block.rank is not None:
        return block.rank
    return block.full_rank if block.momentum == "dense" else UNKNOWN
