"""What two ranks save continues there to the last bit, and on three ranks up to the order of sums."""

from __future__ import annotations

import itertools
import traceback
from pathlib import Path

import pytest
import torch.distributed as dist

from tests._ranks import run_ranks
from tests.strategy import _averaging_checkpoints, _fabric_checkpoints

pytestmark = pytest.mark.slow

PARTS = {"fabric": _fabric_checkpoints, "averaging": _averaging_checkpoints}
CONTINUED = {name: case for part in PARTS.values() for name, case in part.CONTINUED.items()}
ON_TWO = {case.__name__: case for part in PARTS.values() for case in part.ON_TWO}


def on_a_rank(rank: int, world: int, folder: str) -> dict[str, str]:
    for name, part in PARTS.items():
        (Path(folder) / name).mkdir(exist_ok=True)
        if world == 2:
            part.saved(Path(folder) / name)
    outcomes = {}
    for place, part in PARTS.items():
        for name, case in {**part.CONTINUED, **{case.__name__: case for case in part.ON_TWO if world == 2}}.items():
            try:
                case(Path(folder) / place)
                outcomes[name] = ""
            except Exception:
                outcomes[name] = traceback.format_exc()
            dist.barrier()
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("continued"))
    return {world: run_ranks(on_a_rank, world, folder, timeout=280) for world in (2, 3)}


@pytest.mark.parametrize(("world", "name"), [*itertools.product((2, 3), CONTINUED), *((2, name) for name in ON_TWO)])
def test_on_ranks(outcomes, world, name):
    for rank, found in enumerate(outcomes[world]):
        assert not found[name], f"on rank {rank}:\n{found[name]}"
