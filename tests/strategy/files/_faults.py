"""Faults done to checkpoints, and what became of loading them: shared by the tests and by ``benchmarks/faults.py``.

Every function does one kind of fault a number of times and counts outcomes. Those of :data:`GOOD` are what is promised.
"""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

import tests._ranks  # noqa: F401  says what the server of new processes imports
from lightning_memopt import AdaPMLean, MemOpt
from lightning_memopt.strategy.checkpoint.io import AtomicCheckpointIO
from lightning_memopt.strategy.checkpoint.load import load_checkpoint
from lightning_memopt.strategy.checkpoint.save import model_state, optimizer_state, save_directory, save_file
from lightning_memopt.strategy.files import atomic
from lightning_memopt.strategy.files.checksums import checksum
from lightning_memopt.strategy.files.directory import CHECKSUMS, NOTE

GOOD = ("refused by name", "loaded, the content is right")
IO = AtomicCheckpointIO()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)


def training(seed: int) -> tuple[nn.Module, MemOpt]:
    """A model and an optimizer after a step, different for every seed."""
    torch.manual_seed(seed)
    model = Net()
    model.norm.running_mean.fill_(seed)
    optimizer = AdaPMLean(model.named_parameters(), lr=1e-3 * (seed + 1), rank=2)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    return model, optimizer


def content(model: nn.Module, optimizer: MemOpt, rest: dict[str, Any]) -> Any:
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), rest))


def save(path: Path, seed: int, *, whole: bool) -> Any:
    """Save what :func:`training` makes, and return all that a load must bring back."""
    model, optimizer = training(seed)
    rest = {"global_step": seed, "callbacks": {"numbers": torch.full((64,), float(seed))}}
    states = [optimizer_state(optimizer, model, whole=whole)]
    checkpoint = {"state_dict": model_state(model, whole=whole), "optimizer_states": states, **rest}
    if whole:
        save_file(checkpoint, path, IO)
    else:
        save_directory(checkpoint, path)
    return content(model, optimizer, rest)


def load(path: Path) -> Any:
    """Load and return all that was loaded.

    Raises:
        AssertionError: If loading failed and has changed something.
    """
    model, optimizer = training(99)
    before = content(model, optimizer, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rest = load_checkpoint(path, model, [optimizer], IO)
        except Exception:
            assert same(content(model, optimizer, {}), before), "an error, but something had changed"
            raise
    return content(model, optimizer, rest)


def same(actual: Any, expected: Any) -> bool:
    """Whether all of two trees is the same, dtypes too."""
    if isinstance(expected, dict):
        return (
            isinstance(actual, dict)
            and list(actual) == list(expected)
            and same(list(actual.values()), list(expected.values()))
        )
    if isinstance(expected, list | tuple):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    if isinstance(expected, torch.Tensor):
        return actual.dtype == expected.dtype and torch.equal(actual, expected)
    return type(actual) is type(expected) and actual == expected


def outcome(path: Path, name: str, expected: Any) -> str:
    """Load a checkpoint of which the file ``name`` was damaged."""
    try:
        found = load(path)
    except AssertionError:
        return "AN ERROR, BUT SOMETHING HAD CHANGED"
    except (ValueError, pickle.UnpicklingError, KeyError, RuntimeError) as error:
        if str(path) in str(error) and name in str(error):
            return "refused by name"
        return f"AN ERROR THAT DOES NOT NAME THE FILE: {type(error).__name__}: {error}"
    return "loaded, the content is right" if same(found, expected) else "LOADED, AND WRONG"


def files(path: Path) -> list[Path]:
    """Return the files that hold something; the note for readers does not matter."""
    if not path.is_dir():
        return [path]
    return sorted(entry for entry in path.iterdir() if entry.stat().st_size and entry.name != NOTE)


def damage(folder: Path, rng: random.Random, count: int, *, whole: bool, how: Callable[..., bytes]) -> Counter[str]:
    """Change a file of a checkpoint, load it, and put it right again."""
    path = folder / "last.ckpt"
    expected = save(path, 1, whole=whole)
    found: Counter[str] = Counter()
    for _ in range(count):
        file = rng.choice(files(path))
        good = file.read_bytes()
        file.write_bytes(how(good, rng))
        found[outcome(path, file.name, expected)] += 1
        file.write_bytes(good)
    return found


def flipped(good: bytes, rng: random.Random) -> bytes:
    bad = bytearray(good)
    bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    return bytes(bad)


def truncated(good: bytes, rng: random.Random) -> bytes:
    return good[: rng.randrange(len(good))]


def scribbled(good: bytes, rng: random.Random) -> bytes:
    """A block of a disk that holds something else."""
    start = rng.randrange(len(good))
    return good[:start] + rng.randbytes(min(512, len(good) - start)) + good[start + 512 :]


# ---------------------------------------------------------------------- hostile pickles


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def rewritten(path: Path, change: Callable[[Any], Any]) -> None:
    """Change what a file of torch's holds."""
    torch.save(change(torch.load(path, weights_only=False)), path)


def entry_replaced(path: Path, key: str, value: bytes) -> None:
    """Put other bytes in the place of an entry of a directory, at the end of its file."""
    index = FileSystemReader(path).read_metadata()
    for position, info in index.storage_data.items():
        if position.fqn == key:
            file = path / info.relative_path
            info.offset, info.length = file.stat().st_size, len(value)
            file.write_bytes(file.read_bytes() + value)
    (path / ".metadata").write_bytes(pickle.dumps(index))


def in_index(place: Callable[[Any, Any], Any]) -> Callable[[Path, Any], None]:
    def change(path: Path, hostile: Any) -> None:
        index = FileSystemReader(path).read_metadata()
        place(index, hostile)
        (path / ".metadata").write_bytes(pickle.dumps(index))

    return change


def pickled_in_zip(hostile: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(hostile, stream)
    return stream.getvalue()


def into_tensor(good: bytes, hostile: Any) -> bytes:
    """A tensor's file whose pickle runs something before it makes the tensor."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(stream, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl"):
                data = pickle.dumps(hostile, protocol=2)[:-1] + b"0" + data[2:]
            new.writestr(info.filename, data)
    return stream.getvalue()


def hostile_tensor(path: Path, hostile: Any) -> None:
    index = FileSystemReader(path).read_metadata()
    position = next(entry for entry in index.storage_data if entry.fqn == "state_dict.first.weight")
    info = index.storage_data[position]
    content = (path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
    entry_replaced(path, "state_dict.first.weight", into_tensor(content, hostile))


def hostile_hyperparameter(path: Path, value: bytes) -> None:
    entry_replaced(path, "optimizer_0.param_groups.0.lr", value)


PLACES: dict[str, Callable[[Path, Any], None]] = {
    ".metadata, all of it": lambda path, bad: (path / ".metadata").write_bytes(pickle.dumps(bad)) and None,
    ".metadata, a tensor": in_index(
        lambda index, bad: index.state_dict_metadata.update({"state_dict.first.weight": bad})
    ),
    ".metadata, one more entry": in_index(lambda index, bad: index.state_dict_metadata.update(more=bad)),
    ".metadata, a place": in_index(lambda index, bad: index.planner_data.update(more=("more", bad))),
    ".metadata, the files": in_index(lambda index, bad: index.storage_data.update(more=bad)),
    ".metadata, the save": in_index(lambda index, bad: setattr(index, "storage_meta", bad)),
    ".metadata, the version": in_index(lambda index, bad: setattr(index, "version", bad)),
    "a hyperparameter": lambda path, bad: hostile_hyperparameter(path, pickled_in_zip(bad)),
    "a hyperparameter, plain pickle": lambda path, bad: hostile_hyperparameter(path, pickle.dumps(bad)),
    "a tensor": hostile_tensor,
    "meta.pt": lambda path, bad: rewritten(path / "meta.pt", lambda rest: {**rest, "callbacks": bad}),
    "meta.pt, all of it": lambda path, bad: rewritten(path / "meta.pt", lambda rest: bad),
}
WHOLE_PLACES = ("state_dict", "optimizer_states", "callbacks")


def sums_renewed(path: Path, *, drop: bool) -> None:
    """Make the table of checksums right again, or leave it out, as an attacker would."""
    table = {}
    for file in files(path):
        if file.name != "meta.pt":
            with file.open("rb") as stream:
                table[file.name] = checksum(stream)
    with contextlib.suppress(Exception):
        rest = torch.load(path / "meta.pt", weights_only=True)
        rest.pop(CHECKSUMS)
        torch.save(rest if drop else {**rest, CHECKSUMS: table}, path / "meta.pt")


def hostile(folder: Path, place: str, *, drop: bool) -> str:
    """Put a command into one place of a checkpoint; return the message with which loading it is refused."""
    path, marker = folder / "last.ckpt", folder / "was-run"
    whole = place in WHOLE_PLACES
    save(path, 1, whole=whole)
    bad = Hostile(marker)
    if whole:
        rewritten(path, lambda checkpoint: {**checkpoint, place: {**checkpoint["callbacks"], "bad": bad}})
    else:
        PLACES[place](path, bad)
        if not place.startswith("meta.pt"):
            sums_renewed(path, drop=drop)
    try:
        load(path)
    except (ValueError, pickle.UnpicklingError) as error:
        assert not marker.exists(), f"the command in {place} was run"
        return str(error)
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    raise AssertionError(f"a checkpoint with a command in {place} was loaded")


# ---------------------------------------------------------------------- several processes


def in_new_process(
    fault: Callable[..., Counter[str]], *args: Any, exchange: bool = True, **kwargs: Any
) -> Counter[str]:
    """Call one of the functions below in a process that can be forked safely.

    A test's own process has run other tests: what these have left, such as threads, breaks in a copy of the process.

    Args:
        fault: One of the functions below.
        *args: Its arguments.
        exchange: Whether the system can exchange two names.
        **kwargs: Its arguments.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(_with_names, exchange, fault, *args, **kwargs).result()


def _with_names(exchange: bool, fault: Callable[..., Counter[str]], *args: Any, **kwargs: Any) -> Counter[str]:
    torch.set_num_threads(1)
    if not exchange:
        atomic.exchange = lambda first, second: False
    return fault(*args, **kwargs)


def forked(action: Callable[[], Any], report: TextIO | None = None) -> int:
    """Start a copy of this process that does something, and writes the error into a file if it fails."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            if report is not None:
                report.write(traceback.format_exc())
                report.flush()
            os._exit(1)
        os._exit(0)
    return child


@contextlib.contextmanager
def saving_again_and_again(path: Path, seeds: tuple[int, ...], *, whole: bool) -> Iterator[int]:
    """A process that saves under one name until it is stopped."""

    def run() -> None:
        while True:
            for seed in seeds:
                save(path, seed, whole=whole)

    child = forked(run)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def one_save(path: Path, expected: dict[int, Any]) -> str:
    """Load, and tell whether all that was loaded is from one of the saves."""
    loaded = load(path)
    right = same(loaded, expected[loaded[2]["global_step"]])
    return "loaded, the content is right" if right else "A MIXTURE OF TWO SAVES"


def reading_beside_a_writer(folder: Path, count: int, *, whole: bool) -> Counter[str]:
    path = folder / "last.ckpt"
    expected = {seed: save(path, seed, whole=whole) for seed in (1, 2)}
    found: Counter[str] = Counter()
    with saving_again_and_again(path, (1, 2), whole=whole):
        for _ in range(count):
            found[one_save(path, expected)] += 1
    return found


def contended(path: Path | str, rng: random.Random, count: int, *, whole: bool) -> Counter[str]:
    """Two processes save under one name, one of them is killed at a random moment, the other one goes on."""
    expected = {seed: save(path, seed, whole=whole) for seed in (1, 2, 3)}
    found: Counter[str] = Counter()
    for _ in range(count):
        with tempfile.TemporaryFile("w+") as report:
            with saving_again_and_again(path, (1,), whole=whole):
                survivor = forked(lambda: [save(path, seed, whole=whole) for seed in (2, 3) * 3], report)
                time.sleep(rng.random() * 0.1)
            _, status = os.waitpid(survivor, 0)
            report.seek(0)
            found[f"THE OTHER WRITER FAILED ({status}): {report.read()}" if status else one_save(path, expected)] += 1
    return found


def two_writers(folder: Path, rng: random.Random, count: int, *, whole: bool) -> Counter[str]:
    """Two writers contend for a name, and then a save leaves nothing else in the folder."""
    path = folder / "last.ckpt"
    found = contended(path, rng, count, whole=whole)
    save(path, 1, whole=whole)
    if [entry.name for entry in folder.iterdir()] != ["last.ckpt"]:
        found["LEFTOVERS"] += 1
    return found


def killed_saves(folder: Path, rng: random.Random, count: int, *, whole: bool) -> Counter[str]:
    """A process that saves again and again is killed at a random moment."""
    path = folder / "last.ckpt"
    expected = {seed: save(path, seed, whole=whole) for seed in (1, 2)}
    found: Counter[str] = Counter()
    for _ in range(count):
        with saving_again_and_again(path, (1, 2), whole=whole):
            time.sleep(0.02 + rng.random() * 0.1)
        found[one_save(path, expected)] += 1
    return found


def full_disk(folder: Path, rng: random.Random, count: int, *, whole: bool) -> Counter[str]:
    """A process that may not write more than some bytes into a file: the system's own errors, at any byte."""
    path = folder / "last.ckpt"
    expected = save(path, 1, whole=whole)
    largest = max(file.stat().st_size for file in files(path))
    found: Counter[str] = Counter()

    def limited(limit: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save(path, 2, whole=whole)
        except OSError as error:
            text = str(error)
        else:
            text = "no error"
        os.write(pipe, text.encode())

    for _ in range(count):
        limit, (reading, pipe) = rng.randrange(64, largest), os.pipe()
        child = forked(lambda: limited(limit))  # noqa: B023
        os.close(pipe)
        with os.fdopen(reading) as stream:
            text = stream.read()
        os.waitpid(child, 0)
        named = "File too large" in text and str(path) in text and "is unchanged" in text
        if not named:
            found[f"A MESSAGE WITHOUT THE CAUSE: {text}"] += 1
        elif not same(load(path), expected):
            found["THE OLD CHECKPOINT HAS CHANGED"] += 1
        else:
            found["refused by name"] += 1
    return found
