"""What goes over the wire: every collective, how often and how many bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts collectives by name, and the bytes of their largest operand: the whole tensor that is gathered or reduced.

    Attributes:
        calls: Name of the operation → how often it was called.
        nbytes: Name of the operation → bytes.
        dtensor_calls: Name of an operation on DTensors → how often it was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()
        self.dtensor_calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            self.dtensor_calls[func._schema.name] += 1
        namespace, name = func._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "barrier"):
            sizes = [leaf.nbytes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.calls[name.strip("_")] += 1
            self.nbytes[name.strip("_")] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))

    def total(self) -> int:
        """Return the number of collectives."""
        return self.calls.total()
