"""Training with ``strategy="memopt_fsdp"`` on several ranks, against DDP and AdamW.

All cases of a number of ranks run in one process group; every case is a test of its own. They are in ``cases/``.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

import pytest
import torch.distributed as dist

from tests._ranks import run_ranks
from tests.strategy.cases import (  # noqa: F401  (they register themselves)
    averaging,
    command_line,
    fabric,
    gradients,
    materialize,
    mesh,
    optimizers,
    parameters,
    precision,
    refusals,
    releasing,
    training,
)
from tests.strategy.cases.shared import CASES

pytestmark = pytest.mark.slow

CASE_IDS = [pytest.param(size, name, id=f"{name}-{size}") for size, cases in CASES.items() for name in cases]


def run_cases(rank: int, world_size: int) -> dict[str, str | None]:
    outcomes: dict[str, str | None] = {}
    for name, function in CASES[world_size].items():
        outcomes[name] = None
        try:
            function()
        except Exception as error:
            frames = [entry for entry in traceback.extract_tb(error.__traceback__) if "site-pack" not in entry.filename]
            outcomes[name] = f"{''.join(traceback.format_list(frames))}{type(error).__name__}: {error}"
            # The others may wait in a collective until the time is up; what happened would be lost.
            print(f"rank {rank}, {name}:\n{outcomes[name]}", file=sys.stderr, flush=True)
        dist.barrier()
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> Callable[[int], list[dict[str, str | None]]]:
    done: dict[int, list[dict[str, str | None]]] = {}

    def of(size: int) -> list[dict[str, str | None]]:
        if size not in done:
            done[size] = run_ranks(run_cases, size, timeout=290)
        return done[size]

    return of


@pytest.mark.parametrize(("size", "name"), CASE_IDS)
def test_on_ranks(outcomes, size, name):
    for rank, results in enumerate(outcomes(size)):
        assert results[name] is None, f"on rank {rank}:\n{results[name]}"
