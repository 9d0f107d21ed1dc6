"""What is refused: models, weights, callbacks, embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_memopt import MemOptFSDPStrategy
from tests.strategy._training import VOCAB, WIDTH, LanguageModule, Network, fit, raises, trainer
from tests.strategy.cases.shared import case, units_of


@case(2)
def different_models_on_the_ranks_are_refused() -> None:
    rank = dist.get_rank()
    module = LanguageModule(Network(layers=2 + rank))
    with raises(ValueError, "rank 0 has 'model.norm.weight", "rank 1 has 'model.layers.2.", "same model"):
        fit(module)
    assert not any(isinstance(param, DTensor) for param in module.parameters())


class Changing(nn.Linear):
    """Changes its weight in every forward pass, in one of the ways in which this is done."""

    def __init__(self, inputs: int, outputs: int, how: str) -> None:
        super().__init__(inputs, outputs)
        self.how = how

    def forward(self, value: Tensor) -> Tensor:
        weight = self.weight
        with torch.no_grad():
            if self.how == "in place":
                weight.clamp_(-5, 5)  # which changes no number yet
            elif self.how == "through data":
                weight.data.clamp_(min=0)
            elif self.how == "new data":
                weight.data = torch.renorm(weight.data, 2, 0, 100.0)
            elif self.how == "a new parameter":
                self.weight = nn.Parameter(weight.clamp(min=0))
        return super().forward(value)


def changing(how: str, *, sharded: bool = False, hook: bool = False) -> LightningModule:
    class Module(LanguageModule):
        def configure_model(self) -> None:
            if sharded and not isinstance(self.model.layers[0], FSDPModule):
                for layer in self.model.layers:
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    torch.manual_seed(0)
    module = Module()
    layer = module.model.layers[1]
    layer.mlp.down_proj = Changing(2 * WIDTH, WIDTH, how)
    if hook:

        def clamp(layer: nn.Module, inputs: Any) -> None:
            layer.mlp.up_proj.weight.data.clamp_(min=0)

        layer.register_forward_pre_hook(clamp)
    return module


@case(2)
def weights_that_change_in_forward_are_refused() -> None:
    texts = ("Weights change in the forward pass of 'model.layers.1'", "would be lost", "`weight.clamp(min=0)`")
    for how in ("in place", "through data", "new data", "a new parameter"):
        for sharded in (False, True):
            with raises(NotImplementedError, *texts, ": 'model.layers.1.mlp.down_proj.weight' (Changing)."):
                fit(changing(how, sharded=sharded))
    with raises(NotImplementedError, *texts, ": 'model.layers.1.mlp.up_proj.weight' (Linear)."):
        fit(changing("not", hook=True), MemOptFSDPStrategy(activation_checkpointing=True))
    module = changing("through data")
    module.model = torch.compile(module.model, backend="eager")
    with raises(NotImplementedError, "'model._orig_mod.layers.1.mlp.down_proj.weight' (Changing)."):
        fit(module)
    module = changing("not")
    made = trainer(max_steps=1)
    made.validate(module, verbose=False)
    hooks = [len(unit._forward_hooks) for _, unit in units_of(module)]
    made.fit(module)
    assert [len(unit._forward_hooks) + 1 for _, unit in units_of(module)] == hooks  # they looked once


class PastForward(LanguageModule):
    """Uses what is in the network without calling the network."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = torch.nn.functional.embedding(batch, self.model.embed_tokens.weight)
        return nn.functional.linear(hidden, self.model.lm_head.weight).square().mean()


@case(2)
def weights_that_nothing_gathers_are_explained() -> None:
    for stage in ("fit", "validate", "test", "predict"):
        module = PastForward()
        module.predict_step = lambda batch, batch_idx, module=module: module.loss(batch)  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="got mixed torch.Tensor and DTensor") as caught:
            getattr(trainer(max_steps=1), stage)(module)
        (note,) = caught.value.__notes__
        assert "its outermost units are 'model'." in note
        assert "torch.distributed.fsdp.register_fsdp_forward_method" in note


@case(2)
def the_callback_that_averages_full_copies_is_refused() -> None:
    module = LanguageModule()
    with raises(TypeError, "StochasticWeightAveraging averages full copies", "use `WeightAveraging` or `EMAWeightAver"):
        fit(module, callbacks=[StochasticWeightAveraging(0.01)])
    assert not any(isinstance(param, DTensor) for param in module.parameters())
    trainer(callbacks=[StochasticWeightAveraging(0.01)]).validate(LanguageModule(), verbose=False)


@case(2)
def callbacks_that_prune_sharded_weights_are_refused() -> None:
    module = LanguageModule()
    with raises(TypeError, "The callback ModelPruning needs full weights", "torch.nn.utils.prune", "strategy='ddp'"):
        fit(module, callbacks=[ModelPruning("l1_unstructured", amount=0.5)])
    assert not any(isinstance(param, DTensor) for param in module.parameters())
    trainer(callbacks=[ModelPruning("l1_unstructured", amount=0.5)]).validate(LanguageModule(), verbose=False)


@case(2)
def embeddings_that_sharding_would_break_are_refused() -> None:
    for options, texts in (
        ({"max_norm": 1.0}, ("Embeddings with `max_norm` change their weights", "torch.renorm")),
        ({"sparse": True}, ("Sparse gradients cannot be reduced over ranks", "`sparse=False`")),
    ):
        for kind in (nn.Embedding, nn.EmbeddingBag):
            module = LanguageModule()
            module.model.embed_tokens = kind(VOCAB, WIDTH, **options)
            with raises(ValueError, "'model.embed_tokens.weight'", *texts):
                fit(module)
            assert not any(isinstance(param, DTensor) for param in module.parameters())
    module = LanguageModule()
    module.model.embed_tokens = nn.Embedding(VOCAB, WIDTH, sparse=True).requires_grad_(False)
    fit(module, max_steps=1)
