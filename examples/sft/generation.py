"""Greedy generation through a sharded model, and how many of the answers are Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

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
        """Choose the tasks.

        Raises:
            ValueError: If there are none.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        longest = data.max_length - self.max_new_tokens
        short = [
            example
            for example in data.examples["val"]
            if len(example.answer) <= self.max_new_tokens and len(example.prompt) <= longest
        ]
        if not short:
            raise ValueError(
                f"No validation function has a prompt of at most {longest} tokens and an answer of at most "
                f"{self.max_new_tokens}. Change `max_new_tokens` of ParseRate, which is taken off the data's "
                f"`max_length` ({data.max_length}), or use more files."
            )
        self.tasks = short[: self.num_tasks]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate this rank's answers and log the share of all ranks."""
        ranks: dict[str, int] = trainer.datamodule.ranks  # type: ignore[attr-defined]
        mine = self.tasks[ranks["rank"] :: ranks["num_replicas"]]
        # A rank without a task takes part in the collectives of the others.
        prompts = [example.prompt for example in mine or self.tasks[:1]]
        tokenizer: Any = pl_module.tokenizer
        answers = generate(
            pl_module.model,  # type: ignore[arg-type]
            prompts,
            self.max_new_tokens,
            # The same on all ranks, so that the result does not depend on their number.
            length=max(len(example.prompt) for example in self.tasks),
            pad=tokenizer.eos_token_id,
            device=pl_module.device,
        )
        texts = [tokenizer.decode(until(answer, tokenizer.eos_token_id)) for answer in answers.tolist()]
        passed = [parses(example.pair.task, text) for example, text in zip(mine, texts, strict=False)]
        # Sums, because the share of a rank without a task is not a number.
        counts = torch.tensor([sum(passed), len(passed)], device=pl_module.device)
        good, all_tasks = trainer.strategy.reduce(counts, reduce_op="sum")
        pl_module.log("parses", good / all_tasks, prog_bar=True, sync_dist=True)


@torch.no_grad()
def generate(
    model: Callable[..., Any],
    prompts: Sequence[list[int]],
    steps: int,
    *,
    length: int,
    pad: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the most likely continuations, ``[prompts, steps]``.

    All ranks must call this function with the same ``steps``, because a sharded model gathers its weights whenever it
    is called. ``model.generate`` returns when this rank's answers have ended, and leaves the others waiting. With
    adapters, it does not even call the module that gathers.

    Args:
        model: A causal language model from transformers, or one with adapters.
        prompts: Tokens; at least one prompt.
        steps: Tokens to generate.
        length: Length to which prompts are padded, on their left.
        pad: The token for that; attention does not see it.
        device: Device of the model.
    """
    tokens = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, found = None, []
    for _ in range(steps):
        output = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
        found.append(tokens)
        mask, positions = torch.cat([mask, torch.ones_like(tokens)], -1), positions[:, -1:] + 1
    return torch.cat(found, -1)


def until(tokens: list[int], end: int) -> list[int]:
    """Return the tokens before the first ``end``."""
    return tokens[: tokens.index(end)] if end in tokens else tokens
