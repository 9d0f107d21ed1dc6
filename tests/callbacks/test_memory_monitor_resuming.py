"""The monitor in resumed and repeated runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning.pytorch")
pytest.importorskip("matplotlib")

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_memopt import OptimizerMemoryMonitor
from tests.callbacks._monitor import adamw, fit, kept, lean, snapshot_of, steps, summaries, tables

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("workplace"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
]


class Saves(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("make", "begin"), [(lean, 0), (adamw, 1)])
@pytest.mark.parametrize("step", [4, 5])
def test_a_resumed_run_goes_on_with_the_history(make, begin, step, first, tmp_path, capsys):
    """Saved before or after the monitor's turn, at a step that it measures or at another."""
    path, whole = tmp_path / "saved.ckpt", OptimizerMemoryMonitor(2)
    saves = Saves(path, step)
    fit(make, *((saves, whole) if first else (whole, saves)), default_root_dir=tmp_path / "whole")
    capsys.readouterr()
    callback = OptimizerMemoryMonitor(2)
    made = fit(make, callback, ckpt_path=path, default_root_dir=tmp_path / "again", max_steps=9)
    assert steps(callback) == sorted({begin, 2, 4, step, 6, 8, 9})
    common = [entry for entry in callback.history if entry["step"] <= 4]
    for mine, theirs in zip(common, whole.history, strict=False):
        passing = {"peak_bytes", "rest_bytes", "gradient_bytes", "scratch_bytes"}  # of the steps before
        assert {k: mine[k] for k in mine.keys() - passing} == {k: theirs[k] for k in theirs.keys() - passing}
    assert callback.history[-1]["state_bytes"] == kept(*made.optimizers), "nothing counts twice"
    assert len({entry["state_bytes"] for entry in callback.history}) == 1
    content = json.loads((tmp_path / "again" / "memory.json").read_text())
    assert content["history"] == callback.history
    out = capsys.readouterr().out
    assert (tables(out), summaries(out)) == (1, 1)


def test_the_allocation_goes_on_after_a_resume(tmp_path):
    class Changes(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            change = {2: {"rank": 2}, 6: {"momentum": "none"}}.get(trainer.global_step)
            if change is not None:
                (name,) = (b.name for b in trainer.optimizers[0].snapshot().blocks if b.role == "head")
                trainer.optimizers[0].reformat({name: change})

    path = tmp_path / "saved.ckpt"
    fit(lean, Changes(), OptimizerMemoryMonitor(2), Saves(path, 4), max_steps=5, default_root_dir=tmp_path)
    callback = OptimizerMemoryMonitor(2, figures=True)
    fit(lean, Changes(), callback, ckpt_path=path, max_steps=8, default_root_dir=tmp_path)
    ranks = {name: x.reshape(-1).tolist() for name, x in callback._allocation.compute().items()}
    (head,) = (name for name in ranks if "lm_head" in name)
    assert ranks[head] == [4, 2, 0]
    assert callback._allocation.steps.tolist() == [0, 2, 6]
    (axis, _) = callback.plot_allocation().axes
    assert axis.collections[0].get_array().size == 3 * len(axis.get_yticklabels())


def test_what_it_saves_loads_as_tensors_and_plain_values(tmp_path):
    made = fit(lean, OptimizerMemoryMonitor(2), max_steps=4)
    made.save_checkpoint(tmp_path / "saved.ckpt", weights_only=False)
    state = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]["OptimizerMemoryMonitor"]
    assert [entry["step"] for entry in state["history"]] == [0, 2, 4]
    fresh = OptimizerMemoryMonitor(5)
    fresh.load_state_dict(state)
    assert steps(fresh) == [0, 2, 4]
    again = fresh.state_dict()
    assert again["history"] == state["history"]
    assert again["allocation"].keys() == state["allocation"].keys()


def test_a_checkpoint_that_no_training_continues_from_leaves_nothing_behind(tmp_path):
    """Lightning loads callbacks to validate, too."""
    made = fit(lean, OptimizerMemoryMonitor(2), max_steps=4)
    made.save_checkpoint(tmp_path / "saved.ckpt", weights_only=False)
    state = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]["OptimizerMemoryMonitor"]
    for stage, expected in (("validate", []), ("fit", [0, 2, 4])):
        callback = OptimizerMemoryMonitor(3)
        callback.setup(made, made.lightning_module, stage)
        callback.load_state_dict(state)
        assert steps(callback) == expected
        fit(lean, callback, max_steps=4)  # from the beginning
        assert steps(callback) == [0, 3, 4]


def test_a_checkpoint_callback_saves_what_was_measured(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(lean, OptimizerMemoryMonitor(2), checkpoint, enable_checkpointing=True, max_steps=6, default_root_dir=tmp_path)
    state = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["callbacks"]["OptimizerMemoryMonitor"]
    assert [entry["step"] for entry in state["history"]] == [0, 2, 4]


def test_a_second_training_starts_anew(capsys, tmp_path):
    callback = OptimizerMemoryMonitor(2)
    fit(lean, callback, default_root_dir=tmp_path)
    made = fit(adamw, callback, default_root_dir=tmp_path, max_steps=3)
    assert steps(callback) == [1, 2, 3]
    assert callback.history[-1]["state_bytes"] == kept(*made.optimizers)
    assert json.loads((tmp_path / "memory.json").read_text())["optimizers"] == ["AdamW"]
    out = capsys.readouterr().out
    assert (tables(out), summaries(out)) == (2, 2)
    assert set(callback._allocation.compute()) == {block.name for block in snapshot_of(made).blocks}


def test_a_run_that_was_over_already_keeps_its_history(tmp_path, capsys):
    path = tmp_path / "saved.ckpt"
    made = fit(lean, OptimizerMemoryMonitor(2), max_steps=4, default_root_dir=tmp_path)
    made.save_checkpoint(path)
    callback = OptimizerMemoryMonitor(2)
    fit(lean, callback, ckpt_path=path, max_steps=4, default_root_dir=tmp_path / "again")
    assert steps(callback) == [0, 2, 4]
