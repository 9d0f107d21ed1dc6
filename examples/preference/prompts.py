"""Prompts alone: signatures and docstrings that a policy completes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from examples.preference.data import PreferenceDataModule
from examples.pretrain.decoding import padded
from examples.sft.functions import Pair


class Prompts(NamedTuple):
    """A batch of prompts.

    Attributes:
        tokens: ``[prompts, longest]``, padded on the left.
        attended: 1 for tokens, 0 for padding, ``[prompts, longest]``.
        texts: The prompts as text.
    """

    tokens: Tensor
    attended: Tensor
    texts: list[str]


class PromptDataModule(PreferenceDataModule):
    """Signatures with docstrings; the bodies are not used.

    Args:
        max_prompt_tokens: Longer prompts are left out.
        **kwargs: As in `PreferenceDataModule`.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(self, max_prompt_tokens: int = 64, **kwargs: Any) -> None:
        if max_prompt_tokens < 1:
            raise ValueError(f"`max_prompt_tokens` must be at least 1, got {max_prompt_tokens}.")
        super().__init__(**kwargs)
        self.max_prompt_tokens = max_prompt_tokens

    def example(self, pair: Pair) -> tuple[str, list[int]] | None:
        """Return a prompt as text and tokens, or None if it is too long."""
        tokens = self.tokenizer(pair.prompt).input_ids
        return (pair.prompt, tokens) if len(tokens) <= self.max_prompt_tokens else None

    def collate(self, examples: list[tuple[str, list[int]]]) -> Prompts:
        """Return a batch."""
        texts, rows = zip(*examples, strict=True)
        return Prompts(*padded(list(rows), left=True), list(texts))
