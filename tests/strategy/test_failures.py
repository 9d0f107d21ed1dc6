"""What ranks say when another one has failed."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

import tests._ranks  # noqa: F401  (what the server that ranks are forked from imports)
from lightning_memopt.strategy import errors as failures
from lightning_memopt.strategy.errors import FirstFailure
from tests.strategy._training import LanguageModule, fit

pytestmark = pytest.mark.slow

LOST = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1"


class Failing(LanguageModule):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 1 and dist.get_rank() == self.rank:
            raise ValueError("no such token: 7\nthe second line")
        return super().training_step(batch, batch_idx)


def on_a_rank(rank: int, failing: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", f"tcp://localhost:{port}", rank=rank, world_size=3, timeout=timedelta(seconds=60)
    )  # the first rank keeps the store
    start = time.monotonic()
    try:
        fit(Failing(failing))
        outcome: Any = None
    except BaseException as error:
        outcome = type(error).__name__, str(error), getattr(error, "__notes__", []), time.monotonic() - start
    (Path(folder) / f"{rank}.pkl").write_bytes(pickle.dumps(outcome))
    end = time.monotonic() + 20
    # On a busy machine the survivor that keeps the store could be gone before the other one has read from it.
    while rank == 0 != failing and len(list(Path(folder).glob("*.pkl"))) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    os._exit(0)  # as a process that dies: nothing is torn down


def run(failing: int, folder: Path) -> list[Any]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.start_processes(on_a_rank, (failing, port, str(folder)), nprocs=3, start_method="forkserver")
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(3)]


def test_survivors_say_which_rank_raised_what(tmp_path):
    outcomes = run(1, tmp_path)
    assert outcomes[1][:3] == ("ValueError", "no such token: 7\nthe second line", [])
    for rank in (0, 2):
        kind, message, notes, _ = outcomes[rank]
        assert (kind, "third_party/gloo" in message) == ("RuntimeError", True)
        assert notes == ["Rank 1 raised ValueError: no such token: 7. The error on this rank is a consequence."]


def test_survivors_keep_their_error_where_the_store_is_gone(tmp_path):
    outcomes = run(0, tmp_path)
    assert outcomes[0][:3] == ("ValueError", "no such token: 7\nthe second line", [])
    for kind, message, notes, seconds in outcomes[1:]:
        assert (kind, "third_party/gloo" in message, notes) == ("RuntimeError", True, [])
        assert seconds < 60


class Stuck:
    """A store whose host cannot be reached."""

    def check(self, keys: list[str]) -> bool:
        threading.Event().wait(5)
        return False


@pytest.fixture
def store(monkeypatch):
    """Let this process be rank 2 of 4; return its store."""
    held = dist.HashStore()
    monkeypatch.setattr(failures, "rank_and_size", lambda: (2, 4))
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: held)
    monkeypatch.setattr(failures, "PATIENCE", 0.1)
    return held


def noted(first: FirstFailure, error: BaseException) -> list[str]:
    first.share(error)
    return getattr(error, "__notes__", [])


def test_the_first_report_counts_and_is_that_of_one_fit(store):
    first, second = FirstFailure(), FirstFailure()
    assert noted(first, RuntimeError(LOST)) == []
    assert noted(first, SIGTERMException()) == []
    assert noted(first, KeyError("a" * 1000)) == []
    assert noted(first, ValueError("later")) == []
    (note,) = noted(first, RuntimeError(LOST))
    assert note.startswith("Rank 2 raised KeyError: 'aaa")
    assert len(note) < 600
    wrapped = OSError("saving failed")
    wrapped.__cause__ = RuntimeError(LOST)
    assert noted(first, wrapped) == [note]
    assert noted(second, dist.DistBackendError("NCCL")) == []
    assert noted(second, AssertionError()) == []
    assert noted(second, dist.DistBackendError("NCCL")) == [
        "Rank 2 raised AssertionError. The error on this rank is a consequence."
    ]


def test_a_store_that_does_not_answer_is_left(store, monkeypatch):
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", Stuck)
    start = time.monotonic()
    assert noted(FirstFailure(), RuntimeError(LOST)) == []
    assert time.monotonic() - start < 3
    assert noted(FirstFailure(), ValueError("no compare_set")) == []


def test_one_process_shares_nothing():
    assert noted(FirstFailure(), RuntimeError(LOST)) == []
