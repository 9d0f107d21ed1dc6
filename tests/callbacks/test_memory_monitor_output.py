"""What the monitor says: one table, one line, and what is saved in the progress bar."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("lightning.pytorch")
pytest.importorskip("matplotlib")

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_memopt import OptimizerMemoryMonitor
from tests.callbacks._monitor import (
    FILES,
    VOCAB,
    WIDTH,
    Module,
    adamw,
    below,
    fit,
    lean,
    numel,
    sgd,
    steps,
    summaries,
    tables,
    trainer,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workplace")]


@pytest.mark.parametrize("options", [{}, {"fast_dev_run": 3}, {"num_sanity_val_steps": 2, "limit_val_batches": 2}])
@pytest.mark.parametrize(("make", "name"), [(lean, "AdaPMLean (adapm_lean)"), (adamw, "AdamW")])
def test_one_table_and_one_line(make, name, options, capsys, tmp_path):
    callback = OptimizerMemoryMonitor(2, figures=True)
    fit(make, callback, default_root_dir=tmp_path, **options)
    out = capsys.readouterr().out
    assert (tables(out), summaries(out)) == (1, 1)
    assert f"Optimizer state of {name}" in [line.rstrip() for line in out.splitlines()]
    assert out.index("Optimizer state of ") < out.index("Optimizer state: ")
    for word in ("embedding", "query", "mlp", "vector", "AdamW", "saved", "dense"):
        assert word in out
    assert len([line for line in out.splitlines() if line.startswith("Optimizer state: ")]) == 1
    saved = callback.history[-1]["saved"]
    assert f"saved {saved:.1%} of AdamW's" in out
    assert (saved > 0.3) == (make is lean)
    assert "Peak memory: " in out
    assert below(tmp_path) == (set() if options.get("fast_dev_run") else FILES)


def test_the_table_adds_up(capsys):
    made = fit(adamw, OptimizerMemoryMonitor())
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    size = 8 * numel(made.lightning_module)
    assert lines["all"].count(f"{size / 1024:.1f}".removesuffix(".0") + " KiB") == 2
    assert lines["all"].rstrip().endswith("0.0%")
    assert lines["embedding"].split()[:3] == ["embedding", "1", str(VOCAB * WIDTH)]


def test_the_table_fits_into_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    fit(lean, OptimizerMemoryMonitor())
    out = capsys.readouterr().out.split("Optimizer state: ")[0]
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


def test_without_rich_it_prints_plain_lines(capsys, monkeypatch):
    for name in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    fit(lean, OptimizerMemoryMonitor())
    out = capsys.readouterr().out
    assert (tables(out), summaries(out)) == (1, 1)
    assert "layer.self_attn.in_proj_weight:query" in out


def test_an_optimizer_without_state_is_said_to_have_none(capsys, tmp_path):
    fit(sgd, OptimizerMemoryMonitor(figures=True), default_root_dir=tmp_path)
    out = capsys.readouterr().out
    assert "there was no optimizer state to measure (SGD)" in out
    assert (tables(out), summaries(out)) == (0, 0)
    assert below(tmp_path) == set()


@pytest.mark.parametrize("phase", ["validate", "test"])
def test_without_training_it_keeps_still(phase, capsys, tmp_path):
    callback = OptimizerMemoryMonitor(figures=True)
    made = trainer(callback, logger=CSVLogger(tmp_path), limit_val_batches=2, default_root_dir=tmp_path)
    getattr(made, phase)(Module(lean), verbose=False)
    assert "ptimizer" not in capsys.readouterr().out
    assert callback.history == []
    assert not FILES & below(tmp_path)
    assert not any("memopt" in path.read_text() for path in tmp_path.rglob("*.csv"))


def test_validation_after_training_adds_nothing(capsys, tmp_path):
    callback = OptimizerMemoryMonitor(2)
    made = trainer(callback, max_steps=3, limit_val_batches=1, default_root_dir=tmp_path)
    module = Module(lean)
    made.fit(module)
    capsys.readouterr()
    (tmp_path / "memory.json").unlink()
    made.validate(module, verbose=False)
    assert steps(callback) == [0, 2, 3]
    assert capsys.readouterr().out == ""
    assert below(tmp_path) == set()


@pytest.mark.parametrize("make", [lean, adamw])
def test_the_progress_bar_shows_what_is_saved(make):
    class Looks(Callback):
        seen: list[Any] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            self.seen.append(trainer.progress_bar_metrics.get("saved %"))

    callback, looks = OptimizerMemoryMonitor(3), Looks()
    looks.seen = []
    made = fit(make, callback, looks, max_epochs=2, limit_train_batches=4)
    saved = 100 * callback.history[-1]["saved"]
    assert made.progress_bar_metrics["saved %"] == pytest.approx(round(saved, 1), abs=1e-3)
    assert looks.seen == [pytest.approx(round(saved, 1), abs=1e-3)] * 8, "from the first batch on"
    assert "saved %" not in made.logged_metrics, "loggers have memopt/saved"


def test_the_progress_bar_follows_a_change():
    class Changes(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                names = [block.name for block in trainer.optimizers[0].snapshot().blocks if block.role != "vector"]
                trainer.optimizers[0].reformat({name: {"momentum": "none"} for name in names})

    callback = OptimizerMemoryMonitor(5)
    made = fit(lean, Changes(), callback)
    first, last = callback.history[0]["saved"], callback.history[-1]["saved"]
    assert last > first
    assert made.progress_bar_metrics["saved %"] == pytest.approx(round(100 * last, 1), abs=1e-3)
