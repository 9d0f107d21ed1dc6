"""How many of the answers that a model generates are Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from examples.pretrain.decoding import decode, padded
from examples.sft.chat import Example
from examples.sft.functions import parses


class ParseRate(Callback):
    """Log ``parses`` after validation: the share of generated answers that are Python.

    The tasks are the first of the validation split whose answers end within ``max_new_tokens``, so a perfect model
    reaches 1. Ranks divide them among themselves.

    Args:
        num_tasks: Number of tasks, over all ranks.
        max_new_tokens: Tokens per answer. Every answer takes as many steps, whether it has ended or not.

    Raises:
        ValueError: If a number is not positive.
    """

    def __init__(self, num_tasks: int = 32, max_new_tokens: int = 48) -> None:
        for name, value in (("num_tasks", num_tasks), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.num_tasks, self.max_new_tokens = num_tasks, max_new_tokens
        self.tasks: list[Example] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the tasks."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.tasks = self.tasks_of(data.examples["val"], data.max_length)

    def tasks_of(self, examples: Sequence[Example], max_length: int) -> list[Example]:
        """Return the tasks among the examples of the validation split.

        Args:
            examples: The examples.
            max_length: Tokens of a prompt with its answer, as for the data.

        Raises:
            ValueError: If there are none.
        """
        longest = max_length - self.max_new_tokens
        short = [
            example
            for example in examples
            if len(example.answer) <= self.max_new_tokens and len(example.prompt) <= longest
        ]
        if not short:
            raise ValueError(
                f"No validation function has a prompt of at most {longest} tokens and an answer of at most "
                f"{self.max_new_tokens}: change `max_new_tokens` of ParseRate, which is taken off the data's "
                f"`max_length` ({max_length}), or use more files."
            )
        return short[: self.num_tasks]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate this rank's answers and log the share of all ranks."""
        ranks: dict[str, int] = trainer.datamodule.ranks  # type: ignore[attr-defined]
        share = slice(ranks["rank"], None, ranks["num_replicas"])
        mine = self.tasks[share]
        # Padded together, so that no answer depends on the number of ranks.
        prompts = padded([example.prompt for example in self.tasks], left=True)
        # A rank without a task takes part in the collectives of the others.
        tokens, attended = (each[share if mine else slice(1)].to(pl_module.device) for each in prompts)
        answers = decode(pl_module.model, tokens, attended, self.max_new_tokens)
        tokenizer: Any = pl_module.tokenizer
        texts = [tokenizer.decode(until(answer, tokenizer.eos_token_id)) for answer in answers.tolist()]
        passed = [parses(example.pair.task, text) for example, text in zip(mine, texts, strict=False)]
        # Sums, because the share of a rank without a task is not a number.
        counts = torch.tensor([sum(passed), len(passed)], device=pl_module.device)
        good, all_tasks = trainer.strategy.reduce(counts, reduce_op="sum")
        pl_module.log("parses", good / all_tasks, prog_bar=True, sync_dist=True)


def until(tokens: list[int], end: int) -> list[int]:
    """Return the tokens before the first ``end``."""
    return tokens[: tokens.index(end)] if end in tokens else tokens
