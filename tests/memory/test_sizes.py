"""Sizes in bytes, as text and as numbers."""

from __future__ import annotations

import re

import pytest

from lightning_memopt.memory.sizes import format_bytes, format_share, parse_bytes


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
        ("24G", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("512 m", 512 * 2**20),
        ("7b", 7),
    ],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "1,5 GB", "-3 MB", "1.5", "0.5 B", "12 X", "1  GB", "1e9", "nan", "٣ MB"])
def test_what_is_no_size(text):
    message = (
        "A size must be a whole number of bytes, or a number and one of B, KiB, MiB, GiB, TiB, kB, MB, GB, TB (K, M, G "
        f"and T mean KiB, MiB, GiB and TiB), such as '512MiB' or '1.5 GB', got {text!r}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_bytes(text)


@pytest.mark.parametrize("value", [None, 3, 2.5, True], ids=repr)
def test_a_size_is_a_text(value):
    with pytest.raises(TypeError, match=re.escape(f"A size must be a string such as '512MiB', got {value!r}.")):
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


@pytest.mark.parametrize(
    ("share", "text"), [(0.9742, "97.4%"), (0.0, "0.0%"), (-0.0004, "0.0%"), (-0.5, "-50.0%"), (1.0, "100.0%")]
)
def test_shares(share, text):
    assert format_share(share) == text
