"""Draw completions from a model whose weights may be sharded."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from examples.preference.log_probs import positions


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


@torch.no_grad()
def sample_and_decode_greedily(model: Any, prompts: Tensor, attended: Tensor, randoms: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sampled and a greedy completion of every prompt, drawn in the same forward passes.

    All ranks run the same number of forward passes, one per new token, whatever they draw: the weights of a sharded
    model are gathered from all of them in each pass. Tokens after the end of a completion are the caller's to ignore.

    Args:
        model: A model from transformers, in evaluation mode.
        prompts: Tokens ``[prompts, length]``, padded on the left.
        attended: 1 for tokens, 0 for padding, ``[prompts, length]``.
        randoms: Numbers between 0 and 1 ``[prompts, new tokens]``; each chooses one token of the samples.

    Returns:
        Sampled and greedy tokens, each ``[prompts, new tokens]``.
    """
    count = len(prompts)
    tokens, attended = prompts.repeat(2, 1), attended.repeat(2, 1)
    place, cache, drawn = positions(attended), None, []
    for random in randoms.unbind(-1):
        output = model(
            input_ids=tokens, attention_mask=attended, position_ids=place, past_key_values=cache, use_cache=True
        )
        cache, logits = output.past_key_values, output.logits[:, -1]
        sampled = inverse_cdf(logits[:count], random.to(logits.device))
        tokens = torch.cat([sampled, logits[count:].argmax(-1)]).unsqueeze(-1)
        attended = torch.cat([attended, attended.new_ones(2 * count, 1)], dim=-1)
        place = place[:, -1:] + 1
        drawn.append(tokens)
    sampled, greedy = torch.cat(drawn, dim=-1).split(count)
    return sampled, greedy


def inverse_cdf(logits: Tensor, random: Tensor) -> Tensor:
    """Return the token at which each row's cumulative probability passes a random number ``[rows]``.

    Args:
        logits: ``[rows, vocabulary]``.
        random: Between 0 and 1, in float64 ``[rows]``: a sum over a large vocabulary in float32 would not reach 1.
    """
    reached = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(reached, (random * reached[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
