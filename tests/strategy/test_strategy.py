"""The strategy by name, and the accelerators that it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("lightning.pytorch")

from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.strategies import StrategyRegistry

import lightning_memopt as lm
from lightning_memopt import MemOptFSDPStrategy
from lightning_memopt._registration import register_with_lightning

pytestmark = pytest.mark.slow


def test_registered_under_both_names_and_only_once():
    register_with_lightning()
    assert type(StrategyRegistry.get("memopt_fsdp")) is MemOptFSDPStrategy
    assert StrategyRegistry["memopt_fsdp_offload"]["init_params"] == {"cpu_offload": True}
    assert lm.MemOptFSDPStrategy is MemOptFSDPStrategy


def test_known_by_name_as_soon_as_the_package_is_imported():
    program = (
        "import lightning_memopt\n"
        "from lightning.pytorch import Trainer\n"
        "strategy = Trainer(strategy='memopt_fsdp', accelerator='cpu', devices=2, logger=False).strategy\n"
        "assert type(strategy).__name__ == 'MemOptFSDPStrategy'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("strategy", ["memopt_fsdp", MemOptFSDPStrategy])
def test_accelerators_that_are_refused(strategy):
    made = StrategyRegistry.get(strategy) if isinstance(strategy, str) else strategy()
    with pytest.raises(ValueError, match="CPUs and CUDA GPUs, got MPSAccelerator: set `accelerator='cpu'`"):
        made.accelerator = MPSAccelerator()
