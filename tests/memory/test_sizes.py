"""Sizes in bytes, and the budget of momentum that is given as one."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lightning_memopt.callbacks.budget import check_budget, parse_budget, smallest
from lightning_memopt.callbacks.policies import Candidate, Problem
from lightning_memopt.memory.sizes import format_bytes, format_share, parse_bytes

# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("300000", 300_000),
        ("0", 0),
        ("7B", 7),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        (" 1.5 GB ", 1_500_000_000),
        ("1.5kB", 1500),
        ("2KiB", 2048),
        ("0.1 TiB", 2**40 // 10),
        ("3 gib", 3 * 2**30),
        ("4 MB", 4_000_000),
        ("1tb", 10**12),
    ],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "1,5 GB", "-3 MB", "1.5", "0.5 B", "12 M", "1  GB", "1e9", "nan", "٣ MB"])
def test_what_is_no_size(text):
    message = (
        "A size must be a whole number of bytes, or a number and one of B, KiB, MiB, GiB, TiB, kB, MB, GB, TB, such as "
        f"'512MiB' or '1.5 GB', got {text!r}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_bytes(text)


@pytest.mark.parametrize("value", [None, 3, 2.5, True], ids=repr)
def test_a_size_is_a_text(value):
    with pytest.raises(TypeError, match=re.escape(f"A size must be a text such as '512MiB', got {value!r}.")):
        parse_bytes(value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (3 * 2**19, "1.5 MiB"),
        (2**20 - 1, "1 MiB"),
        (2**30, "1 GiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_format_bytes(size, text):
    assert format_bytes(size) == text


# --- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "size"),
    [
        (None, None),
        (0.05, 50_000),
        (1.0, 1_000_000),
        ("5%", 50_000),
        (" 12.5 % ", 125_000),
        ("100%", 1_000_000),
        (2, 2),
        (300_000, 300_000),
        ("300000", 300_000),
        ("1B", 1),
        ("2 KiB", 2048),
    ],
    ids=repr,
)
def test_parse_budget(budget, size):
    assert parse_budget(budget, 1_000_000) == size


ALLOWED = (
    "`budget` must be a fraction of AdamW's momentum as a float in (0, 1] or a text such as '5%', or bytes as an "
    "integer of at least 2 or a text such as '512MiB', got "
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


def test_one_is_ambiguous():
    message = "`budget` 1 could mean one byte or all of AdamW's momentum; write '1B' or 1.0."
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_budget(1, 1_000_000)


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


@pytest.mark.parametrize(
    ("share", "text"), [(0.9742, "97.4%"), (0.0, "0.0%"), (-0.0004, "0.0%"), (-0.5, "-50.0%"), (1.0, "100.0%")]
)
def test_shares(share, text):
    assert format_share(share) == text
