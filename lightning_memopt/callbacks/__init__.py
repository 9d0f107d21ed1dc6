"""Lightning callbacks that adapt momentum during training and report the memory of optimizer state."""

from lightning_memopt.callbacks.adaptive_momentum import AdaptiveMomentum
from lightning_memopt.callbacks.memory_monitor import OptimizerMemoryMonitor
from lightning_memopt.callbacks.policies import POLICIES, Candidate, Problem

__all__ = ["POLICIES", "AdaptiveMomentum", "Candidate", "OptimizerMemoryMonitor", "Problem"]
