"""Averaged weights are sharded, and equal those of one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_memopt import MemOptFSDPStrategy
from lightning_memopt.memory.storages import Storages
from lightning_memopt.planner.planning import plan_module
from lightning_memopt.planner.settings import RunSettings
from tests.strategy._training import WIDTH, LanguageModule, Network, fit, trainer, whole, whole_weights
from tests.strategy.cases.shared import Direct, case, close_weights, same_weights_everywhere

FINAL = {"check_val_every_n_epoch": None, "val_check_interval": 2}


class Ema(WeightAveraging):
    def __init__(self, **options: Any) -> None:
        super().__init__(avg_fn=lambda average, current, _: 0.75 * average + 0.25 * current, **options)


class Normalised(Network):
    """Has buffers: running statistics, a count, and one that checkpoints leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH), persistent=False)

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.embed_tokens(batch)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.lm_head(self.norm(hidden.mT).mT * self.scale)


class Seen(LanguageModule):
    """Keeps the weights with which it is validated."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__(network)
        self.validated: list[dict[str, Tensor]] = []

    def on_validation_start(self) -> None:
        self.before = whole_weights(self)

    def on_validation_epoch_start(self) -> None:
        self.validated.append(whole_weights(self))

    def on_validation_end(self) -> None:
        close_weights(whole_weights(self), self.before, 0)


def average_of(callback: Any) -> dict[str, Tensor]:
    found = {name: whole(value) for name, value in callback._average_model.module.state_dict().items()}
    return {name: value for name, value in found.items() if "running" not in name}


@case(2, 4)
def averaged_weights_are_those_of_ddp() -> None:
    results = []
    for strategy in ("memopt_fsdp", "ddp"):
        callback, module = Ema(), Seen()
        fit(module, strategy, max_steps=4, callbacks=[callback], **FINAL)
        results.append((average_of(callback), whole_weights(module), module.validated))
    (average, final, validated), (expected, _, others) = results
    close_weights(average, expected, 1e-5)
    close_weights(final, average, 0)  # the average is the result of training
    assert len(validated) == len(others) == 2
    for ours, theirs in zip(validated, others, strict=True):
        close_weights(ours, theirs, 1e-5)
    same_weights_everywhere(average)
    assert any(not torch.equal(a, b) for a, b in zip(validated[0].values(), validated[1].values(), strict=True))


@case(2)
def averages_are_sharded_like_the_model() -> None:
    for options in ({}, {"device": "cpu"}, {"use_buffers": False}):
        callback, module = Ema(**options), LanguageModule(Normalised())
        fit(module, callbacks=[callback], max_steps=2)
        average = dict(callback._average_model.module.named_parameters())
        for name, param in module.named_parameters():
            assert isinstance(average[name], DTensor)
            assert average[name].placements == param.placements
        if dist.get_rank() == 0:
            plan = plan_module(LanguageModule(Normalised()), [], RunSettings(2, averaged=True), name="planned")
            assert plan.averaged_bytes == Storages().count(average.values())
        buffers = dict(callback._average_model.module.named_buffers())
        assert buffers.keys() == dict(module.named_buffers()).keys()
        assert "model.scale" not in callback._average_model.module.state_dict()


@case(2)
def averages_of_plain_and_tied_parameters() -> None:
    for make in (Direct, lambda: LanguageModule(Network(tied=True))):
        torch.manual_seed(0)
        module, callback = make(), WeightAveraging()  # the mean of all steps
        fit(module, callbacks=[callback], max_steps=3)
        average = {name: whole(value) for name, value in callback._average_model.module.named_parameters()}
        close_weights(whole_weights(module), average, 0)


@case(2)
def averages_keep_the_dtype_of_the_model_before_it_is_converted() -> None:
    callback, module = Ema(), LanguageModule()
    fit(module, callbacks=[callback], precision="bf16-true", max_steps=2)
    assert {param.dtype for param in module.parameters()} == {torch.bfloat16}
    assert {param.dtype for param in callback._average_model.module.parameters()} == {torch.float32}


@case(2)
def gathered_weights_are_freed_before_the_swap() -> None:
    results = []
    for reshard in (False, True):
        module = Seen()
        strategy = MemOptFSDPStrategy(reshard_after_forward=reshard)
        fit(module, strategy, max_steps=4, callbacks=[Ema()], **FINAL)
        results.append(whole_weights(module))
    close_weights(*results, 0)


@case(2)
def other_trainers_average_as_before() -> None:
    """Lightning's callback is the same for a Trainer with another strategy, and for a second fit."""
    module, callback = LanguageModule(), Ema()
    for fitted, strategy, sharded in ((module, "memopt_fsdp", True), (LanguageModule(), "ddp", False),
                                      (module, "memopt_fsdp", True)):  # fmt: skip
        fit(fitted, strategy, callbacks=[callback], max_steps=1)
        assert all(isinstance(param, DTensor) == sharded for param in callback._average_model.parameters())
    trainer(callbacks=[Ema()]).validate(module, verbose=False)
