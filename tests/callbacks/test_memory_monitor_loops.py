"""The monitor in other loops, with other optimizers, and beside other callbacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning.pytorch")
pytest.importorskip("matplotlib")

from lightning.pytorch import Callback, LightningModule, Trainer

import lightning_memopt as lm
from lightning_memopt import AdaptiveMomentum, OptimizerMemoryMonitor
from tests.callbacks._monitor import (
    VOCAB,
    WIDTH,
    Counts,
    Module,
    adamw,
    fit,
    kept,
    lean,
    numel,
    snapshot_of,
    steps,
    summaries,
    tables,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workplace")]


class Manual(Module):
    """Two optimizers by hand, and no gradient left after a step."""

    def __init__(self, make: Callable[[LightningModule], Any]) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.manual_backward(self.loss(batch_idx))
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def halves(module: LightningModule) -> list[torch.optim.Optimizer]:
    named = list(module.named_parameters())
    return [lm.AdaPMLean(named[:3], lr=1e-3, rank=4), torch.optim.AdamW([param for _, param in named[3:]], lr=1e-3)]


def test_manual_optimization_counts_gradients_that_are_gone_after_the_step(capsys):
    callback = OptimizerMemoryMonitor(3)
    made = fit(Manual(adamw), callback)
    assert steps(callback) == [1, 3, 6, 7]
    size = 4 * numel(made.lightning_module)
    assert [entry["gradient_bytes"] for entry in callback.history] == [size] * 4
    assert callback.history[-1]["state_bytes"] == kept(*made.optimizers)
    assert summaries(capsys.readouterr().out) == 1


def test_two_optimizers_are_measured_together(capsys, tmp_path):
    callback = OptimizerMemoryMonitor(4)
    made = fit(Manual(halves), callback, max_steps=12, default_root_dir=tmp_path)
    assert made.global_step == 12, "six batches"
    assert steps(callback) == [2, 4, 8, 12], "when both have state"
    assert callback.history[-1]["state_bytes"] == kept(*made.optimizers)
    assert callback.history[-1]["gradient_bytes"] == 4 * numel(made.lightning_module)
    out = capsys.readouterr().out
    assert "Optimizer state of AdaPMLean (adapm_lean), AdamW" in out
    assert (tables(out), summaries(out)) == (1, 1)
    content = json.loads((tmp_path / "memory.json").read_text())
    assert content["optimizers"] == ["AdaPMLean (adapm_lean)", "AdamW"]
    assert sum(block["adamw_bytes"] for block in content["blocks"]) == 8 * numel(made.lightning_module)


def test_a_parameter_in_two_optimizers_is_two_blocks(tmp_path):
    def both(module: LightningModule) -> list[torch.optim.Optimizer]:
        return [adamw(module), torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)]

    callback = OptimizerMemoryMonitor(2)
    made = fit(Manual(both), callback, max_steps=4, default_root_dir=tmp_path)
    assert callback.history[-1]["state_bytes_global"] == 12 * numel(made.lightning_module)
    names = [block["name"] for block in json.loads((tmp_path / "memory.json").read_text())["blocks"]]
    assert len(set(names)) == len(names)


def test_state_that_comes_later_is_shown_when_it_is_there(capsys):
    class Late(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for position, optimizer in enumerate(self.optimizers()):
                if position == 0 or batch_idx >= 3:
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch_idx))
                    optimizer.step()

    def two(module: nn.Module) -> list[torch.optim.Optimizer]:
        head, *others = list(module.parameters())
        return [torch.optim.AdamW(others, lr=1e-3), torch.optim.AdamW([head], lr=1e-3)]

    callback = OptimizerMemoryMonitor(2)
    fit(Late(two), callback, max_steps=-1, max_epochs=1)
    assert all(entry["saved"] == 0 for entry in callback.history)
    assert capsys.readouterr().out.count("Optimizer state of AdamW") == 2


def test_no_optimizer_is_no_state(capsys):
    class Without(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            pass

    callback = OptimizerMemoryMonitor(2)
    fit(Without(lambda module: None), callback, max_steps=-1, max_epochs=1)
    assert callback.history == []
    assert "no optimizer state to measure (no optimizer)" in capsys.readouterr().out


def test_an_optimizer_with_closures_is_measured():
    callback = OptimizerMemoryMonitor(2)
    made = fit(lambda module: torch.optim.LBFGS(module.parameters(), max_iter=2, history_size=2), callback, max_steps=4)
    assert steps(callback) == [1, 2, 4]
    state = next(iter(made.optimizers[0].state.values()))
    tensors = [x for value in state.values() for x in (value if isinstance(value, list) else [value])]
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert callback.history[-1]["state_bytes"] == sum(storages.values()) > 8 * numel(made.lightning_module)


def test_an_optimizer_of_sparse_gradients_is_measured():
    class Sparse(Module):
        def __init__(self, make: Any) -> None:
            super().__init__(make)
            self.model = nn.Embedding(VOCAB, WIDTH, sparse=True)

        def loss(self, seed: int) -> Tensor:
            return self.model(torch.tensor([1, 2, 5])).square().mean()

    callback = OptimizerMemoryMonitor(2)
    made = fit(Sparse(lambda module: torch.optim.SparseAdam(module.parameters(), lr=1e-3)), callback, max_steps=4)
    assert steps(callback) == [1, 2, 4]
    assert callback.history[-1]["state_bytes"] == kept(*made.optimizers) == 8 * VOCAB * WIDTH
    assert callback.history[-1]["gradient_bytes"] == 3 * 8 + 3 * WIDTH * 4


@pytest.mark.parametrize("first", [True, False])
def test_beside_adaptive_momentum_it_sees_every_allocation(first, tmp_path):
    adaptive = AdaptiveMomentum(0.25, "energy", every_n_steps=2, freeze_after=None)
    callback, counts = OptimizerMemoryMonitor(1, figures=True), Counts()
    together = (callback, adaptive) if first else (adaptive, callback)
    made = fit(lean, *together, counts, max_steps=8, default_root_dir=tmp_path)
    assert steps(callback) == list(range(9))
    assert callback.history[0]["state_bytes"] == counts.sizes[0]
    ranks = {name: x.reshape(-1).tolist() for name, x in callback._allocation.compute().items()}
    begin = {name: ranks[name][0] for name in callback._allocation.matrices}
    first_decision = adaptive.history[0]["ranks"]
    kinds = callback._allocation.kinds()
    low = [name for name in begin if kinds[name][0] not in ("dense", "none")]
    assert low
    assert {name: begin[name] for name in low} == {name: first_decision[name] for name in low}, "after the first one"
    now = {b.name: b.rank for b in snapshot_of(made).blocks if b.rank is not None}
    assert {name: ranks[name][-1] for name in now} == now
    last = callback.history[-1]
    assert last["state_bytes"] == kept(*made.optimizers)
    assert json.loads((tmp_path / "memory.json").read_text())["blocks"][0]["name"] in ranks


class Switches(Callback):
    """Makes a block dense for a while, between two measurements."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        momentum = {3: {"momentum": "dense"}, 5: {"momentum": "low_rank", "rank": 2}, 6: {"momentum": "none"}}
        if trainer.global_step in momentum:
            trainer.optimizers[0].reformat({"model.lm_head.weight": momentum[trainer.global_step]})


def test_what_was_dense_for_a_while_is_shown():
    callback = OptimizerMemoryMonitor(100)
    fit(lean, callback, Switches(), max_steps=8)
    assert steps(callback) == [0, 3, 5, 6, 8]
    metric = callback._allocation
    assert metric.steps.tolist() == [0, 3, 5, 6]
    assert metric.kinds()["model.lm_head.weight"] == ["low_rank", "dense", "low_rank", "none"]
    shown, bar = callback.plot_allocation().axes
    assert [text.get_text() for text in bar.texts] == ["none", "dense"]
    assert shown.get_xlim() == (0, 8)


def cells(figure: Any) -> tuple[list[str], list[float], Any]:
    """Return the rows of a heat map, the steps between its columns, and its colors."""
    axes = figure.axes[0]
    (mesh,) = axes.collections
    figure.canvas.draw()
    names = [label.get_text() for label in axes.get_yticklabels()]
    return names, mesh.get_coordinates()[0, :, 0].tolist(), mesh.to_rgba(mesh.get_array())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("policy", ["paper", "benefit"])
def test_both_callbacks_draw_the_same_allocation(first, policy):
    adaptive = AdaptiveMomentum(0.45, policy, every_n_steps=2, freeze_after=None)
    callback = OptimizerMemoryMonitor(100)
    fit(lean, *((callback, adaptive) if first else (adaptive, callback)), max_steps=8)
    names, edges, colors = cells(adaptive.plot())
    others, theirs, shades = cells(callback.plot_allocation())
    assert names == others
    assert (edges[0], edges[-1]) == (theirs[0], theirs[-1]) == (0, 8)
    for step in range(8):
        column, other = (max(i for i, edge in enumerate(places) if edge <= step) for places in (edges, theirs))
        assert (colors[:, column] == shades[:, other]).all(), step


@pytest.mark.parametrize("make", [lean, adamw])
def test_in_a_barebones_trainer_it_still_measures(make, capsys, tmp_path):
    """Where nothing may be logged."""
    callback = OptimizerMemoryMonitor(3)
    options = {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None}
    options |= {"enable_model_summary": None, "num_sanity_val_steps": None, "default_root_dir": tmp_path}
    made = fit(make, callback, **options)
    assert steps(callback)[1:] == [3, 6, 7]
    assert callback.history[-1]["state_bytes"] == kept(*made.optimizers)
    assert summaries(capsys.readouterr().out) == 1
