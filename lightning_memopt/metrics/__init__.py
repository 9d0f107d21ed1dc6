"""Metrics of an optimizer's memory, computed from a :class:`~lightning_memopt.Snapshot`.

A metric is a function of one snapshot, and a thin ``torchmetrics.Metric`` that combines the snapshots of all processes.
The metric holds the last snapshot, not a sum over all snapshots: two updates count nothing twice.
"""

from lightning_memopt.figures.heat_map import heat_map
from lightning_memopt.metrics.allocation import MomentumAllocation, momentum_allocation
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
