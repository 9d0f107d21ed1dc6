"""Plan the memory of a training run on every rank before it runs."""

from lightning_memopt.planner.memory_plan import MemoryPlan, RecipeMemory
from lightning_memopt.planner.planning import plan_memory, sweep_memory

__all__ = ["MemoryPlan", "RecipeMemory", "plan_memory", "sweep_memory"]
