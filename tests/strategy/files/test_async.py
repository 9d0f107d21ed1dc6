"""Saves in the background: a run that is killed at any moment, or whose save fails, keeps a complete checkpoint."""

from __future__ import annotations

import atexit
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning.pytorch")

from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from lightning_memopt import MemOptFabricStrategy
from lightning_memopt.strategy.checkpoint.io import AtomicCheckpointIO, finish, remove_in_order
from lightning_memopt.strategy.checkpoint.load import load_checkpoint
from lightning_memopt.strategy.checkpoint.save import model_state, optimizer_state, save_file
from tests.strategy.files.test_atomic import NEW, OLD, left_at_any_moment, load, names, training

pytestmark = pytest.mark.slow


def save(path: Path, value: int, checkpoint_io: Any) -> None:
    model, optimizer = training(value)
    states = [optimizer_state(optimizer, model, whole=True)]
    content = {"state_dict": model_state(model, whole=True), "optimizer_states": states, "global_step": value}
    save_file(content, path, checkpoint_io)


def test_killed_at_any_moment_of_a_save_in_the_background(tmp_path):
    path = tmp_path / "saved" / "last.ckpt"
    save(path, OLD, AtomicCheckpointIO())

    def replace() -> None:
        background = AsyncCheckpointIO(AtomicCheckpointIO())
        save(path, NEW, background)
        background.teardown()

    found = [load(folder / "last.ckpt") for folder in left_at_any_moment(path.parent, replace)]
    assert found == sorted(found)
    assert set(found) == {OLD, NEW}


def test_the_old_checkpoint_is_removed_when_the_new_one_is_complete(tmp_path):
    """As ModelCheckpoint does it, which asks for both one after the other."""
    folder = tmp_path / "saved"
    save(folder / "old.ckpt", OLD, AtomicCheckpointIO())

    def replace() -> None:
        background = AsyncCheckpointIO(Slow())
        save(folder / "new.ckpt", NEW, background)
        remove_in_order(background, folder / "old.ckpt")
        background.teardown()

    for copy in left_at_any_moment(folder, replace):
        complete = [name for name in names(copy) if not name.startswith(".")]
        assert {load(copy / name) for name in complete} in ({OLD}, {OLD, NEW}, {NEW})
    assert complete == ["new.ckpt"]


class Slow(AtomicCheckpointIO):
    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        time.sleep(0.2)
        super().save_checkpoint(checkpoint, path, storage_options)


def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


class Own(_WrappingCheckpointIO):
    """Somebody's wrapper around Lightning's."""


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_save_that_fails_keeps_the_old_checkpoint_and_is_told(tmp_path, monkeypatch, wrapped):
    save(tmp_path / "old.ckpt", OLD, AtomicCheckpointIO())
    background = AsyncCheckpointIO(Slow())
    outer = Own(background) if wrapped else background

    monkeypatch.setattr(os, "fsync", full)
    save(tmp_path / "new.ckpt", NEW, outer)
    remove_in_order(outer, tmp_path / "old.ckpt")
    with pytest.raises(OSError, match="Saving '.*new.ckpt' failed: OSError: .*No space left on device"):
        finish(outer)
    assert names(tmp_path) == ["old.ckpt"]
    assert load(tmp_path / "old.ckpt") == OLD
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path / "new.ckpt", NEW, outer)


def test_a_removal_that_fails_is_told(tmp_path, monkeypatch):
    background = AsyncCheckpointIO(AtomicCheckpointIO())
    save(tmp_path / "new.ckpt", NEW, background)

    def fail(path: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(background, "remove_checkpoint", fail)
    remove_in_order(background, tmp_path / "old.ckpt")
    with pytest.raises(PermissionError, match="Permission denied"):
        background.teardown()


def test_a_load_waits_for_the_save(tmp_path):
    outer = Own(AsyncCheckpointIO(Slow()))
    for value in (OLD, NEW):
        save(tmp_path / "last.ckpt", value, outer)
        model, optimizer = training(0)
        assert load_checkpoint(tmp_path / "last.ckpt", model, [optimizer], outer)["global_step"] == value
    finish(outer)


def test_a_load_after_a_save_that_failed_raises_its_error(tmp_path, monkeypatch):
    """It would load what the save should have replaced."""
    save(tmp_path / "last.ckpt", OLD, AtomicCheckpointIO())
    background = AsyncCheckpointIO(Slow())
    monkeypatch.setattr(os, "fsync", full)
    save(tmp_path / "last.ckpt", NEW, background)
    model, optimizer = training(0)
    with pytest.raises(OSError, match="Saving '.*last.ckpt' failed: .*No space left on device"):
        load_checkpoint(tmp_path / "last.ckpt", model, [optimizer], background)


def test_a_process_with_fabric_waits_at_its_end_and_shows_an_error(tmp_path, monkeypatch):
    at_end: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda function, *args: at_end.append(partial(function, *args)))
    strategy = MemOptFabricStrategy()
    strategy.checkpoint_io = AtomicCheckpointIO()
    assert not at_end
    strategy.checkpoint_io = Own(AsyncCheckpointIO(Slow()))
    save(tmp_path / "last.ckpt", NEW, strategy.checkpoint_io)
    (finishing,) = at_end
    finishing()
    assert load(tmp_path / "last.ckpt") == NEW
    save(tmp_path / "missing" / "last.ckpt", NEW, strategy.checkpoint_io)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="Saving '.*last.ckpt' failed"):
        finishing()


def test_without_a_save_in_the_background_nothing_waits(tmp_path):
    for checkpoint_io in (AtomicCheckpointIO(), AsyncCheckpointIO(AtomicCheckpointIO())):
        save(tmp_path / "old.ckpt", OLD, AtomicCheckpointIO())
        remove_in_order(checkpoint_io, tmp_path / "old.ckpt")
        assert names(tmp_path) == []
