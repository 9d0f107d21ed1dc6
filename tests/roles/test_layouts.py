"""Queries, keys and values of fused weights are where they are said to be: attention itself shows it.

A score is a product of a query and a key, so where all queries are zero, the gradient of the keys is zero, and the
other way around. Where all values are zero, every weight of attention gives the same output, so the gradients of
queries and keys are zero. These zeros are exact, for any rows that are really all queries, keys or values. And the loss
of a single position depends on the query of that position alone. In linear attention, which has no softmax, only the
source of the model tells keys from values.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_memopt as lm
from tests.roles._cases import Case, forward, loss_of
from tests.roles._models import CASES
from tests.roles._truth import Line

pytestmark = pytest.mark.slow

FUSED = {"query", "key", "value"}


def is_fused(line: Line) -> bool:
    """Return whether a line of the truth is about a weight with several parts of attention."""
    roles = [part.role for part in line.answers[0].parts]
    return len(roles) > 1 and FUSED.issuperset(roles)


FUSED_CASES = [case for case in CASES if any(map(is_fused, case.lines))]


def fused_parts(model: nn.Module) -> dict[str, dict[str, tuple[Tensor, ...]]]:
    """Return the parts of fused attention weights by role, as functions of a parameter."""
    found = {name: {part.role: part for part in parts} for name, parts in lm.classify(model).items()}
    return {name: parts for name, parts in found.items() if len(parts) > 1 and parts.keys() <= FUSED}


def part_of(tensor: Tensor, part) -> Tensor:
    """Return a view of the part of a parameter or its gradient, as a matrix with one row per output."""
    slot = part.slot
    rows = tensor.movedim(slot.dim, 0)
    period = getattr(slot, "period", None) or rows.shape[0]
    return rows.unflatten(0, (-1, period)).narrow(1, slot.start, slot.length)


def zero(model: nn.Module, params: dict[str, Tensor], name: str, part) -> None:
    """Set a part of a weight to zero, and the biases beside it."""
    with torch.no_grad():
        part_of(params[name], part).zero_()
        for other, bias in model.get_submodule(name.rpartition(".")[0]).named_parameters(recurse=False):
            if "bias" in other:
                bias.zero_()


def gradients(case: Case, name: str, zeroed: str | None = None, position: int | None = None) -> dict[str, Tensor]:
    """Return the gradients of a weight's parts, with one of them set to zero, or of one output position."""
    model = case.build()
    params, parts = dict(model.named_parameters()), fused_parts(model)[name]
    if zeroed is not None:
        zero(model, params, name, parts[zeroed])
    outputs = forward(model, case.inputs())
    loss_of(outputs if position is None else [outputs[0][0, position]]).backward()
    return {role: part_of(params[name].grad, part) for role, part in parts.items()}


def check_parts(case: Case) -> None:
    fused = fused_parts(case.build())
    assert fused, "no fused weight was found"
    for name, parts in fused.items():
        before = gradients(case, name)
        assert "value" in parts, f"{name} has only {', '.join(parts)}"
        assert all(gradient.any() for gradient in before.values()), f"{name}: a part has no gradient"
        without = gradients(case, name, zeroed="value")
        assert without["value"].any(), f"{name}: values that are zero get no gradient"
        for role in parts.keys() - {"value"}:
            assert not without[role].any(), f"{name}: with values of zero, {role} gets a gradient"
        if case.proof == "values" or len(parts) < len(FUSED):
            continue
        for role, counterpart in (("query", "key"), ("key", "query")):
            found = gradients(case, name, zeroed=role)[counterpart]
            assert not found.any(), f"{name}: with {role} of zero, {counterpart} gets a gradient"


def check_order(case: Case) -> None:
    for name, parts in fused_parts(case.build()).items():
        if len(parts) < len(FUSED):
            continue  # its queries are another weight
        found = gradients(case, name, position=-1)
        sizes = {role: torch.linalg.svdvals(found[role].flatten(0, -2).double()) for role in ("query", "key")}
        spread = {role: float(values[1] / values[0]) for role, values in sizes.items()}
        assert spread["query"] < 1e-5 < 1e-3 < spread["key"], f"{name}: {spread}"


@pytest.mark.parametrize("case", FUSED_CASES, ids=repr)
def test_fused_parts_are_what_attention_makes_of_them(case):
    check_parts(case)


@pytest.mark.parametrize("case", [case for case in FUSED_CASES if case.proof == "order"], ids=repr)
def test_one_position_has_one_query_and_many_keys(case):
    check_order(case)
