"""Optimizers that were made before sharding, several, none, and those that are given parameters later."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memopt as lm
from lightning_memopt import MemOptFSDPStrategy
from tests.strategy._training import VOCAB, WIDTH, LanguageModule, Network, fit, raises, trainer, whole_weights
from tests.strategy.cases.shared import FINDS_UNUSED, against_ddp, case, close, params_of, same_everywhere


class Assigned(LanguageModule):
    """An optimizer that was made before anybody thought of sharding, as LightningCLI does."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], scheduler: bool = False) -> None:
        super().__init__()
        self.made = make(self.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(self.made, 1, gamma=0.5)
        both = {"optimizer": self.made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        self.make_optimizer = lambda _: both if scheduler else self.made


@case(2)
def optimizers_made_before_sharding_train() -> None:
    for make in (
        lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
        lambda params: torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.5),  # has state from the start
    ):
        module = against_ddp(lambda make=make: Assigned(make))
        assert module.trainer.optimizers[0] is module.made
        assert all(param is live for param, live in zip(params_of(module.made), module.parameters(), strict=True))
    made = partial(lm.AdaPMLean, lr=0.01)
    early, late = Assigned(made), LanguageModule(optimizer=lambda it: made(it.parameters()))
    fit(early)
    fit(late)
    close(early, late, 0)
    assert {block.name for block in early.made.snapshot().blocks} == {name for name, _ in early.named_parameters()}


@case(2)
def schedulers_keep_their_optimizer() -> None:
    made = partial(torch.optim.AdamW, lr=0.01, fused=True)
    module = against_ddp(lambda: Assigned(made, scheduler=True), max_steps=3)
    assert module.made.param_groups[0]["lr"] == 0.01 * 0.5**3


@case(2)
def optimizers_that_would_train_nothing_are_refused() -> None:
    stranger, start = nn.Linear(3, 4), "of the 2 parameters of the optimizer"
    with raises(ValueError, f"2 {start} AdamW are not in LanguageModule", "(4, 3)", "not be trained"):
        fit(LanguageModule(optimizer=lambda _: torch.optim.AdamW(stranger.parameters())))
    with raises(ValueError, f"1 {start} AdaPMLean are not", "(4, 3)"):
        named = [("weight", stranger.weight)]
        fit(LanguageModule(optimizer=lambda it: lm.AdaPMLean([*named, ("model.norm.weight", it.model.norm.weight)])))
    with raises(ValueError, "AdamW has no parameters", "configure_optimizers"):
        fit(LanguageModule(optimizer=lambda _: torch.optim.AdamW([{"params": []}])))

    class Replaced(LanguageModule):
        def configure_model(self) -> None:
            self.model.lm_head = nn.Linear(WIDTH, VOCAB + 1, bias=False)

    module = Replaced()
    made = lm.AdaPMLean(module.parameters())
    module.make_optimizer = lambda _: made
    with raises(ValueError, "'model.lm_head.weight'", "(12, 8)", "(13, 8)"):
        fit(module)


@case(2)
def no_optimizer_trains_nothing() -> None:
    """As with other strategies; checkpoints have no optimizer states, and load with and without an optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        for distributed in (True, False):
            without_an_optimizer(Path(folder) / "some.ckpt", distributed)
            dist.barrier()


def without_an_optimizer(path: Path, distributed: bool) -> None:
    before = whole_weights(LanguageModule())
    strategies = (MemOptFSDPStrategy(save_distributed_checkpoint=distributed) for _ in range(4))
    module = LanguageModule(optimizer=lambda _: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = fit(module, next(strategies), gradient_clip_val=1.0)
    warned = any("this fit will run with no optimizer" in str(entry.message) for entry in caught)
    assert warned == (dist.get_rank() == 0)
    assert fitted.global_step == 3
    torch.testing.assert_close(whole_weights(module), before, rtol=0, atol=0)
    fitted.save_checkpoint(path)
    torch.manual_seed(1)
    other = LanguageModule(Network(), optimizer=lambda _: None)
    again = trainer(next(strategies), max_steps=5)
    again.fit(other, ckpt_path=path)
    assert again.global_step == 5
    torch.testing.assert_close(whole_weights(other), before, rtol=0, atol=0)
    trainer(next(strategies)).validate(LanguageModule(), ckpt_path=path, verbose=False)
    with raises(KeyError, "checkpoint contains only the model"):
        trainer(next(strategies), max_steps=5).fit(LanguageModule(), ckpt_path=path)


class Odd(torch.optim.SGD):
    """Has state that nobody knows how to cut."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for param in self.param_groups[0]["params"]:
            self.state[param]["sketch"] = torch.zeros(7)


@case(2)
def state_that_cannot_be_cut_is_refused() -> None:
    module = Assigned(Odd)
    old = params_of(module.made)
    with raises(ValueError, "Odd has state 'sketch' of shape (7,)", "ckpt_path"):
        fit(module)
    assert all(param is before for param, before in zip(params_of(module.made), old, strict=True))


class TwoPlayers(LightningModule):
    """Manual optimization of two networks, each with an optimizer of its own, as in a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator, self.critic = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), nn.Linear(4, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(second)
        loss = self.critic(self.generator(batch).detach()).square().mean() - self.critic(batch).tanh().mean()
        second.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(second, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        second.step()
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(-self.critic(self.generator(batch)).tanh().mean())
        first.step()
        self.untoggle_optimizer(first)

    def configure_optimizers(self) -> Any:
        nets = (self.generator, self.critic)
        return [torch.optim.AdamW(net.parameters(), lr=0.01, fused=True) for net in nets]

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), batch_size=4)


@case(2)
def manual_optimization_with_two_optimizers() -> None:
    sharded, reference = TwoPlayers(), TwoPlayers()
    fit(sharded, max_steps=4)
    fit(reference, FINDS_UNUSED, max_steps=4)
    close(sharded, reference)
    assert sharded.global_step == 4

    class Compressed(TwoPlayers):
        def configure_optimizers(self) -> Any:
            return [lm.AdaPMLean(net.parameters(), lr=0.01) for net in (self.generator, self.critic)]

    module = Compressed()
    fit(module, max_steps=4)
    same_everywhere(module)


class Thawed(BaseFinetuning):
    """Unfreezes what is sharded along one dimension or the other, vectors of equal values, and statistics."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.model.embed_tokens)
        self.freeze(pl_module.model.layers[0])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            modules = [pl_module.model.embed_tokens, pl_module.model.layers[0]]
            self.unfreeze_and_add_param_group(modules, optimizer, lr=1e-3)


@case(2)
def finetuning_adds_sharded_parameters() -> None:
    def make(module: LightningModule) -> torch.optim.Optimizer:
        return lm.AdaPMLean([(name, p) for name, p in module.named_parameters() if p.requires_grad], lr=1e-3)

    module = LanguageModule(optimizer=make)
    frozen = [*module.model.embed_tokens.parameters(), *module.model.layers[0].parameters()]
    count, names = len(frozen), {name for name, param in module.named_parameters() if any(param is p for p in frozen)}
    before = {name: param.detach().clone() for name, param in module.named_parameters() if name in names}
    fit(module, callbacks=[Thawed()], max_epochs=2, max_steps=-1, limit_train_batches=2)
    (optimizer,) = module.trainer.optimizers
    assert [len(group["params"]) for group in optimizer.param_groups][1:] == [count]
    after = lm.full_state_dict(module)
    if dist.get_rank() == 0:
        assert all((after[name] != before[name]).any() for name in names)
