"""The tables of kinds in docs/methods.md name every kind, and the size of its state."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.kinds.momentum import MOMENTA
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS

PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
M, N, K = 48, 32, 4
# What the page's formulas are for a matrix [M, N].
SIZES = {
    "none": 0,
    "mn": M * N,
    "m+n": M + N,
    "at most m": M,
    "max(m, n)": M,
    "r(m+n)": K * (M + N),
    "k(m+n)": K * (M + N),
    "k(2m+n)": K * (2 * M + N),
    "k(2m+n)+1": K * (2 * M + N) + 1,
    "2km+1": 2 * K * M + 1,
}


def rows(heading: str) -> dict[str, str]:
    """Return the state of each kind, as the page writes it."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| .* \| (.*?) \| .*\|$", section, re.MULTILINE))


def elements(**kinds: object) -> int:
    """Return the number of elements of a matrix's state, without its step."""
    weight = nn.Parameter(torch.randn(M, N))
    plan = {"name": "one", "base": "adamw", "overrides": {"*": kinds}}
    optimizer = lm.MemOpt([("layers.0.mlp.up_proj.weight", weight)], plan)
    weight.grad = torch.randn(M, N)
    optimizer.step()
    return sum(value.numel() for key, value in optimizer.state[weight].items() if key != "step")


def test_every_kind_is_in_its_table():
    assert set(rows("Momentum kinds")) == set(MOMENTA.names())
    assert set(rows("Second-moment kinds")) == set(SECOND_MOMENTS.names())


@pytest.mark.parametrize(("kind", "state"), rows("Momentum kinds").items())
def test_momentum_has_the_state_of_its_row(kind, state):
    rank = {} if kind in ("none", "dense") else {"rank": K}
    assert elements(momentum=kind, second_moment="none", **rank) == SIZES[state]


@pytest.mark.parametrize(("kind", "state"), rows("Second-moment kinds").items())
def test_second_moment_has_the_state_of_its_row(kind, state):
    found = elements(momentum="none", second_moment=kind)
    assert found <= SIZES[state] if state.startswith("at most") else found == SIZES[state]
