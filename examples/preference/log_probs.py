"""Log-probabilities of completions, and the divergence between two models, summed over tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from examples.pretrain.decoding import positions


class Sequences(NamedTuple):
    """Prompts and completions, padded on either side to one length.

    Attributes:
        tokens: ``[rows, length]``.
        attended: 1 for tokens, 0 for padding, ``[rows, length]``.
        completion: Whether a token belongs to the part that is judged, ``[rows, length]``; never the first token.
    """

    tokens: Tensor
    attended: Tensor
    completion: Tensor


def completion_logits(model: Any, sequences: Sequences) -> Tensor:
    """Return what a causal language model predicts for the tokens of all completions, in float32.

    Args:
        model: A model from transformers. It is called, because only ``forward`` gathers sharded weights.
        sequences: The rows.

    Returns:
        Logits ``[tokens of all completions, vocabulary]``, row after row.
    """
    logits = model(
        input_ids=sequences.tokens,
        attention_mask=sequences.attended,
        position_ids=positions(sequences.attended),
        use_cache=False,
    ).logits
    return logits[:, :-1][sequences.completion[:, 1:]].float()


def log_probs(logits: Tensor, sequences: Sequences) -> Tensor:
    """Return the log-probability of every completion given its prompt ``[rows]``, in nats."""
    targets = sequences.tokens[:, 1:][sequences.completion[:, 1:]]
    return _sum_per_row(-F.cross_entropy(logits, targets, reduction="none"), sequences)


def kl_divergence(logits: Tensor, reference: Tensor, sequences: Sequences) -> Tensor:
    """Return the divergence of a policy from its reference along every completion ``[rows]``, in nats.

    It is the sum over tokens of KL(policy | reference) between the two predictions, exact over the vocabulary. Where
    the policy drew the completions, this estimates the divergence between the distributions of whole completions.
    Gradients go through the predictions, not through the choice of the completions.

    Args:
        logits: Of the policy, from `completion_logits`.
        reference: Of the reference.
        sequences: The rows.
    """
    pointwise = F.kl_div(reference.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True)
    return _sum_per_row(pointwise.sum(-1), sequences)


def _sum_per_row(values: Tensor, sequences: Sequences) -> Tensor:
    mask = sequences.completion[:, 1:]
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(-1)
