"""Fabric with the same strategy: training as with DDP and as under a Trainer, gradients, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.accelerators import MPSAccelerator
from lightning.fabric.plugins import DoublePrecision
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import lightning_memopt as lm
from lightning_memopt import MemOptFabricStrategy
from tests.strategy._training import (
    VOCAB,
    LanguageModule,
    Network,
    Spawned,
    fit,
    global_batches,
    raises,
    tokens,
    whole_tensors,
    whole_weights,
)
from tests.strategy.cases.shared import Counted, case, close, close_weights, same_weights_everywhere


def fabric(strategy: Any = "memopt_fsdp", **options: Any) -> Fabric:
    """Return a launched Fabric over all ranks of the process group."""
    plugins = [Spawned(), *options.pop("plugins", [])]
    made = Fabric(strategy=strategy, accelerator="cpu", devices=dist.get_world_size(), plugins=plugins, **options)
    made.launch()
    return made


def loss_of(model: Any, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


def network(**options: Any) -> Network:
    torch.manual_seed(0)
    return Network(**options)


def adapm(params: Any) -> torch.optim.Optimizer:
    return lm.AdaPMLean(params, lr=0.01)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def batches(made: Fabric, size: int = 4, steps: int = 3) -> list[Tensor]:
    """Return this rank's batches, as Fabric's sampler divides them."""
    loader = made.setup_dataloaders(DataLoader(tokens(), batch_size=size))
    return [batch for _, batch in zip(range(steps), loader, strict=False)]


def trained(
    strategy: Any = "memopt_fsdp",
    make: Callable[[Any], torch.optim.Optimizer] = adapm,
    model: nn.Module | None = None,
    limits: Any = None,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """Take three steps and return the module and its optimizer."""
    made = fabric(strategy, **options)
    module = network() if model is None else model
    wrapped, optimizer = made.setup(module, make(module.parameters()))
    for batch in batches(made):
        made.backward(loss_of(wrapped, batch))
        if limits:
            made.clip_gradients(wrapped, optimizer, **limits)
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


@case(2, 4)
def fabric_trains_as_ddp_does() -> None:
    ours, optimizer = trained(make=adamw)
    assert all(isinstance(param, DTensor) for param in ours.parameters())
    assert [name for name, unit in ours.named_modules() if isinstance(unit, FSDPModule)] == ["", "layers.0", "layers.1"]
    reference = trained("ddp", adamw)[0]
    close_weights(whole_weights(ours), whole_weights(reference), 1e-5)
    same_weights_everywhere(whole_weights(ours))
    offloaded = trained("memopt_fsdp_offload", adamw)[0]
    close_weights(whole_weights(offloaded), whole_weights(reference), 1e-5)


@case(2)
def fabric_trains_as_a_trainer_does() -> None:
    """The same LightningModule, step by step: the same numbers, to the last bit, also with clipping."""
    for precision in ("32-true", "bf16-true", "bf16-mixed"):
        reference = LanguageModule(optimizer=lambda it: adapm(it.parameters()))
        fit(reference, precision=precision, gradient_clip_val=0.5)
        made, module = fabric(precision=precision), LanguageModule()
        wrapped, optimizer = made.setup(module, adapm(module.parameters()))
        order = global_batches(8)
        for batch in order[:3]:
            with made.autocast():
                loss = wrapped.loss(batch[dist.get_rank() :: 2])
            made.backward(loss)
            made.clip_gradients(wrapped, optimizer, max_norm=0.5, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
        close(module, reference, 0)
        assert optimizer.snapshot().step == 3
        assert [name for name, _ in module.named_parameters()] == [block.name for block in optimizer.snapshot().blocks]


@case(2)
def optimizers_are_bound_whenever_they_are_made() -> None:
    """Before the model is set up, and after, from the names of Fabric's own wrapper."""
    before, optimizer = trained()
    made = fabric()
    wrapped = made.setup_module(network())
    late = made.setup_optimizers(lm.AdaPMLean(wrapped.named_parameters(), lr=0.01))
    for batch in batches(made):
        made.backward(loss_of(wrapped, batch))
        late.step()
        late.zero_grad()
    close_weights(whole_weights(wrapped.module), whole_weights(before), 0)
    names = [block.name for block in optimizer.snapshot().blocks]
    assert [block.name for block in late.snapshot().blocks] == names
    assert names[0] == "embed_tokens.weight"
    assert isinstance(late, lm.AdaPMLean)


@case(2)
def tied_and_frozen_weights_in_fabric() -> None:
    def make() -> nn.Module:
        model = network(tied=True)
        model.norm.requires_grad_(False)
        model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        return model

    ours, before = trained(make=adamw, model=make())[0], make()
    assert ours.lm_head.weight is ours.embed_tokens.weight
    close_weights(whole_weights(ours), whole_weights(trained("ddp", adamw, make())[0]), 1e-5)
    after = whole_weights(ours)
    for name, param in before.named_parameters():
        assert torch.equal(after[name], param) != param.requires_grad, name


@case(2)
def models_of_transformers_and_the_meta_device_in_fabric() -> None:
    from tests._models import tiny_gpt2

    made = fabric()
    with made.init_module(empty_init=True):
        empty = tiny_gpt2()
    wrapped = made.setup_module(empty.train())
    optimizer = made.setup_optimizers(adapm(wrapped.parameters()))
    made.backward(wrapped(input_ids=tokens(4), labels=tokens(4), use_cache=False).loss)
    optimizer.step()
    same_weights_everywhere(whole_weights(empty))
    assert empty.lm_head.weight is empty.transformer.wte.weight


@case(2)
def fabric_accumulates_without_reducing() -> None:
    def accumulated(blocked: bool) -> tuple[nn.Module, int]:
        made, module = fabric(), network()
        wrapped, optimizer = made.setup(module, adamw(module.parameters()))
        with Counted("reduce_scatter") as counted:
            for number, batch in enumerate(batches(made, size=2, steps=4)):
                with made.no_backward_sync(wrapped, enabled=blocked and number % 2 == 0):
                    made.backward(loss_of(wrapped, batch) / 2)
                if number % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        return module, counted.calls

    (ours, few), (reference, many) = accumulated(True), accumulated(False)
    assert (few, many) == (6, 12)  # of three units, in two or four batches
    close_weights(whole_weights(ours), whole_weights(reference), 1e-5)


class Scaled(LanguageModule):
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(VOCAB))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(lambda tokens: self.model(tokens) * self.scale, batch)


@case(2)
def parameters_of_a_lightning_module_itself_in_fabric() -> None:
    """They stay plain, and are averaged, once where the reduction waits."""
    results = []
    for strategy, blocked in (("memopt_fsdp", False), ("memopt_fsdp", True), ("ddp", False)):
        made, module = fabric(strategy), Scaled()
        wrapped, optimizer = made.setup(module, adamw(module.parameters()))
        for number, batch in enumerate(batches(made, steps=4)):
            with made.no_backward_sync(wrapped, enabled=blocked and number % 2 == 0):
                made.backward(wrapped.training_step(batch, 0) / 2)
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        results.append(whole_weights(module))
    close_weights(results[0], results[2], 1e-5)
    close_weights(results[1], results[2], 1e-5)
    assert results[0]["scale"].ne(1).all()


@case(2)
def clipping_in_fabric() -> None:
    for limits in ({"max_norm": 0.05}, {"max_norm": 0.05, "norm_type": 1}, {"clip_val": 0.001},
                   {"max_norm": 0.01, "norm_type": "inf"}):  # fmt: skip
        ours, theirs = (trained(strategy, adamw, limits=limits)[0] for strategy in ("memopt_fsdp", "ddp"))
        close_weights(whole_weights(ours), whole_weights(theirs), 1e-5)
    made, module = fabric(), network()
    wrapped, optimizer = made.setup(module, adapm(module.parameters()))
    made.backward(loss_of(wrapped, tokens(4)))
    grads = torch.cat([grad.flatten() for grad in whole_tensors(param.grad for param in module.parameters())])
    for norm_type in (1, 2, "inf"):
        norm = made.clip_gradients(wrapped, optimizer, max_norm=1e6, norm_type=norm_type)
        assert norm.item() == pytest.approx(torch.linalg.vector_norm(grads, float(norm_type)).item(), rel=1e-5)
    with raises(ValueError, "`norm_type` must be a positive number or 'inf', got 0"):
        made.clip_gradients(wrapped, optimizer, max_norm=1.0, norm_type=0)


@case(2)
def gradients_that_are_not_finite_in_fabric() -> None:
    made, module = fabric(), network()
    wrapped, optimizer = made.setup(module, lm.AdaPMLean(module.parameters(), lr=0.01, nonfinite="skip"))
    before = whole_weights(module)
    made.backward(loss_of(wrapped, tokens(4)) * (float("inf") if dist.get_rank() == 1 else 1.0))
    with raises(RuntimeError, "The norm of the gradients is nan", "`error_if_nonfinite=False`", "nonfinite='skip'"):
        made.clip_gradients(wrapped, optimizer, max_norm=1.0)
    made.clip_gradients(wrapped, optimizer, max_norm=1.0, error_if_nonfinite=False)
    optimizer.step()
    close_weights(whole_weights(module), before, 0)


@case(2)
def released_gradients_in_fabric() -> None:
    found = []
    for release in (True, False):
        made, module = fabric(), network()
        wrapped, optimizer = made.setup(module, lm.AdaPMLean(module.parameters(), lr=0.01))
        if release:
            optimizer.optimizer.release_gradients(module)
        for _ in range(2):
            made.backward(loss_of(wrapped, tokens(4)))
            assert any(param.grad is not None for param in module.parameters()) != release
            optimizer.step()
            optimizer.zero_grad()
        found.append(whole_weights(module))
    close_weights(*found, 1e-6)
    made, module = fabric(), network()
    wrapped, optimizer = made.setup(module, lm.AdaPMLean(module.parameters(), lr=0.01))
    optimizer.optimizer.release_gradients(module)
    made.backward(loss_of(wrapped, tokens(4)))
    for how in ({"max_norm": 1.0}, {"clip_val": 1.0}):
        with raises(RuntimeError, "Gradients cannot be clipped", "`clip_update=1.0`"):
            made.clip_gradients(wrapped, optimizer, **how)


@case(2)
def two_modules_in_fabric() -> None:
    """As in a GAN: each optimizer finds its module, though their parameters have the same names."""
    made = fabric()
    first, second = network(), network()
    one, two = made.setup_module(first), made.setup_module(second)
    mine, other = made.setup_optimizers(adapm(one.parameters()), adapm(two.parameters()))
    made.backward(loss_of(two, tokens(4)))
    before = whole_weights(first)
    other.step()
    close_weights(whole_weights(first), before, 0)
    assert not torch.equal(whole_weights(second)["lm_head.weight"], before["lm_head.weight"])
    assert mine.snapshot().step == 0


@case(2)
def options_of_the_strategy_in_fabric() -> None:
    wrapping = MemOptFabricStrategy(wrap=nn.Linear, reshard_after_forward=False, activation_checkpointing=True)
    ours = trained(wrapping, adamw)[0]
    units = [type(unit).__name__ for unit in ours.modules() if isinstance(unit, FSDPModule)]
    assert sorted(set(units)) == ["FSDPLinear", "FSDPNetwork"]
    close_weights(whole_weights(ours), whole_weights(trained("ddp", adamw)[0]), 1e-5)
    replicas = MemOptFabricStrategy(replicate_size=2)
    close_weights(whole_weights(trained(replicas, adamw)[0]), whole_weights(ours), 1e-5)
    assert replicas.device_mesh.mesh_dim_names == ("replicate", "shard", "tensor_parallel")


@case(2)
def compiled_modules_in_fabric() -> None:
    made, module = fabric(), network()
    compiled = torch.compile(module, backend="eager")
    _, optimizer = made.setup(compiled, lm.AdaPMLean(compiled.named_parameters(), lr=0.01))
    assert isinstance(module, FSDPModule)
    assert [block.name for block in optimizer.snapshot().blocks] == [name for name, _ in module.named_parameters()]


@case(2)
def what_fabric_is_refused() -> None:
    made = fabric()
    with raises(ValueError, "AdamW has no parameter of a module that was set up", "`fabric.setup(module, optimizer)`"):
        made.setup_optimizers(torch.optim.AdamW(network().parameters()))
    with raises(ValueError, "Embeddings with `max_norm`", "'weight'"):
        made.setup(nn.Embedding(3, 4, max_norm=1.0))
    module, stranger = network(), nn.Parameter(torch.ones(2))
    with raises(
        ValueError, "1 of the 2 parameters of the optimizer AdamW are not in Network", "of the model that is trained"
    ):
        made.setup(module, torch.optim.AdamW([module.lm_head.weight, stranger]))
    with raises(ValueError, "MemOptFabricStrategy runs on CPUs and CUDA GPUs, got MPSAccelerator"):
        MemOptFabricStrategy().accelerator = MPSAccelerator()
    with raises(ValueError, "MemOptFabricStrategy supports the precisions 32-true", "(DoublePrecision)"):
        fabric(plugins=[DoublePrecision()])
    with raises(RuntimeError, "multiplied should equal the world size (2)"):
        fabric(MemOptFabricStrategy(data_parallel_size=3))
    with raises(ValueError, "`tensor_parallel_size` is 2, but no parameter of Network"):
        fabric(MemOptFabricStrategy(tensor_parallel_size=2)).setup(network())


@case(2)
def a_module_that_its_user_sharded_in_fabric() -> None:
    made = fabric()
    module = fully_shard(network(), mesh=made.strategy.device_mesh["data_parallel"])
    wrapped, optimizer = made.setup(module, adamw(module.parameters()))
    for batch in batches(made):
        made.backward(loss_of(wrapped, batch))
        optimizer.step()
        optimizer.zero_grad()
    close_weights(whole_weights(module), whole_weights(trained("ddp", adamw)[0]), 1e-5)
    made = fabric(precision="bf16-mixed")
    for shards, expected in ((None, False), (fully_shard, True), (None, True)):
        made.setup(shards(network()) if shards else network())
        with made.autocast():
            assert torch.is_autocast_enabled("cpu") == expected
    with raises(ValueError, "`wrap` would have no effect"):
        fabric(MemOptFabricStrategy(wrap=nn.Linear)).setup(fully_shard(network()))
