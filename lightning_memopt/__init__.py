"""Optimizers with compressed state for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_memopt._registration import register_with_lightning
from lightning_memopt._registry import nearest
from lightning_memopt._version import __version__ as __version__
from lightning_memopt.kinds.momentum import MOMENTA, Direction, Momentum
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS, Denominator, SecondMoment
from lightning_memopt.memory.snapshot import BlockFacts, PartBytes, ProcessMemory, Snapshot
from lightning_memopt.optim.checkpoint.resume import ResumeWarning
from lightning_memopt.optim.classes import (
    SCALE,
    Adafactor,
    AdaGradSNSM,
    AdamMini,
    AdamSN,
    AdamSNSM,
    AdaPM,
    AdaPMLean,
    AdaPMMini,
    Apollo,
    ApolloMini,
    Fira,
    GaLore,
    Muon,
    MuonLean,
    RMSPropSN,
    SNSMLean,
)
from lightning_memopt.optim.measuring import take_snapshot
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.optim.schedule import WarmupSchedule
from lightning_memopt.optim.tracing import trace_step
from lightning_memopt.optim.unknown_roles import RoleWarning
from lightning_memopt.planner import MemoryPlan, plan_memory
from lightning_memopt.plans.effect import PlanWarning
from lightning_memopt.plans.plan import Plan
from lightning_memopt.plans.recipe import Recipe
from lightning_memopt.plans.recipes import load_plan, recipe_names
from lightning_memopt.plans.roles import NamingScheme, Rule, classify, register_naming_scheme

if TYPE_CHECKING:
    from lightning_memopt import metrics
    from lightning_memopt.callbacks import AdaptiveMomentum, BindNames, OptimizerMemoryMonitor
    from lightning_memopt.cli import MemOptCLI
    from lightning_memopt.strategy import (
        MemOptFabricStrategy,
        MemOptFSDPStrategy,
        full_state_dict,
        grad_norm,
        load_weights,
    )

# These need more than torch, so they are imported on first access.
_LAZY = {
    "AdaptiveMomentum": "lightning_memopt.callbacks",
    "BindNames": "lightning_memopt.callbacks",
    "MemOptCLI": "lightning_memopt.cli",
    "MemOptFSDPStrategy": "lightning_memopt.strategy",
    "MemOptFabricStrategy": "lightning_memopt.strategy",
    "OptimizerMemoryMonitor": "lightning_memopt.callbacks",
    "full_state_dict": "lightning_memopt.strategy",
    "grad_norm": "lightning_memopt.strategy",
    "load_weights": "lightning_memopt.strategy",
}

register_with_lightning()

__all__ = [
    "MOMENTA",
    "SECOND_MOMENTS",
    "AdaGradSNSM",
    "AdaPM",
    "AdaPMLean",
    "AdaPMMini",
    "Adafactor",
    "AdamMini",
    "AdamSN",
    "AdamSNSM",
    "AdaptiveMomentum",
    "Apollo",
    "ApolloMini",
    "BindNames",
    "BlockFacts",
    "Denominator",
    "Direction",
    "Fira",
    "GaLore",
    "MemOpt",
    "MemOptCLI",
    "MemOptFSDPStrategy",
    "MemOptFabricStrategy",
    "MemoryPlan",
    "Momentum",
    "Muon",
    "MuonLean",
    "NamingScheme",
    "OptimizerMemoryMonitor",
    "PartBytes",
    "Plan",
    "PlanWarning",
    "ProcessMemory",
    "RMSPropSN",
    "SCALE",
    "Recipe",
    "ResumeWarning",
    "RoleWarning",
    "Rule",
    "SNSMLean",
    "SecondMoment",
    "Snapshot",
    "WarmupSchedule",
    "classify",
    "full_state_dict",
    "grad_norm",
    "load_plan",
    "load_weights",
    "metrics",
    "plan_memory",
    "recipe_names",
    "register_naming_scheme",
    "take_snapshot",
    "trace_step",
]


if not TYPE_CHECKING:  # otherwise every misspelt name would be Any

    def __getattr__(name: str) -> Any:
        if name in ("metrics", "strategy"):
            return _needing_more(f"lightning_memopt.{name}", name)
        if name in _LAZY:
            return getattr(_needing_more(_LAZY[name], name), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _needing_more(module: str, name: str) -> Any:
    """Import a module that needs more than torch."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"lightning_memopt.{name} needs {error.name!r}, which is not installed. It comes with an extra: "
            'pip install "lightning-memopt[cli]"'
        ) from error
