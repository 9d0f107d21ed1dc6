"""The command ``lightning-memopt inspect``: what a checkpoint holds."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Sequence

from lightning_memopt._registry import listed
from lightning_memopt.memory.sizes import format_bytes
from lightning_memopt.strategy.export.inspection import Inspection, SavedBlock, SavedOptimizer, inspect_checkpoint
from lightning_memopt.terminal.parser import EXPECTED, Parser
from lightning_memopt.terminal.tables import console, table

COLUMNS = ("momentum", "rank", "second moment", "blocks", "state")


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Args:
        args: The arguments after ``inspect`` on the command line.
    """
    parser = Parser(
        prog="lightning-memopt inspect",
        allow_abbrev=False,
        description="Show step, ranks, weights and optimizer state of a checkpoint, and compare its checksums. Nothing "
        "in the checkpoint is run.",
        epilog="Example: lightning-memopt inspect last.ckpt",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="A checkpoint: a directory, a file, or a URL.")
    parser.add_argument(
        "--no-verify", action="store_true", help="Do not compare checksums, which reads the whole checkpoint."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON, sizes in bytes, with every block.")
    options = parser.parse_args(args)
    try:
        found = inspect_checkpoint(options.checkpoint, verify=not options.no_verify)
    except (*EXPECTED, pickle.UnpicklingError) as error:
        parser.error(" ".join(str(error).split()))
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found)
    return 0


def _print(found: Inspection) -> None:
    shown = console()  # its error names the extra

    from rich.text import Text

    for line in _lines(found):
        shown.print(line, markup=False, soft_wrap=True)
    for number, optimizer in enumerate(found.optimizers):
        shown.print(_title(number, optimizer), markup=False, soft_wrap=True)
        made = table(COLUMNS, numbers=("rank", "blocks", "state"))
        for row in _rows(optimizer.blocks):
            made.add_row(*map(Text, row))
        if optimizer.blocks:
            shown.print()
            shown.print(made)


def _lines(found: Inspection) -> list[str]:
    size = format_bytes(sum(found.files.values()))
    kind = f"a directory of {len(found.files)} files" if found.format == "directory" else "one file"
    facts = [f"{name} {value}" for name, value in (("step", found.step), ("epoch", found.epoch)) if value is not None]
    if found.ranks is not None:
        facts.append(f"saved by {found.ranks} rank{'s' * (found.ranks > 1)}")
    if found.lightning is not None:
        facts.append(f"Lightning {found.lightning}")
    lines = [f"{found.path}: {kind}, {size}", ", ".join(facts)]
    lines.append(
        f"weights: {found.weights} tensors, {found.parameters:,} elements, {format_bytes(found.weight_bytes)}, "
        f"{', '.join(found.dtypes) or 'none'}{', averaged, beside those that train' if found.averaged else ''}"
    )
    why = " (another tool or an earlier version saved it)" if found.checksums == "none" else ""
    lines.append(f"checksums: {found.checksums}{why}")
    return [*filter(None, lines), *([] if found.optimizers else ["optimizer: none, the weights alone were saved"])]


def _title(number: int, optimizer: SavedOptimizer) -> str:
    by = f"recipe {listed(optimizer.recipes)}" if optimizer.recipes else "not of this package"
    rates = f", lr {listed([f'{rate:g}' for rate in optimizer.learning_rates])}" if optimizer.learning_rates else ""
    size = format_bytes(optimizer.bytes)
    bits = f", {listed(list(map(str, optimizer.weight_bits)))} bits of each weight" if optimizer.weight_bits else ""
    return f"optimizer {number}: {by}, {optimizer.parameters} parameters, {size} of state{bits}{rates}"


def _rows(blocks: Sequence[SavedBlock]) -> list[tuple[str, ...]]:
    """Return a row for all blocks of the same kinds and rank, the largest state first."""
    sizes: Counter[tuple[str, int | None, str]] = Counter()
    counts: Counter[tuple[str, int | None, str]] = Counter()
    for block in blocks:
        key = block.momentum, block.rank, block.second_moment
        sizes[key] += block.bytes
        counts[key] += 1
    return [
        (key[0], "" if key[1] is None else str(key[1]), key[2], str(counts[key]), format_bytes(size))
        for key, size in sizes.most_common()
    ]
