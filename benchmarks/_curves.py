"""Losses of runs, as the pages compare them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def loss_or_inf(result: Mapping[str, Any]) -> float:
    """Return the loss of a run; infinity if it diverged."""
    return math.inf if result["loss"] is None else result["loss"]
