"""Other meshes than all ranks along one dimension, and what the user shards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lightning_memopt as lm
from lightning_memopt import MemOptFSDPStrategy
from tests.strategy._training import Block, LanguageModule, Network, adamw, fit, global_batches, raises, trainer
from tests.strategy.cases.shared import Custom, Reference, against_ddp, case, close, same_everywhere, units_of


@case(4)
def hybrid_sharding() -> None:
    module = against_ddp(ours=MemOptFSDPStrategy(replicate_size=2), max_steps=4, gradient_clip_val=0.1)
    assert {param.placements[0] for param in module.parameters()} == {Replicate()}
    mesh = module.device_mesh
    assert mesh.mesh_dim_names == ("replicate", "shard", "tensor_parallel")
    assert module.trainer.strategy.distributed_sampler_kwargs == {"num_replicas": 4, "rank": dist.get_rank()}
    assert mesh["data_parallel"].size() == 4  # as users of ModelParallelStrategy write it
    ours = LanguageModule(optimizer=lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01))
    fit(ours, MemOptFSDPStrategy(replicate_size=2), max_steps=2)
    same_everywhere(ours)


@case(2)
def sizes_that_do_not_fit_are_refused() -> None:
    for sizes in ({"data_parallel_size": 3}, {"replicate_size": 4}, {"tensor_parallel_size": 3}):
        with raises(RuntimeError, "multiplied should equal the world size (2)"):
            fit(LanguageModule(), MemOptFSDPStrategy(**sizes))


@case(4)
def tensor_parallelism_of_the_user() -> None:
    class Parallel(LanguageModule):
        shard_over_columns = False

        def configure_model(self) -> None:
            if any(isinstance(param, DTensor) for param in self.parameters()):
                return
            if self.shard_over_columns:
                self.drop_biases()  # which only have a dimension 0
            tensors, data = self.device_mesh["tensor_parallel"], self.device_mesh["data_parallel"]
            plan = {"mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
            colwise = set()
            for layer in self.model.layers:
                parallelize_module(layer, tensors, plan)
                colwise.add(layer.mlp.up_proj.weight)
            placed = (lambda param: Shard(1) if param in colwise else None) if self.shard_over_columns else None
            for layer in self.model.layers:
                fully_shard(layer, mesh=data, shard_placement_fn=placed)
            fully_shard(self.model, mesh=data)

        def drop_biases(self) -> None:
            for layer in self.model.layers:
                layer.mlp.up_proj.bias = None

    def strategy() -> MemOptFSDPStrategy:
        return MemOptFSDPStrategy(tensor_parallel_size=2)

    def single() -> LanguageModule:
        """The same batches in one process, from two data-parallel ranks and not four."""
        module = LanguageModule()
        optimizer = adamw(module)
        for batch in global_batches(2 * module.batch_size)[:3]:
            optimizer.zero_grad()
            module.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
        return module

    module = Parallel()
    fit(module, strategy(), gradient_clip_val=0.1)
    assert module.trainer.strategy.distributed_sampler_kwargs["num_replicas"] == 2
    close(module, single())
    with raises(NotImplementedError, "_StridedShard", "placements"):
        fit(Parallel(optimizer=lambda it: lm.AdaPMLean(it.parameters(), lr=0.01)), strategy())
    module = Parallel(optimizer=lambda it: lm.AdaPMLean(it.parameters(), lr=0.01))
    module.shard_over_columns = True
    fit(module, strategy())
    same_everywhere(module)
    with raises(ValueError, "`tensor_parallel_size` is 2", "device_mesh['tensor_parallel']"):
        fit(LanguageModule(), strategy())


class UserSharded(LanguageModule):
    """Shards the blocks and leaves the embedding and the head plain."""

    def configure_model(self) -> None:
        for layer in self.model.layers:
            if not isinstance(layer, FSDPModule):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


@case(2)
def what_the_user_sharded_stays_as_it_is() -> None:
    module = UserSharded()
    made = torch.optim.AdamW(module.parameters(), lr=0.01)  # before `configure_model`
    module.make_optimizer = lambda _: made
    fit(module)
    assert [name for name, _ in units_of(module)] == ["model.layers.0", "model.layers.1"]
    assert not isinstance(module.model.lm_head.weight, DTensor)
    close(module, Reference.of("32-true"))
    same_everywhere(module)
    for option in ({"wrap": [Block]}, {"activation_checkpointing": True}, {"cpu_offload": True}):
        with raises(ValueError, f"`{next(iter(option))}` would have no effect", "configure_model"):
            fit(UserSharded(), MemOptFSDPStrategy(**option))


@case(2)
def what_the_user_sharded_on_the_meta_device_is_initialised() -> None:
    class Meta(UserSharded):
        def configure_model(self) -> None:
            super().configure_model()
            if not isinstance(self.model, FSDPModule):
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    made = trainer(max_steps=2)
    with made.init_module(empty_init=True):
        module = Meta(Network(tied=True))
    made.fit(module)
    same_everywhere(module)
    assert module.model.lm_head.weight is module.model.embed_tokens.weight
    made = trainer(max_steps=2)
    with made.init_module(empty_init=True):
        module = Meta(Network())
        module.model.custom = Custom()
    with raises(ValueError, "model.custom (Custom): weight, positions"):
        made.fit(module)
