"""The callback AdaptiveMomentum on one process: budget, decisions, Lightning's rules, resume, messages."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import lightning_memopt as lm
from lightning_memopt.callbacks import POLICIES, Problem
from tests._compare import assert_equal

WIDTH = 16
RECIPES = ["adapm", "adapm_lean", "adam_snsm", "adamw", "adam_mini"]


class Module(LightningModule):
    """A transformer layer that learns to return its input."""

    def __init__(self, recipe: str = "adapm_lean", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.recipe, self.options = recipe, options

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", (self.net(batch) - batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = lm.MemOpt(self.named_parameters(), recipe=self.recipe, lr=1e-3, **self.options)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer)}

    def train_dataloader(self) -> Any:
        data = torch.randn(40, 6, WIDTH, generator=torch.Generator().manual_seed(1))
        return DataLoader(data, batch_size=2)

    val_dataloader = train_dataloader


class Manual(Module):
    """Two optimizers, each with half of the weights, stepped by hand; the second one every other time."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.manual_backward((self.net(batch) - batch).square().mean())
        first.step()
        if batch_idx % 2:
            second.step()
        for optimizer in (first, second):
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        named = list(self.named_parameters())
        mlp = [pair for pair in named if "linear" in pair[0]]
        rest = [pair for pair in named if "linear" not in pair[0]]
        return [lm.AdaPMLean(rest, lr=1e-3), lm.AdaPMLean(mlp, lr=1e-3)]


class Watch(Callback):
    """Collect the bytes of momentum after every batch, as the plan says and as they are."""

    def __init__(self) -> None:
        self.planned: list[int] = []
        self.real: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        optimizer = trainer.optimizers[0]
        self.planned.append(optimizer.snapshot().momentum_bytes)
        keys = {key for kind in map(lm.MOMENTA.get, lm.MOMENTA.names()) for key in kind.keys}
        tensors = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
        self.real.append(sum(v.untyped_storage().nbytes() for key, v in tensors if key.rpartition(".")[2] in keys))


def adaptive(**options: Any) -> lm.AdaptiveMomentum:
    defaults = {"budget": 0.3, "policy": "energy", "every_n_steps": 4, "freeze_after": None}
    return lm.AdaptiveMomentum(**{**defaults, **options})


def fit(module: LightningModule, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, "max_steps": 30}
    trainer = Trainer(**{**quiet, "callbacks": list(callbacks), **options})
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def dense_bytes(module: nn.Module) -> int:
    return 4 * sum(param.numel() for param in module.parameters())


# ------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("policy", POLICIES.names())
def test_the_budget_holds_after_every_step(policy, recipe):
    module, watch = Module(recipe), Watch()
    callback = adaptive(policy=policy)
    fit(module, callback, watch, max_steps=14)
    budget = int(0.3 * dense_bytes(module))
    assert 0 < max(watch.planned) <= budget
    assert watch.real == watch.planned
    assert [entry["step"] for entry in callback.history] == [0, 4, 8, 12]
    assert all(entry["momentum_bytes"] <= budget for entry in callback.history)


def test_too_small_a_budget_tells_the_smallest():
    with pytest.raises(ValueError, match=r"rank 1 for every matrix .* take (\d+) bytes") as caught:
        fit(Module(), adaptive(budget=100))
    smallest = int(str(caught.value).rpartition("take ")[2].split()[0])
    callback = adaptive(budget=smallest)
    fit(Module(), callback, max_steps=2)
    assert set(callback.history[0]["ranks"].values()) == {1}
    with pytest.raises(ValueError, match="take"):
        fit(Module(), adaptive(budget=smallest - 1), max_steps=2)


def test_without_a_budget_quality_decides():
    sizes = {}
    for quality in (0.1, 0.9):
        callback = adaptive(budget=None, quality=quality, policy="uniform", max_moves=99)
        fit(Module(), callback)
        sizes[quality] = callback.history[-1]["momentum_bytes"]
    assert sizes[0.1] < sizes[0.9]


# ---------------------------------------------------------------------------------------------------------- decisions


class Noise(Module):
    """A module whose gradients are noise: nothing to learn about its momentum."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        generator = torch.Generator().manual_seed(self.global_step)
        for param in self.parameters():
            param.grad = torch.randn(param.shape, generator=generator)


@pytest.mark.parametrize("policy", POLICIES.names())
@pytest.mark.parametrize("kind", [Module, Noise])
def test_the_number_of_moves_falls_to_zero(kind, policy):
    callback = adaptive(policy=policy, every_n_steps=2, max_moves=4)
    fit(kind(), callback, max_steps=80)
    moves = [len(entry["moves"]) for entry in callback.history[1:]]
    assert max(moves) <= 4
    if policy != "schedule":  # whose budget shrinks until the end
        assert sum(moves[-10:]) == 0


@pytest.mark.parametrize(("freeze_after", "last"), [(13, 12), (0.5, 12), (None, 28)])
def test_it_freezes(freeze_after, last, capsys):
    callback = adaptive(freeze_after=freeze_after)
    fit(Module(), callback)
    assert callback.history[-1]["step"] == last
    assert ("frozen after step" in capsys.readouterr().out) == (freeze_after is not None)


def test_what_is_said_logged_and_drawn(tmp_path, capsys):
    callback = adaptive(log=True, figures=True)
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "board")]
    trainer = fit(Module(), callback, logger=loggers, default_root_dir=tmp_path, log_every_n_steps=1)
    said = capsys.readouterr().out
    assert "AdaptiveMomentum starts with" in said
    assert "AdaptiveMomentum, step 4: " in said
    assert " → " in said
    metrics = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    for name in ("memopt/rank/net.linear1.weight", "memopt/oscillation/net.self_attn.in_proj_weight:key"):
        assert name in metrics
    assert (tmp_path / "csv" / "version_0" / "allocation.png").stat().st_size > 5000
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board" / "version_0"))
    events.Reload()
    assert events.Tags()["images"] == ["memopt/allocation"]
    assert "memopt/residual/net.linear2.weight" in events.Tags()["scalars"]
    assert trainer.is_global_zero
    for value in ("rank", "oscillation", "residual"):
        figure = callback.plot(value)
        assert len(figure.axes[0].get_yticks()) == len(callback.history[-1]["ranks"])
    with pytest.raises(ValueError, match="Unknown value to plot 'ranks'. Did you mean 'rank'"):
        callback.plot("ranks")


def test_a_policy_of_ones_own():
    def all_to_the_first(problem: Problem) -> dict[str, int]:
        return {block.name: 5 if position == 0 else 1 for position, block in enumerate(problem.blocks)}

    callback = adaptive(policy=all_to_the_first)
    fit(Module(), callback, max_steps=2)
    assert list(callback.history[0]["ranks"].values()) == [5, 1, 1, 1, 1, 1]


class Proposes(lm.AdaptiveMomentum):
    """Overrides the decision."""

    change: Any = None

    def propose(self, snapshot: lm.Snapshot, signals: Any) -> Any:
        assert set(signals) == {block.name for block in snapshot.blocks if len(block.shape) > 1}
        return {"net.linear1.weight": self.change}


def test_a_subclass_proposes():
    callback = Proposes(budget=0.3, every_n_steps=4, freeze_after=None)
    callback.change = {"second_moment": "dense", "rank": 1}
    trainer = fit(Module(), callback, max_steps=4)
    assert callback.history[-1]["moves"]["net.linear1.weight"] == [2, 1]
    (facts,) = [block for block in trainer.optimizers[0].snapshot().blocks if block.name == "net.linear1.weight"]
    assert facts.second_moment == "dense"


def test_what_a_subclass_proposes_has_to_fit():
    callback = Proposes(budget=0.2, every_n_steps=4, freeze_after=None)
    callback.change = {"momentum": "dense"}
    module, watch = Module(), Watch()
    with pytest.raises(ValueError, match=r"would take momentum to .*; the budget is .*\. Nothing has changed\."):
        fit(module, watch, callback, max_steps=10)
    assert len(callback.history) == 1
    assert len(set(watch.planned)) == 1


# --------------------------------------------------------------------------------------------------- Lightning's rules


def test_accumulation_clipping_validation_and_fast_dev_run():
    callback = adaptive()
    fit(Module(), callback, max_steps=9, accumulate_grad_batches=3, gradient_clip_val=0.1, limit_val_batches=2)
    assert [entry["step"] for entry in callback.history] == [0, 4, 8]
    callback = adaptive()
    fit(Module(), callback, fast_dev_run=True)
    assert [entry["step"] for entry in callback.history] == [0]
    callback = adaptive(freeze_after=0.5)
    fit(Module(), callback, max_steps=-1, max_epochs=2)  # 40 steps
    assert callback.history[-1]["step"] == 16
    stop = EarlyStopping("loss", patience=0, min_delta=1e9, check_on_train_epoch_end=True)
    callback = adaptive()
    fit(Module(), callback, stop, max_steps=-1, max_epochs=20)
    assert callback.history[-1]["step"] == 40
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", callbacks=[callback])
    trainer.validate(Module(), verbose=False)


def test_training_of_unknown_length():
    callback = adaptive(freeze_after=0.3)
    with pytest.warns(UserWarning, match=r"`freeze_after` 0\.3 is a share of a training whose length is not known"):
        fit(Module(), callback, max_steps=-1, max_epochs=-1, max_time=timedelta(seconds=1))
    with pytest.raises(ValueError, match="max_steps"):
        fit(Module(), adaptive(policy="schedule"), max_steps=-1, max_epochs=-1, max_time=timedelta(seconds=1))


def test_two_fits_with_one_callback():
    callback = adaptive()
    for _ in range(2):
        fit(Module(), callback, max_steps=6)
        assert [entry["step"] for entry in callback.history] == [0, 4]


def test_manual_optimization_with_two_optimizers():
    with pytest.raises(ValueError, match="Optimizers 0, 1 can be adapted: choose one with `optimizer_idx`"):
        fit(Manual(), adaptive())
    first, second = adaptive(optimizer_idx=0), adaptive(optimizer_idx=1)
    assert first.state_key != second.state_key
    fit(Manual(), first, second, max_steps=36)  # of both: 24 batches
    assert first.history[-1]["step"] == 24
    assert second.history[-1]["step"] == 12
    assert not first.history[0]["ranks"].keys() & second.history[0]["ranks"].keys()


class Unfreeze(Callback):
    """Let a layer train from the second epoch on."""

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        pl_module.net.linear1.requires_grad_(False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.current_epoch == 1:
            pl_module.net.linear1.requires_grad_(True)


def test_a_layer_that_trains_later():
    module, watch, callback = Module(), Watch(), adaptive(budget=0.2)
    fit(module, Unfreeze(), callback, watch, max_steps=26)
    assert max(watch.planned[20:]) <= 0.2 * dense_bytes(module)
    assert "net.linear1.weight" not in callback.history[1]["ranks"]
    assert "net.linear1.weight" in callback.history[-1]["ranks"]


class Plain(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Plain, {}, "nothing to adapt .*AdamW is no optimizer of lightning_memopt.*AdaPMLean"),
        (lambda: Module("adafactor"), {}, "its recipe 'adafactor' has no momentum"),
        (lambda: Module(betas=(0.0, 0.9)), {}, "beta1 is 0"),
        (Module, {"optimizer_idx": 1}, "`optimizer_idx` is 1, but the module has 1 optimizers"),
    ],
)
def test_what_cannot_be_adapted_is_refused_at_the_start(module, options, message):
    watch = Watch()
    with pytest.raises(ValueError, match=message):
        fit(module(), watch, adaptive(**options))
    assert watch.planned == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.5}, "`budget` must be a fraction"),
        ({"budget": "many"}, "`budget` must be a fraction"),
        ({"policy": "benefits"}, "Unknown policy 'benefits'. Did you mean 'benefit'"),
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer of at least 1, got 0"),
        ({"start": 1.5}, "`start` must be an integer of at least 1"),
        ({"min_rank": 0}, "`min_rank` must be an integer"),
        ({"quality": 0}, r"`quality` must be a share .* in \(0, 1\], got 0"),
        ({"freeze_after": 1.5}, "`freeze_after` must be a fraction of the training"),
        ({"freeze_after": 0}, "`freeze_after` must be a fraction of the training"),
        ({"dropped": "keep"}, "Unknown value of `dropped` 'keep'"),
    ],
)
def test_values_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        lm.AdaptiveMomentum(**options)


# -------------------------------------------------------------------------------------------------------------- resume


class Stepwise(Module):
    """Data that depends on the step only: Lightning repeats a batch after a checkpoint from the end of an epoch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        return super().training_step(torch.randn(batch.shape, generator=generator), batch_idx)


@pytest.mark.parametrize("policy", ["energy", "benefit"])
def test_a_resumed_run_decides_as_the_uninterrupted_one(tmp_path, policy):
    options = {"policy": policy, "every_n_steps": 3, "freeze_after": 0.7}
    whole, watch = Stepwise(), adaptive(**options)
    fit(whole, watch, max_steps=60)
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    cut = adaptive(**options)
    fit(Stepwise(), cut, save, max_steps=60, enable_checkpointing=True)
    path = tmp_path / "step=20.ckpt"
    resumed, callback = Stepwise(), adaptive(**options)
    fit(resumed, callback, max_steps=60, ckpt_path=path)
    assert callback.history == cut.history == watch.history
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert_equal(ours, theirs)


def test_another_budget_on_resume_and_checkpoints_without_the_callback(tmp_path, capsys):
    path = tmp_path / "with.ckpt"
    callback = adaptive()
    fit(Module(), callback, enable_checkpointing=True, default_root_dir=tmp_path).save_checkpoint(path)
    assert torch.load(path, weights_only=True)["callbacks"][callback.state_key]["history"] == callback.history
    watch = Watch()
    module = Module()
    fit(module, adaptive(budget=0.2), watch, max_steps=34, ckpt_path=path)
    assert "goes on after step 30" in capsys.readouterr().out
    assert max(watch.planned) <= 0.2 * dense_bytes(module)
    fit(Module(), max_steps=34, ckpt_path=path)
    bare = tmp_path / "without.ckpt"
    fit(Module("adamw"), enable_checkpointing=True, default_root_dir=tmp_path).save_checkpoint(bare)
    watch, callback = Watch(), adaptive(budget=0.2)
    fit(Module("adamw"), callback, watch, max_steps=34, ckpt_path=bare)
    assert max(watch.planned) <= 0.2 * dense_bytes(module)
    assert callback.history[0]["moves"]
