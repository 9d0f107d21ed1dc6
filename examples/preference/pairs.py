"""Preference pairs: a function's own body, and the same body with a fault."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch

from examples.preference.corruption import corrupt
from examples.preference.data import PreferenceDataModule
from examples.preference.log_probs import Sequences
from examples.pretrain.decoding import padded
from examples.sft.functions import Pair


class Preference(NamedTuple):
    """Tokens of a prompt and of two completions."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class PairDataModule(PreferenceDataModule):
    """Pairs of a real body and a corrupted one, for the same signature and docstring.

    The fault follows from the seed and the prompt, so it is the same in every epoch and on every rank.

    Args:
        max_length: Tokens of a prompt with a completion; longer functions are left out.
        **kwargs: As in `PreferenceDataModule`.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(self, max_length: int = 128, **kwargs: Any) -> None:
        if max_length < 3:
            raise ValueError(f"`max_length` must be at least 3, got {max_length}.")
        super().__init__(**kwargs)
        self.max_length = max_length

    def example(self, pair: Pair) -> Preference | None:
        """Return the preference made from a function, or None if it is too long or cannot be corrupted."""
        digest = hashlib.sha256(f"{self.seed}:{pair.prompt}".encode()).digest()
        rejected = corrupt(pair.body, int.from_bytes(digest[:8], "big"))
        if rejected is None:
            return None
        completions = (self.tokenizer(text, add_special_tokens=False).input_ids for text in (pair.body, rejected))
        made = Preference(self.tokenizer(pair.prompt).input_ids, *completions)
        longest = len(made.prompt) + max(len(made.chosen), len(made.rejected))
        return made if longest <= self.max_length else None

    def collate(self, examples: list[Preference]) -> Sequences:
        """Return the pairs ``[2 * pairs, longest]``: chosen, rejected, chosen and so on, padded on the right."""
        rows = [(each.prompt, completion) for each in examples for completion in (each.chosen, each.rejected)]
        tokens, attended = padded([[*prompt, *completion] for prompt, completion in rows], left=False)
        starts = torch.tensor([len(prompt) for prompt, _ in rows]).unsqueeze(-1)
        return Sequences(tokens, attended, (torch.arange(tokens.shape[1]) >= starts) & attended.bool())
