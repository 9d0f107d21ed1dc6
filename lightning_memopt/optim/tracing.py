"""What exists only for a part of a training step: unsharded units, and the scratch of optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_memopt.memory.temporaries import StepMemory
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.optim.unsharded import trace_unsharded


@contextmanager
def trace_step(
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    module: nn.Module,
    *,
    into: StepMemory | None = None,
) -> Iterator[StepMemory]:
    """Measure what exists only for a part of a step, while forward pass, backward pass and step run inside.

    Storages are counted as they are made, so the result is the same on a CPU and on a GPU. Work space inside an
    operation is not counted, nor is a step that is compiled. What watches them is active only in updates of optimizers
    and in FSDP2's own methods: it does not keep a model from being compiled, and nothing is left when the context ends.

    Args:
        optimizers: One or several, of this package or others. An optimizer of another package that has no state yet is
            not measured, since its state would count as temporary.
        module: The model, for units of FSDP2.
        into: What was found in other steps, to keep the most of all; None for this one alone.

    Yields:
        What was found; complete when the context ends.

    Example:
        >>> import torch, lightning_memopt as lm
        >>> model = torch.nn.Linear(100, 10, bias=False)
        >>> optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-3)
        >>> with lm.trace_step(optimizer, model) as found:
        ...     model(torch.ones(1, 100)).sum().backward()
        ...     optimizer.step()
        >>> found.unsharded, found.scratch > 0
        (0, True)
        >>> lm.take_snapshot(optimizer, model, step=found).memory.scratch == found.scratch
        True
    """
    found = StepMemory() if into is None else into
    given = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers
    with ExitStack() as stack:
        for optimizer in (each for each in given if isinstance(each, torch.optim.Optimizer)):
            traced = optimizer._measuring if isinstance(optimizer, MemOpt) else partial(_others, optimizer)
            stack.enter_context(traced(found))
        unsharded = stack.enter_context(trace_unsharded(module))
        try:
            yield found
        finally:
            found.unsharded = max(found.unsharded, unsharded())


@contextmanager
def _others(optimizer: torch.optim.Optimizer, found: StepMemory) -> Iterator[None]:
    """Count the temporaries of another optimizer's steps, without those of a closure."""
    active = ExitStack()

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        active.close()  # of a step that failed
        if not optimizer.state or torch.compiler.is_compiling():
            return None
        closure = kwargs.get("closure") or next(iter(args[1:]), None)
        if closure is None:
            active.enter_context(found.update())
            return None
        return args[:1], {**kwargs, "closure": _apart(closure, active, found)}

    with active:
        handles = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(lambda *_: active.close()),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _apart(closure: Callable[[], Any], active: ExitStack, found: StepMemory) -> Callable[[], Any]:
    """Return a closure during which nothing is counted. It runs the model, which may be compiled."""

    def called() -> Any:
        active.close()
        value = closure()
        active.enter_context(found.update())
        return value

    return called
