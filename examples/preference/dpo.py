"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.preference.log_probs import Sequences, completion_logits, kl_divergence, log_probs
from examples.preference.policy import PolicyAndReference


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the loss of every pair and its reward margin (equation 7 of the paper).

    Args:
        policy: Log-probabilities ``[pairs, 2]`` of the chosen and of the rejected completion, in nats.
        reference: Those of the reference.
        beta: Weight of the divergence from the reference in the objective that the loss stands for.

    Returns:
        Losses ``[pairs]`` and margins ``[pairs]``: by how much the implicit reward, beta times the log-ratio of policy
        and reference, is higher for the chosen completion.
    """
    rewards = beta * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    return -F.logsigmoid(margins), margins


class DPO(PolicyAndReference):
    """Train a policy to prefer the chosen completion of every pair.

    A batch holds the chosen and the rejected completion of a pair in neighboring rows, so that every model runs once.

    Args:
        path: A folder that transformers' ``save_pretrained`` wrote, with the tokenizer.
        beta: A larger value keeps the policy closer to the reference.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If ``beta`` is not positive.
    """

    def __init__(self, path: str = "runs/preference/model", beta: float = 0.1) -> None:
        if beta <= 0:
            raise ValueError(f"`beta` must be positive, got {beta}.")
        super().__init__(path)
        self.save_hyperparameters()
        self.beta = beta

    def setup(self, stage: str) -> None:
        """Check that the pairs fit the model."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.check_fits(data.max_length)

    def training_step(self, batch: Sequences, batch_idx: int) -> Tensor:
        """Return the mean loss of the pairs, and log it with their reward margin."""
        policy = log_probs(completion_logits(self.model, batch), batch)
        with torch.no_grad():
            reference = log_probs(completion_logits(self.reference, batch), batch)
        losses, margins = dpo_loss(policy.view(-1, 2), reference.view(-1, 2), self.beta)
        values = {"train_loss": losses.mean(), "train_margin": margins.mean()}
        self.log_dict(values, prog_bar=True, batch_size=len(losses), sync_dist=True)
        return values["train_loss"]

    def validation_step(self, batch: Sequences, batch_idx: int) -> None:
        """Log means over all pairs.

        ``val_accuracy`` is the share of pairs with a positive margin: 0 before the first step, where all margins are 0.
        ``val_kl`` is the divergence from the reference along the given completions, in nats per completion.
        """
        logits, reference = completion_logits(self.model, batch), completion_logits(self.reference, batch)
        pairs = [log_probs(each, batch).view(-1, 2) for each in (logits, reference)]
        losses, margins = dpo_loss(*pairs, self.beta)
        values = {
            "val_loss": losses.mean(),
            "val_accuracy": (margins > 0).float().mean(),
            "val_margin": margins.mean(),
            "val_kl": kl_divergence(logits, reference, batch).mean(),
        }
        self.log_dict(values, prog_bar=True, batch_size=len(losses), sync_dist=True)
