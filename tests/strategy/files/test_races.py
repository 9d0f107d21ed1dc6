"""What another process does between two looks at a name, where the file system cannot exchange two names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lightning_memopt.strategy.files import atomic
from lightning_memopt.strategy.files.directory import check_replaceable


@pytest.fixture
def path(tmp_path) -> Path:
    """A checkpoint that a save has moved away, and has not replaced yet."""
    previous = atomic._own_name(tmp_path / "last.ckpt", "previous")
    previous.mkdir()
    (previous / "meta.pt").write_text("old")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_the_other_save_arrives_before_the_old_one_is_put_back(path, monkeypatch, kind):
    rename = os.rename

    def late(source: Any, target: Any) -> None:
        if kind == "file":
            path.write_text("new")
        else:
            path.mkdir()
            (path / "meta.pt").write_text("new")
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    new = atomic.begin(path)
    atomic.abandon(new)
    assert (path if kind == "file" else path / "meta.pt").read_text() == "new"


def test_an_old_save_that_cannot_be_put_back_is_an_error(path, monkeypatch):
    def fail(source: Any, target: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(PermissionError, match="Permission denied"):
        atomic.begin(path)


def test_the_other_save_moves_the_old_one_away_while_it_is_looked_at(tmp_path, monkeypatch):
    path, is_dir = tmp_path / "last.ckpt", Path.is_dir
    path.mkdir()
    (path / "meta.pt").write_text("old")

    def moved(place: Path) -> bool:
        found = is_dir(place)
        if place == path:
            path.rename(tmp_path / "away")
        return found

    monkeypatch.setattr(Path, "is_dir", moved)
    check_replaceable(path)


def test_a_directory_is_listed_once(tmp_path, monkeypatch):
    """Two looks could see an empty name, and then the files beside a checkpoint."""
    path, scandir, looks = tmp_path / "last.ckpt", os.scandir, []
    path.mkdir()
    (path / "notes.txt").write_text("mine")

    def counted(place: Any) -> Any:
        looks.append(place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", counted)
    with pytest.raises(IsADirectoryError, match="It holds files other than a checkpoint, which saving would delete"):
        check_replaceable(path)
    (path / "meta.pt").write_text("ours")
    check_replaceable(path)
    assert looks == [path, path]
