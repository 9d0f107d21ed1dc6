"""What the loops in ``plain_pytorch``, ``fabric`` and ``hf_trainer`` have in common: their options."""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.pretrain.sizes import LLAMA


def options(description: str, folder: str) -> argparse.ArgumentParser:
    """Return a parser of these options.

    Args:
        description: What the program does.
        folder: Where it keeps checkpoints, unless ``--folder`` says otherwise.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--root", help="a folder of text files; without one, Python's standard library")
    parser.add_argument("--model", choices=LLAMA, default="llama-3m", help="a size")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens of the vocabulary")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step, over all processes")
    parser.add_argument("--recipe", default="adapm_lean", help="a name from docs/recipes.md, or a recipe file")
    parser.add_argument("--lr", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--steps", type=int, default=100, help="steps of the whole run")
    parser.add_argument("--save-every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--folder", type=Path, default=Path(folder), help="where the checkpoints are")
    return parser


def share(batch_size: int, batches: int) -> int:
    """Return the sequences of each of the equal batches that make one step.

    Raises:
        ValueError: If they cannot be equal.
    """
    if batch_size % batches:
        raise ValueError(
            f"`--batch-size` {batch_size} must be a multiple of {batches}, because the processes divide it into "
            f"{batches} equal batches."
        )
    return batch_size // batches
