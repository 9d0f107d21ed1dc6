"""Memory behind tensors, counted where it is held: in storages, which tensors may share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Not all of their public namesakes work on tensors that are not coalesced.
_SPARSE: dict[torch.layout, tuple[str, ...]] = {torch.sparse_coo: ("_indices", "_values")}
_SPARSE |= dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values"))
_SPARSE |= dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values"))


class Storages:
    """Counts the bytes behind tensors; a storage that was counted before counts no more.

    A view keeps all of its storage alive, so all of it counts. Of a DTensor, or another tensor that wraps tensors,
    what this process holds inside of it counts.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def count(self, tensors: Iterable[Tensor]) -> int:
        """Return the bytes behind tensors that this object has not counted yet."""
        total = 0
        for tensor in tensors:
            for plain in _inner(tensor):
                storage = plain.untyped_storage()
                if storage._cdata not in self._seen:  # also on the meta device, where no storage has an address
                    self._seen.add(storage._cdata)
                    total += storage.nbytes()
        return total


def _inner(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors in which a tensor keeps its values."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):  # a DTensor also lists its mesh
                yield from _inner(part)
    elif tensor.layout is torch.strided:
        yield tensor
    else:
        yield from (getattr(tensor, name)() for name in _SPARSE[tensor.layout])
