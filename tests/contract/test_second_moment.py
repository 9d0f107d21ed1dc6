"""Every registered second-moment kind × every property, without a line per kind."""

from __future__ import annotations

import pytest
from contract.cases import all_second_moments, label, shapes_for
from contract.checks import CHECKS, check_registry

from lightning_memopt.momentum import MOMENTA
from lightning_memopt.second_moment import SECOND_MOMENTS

CASES = [(kind, shape) for kind in all_second_moments() for shape in shapes_for(kind)]


@pytest.mark.parametrize("check", CHECKS, ids=label)
@pytest.mark.parametrize(("kind", "shape"), CASES, ids=label)
def test_contract(kind, shape, check):
    check(kind, shape)


def test_registry_and_keys():
    check_registry(SECOND_MOMENTS, {key: name for name in MOMENTA.names() for key in MOMENTA.get(name).keys})
