"""What the tests of checkpoints run on the ranks: sub-worlds of one process group, models, saving and loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lightning_memopt import AdaPMLean, MemOpt
from lightning_memopt.sharding.tensors import fill_, local_tensor
from lightning_memopt.strategy.checkpoint.io import AtomicCheckpointIO
from lightning_memopt.strategy.checkpoint.load import load_checkpoint
from lightning_memopt.strategy.checkpoint.save import model_state, optimizer_state, save_directory, save_file
from lightning_memopt.strategy.checkpoint.states import gathered
from tests._compare import assert_equal

FAMILIES = ("adamw", "adapm", "adapm_mini", "adapm_lean", "adam_sn", "adam_snsm", "adam_mini", "adafactor", "muon")
FORMATS = ("directory", "file")
Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class World:
    """The first ranks of the process group, as if they were all."""

    mesh: DeviceMesh
    group: Any

    @property
    def size(self) -> int:
        return self.mesh.size()

    @property
    def mine(self) -> bool:
        return self.mesh.get_coordinate() is not None


def worlds() -> dict[int, World]:
    """Make the worlds of 1 to 4 ranks; all ranks must call this."""
    return {
        size: World(DeviceMesh("cpu", list(range(size))), dist.new_group(list(range(size)))) for size in range(1, 5)
    }


class Tower(nn.Module):
    """An embedding, an attention weight, a matrix that leaves the fourth of four ranks nothing, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        attention, mlp = {"q_proj": nn.Linear(10, 8, bias=False)}, {"up_proj": nn.Linear(7, 3, bias=False)}
        layer = {"self_attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)}
        self.layers = nn.ModuleList([nn.ModuleDict({**layer, "input_layernorm": nn.LayerNorm(10, bias=False)})])


class Towers(nn.ModuleDict):
    def forward(self) -> None:
        """Not called, but `fully_shard` asks for it."""


def towers(*names: str, seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    model = Towers({name: Tower() for name in names})
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    return model


def shard(model: nn.Module, world: World | None) -> nn.Module:
    if world is not None:
        for child in model.children():
            fully_shard(child, mesh=world.mesh)
        fully_shard(model, mesh=world.mesh)
    return model


def grouped(model: nn.ModuleDict) -> MemOpt:
    """One optimizer with a group per tower: the tower's name is the recipe."""
    groups: list[Any] = [
        {"params": [(f"{name}.{key}", param) for key, param in tower.named_parameters()], "recipe": name}
        for name, tower in model.items()
    ]
    return MemOpt(groups, "adamw", lr=0.01)


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    """Take a step on gradients that depend on its number only, however the model is sharded."""
    generator = torch.Generator().manual_seed(number)
    for param in model.parameters():
        whole = torch.randn(param.shape, generator=generator).to(param.dtype)
        if param.requires_grad:
            param.grad = torch.empty_like(param)
            fill_(param.grad, whole)
    optimizer.step()
    optimizer.zero_grad()


def whole_params(model: nn.Module) -> dict[str, Tensor]:
    names, params = zip(*model.named_parameters(), strict=True)
    return {name: whole.clone() for name, whole in zip(names, gathered(params, True), strict=True)}


def whole_state(optimizer: Optimizer) -> dict[Any, dict[str, Any]]:
    state = optimizer.state_dict()["state"]
    wholes = iter(gathered([value for index in sorted(state) for value in state[index].values()], True))
    return {index: {key: next(wholes) for key in state[index]} for index in sorted(state)}


def local_params(model: nn.Module) -> dict[str, Tensor]:
    """Return this rank's parts: to compare models that are sharded alike, every rank compares its own."""
    return {name: local_tensor(param.detach()).clone() for name, param in model.named_parameters()}


def local_state(optimizer: Optimizer) -> dict[Any, dict[str, Any]]:
    state = optimizer.state_dict()["state"]
    return {
        index: {
            key: local_tensor(value).clone() if isinstance(value, Tensor) else value
            for key, value in state[index].items()
        }
        for index in sorted(state)
    }


def save(path: Path, model: nn.Module, *optimizers: Optimizer, format: str, world: World, **rest: Any) -> None:
    whole, group = format == "file", world.group
    states = [optimizer_state(optimizer, model, whole=whole, group=group) for optimizer in optimizers]
    checkpoint = {"state_dict": model_state(model, whole=whole, group=group), "optimizer_states": states, **rest}
    if whole:
        save_file(checkpoint, path, AtomicCheckpointIO(), group=group)
    else:
        save_directory(checkpoint, path, group=group)


def load(path: Path, model: nn.Module, *optimizers: Optimizer, world: World, **options: Any) -> dict[str, Any]:
    return load_checkpoint(path, model, optimizers or None, AtomicCheckpointIO(), group=world.group, **options)


def difference(model: nn.Module, expected: dict[str, Tensor], *, exact: bool) -> str:
    """Return where this rank's parts differ from whole parameters: bit for bit, or by 1e-5 of a parameter's norm."""
    wrong = []
    for name, param in model.named_parameters():
        part = torch.empty_like(param)
        fill_(part, expected[name])
        mine, theirs = local_tensor(param.detach()), local_tensor(part.detach())
        error = float((mine.double() - theirs.double()).norm() / expected[name].double().norm())
        if mine.dtype != expected[name].dtype or not error <= (0 if exact else 1e-5):
            wrong.append(f"{name} differs by {error:.1e}")
    return "; ".join(wrong)


@contextmanager
def raises(kind: type[BaseException] | tuple[type[BaseException], ...], *texts: str) -> Iterator[None]:
    """Check for an exception, and that its message has all the texts."""
    try:
        yield
    except kind as error:
        message = f"{error} {' '.join(getattr(error, '__notes__', []))}"
        missing = [text for text in texts if text not in message]
        assert not missing, f"{missing} not in {message!r}"
        return
    raise AssertionError(f"{kind} was not raised")


@contextmanager
def unchanged(model: nn.Module, *optimizers: Optimizer) -> Iterator[None]:
    """Check that neither weights nor states nor groups change on this rank."""

    def now() -> Any:
        groups = [[{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] for opt in optimizers]
        return local_params(model), [local_state(optimizer) for optimizer in optimizers], groups

    before = now()
    yield
    after = now()
    assert_equal(after[:2], before[:2])
    assert after[2] == before[2]


Case = Callable[[dict[int, World], Path], None]
CASES: list[Case] = []


def case(function: Case) -> Case:
    """Run this on all ranks, in a folder of its own; what it raises fails the test of its name."""
    CASES.append(function)
    return function


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


def lean(model: nn.Module, **options: Any) -> AdaPMLean:
    return AdaPMLean(model.named_parameters(), lr=0.01, **options)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def momentum(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def after_a_step(make: Any, world: World, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = shard(towers("net", seed=seed), world)
    optimizer = make(model)
    step(model, optimizer, 0)
    return model, optimizer


def same_content(actual: Any, expected: Any) -> None:
    """Compare nested state dicts, in which not only tensors matter."""
    if isinstance(expected, Tensor):
        assert_equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            same_content(actual[key], expected[key])
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            same_content(one, other)
    else:
        assert actual == expected
