"""What every launch of a kernel needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def element(dtype: torch.dtype) -> Any:
    """Return Triton's name of a dtype."""
    import triton.language as tl

    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return {**names, torch.int8: tl.int8, torch.int16: tl.int16}[dtype]


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a launch goes to the device. Triton itself takes the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
