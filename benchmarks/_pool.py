"""Training runs in several processes, where the results so far decide the next runs."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch
from _train import Tokens, start_worker

Result = dict[str, Any]
Run = TypeVar("Run")


def train_in_pool(
    train: Callable[[Run, Any], Result],
    settings: Any,
    tokens: Tokens,
    *,
    results: list[Result],
    needed: Callable[[list[Result]], list[Run]],
    jobs: int,
) -> Iterator[Result]:
    """Yield results as they arrive, after adding them to `results`.

    Args:
        train: Function of a run and the settings, called in a worker.
        settings: Second argument of `train`.
        tokens: Tokens that every worker loads first.
        results: Results of finished runs.
        needed: Takes the results and returns the runs that can start, without finished ones.
        jobs: Number of processes, with one thread each.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tokens.pt")
        torch.save(tokens, path)
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker, (path,)) as pool:
            running: dict[Future[Result], Run] = {}
            while True:
                todo = [run for run in needed(results) if run not in running.values()]
                for run in todo[: jobs - len(running)]:
                    running[pool.submit(train, run, settings)] = run
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.pop(future)
                    results.append(future.result())
                    yield results[-1]
