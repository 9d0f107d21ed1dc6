"""Metrics of an optimizer's memory, which read a :class:`~lightning_memopt.Snapshot`.

A metric is a function of one snapshot and a thin ``torchmetrics.Metric`` that puts together what all processes see. The
state of the metric is that of the last snapshot, not a sum over all it has seen: updating twice counts nothing twice.
"""

from lightning_memopt.metrics.allocation import MomentumAllocation, momentum_allocation
from lightning_memopt.metrics.heat_map import heat_map
from lightning_memopt.metrics.peak_memory import PeakMemory, peak_memory
from lightning_memopt.metrics.savings import MemorySavings, memory_savings
from lightning_memopt.metrics.state_bytes import OptimizerStateBytes, optimizer_state_bytes

__all__ = [
    "MemorySavings",
    "MomentumAllocation",
    "OptimizerStateBytes",
    "PeakMemory",
    "heat_map",
    "memory_savings",
    "momentum_allocation",
    "optimizer_state_bytes",
    "peak_memory",
]
