"""Kind and rank of every block's momentum over the steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.figures.heat_map import ABSENT, DENSE, RANK, heat_map
from lightning_memopt.memory.snapshot import BlockFacts, Snapshot
from lightning_memopt.metrics.base import Axes, SnapshotMetric, checked

UNKNOWN = -1


def momentum_allocation(snapshot: Snapshot) -> dict[str, tuple[str, int]]:
    """Return the kind and rank of every block's momentum, by block name.

    Returns:
        Kind and rank by name.

        - ``<block>``: Rank of its momentum: 0 for none, the block's smaller dimension for dense momentum, and -1 for
          state of another package's optimizer whose rank is unknown.

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
    """Kind and rank of every block's momentum over the steps at which snapshots were taken.

    A snapshot in which no block has changed only extends the last entry, so the history grows with the number of
    changes. A snapshot of an earlier step, as after a restart from a checkpoint, removes later entries. All processes
    have the same plan and must make the same updates. The history is part of the metric's ``state_dict``.
    :meth:`.SnapshotMetric.plot` draws the ranks of all matrices over the steps as a heat map.

    Attributes:
        steps: The first step of each entry, ``[entries]``.

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
        """Add a snapshot to the history.

        Raises:
            ValueError: If there is no state, or the snapshot is from a job of another size.
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
        """Return the ranks of every block, ``[entries]`` (a number if there is one entry).

        -1 stands for a block that did not exist yet, or whose rank is unknown.
        """
        return {name: self.ranks[:, column] for column, name in self._columns()}

    def kinds(self) -> dict[str, list[str]]:
        """Return the momentum kinds of every block, one per entry; an empty string if the block did not exist yet."""
        names = [*self._kinds, ""]
        return {name: [names[code] for code in self.kind_codes[:, column].tolist()] for column, name in self._columns()}

    def _draw(self, val: Mapping[str, Tensor], ax: Axes) -> None:
        """Draw the current ranks. Raises ValueError if there is no matrix."""
        kinds, drawn = self.kinds(), set(self._drawn)
        table = {
            name: [_shown(*pair) for pair in zip(kinds[name], ranks.reshape(-1).tolist(), strict=True)]
            for name, ranks in val.items()
            if name in drawn
        }
        partial = dict.fromkeys(kind for name in table for kind in kinds[name] if kind not in ("dense", "none", ""))
        label = f"{RANK} ({', '.join(partial)})" if partial else RANK
        heat_map(ax, self.steps.tolist(), table, until=int(self.until), label=label, title="Momentum of every matrix")

    def _columns(self) -> list[tuple[int, str]]:
        """Return column and name of the blocks in the history. Names outlive a reset, because forward() requires it."""
        known = (self.kind_codes != UNKNOWN).any(0).tolist()
        return [(column, name) for column, name in enumerate(self._names[: len(known)]) if known[column]]

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks."""
        return [name for _, name in self._columns()]

    @property
    def matrices(self) -> list[str]:
        """Names of the blocks that are not vectors, which :meth:`.SnapshotMetric.plot` draws."""
        drawn = set(self._drawn)
        return [name for name in self.blocks if name in drawn]

    def get_extra_state(self) -> dict[str, list[str]]:
        """Return the names of the columns and codes in the state."""
        return {"blocks": list(self._names), "matrices": list(self._drawn), "kinds": list(self._kinds)}

    def set_extra_state(self, state: dict[str, list[str]]) -> None:
        """Load the result of :meth:`get_extra_state`."""
        self._computed = None  # cached for the previous history
        self._names, self._drawn, self._kinds = (list(state[key]) for key in ("blocks", "matrices", "kinds"))

    def _row(self, table: Tensor, count: int) -> list[int]:
        """Return row ``count - 1``, padded to the current number of blocks."""
        row = table[count - 1].tolist()
        return row + [UNKNOWN] * (len(self._names) - len(row))

    def _with_row(self, table: Tensor, row: list[int]) -> Tensor:
        wide = torch.full((len(table) + 1, len(row)), UNKNOWN, device=self.device)
        wide[:-1, : table.shape[1]] = table
        wide[-1] = torch.tensor(row, device=self.device)
        return wide


def _extend(names: list[str], more: Iterable[str]) -> None:
    """Append new names in order."""
    known = set(names)
    names += dict.fromkeys(name for name in more if name not in known)


def _shown(kind: str, rank: int) -> float:
    """Return a block's value in the heat map."""
    return DENSE if kind == "dense" else ABSENT if rank == UNKNOWN else rank


def _rank(block: BlockFacts) -> int:
    if block.momentum == "none":
        return 0
    if block.rank is not None:
        return block.rank
    return block.full_rank if block.momentum == "dense" else UNKNOWN
