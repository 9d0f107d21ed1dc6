"""Which rank writes what of a distributed checkpoint."""

from __future__ import annotations

from dataclasses import replace

from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.planner import WriteItemType
from typing_extensions import override


class FirstRankPlanner(DefaultSavePlanner):
    """Writes what is not sharded from the first rank, and every shard from one of the ranks that hold it.

    The default takes each tensor from whichever rank has least to write. For plain tensors that differ between ranks,
    such as running statistics, that is a mixture which no rank has ever had. (``dedup_save_to_lowest_rank`` cures that,
    but leaves all shards of a replicated model to the first replica.)
    """

    @override
    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        if self.is_coordinator:
            return plan
        self.plan = replace(plan, items=[item for item in plan.items if item.type == WriteItemType.SHARD])
        return self.plan
