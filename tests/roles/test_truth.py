"""Every weight of tiny real models has the role, the parts, the orientation and the head size that it has."""

from __future__ import annotations

import pytest

import lightning_memopt as lm
from tests.roles._cases import Case
from tests.roles._models import CASES
from tests.roles._truth import mismatches


def check(case: Case) -> None:
    """Compare all weights of a model at once."""
    model = case.build()
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    wrong = mismatches(case.lines, lm.classify(model), shapes)
    assert not wrong, f"{len(wrong)} of {len(shapes)} parameters are wrong:\n" + "\n".join(wrong)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_weight_is_what_it_is(case):
    check(case)
