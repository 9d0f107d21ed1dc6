"""The callback with a Trainer on one device: the budget always holds, moves settle, a resumed run decides the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

import lightning_memopt as lm
from lightning_memopt import AdaptiveMomentum
from lightning_memopt.callbacks import POLICIES
from lightning_memopt.optim.signals import BlockSignals, Probe
from tests._compare import assert_equal

VOCAB, LENGTH, WIDTH = 12, 6, 24
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.mlp = nn.LayerNorm(WIDTH), nn.Module()
        self.self_attn = nn.MultiheadAttention(WIDTH, 2, bias=False, batch_first=True)
        self.mlp.up_proj = nn.Linear(WIDTH, 2 * WIDTH)
        self.mlp.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        values = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(values, values, values, need_weights=False)[0]
        return hidden + self.mlp.down_proj(self.mlp.up_proj(hidden).relu())


class Network(nn.Module):
    """A small language model: two matrices, and six in every layer, of which three are fused."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.embed_tokens(batch)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.lm_head(self.norm(hidden))


def tokens(seed: int, count: int = 4) -> Tensor:
    return torch.randint(VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


class Module(LightningModule):
    """Learns a fixed set of sequences; the batch depends on the step only."""

    def __init__(self, recipe: str | Callable[..., Any] = "adapm_lean", layers: int = 1, **options: Any) -> None:
        super().__init__()
        self.model = Network(layers)
        self.recipe, self.options = recipe, {"lr": 1e-2, **options}

    def loss(self, seed: int) -> Tensor:
        batch = tokens(seed)
        return nn.functional.cross_entropy(self.model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(self.global_step % 7)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(100))

    def configure_optimizers(self) -> Any:
        if callable(self.recipe):
            return self.recipe(self)
        return lm.MemOpt(self.named_parameters(), self.recipe, **self.options)

    def train_dataloader(self) -> Any:
        return DataLoader(range(10), batch_size=1)

    val_dataloader = train_dataloader


class Watch(Callback):
    """Checks after every batch, and after every step, that momentum takes no more than the budget."""

    def __init__(self, budget: int | None = None, index: int = 0) -> None:
        self.budget, self.index, self.sizes = budget, index, []

    def on_before_zero_grad(self, trainer: Trainer, *args: Any) -> None:
        size = stored(trainer.optimizers[self.index])
        self.sizes.append(size)
        if self.budget is not None:
            assert size <= self.budget, trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.on_before_zero_grad(trainer)
        optimizer = trainer.optimizers[self.index]
        fresh = [
            block for _, param, block in optimizer.blocks() if param.requires_grad and not optimizer.state.get(param)
        ]
        planned = sum(block.recipe.momentum.nbytes(block.layout) for block in fresh)  # of those that have yet to train
        assert self.sizes[-1] == optimizer.snapshot().momentum_bytes - planned


def stored(optimizer: lm.MemOpt) -> int:
    """Return the bytes of all momentum, projections included, from the storages that are there."""
    total = 0
    for _, param, block in optimizer.blocks():
        keys = block.recipe.momentum.keys if optimizer.state.get(param) else ()
        tensors = [optimizer.state[param][block.prefix + key] for key in keys]
        total += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    return total


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, "devices": 1}
    return Trainer(**{**quiet, "callbacks": list(callbacks), **options})


def fit(module: LightningModule, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Trainer:
    made = trainer(*callbacks, **({} if {"max_epochs", "max_time"} & options.keys() else {"max_steps": 12}) | options)
    made.fit(module, ckpt_path=ckpt_path)
    return made


def dense_bytes(module: nn.Module) -> int:
    return 4 * sum(param.numel() for param in module.parameters())


def steps_of(callback: AdaptiveMomentum) -> list[int]:
    return [entry["step"] for entry in callback.history]


def moved(callback: AdaptiveMomentum) -> list[int]:
    """Return the number of moves of all decisions but the first."""
    return [len(entry["moves"]) for entry in callback.history[1:]]


# --- the budget ------------------------------------------------------------------------------------------------------

RECIPES = ("adapm", "adapm_lean", "adam_snsm", "adamw", "adam_mini")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("policy", POLICIES.names())
def test_the_budget_holds_after_every_step(policy, recipe):
    module = Module(recipe)
    budget = int(0.25 * dense_bytes(module))
    callback = AdaptiveMomentum(0.25, policy, every_n_steps=2, freeze_after=None)
    watch = Watch(budget)
    fit(module, callback, watch, max_steps=7)
    assert len(watch.sizes) == 14
    assert steps_of(callback) == [0, 2, 4, 6]
    assert [entry["momentum_bytes"] for entry in callback.history[1:]] == watch.sizes[3::4]
    floor = 0.4 if policy in ("schedule", "paper") else 0.75  # the budget is made use of
    assert watch.sizes[0] >= (0.75 if policy != "paper" else 0.4) * budget
    assert watch.sizes[-1] >= floor * budget or policy == "benefit"


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_blocks_whose_rank_costs_more_than_dense_momentum(budget):
    """A recipe may give small blocks such a rank."""
    module = Module("adapm_lean", rank=20)
    watch = Watch(int(budget * dense_bytes(module)))
    fit(module, AdaptiveMomentum(budget, "energy", every_n_steps=2), watch, max_steps=4)


def test_no_budget_but_a_quality():
    for policy in POLICIES.names():
        sizes = []
        for quality in (0.1, 0.95):
            callback = AdaptiveMomentum(None, policy, quality=quality, every_n_steps=2, freeze_after=None, max_moves=99)
            fit(Module(), callback, max_steps=4)
            sizes.append(callback.history[-1]["momentum_bytes"])
        assert 0 < sizes[0] < sizes[1] < dense_bytes(Module()), policy


@pytest.mark.parametrize("recipe", ["adapm_lean", "adam_snsm"])
def test_too_small_a_budget_is_refused_and_the_smallest_named(recipe, monkeypatch):
    seen = []
    monkeypatch.setattr(Module, "training_step", lambda self, *_: seen.append(1) or self.loss(0))
    for min_rank in (1, 2):
        with pytest.raises(ValueError, match=rf"`budget` is 1000 bytes .* but rank {min_rank} for every") as caught:
            fit(Module(recipe), AdaptiveMomentum(1000, min_rank=min_rank))
        assert not seen, "raised before the first batch"
        smallest = int(str(caught.value).split(" take ")[1].split(" bytes")[0])
        for policy in POLICIES.names():
            callback = AdaptiveMomentum(smallest, policy, min_rank=min_rank, every_n_steps=1, freeze_after=None)
            fit(Module(recipe), callback, Watch(smallest), max_steps=3)
        with pytest.raises(ValueError, match=f"take {smallest} bytes"):
            fit(Module(recipe), AdaptiveMomentum(smallest - 1, min_rank=min_rank))
        seen.clear()


# --- decisions -------------------------------------------------------------------------------------------------------


class Noise(Module):
    """Its gradients are independent noise."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        return sum((param * torch.randn(param.shape, generator=generator)).sum() for param in self.parameters())


@pytest.mark.parametrize(("kind", "budget"), [(Module, 0.25), (Noise, None)])
@pytest.mark.parametrize("policy", ["energy", "benefit"])
def test_moves_settle(kind, budget, policy):
    """With a decision after every step; a block of pure noise stops once it has turned back twice."""
    module = kind()
    callback = AdaptiveMomentum(budget, policy, every_n_steps=1, freeze_after=None, max_moves=4)
    fit(module, callback, max_steps=90)
    counts = moved(callback)
    assert len(counts) == 90
    assert 0 < max(counts) <= 4
    assert sum(counts[75:]) == 0, counts


def test_when_decisions_are_due():
    def steps(**options: Any) -> list[int]:
        callback = AdaptiveMomentum(0.25, "energy", **options)
        fit(Module(), callback, max_steps=12)
        return steps_of(callback)

    assert steps(every_n_steps=2, freeze_after=7) == [0, 2, 4, 6]
    assert steps(every_n_steps=2, freeze_after=0.5) == [0, 2, 4]
    assert steps(every_n_steps=4, start=1, freeze_after=None) == [0, 1, 5, 9]
    assert steps(every_n_steps=3, freeze_after=1.0) == [0, 3, 6, 9]
    assert steps(every_n_steps=50) == [0]
    assert steps(every_n_steps=2, freeze_after=1) == [0]


def test_history_tells_what_happened():
    module = Module()
    callback = AdaptiveMomentum(0.2, "energy", every_n_steps=3, max_moves=2, freeze_after=None)
    fit(module, callback, max_steps=30)
    optimizer = module.optimizers(use_pl_optimizer=False)
    matrices = [block for block in optimizer.snapshot().blocks if len(block.shape) > 1]
    names = [block.name for block in matrices]
    assert sum(moved(callback)) > 0
    before = None
    for entry in callback.history:
        assert list(entry) == ["step", "moves", "ranks", "momentum_bytes", "oscillation", "residual"]
        assert list(entry["ranks"]) == names
        if before is not None:
            changed = {name: [before[name], rank] for name, rank in entry["ranks"].items() if rank != before[name]}
            assert entry["moves"] == changed
            assert len(changed) <= 2
            assert list(entry["oscillation"]) == list(entry["residual"]) == names
            assert all(-1 <= value <= 1 for value in entry["oscillation"].values())
            assert all(0 <= value <= 1 for value in entry["residual"].values())
        before = entry["ranks"]
    assert before == {block.name: kept_rank(block) for block in matrices}
    assert callback.history[-1]["momentum_bytes"] == optimizer.snapshot().momentum_bytes
    assert json.loads(json.dumps(callback.history)) == callback.history


def kept_rank(block: Any) -> int:
    if block.momentum == "dense":
        return -(-block.shape[0] * block.shape[1] // sum(block.shape))
    return block.rank or 0


class Rotates(AdaptiveMomentum):
    """Momentum goes from block to block."""

    def propose(self, snapshot: Any, signals: Any) -> dict[str, Any]:
        assert {block.name for block in snapshot.blocks} >= set(signals)
        assert all(isinstance(entry, BlockSignals) for entry in signals.values())
        first, second = [name for name in signals if "mlp" in name]
        if self.history[-1]["ranks"][first]:
            return {first: {"momentum": "none"}, second: {"momentum": "low_rank", "rank": 2, "second_moment": "dense"}}
        return {second: {"momentum": "none"}, first: {"momentum": "subspace", "rank": 1}}


def test_a_subclass_decides():
    module = Module()
    callback, watch = Rotates(0.25, every_n_steps=2, freeze_after=None), Watch(int(0.25 * dense_bytes(module)))
    fit(module, callback, watch, max_steps=6)
    first, second = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
    ranks = [(entry["ranks"][first], entry["ranks"][second]) for entry in callback.history[1:]]
    assert ranks == [(0, 2), (1, 0), (0, 2)]
    by_name = {block.name: block for block in module.optimizers().snapshot().blocks}
    assert (by_name[first].momentum, by_name[second].momentum) == ("none", "low_rank")
    assert (by_name[first].second_moment, by_name[second].second_moment) == ("factored", "dense")


def test_a_subclass_cannot_exceed_the_budget():
    class Greedy(AdaptiveMomentum):
        def propose(self, snapshot: Any, signals: Any) -> dict[str, Any]:
            return {name: {"momentum": "dense"} for name in signals}

    class Mistaken(AdaptiveMomentum):
        def propose(self, snapshot: Any, signals: Any) -> dict[str, Any]:
            return {"model.lm_head": {"momentum": "dense"}}

    for kind, match in ((Greedy, r"take momentum to .* budget is .*\. Nothing has changed"), (Mistaken, "model.lm_h")):
        module, callback = Module(), kind(0.25, every_n_steps=2, freeze_after=None)
        made = trainer(callback, max_steps=4)
        with pytest.raises(ValueError, match=match):
            made.fit(module)
        assert steps_of(callback) == [0]
        ranks = {block.name: kept_rank(block) for block in made.optimizers[0].snapshot().blocks if len(block.shape) > 1}
        assert ranks == callback.history[0]["ranks"]
    callback = Greedy(None, every_n_steps=2, freeze_after=None)
    fit(Module(), callback, max_steps=2)
    assert callback.history[-1]["momentum_bytes"] == dense_bytes(Module())


def test_policy_as_a_function():
    asked = []

    def policy(problem: Any) -> dict[str, int]:
        asked.append(problem)
        return {block.name: 1 + (block.role == "value") * (block.signals is not None) for block in problem.blocks}

    callback = AdaptiveMomentum(0.3, policy, every_n_steps=2, freeze_after=None)
    fit(Module(), callback, max_steps=6)
    assert all(rank == 1 for rank in callback.history[0]["ranks"].values())
    assert callback.history[-1]["ranks"] == {block.name: 1 + (block.role == "value") for block in asked[-1].blocks}
    assert [problem.progress for problem in asked] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    with pytest.raises(ValueError, match="would take momentum to"):
        fit(Module(), AdaptiveMomentum(0.3, lambda problem: {b.name: b.dense_rank for b in problem.blocks}))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda problem: {}, "None"),
        (lambda problem: None, "None"),
        (lambda problem: {block.name: 1.5 for block in problem.blocks}, "1.5"),
        (lambda problem: {block.name: -1 for block in problem.blocks}, "-1"),
        (lambda problem: {block.name: block.dense_rank + 1 for block in problem.blocks}, "[0-9]+"),
    ],
)
def test_a_policy_that_answers_wrongly_is_told_so(answer, found):
    with pytest.raises(
        ValueError, match=rf"The policy '<lambda>' answered {found} for '.*embed_tokens.*from 0 to [0-9]+"
    ):
        fit(Module(), AdaptiveMomentum(0.3, answer))


def test_after_an_exception_the_optimizer_is_let_go():
    class Failing(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step == 2:
                raise RuntimeError("no more")

    module = Failing()
    with pytest.raises(RuntimeError, match="no more"):
        fit(module, AdaptiveMomentum(0.3))
    (optimizer,) = (module.optimizers(use_pl_optimizer=False),)
    assert not optimizer._optimizer_step_post_hooks


# --- what users see --------------------------------------------------------------------------------------------------


class Scalars(Logger):
    name, version = "scalars", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.setdefault(step or 0, {}).update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def test_scalars_and_figures(tmp_path):
    board, csv, scalars = TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv"), Scalars()
    callback = AdaptiveMomentum(0.25, "energy", every_n_steps=4, freeze_after=None, log=True, figures=True)
    fit(Module(), callback, logger=[board, csv, scalars], log_every_n_steps=1)
    name = "model.layers.0.self_attn.in_proj_weight:query"
    assert sorted(scalars.logged) == [0, 4, 8, 12]
    for entry in callback.history:
        logged = scalars.logged[entry["step"]]
        assert logged[f"memopt/rank/{name}"] == entry["ranks"][name]
        if entry["step"]:
            assert logged[f"memopt/oscillation/{name}"] == entry["oscillation"][name]
            assert logged[f"memopt/residual/{name}"] == entry["residual"][name]
    assert f"memopt/oscillation/{name}" in (Path(csv.log_dir) / "metrics.csv").read_text()
    picture = Path(board.log_dir) / "allocation.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 5000

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(board.log_dir)
    events.Reload()
    (image,) = events.Images("memopt/allocation")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.step == 12
    assert len(events.Scalars(f"memopt/rank/{name}")) == 4

    for value in ("rank", "oscillation", "residual"):
        axes = callback.plot(value).axes[0]
        assert len(axes.get_yticklabels()) == len(callback.history[0]["ranks"])
    with pytest.raises(ValueError, match="Unknown value to plot 'ranks'"):
        callback.plot("ranks")
    fresh = AdaptiveMomentum()
    with pytest.raises(ValueError, match="There is no rank to plot yet"):
        fresh.plot()
    fresh.history = callback.history[:1]
    fresh.plot()
    with pytest.raises(ValueError, match="There is no oscillation to plot yet"):
        fresh.plot("oscillation")


def test_figures_without_a_logger(tmp_path):
    fit(Module(), AdaptiveMomentum(0.25, figures=True), default_root_dir=tmp_path, max_steps=1)
    assert (tmp_path / "allocation.png").is_file()
    (tmp_path / "allocation.png").unlink()
    fit(Module(), AdaptiveMomentum(0.25, figures=True, log=True), default_root_dir=tmp_path, fast_dev_run=True)
    assert not list(tmp_path.iterdir()), "a development run leaves nothing behind"


def test_figures_without_matplotlib_are_refused_at_once(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="figures=True needs matplotlib"):
        AdaptiveMomentum(figures=True)
    AdaptiveMomentum()


def test_messages(capsys):
    module = Module()
    callback = AdaptiveMomentum(0.2, "energy", every_n_steps=4, freeze_after=26)
    fit(module, callback, max_steps=30)
    lines = capsys.readouterr().out.splitlines()
    first, *changes, frozen, last = [line for line in lines if line.startswith("AdaptiveMomentum")]
    assert first.startswith("AdaptiveMomentum starts with ")
    assert first.endswith("of AdamW's, in 8 blocks.")
    told = [entry for entry in callback.history[1:] if entry["moves"]]
    assert len(changes) == len(told) > 0
    for line, entry in zip(changes, told, strict=True):
        name, (old, new) = next(iter(entry["moves"].items()))
        assert line.startswith(f"AdaptiveMomentum, step {entry['step']}: {name} {old} → {new}")
    assert frozen.startswith("AdaptiveMomentum: frozen after step 26 with ")
    assert last.startswith(f"AdaptiveMomentum: decisions 6, moves {sum(moved(callback))}, in the later half ")


# --- Lightning's ways ------------------------------------------------------------------------------------------------


def test_decisions_count_steps_of_the_optimizer():
    """With accumulation, clipping, validation in between, a scheduler and epochs instead of steps."""

    def scheduled(module: Module) -> Any:
        optimizer = lm.AdaPMLean(module.named_parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = Module(scheduled)
    callback, watch = AdaptiveMomentum(0.25, "energy", every_n_steps=2), Watch(int(0.25 * dense_bytes(module)))
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, "val_check_interval": 4, "limit_val_batches": 1}
    made = fit(module, callback, watch, max_epochs=5, **options)  # 10 batches and 4 steps each
    assert made.global_step == 20
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**20)
    assert steps_of(callback) == [0, 2, 4], "frozen after 30% of 20 steps"


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(6))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 20}, [0, 2, 4, 6, 8]),
        ({"max_epochs": 2}, [0, 2, 4, 6, 8]),
        ({"max_epochs": 2, "max_steps": 1000}, [0, 2, 4, 6, 8]),
        ({"max_epochs": 1000, "max_steps": 20}, [0, 2, 4, 6, 8]),
        ({"fast_dev_run": 10, "max_steps": 1000}, [0, 2, 4]),
    ],
    ids=str,
)
def test_half_of_the_training(options, expected):
    callback = AdaptiveMomentum(0.25, every_n_steps=2, freeze_after=0.5)
    trainer(callback, **options).fit(Module())
    assert steps_of(callback) == expected


@pytest.mark.parametrize("unknown", ["time", "stream"])
def test_training_of_unknown_length_warns(unknown, tmp_path):
    def run(*callbacks: Callback) -> None:
        if unknown == "time":
            stops = StopsAt(12, path=tmp_path)
            made = trainer(*callbacks, stops, max_steps=-1, max_epochs=-1, max_time=timedelta(minutes=5))
            made.fit(Module())
        else:
            trainer(*callbacks, max_epochs=2).fit(Module(), DataLoader(Stream()))

    callback = AdaptiveMomentum(0.25, "energy", every_n_steps=2)
    with pytest.warns(UserWarning, match="`freeze_after` 0.3 is a share of a training whose length is not known"):
        run(callback)
    assert steps_of(callback) == [0, 2, 4, 6, 8, 10, 12]
    by_steps = AdaptiveMomentum(0.25, "energy", every_n_steps=2, freeze_after=5)
    run(by_steps)
    assert steps_of(by_steps) == [0, 2, 4]
    with pytest.raises(ValueError, match="'schedule' needs the length of training"):
        run(AdaptiveMomentum(0.25, "schedule", freeze_after=None))


def test_stopping_early():
    callback = AdaptiveMomentum(0.25, "energy", every_n_steps=2, freeze_after=None)
    stopping = EarlyStopping("val_loss", patience=1, mode="max", stopping_threshold=-1e9)
    made = fit(Module(), callback, stopping, max_epochs=9, limit_val_batches=1)
    assert 10 <= made.global_step < 90
    assert steps_of(callback)[-1] == made.global_step


class TwoOptimizers(Module):
    """Steps one of its optimizers in every batch, the other in every second one."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Network(layers=1)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(self.loss(batch_idx))
        first.step()
        self.untoggle_optimizer(first)
        if batch_idx % 2:
            self.toggle_optimizer(second)
            second.zero_grad()
            self.manual_backward(self.other(tokens(batch_idx)).square().mean())
            second.step()
            self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return (
            lm.AdaPMLean(self.model.named_parameters(), lr=1e-2),
            lm.AdamSNSM(self.other.named_parameters(), lr=1e-2),
        )


def test_a_callback_for_each_optimizer(tmp_path):
    with pytest.raises(ValueError, match="Optimizers 0, 1 can be adapted: choose one with `optimizer_idx`"):
        fit(TwoOptimizers(), AdaptiveMomentum(0.25))

    def run(**options: Any) -> tuple[TwoOptimizers, list[AdaptiveMomentum], Trainer]:
        module = TwoOptimizers()
        callbacks = [
            AdaptiveMomentum(0.25, "energy", every_n_steps=3, freeze_after=None, optimizer_idx=0),
            AdaptiveMomentum(0.3, "benefit", every_n_steps=2, freeze_after=0.99, optimizer_idx=1),
        ]
        watches = [Watch(int(0.25 * dense_bytes(module.model)), 0), Watch(int(0.3 * dense_bytes(module.other)), 1)]
        return module, callbacks, fit(module, *callbacks, *watches, **options)

    module, callbacks, made = run(max_epochs=2)
    assert made.global_step == 30
    assert list(map(steps_of, callbacks)) == [[0, 3, 6, 9, 12, 15, 18], [0, 2, 4, 6, 8, 10]]
    made.save_checkpoint(tmp_path / "two.ckpt")
    keys = [key for key in torch.load(tmp_path / "two.ckpt")["callbacks"] if "Adaptive" in key]
    assert keys == ["AdaptiveMomentum{'optimizer_idx': 0}", "AdaptiveMomentum{'optimizer_idx': 1}"]
    resumed, again, _ = run(max_epochs=3, ckpt_path=tmp_path / "two.ckpt")
    _, uninterrupted, _ = run(max_epochs=3)
    assert [callback.history for callback in again] == [callback.history for callback in uninterrupted]


class Unfreezes(Callback):
    """Lets the second layer train from the third step on."""

    def __init__(self, where: str) -> None:
        setattr(self, where, self.unfreeze)  # before the step of global step 2, or right after the one before

    def unfreeze(self, trainer: Trainer, module: Module, *args: Any) -> None:
        if trainer.global_step == 2:
            module.model.layers[1].requires_grad_(True)


class HalfFrozen(Module):
    def __init__(self, unfreeze: bool = False) -> None:
        super().__init__(layers=2)
        self.model.layers[1].requires_grad_(False)
        self.unfreeze = unfreeze

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.unfreeze and self.global_step == 2:
            self.model.layers[1].requires_grad_(True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("where", ["on_train_batch_start", "on_train_batch_end", "on_train_epoch_start", "step"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_that_trains_from_the_middle_on(where, frozen):
    """Also if it begins in the very batch whose step counts, and if the allocation is frozen already."""
    budget = int(0.25 * dense_bytes(Network(2))) // 2
    module, watch = HalfFrozen(unfreeze=where == "step"), Watch(budget)
    callback = AdaptiveMomentum(budget, "energy", every_n_steps=3, freeze_after=1 if frozen else None)
    others = [] if where == "step" else [Unfreezes(where)]
    options = {"max_epochs": 6, "limit_train_batches": 1} if where == "on_train_epoch_start" else {"max_steps": 6}
    fit(module, callback, *others, watch, **options)
    assert len(callback.history[0]["ranks"]) == 8
    assert len(callback.history[-1]["ranks"]) == 14
    assert (callback.history[1]["step"], len(callback.history[1]["ranks"])) == (2, 14)
    assert steps_of(callback) == ([0, 2] if frozen else [0, 2, 3, 6])


class Raw(HalfFrozen):
    """Steps an optimizer that Lightning has not wrapped: no hook is called, and no step is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 2:
            self.model.layers[1].requires_grad_(True)
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch_idx))
        optimizer.step()


def test_a_raw_optimizer():
    module, budget = Raw(), int(0.25 * dense_bytes(Network(2))) // 2
    callback, watch = AdaptiveMomentum(budget, "energy", every_n_steps=3, freeze_after=8), Watch(budget)
    fit(module, callback, watch, max_epochs=1)
    assert len(watch.sizes) == 10
    assert steps_of(callback) == [0, 3, 3, 6]


def test_a_layer_that_is_frozen_keeps_its_momentum_and_that_counts():
    class Freezes(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Module, *args: Any) -> None:
            if trainer.global_step % 6 in (2, 4):
                module.model.layers[1].requires_grad_(trainer.global_step % 6 == 4)

    module = Module(layers=2)
    watch = Watch(int(0.25 * dense_bytes(module)))
    callback = AdaptiveMomentum(0.25, "energy", every_n_steps=3, freeze_after=None)
    fit(module, callback, Freezes(), watch, max_steps=18)
    assert steps_of(callback) == [0, 3, 6, 9, 12, 15, 18], "one decision each: nothing begins anew"
    assert [entry["momentum_bytes"] for entry in callback.history] == [
        watch.sizes[0],
        *(watch.sizes[2 * step - 1] for step in steps_of(callback)[1:]),
    ]


def test_validation_alone_does_nothing(capsys):
    callback = AdaptiveMomentum(0.25)
    trainer(callback, limit_val_batches=1).validate(Module(), verbose=False)
    assert (callback.history, callback.state_dict()) == ([], {})
    assert "Adaptive" not in capsys.readouterr().out


def test_a_second_fit_begins_anew():
    callback = AdaptiveMomentum(0.25, "energy", every_n_steps=2, freeze_after=None)
    fit(Module(), callback)
    first = callback.history
    module = Module()
    fit(module, callback, Watch(int(0.25 * dense_bytes(module))))
    assert callback.history == first
    optimizer = lm.AdaPMLean(Network().named_parameters())
    watched = len(optimizer._optimizer_step_post_hooks)
    for again in (callback, AdaptiveMomentum(0.25)):
        module = Module(lambda module: lm.AdaPMLean(module.named_parameters()))
        made = fit(module, again)
        assert len(made.optimizers[0]._optimizer_step_post_hooks) == watched, "nobody watches any more"


@pytest.mark.parametrize(
    ("configure", "options", "match"),
    [
        (lambda m: torch.optim.AdamW(m.parameters()), {}, "optimizer 0: AdamW is no optimizer of lightning_memopt"),
        (lambda m: lm.MemOpt(m.named_parameters(), "adafactor"), {}, "its recipe 'adafactor' has no momentum"),
        (lambda m: lm.AdaPMLean(m.named_parameters(), betas=(0.0, 0.9)), {}, "its beta1 is 0"),
        (lambda m: lm.AdaPMLean(m.model.norm.named_parameters()), {}, "it trains no matrix"),
        (lambda m: lm.AdaPMLean(m.parameters()), {}, "bind"),
        (lambda m: lm.AdaPMLean(m.named_parameters()), {"optimizer_idx": 1}, "`optimizer_idx` is 1, but the module"),
        (lambda m: lm.AdaPMLean(m.named_parameters()), {"optimizer_idx": -1}, "`optimizer_idx` is -1"),
        (lambda m: None, {}, "_MockOptimizer is no optimizer of lightning_memopt"),
    ],
    ids=["AdamW", "adafactor", "beta1", "vectors", "names", "index", "negative index", "none"],
)
@pytest.mark.filterwarnings("ignore:.*configure_optimizers.*returned.*None")
def test_optimizers_that_cannot_be_adapted(configure, options, match, monkeypatch):
    seen = []
    monkeypatch.setattr(Module, "training_step", lambda self, *_: seen.append(1) or self.loss(0))
    with pytest.raises(ValueError, match=match):
        fit(Module(configure), AdaptiveMomentum(0.25, **options))
    assert not seen


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": 1}, "`budget` 1 could mean"),
        ({"budget": "5 apples"}, "`budget` must be"),
        ({"policy": "greedy"}, "Unknown policy 'greedy'"),
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer of at least 1, got 0"),
        ({"start": 0}, "`start` must be"),
        ({"min_rank": 1.5}, "`min_rank` must be"),
        ({"max_moves": True}, "`max_moves` must be"),
        ({"quality": 0}, "`quality` must be"),
        ({"freeze_after": 0}, "`freeze_after` must be"),
        ({"freeze_after": 1.5}, "`freeze_after` must be"),
        ({"dropped": "keep"}, "Unknown value of `dropped` 'keep'"),
    ],
    ids=str,
)
def test_values_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        AdaptiveMomentum(**options)


# --- resuming --------------------------------------------------------------------------------------------------------


class StopsAt(Callback):
    """Saves after some steps, and stops training after the last of them."""

    def __init__(self, *steps: int, path: Path) -> None:
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.path / f"{trainer.global_step}.ckpt")
            trainer.should_stop = trainer.global_step == self.steps[-1]


def adaptive(policy: str = "energy", budget: Any = 0.25, **options: Any) -> AdaptiveMomentum:
    return AdaptiveMomentum(budget, policy, **{"every_n_steps": 8, "start": 4, "freeze_after": 0.9, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in module.named_parameters()}


@pytest.mark.parametrize(("policy", "recipe"), [("energy", "adapm_lean"), ("benefit", "adam_snsm")])
def test_a_resumed_run_decides_as_an_uninterrupted_one(tmp_path, policy, recipe):
    """Also after it was frozen, and with nothing left to do."""
    whole, one = Module(recipe), adaptive(policy)
    fit(whole, one, max_steps=60)
    stopped = adaptive(policy)
    fit(Module(recipe), stopped, StopsAt(25, path=tmp_path), max_steps=60)
    assert steps_of(stopped) == [0, 4, 12, 20]
    for step in (25, 56, 60):
        resumed, other = Module(recipe), adaptive(policy)
        watch = Watch(int(0.25 * dense_bytes(resumed)))
        fit(resumed, other, watch, StopsAt(56, 60, path=tmp_path), max_steps=60, ckpt_path=tmp_path / f"{step}.ckpt")
        assert other.history == one.history
        assert_equal(weights(resumed), weights(whole))
    assert steps_of(one) == [0, 4, 12, 20, 28, 36, 44, 52]
    assert sum(moved(one)[:3]) > 0


def test_resuming_with_another_budget_or_without_the_callback(tmp_path, capsys):
    with_it, without = tmp_path / "with" / "13.ckpt", tmp_path / "without" / "13.ckpt"
    fit(Module(), saved := adaptive(), StopsAt(13, path=with_it.parent), max_steps=60)
    fit(Module(), StopsAt(13, path=without.parent), max_steps=60)
    dense = dense_bytes(Module())

    lower, watch = adaptive(budget=0.15), Watch(int(0.15 * dense))
    capsys.readouterr()
    fit(Module(), lower, watch, max_steps=24, ckpt_path=with_it)
    assert "AdaptiveMomentum goes on after step 13 with " in capsys.readouterr().out
    assert lower.history[: len(saved.history)] == saved.history
    assert steps_of(lower) == [0, 4, 12, 13, 20]
    assert watch.sizes[0] > 0.1 * dense
    with pytest.raises(ValueError, match="`budget` is 1000 bytes"):
        fit(Module(), adaptive(budget=1000), max_steps=24, ckpt_path=with_it)

    higher = adaptive(budget=0.5)
    fit(Module(), higher, Watch(int(0.5 * dense)), max_steps=24, ckpt_path=with_it)
    assert higher.history[: len(saved.history)] == saved.history
    assert higher.history[-1]["momentum_bytes"] > saved.history[-1]["momentum_bytes"]

    late, watch = adaptive(), Watch(int(0.25 * dense))
    fit(Module(), late, watch, max_steps=24, ckpt_path=without)
    assert steps_of(late) == [0, 4]
    module, watch = Module(), Watch()
    fit(module, watch, max_steps=24, ckpt_path=with_it)
    assert set(watch.sizes) == {saved.history[-1]["momentum_bytes"]}, "the allocation is the optimizer's"


def test_a_checkpoint_of_the_very_first_moment(tmp_path):
    """Another callback may save before this one has begun, also in a resumed run: what it brought is not lost."""

    class SavesAtOnce(Callback):
        def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "again.ckpt")

    fit(Module(), one := adaptive(), StopsAt(13, path=tmp_path), max_steps=60)
    fit(Module(), SavesAtOnce(), adaptive(), max_steps=14, ckpt_path=tmp_path / "13.ckpt")
    other = adaptive()
    fit(Module(), other, max_steps=14, ckpt_path=tmp_path / "again.ckpt")
    assert other.history[:3] == one.history
    fit(Module(), SavesAtOnce(), adaptive(), max_steps=1)
    fit(Module(), fresh := adaptive(), max_steps=6, ckpt_path=tmp_path / "again.ckpt")
    assert steps_of(fresh) == [0, 4]


def test_the_state_is_numbers_and_tensors(tmp_path):
    fit(Module(), callback := adaptive(freeze_after=None), max_steps=13)
    state = callback.state_dict()
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["history"] == callback.history
    probe = Probe(lm.AdaPMLean(Module().named_parameters()))
    probe.load_state_dict(loaded["probe"])
    assert probe.steps == 13
