"""Momentum kinds; importing this package registers all of them."""

from lightning_memopt.kinds.momentum.apollo import ApolloMomentum
from lightning_memopt.kinds.momentum.base import MOMENTA, Direction, Momentum
from lightning_memopt.kinds.momentum.dense import DenseMomentum
from lightning_memopt.kinds.momentum.fira import FiraMomentum
from lightning_memopt.kinds.momentum.galore import GaLoreMomentum
from lightning_memopt.kinds.momentum.low_rank import LowRankMomentum
from lightning_memopt.kinds.momentum.none import NoMomentum
from lightning_memopt.kinds.momentum.subspace import SubspaceMomentum

__all__ = [
    "MOMENTA",
    "ApolloMomentum",
    "DenseMomentum",
    "Direction",
    "FiraMomentum",
    "GaLoreMomentum",
    "LowRankMomentum",
    "Momentum",
    "NoMomentum",
    "SubspaceMomentum",
]
