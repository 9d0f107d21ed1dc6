"""A save that is killed, or fails, at any moment leaves the old or the new checkpoint under the name, never neither."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memopt.strategy.checkpoint.io import AtomicCheckpointIO
from lightning_memopt.strategy.checkpoint.load import load_checkpoint
from lightning_memopt.strategy.checkpoint.save import model_state, optimizer_state, save_directory, save_file
from lightning_memopt.strategy.files import atomic
from tests._compare import assert_equal

pytestmark = pytest.mark.slow

IO = AtomicCheckpointIO()
OLD, NEW = 1, 2


def training(value: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer whose every number tells which save they are from."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=value, momentum=0.9)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)
            optimizer.state[param]["momentum_buffer"] = torch.full_like(param, value)
    return model, optimizer


def save(path: Path, value: int, *, whole: bool) -> None:
    model, optimizer = training(value)
    states = [optimizer_state(optimizer, model, whole=whole)]
    checkpoint = {"state_dict": model_state(model, whole=whole), "optimizer_states": states, "global_step": value}
    if whole:
        save_file(checkpoint, path, IO)
    else:
        save_directory(checkpoint, path)


def load(path: Path) -> int:
    """Load and return which save it was, after checking that all of it is from that one."""
    model, optimizer = training(0)
    rest = load_checkpoint(path, model, [optimizer], IO)
    value = rest["global_step"]
    assert rest == {"global_step": value}
    for param in model.parameters():
        assert_equal(param.data, torch.full_like(param, value))
        assert_equal(optimizer.state[param]["momentum_buffer"], torch.full_like(param, value))
    assert optimizer.param_groups[0]["lr"] == value
    return value


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --- killed ----------------------------------------------------------------------------------------------------------

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")


def forked(before: Callable[[int], Any], folder: Path, action: Callable[[], Any]) -> int:
    """Run an action in a process that calls ``before`` with the number of every operation on files."""
    child = os.fork()
    if child == 0:
        gc.disable()  # a collection would copy all memory that the processes share
        count = 0

        def tick() -> None:
            nonlocal count
            before(count)
            count += 1

        def audit(event: str, args: Any) -> None:
            if event in CHANGES or (event == "open" and str(args[0]).startswith(str(folder))):
                tick()

        fsync, exchange = os.fsync, atomic.exchange
        os.fsync = lambda descriptor: (tick(), fsync(descriptor), tick())  # type: ignore[assignment]
        atomic.exchange = lambda *args: (tick(), exchange(*args), tick())[1]  # type: ignore[assignment]
        sys.addaudithook(audit)
        try:
            action()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


def killed_at(moment: int, folder: Path, action: Callable[[], Any]) -> bool:
    """Run an action in a process that gets SIGKILL just before its n-th operation on files; False if it has fewer."""
    child = forked(lambda count: count == moment and os.kill(os.getpid(), signal.SIGKILL), folder, action)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def left_at_any_moment(folder: Path, action: Callable[[], Any]) -> list[Path]:
    """Run an action in a process, and return a copy of the folder from before each operation on files, and of its end.

    The process is stopped meanwhile: a copy holds what SIGKILL would leave, without a process for every operation.
    """
    child, copies, status = forked(lambda count: os.kill(os.getpid(), signal.SIGSTOP), folder, action), [], None
    try:
        while status is None or os.WIFSTOPPED(status):
            if status is not None:
                os.kill(child, signal.SIGCONT)
            _, status = os.waitpid(child, os.WUNTRACED)
            copies.append(folder.with_name(f"{folder.name}-{len(copies)}"))
            shutil.copytree(folder, copies[-1], symlinks=True)
    finally:
        if status is None or os.WIFSTOPPED(status):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return copies


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
@pytest.mark.parametrize("new", ["directory", "file"])
@pytest.mark.parametrize("old", ["directory", "file"])
def test_killed_at_any_moment(tmp_path, monkeypatch, old, new, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "exchange", lambda first, second: False)
    elif old != new and not atomic.exchange(*two_files(tmp_path)):
        pytest.skip("this file system cannot exchange two names")
    found, saved = [], tmp_path / "saved" / "last.ckpt"
    save(saved, OLD, whole=old == "file")
    folders = left_at_any_moment(saved.parent, lambda: save(saved, NEW, whole=new == "file"))
    for moment, folder in enumerate(folders):
        path = folder / "last.ckpt"
        if exchange:
            assert path.exists(), f"nothing under the name when killed at operation {moment}"
        found.append(load(path))
        save(path, NEW, whole=new == "file")
        assert load(path) == NEW
        assert names(folder) == ["last.ckpt"], f"leftovers after a kill at operation {moment}"
    assert found == sorted(found)
    assert {OLD, NEW} == set(found)
    assert len(found) > 8


def two_files(folder: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        (folder / name).write_text(name)
    return folder / "a", folder / "b"


def test_killed_in_the_first_save(tmp_path):
    for moment in range(1000):
        path = tmp_path / str(moment) / "last.ckpt"
        if not killed_at(moment, tmp_path, lambda path=path: save(path, NEW, whole=False)):
            break
        if path.exists():
            assert load(path) == NEW
        else:
            with pytest.raises(ValueError, match="does not point to a valid checkpoint: there is no file or directory"):
                load(path)
    assert moment > 8


def test_killed_while_a_checkpoint_is_removed(tmp_path):
    save(tmp_path / "old.ckpt", OLD, whole=False)
    for moment in range(1000):
        path = tmp_path / str(moment) / "last.ckpt"
        path.parent.mkdir()
        shutil.copytree(tmp_path / "old.ckpt", path)
        killed = killed_at(moment, tmp_path, lambda path=path: IO.remove_checkpoint(path))
        if path.exists():
            assert load(path) == OLD
        elif not killed:
            break
    assert moment > 3
    assert names(path.parent) == []


# --- failing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_a_full_disk_changes_nothing(tmp_path, monkeypatch, whole):
    path = tmp_path / "last.ckpt"
    save(path, OLD, whole=whole)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    message = r"Saving '.*last.ckpt' failed: .*No space left on device.*existing checkpoint of this name is unchanged"
    with pytest.raises(OSError, match=message):
        save(path, NEW, whole=whole)
    assert load(path) == OLD
    assert names(tmp_path) == ["last.ckpt"]


def test_what_cannot_be_pickled_changes_nothing(tmp_path):
    path = tmp_path / "last.ckpt"
    save(path, OLD, whole=True)
    with pytest.raises(OSError, match="Any existing checkpoint of this name is unchanged"):
        IO.save_checkpoint({"hook": lambda: None}, path)
    assert load(path) == OLD
    assert names(tmp_path) == ["last.ckpt"]


def test_a_rename_that_fails_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save(path, OLD, whole=False)
    rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if ".saving" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(atomic, "exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save(path, NEW, whole=False)
    assert load(path) == OLD


# --- what is under the name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_a_directory_of_something_else_is_refused(tmp_path, whole):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(IsADirectoryError, match="It holds files other than a checkpoint, which saving would delete"):
        save(tmp_path, NEW, whole=whole)
    assert names(tmp_path) == ["notes.txt"]


def test_files_beside_the_checkpoint_are_kept(tmp_path):
    path = tmp_path / "last.ckpt"
    save(path, OLD, whole=False)
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocabulary.json").write_text("{}")
    (path / "notes.txt").write_text("mine")
    save(path, NEW, whole=False)
    assert load(path) == NEW
    assert (path / "tokenizer" / "vocabulary.json").read_text() == "{}"
    assert (path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("whole", [True, False])
def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path, whole):
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    save(best, OLD, whole=False)
    last.symlink_to(best.name)
    assert load(last) == OLD
    save(last, NEW, whole=whole)
    assert (load(best), load(last)) == (OLD, NEW)
    assert not last.is_symlink()


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    save(path, OLD, whole=True)
    content = path.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 10):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"last.ckpt' is truncated or damaged: .* Use another checkpoint"):
            load(path)
    for junk in (b"", b"junk"):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="ckpt' is not a checkpoint: it is empty, or torch.save did not write"):
            load(path)


@pytest.mark.parametrize("numbers", [1_000, 10_000, 30_000])
def test_a_file_truncated_anywhere_is_refused(tmp_path, numbers):
    """Mapping a file that is too short is an OSError, and one that names no file."""
    path = tmp_path / "last.ckpt"
    IO.save_checkpoint({"state_dict": {"weight": torch.randn(numbers)}}, path)
    content = path.read_bytes()
    for part in range(1, 21):
        path.write_bytes(content[: len(content) * part // 21])
        with pytest.raises(ValueError, match=r"last.ckpt' is truncated or damaged: .* Use another checkpoint"):
            IO.load_checkpoint(path)


def test_files_of_old_torch_are_read(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint = {"state_dict": {"weight": torch.ones(2)}}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    assert_equal(IO.load_checkpoint(path), checkpoint)


def test_objects_need_trust(tmp_path):
    path = tmp_path / "last.ckpt"
    IO.save_checkpoint({"object": Path("a")}, path)
    message = r"last.ckpt' contains `pathlib.PosixPath`, .*Nothing was loaded.* set the environment variable"
    with pytest.raises(pickle.UnpicklingError, match=message):
        IO.load_checkpoint(path)
    assert IO.load_checkpoint(path, weights_only=False) == {"object": Path("a")}


def test_urls_are_left_to_lightning(tmp_path):
    path = f"file://{tmp_path}/last.ckpt"
    IO.save_checkpoint({"a": 1}, path)
    assert IO.load_checkpoint(path) == {"a": 1}
    IO.remove_checkpoint(path)
    assert names(tmp_path) == []


def test_storage_options_are_refused(tmp_path):
    with pytest.raises(TypeError, match="with `storage_options` arg is not supported"):
        IO.save_checkpoint({}, tmp_path / "last.ckpt", storage_options={})


def test_names_are_exchanged_where_the_system_can(tmp_path):
    first, second = two_files(tmp_path)
    if not atomic.exchange(first, second):
        pytest.skip("this file system cannot exchange two names")
    assert (first.read_text(), second.read_text()) == ("b", "a")
    with pytest.raises(FileNotFoundError):
        atomic.exchange(first, tmp_path / "nothing")
