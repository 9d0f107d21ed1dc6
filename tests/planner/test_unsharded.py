"""What FSDP2 holds beside shards at the fullest moment of a pass, measured by its storages, against the plan."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")

from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_memopt.optim.unsharded import METHODS, trace_unsharded
from lightning_memopt.planner.planned import PlannedMesh
from lightning_memopt.planner.planning import candidates, plan_module
from lightning_memopt.planner.settings import RunSettings
from lightning_memopt.planner.sharding import Sharding as PlannedSharding
from lightning_memopt.sharding.wrapping import find_units
from lightning_memopt.strategy.model.shard import Sharding, shard
from tests._models import tiny_llama

pytestmark = pytest.mark.slow

WIDTH, VOCAB = 64, 1024
CPU = torch.device("cpu")


class Storages(TorchDispatchMode):
    """Knows the present sizes of all storages that are made inside, which FSDP2 also frees and allocates again."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._given: set[int] = set()
        self._made: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._given |= self._storages((args, kwargs or {})).keys() - self._made.keys()
        out = func(*args, **(kwargs or {}))
        for key, storage in self._storages(out).items():
            if key not in self._given and key not in self._made:
                self._made[key] = weakref.ref(storage, lambda _, key=key: self._made.pop(key, None))
        alive = [reference() for reference in list(self._made.values())]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive if storage is not None))
        return out

    @staticmethod
    def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        return {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}


class Layer(nn.Module):
    def __init__(self, *, lora: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False).requires_grad_(not lora)

    def forward(self, value: Tensor) -> Tensor:
        return value + self.down(self.up(value).relu())


class Stack(nn.Module):
    """Layers after an embedding, whose weight is the head's."""

    def __init__(self, *, lora: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB if not lora else 8, WIDTH)
        self.layers = nn.ModuleList(Layer(lora=lora) for _ in range(8))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return nn.functional.linear(hidden, self.embedding.weight)


class Module(nn.Module):
    """Stands for a LightningModule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, ids: Tensor) -> Tensor:
        return self.model(ids).sum()


class Flat(nn.Module):
    """One whose layers are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(8))

    def training_step(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.sum()


class Llama(Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__(tiny_llama(hidden=WIDTH, intermediate=4 * WIDTH, layers=4, vocabulary=vocabulary))

    def training_step(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits.sum()


class Vocabulary(Module):
    """A LLaMA of four layers, most of whose weights are those of its tokens."""

    def __init__(self, size: int, *, tied: bool) -> None:
        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=size,
            tie_word_embeddings=tied,
        )
        super().__init__(LlamaForCausalLM(config).train())

    def training_step(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small vocabulary": lambda: Llama(32),
    "large vocabulary": lambda: Llama(2048),
    "tied by a function": lambda: Module(Stack()),
    "partly frozen": lambda: Module(Stack(lora=True)),
    "layers of its own": Flat,
}


@dataclass(frozen=True)
class Case:
    model: str
    precision: str = "32-true"
    reshard: bool | int = True
    release: bool = False
    replicas: int = 1


CASES = [
    Case("small vocabulary"),
    Case("small vocabulary", release=True),
    Case("large vocabulary", release=True),
    Case("small vocabulary", "bf16-mixed"),
    Case("small vocabulary", "bf16-true", release=True),
    Case("large vocabulary", "bf16-mixed", release=True),
    Case("small vocabulary", reshard=False),
    Case("large vocabulary", "bf16-true", reshard=False),
    Case("small vocabulary", reshard=2),
    Case("tied by a function"),
    Case("partly frozen"),
    Case("partly frozen", "bf16-mixed"),
    Case("layers of its own"),
    Case("layers of its own", release=True),
    Case("small vocabulary", replicas=2),
]


@pytest.fixture(params=[1, 2, 8])
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process group whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def measured(module: Any, *, release: bool, batch: tuple[int, int] = (1, 1)) -> int:
    """Return the most bytes that a pass makes, with the activations of a batch."""
    for param in module.parameters():
        if release and param.requires_grad:
            param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    with Storages() as storages:
        module.training_step(torch.zeros(batch, dtype=torch.long)).backward()
    return storages.peak


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pass_takes_at_most_what_is_planned(ranks, case):
    if ranks % case.replicas or (ranks == 1 and case.reshard == 2):
        pytest.skip("no such mesh")
    shards, make = ranks // case.replicas, MODELS[case.model]
    settings = RunSettings(
        ranks,
        case.replicas,
        case.precision,
        gradient_release=case.release,
        reshard_after_forward=case.reshard,
        fsdp=True,
    )
    planned = PlannedSharding.of(make(), "", PlannedMesh(shards), settings)
    most = planned.unsharded() + planned.held_gradients(release=case.release)
    names = {"mesh_dim_names": ("replicate", "shard")} if case.replicas > 1 else {}
    mesh = init_device_mesh("cpu", (case.replicas, shards) if names else (shards,), **names)
    module = make()
    shard(module, find_units(module), Sharding(mesh, case.precision, False, CPU, case.reshard))
    found = measured(module, release=case.release)
    small = 8192  # activations
    # On few ranks, reduced gradients are large, and most of them do not exist yet at the fullest moment.
    assert (0.7 if ranks == 8 else 0.6) * most < found <= most + small


def test_traces_within_traces_find_the_same_and_leave_nothing(ranks):
    module = Module(Stack())
    shard(module, find_units(module), Sharding(init_device_mesh("cpu", (ranks,)), "32-true", False, CPU, True))
    groups = [unit._get_fsdp_state()._fsdp_param_group for unit in module.modules() if isinstance(unit, FSDPModule)]
    with trace_unsharded(module) as outer, trace_unsharded(module) as inner:
        module.training_step(torch.zeros(1, 1, dtype=torch.long)).backward()
    assert outer() == inner() > 0
    assert groups
    assert not any(name in vars(group) for group in groups for name in METHODS)


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("batch", [(1, 16), (4, 128)], ids=str)
@pytest.mark.parametrize("vocabulary", [32768, 131072])
def test_a_large_vocabulary_takes_what_is_planned(vocabulary, batch, tied):
    """With activations: logits and gradients of embedding and head come one after the other."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    module = Vocabulary(vocabulary, tied=tied)
    settings = RunSettings(8, gradient_release=True, batch=batch, fsdp=True)
    plan = plan_module(module, candidates("scale"), settings, name="vocabulary")
    row = plan.row("scale")
    passing = row.total_bytes - plan.parameter_bytes - plan.buffer_bytes - row.state_bytes - row.scratch_bytes
    shard(module, find_units(module), Sharding(init_device_mesh("cpu", (8,)), "32-true", False, CPU, True))
    found = measured(module, release=True, batch=batch)
    dist.destroy_process_group()
    assert 0.93 * passing < found <= passing
    assert passing < plan.activation_bytes + plan.unsharded_bytes + row.gradient_bytes
