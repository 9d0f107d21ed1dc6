"""Run a kind without an optimizer: one block, unsharded, or with a layout that only claims to be sharded."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from lightning_memopt.kinds.base import Kind, State
from lightning_memopt.kinds.batch import Scratch, chunks
from lightning_memopt.kinds.momentum import Direction, Momentum
from lightning_memopt.kinds.second_moment import Denominator
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.tensors import local_tensor
from tests.kinds.contract.cases import BETAS, EPS, tick_at

Task = Generator[Any, Any, Any]


class FakeMesh:
    """Stands for a mesh whose other ranks hold nothing: sums over it come back as they are."""

    def get_group(self, position: int) -> str:
        return f"group {position}"

    def size(self, position: int) -> int:
        return 2


def pretend_sharded(layout: Layout, dim: int) -> Layout:
    """Return the layout of a block whose whole lies here, but which says that ``dim`` of the matrix is sharded."""
    return replace(layout, mesh=FakeMesh(), placements=(Shard(dim % len(layout.matrix)),))


def finish(task: Task, on_request: Callable[[Task], None] | None = None) -> Any:
    """Run a task to its end; answer its requests with what this rank has."""
    while True:
        try:
            waiting = next(task)
        except StopIteration as stop:
            return stop.value
        assert on_request is not None, "an unsharded task asked for numbers from other ranks"
        on_request(task)
        for pending in waiting:
            pending.answered = True


@dataclass(frozen=True)
class Quotient:
    """U / D: what a kind whose denominator is a norm of the direction is judged by."""

    direction: Direction
    denominator: Denominator

    def at(self, index: Any, scratch: Scratch, columns: int) -> Tensor:
        part, scale = self.denominator.turned(self.direction).at(index, scratch)
        divisor = self.denominator.at(index, scratch, columns)
        return part * scale / (1.0 if divisor is None else divisor)


def task_of(kind: Any, grad: Tensor, state: State, layout: Layout, tick: Tick, **changes: float) -> Task:
    """Return the kind's update of one step, whichever axis it belongs to."""
    now = {"tick": tick}
    if isinstance(kind, Momentum):
        now |= {"beta1": BETAS[0]}
    if averages_squares(kind):
        now |= {"beta2": BETAS[1], "eps": EPS}
    task = kind.update(grad, state, layout, **now | changes)
    return _quotient(grad, task) if getattr(kind, "of_direction", False) else task


def averages_squares(kind: Kind) -> bool:
    """Return whether a kind takes the second moment's decay rate and ε."""
    return not isinstance(kind, Momentum) or kind.averages_squares


def _quotient(grad: Tensor, task: Task) -> Task:
    return Quotient(Direction(grad), (yield from task))


def dense(result: Direction | Denominator | Quotient, layout: Layout) -> Tensor:
    """Write a direction, a denominator or U / D out as ``[..., m, n]``, chunk by chunk as the optimizer does."""
    out = torch.ones(layout.local, dtype=layout.dtype)
    scratch = Scratch(out, layout.dtype)
    for index in chunks(out):
        if isinstance(result, Quotient):
            out[index] = result.at(index, scratch, layout.local[-1])
        elif isinstance(result, Direction):
            part, scale = result.at(index, scratch)
            out[index] = part * scale
        elif (part := result.at(index, scratch, layout.local[-1])) is not None:
            out[index] = part
    return out


def step(kind: Kind, grad: Tensor, state: State, layout: Layout, tick: Tick, **changes: float) -> Tensor:
    """Take one step with a gradient of the parameter's shape and return the direction or denominator written out."""
    task = task_of(kind, layout.take(grad), local_state(state), layout, tick, **changes)
    return dense(finish(task), layout)


def steps(kind: Kind, grads: list[Tensor], state: State, layout: Layout, first: int = 1) -> Tensor:
    """Take several steps; return the last result."""
    for number, grad in enumerate(grads, start=first):
        result = step(kind, grad, state, layout, tick_at(number))
    return result


def local_state(state: State) -> State:
    return {key: local_tensor(value) for key, value in state.items()}


def cloned(state: State) -> State:
    return {key: value.clone() for key, value in state.items()}
