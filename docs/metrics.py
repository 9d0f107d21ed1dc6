"""Print docs/metrics.md, what the metrics measure and callbacks log: ``python docs/metrics.py > docs/metrics.md``."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from docstrings import bullets, code, line, summary, table  # noqa: E402

import lightning_memopt as lm  # noqa: E402
from lightning_memopt.callbacks.memory_monitor import PROGRESS_BAR  # noqa: E402
from lightning_memopt.callbacks.memory_report import SCALARS  # noqa: E402
from lightning_memopt.metrics.base import SnapshotMetric  # noqa: E402

INTRO = """# All metrics, and what is logged

`python docs/metrics.py` generates this page from the sources; a test checks that it is up to date.

Every metric of `lightning_memopt.metrics` is updated with a snapshot of an optimizer, on every process, and combines
them. Its function returns the same numbers for one process. [memory.md](memory.md#as-metrics) shows how to use them,
the [reference](reference/memory.rst) has more. `OptimizerMemoryMonitor` logs what has a name in the last column, at the
trainer's `global_step`.
"""
LOGGED = f"""
## Logged by OptimizerMemoryMonitor

The scalars of the tables above go to all loggers of the trainer, at every measurement. The progress bar shows
`{PROGRESS_BAR}`, which is `memopt/saved` in percent. [memory.md](memory.md#during-training) says when it measures, and
shows its table, its file and its figures.
"""
ADAPTIVE = """
## Logged by AdaptiveMomentum

With `log=True`, at every decision ([adaptive.md](adaptive.md)). With an `optimizer_idx` of 1, names start with
`memopt/rank_1/` and so on.
"""


def metric_classes() -> list[type[SnapshotMetric]]:
    """Return the public classes of metrics."""
    public = (getattr(lm.metrics, name) for name in lm.metrics.__all__)
    return [thing for thing in public if isinstance(thing, type)]


def function_of(metric: type[SnapshotMetric]) -> Any:
    """Return the function of one snapshot that belongs to a metric."""
    return getattr(lm.metrics, re.sub(r"(?<!^)(?=[A-Z])", "_", metric.__name__).lower())


def results(metric: type[SnapshotMetric]) -> list[str]:
    """Return the names of what a metric computes, for a model of one block."""
    model = torch.nn.ModuleDict({"<block>": torch.nn.Embedding(8, 8)})
    optimizer = lm.MemOpt(model.named_parameters(), recipe="adamw")
    measured = metric()
    measured.update(lm.take_snapshot(optimizer, model))
    return [name.removesuffix(".weight") for name in measured.compute()]


def unit(metric: type[SnapshotMetric]) -> str:
    """Return the unit of a metric's results."""
    if metric is lm.metrics.MomentumAllocation:
        return "rank"
    return "fraction of AdamW's" if metric.shares else "bytes"


def rows(metric: type[SnapshotMetric]) -> Iterator[tuple[str, str, str, str]]:
    """Yield a metric's results: name, unit, what it counts, and the name of the monitor's scalar.

    Raises:
        ValueError: If a docstring does not say what a result counts, or says it of what is no result.
    """
    said = bullets(function_of(metric)) | bullets(metric)
    found = results(metric)
    patterns = {name: re.sub("<.*>", "*", name) for name in said}
    for name in found:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.values()):
            raise ValueError(f"No docstring of {metric.__name__} says what its result `{name}` counts: add a line.")
    logged = {key: f"memopt/{scalar}" for scalar, key in SCALARS.items()}
    for name, meaning in said.items():
        if not fnmatch.filter(found, patterns[name]):
            raise ValueError(
                f"A docstring of {metric.__name__} names `{name}`, which is no result: {', '.join(found)}."
            )
        yield code(name), unit(metric), line(meaning), code(logged[name]) if name in logged else ""


def page() -> Iterator[str]:
    """Yield the parts of the page."""
    yield INTRO
    for metric in metric_classes():
        yield f"## {metric.__name__}\n"
        yield f"{summary(metric)}\nIts function is {code(function_of(metric).__name__)}.\n"
        yield table(("result", "unit", "what it counts", "logged as"), rows(metric))
        yield ""
    yield LOGGED.lstrip()
    yield ADAPTIVE.lstrip()
    yield table(
        ("scalar", "what it is"), ((code(name), line(said)) for name, said in bullets(lm.AdaptiveMomentum).items())
    )


if __name__ == "__main__":
    print("\n".join(page()))
