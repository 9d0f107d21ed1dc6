"""Parameters of all kinds: unused, empty, tied, shared, frozen, outside of all units."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import lightning_memopt as lm
from lightning_memopt import MemOptFSDPStrategy
from tests.strategy._training import VOCAB, WIDTH, LanguageModule, Network, fit, trainer, whole, whole_weights
from tests.strategy.cases.shared import FINDS_UNUSED, Direct, against_ddp, case, close, same_everywhere, shared_folder


class Sometimes(Network):
    """Uses one parameter on the first rank only."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.extra = nn.Parameter(torch.ones(VOCAB))

    def forward(self, batch: Tensor) -> Tensor:
        logits = super().forward(batch)
        return logits * self.extra if dist.get_rank() == 0 else logits


class Filling(LanguageModule):
    def on_fit_start(self) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_reduce_scatter_unused_params(True)


@case(2)
def parameters_that_some_ranks_do_not_use() -> None:
    if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):  # since torch 2.13
        module = against_ddp(lambda: Filling(Sometimes()), ddp=FINDS_UNUSED)
        assert not torch.equal(whole(module.model.extra), torch.ones(VOCAB))


@case(2)
def parameters_on_the_module_itself() -> None:
    module = against_ddp(Direct, ddp=FINDS_UNUSED, max_steps=4)
    assert not any(isinstance(param, DTensor) for param in (module.scale, module.temperature, module.only_first))
    assert not torch.equal(module.only_first, torch.ones(3))
    assert torch.equal(module.unused, torch.ones(2))
    ours = Direct()
    ours.make_optimizer = lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01)
    fit(ours, max_steps=4)
    same_everywhere(ours)


class Hollow(Network):
    """Has parameters without elements: beside others, alone in a layer, and all that a block trains."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(2, 0, 4))
        self.features = nn.Linear(0, WIDTH, bias=False)
        self.layers[0].requires_grad_(False)
        self.layers[0].adapter = nn.Parameter(torch.zeros(0, WIDTH))

    def forward(self, batch: Tensor) -> Tensor:
        nothing = self.features(self.features.weight.new_zeros(*batch.shape, 0)).sum() + self.layers[0].adapter.sum()
        return super().forward(batch) + nothing + self.none.sum()


@case(2)
def parameters_without_elements() -> None:
    def make(recipe: str) -> LightningModule:
        torch.manual_seed(0)
        return LanguageModule(Hollow(), lambda it: lm.MemOpt(it.named_parameters(), recipe=recipe, lr=0.01))

    # With two replicas, every one is sharded over one rank.
    for recipe, size, distributed in (("adapm_mini", 1, True), ("adam_snsm", 2, False)):
        options: Any = {"replicate_size": size, "save_distributed_checkpoint": distributed}
        module, resumed, reference = make(recipe), make(recipe), make(recipe)
        with shared_folder() as folder:
            made = fit(module, MemOptFSDPStrategy(**options), max_steps=2, overfit_batches=1)
            made.save_checkpoint(folder / "last.ckpt")
            made = trainer(MemOptFSDPStrategy(**options), max_steps=4, overfit_batches=1)
            made.fit(resumed, ckpt_path=folder / "last.ckpt")
        assert resumed.model.none.shape == (2, 0, 4)
        fit(reference, "ddp", max_steps=4, overfit_batches=1)
        close(resumed, reference)
        same_everywhere(resumed)


@case(2)
def tied_weights() -> None:
    def make() -> LightningModule:
        torch.manual_seed(0)
        return LanguageModule(Network(tied=True))

    module = against_ddp(make)
    assert module.model.lm_head.weight is module.model.embed_tokens.weight
    assert len(list(module.parameters())) == 15


@case(2)
def units_that_share_a_weight_are_left_to_their_parent() -> None:
    def make() -> LightningModule:
        torch.manual_seed(0)
        network = Network(layers=3)
        network.layers[2].self_attn.q_proj.weight = network.layers[0].self_attn.q_proj.weight
        return LanguageModule(network)

    module = against_ddp(make)
    units = [name for name, unit in module.named_modules() if isinstance(unit, FSDPModule)]
    assert units == ["model", "model.layers.1"]


@case(2)
def frozen_and_unused_parameters() -> None:
    def make() -> LightningModule:
        module = LanguageModule()
        module.model.extra = nn.Linear(3, 4)
        nn.init.ones_(module.model.extra.weight)
        nn.init.ones_(module.model.extra.bias)
        module.model.embed_tokens.requires_grad_(False)
        module.model.layers[0].requires_grad_(False)
        module.model.layers[1].input_layernorm.weight.no_weight_decay = True
        return module

    before = whole_weights(make())
    module = against_ddp(make, ddp=FINDS_UNUSED)
    after = whole_weights(module)
    frozen = [name for name in before if "embed" in name or "layers.0" in name or "extra" in name]
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert not torch.equal(after["model.lm_head.weight"], before["model.lm_head.weight"])
    assert module.model.layers[1].input_layernorm.weight.no_weight_decay


@case(2)
def initial_weights_come_from_the_first_rank() -> None:
    torch.manual_seed(dist.get_rank())
    module = LanguageModule(Network())
    module.direct = nn.Parameter(torch.randn(3))
    module.model.register_buffer("table", torch.randn(3))
    torch.manual_seed(0)
    expected = LanguageModule(Network())
    fit(module, max_steps=1, limit_train_batches=0)
    close(module.model, expected.model, 0)  # type: ignore[arg-type]
    same_everywhere(module)
    copies = [torch.empty(3) for _ in range(2)]
    dist.all_gather(copies, module.model.table)
    assert torch.equal(*copies)
