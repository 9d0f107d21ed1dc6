"""Gradient release: the updates of ordinary steps, callbacks and checkpoints that keep working, and what is refused."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

import lightning_memopt as lm
from lightning_memopt import MemOptFSDPStrategy
from lightning_memopt.strategy.releasing import refuse_settings
from tests.strategy._training import LanguageModule, fit, raises, trainer, whole_weights
from tests.strategy.cases.shared import Direct, case, close, same_everywhere, shared_folder

BATCHES = {"accumulate_grad_batches": 2}


def lean(module: Any) -> Any:
    return lm.AdaPMLean(module.parameters(), lr=1e-2)


def released(**options: Any) -> MemOptFSDPStrategy:
    return MemOptFSDPStrategy(gradient_release=True, **options)


class Scheduled(LanguageModule):
    """Counts the gradients that exist before the step."""

    def __init__(self) -> None:
        super().__init__(optimizer=lean)
        self.left: list[int] = []

    def configure_optimizers(self) -> Any:
        optimizer = lean(self)
        schedule = lm.WarmupSchedule(optimizer, warmup_steps=2, total_steps=6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.left.append(sum(param.grad is not None for param in self.parameters()))


class Steps(Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.seen.append(trainer.global_step)


@case(2)
def release_makes_the_updates_of_ordinary_steps() -> None:
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        module, reference, steps = Scheduled(), Scheduled(), Steps()
        fit(module, released(activation_checkpointing=precision == "32-true"), precision=precision, callbacks=[steps])
        fit(reference, precision=precision)
        places = 2e-3 if precision == "bf16-true" else 1e-6
        close(module, reference, places)
        same_everywhere(module)
        assert steps.seen == [1, 2, 3]
        assert max(module.left) == 0 < min(reference.left)


@case(2)
def parameters_that_are_not_sharded_take_ordinary_steps() -> None:
    class Module(Direct):
        def __init__(self) -> None:
            super().__init__()
            self.make_optimizer = lean

    module, reference = Module(), Module()
    fit(module, released())
    fit(reference)
    close(module, reference, 1e-6)
    same_everywhere(module)


@case(2)
def release_goes_with_adaptive_momentum_the_monitor_and_a_resume() -> None:
    with shared_folder() as folder:
        made, found = [], []
        for strategy in (released, MemOptFSDPStrategy):
            logger = CSVLogger(folder / strategy.__name__)
            adaptive = lm.AdaptiveMomentum(0.5, policy="energy", every_n_steps=2, start=2, freeze_after=1.0)
            module = Scheduled()
            callbacks = [
                adaptive,
                lm.OptimizerMemoryMonitor(1),
                LearningRateMonitor(),
                ModelCheckpoint(folder / "last"),
            ]
            fit(module, strategy(), 4, callbacks=callbacks, logger=logger, enable_checkpointing=True)
            made.append(module)
            found.append(adaptive.history)
        close(*made, 1e-5)
        assert [entry["step"] for entry in found[0]] == [entry["step"] for entry in found[1]] != []
        module, reference = Scheduled(), Scheduled()
        path = str(folder / "four.ckpt")
        first = fit(reference, MemOptFSDPStrategy(), 2)
        first.save_checkpoint(path)
        for each, strategy in ((module, released()), (reference, MemOptFSDPStrategy())):
            trainer(strategy, max_steps=4).fit(each, ckpt_path=path)
        close(module, reference, 1e-6)


@case(2)
def a_second_fit_is_trained_by_its_own_optimizer() -> None:
    class Still(Scheduled):
        def configure_optimizers(self) -> Any:
            self.made = lm.AdaPMLean(self.parameters(), lr=0.0 if hasattr(self, "made") else 1e-2)
            return self.made

    module = Still()
    fit(module, released(), 2)
    first, before = module.made, whole_weights(module)
    assert not first.releases_gradients
    fit(module, released(), 2)
    assert all(torch.equal(value, before[name]) for name, value in whole_weights(module).items())
    assert {float(state["step"]) for state in first.state.values()} == {2.0}
    assert {float(state["step"]) for state in module.made.state.values()} == {2.0}


@case(2)
def what_needs_all_gradients_is_refused() -> None:
    def two(module: Any) -> Any:
        halves = [list(half.parameters()) for half in (module.model.layers, module.model.lm_head)]
        return [lm.AdaPMLean(half, lr=1e-2) for half in halves]

    module = LanguageModule(optimizer=lean)
    before = whole_weights(module)
    with raises(
        ValueError, "`gradient_clip_val=1.0` needs all gradients", "`clip_update=1.0`", "leave `gradient_release`"
    ):
        fit(module, released(), gradient_clip_val=1.0)
    with raises(ValueError, "`accumulate_grad_batches=2` adds up gradients", "activation_checkpointing"):
        fit(module, released(), **BATCHES)
    with raises(ValueError, "`accumulate_grad_batches=4` adds up gradients"):
        fit(module, released(), callbacks=[GradientAccumulationScheduler({0: 1, 3: 4})])
    assert all(torch.equal(value, before[name]) for name, value in whole_weights(module).items())
    with (
        mock.patch.object(torch, "__version__", "2.12.1"),
        raises(ValueError, "`cpu_offload` with `gradient_release` needs torch 2.13, got 2.12.1"),
    ):
        refuse_settings(trainer(), cpu_offload=True, replicas=1)
    with raises(ValueError, "`gradient_release` frees nothing with `replicate_size=2`", "leave `gradient_release`"):
        fit(LanguageModule(), MemOptFSDPStrategy(replicate_size=2, gradient_release=True))
    with raises(TypeError, "needs an optimizer of lightning_memopt, got AdamW", "recipe 'adamw'"):
        fit(LanguageModule(), released())
    module = LanguageModule(optimizer=two)
    module.automatic_optimization = False
    with raises(ValueError, "`gradient_release` needs one optimizer, got 2"):
        fit(module, released())
    with raises(TypeError, "`gradient_release` must be True or False, got 'yes'"):
        MemOptFSDPStrategy(gradient_release="yes")  # type: ignore[arg-type]


class Manual(LanguageModule):
    """Clips, or goes backward twice, in manual optimization."""

    def __init__(self, *, clips: bool) -> None:
        super().__init__(optimizer=lean)
        self.automatic_optimization, self.clips = False, clips

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch))
        if self.clips:
            self.clip_gradients(optimizer, 1.0, "norm")
        else:
            self.manual_backward(self.loss(batch))
            optimizer.step()


@case(2)
def what_needs_all_gradients_is_refused_in_manual_optimization() -> None:
    with raises(RuntimeError, "Gradients cannot be clipped", "`clip_update=1.0`"):
        fit(Manual(clips=True), released())
    with raises(RuntimeError, "A second backward pass reached a parameter", "`optimizer.step()`"):
        fit(Manual(clips=False), released())
