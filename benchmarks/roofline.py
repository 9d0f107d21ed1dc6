"""Measure what the parts of a step cost by themselves, which bounds the time of a step from below.

    python benchmarks/roofline.py                  # under a minute
    python benchmarks/roofline.py --device cuda --output /tmp

Every part is a loop over matrices that do not fit into the cache together, with PyTorch's own functions and all memory
allocated before. A recipe's floor is the sum of the parts that its formula needs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _report import OUTPUT, markdown, provenance, show
from torch import Tensor

SHAPE, RANK, COUNT, REPEATS = (2048, 768), 24, 30, 7
CHUNK = 1024  # rows
FLOORS = {
    "adafactor (none x factored)": ("check", "rows", "columns", "update"),
    "rmsprop_sn (none x rows)": ("check", "rows", "update"),
    "adapm_lean (low rank x factored)": ("check", "rows", "columns", "G Sᵀ", "Gᵀ Q", "L R", "update"),
    "adam_snsm (subspace x rows), but refreshes": ("check", "rows", "G P", "X Pᵀ", "update"),
}
PARTS = {
    "check": "largest and smallest element",
    "rows": "norms of rows",
    "columns": "sums of squares of columns",
    "G Sᵀ": f"product with {RANK} columns",
    "Gᵀ Q": f"transposed product with {RANK} columns",
    "L R": f"product of rank {2 * RANK}",
    "G P": f"product with {4 * RANK} columns",
    "X Pᵀ": f"product of rank {4 * RANK}",
    "update": "divide, clamp, add to the weights",
    "fused AdamW": "torch.optim.AdamW(fused=True)",
}
HEAD = ["part", "what", "ns per parameter", "x fused AdamW"]


def parts(grads: list[Tensor], weights: list[Tensor]) -> dict[str, Callable[[], None]]:
    """Return a function for every part, which works on all matrices once."""
    (m, n), like = SHAPE, grads[0]
    rows, chunk, divisor = like.new_empty(m, 1), like.new_empty(CHUNK, n), like.new_ones(CHUNK, n)
    tall, wide, long = (
        {size: like.new_ones(*shape(size)) for size in (RANK, 2 * RANK, 4 * RANK)}
        for shape in (lambda size: (m, size), lambda size: (n, size), lambda size: (size, n))
    )

    def each(work: Callable[[Tensor, Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            for grad, weight in zip(grads, weights, strict=True):
                work(grad, weight)

        return run

    def chunks(work: Callable[[Tensor, Tensor, slice], object]) -> Callable[[], None]:
        slices = [slice(start, start + CHUNK) for start in range(0, m, CHUNK)]
        return each(lambda grad, weight: [work(grad[rows], weight[rows], rows) for rows in slices])

    def columns(grad: Tensor, _: Tensor) -> None:
        panel = torch.mul(grad[: CHUNK // 4], grad[: CHUNK // 4], out=chunk[: CHUNK // 4])
        for part in grad[CHUNK // 4 :].split(CHUNK // 4):
            panel.addcmul_(part, part)
        panel.sum(0)

    def update(grad: Tensor, weight: Tensor, _: slice) -> None:
        weight.add_(torch.div(grad, divisor, out=chunk).clamp_(-10, 10), alpha=-1e-9)

    def product(size: int) -> Callable[[], None]:
        return chunks(lambda _, __, rows: torch.mm(tall[size][rows], long[size], out=chunk))

    optimizer = torch.optim.AdamW([torch.nn.Parameter(weight.clone()) for weight in weights], fused=True)
    for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        param.grad = grad
    return {
        "check": each(lambda grad, _: torch.aminmax(grad)),
        "rows": each(lambda grad, _: torch.linalg.vector_norm(grad, dim=-1, keepdim=True, out=rows)),
        "columns": each(columns),
        "G Sᵀ": each(lambda grad, _: torch.mm(grad, wide[RANK], out=tall[RANK])),
        "Gᵀ Q": each(lambda grad, _: torch.mm(grad.mT, tall[RANK], out=wide[RANK])),
        "L R": product(2 * RANK),
        "G P": each(lambda grad, _: torch.mm(grad, wide[4 * RANK], out=tall[4 * RANK])),
        "X Pᵀ": product(4 * RANK),
        "update": chunks(update),
        "fused AdamW": optimizer.step,
    }


def measure(work: Callable[[], None], device: str) -> float:
    """Return the median nanoseconds per parameter."""
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) * 1e9 / (COUNT * SHAPE[0] * SHAPE[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for roofline.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator(args.device).manual_seed(0)
    made = [torch.randn(SHAPE, generator=generator, device=args.device) * 1e-3 for _ in range(2 * COUNT)]
    with torch.no_grad():
        found = {name: measure(work, args.device) for name, work in parts(made[:COUNT], made[COUNT:]).items()}
    base = found["fused AdamW"]
    rows = [[name, PARTS[name], f"{time:.2f}", f"{time / base:.2f}"] for name, time in found.items()]
    floors = {name: sum(found[part] for part in needed) for name, needed in FLOORS.items()}
    sums = [[name, " + ".join(FLOORS[name]), f"{time:.2f}", f"{time / base:.2f}"] for name, time in floors.items()]
    show("parts of a step", HEAD, rows)
    show("floors", ["recipe", "parts", *HEAD[2:]], sums)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "roofline.md").write_text(f"""# What the parts of a step cost

{COUNT} matrices of {SHAPE[0]} x {SHAPE[1]}, float32, rank {RANK} (1/32 of the short side) and {4 * RANK} (1/8). Medians
of {REPEATS} loops over all matrices.

{markdown(HEAD, rows)}

The sum of the parts that a recipe needs, if it read the gradient from memory once for each of them:

{markdown(["recipe", "parts", *HEAD[2:]], sums)}

{provenance(args.device, args.threads)}
""")


if __name__ == "__main__":
    main()
