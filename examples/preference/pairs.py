"""Preference pairs: a function's own body, and the same body with a fault."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch

from examples.preference.corruption import corrupt
from examples.preference.data import FunctionsDataModule, padded
from examples.preference.functions import Function
from examples.preference.log_probs import Sequences


class Pair(NamedTuple):
    """Tokens of a prompt and of two completions."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class PairDataModule(FunctionsDataModule):
    """Pairs of a real body and a corrupted one, for the same signature and docstring.

    The fault follows from the seed and the prompt, so it is the same in every epoch and on every rank.

    Args:
        seq_len: The most tokens of a prompt with a completion. Longer functions are left out.
        **kwargs: As in `FunctionsDataModule`.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(self, seq_len: int = 128, **kwargs: Any) -> None:
        if seq_len < 3:
            raise ValueError(f"`seq_len` must be at least 3, got {seq_len}.")
        super().__init__(**kwargs)
        self.seq_len = seq_len

    def example(self, function: Function) -> Pair | None:
        """Return the pair of a function, or None if it is too long or cannot be corrupted."""
        digest = hashlib.sha256(f"{self.seed}:{function.prompt}".encode()).digest()
        rejected = corrupt(function.body, int.from_bytes(digest[:8], "big"))
        if rejected is None:
            return None
        pair = Pair(*(self.tokenizer(text).input_ids for text in (function.prompt, function.body, rejected)))
        longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        return pair if longest <= self.seq_len else None

    def collate(self, examples: list[Pair]) -> Sequences:
        """Return the pairs ``[2 * pairs, longest]``: chosen, rejected, chosen and so on, padded on the right."""
        rows = [(pair.prompt, completion) for pair in examples for completion in (pair.chosen, pair.rejected)]
        tokens, attended = padded([[*prompt, *completion] for prompt, completion in rows], left=False)
        starts = torch.tensor([len(prompt) for prompt, _ in rows]).unsqueeze(-1)
        return Sequences(tokens, attended, (torch.arange(tokens.shape[1]) >= starts) & attended.bool())
