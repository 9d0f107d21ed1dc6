"""Every registered momentum kind × every property, without a line per kind."""

from __future__ import annotations

import pytest

from lightning_memopt.kinds.momentum import MOMENTA
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS
from tests.kinds.contract.cases import all_momenta, label, shapes_for, without_repetition
from tests.kinds.contract.checks import CHECKS, check_registry


@pytest.mark.parametrize("check", CHECKS, ids=label)
@pytest.mark.parametrize("kind", without_repetition(all_momenta()), ids=label)
def test_contract(kind, check):
    for shape in shapes_for(kind):
        check(kind, shape)


def test_registry_and_keys():
    check_registry(MOMENTA, {key: name for name in SECOND_MOMENTS.names() for key in SECOND_MOMENTS.get(name).keys})
