"""Completions of padded prompts, one token at a time, from a model whose weights may be sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def padded(rows: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Return rows of tokens as one tensor, and 1 where they are, 0 where they are padded: ``[rows, longest]`` each.

    Padding is the token 0, which nothing attends to.

    Args:
        rows: Tokens.
        left: Whether padding comes first.
    """
    tensors = [torch.tensor(row) for row in rows]
    side = "left" if left else "right"
    tokens = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side)
    ones = [torch.ones_like(row) for row in tensors]
    return tokens, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


def positions(attended: Tensor) -> Tensor:
    """Return the position of every token in its row ``[rows, length]``, counted without padding."""
    return (attended.cumsum(-1) - 1).clamp(min=0)


def most_likely(logits: Tensor, step: int) -> Tensor:
    """Return the token with the largest logit of every row ``[rows]``: greedy decoding."""
    return logits.argmax(-1)


@torch.no_grad()
def decode(
    model: Any,
    prompts: Tensor,
    attended: Tensor,
    new_tokens: int,
    choose: Callable[[Tensor, int], Tensor] = most_likely,
) -> Tensor:
    """Return completions ``[prompts, new_tokens]``, with the model's cache of keys and values.

    All ranks must ask for as many tokens, because a sharded model gathers its weights whenever it is called. So nothing
    ends early: what comes after the end of a completion is the caller's to ignore. ``model.generate`` returns when this
    rank's completions have ended, and leaves the other ranks waiting. With adapters, it does not even call the module
    that gathers.

    Args:
        model: A causal language model from transformers, or one with adapters, in evaluation mode.
        prompts: Tokens ``[prompts, length]``, padded on the left.
        attended: 1 for tokens, 0 for padding, ``[prompts, length]``.
        new_tokens: Tokens per completion.
        choose: Gets logits ``[prompts, vocabulary]`` and the number of tokens before, returns tokens ``[prompts]``.
    """
    tokens, place, cache, chosen = prompts, positions(attended), None, []
    for step in range(new_tokens):
        output = model(
            input_ids=tokens, attention_mask=attended, position_ids=place, past_key_values=cache, use_cache=True
        )
        cache, tokens = output.past_key_values, choose(output.logits[:, -1], step).unsqueeze(-1)
        chosen.append(tokens)
        attended, place = torch.cat([attended, torch.ones_like(tokens)], dim=-1), place[:, -1:] + 1
    return torch.cat(chosen, dim=-1)
