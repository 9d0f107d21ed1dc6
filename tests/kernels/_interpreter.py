"""Triton's interpreter, which runs kernels on tensors in the CPU's memory. ``test_kernels`` sets TRITON_INTERPRET."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime import interpreter

from tests.kinds.contract.cases import gradient

_patch = interpreter._patch_lang_tensor


def _patched(tensor: Any, scope: Any) -> None:
    """The interpreter holds a number as an array of one element, and NumPy since 2.4 makes no index of it."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patched

LAYOUTS = ("plain", "transposed", "strided", "unaligned")


def matrices(b: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "plain", seed: int = 0) -> list[Tensor]:
    """Return tensors ``[..., m, n]`` that lie in memory as ``layout`` says."""
    return [_laid_out(gradient(shape, seed + part, dtype), layout) for part in range(b)]


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    *stack, m, n = tensor.shape
    if layout == "transposed":
        place = tensor.new_empty(*stack, n, m).mT
    elif layout == "strided":
        place = tensor.new_empty(*stack, 2 * m, 3 * n)[..., ::2, ::3]
    elif layout == "unaligned":
        place = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    else:
        return tensor
    return place.copy_(tensor)
