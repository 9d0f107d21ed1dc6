"""Read what is installed once: Lightning asks for every Trainer, and the answer is in a file of every package."""

from __future__ import annotations

import functools
from importlib import metadata

# Whoever imports the name later, as Lightning does, gets this one.
metadata.entry_points = functools.cache(metadata.entry_points)
