"""Run a kind beside its float64 reference and measure the error of every step."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import Tensor

from lightning_memopt.kinds.base import Kind, State
from lightning_memopt.kinds.momentum import Momentum
from lightning_memopt.sharding.layout import Layout
from tests._compare import relative_error
from tests.kinds.contract.cases import BETAS, EPS, tick_at
from tests.kinds.contract.running import step
from tests.kinds.reference import MOMENTA, SECOND_MOMENTS, Stack

Shape = tuple[int, ...]
STEPS = 20


def reference_of(kind: Kind, layout: Layout) -> Stack:
    """Return the reference of a kind with its options.

    Raises:
        AssertionError: If the kind has none: every kind needs one.
    """
    table, axis = (MOMENTA, "momentum") if isinstance(kind, Momentum) else (SECOND_MOMENTS, "second_moment")
    assert kind.name in table, (
        f"the {axis} kind {kind.name!r} has no float64 reference; write one in tests/kinds/reference/ and add it to "
        "the table"
    )
    resolved = kind.resolve(layout)
    options = {entry.name: getattr(resolved, entry.name) for entry in fields(resolved)}
    if axis == "second_moment":
        options["output_dim"] = layout.output_dim
    return Stack(table[kind.name], layout.matrix, **options)


def errors(
    kind: Kind,
    grads: Iterable[Tensor],
    layout: Layout,
    *,
    beta1: float = BETAS[0],
    beta2: float = BETAS[1],
    index: int = 0,
) -> tuple[list[float], State]:
    """Return the relative error of every step, and the last state.

    The direction's error is relative to its norm; where the exact direction is zero, the error is absolute.
    """
    index = index if getattr(kind, "stagger", True) else 0
    reference, state = reference_of(kind, layout), kind.init(layout)
    found = []
    for number, grad in enumerate(grads, start=1):
        tick = tick_at(number, index=index)
        matrix = grad.reshape(layout.matrix)
        if isinstance(kind, Momentum):
            betas = {"beta1": beta1, **({"beta2": beta2, "eps": EPS} if kind.averages_squares else {})}
            actual = step(kind, grad, state, layout, tick, **betas)
            gap = getattr(kind, "gap", 1)
            expected = reference.momentum(matrix, tick=tick, gap=gap, like=state, **betas)
        else:
            actual = step(kind, grad, state, layout, tick, beta2=beta2)
            expected = reference.second_moment(matrix, beta2=beta2, eps=EPS, tick=tick)
        found.append(relative_error(actual, expected))
    return found, state


def gradients(name: str, shape: Shape) -> list[Tensor]:
    """Return a sequence of gradients of a kind that training or a test of nerves brings."""
    seed = zlib.crc32(repr((name, shape)).encode())
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    grads = [normal(*shape) for _ in range(STEPS)]
    if name == "drifting":  # a common part, as gradients have in training
        common = normal(*shape)
        grads = [grad + 2 * common for grad in grads]
    elif name == "zeros in the middle":
        grads[10:17] = [torch.zeros(shape, dtype=torch.float64)] * 7
    elif name == "zeros first":
        grads[:3] = [torch.zeros(shape, dtype=torch.float64)] * 3
    elif name == "rank 2" and len(shape) > 1:
        left, right = normal(*shape[:-1], 2), normal(*shape[:-2], 2, shape[-1])
        middle = [torch.eye(2, dtype=torch.float64) + 0.3 * normal(*shape[:-2], 2, 2) for _ in range(STEPS)]
        grads = [left @ part @ right for part in middle]
    elif name == "tiny":
        grads = [grad * 1e-12 for grad in grads]
    elif name == "huge":
        grads = [grad * 1e12 for grad in grads]
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    return [grad.to(dtype) for grad in grads]


SEQUENCES = ["random", "drifting", "zeros in the middle", "zeros first", "rank 2", "tiny", "huge", "bfloat16"]
