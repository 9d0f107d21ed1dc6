"""What users see of AdaptiveMomentum: scalars, figures, messages."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_memopt import AdaptiveMomentum, OptimizerMemoryMonitor
from lightning_memopt.callbacks.adaptive_report import later
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
    aim, first, *changes, frozen, last = [line for line in lines if line.startswith("AdaptiveMomentum")]
    start = "AdaptiveMomentum, policy energy: divides a budget of 4.2 KiB among 8 blocks now; "
    assert aim == f"{start}may change up to 8 blocks every 4 steps, from step 4 until step 26."
    assert first.startswith("AdaptiveMomentum starts with ")
    assert first.endswith("of AdamW's, in 8 blocks.")
    told = [entry for entry in callback.history[1:] if entry["moves"]]
    assert len(changes) == len(told) > 0
    for line, entry in zip(changes, told, strict=True):
        name, (old, new) = next(iter(entry["moves"].items()))
        assert line.startswith(f"AdaptiveMomentum, step {entry['step']}, new ranks: {name} {old} → {new}")
    assert frozen.startswith("AdaptiveMomentum: frozen after step 26 with ")
    assert last.startswith("AdaptiveMomentum ends with ")
    assert f": 6 decisions, {sum(moved(callback))} moves, " in last
    assert last.endswith(" of them in the later half.")
    assert callback.plot().axes[0].get_title().startswith("Momentum of every matrix\nAdaptiveMomentum, policy energy; ")


class Own(AdaptiveMomentum):
    def propose(self, snapshot: Any, signals: Any) -> dict[str, Any]:
        return {}


MOVES = "may change up to 8 blocks every 3 steps, from step 3 until "
DUE = "and the first decision is due at step 3; lower `every_n_steps` or `start`"
TOO_LATE = "changes nothing later: the allocation freezes at step {}, " + DUE + ", or raise `freeze_after`."


@pytest.mark.parametrize(
    ("callback", "options", "words"),
    [
        (
            lambda **o: AdaptiveMomentum(0.3, **o),
            {},
            "policy uniform: divides a budget of 6.2 KiB among 8 blocks now; ",
        ),
        (lambda **o: AdaptiveMomentum(0.3, **o), {}, "changes nothing later"),
        (lambda **o: AdaptiveMomentum(0.5, "paper", **o), {}, "changes nothing later"),
        (lambda **o: AdaptiveMomentum(0.3, "benefit", **o), {}, f"{MOVES}step 6"),
        (lambda **o: AdaptiveMomentum(0.3, "schedule", **o), {"freeze_after": 1.0}, f"{MOVES}step 12"),
        (lambda **o: AdaptiveMomentum(0.3, "energy", **o), {"freeze_after": None}, f"{MOVES}step 12"),
        (lambda **o: AdaptiveMomentum(0.3, "energy", **o), {"freeze_after": 3}, TOO_LATE.format(3)),
        (lambda **o: AdaptiveMomentum(0.3, "energy", **o), {"freeze_after": 0.01}, TOO_LATE.format(1)),
        (
            lambda **o: AdaptiveMomentum(None, "energy", **o),
            {},
            "no budget: looks for the smallest ranks of 8 blocks with a quality of 50%; ",
        ),
        (lambda **o: AdaptiveMomentum(None, **o), {}, f"{MOVES}step 6"),
        (lambda **o: Own(0.3, **o), {}, f"{MOVES}step 6"),
    ],
)
def test_it_says_at_the_start_what_it_will_do(callback, options, words, capsys):
    made = callback(every_n_steps=3, **{"freeze_after": 0.5, **options})
    with pytest.raises(RuntimeError, match="enough"):
        fit(Module(), made, Raises(RuntimeError("enough"), 0))
    first, *_ = (line for line in capsys.readouterr().out.splitlines() if line.startswith("AdaptiveMomentum"))
    assert words in first


@pytest.mark.parametrize("policy", ["energy", "uniform"])
@pytest.mark.parametrize("budget", [0.3, None])
def test_a_run_that_ends_before_its_first_decision_says_so(budget, policy, capsys):
    fit(Module(layers=0), AdaptiveMomentum(budget, policy, freeze_after=None), max_steps=3)
    aim, *_, last = (line for line in capsys.readouterr().out.splitlines() if line.startswith("AdaptiveMomentum"))
    if budget and policy == "uniform":
        assert aim.endswith("; changes nothing later.")
        assert last.endswith(": 0 decisions, no moves.")
        return
    due = "the first decision is due at step 100; lower `every_n_steps` or `start`."
    assert aim.endswith(f"changes nothing later: training ends at step 3, and {due}")
    assert last.startswith("AdaptiveMomentum ends with ")
    missed = "no decision was taken, since the first was due at step 100; lower `every_n_steps` or `start`."
    assert last.endswith(missed)


def test_a_run_that_freezes_before_its_first_decision_says_so(capsys):
    fit(Module(layers=0), AdaptiveMomentum(0.3, "energy", freeze_after=2), max_steps=4)
    assert "or `start`, or raise `freeze_after`." in capsys.readouterr().out.splitlines()[-1]


def test_the_last_step_may_decide(capsys):
    callback = AdaptiveMomentum(0.3, "energy", every_n_steps=4, freeze_after=None)
    fit(Module(layers=0), callback, max_steps=4)
    assert "from step 4 until step 4." in capsys.readouterr().out
    assert [entry["step"] for entry in callback.history] == [0, 4]


def test_a_training_of_unknown_length_changes_blocks_until_its_end():
    timing = {"every": 3, "start": 2, "end": float("inf"), "freezes": False, "max_moves": 4}
    assert (
        later(None, None, **timing) == "may change up to 4 blocks every 3 steps, from step 2 until the end of training"
    )


class Raises(Callback):
    def __init__(self, error: BaseException, step: int) -> None:
        self.error, self.step = error, step

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


@pytest.fixture
def sigint():
    """Lightning ignores the signal after an interruption."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_run_closes_and_draws(tmp_path, capsys, sigint):
    callbacks = [
        AdaptiveMomentum(0.25, "energy", every_n_steps=2, figures=True),
        OptimizerMemoryMonitor(4, figures=True),
    ]
    with pytest.raises(SystemExit):
        fit(Module(), *callbacks, Raises(KeyboardInterrupt(), 7), default_root_dir=tmp_path)
    out = capsys.readouterr().out
    assert "AdaptiveMomentum stops at step 7 (KeyboardInterrupt) with " in out
    assert "OptimizerMemoryMonitor, stopped by KeyboardInterrupt; last measurement at step " in out
    assert out.count("Optimizer state: ") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"allocation.png", "memory.json", "memory.png", "momentum.png"}
    for callback in callbacks:  # a later error is none of the training
        callback.on_exception(None, None, ValueError())
    assert capsys.readouterr().out == ""


def test_a_figure_that_fails_does_not_hide_why_training_ended(tmp_path, monkeypatch):
    def broken() -> None:
        raise RuntimeError("the logger has no connection")

    callback = AdaptiveMomentum(0.25, figures=True)
    monkeypatch.setattr(callback, "plot", broken)
    match = r"AdaptiveMomentum could not write its report to .* \(RuntimeError: the logger has no connection\)"
    with pytest.warns(UserWarning, match=match), pytest.raises(ValueError, match="enough"):
        fit(Module(), callback, Raises(ValueError("enough"), 2), default_root_dir=tmp_path)


def test_a_figure_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="AdaptiveMomentum could not write its report to "):
        fit(Module(), AdaptiveMomentum(0.25, figures=True), default_root_dir=tmp_path / "file", max_steps=1)
