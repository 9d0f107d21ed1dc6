"""The budget of momentum: as a size or a share, and the smallest that is possible."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lightning_memopt import AdaptiveMomentum
from lightning_memopt.callbacks.budget import check_budget, parse_budget, smallest
from lightning_memopt.callbacks.policies import Candidate, Problem


@pytest.mark.parametrize(
    ("budget", "size"),
    [
        (None, None),
        (0.05, 50_000),
        (1.0, 1_000_000),
        ("5%", 50_000),
        (" 12.5 % ", 125_000),
        ("100%", 1_000_000),
        (1000, 1000),
        (300_000, 300_000),
        ("300000", 300_000),
        ("1B", 1),
        ("0.5%", 5_000),
        ("5MB", 5_000_000),
        ("2 KiB", 2048),
    ],
    ids=repr,
)
def test_parse_budget(budget, size):
    assert parse_budget(budget, 1_000_000) == size


ALLOWED = (
    "`budget` must be a share of AdamW's momentum as a float in (0, 1] or a string such as '5%', or bytes as an "
    "integer of at least 1000 or a string such as '512MiB', got "
)


@pytest.mark.parametrize(
    "budget", [0, -3, 0.0, -0.1, 1.5, 2e9, float("nan"), "0", "0%", "101%", "%", "five", "0.5", "1e3%%"], ids=repr
)
def test_budget_out_of_range(budget):
    with pytest.raises(ValueError, match=re.escape(f"{ALLOWED}{budget!r}.")):
        parse_budget(budget, 1_000_000)


@pytest.mark.parametrize("budget", [True, False, [0.5], b"5%"], ids=repr)
def test_budget_of_the_wrong_type(budget):
    with pytest.raises(TypeError, match=re.escape(f"{ALLOWED}{budget!r}.")):
        parse_budget(budget, 1_000_000)


@pytest.mark.parametrize(
    ("budget", "ways"),
    [
        (1, "'1B' for bytes, '1%' of AdamW's momentum, 1.0 for all of it, or '1MiB'"),
        (5, "'5B' for bytes, '5%' of AdamW's momentum, or '5MiB'"),
        ("5", "'5B' for bytes, '5%' of AdamW's momentum, or '5MiB'"),
        (512, "'512B' for bytes, or '512MiB'"),
        (999, "'999B' for bytes, or '999MiB'"),
    ],
    ids=repr,
)
def test_a_small_number_without_a_unit_is_asked_about(budget, ways):
    with pytest.raises(ValueError, match=re.escape(f"`budget` {budget!r} has no unit: write {ways}.")):
        parse_budget(budget, 1_000_000)
    with pytest.raises(ValueError, match="has no unit"):
        AdaptiveMomentum(budget)


# Bytes of a rank, and of dense momentum: 120 and 800, 60 and 72, 12 (all that there is).
BLOCKS = (
    Candidate("wide", "mlp", 1, 10, 20, 3),
    Candidate("stack", "mlp", 3, 2, 3, 0),
    Candidate("row", "other", 1, 1, 3, 1),
)


def test_smallest():
    assert smallest(BLOCKS, 1) == 120 + 60 + 12
    assert smallest(BLOCKS, 4) == 480 + 72 + 12
    assert smallest((), 4) == 0


def test_check_budget():
    check_budget(Problem(BLOCKS, budget=564, min_rank=4), fixed=1100)
    check_budget(Problem(BLOCKS, budget=None, min_rank=4), fixed=1100)
    message = (
        "`budget` is 1663 bytes (1.6 KiB), but rank 4 for every matrix and the momentum that cannot be changed "
        "(1.1 KiB) take 1664 bytes (1.6 KiB); give at least that, or lower `min_rank`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_budget(Problem(BLOCKS, budget=563, min_rank=4), fixed=1100)


def test_the_smallest_budget_does_not_depend_on_the_ranks_at_hand():
    blocks = tuple(replace(block, rank=block.dense_rank) for block in BLOCKS)
    check_budget(Problem(blocks, budget=192), fixed=0)
