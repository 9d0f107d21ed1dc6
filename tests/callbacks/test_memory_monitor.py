"""The monitor with a Trainer on one device: what it measures, when, where it writes it, and when it keeps still."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning.pytorch")
pytest.importorskip("matplotlib")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib import pyplot

import lightning_memopt as lm
from lightning_memopt import AdaptiveMomentum, OptimizerMemoryMonitor

WIDTH, VOCAB = 16, 20
SCALARS = {
    *("state_bytes", "state_bytes_rank", "state_bytes_global"),
    *("momentum_bytes", "projection_bytes", "second_moment_bytes", "other_bytes"),
    *("saved", "saved_momentum", "saved_second_moment"),
    *("peak_bytes", "parameter_bytes", "gradient_bytes", "rest_bytes"),
}
FILES = {"memory.json", "memory.png", "momentum.png"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
]


@pytest.fixture(autouse=True)
def workplace(monkeypatch, tmp_path_factory):
    """Run in an empty folder, with a wide console."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    monkeypatch.setenv("COLUMNS", "120")
    pyplot.close("all")
    yield
    assert pyplot.get_fignums() == [], "no figure is left open"


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("scale", torch.ones(5))

    def forward(self, batch: Tensor) -> Tensor:
        return self.lm_head(self.layer(self.embed_tokens(batch)))


class Module(LightningModule):
    def __init__(self, optimizer: Callable[[LightningModule], Any]) -> None:
        super().__init__()
        self.model, self.make = Network(), optimizer

    def loss(self, seed: int) -> Tensor:
        batch = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(seed))
        return nn.functional.cross_entropy(self.model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(100))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.loss(100))

    def configure_optimizers(self) -> Any:
        return self.make(self)

    def train_dataloader(self) -> Any:
        return DataLoader(range(10), batch_size=1)

    val_dataloader = test_dataloader = train_dataloader


def lean(module: LightningModule) -> lm.MemOpt:
    return lm.AdaPMLean(module.named_parameters(), lr=1e-3, rank=4)


def adamw(module: LightningModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def sgd(module: LightningModule) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-3)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, "devices": 1}
    return Trainer(**{**quiet, "callbacks": list(callbacks), **options})


def fit(make: Callable[..., Any], *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Trainer:
    made = trainer(*callbacks, **({} if "max_epochs" in options else {"max_steps": 7}) | options)
    made.fit(make if isinstance(make, LightningModule) else Module(make), ckpt_path=ckpt_path)
    return made


def kept(*optimizers: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in the optimizers' state, counted without this package."""
    return sum(
        value.numel() * value.element_size()
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def numel(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def steps(callback: OptimizerMemoryMonitor) -> list[int]:
    return [entry["step"] for entry in callback.history]


def tables(out: str) -> int:
    return out.count("Optimizer state of ")


def summaries(out: str) -> int:
    return out.count("Optimizer state: ")


def below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


class Counts(Callback):
    """Counts what the first optimizer holds after every batch, by step."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.sizes.setdefault(trainer.global_step, kept(*trainer.optimizers))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.sizes[trainer.global_step] = kept(*trainer.optimizers)


# --- when it measures ------------------------------------------------------------------------------------------------


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


# --- what it says ----------------------------------------------------------------------------------------------------


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
    assert "Peak memory of a rank: " in out
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
    assert made.progress_bar_metrics["saved %"] == pytest.approx(saved, abs=1e-3)
    assert looks.seen == [pytest.approx(saved, abs=1e-3)] * 8, "from the first batch on"
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
    assert made.progress_bar_metrics["saved %"] == pytest.approx(100 * last, abs=1e-3)


# --- loggers ---------------------------------------------------------------------------------------------------------


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
        colours = pixels[..., :3].reshape(-1, 3)[::7].unique(dim=0)
        assert len(colours) > 5
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


# --- memory.json -----------------------------------------------------------------------------------------------------


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


# --- resuming --------------------------------------------------------------------------------------------------------


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
        assert {k: mine[k] for k in mine if "peak" not in k and "rest" not in k and "grad" not in k} == {
            k: theirs[k] for k in theirs if "peak" not in k and "rest" not in k and "grad" not in k
        }
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


def snapshot_of(made: Trainer) -> lm.Snapshot:
    return lm.take_snapshot(made.optimizers, made.lightning_module)


def test_a_run_that_was_over_already_keeps_its_history(tmp_path, capsys):
    path = tmp_path / "saved.ckpt"
    made = fit(lean, OptimizerMemoryMonitor(2), max_steps=4, default_root_dir=tmp_path)
    made.save_checkpoint(path)
    callback = OptimizerMemoryMonitor(2)
    fit(lean, callback, ckpt_path=path, max_steps=4, default_root_dir=tmp_path / "again")
    assert steps(callback) == [0, 2, 4]


# --- other loops, other callbacks ------------------------------------------------------------------------------------


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


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "memory.json").mkdir()
    callback = OptimizerMemoryMonitor(2, figures=True)
    with pytest.warns(UserWarning, match=r"could not write its report into .*: "):
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


def test_ours_without_names_say_what_to_do():
    with pytest.raises(ValueError, match=r"bind\(model\)"):
        fit(lambda module: lm.AdaPMLean(module.parameters(), lr=1e-3), OptimizerMemoryMonitor())


@pytest.mark.parametrize("make", [lean, adamw])
def test_it_changes_nothing_of_the_training(make):
    def weights(*callbacks: Callback) -> list[Tensor]:
        torch.manual_seed(1)
        made = fit(make, *callbacks)
        return [torch.get_rng_state().float(), *(param.detach() for param in made.lightning_module.parameters())]

    for mine, theirs in zip(weights(OptimizerMemoryMonitor(1)), weights(), strict=True):
        assert torch.equal(mine, theirs)


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


def test_plots_after_training_and_before():
    callback = OptimizerMemoryMonitor(2)
    with pytest.raises(ValueError, match="nothing to draw yet"), pytest.warns(UserWarning, match="before the"):
        callback.plot_allocation()
    fit(lean, callback)
    labels = [label.get_text() for label in callback.plot_allocation().axes[0].get_yticklabels()]
    assert sum("low_rank" in label for label in labels) == len(labels) > 0
    assert callback.plot().axes[0].patches


def test_the_command_line_knows_it():
    assert lm.OptimizerMemoryMonitor is OptimizerMemoryMonitor
    assert issubclass(OptimizerMemoryMonitor, Callback)
