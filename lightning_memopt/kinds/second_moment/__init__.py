"""Second-moment kinds; importing this package registers all of them."""

from lightning_memopt.kinds.second_moment.base import SECOND_MOMENTS, Denominator, SecondMoment
from lightning_memopt.kinds.second_moment.blockwise import BlockwiseSecondMoment
from lightning_memopt.kinds.second_moment.dense import DenseSecondMoment
from lightning_memopt.kinds.second_moment.factored import FactoredSecondMoment
from lightning_memopt.kinds.second_moment.none import NoSecondMoment
from lightning_memopt.kinds.second_moment.normalized import NormalizedSecondMoment
from lightning_memopt.kinds.second_moment.orthogonal import OrthogonalSecondMoment
from lightning_memopt.kinds.second_moment.subset_norm import SubsetNormSecondMoment

__all__ = [
    "SECOND_MOMENTS",
    "BlockwiseSecondMoment",
    "Denominator",
    "DenseSecondMoment",
    "FactoredSecondMoment",
    "NoSecondMoment",
    "NormalizedSecondMoment",
    "OrthogonalSecondMoment",
    "SecondMoment",
    "SubsetNormSecondMoment",
]
