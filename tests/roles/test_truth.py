"""Every weight of tiny real models has the role, the parts, the orientation and the head size that it has."""

from __future__ import annotations

import pytest

import lightning_memopt as lm
from lightning_memopt.plans.roles import canonical_names
from tests.roles._cases import Case
from tests.roles._models import CASES
from tests.roles._truth import line_of, mismatches


def check(case: Case) -> None:
    """Compare all weights of a model at once."""
    model = case.build()
    named = list(model.named_parameters())
    names = canonical_names(name for name, _ in named)
    shapes = {name: tuple(param.shape) for name, (_, param) in zip(names, named, strict=True)}
    wrong = mismatches(case.lines, lm.classify(model), shapes)
    assert not wrong, f"{len(wrong)} of {len(shapes)} parameters are wrong:\n" + "\n".join(wrong)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_weight_is_what_it_is(case):
    check(case)


def test_no_line_of_the_truth_is_idle():
    """A line that decides about no weight of any model is misspelled."""
    written = {line.names for case in CASES for line in case.lines}
    used = {
        line_of(case.lines, name, param.shape).names
        for case in CASES
        for name, param in case.build().named_parameters()
    }
    assert not written - used
