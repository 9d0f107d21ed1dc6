"""Training is the same as with DDP."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import parametrizations, prune

import lightning_memopt as lm
from lightning_memopt import MemOptFSDPStrategy
from tests.strategy._training import WIDTH, Block, LanguageModule, Network, fit, raises, trainer
from tests.strategy.cases.shared import against_ddp, case, close, same_everywhere, units_of


@case(2, 4)
def plain_module_trains_as_with_ddp() -> None:
    module = against_ddp(max_steps=4)  # on four ranks an epoch and a part of the next
    placements = {name: param.placements for name, param in module.named_parameters()}
    assert placements["model.layers.0.mlp.up_proj.weight"] == (Shard(0),)
    assert placements["model.layers.0.mlp.down_proj.weight"] == (Shard(1),)
    units = [name for name, unit in module.named_modules() if isinstance(unit, FSDPModule)]
    assert units == ["model", "model.layers.0", "model.layers.1"]


class Uneven(LanguageModule):
    """The head has five rows: on four ranks 2, 2, 1 and none; its outputs are the first tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model.lm_head = nn.Linear(WIDTH, 5)

    def loss(self, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten() % 5)


@case(4)
def uneven_and_empty_shards() -> None:
    def make() -> LightningModule:
        torch.manual_seed(0)
        return Uneven()

    module = against_ddp(make, gradient_clip_val=0.1)
    sizes = [2, 2, 1, 0]
    assert module.model.lm_head.bias.to_local().numel() == sizes[dist.get_rank()]
    module = make()
    module.make_optimizer = lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01)
    fit(module, gradient_clip_val=0.1)
    same_everywhere(module)


@case(2)
def sharding_options_reach_the_units() -> None:
    ours = MemOptFSDPStrategy(wrap=[nn.Linear, "torch.nn.Embedding"], reshard_after_forward=False)
    module = against_ddp(ours=ours)
    assert {type(unit).__name__ for _, unit in units_of(module)} == {"FSDPLinear", "FSDPEmbedding", "FSDPNetwork"}
    module = against_ddp(ours=MemOptFSDPStrategy(wrap=lambda it: isinstance(it, Block), reshard_after_forward=None))
    assert [name for name, _ in units_of(module)] == ["model", "model.layers.0", "model.layers.1"]


@case(2)
def offloaded_to_the_cpu() -> None:
    module = against_ddp(ours="memopt_fsdp_offload", gradient_clip_val=0.1)
    groups = [group for _, unit in units_of(module) for group in unit._get_fsdp_state()._fsdp_param_groups]
    assert groups
    assert all(isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups)
    ours = LanguageModule(optimizer=lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01))
    fit(ours, "memopt_fsdp_offload")
    same_everywhere(ours)


@case(2)
def activation_checkpointing() -> None:
    def dropout() -> LightningModule:
        torch.manual_seed(0)
        return LanguageModule(Network(dropout=0.5))

    calls: list[str] = []

    def counting() -> LightningModule:
        module = dropout()
        module.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append("q"))
        return module

    other = dropout()
    torch.manual_seed(5)
    fit(other, max_steps=2)
    for option in (True, [Block], ["tests.strategy._training.Block"], lambda module: isinstance(module, Block)):
        calls.clear()
        module = counting()
        torch.manual_seed(5)
        fit(module, MemOptFSDPStrategy(activation_checkpointing=option), max_steps=2)
        assert len(calls) == 4, calls  # twice per step
        close(module, other, 0)


@case(2)
def weights_that_are_computed_from_parameters() -> None:
    def make() -> LightningModule:
        torch.manual_seed(0)
        module = LanguageModule()
        first, second = (layer.mlp for layer in module.model.layers)
        parametrizations.weight_norm(first.up_proj)
        parametrizations.spectral_norm(first.down_proj)
        nn.utils.spectral_norm(second.up_proj)  # the older one works by hooks
        prune.random_unstructured(second.down_proj, "weight", amount=0.5)
        prune.random_unstructured(module.model.lm_head, "weight", amount=0.5)
        return module

    against_ddp(make)


@case(2)
def batch_norms_are_synchronised_if_asked() -> None:
    module = LanguageModule()
    module.model.batch_norm = nn.BatchNorm1d(3)
    trainer(sync_batchnorm=True).validate(module, verbose=False)
    assert type(module.model.batch_norm) is nn.SyncBatchNorm


@case(2)
def compiled_modules() -> None:
    def make() -> LightningModule:
        module = LanguageModule()
        module.model = torch.compile(module.model, backend="eager")
        return module

    module, reference = make(), LanguageModule()
    fit(module)
    fit(reference)
    assert [name for name, _ in units_of(module)] == [
        "model._orig_mod", "model._orig_mod.layers.0", "model._orig_mod.layers.1"]  # fmt: skip
    torch.testing.assert_close(module.losses, reference.losses)


@case(2)
def fits_again_with_the_same_trainer() -> None:
    def twice(strategy: str) -> LightningModule:
        module = LanguageModule()
        made = trainer(strategy, max_epochs=1, limit_train_batches=2)
        made.fit(module)
        made.validate(module, verbose=False)
        made.fit_loop.max_epochs = 2
        made.fit(module)
        return module

    module = twice("memopt_fsdp")
    assert len(module.losses) == 4
    close(module, twice("ddp"))


@case(2)
def fits_again_with_another_trainer() -> None:
    def twice(strategy: str) -> LightningModule:
        module = LanguageModule()
        fit(module, strategy)
        trainer(strategy).validate(module, verbose=False)
        fit(module, strategy)
        return module

    module = twice("memopt_fsdp")
    close(module, twice("ddp"))
    with raises(ValueError, "earlier fit with precision='32-true'", "precision='bf16-mixed'"):
        fit(module, precision="bf16-mixed")
    with raises(ValueError, "earlier fit with cpu_offload=False"):
        fit(module, "memopt_fsdp_offload")


@case(2)
def evaluates_without_fitting() -> None:
    for reshard in (True, None):
        module, reference = LanguageModule(batch_size=12), LanguageModule(batch_size=12)
        every = dict.fromkeys(("limit_val_batches", "limit_test_batches", "limit_predict_batches"), 1.0)
        strategy = MemOptFSDPStrategy(reshard_after_forward=reshard)
        ours, theirs = trainer(strategy, **every), trainer("ddp", **every)
        assert ours.validate(module, verbose=False) == theirs.validate(reference, verbose=False)
        assert ours.test(module, verbose=False) == theirs.test(reference, verbose=False)
        for mine, other in zip(ours.predict(module), theirs.predict(reference), strict=True):
            assert torch.equal(mine, other)
        assert not ours.optimizers
        assert all(isinstance(param, DTensor) for param in module.parameters())  # gathered weights are freed


@case(2)
def the_strategy_is_lightnings_own_kind() -> None:
    """What users of ModelParallelStrategy rely on."""
    order: list[str] = []

    class Hooks(LanguageModule):
        def configure_model(self) -> None:
            assert self.device_mesh.mesh_dim_names == ("data_parallel", "tensor_parallel")
            order.append("configure_model")

        def setup(self, stage: str) -> None:
            order.append("setup")

        def configure_optimizers(self) -> Any:
            assert all(isinstance(param, DTensor) for param in self.parameters())
            order.append("configure_optimizers")
            return super().configure_optimizers()

        def on_fit_start(self) -> None:
            order.append("on_fit_start")

    module = Hooks()
    made = fit(module, max_steps=1)
    assert order == ["setup", "configure_model", "configure_optimizers", "on_fit_start"]
    assert isinstance(made.strategy, ModelParallelStrategy)
    assert made.strategy.model is made.lightning_module is module
    assert made.strategy.restore_checkpoint_after_setup
    assert not made.strategy.lightning_restore_optimizer
    assert made.global_step == 1
