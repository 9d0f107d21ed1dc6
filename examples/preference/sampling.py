"""Draw completions from a model whose weights may be sharded."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from examples.pretrain.decoding import decode, most_likely


def uniforms(seed: int, step: int, prompts: list[str], count: int) -> Tensor:
    """Return random numbers between 0 and 1 ``[prompts, count]`` that depend on nothing but the arguments.

    So a prompt's completion does not depend on the rank that draws it, and a resumed run draws what it would have.

    Args:
        seed: Of the run.
        step: The trainer's step.
        prompts: The prompts as text.
        count: Random numbers per prompt.
    """
    rows = []
    for prompt in prompts:
        digest = hashlib.sha256(repr((seed, step, prompt)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def sample_and_decode_greedily(model: Any, prompts: Tensor, attended: Tensor, randoms: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sampled and a greedy completion of every prompt, drawn in the same forward passes.

    Args:
        model: A model from transformers, in evaluation mode.
        prompts: Tokens ``[prompts, length]``, padded on the left.
        attended: 1 for tokens, 0 for padding, ``[prompts, length]``.
        randoms: Numbers between 0 and 1 ``[prompts, new tokens]``; each chooses one token of the samples.

    Returns:
        Sampled and greedy tokens, each ``[prompts, new tokens]``.
    """
    count, new_tokens = randoms.shape

    def choose(logits: Tensor, step: int) -> Tensor:
        sampled = inverse_cdf(logits[:count], randoms[:, step].to(logits.device))
        return torch.cat([sampled, most_likely(logits[count:], step)])

    sampled, greedy = decode(model, prompts.repeat(2, 1), attended.repeat(2, 1), new_tokens, choose).split(count)
    return sampled, greedy


def inverse_cdf(logits: Tensor, random: Tensor) -> Tensor:
    """Return the token at which each row's cumulative probability passes a random number ``[rows]``.

    Args:
        logits: ``[rows, vocabulary]``.
        random: Between 0 and 1, in float64 ``[rows]``: a sum over a large vocabulary in float32 would not reach 1.
    """
    reached = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(reached, (random * reached[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
