"""Checkpoints on file systems that cannot rename: a reader sees the old or the new save, whatever happens."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import lightning_memopt as lm
from lightning_memopt.strategy.checkpoint.io import AtomicCheckpointIO
from lightning_memopt.strategy.checkpoint.load import load_checkpoint
from lightning_memopt.strategy.checkpoint.save import save_directory
from lightning_memopt.strategy.export.export_command import main as export
from lightning_memopt.strategy.export.inspection import inspect_checkpoint
from lightning_memopt.strategy.files import remote, same_save
from lightning_memopt.strategy.files.directory import CHECKSUMS, NOTE, SAVE
from lightning_memopt.strategy.files.remote import PARTS
from tests.strategy.files import _faults
from tests.strategy.files._bucket import Bucket
from tests.strategy.files._faults import Hostile, contended, forked, in_new_process, load, same, save

pytestmark = pytest.mark.slow

FORMATS = pytest.mark.parametrize("whole", [False, True], ids=["directory", "file"])
URL = "bucket://runs/last.ckpt"


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "bucket"
    root.mkdir()
    monkeypatch.setattr(Bucket, "root", root)
    return root


def keys() -> list[str]:
    return sorted(key.removeprefix("runs/") for key in Bucket()._keys())


def saves() -> set[str]:
    return {part for key in keys() for part in key.split("/") if SAVE.fullmatch(part)}


@FORMATS
@pytest.mark.parametrize("url", [URL, "memory://runs/last.ckpt"])
def test_what_was_saved_is_loaded(bucket, whole, url):
    for seed in (1, 2):
        expected = save(url, seed, whole=whole)
        assert same(load(url), expected)
    assert same(lm.load_weights(url), dict(expected[0]))
    found = inspect_checkpoint(url)
    assert (found.step, found.checksums, found.format) == (2, "verified", "file" if whole else "directory")
    AtomicCheckpointIO().remove_checkpoint(url)
    with pytest.raises(ValueError, match="does not point to a valid checkpoint: there is no file or directory"):
        load(url)
    assert keys() == []


def test_the_folder(bucket, tmp_path):
    """The current save alone, which torch reads, too; copied to a disk or from one, it is the same checkpoint."""
    save(URL, 1, whole=False)
    expected = save(URL, 2, whole=False)
    (name,) = saves()
    assert keys() == [
        f"last.ckpt/{NOTE}",
        "last.ckpt/meta.pt",
        f"last.ckpt/{name}/.metadata",
        f"last.ckpt/{name}/__0_0.distcp",
    ]
    Bucket().get(URL, str(tmp_path / "copy"), recursive=True)
    assert same(load(tmp_path / "copy"), expected)
    expected = save(tmp_path / "copy", 5, whole=False)
    assert same(load(tmp_path / "copy"), expected)
    assert not any(map(SAVE.fullmatch, os.listdir(tmp_path / "copy"))), "the save that was replaced"
    save(tmp_path / "local", 3, whole=False)
    Bucket().put(str(tmp_path / "local") + "/", "bucket://runs/copied", recursive=True)
    assert load("bucket://runs/copied")[2]["global_step"] == 3
    expected = save("bucket://runs/copied", 4, whole=False)
    assert same(load("bucket://runs/copied"), expected)
    assert sum(key.startswith("copied/") for key in keys()) == 4


def test_files_of_a_url_with_file_are_local(tmp_path):
    url = f"file://{tmp_path}/last.ckpt"
    expected = save(url, 1, whole=False)
    assert sorted(os.listdir(tmp_path / "last.ckpt")) == [
        ".metadata",
        "HOW_TO_READ_THIS.txt",
        "__0_0.distcp",
        "meta.pt",
    ]
    assert same(load(url), expected)


class Printing:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


def test_a_file_from_the_web_is_read_like_a_local_one(tmp_path, monkeypatch, capsys):
    """Lightning by itself unpickles everything that it downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "web").mkdir()
    torch.save({"global_step": 3}, tmp_path / "web" / "good.ckpt")
    torch.save({"global_step": Printing()}, tmp_path / "web" / "bad.ckpt")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            assert AtomicCheckpointIO().load_checkpoint(f"{url}/good.ckpt") == {"global_step": 3}
            with pytest.raises(pickle.UnpicklingError, match="global: GLOBAL print"):
                AtomicCheckpointIO().load_checkpoint(f"{url}/bad.ckpt")
            assert "unpickled" not in capsys.readouterr().out
            AtomicCheckpointIO().load_checkpoint(f"{url}/bad.ckpt", weights_only=False)
            assert "unpickled" in capsys.readouterr().out
        finally:
            server.shutdown()


def test_export_from_a_url(bucket, tmp_path):
    expected = save(URL, 1, whole=False)
    assert export([URL, str(tmp_path / "weights.pt")]) == 0
    assert same(torch.load(tmp_path / "weights.pt", weights_only=True), dict(expected[0]))


# --- killed, failing, at the same time -------------------------------------------------------------------------------


def killed_before(operation: int, action) -> bool:
    """Run an action in a process that gets SIGKILL just before it changes something for the n-th time."""
    count = 0

    def before(name: str) -> None:
        nonlocal count
        if count == operation:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def run() -> None:
        Bucket.before = staticmethod(before)
        action()

    _, status = os.waitpid(forked(run), 0)
    return os.WIFSIGNALED(status)


def test_a_save_that_is_killed_at_any_moment_leaves_the_old_or_the_new_one(bucket, tmp_path):
    expected = {seed: save(URL, seed, whole=False) for seed in (2, 1)}
    shutil.copytree(bucket, tmp_path / "old")
    found = []
    for operation in range(100):
        shutil.rmtree(bucket)
        shutil.copytree(tmp_path / "old", bucket)
        killed = killed_before(operation, lambda: save(URL, 2, whole=False))
        loaded = load(URL)
        step = loaded[2]["global_step"]
        assert same(loaded, expected[step])
        found.append(step)
        save(URL, 1, whole=False)
        assert len(saves()) == 1, "the next save removes what is left"
        if not killed:
            break
    assert found == sorted(found)
    assert set(found) == {1, 2}
    assert len(found) > 6


def test_a_checkpoint_that_is_removed_is_whole_or_none(bucket, tmp_path):
    expected = save(URL, 1, whole=False)
    shutil.copytree(bucket, tmp_path / "old")
    for operation in range(100):
        shutil.rmtree(bucket)
        shutil.copytree(tmp_path / "old", bucket)
        killed = killed_before(operation, lambda: AtomicCheckpointIO().remove_checkpoint(URL))
        if operation == 0:
            assert same(load(URL), expected)
        else:
            with pytest.raises(ValueError, match="does not point to a valid checkpoint"):
                load(URL)
        if not killed:
            break
    assert operation > 3
    assert keys() == []


@FORMATS
def test_a_write_that_fails_changes_nothing(bucket, monkeypatch, whole):
    expected = save(URL, 1, whole=whole)
    before = keys()

    def fail(operation: str) -> None:
        if operation == "put":
            raise OSError(28, "the quota is used up")

    monkeypatch.setattr(Bucket, "before", staticmethod(fail))
    with pytest.raises(OSError, match="the quota is used up"):
        save(URL, 2, whole=whole)
    monkeypatch.undo()
    Bucket.root = bucket
    assert same(load(URL), expected)
    assert keys() == before


def test_a_save_with_objects_that_only_its_user_trusts_is_kept_until_the_next_is_complete(bucket, monkeypatch):
    """Which save is current is read from `meta.pt` without unpickling it."""
    weights = {"state_dict": {"weight": torch.ones(2)}, "hyper_parameters": Hostile(bucket / "was-run")}
    save_directory(weights, URL)
    (old,) = saves()

    def complete(operation: str) -> None:
        if operation == "put":
            assert old in saves()

    monkeypatch.setattr(Bucket, "before", staticmethod(complete))
    save_directory(weights, URL)
    assert len(saves() - {old}) == len(saves()) == 1
    assert not (bucket / "was-run").exists()


def test_nothing_is_removed_while_it_is_not_known_what_is_current(bucket):
    save(URL, 1, whole=False)
    (old,) = saves()
    Bucket().pipe_file(f"{URL}/meta.pt", b"damaged")
    new = remote.begin(URL)
    assert saves() == {old}
    remote.abandon(new)
    save(URL, 2, whole=False)
    save(URL, 3, whole=False)
    assert len(saves()) == 1


def test_an_error_after_the_store_has_taken_a_save_leaves_it(bucket, monkeypatch):
    """As of a request that times out: nobody knows whether it has arrived."""
    save(URL, 1, whole=False)
    put = Bucket.pipe_file

    def unknown(self: Bucket, path: str, value: bytes, **options: Any) -> None:
        put(self, path, value, **options)
        if path.endswith("meta.pt"):
            raise TimeoutError("no answer")

    monkeypatch.setattr(Bucket, "pipe_file", unknown)
    with pytest.raises(OSError, match="no answer"):
        save(URL, 2, whole=False)
    monkeypatch.setattr(Bucket, "pipe_file", put)
    assert load(URL)[2]["global_step"] == 2
    save(URL, 3, whole=False)
    assert len(saves()) == 1


def test_a_store_that_does_not_answer_is_an_error_of_opening(bucket, monkeypatch):
    """All ranks get to that, and raise the error together. Before it, one alone would leave the others waiting."""
    save(URL, 1, whole=False)
    monkeypatch.setattr(Bucket, "info", lambda *args, **options: 1 / 0)
    assert same_save._version(URL) is None


@FORMATS
def test_a_reader_beside_a_writer(bucket, whole):
    """It gets one of the saves, or an error that says that it came too late."""
    expected = {seed: save(URL, seed, whole=whole) for seed in (1, 2)}
    right, late = 0, []
    with _faults.saving_again_and_again(URL, (1, 2), whole=whole):
        for _ in range(8):
            try:
                loaded = load(URL)
            except ValueError as error:
                late.append(str(error))
            else:
                assert same(loaded, expected[loaded[2]["global_step"]])
                right += 1
    assert right
    assert all("replaced" in message for message in late), late


def contended_bucket(root: Path, rng: random.Random, count: int) -> Counter[str]:
    Bucket.root = root
    return contended(URL, rng, count, whole=False)


def test_two_writers_and_one_is_killed(bucket):
    assert in_new_process(contended_bucket, bucket, random.Random(0), 4) == {"loaded, the content is right": 4}
    save(URL, 1, whole=False)
    assert len(saves()) == 1


def test_saves_of_living_processes_and_of_other_machines_stay(bucket, monkeypatch):
    now = int(time.time())
    here, other = remote.machine(), "0" * 8
    kept = [f"save-{here}-{os.getppid()}-{now}-00", f"save-{other}-1-{now}-00"]
    gone = [f"save-{here}-{2**22 + 1}-{now}-00", f"save-{other}-1-{now - 2 * 24 * 3600}-00"]
    for name in (*kept, *gone):
        Bucket().pipe_file(f"{URL}/{name}/__0_0.distcp", b"x")
    save(URL, 1, whole=False)
    assert saves() > set(kept)
    assert not saves() & set(gone)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_something_else_under_the_name(bucket):
    Bucket().pipe_file(f"{URL}/notes.txt", b"mine")
    with pytest.raises(IsADirectoryError, match=r"is a directory: 'bucket.*ckpt'. It holds files other than"):
        save(URL, 1, whole=False)
    AtomicCheckpointIO().save_checkpoint({"a": 1}, "bucket://runs/file.ckpt")
    with pytest.raises(FileExistsError, match="is a file, and a checkpoint directory cannot replace it: remove it, or"):
        save("bucket://runs/file.ckpt", 1, whole=False)


def test_what_is_missing_or_damaged_is_named(bucket, tmp_path):
    save(URL, 1, whole=False)
    (name,) = saves()
    path = f"{URL}/{name}/__0_0.distcp"
    good = Bucket().cat_file(path)
    Bucket().pipe_file(path, good[:-9] + b"123456789")
    with pytest.raises(ValueError, match=r"'bucket://runs/last.ckpt' is damaged: '__0_0.distcp' does not match"):
        load(URL)
    Bucket().rm_file(path)
    with pytest.raises(ValueError, match="is not complete: '__0_0.distcp' is missing"):
        load(URL)
    rest = torch.load(fsspec.open(f"{URL}/meta.pt").open(), weights_only=True)
    assert rest[PARTS] == name
    assert set(rest[CHECKSUMS]) == {".metadata", "__0_0.distcp"}
    for bad in ("../other", 3):
        with fsspec.open(f"{URL}/meta.pt", "wb") as stream:
            torch.save({**rest, PARTS: bad}, stream)
        with pytest.raises(ValueError, match=r"meta.pt' is damaged: it names the folder "):
            load(URL)
    with fsspec.open(f"{URL}/meta.pt", "wb") as stream:
        torch.save({**rest, PARTS: name + "0"}, stream)
    with pytest.raises(ValueError, match=r"does not point to a valid checkpoint: '.metadata' is missing"):
        load(URL)
    Bucket().get(f"{URL}/meta.pt", str(tmp_path / "copy") + "/")
    with pytest.raises(ValueError, match=r"copy' is not complete: its folder 'save-.*0' is missing"):
        load(tmp_path / "copy")


def test_a_save_that_disappears_while_it_is_read(bucket, monkeypatch):
    save(URL, 1, whole=False)
    model, optimizer = _faults.training(0)
    before = _faults.content(model, optimizer, {})

    def gone(stream):
        raise FileNotFoundError("__0_0.distcp")

    monkeypatch.setattr("lightning_memopt.strategy.files.opened_directory.checksum", gone)
    with pytest.raises(ValueError, match="was replaced or removed while it was read .* load it again"):
        load_checkpoint(URL, model, [optimizer], _faults.IO)
    assert same(_faults.content(model, optimizer, {}), before)
