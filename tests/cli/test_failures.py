"""How a run ends that fails or is interrupted: what is printed, and where the run can continue."""

from __future__ import annotations

import sys
from pathlib import Path

import jsonargparse
import pytest
import torch

pytest.importorskip("lightning.pytorch.cli")

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memopt.cli import main
from lightning_memopt.cli.failures import describe
from tests._commands import keep_parsers
from tests.cli.test_memopt_cli import QUIET, Tiny

pytestmark = pytest.mark.slow

LEAN = ["--optimizer=lightning_memopt.AdaPMLean", "--optimizer.lr=0.01"]
SAVING = [
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2",
    "--trainer.callbacks.dirpath=saved", "--trainer.enable_checkpointing=true",
]  # fmt: skip
HERE = Path(__file__).name


class Refusing(Tiny):
    """Refuses its argument."""

    def __init__(self, path: str = "") -> None:
        super().__init__()
        raise ValueError(f"`path` must be a folder, got {path!r}.")


class Wrong(Tiny):
    """Multiplies tensors of shapes that do not fit."""

    def training_step(self, batch, batch_idx):
        return torch.ones(2, 3) @ self.lm_head.weight


class Stopped(Callback):
    """Ends the run as Ctrl-C does, after three steps."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            raise KeyboardInterrupt


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Return a function that runs ``fit`` in an empty folder and returns its exit status and what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    keep_parsers(monkeypatch, "fit")

    def call(model: type, *args: str) -> tuple[int, str]:
        name = f"--model=tests.cli.{model.__module__.rpartition('.')[2]}.{model.__name__}"
        monkeypatch.setattr(sys, "argv", ["lightning-memopt", "fit", name, *QUIET, *args])
        with pytest.raises(SystemExit) as raised:
            main()
        return raised.value.code, capsys.readouterr().err

    yield call
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=False)


def test_what_a_module_refuses_is_its_message(run):
    code, said = run(Refusing, "--model.path=nowhere", *LEAN)
    first, place = said.splitlines()[-2:]
    assert code == 1
    assert first == "lightning-memopt: error: `path` must be a folder, got 'nowhere'."
    assert place.startswith("  at ")
    assert f"{HERE}:" in place
    assert place.endswith("in __init__")


def test_what_lightning_and_this_package_refuse_is_their_message(run):
    code, said = run(Tiny)
    assert code == 1
    assert said.splitlines()[-1].startswith("lightning-memopt: error: There is no optimizer: Tiny has no")
    _, said = run(Tiny, *LEAN, "--optimizer.lr=-1")
    refused = "In the arguments of AdaPMLean: `lr` must be finite, at least 0, got -1.0."
    assert said.splitlines()[-1] == f"lightning-memopt: error: {refused}"


def test_other_errors_show_the_lines_of_the_user(run, monkeypatch):
    code, said = run(Wrong, *LEAN)
    assert code == 1
    trace = said[said.index("Traceback") :]
    assert trace.count('  File "') == 1, "Lightning's thirty frames are left out"
    assert f'{HERE}", line' in trace
    assert "in training_step\n    return torch.ones(2, 3) @ self.lm_head.weight" in trace
    assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied" in trace
    assert trace.endswith("Frames of libraries are left out: JSONARGPARSE_DEBUG=true shows all.\n")
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(Wrong, *LEAN)


def test_other_ranks_are_one_line_and_a_place():
    def work():
        return torch.ones(2, 3) @ torch.ones(2, 3)

    with pytest.raises(RuntimeError) as raised:
        work()
    raised.value.add_note("A note.")
    said = describe("prog", raised.value, rank=3)
    head, note, place = said.splitlines()
    assert head.startswith("prog: error: [rank 3] mat1 and mat2 shapes cannot be multiplied")
    assert note == "A note."
    assert f"{HERE}:" in place
    assert "in work, called from" in place


def test_an_error_without_a_message_is_named():
    with pytest.raises(MisconfigurationException) as raised:
        raise MisconfigurationException
    assert describe("prog", raised.value, rank=0).startswith("prog: error: MisconfigurationException\n  at ")


def test_errors_that_led_to_an_error_are_kept():
    def fail():
        try:
            torch.ones(2) @ torch.ones(3)
        except RuntimeError as error:
            torch.load("nothing.pt") if error else None

    with pytest.raises(FileNotFoundError) as raised:
        fail()
    said = describe("prog", raised.value, rank=0)
    assert "inconsistent tensor size" in said
    assert "During handling of the above exception" in said
    assert "No such file or directory: 'nothing.pt'" in said
    assert 'torch/serialization.py", line' in said, "the innermost frame stays"
    assert said.count("serialization.py") == 1


def test_an_interrupted_run_names_its_newest_checkpoint(run, tmp_path):
    stop = "--trainer.callbacks+=tests.cli.test_failures.Stopped"
    code, said = run(Tiny, *LEAN, *SAVING, stop)
    assert code == 1
    assert "To continue this run, repeat its command with --ckpt_path=" in said
    path = said.partition("--ckpt_path=")[2].split()[0]
    assert Path(path).name == "epoch=0-step=2.ckpt"
    code, said = run(Tiny, *LEAN, *SAVING, f"--ckpt_path={path}")
    assert (code, "To continue" in said) == (0, False)
    _, said = run(Tiny, *LEAN, stop)
    assert "To continue" not in said, "there is none"


def test_ctrl_c_before_a_run_is_no_traceback(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_memopt.cli.MemOptCLI", interrupted)
    assert run(Tiny) == (130, "")
