"""Compile the kernels for an H100, which needs no GPU: the interpreter accepts more than the compiler does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lightning_memopt.kernels.apply import Denominator, Direction, Rates, Rounding, apply_
from lightning_memopt.kernels.project import project, rmatmul
from lightning_memopt.kernels.stack import Stack

B, M, N, R = 2, 1024, 512, 64
compiled: list[str] = []  # the assembly of every kernel


def compile_only(kernel: Any, grid: tuple[int, ...]) -> Any:
    """Return what takes the place of a launch."""
    return lambda *args, **options: compiled.append(kernel.warmup(*args, grid=grid, **options).asm["ptx"])


def parts(dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(M, N, dtype=dtype) for _ in range(B)]


def main() -> None:
    """Compile what a launch on an H100 would, and require loads that are wide, and copies that run ahead."""
    half, single = Stack.of(parts(torch.bfloat16)), Stack.of(parts(torch.float32))
    rows, columns = torch.empty(B, M, 1), torch.empty(B, 1, N)
    left, right = torch.empty(B, M, 2 * R), torch.empty(B, 2 * R, N)
    project(half, torch.empty(B, R, N).mT, rows=True, columns=True)
    rmatmul(torch.empty(B, M, R), single)
    assert all("cp.async" in assembly for assembly in compiled)
    project(half, torch.empty(B, N, 8 * R), precision="tf32")
    assert "mma" in compiled[-1]
    apply_(half, Direction(single, 1.0, left, right), Denominator((rows, columns)), Rates(1.0, 0.1, 1.0, counted=True))
    for rows_too, columns_too in ((True, True), (True, False), (False, True)):
        project(single, rows=rows_too, columns=columns_too)
    assert all("ld.global.v4.b32" in assembly for assembly in compiled[-3:])
    rounding = Rounding.of((1, 2), 0, (N, 1), ())
    apply_(half, Direction(half), Denominator((single,)), Rates(1.0, checked=True), rounding=rounding)
    assert all("ld.global.v4.b32" in assembly for assembly in compiled[-2:])
    apply_(single, Direction(half), Denominator((torch.empty(B, M, 8),), run=N // 8), Rates(1.0))
    low = Stack.of(parts(torch.int8))
    apply_(
        half, Direction(half), Denominator((single,)), Rates(1.0), factors=torch.empty(B), low=low, rounding=rounding
    )
    assert len(compiled) == 10


if __name__ == "__main__":
    target = GPUTarget("cuda", 90, 32)
    device = {"get_current_device": lambda: 0, "get_current_stream": lambda device: 0}
    driver.set_active(SimpleNamespace(get_current_target=lambda: target, **device))
    JITFunction.__getitem__ = compile_only
    main()
