"""Run a function on several ranks: processes of their own, gloo, rendezvous through a file."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A server, itself a new process without threads, imports these once; ranks are forked from it. Importing them in every
# rank took longer than most tests.
PRELOADED = [
    "tests._installed",
    "lightning_memopt.strategy",
    "lightning_memopt.callbacks",
    "lightning_memopt.cli.program",
    "lightning_memopt.cli.configured",
    "omegaconf",
    "docstring_parser",
    "attrs",
    "transformers",
    "torch._dynamo",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "pytest",
    "tests._models",
]
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on every rank and return the results, by rank.

    Starting processes costs seconds: let one call run many cases. ``fn`` must be importable (a module's function) and
    its result must pickle.

    Raises:
        torch.multiprocessing.ProcessRaisedException: If a rank raised; contains its traceback.
        TimeoutError: If the ranks did not finish in ``timeout`` seconds; all of them are gone afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        arguments = (fn, world_size, folder, timeout, args)
        context = mp.start_processes(_rank, arguments, nprocs=world_size, join=False, start_method="forkserver")
        assert context is not None
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{fn.__qualname__} did not finish on {world_size} ranks within {timeout:g} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [pickle.loads((Path(folder) / f"{rank}.pkl").read_bytes()) for rank in range(world_size)]


def _rank(
    rank: int, fn: Callable[..., Any], world_size: int, folder: str, timeout: float, args: tuple[Any, ...]
) -> None:
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    # An exception leaves at once: the others wait in a collective, and the parent ends them.
    result = fn(rank, world_size, *args)
    (Path(folder) / f"{rank}.pkl").write_bytes(pickle.dumps(result))
    # Without a barrier one rank may tear the group down while another still reads from it: aborts now and then.
    dist.barrier()
    dist.destroy_process_group()
