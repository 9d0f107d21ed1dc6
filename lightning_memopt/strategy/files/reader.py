"""Let torch's distributed checkpointing read an opened directory: open no file twice, allow no unsafe object."""

from __future__ import annotations

import os
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, Metadata, StorageReader
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future
from typing_extensions import override

from lightning_memopt.strategy.files.opened_directory import OpenedDirectory
from lightning_memopt.strategy.files.opened_file import naming
from lightning_memopt.strategy.files.places import inside


class OpenedReader(StorageReader):
    """Reads from open files. ``FileSystemReader`` would open them by name again."""

    def __init__(self, opened: OpenedDirectory) -> None:
        """Read from ``opened``."""
        self._opened = opened

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._opened.index

    @override
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @override
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    @override
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @override
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                name = self._opened.index.storage_data[item.storage_index].relative_path
                with naming(inside(self._opened.path, name)):
                    planner.load_bytes(item, self._opened.stream(item.storage_index))  # type: ignore[arg-type]
                continue
            value = self._opened.tensor(item.storage_index)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                value = value.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(value)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @override
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class CheckedLoadPlanner(DefaultLoadPlanner):
    """torch's planner, except that objects are read with ``torch.load``: the default unpickles any object."""

    def __init__(self, weights_only: bool | None) -> None:
        """Use ``weights_only`` as in ``torch.load``."""
        super().__init__()
        self._weights_only = weights_only

    @override
    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, torch.load(value, weights_only=self._weights_only))
