"""Memory behind tensors, counted by storage, since tensors may share storages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

# The public namesakes of some of these fail on uncoalesced tensors.
_SPARSE: dict[torch.layout, tuple[str, ...]] = {torch.sparse_coo: ("_indices", "_values")}
_SPARSE |= dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values"))
_SPARSE |= dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values"))


class Storages:
    """Counts the bytes behind tensors, each storage only once.

    A view keeps its whole storage alive, so the whole storage counts. For a DTensor, or another wrapper of tensors,
    the inner tensors on this process count.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def count(self, tensors: Iterable[Tensor]) -> int:
        """Return the bytes behind tensors, without storages that this object has counted before."""
        total = 0
        for tensor in tensors:
            for plain in inner_tensors(tensor):
                storage = plain.untyped_storage()
                if storage._cdata not in self._seen:  # works on the meta device, where storages have no address
                    self._seen.add(storage._cdata)
                    total += storage.nbytes()
        return total


def storages_of(tree: Any) -> list[torch.UntypedStorage]:
    """Return the storages behind all tensors in containers."""
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return [plain.untyped_storage() for leaf in leaves for plain in inner_tensors(leaf)]


def inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors in which a tensor keeps its values."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):  # a DTensor also lists its mesh
                yield from inner_tensors(part)
    elif tensor.layout is torch.strided:
        yield tensor
    else:
        yield from (getattr(tensor, name)() for name in _SPARSE[tensor.layout])
