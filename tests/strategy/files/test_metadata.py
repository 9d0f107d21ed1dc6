"""What an index of a directory may not contain."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("lightning.pytorch")

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_memopt.strategy.files.metadata import parse_metadata

SIZE = torch.Size([4])


def index(
    entry: Any = None,
    *,
    place: Any = ("state_dict", "weight"),
    part: Any = 0,
    info: Any = None,
    dtype: Any = torch.float32,
    layout: torch.layout = torch.strided,
    chunks: Any = None,
) -> Metadata:
    """Return an index of one tensor, in which something may be wrong."""
    chunks = [ChunkStorageMetadata(torch.Size([0]), SIZE)] if chunks is None else chunks
    properties = TensorProperties(dtype=dtype, layout=layout)
    entry = TensorStorageMetadata(properties, SIZE, chunks) if entry is None else entry
    where = MetadataIndex("weight", torch.Size([0]), part)
    return Metadata({"weight": entry}, {"weight": place}, {where: info or _StorageInfo("a.distcp", 0, 9)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (index(entry=BytesStorageMetadata()), "does not say which file holds 'weight'"),
        (index(entry=ChunkStorageMetadata(SIZE, SIZE)), "it has ChunkStorageMetadata in place of TensorStorageMeta"),
        (index(part="first"), "it numbers a part with 'first'"),
        (index(info=_StorageInfo("a.distcp", 0, 9, ["zstd"])), "'a.distcp' was written through the extensions"),
        (index(info=_StorageInfo("a.distcp", -1, 9)), "it places an entry of 'a.distcp' at -1 with the length 9"),
        (index(place=()), "it has a place without a name"),
        (index(layout=torch.sparse_coo), "a tensor has the layout 'torch.sparse_coo' and the memory format"),
        (index(dtype="float32"), "a tensor has no dtype"),
        (index(chunks=()), "'chunks' is not a list"),
        (Metadata([], {}, {}), "'state_dict_metadata' is not a mapping"),
        (Metadata({}, None, None), "it does not say where weights and optimizer states are"),
        (Metadata({5: BytesStorageMetadata()}, {}, {}), "it has 5 in place of a name"),
    ],
)
def test_an_index_says_what_is_wrong_with_it(content, message):
    with pytest.raises(ValueError, match=message):
        parse_metadata(pickle.dumps(content, protocol=4))


def test_an_index_cuts_a_tensor_into_a_grid(monkeypatch):
    halves = [ChunkStorageMetadata(torch.Size([at]), torch.Size([2])) for at in (0, 2)]
    monkeypatch.setattr("lightning_memopt.strategy.files.metadata._MOST_CELLS", 2)
    with pytest.raises(ValueError, match="it cuts a tensor into 2 parts that do not form a grid"):
        parse_metadata(pickle.dumps(index(chunks=halves), protocol=4))


def test_a_good_index_is_read():
    assert parse_metadata(pickle.dumps(index(), protocol=4)).planner_data == {"weight": ("state_dict", "weight")}
