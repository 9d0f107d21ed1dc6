"""Compile the kernels for an H100, which needs no GPU: the interpreter accepts more than the compiler does."""

from __future__ import annotations

import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_memopt.kernels import tiles
from lightning_memopt.kernels.jit_apply import apply_kernel
from lightning_memopt.kernels.jit_project import project_kernel

HOPPER = GPUTarget("cuda", 90, 32)
FLOATS = ("keep", "scale", "step", "limit", "correction", "eps", "largest")
TABLES = ("table", "weights", "base", "bases", "hits", "lost")
VALUES = ("right", "product", "row_sums", "column_sums", "left", "first", "second")
PROJECT = {"ALIGNED": True, "PRODUCT": True, "ROWS": True, "COLUMNS": True, "PRECISION": "ieee"}
APPLY: dict[str, Any] = {"ALIGNED": True, "FACTORS": True, "BOUNDED": True, "COUNTED": True, "CHECKED": False}
APPLY |= {"NOISY": False, "PRECISION": "ieee", "FIRST": tl.float32, "SECOND": tl.float32}


def compiled(kernel: Any, constants: dict[str, Any], tile: tiles.Tile, tables: tuple[str, ...] = ()) -> Any:
    """Compile for contiguous matrices whose sizes are multiples of 16."""
    names = kernel.arg_names
    types = dict.fromkeys(names, "i32") | dict.fromkeys(FLOATS, "fp32")
    types |= dict.fromkeys((*TABLES, *tables), "*i64")
    types |= dict.fromkeys((name for name in VALUES if name not in tables), "*fp32")
    inner = constants | {"BLOCK_M": tile.m, "BLOCK_N": tile.n}
    inner |= dict.fromkeys(("stride_n", "right_r", "weight_n", "base_n", "left_q", "right_n"), 1)
    inner |= {"BLOCK_R": tile.inner} if kernel is project_kernel else {"BLOCK_Q": tile.inner}
    inner = {name: value for name, value in inner.items() if name in names}
    signature = {name: "constexpr" if name in inner else types[name] for name in names}
    sixteen = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name] == "i32" or signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in inner.items()}, sixteen)
    return triton.compile(source, target=HOPPER, options={"num_warps": tile.warps, "num_stages": tile.stages})


def main() -> None:
    """Compile one kernel of every sort, and require wide loads and copies that run ahead."""
    half = tl.bfloat16
    project = compiled(project_kernel, PROJECT | {"ELEMENT": half}, tiles.of_project(4096, 64))
    alone = compiled(project_kernel, PROJECT | {"ELEMENT": half, "PRODUCT": False}, tiles.of_project(4096, 0))
    assert "cp.async" in project.asm["ptx"]
    weights = APPLY | {"WEIGHT": half, "BASE": half}
    factored = weights | {"FIRST_HOW": "row", "SECOND_HOW": "column"}
    update = compiled(apply_kernel, factored, tiles.of_apply(4096, 4096, 64))
    dense = weights | {"FIRST_HOW": "full", "SECOND_HOW": "none", "FACTORS": False, "CHECKED": True, "NOISY": True}
    noisy = compiled(apply_kernel, dense, tiles.of_apply(4096, 4096, 0), tables=("first",))
    runs = weights | {"FIRST_HOW": "run", "SECOND_HOW": "none", "FACTORS": False, "WEIGHT": tl.float16}
    compiled(apply_kernel, runs, tiles.of_apply(4096, 4096, 0))
    for kernel in (alone, update, noisy):
        assert "ld.global.v4.b32" in kernel.asm["ptx"]


if __name__ == "__main__":
    sys.exit(main())
