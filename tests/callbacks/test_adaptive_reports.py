"""What users see of AdaptiveMomentum: scalars, figures, messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning.pytorch")

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_memopt import AdaptiveMomentum
from tests.callbacks._adaptive import Module, fit, moved

pytestmark = pytest.mark.slow


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
