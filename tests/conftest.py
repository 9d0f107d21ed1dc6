from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator

import pytest
import torch

import tests._installed  # noqa: F401  before anything imports Lightning


@pytest.fixture(autouse=True)
def restored_world() -> Iterator[None]:
    """Leave the process as it was: environment, paths, dtype, random numbers, threads, logging, no process group."""
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    environment, dtype, threads = dict(os.environ), torch.get_default_dtype(), torch.get_num_threads()
    random_state, folders = torch.get_rng_state(), list(sys.path)
    yield
    sys.path[:] = folders
    os.environ.clear()
    os.environ.update(environment)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_rng_state(random_state)
    lightning.setLevel(level)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # a Trainer's with a strategy of one process


def pytest_collection_finish() -> None:
    """Leave what the imports made out of collections of garbage, which otherwise take a third of a second each."""
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    """Small matrices are quicker on one thread, and two cores are shared with everybody's tests."""
    torch.set_num_threads(1)
