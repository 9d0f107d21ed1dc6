"""A tensor that is made of two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TwoParts(torch.Tensor):
    """A wrapper subclass that keeps its values in two tensors, as quantised optimizer state does."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> TwoParts:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> TwoParts:
        return TwoParts(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} looks at the values")
