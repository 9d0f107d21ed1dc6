"""The reports of OptimizerMemoryMonitor: a table, a summary line, and a JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.model_summary import get_human_readable_count

from lightning_memopt.memory.rows import REST, ROWS
from lightning_memopt.memory.sizes import format_bytes, format_share
from lightning_memopt.memory.snapshot import BlockFacts, Snapshot

# Logged scalar (after memopt/) → key of the metrics' results.
SCALARS = {
    "state_bytes": "total",
    "state_bytes_rank": "rank",
    "state_bytes_global": "global",
    "momentum_bytes": "momentum",
    "projection_bytes": "projections",
    "second_moment_bytes": "second_moment",
    "other_bytes": "other",
    "saved": "saved",
    "saved_momentum": "saved_momentum",
    "saved_second_moment": "saved_second_moment",
    "peak_bytes": "peak",
    "parameter_bytes": "parameters",
    "gradient_bytes": "gradients",
    "buffer_bytes": "buffers",
    "unsharded_bytes": "unsharded",
    "scratch_bytes": "scratch",
    "rest_bytes": "rest",
}
# Logged scalar → what plans call this part of the peak.
PEAK_PARTS = {
    "parameter_bytes": ROWS["parameters"],
    "gradient_bytes": ROWS["gradients"],
    "buffer_bytes": ROWS["buffers"],
    "state_bytes_rank": ROWS["optimizer_state"],
    "unsharded_bytes": ROWS["unsharded"],
    "scratch_bytes": ROWS["scratch"],
    "rest_bytes": REST,
}
COLUMNS = ("role", "blocks", "params", "momentum", "second moment", "state", "AdamW", "saved")


def rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    """Return the rows of the table: one per combination of role and kinds, then the total."""
    groups: dict[tuple[str, str, str], list[BlockFacts]] = {}
    for block in snapshot.blocks:
        groups.setdefault((block.role, block.momentum, block.second_moment), []).append(block)
    lines = [
        (role, *_numbers(blocks)[:2], _with_ranks(momentum, blocks), second_moment, *_numbers(blocks)[2:])
        for (role, momentum, second_moment), blocks in groups.items()
    ]
    count, parameters, *sizes = _numbers(snapshot.blocks)
    return [*lines, ("all", count, parameters, "", "", *sizes)]


def show_plan(snapshot: Snapshot, title: str) -> None:
    """Print the table of kinds and bytes by role, in color if rich is installed."""
    lines = rows(snapshot)
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title, snapshot.table(), sep="\n")
        return
    console = Console()
    narrow = console.width < 100
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, int(not narrow)), pad_edge=False)
    for column in COLUMNS:
        title = column.replace(" ", "\n") if narrow else column  # room for the kinds
        kind = column in ("momentum", "second moment")
        shown.add_column(title, justify="left" if kind or column == "role" else "right", no_wrap=not kind)
    for line in lines[:-1]:
        shown.add_row(*line)
    shown.add_section()
    shown.add_row(*lines[-1], style="bold")
    console.print(shown)


def summary(values: Mapping[str, float], world_size: int) -> str:
    """Return a summary of a measurement, in one line.

    Args:
        values: An entry of the monitor's history.
        world_size: Number of processes.
    """
    size = {name: format_bytes(round(values[name])) for name in values if name.endswith(("_bytes", "_rank"))}
    parts = {name: size[scalar] for scalar, name in PEAK_PARTS.items() if values.get(scalar)}
    one, of = (f" in all, {size['state_bytes_rank']} on one rank", " of a rank") if world_size > 1 else ("", "")
    return (
        f"Optimizer state: {size['state_bytes']}{one}; saved "
        f"{format_share(values['saved'])} of AdamW's (momentum {format_share(values['saved_momentum'])}, second moment "
        f"{format_share(values['saved_second_moment'])}). Peak memory{of}: {size['peak_bytes']} ("
        f"{', '.join(f'{name} {text}' for name, text in parts.items())})."
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(content, indent=1))
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def block_table(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Return the JSON file's entries for all blocks."""
    return [
        {
            "name": block.name,
            "role": block.role,
            "shape": list(block.shape),
            "momentum": block.momentum,
            "rank": block.rank,
            "second_moment": block.second_moment,
            "state_bytes": block.state.total,
            "adamw_bytes": block.adamw_bytes,
        }
        for block in snapshot.blocks
    ]


def _numbers(blocks: Sequence[BlockFacts]) -> tuple[str, str, str, str, str]:
    state, adamw = sum(block.state.total for block in blocks), sum(block.adamw_bytes for block in blocks)
    due = sum(block.adamw_bytes for block in blocks if not block.pending)
    return (
        f"{len(blocks)}",
        get_human_readable_count(sum(prod(block.shape) for block in blocks)).strip(),
        format_bytes(state),
        format_bytes(adamw),
        format_share(1 - state / due) if due else "",
    )


def _with_ranks(momentum: str, blocks: Iterable[BlockFacts]) -> str:
    ranks = sorted({block.rank for block in blocks if block.rank is not None})
    if not ranks:
        return momentum
    return f"{momentum} r={ranks[0]}" if len(ranks) == 1 else f"{momentum} r={ranks[0]}–{ranks[-1]}"
