"""How a run ends that fails or is interrupted: what is printed, and where the run can continue."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import pytest
import torch

pytest.importorskip("lightning.pytorch.cli")

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memopt.cli import main
from lightning_memopt.cli.failures import describe
from lightning_memopt.cli.memopt_cli import newest_checkpoint
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


def test_every_line_of_other_ranks_names_them():
    def work():
        return torch.ones(2, 3) @ torch.ones(2, 3)

    with pytest.raises(RuntimeError) as raised:
        work()
    raised.value.add_note("A note.")
    said = describe("prog", raised.value, rank=3).splitlines()
    assert all(line.startswith("[rank 3] ") for line in said)
    assert said[-3].startswith("[rank 3] RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert said[-2] == "[rank 3] A note."
    assert any("return torch.ones(2, 3) @ torch.ones(2, 3)" in line for line in said)


def test_a_message_that_is_a_key_or_a_check_has_its_type():
    for error, text in ((KeyError("lr"), "KeyError: 'lr'"), (AssertionError("mine"), "AssertionError: mine")):
        with pytest.raises(type(error)) as raised:
            raise error
        raised.value.add_note("A note.")
        head, note, place = describe("prog", raised.value, rank=0).splitlines()
        assert (head, note) == (f"prog: error: {text}", "A note.")
        assert f"{HERE}:" in place


def test_what_led_to_a_message_is_named():
    def read():
        try:
            Path("/nowhere/file").read_text()
        except OSError as error:
            raise ValueError("There is no data.") from error

    with pytest.raises(ValueError, match="no data") as raised:
        read()
    head, cause, place = describe("prog", raised.value, rank=0).splitlines()
    assert head == "prog: error: There is no data."
    assert cause == "  caused by FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/file'"
    assert place.startswith("  at ")


def test_a_statement_behind_a_condition_is_found_and_callers_are_few(tmp_path):
    code = "def refuse(depth):\n    if depth == 0: raise ValueError('No.')\n    refuse(depth - 1)\n"
    (tmp_path / "mine.py").write_text(code)
    found = runpy.run_path(str(tmp_path / "mine.py"))
    with pytest.raises(ValueError, match=r"No\.") as raised:
        found["refuse"](20)
    head, place = describe("prog", raised.value, rank=0).splitlines()
    assert head == "prog: error: No."
    assert place.count("called from") == 5
    assert place.endswith("called from 17 more")


@pytest.mark.parametrize("folder", ["dist-packages", "site-packages"])
def test_packages_of_a_user_or_a_distribution_are_libraries(folder, tmp_path, monkeypatch):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "theirs.py").write_text("def refuse():\n    raise ValueError('No.')\n")
    monkeypatch.syspath_prepend(str(tmp_path / folder))
    theirs = importlib.import_module("theirs")
    sys.modules.pop("theirs")
    with pytest.raises(ValueError, match=r"No\.") as raised:
        theirs.refuse()
    said = describe("prog", raised.value, rank=0)
    assert said.startswith("Traceback"), "a library's message may need its place"
    assert f'{folder}/theirs.py", line 2, in refuse' in said


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ValueError, match=r"No\.") as raised:
        raise ValueError("No.")
    assert f"  at {__file__}:" in describe("prog", raised.value, rank=0)


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


def test_the_newest_of_several_checkpoints_is_named(tmp_path):
    paths = [tmp_path / name for name in ("a b.ckpt", "c.ckpt", "d.ckpt")]
    for age, path in enumerate(paths[:2]):
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    callback = ModelCheckpoint()
    callback.last_model_path, callback.best_model_path = str(paths[1]), str(paths[2])
    callback.best_k_models = {str(paths[0]): torch.tensor(1.0)}
    trainer = SimpleNamespace(checkpoint_callbacks=[callback])
    assert newest_checkpoint(trainer) == str(paths[0]), "the third does not exist"
    assert newest_checkpoint(SimpleNamespace(checkpoint_callbacks=[])) == ""


def test_a_reader_that_leaves_during_a_run(run, monkeypatch, tmp_path):
    def left(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr("lightning_memopt.cli.MemOptCLI", left)
    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert run(Tiny) == (141, "")


def test_ctrl_c_before_a_run_is_no_traceback(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_memopt.cli.MemOptCLI", interrupted)
    assert run(Tiny) == (130, "")
