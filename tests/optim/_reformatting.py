"""One weight and its optimizer, for tests of reformat: all kinds, all pairs of them, and its momentum written out."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

import lightning_memopt as lm
from tests.kinds.contract.cases import gradient

NAME = "model.layers.0.mlp.up_proj.weight"
MOMENTA: dict[str, dict[str, Any]] = {
    "none": {"momentum": "none"},
    "low_rank 3": {"momentum": "low_rank", "rank": 3},
    "low_rank 8": {"momentum": "low_rank", "rank": 8},
    "subspace 3": {"momentum": "subspace", "rank": 3, "gap": 4},
    "subspace 8": {"momentum": "subspace", "rank": 8, "gap": 4},
    "dense": {"momentum": "dense"},
}
PAIRS = list(itertools.permutations(MOMENTA, 2))
SHAPES = {"tall": (20, 12), "wide": (12, 20), "square": (12, 12), "stack": (3, 12, 20), "kernel": (12, 3, 2, 2)}
SECOND_MOMENTS: dict[str, dict[str, Any]] = {
    "dense": {"second_moment": "dense"},
    "factored": {"second_moment": "factored"},
    "blockwise": {"second_moment": "blockwise"},
    "heads": {"second_moment": "blockwise", "outputs_per_number": 4},
    "mean": {"second_moment": "subset_norm"},
    "sum": {"second_moment": "subset_norm", "reduction": "sum"},
    "runs": {"second_moment": "subset_norm", "reduction": "sum", "subset_size": 5},
    "none": {"second_moment": "none"},
}


def made(
    shape: tuple[int, ...],
    momentum: dict[str, Any],
    second_moment: dict[str, Any] | None = None,
    *,
    steps: int = 3,
    content: str = "full",
    **options: Any,
) -> tuple[lm.MemOpt, nn.Parameter]:
    """Return an optimizer of one weight that has taken steps; the gradients are of full rank, of rank 2, or zero."""
    param = nn.Parameter(gradient(shape, 99))
    change = {**momentum, **(second_moment or SECOND_MOMENTS["factored"])}
    optimizer = lm.MemOpt([(NAME, param)], "adamw", overrides={NAME: change}, **{"lr": 1e-2, **options})
    for step in range(1, steps + 1):
        param.grad = grad_of(shape, step, content)
        optimizer.step()
    return optimizer, param


def grad_of(shape: tuple[int, ...], step: int, content: str = "full") -> Tensor:
    """Return a gradient whose singular values fall quickly, so that a mean of some has a spectrum, too."""
    if content == "zero":
        return torch.zeros(shape)
    *stack, m, n = shape if len(shape) < 4 else (shape[0], shape[1] * shape[2] * shape[3])
    count = 2 if content == "deficient" else min(m, n)
    left, right = gradient((*stack, m, count), 1), gradient((*stack, count, n), 2 if count == 2 else 10 + step)
    return (left * 0.7 ** torch.arange(count) @ right).view(shape)


def momentum_of(optimizer: lm.MemOpt, param: Tensor, prefix: str = "") -> Tensor:
    """Return the momentum in float64, ``[..., m, n]``, straight from the definition of every kind."""
    state = {key.removeprefix(prefix): value.double() for key, value in optimizer.state[param].items()}
    if "exp_avg" in state:
        dense = state["exp_avg"]
    elif "low_rank_q" in state:
        dense = state["low_rank_q"] @ state["low_rank_r"]
    elif "subspace_p" in state:
        dense = state["subspace_x"] @ state["subspace_p"].mT
        dense = dense if param.shape[-2] >= param.shape[-1] or param.ndim > 3 else dense.mT
    else:
        dense = torch.zeros(param.shape, dtype=torch.float64)
    return dense.flatten(1) if param.ndim > 3 else dense


LOSSY = [
    ("dense", "low_rank 3"),
    ("dense", "low_rank 8"),  # in a square block these are more numbers than before
    ("dense", "subspace 3"),
    ("dense", "none"),
    ("low_rank 8", "low_rank 3"),
    ("low_rank 8", "subspace 3"),
    ("low_rank 3", "none"),
    ("subspace 8", "subspace 3"),
    ("subspace 8", "low_rank 3"),
]
