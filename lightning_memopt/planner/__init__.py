"""What a training run needs on every rank, told before it runs."""

from lightning_memopt.planner.memory_plan import MemoryPlan, RecipeMemory
from lightning_memopt.planner.planning import plan_memory, sweep_memory

__all__ = ["MemoryPlan", "RecipeMemory", "plan_memory", "sweep_memory"]
