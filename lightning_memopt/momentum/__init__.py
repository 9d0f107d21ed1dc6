"""Momentum kinds; importing this package registers all of them."""

from lightning_memopt.momentum.base import MOMENTA, Direction, Momentum
from lightning_memopt.momentum.dense import DenseMomentum
from lightning_memopt.momentum.low_rank import LowRankMomentum
from lightning_memopt.momentum.none import NoMomentum
from lightning_memopt.momentum.subspace import SubspaceMomentum

__all__ = [
    "MOMENTA",
    "DenseMomentum",
    "Direction",
    "LowRankMomentum",
    "Momentum",
    "NoMomentum",
    "SubspaceMomentum",
]
