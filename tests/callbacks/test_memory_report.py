"""Where the monitor writes: scalars and figures in loggers, and memory.json."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning.pytorch")
pytest.importorskip("matplotlib")

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import lightning_memopt as lm
from lightning_memopt import OptimizerMemoryMonitor
from tests.callbacks._monitor import (
    FILES,
    SCALARS,
    VOCAB,
    WIDTH,
    Counts,
    Module,
    adamw,
    below,
    fit,
    kept,
    lean,
    numel,
    steps,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workplace")]


def test_scalars_in_loggers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, sheet = TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv")
    callback, counts = OptimizerMemoryMonitor(3), Counts()
    made = fit(adamw, callback, counts, logger=[board, sheet])
    events = EventAccumulator(board.log_dir)
    events.Reload()
    names = {tag for tag in events.Tags()["scalars"] if tag.startswith("memopt/")}
    assert names == {f"memopt/{name}" for name in SCALARS}
    for name in SCALARS:
        found = events.Scalars(f"memopt/{name}")
        assert [event.step for event in found] == [1, 3, 6, 7]
        expected = [entry[name] for entry in callback.history]
        assert [event.value for event in found] == pytest.approx(expected, rel=1e-6)
    sizes = [counts.sizes[step] for step in (1, 3, 6, 7)]
    assert [event.value for event in events.Scalars("memopt/state_bytes")] == sizes
    assert {event.value for event in events.Scalars("memopt/saved")} == {0.0}
    assert {event.value for event in events.Scalars("memopt/projection_bytes")} == {0.0}
    assert {event.value for event in events.Scalars("memopt/momentum_bytes")} == {4.0 * numel(made.lightning_module)}
    with open(Path(sheet.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["memopt/state_bytes"]]
    assert [(int(row["step"]), float(row["memopt/state_bytes"])) for row in rows] == [
        *zip((1, 3, 6, 7), sizes, strict=True)
    ]
    assert {key for key in rows[0] if key.startswith("memopt/")} == names
    assert not events.Tags()["images"]


def test_scalars_of_ours_know_projections(tmp_path):
    callback = OptimizerMemoryMonitor(3)
    made = fit(lambda module: lm.AdamSNSM(module.named_parameters(), lr=1e-3, rank=4), callback)
    bases = sum(
        value.numel() * 4
        for state in made.optimizers[0].state.values()
        for key, value in state.items()
        if key.endswith("subspace_p")
    )
    last = callback.history[-1]
    assert last["projection_bytes"] == bases > 0
    sizes = [last[f"{name}_bytes"] for name in ("momentum", "projection", "second_moment", "other")]
    assert sum(sizes) == last["state_bytes_global"] == kept(*made.optimizers) - 4 * len(made.optimizers[0].state)
    assert last["saved"] == pytest.approx(1 - sum(sizes) / (8 * numel(made.lightning_module)), abs=1e-6)


@pytest.mark.parametrize("logger", [True, False])
def test_figures_on_request(logger, tmp_path):
    from matplotlib.image import imread
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardLogger(tmp_path / "logs") if logger else False
    made = fit(lean, OptimizerMemoryMonitor(3, figures=True), logger=board, default_root_dir=tmp_path / "root")
    folder = Path(board.log_dir) if board else tmp_path / "root"
    assert {path.name for path in folder.iterdir()} >= FILES
    assert not FILES & {path.name for path in tmp_path.rglob("*") if path.parent != folder}
    assert not list(Path.cwd().iterdir())
    for name in ("memory", "momentum"):
        pixels = torch.from_numpy(imread(folder / f"{name}.png").copy())
        assert min(pixels.shape[:2]) > 300
        colours = pixels[..., :3].reshape(-1, 3)[::7]
        codes = (255 * colours).round().long() @ torch.tensor([1, 256, 256**2])
        assert len(codes.unique()) > 5
        assert bool((colours.amax(1) - colours.amin(1) > 0.2).any()), "not only black and white"
    if board:
        events = EventAccumulator(board.log_dir)
        events.Reload()
        assert set(events.Tags()["images"]) == {"memopt/memory", "memopt/momentum"}
        (image,) = events.Images("memopt/momentum")
        assert (image.step, image.encoded_image_string[:4]) == (made.global_step, b"\x89PNG")


def test_no_figures_unless_asked_for(tmp_path):
    board = TensorBoardLogger(tmp_path)
    fit(lean, OptimizerMemoryMonitor(3), logger=board, default_root_dir=tmp_path)
    assert {path.name for path in Path(board.log_dir).iterdir()} >= {"memory.json"}
    assert not list(tmp_path.rglob("*.png"))


def test_figures_of_a_model_without_matrices(tmp_path):
    class Vectors(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([param for param in self.parameters() if param.ndim < 2], lr=1e-3)

    fit(Vectors(lean), OptimizerMemoryMonitor(figures=True), default_root_dir=tmp_path)
    assert below(tmp_path) == {"memory.json", "memory.png"}


@pytest.mark.parametrize(("make", "title"), [(lean, "AdaPMLean (adapm_lean)"), (adamw, "AdamW")])
def test_the_file_for_scripts(make, title, tmp_path):
    callback = OptimizerMemoryMonitor(3)
    made = fit(make, callback, default_root_dir=tmp_path)
    content = json.loads((tmp_path / "memory.json").read_text())
    assert list(content) == ["optimizers", "world_size", "bytes", "history", "blocks"]
    assert (content["optimizers"], content["world_size"]) == ([title], 1)
    assert content["history"] == callback.history
    assert content["bytes"]["total"] == content["bytes"]["rank"] == kept(*made.optimizers)
    assert all(isinstance(size, int) for size in content["bytes"].values())
    roles = [size for name, size in content["bytes"].items() if name.startswith("role/")]
    assert sum(roles) == content["bytes"]["global"] == sum(block["state_bytes"] for block in content["blocks"])
    assert sum(block["adamw_bytes"] for block in content["blocks"]) == 8 * numel(made.lightning_module)
    by_name = {block["name"]: block for block in content["blocks"]}
    head = by_name["model.lm_head.weight"]
    assert (head["role"], head["shape"]) == ("head", [VOCAB, WIDTH])
    assert (head["momentum"], head["rank"]) == (("low_rank", 4) if make is lean else ("dense", None))
    assert below(tmp_path) == {"memory.json"}, "nothing half written is left"


def test_the_file_is_there_from_the_first_measurement_on(tmp_path):
    class Reads(Callback):
        found: Any = None

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if self.found is None:
                self.found = json.loads((tmp_path / "memory.json").read_text())

    reads = Reads()
    fit(lean, OptimizerMemoryMonitor(3), reads, default_root_dir=tmp_path)
    assert [entry["step"] for entry in reads.found["history"]] == [0]


def test_the_file_is_complete_after_a_failure(tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(lean, OptimizerMemoryMonitor(2), Fails(), default_root_dir=tmp_path)
    content = json.loads((tmp_path / "memory.json").read_text())
    assert [entry["step"] for entry in content["history"]] == [0, 2, 4]


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "memory.json").mkdir()
    callback = OptimizerMemoryMonitor(2, figures=True)
    with pytest.warns(UserWarning, match=r"could not write its report to .* \(IsADirectoryError: "):
        fit(lean, callback, max_steps=4, default_root_dir=tmp_path)
    assert steps(callback) == [0, 2, 4]
    assert not list(tmp_path.glob(".memory.json*"))


def test_an_error_of_the_training_is_not_hidden_by_one_of_the_report(tmp_path, monkeypatch):
    from lightning_memopt.callbacks import memory_monitor

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    class Failing(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("the real error")

    monkeypatch.setattr(memory_monitor, "write_json", full)
    with pytest.raises(RuntimeError, match="the real error"), pytest.warns(UserWarning, match="No space left"):
        fit(Failing(lean), OptimizerMemoryMonitor(2), max_steps=4, default_root_dir=tmp_path)


def test_plots_after_training_and_before():
    callback = OptimizerMemoryMonitor(2)
    with pytest.raises(ValueError, match="nothing to draw yet"), pytest.warns(UserWarning, match="before the"):
        callback.plot_allocation()
    fit(lean, callback)
    axes, bar = callback.plot_allocation().axes
    assert axes.get_title() == "Momentum of every matrix\nAdaPMLean (adapm_lean), step 7"
    assert (axes.get_xlabel(), bar.get_ylabel()) == ("optimizer step", "rank of the momentum (low_rank)")
    axes = callback.plot().axes[0]
    assert axes.patches
    assert axes.get_title().endswith("\nAdaPMLean (adapm_lean), step 7")
