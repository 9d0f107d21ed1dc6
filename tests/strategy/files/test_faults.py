"""What is done to checkpoints by failing disks, other processes and attackers. Counts: ``benchmarks/faults.py``."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

import lightning_memopt as lm
from lightning_memopt.strategy.checkpoint.io import AtomicCheckpointIO
from lightning_memopt.strategy.checkpoint.load import load_checkpoint
from lightning_memopt.strategy.files import atomic, processes
from lightning_memopt.strategy.files.directory import CHECKSUMS
from lightning_memopt.strategy.files.metadata import parse_metadata
from tests.strategy.files import _faults
from tests.strategy.files._faults import (
    GOOD,
    PLACES,
    WHOLE_PLACES,
    full_disk,
    in_index,
    in_new_process,
    load,
    reading_beside_a_writer,
    same,
    save,
    sums_renewed,
    training,
    two_writers,
)

pytestmark = pytest.mark.slow

FORMATS = pytest.mark.parametrize("whole", [False, True], ids=["directory", "file"])


def check(found, *expected):
    assert set(found) <= set(GOOD), found
    assert set(expected) <= set(found), found


# --- damage ----------------------------------------------------------------------------------------------------------


@FORMATS
def test_flipped_bits_are_refused_by_the_name_of_the_file(tmp_path, whole):
    """But for those that mean nothing, in the padding between tensors."""
    check(_faults.damage(tmp_path, random.Random(0), 60, whole=whole, how=_faults.flipped), "refused by name")


@FORMATS
@pytest.mark.parametrize("how", [_faults.truncated, _faults.scribbled])
def test_truncated_and_overwritten_files_are_refused_by_name(tmp_path, whole, how):
    found = _faults.damage(tmp_path, random.Random(1), 15, whole=whole, how=how)
    assert found == {"refused by name": 15}


def test_every_bit_of_a_small_file_is_checked(tmp_path):
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"a": torch.arange(3.0)}, path)
    good = path.read_bytes()
    for position in range(0, len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :])
        loaded = message = None
        try:
            loaded = io.load_checkpoint(path)
        except (ValueError, pickle.UnpicklingError) as error:
            message = str(error)
        assert same(loaded, {"a": torch.arange(3.0)}) if message is None else str(path) in message, position


def test_without_verification_nothing_is_read_twice(tmp_path):
    """A flipped bit of a weight is then loaded; that is what the option says."""
    path = tmp_path / "last.ckpt"
    expected = save(path, 1, whole=False)
    file = path / "__0_0.distcp"
    data, weight = bytearray(file.read_bytes()), expected[0]["first.weight"].numpy().tobytes()
    data[data.index(weight)] ^= 1
    file.write_bytes(data)
    model, optimizer = training(0)
    with pytest.raises(ValueError, match=r"is damaged: '__0_0.distcp' does not match its checksum in 'meta.pt'"):
        load_checkpoint(path, model, [optimizer], _faults.IO)
    load_checkpoint(path, model, [optimizer], _faults.IO, verify=False)
    assert not same(model.state_dict(), expected[0])


def test_checksums_are_written_although_they_are_switched_off(tmp_path):
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    torch.serialization.set_crc32_options(False)
    try:
        io.save_checkpoint({"a": torch.ones(3)}, path)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(io.load_checkpoint(path), {"a": torch.ones(3)})


def test_a_directory_without_checksums_is_loaded_with_a_warning(tmp_path):
    path = tmp_path / "last.ckpt"
    save(path, 1, whole=False)
    sums_renewed(path, drop=True)
    model, optimizer = training(0)
    with pytest.warns(UserWarning, match="has no checksums, because another tool or an earlier version saved it"):
        load_checkpoint(path, model, [optimizer], _faults.IO)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, bad):
    path = tmp_path / "last.ckpt"
    model, optimizer = training(1)
    with torch.no_grad():
        model.last.weight[0, 0] = bad
        model.norm.running_var[0] = bad  # masks and statistics may be anything
    states = [_faults.optimizer_state(optimizer, model, whole=False)]
    _faults.save_directory({"state_dict": _faults.model_state(model, whole=False), "optimizer_states": states}, path)
    with pytest.raises(ValueError, match=r"saved weight 'last.weight' in '.*last.ckpt' "):
        load(path)


@FORMATS
def test_weights_alone_are_read_without_a_trainer(tmp_path, whole):
    path = tmp_path / "last.ckpt"
    expected = save(path, 1, whole=whole)[0]
    weights = lm.load_weights(path)
    assert same({name: weights[name] for name in expected}, dict(expected))
    assert len(weights) == len(expected)
    with pytest.raises(ValueError, match="there is no file or directory of that name .working directory"):
        lm.load_weights(tmp_path / "other.ckpt")


# --- hostile files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [False, True], ids=["sums-renewed", "sums-dropped"])
@pytest.mark.parametrize("place", [*PLACES, *WHOLE_PLACES])
def test_no_place_of_a_checkpoint_can_run_code(tmp_path, place, drop):
    message = _faults.hostile(tmp_path, place, drop=drop)
    assert "last.ckpt" in message
    assert "contains `os.system`" in message
    assert "Nothing was loaded" in message


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_plain_pickle_in_the_place_of_a_file_runs_no_code(tmp_path, protocol):
    path = tmp_path / "last.ckpt"
    bad = _faults.Hostile(tmp_path / "was-run")
    path.write_bytes(pickle.dumps(bad, protocol=protocol))
    with pytest.raises((ValueError, pickle.UnpicklingError), match="last.ckpt"):
        load(path)
    torch.save({"state_dict": bad}, path, pickle_protocol=max(protocol, 2))
    with pytest.raises(pickle.UnpicklingError, match="contains `os.system`"):
        load(path)
    assert not (tmp_path / "was-run").exists()


def outside(index, name):
    for info in index.storage_data.values():
        info.relative_path = name


@pytest.mark.parametrize("name", ["../other.ckpt/__0_0.distcp", "/etc/passwd", "..", "a\\b", "", "sub/file"])
def test_paths_stay_inside_the_directory(tmp_path, name):
    path = tmp_path / "last.ckpt"
    save(path, 1, whole=False)
    save(tmp_path / "other.ckpt", 2, whole=False)
    in_index(outside)(path, name)
    sums_renewed(path, drop=True)
    with pytest.raises(ValueError, match=r"\.metadata' .* names the file .*, which is not in the directory"):
        load(path)


def shortened(index, _):
    index.state_dict_metadata["state_dict.first.weight"].chunks.pop()


def laid_over_each_other(index, _):
    """The sum of their sizes is right, and half of the tensor would keep what the memory held before."""
    entry = index.state_dict_metadata["state_dict.first.weight"]
    half = dataclasses.replace(entry.chunks[0], sizes=torch.Size([8, 8]))
    entry.chunks = [half, half]


def stretched(index, _):
    entry = index.state_dict_metadata["state_dict.first.weight"]
    entry.size = torch.Size([1 << 40, 8])


def retyped(index, _):
    index.state_dict_metadata["state_dict.first.weight"].properties.dtype = torch.float16


def unplaced(index, _):
    index.storage_data = {key: info for key, info in index.storage_data.items() if key.fqn != "state_dict.first.weight"}


def far_away(index, _):
    index.planner_data["more"] = ("optimizer_0", "param_groups", 1 << 40, "lr")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shortened, "do not add up to it"),
        (laid_over_each_other, "overlap"),
        (stretched, "do not add up to it"),
        (retyped, "'state_dict.first.weight' is torch.float32"),
        (unplaced, "does not say which file holds 'state_dict.first.weight'"),
        (far_away, "it has the place"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, change, message):
    """A tensor with a hole would keep what the memory held before."""
    path = tmp_path / "last.ckpt"
    save(path, 1, whole=False)
    in_index(change)(path, None)
    sums_renewed(path, drop=False)
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": "b"}, protocol=2), "unexpected BINPUT at byte 3"),
        (b"\x80\x04]r\xff\xff\xff\x7f.", "unexpected LONG_BINPUT at byte 3"),
        (b"\x80\x04X\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
        (b"\x80\x04}", "pickle exhausted before seeing STOP"),
    ],
)
def test_an_index_has_no_other_opcodes_than_valid_ones(content, message):
    """A memo index or a length could allocate any amount of memory."""
    with pytest.raises(ValueError, match=message):
        parse_metadata(content)


def test_a_table_of_checksums_names_no_files_elsewhere(tmp_path):
    path = tmp_path / "last.ckpt"
    save(path, 1, whole=False)
    _faults.rewritten(path / "meta.pt", lambda rest: {**rest, CHECKSUMS: {"../secret": (1, 1)}})
    with pytest.raises(ValueError, match=r"meta.pt' is truncated or damaged: .*the table of checksums is damaged"):
        load(path)


def test_a_good_index_is_read_as_torch_reads_it(tmp_path):
    path = tmp_path / "last.ckpt"
    save(path, 1, whole=False)
    theirs = FileSystemReader(path).read_metadata()
    ours = parse_metadata((path / ".metadata").read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data == theirs.storage_data


# --- other processes -------------------------------------------------------------------------------------------------


@FORMATS
def test_a_reader_beside_a_writer_reads_one_save(tmp_path, whole):
    check(in_new_process(reading_beside_a_writer, tmp_path, 12, whole=whole), "loaded, the content is right")


@FORMATS
def test_two_writers_leave_one_whole_save(tmp_path, whole):
    check(in_new_process(two_writers, tmp_path, random.Random(2), 2, whole=whole), "loaded, the content is right")


@FORMATS
def test_two_writers_where_names_cannot_be_exchanged(tmp_path, whole):
    found = in_new_process(two_writers, tmp_path, random.Random(3), 1, whole=whole, exchange=False)
    check(found, "loaded, the content is right")


@FORMATS
def test_a_full_disk_is_the_cause_that_is_named(tmp_path, whole):
    """At whatever byte: torch's writer raises an error of its own for some."""
    check(in_new_process(full_disk, tmp_path, random.Random(4), 8, whole=whole), "refused by name")


def left(path: Path, machine: str, process: int, age: float) -> Path:
    name = path.with_name(f".{path.name}.saving-{machine}-{process}-00")
    name.write_text("half")
    os.utime(name, (time.time() - age,) * 2)
    return name


def test_only_what_dead_writers_left_is_removed(tmp_path):
    path, here, dead = tmp_path / "last.ckpt", processes.machine(), 2**22 + 1
    old = atomic.MAX_AGE + 60
    gone = [
        left(path, here, dead, 0),
        left(path, here, os.getpid(), 0),
        left(path, "0123abcd", 1, old),
        path.with_name(".last.ckpt.saving"),
    ]
    gone[-1].write_text("of an earlier version")
    os.utime(gone[-1], (time.time() - old,) * 2)
    kept = [left(path, here, os.getppid(), 0), left(path, "0123abcd", 2, 60), tmp_path / ".other.ckpt.saving"]
    kept[-1].write_text("")
    save(path, 1, whole=True)
    assert [entry.exists() for entry in gone] == [False] * 4
    assert [entry.exists() for entry in kept] == [True] * 3


def test_a_reader_between_two_renames_finds_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    expected = save(path, 1, whole=False)
    path.rename(path.with_name(f".last.ckpt.previous-{processes.machine()}-1-00"))
    assert same(load(path), expected)
    assert not path.exists()  # its writer may be about to put the new one there
    expected = save(path, 2, whole=False)
    assert same(load(path), expected)


# --- the directory ---------------------------------------------------------------------------------------------------


def test_files_of_ones_own_are_kept_whatever_their_names(tmp_path):
    path = tmp_path / "last.ckpt"
    save(path, 1, whole=False)
    for name in ("my.metadata", "notes.distcp", "x__0_0.distcp", "tokenizer.json"):
        (path / name).write_text(name)
    expected = save(path, 2, whole=False)
    assert same(load(path), expected)
    for name in ("my.metadata", "notes.distcp", "x__0_0.distcp", "tokenizer.json"):
        assert (path / name).read_text() == name


def test_what_is_no_file_is_not_waited_for(tmp_path):
    path = tmp_path / "last.ckpt"
    save(path, 1, whole=False)
    (path / "__0_0.distcp").unlink()
    os.mkfifo(path / "__0_0.distcp")
    with pytest.raises(OSError, match="this is not a file"):
        load(path)


def test_a_link_to_a_directory_is_followed(tmp_path):
    expected = save(tmp_path / "best.ckpt", 1, whole=False)
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    assert same(load(tmp_path / "last.ckpt"), expected)
    shutil.rmtree(tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match="there is no file or directory of that name .working directory"):
        load(tmp_path / "last.ckpt")


def test_names_tell_machines_apart(monkeypatch):
    here = processes.machine()
    monkeypatch.setattr("platform.node", lambda: socket.gethostname() + "-2")
    processes.machine.cache_clear()
    try:
        assert processes.machine() != here
    finally:
        processes.machine.cache_clear()
