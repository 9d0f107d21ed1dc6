"""Lightning callbacks that adapt momentum, report the memory of optimizer state, and give optimizers names."""

from lightning_memopt.callbacks.adaptive_momentum import AdaptiveMomentum
from lightning_memopt.callbacks.bind_names import BindNames
from lightning_memopt.callbacks.memory_monitor import OptimizerMemoryMonitor
from lightning_memopt.callbacks.policies import POLICIES, Candidate, Problem

__all__ = ["POLICIES", "AdaptiveMomentum", "BindNames", "Candidate", "OptimizerMemoryMonitor", "Problem"]
