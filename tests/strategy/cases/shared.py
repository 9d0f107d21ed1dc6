"""The list of cases, and what several files of cases share."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.strategy._training import VOCAB, LanguageModule, fit, whole_tensors, whole_weights

Case = Callable[[], None]
FINDS_UNUSED = "ddp_find_unused_parameters_true"
CASES: dict[int, dict[str, Case]] = {2: {}, 4: {}}


def case(*sizes: int) -> Callable[[Case], Case]:
    def register(function: Case) -> Case:
        for size in sizes:
            CASES[size][function.__name__] = function
        return function

    return register


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """Make one folder for all ranks."""
    with tempfile.TemporaryDirectory() as mine:
        folder = [mine]
        dist.broadcast_object_list(folder, 0)
        yield Path(folder[0])
        dist.barrier()


def close(actual: LightningModule, expected: LightningModule, places: float = 1e-5) -> None:
    """Compare weights; they must have moved, or else there is nothing to compare."""
    close_weights(whole_weights(actual), whole_weights(expected), places)


def close_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], places: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=places, msg=partial("{}: {}".format, name))


def same_everywhere(module: LightningModule) -> None:
    same_weights_everywhere(whole_weights(module))


def same_weights_everywhere(weights: dict[str, Tensor]) -> None:
    """Compare the ranks' weights, all of them in one collective."""
    everything = torch.cat([value.flatten().double() for value in weights.values()])  # which changes no number
    copies = [torch.empty_like(everything) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, everything)
    sizes = [value.numel() for value in weights.values()]
    for name, *parts in zip(weights, *(copy.split(sizes) for copy in copies), strict=True):
        assert all(torch.equal(part, parts[0]) for part in parts), name
        assert not parts[0].isnan().any(), name


def against_ddp(
    make: Callable[[], LightningModule] = LanguageModule, ours: Any = "memopt_fsdp", ddp: str = "ddp", **options: Any
) -> LightningModule:
    """Train the same module under both strategies and compare; return the sharded one. Two steps unless given."""
    options.setdefault("max_steps", 2)  # the second one depends on the optimizer's state
    sharded = make()
    before = whole_weights(sharded)
    fit(sharded, ours, **options)
    assert all(isinstance(param, DTensor) for param in sharded.model.parameters())
    after = whole_weights(sharded)
    close_weights(after, with_ddp(make, ddp, **options), 1e-5)
    same_weights_everywhere(after)
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert moved
    return sharded


WITH_DDP: dict[Any, dict[str, Tensor]] = {}


def with_ddp(make: Callable[[], LightningModule], ddp: str, **options: Any) -> dict[str, Tensor]:
    """Return the weights that DDP trains; a class that is trained in the same way again, is trained once."""
    key = (make, ddp, *sorted(options.items()))
    if key in WITH_DDP:
        return WITH_DDP[key]
    reference = make()
    fit(reference, ddp, **options)
    weights = whole_weights(reference)
    if isinstance(make, type):
        WITH_DDP[key] = weights
    return weights


class Reference:
    """What DDP gives, computed once."""

    made: dict[str, LightningModule] = {}

    @classmethod
    def of(cls, precision: str) -> LightningModule:
        if precision not in cls.made:
            cls.made[precision] = LanguageModule()
            fit(cls.made[precision], "ddp", precision=precision)
        return cls.made[precision]


class Counted(TorchDispatchMode):
    """Counts collectives by a part of their name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.calls = name, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += self.name in str(func)
        return func(*args, **(kwargs or {}))


def units_of(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, unit) for name, unit in module.named_modules() if isinstance(unit, FSDPModule)]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


class Direct(LanguageModule):
    """Parameters on the module itself: one for all ranks, one that only rank 0 uses, one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(VOCAB))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.only_first = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(2))
        self.clipped: list[tuple[float, float]] = []

    def loss(self, batch: Tensor) -> Tensor:
        logits = self.model(batch)[:, :-1] * self.scale / self.temperature
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return loss + self.only_first.square().sum() if self.global_rank == 0 else loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        grads = whole_tensors(param.grad for param in self.parameters() if param.grad is not None)
        if grads:
            everything = torch.cat([grad.flatten() for grad in grads])
            self.clipped.append((everything.norm().item(), everything.abs().max().item()))


class Causal(LanguageModule):
    """A model of transformers."""

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss


class Custom(nn.Module):
    """Holds a parameter and cannot initialise it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("positions", torch.arange(4), persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        return value
