"""Let one start of the ranks run many cases: each is tried, and a test of its own says how it went."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest


def attempt(check: Callable[..., Any], *args: Any) -> str:
    """Return the traceback of a check that fails, or nothing."""
    try:
        check(*args)
    except (Exception, pytest.fail.Exception):
        return traceback.format_exc()
    return ""
