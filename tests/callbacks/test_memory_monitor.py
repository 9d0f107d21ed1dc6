"""The monitor with a Trainer on one device: what it measures and when, and that it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning.pytorch")
pytest.importorskip("matplotlib")

from lightning.pytorch import Callback, LightningModule, Trainer

import lightning_memopt as lm
from lightning_memopt import OptimizerMemoryMonitor
from tests.callbacks._monitor import (
    SCALARS,
    VOCAB,
    WIDTH,
    Counts,
    adamw,
    fit,
    lean,
    numel,
    sgd,
    steps,
    summaries,
    tables,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workplace")]


@pytest.mark.parametrize(
    ("make", "every", "expected"),
    [
        (lean, 3, [0, 3, 6, 7]),
        (lean, 7, [0, 7]),
        (lean, 1, list(range(8))),
        (lean, 100, [0, 7]),
        (adamw, 3, [1, 3, 6, 7]),
        (adamw, 1, list(range(1, 8))),
        (adamw, 100, [1, 7]),
        (sgd, 3, []),
    ],
)
def test_it_measures_when_there_is_state_every_n_steps_and_at_the_end(make, every, expected):
    callback, counts = OptimizerMemoryMonitor(every), Counts()
    made = fit(make, callback, counts)
    assert steps(callback) == expected
    for entry in callback.history:
        assert entry["state_bytes"] == entry["state_bytes_rank"] == counts.sizes[entry["step"]] > 0
        assert set(entry) == SCALARS | {"step"}
    size = 4 * numel(made.lightning_module)
    assert all(entry["parameter_bytes"] == size for entry in callback.history)
    assert [entry["gradient_bytes"] for entry in callback.history] == [size if step else 0 for step in expected]


def test_every_100_steps_is_the_default():
    assert (OptimizerMemoryMonitor().every_n_steps, OptimizerMemoryMonitor().figures) == (100, False)


@pytest.mark.parametrize("value", [0, -1, 2.5, "10", None, True])
def test_a_wrong_every_n_steps_is_named(value):
    with pytest.raises(ValueError, match=rf"`every_n_steps` must be an integer of at least 1, got {value!r}"):
        OptimizerMemoryMonitor(value)


def test_figures_without_matplotlib_are_refused_at_once(monkeypatch):
    import lightning_memopt.callbacks.memory_monitor as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        OptimizerMemoryMonitor(figures=True)
    OptimizerMemoryMonitor()


def test_several_epochs_with_validation_measure_no_step_twice():
    callback = OptimizerMemoryMonitor(4)
    fit(lean, callback, max_epochs=3, limit_train_batches=3, limit_val_batches=2, num_sanity_val_steps=2)
    assert steps(callback) == [0, 4, 8, 9]


def test_gradient_accumulation_counts_steps_not_batches():
    callback = OptimizerMemoryMonitor(2)
    made = fit(adamw, callback, max_steps=-1, max_epochs=1, accumulate_grad_batches=3)
    assert steps(callback) == [1, 2, 4]
    assert made.global_step == 4
    assert callback.history[-1]["gradient_bytes"] == 4 * numel(made.lightning_module)


class Late(torch.optim.SGD):
    """Makes its state at the fourth step."""

    def step(self, closure: Any = None) -> Any:
        self.count = getattr(self, "count", 0) + 1
        self.param_groups[0]["momentum"] = 0.9 if self.count > 3 else 0.0
        return super().step(closure)


def test_state_that_comes_late_is_measured_when_the_next_measurement_is_due(capsys):
    callback = OptimizerMemoryMonitor(2)
    made = fit(lambda module: Late(module.parameters(), lr=1e-3), callback)
    assert steps(callback) == [4, 6, 7]
    assert callback.history[0]["state_bytes"] == 4 * numel(made.lightning_module)
    out = capsys.readouterr().out
    assert (tables(out), summaries(out)) == (1, 1)


def test_parameters_that_train_later_are_counted():
    class Thaws(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            pl_module.model.lm_head.requires_grad_(trainer.global_step >= 3)

    def make(module: LightningModule) -> torch.optim.Optimizer:
        module.model.lm_head.requires_grad_(False)
        return adamw(module)

    callback = OptimizerMemoryMonitor(1)
    made = fit(make, callback, Thaws())
    head, rest = VOCAB * WIDTH, numel(made.lightning_module) - VOCAB * WIDTH
    by_step = {entry["step"]: entry["state_bytes_global"] for entry in callback.history}
    assert by_step == {step: 8 * (rest + head * (step > 3)) for step in range(1, 8)}


def test_ours_without_names_say_what_to_do():
    with pytest.raises(ValueError, match=r"bind\(model\)"):
        fit(lambda module: lm.AdaPMLean(list(module.parameters()), lr=1e-3), OptimizerMemoryMonitor())


@pytest.mark.parametrize("make", [lean, adamw])
def test_it_changes_nothing_of_the_training(make):
    def weights(*callbacks: Callback) -> list[Tensor]:
        torch.manual_seed(1)
        made = fit(make, *callbacks)
        return [torch.get_rng_state().float(), *(param.detach() for param in made.lightning_module.parameters())]

    for mine, theirs in zip(weights(OptimizerMemoryMonitor(1)), weights(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_command_line_knows_it():
    assert lm.OptimizerMemoryMonitor is OptimizerMemoryMonitor
    assert issubclass(OptimizerMemoryMonitor, Callback)
