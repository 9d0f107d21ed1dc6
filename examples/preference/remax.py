"""Policy gradients with the greedy completion's reward as the baseline (ReMax, Li et al. 2023, arXiv 2310.10505)."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.preference.log_probs import Sequences, completion_logits, kl_divergence, log_probs
from examples.preference.policy import PolicyAndReference
from examples.preference.prompts import Prompts
from examples.preference.rewards import body_of, completion_length, syntax_reward
from examples.preference.sampling import sample_and_decode_greedily, uniforms


class ReMax(PolicyAndReference):
    """Train a policy to complete functions that parse.

    For every prompt, the policy draws one completion at random and one greedily. The loss is REINFORCE's, with the
    difference of the two rewards as the advantage, plus a multiple of the divergence from the reference. Both are sums
    over the tokens of the sampled completion. The reward is `syntax_reward`.

    Args:
        path: A folder that transformers' ``save_pretrained`` wrote, with the tokenizer.
        max_new_tokens: Tokens to draw for every completion, on all ranks, wherever in them it ends.
        kl_coefficient: Weight of the divergence from the reference, in units of reward per nat.
        seed: Of the sampling.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        path: str = "runs/preference/model",
        max_new_tokens: int = 48,
        kl_coefficient: float = 0.01,
        seed: int = 0,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
        if kl_coefficient < 0:
            raise ValueError(f"`kl_coefficient` must not be negative, got {kl_coefficient}.")
        super().__init__(path)
        self.save_hyperparameters()
        self.max_new_tokens, self.kl_coefficient, self.seed = max_new_tokens, kl_coefficient, seed

    def setup(self, stage: str) -> None:
        """Check that prompts and completions fit the model."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.check_fits(data.max_prompt_tokens + self.max_new_tokens)

    def training_step(self, batch: Prompts, batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log rewards and divergence."""
        sequences, reward, baseline = self.roll_out(batch, self.global_step)
        logits = completion_logits(self.model, sequences)
        with torch.no_grad():
            reference = completion_logits(self.reference, sequences)
        kl = kl_divergence(logits, reference, sequences).mean()
        policy_gradient = -((reward - baseline) * log_probs(logits, sequences)).mean()
        values = {"train_reward": reward.mean(), "train_greedy_reward": baseline.mean(), "train_kl": kl}
        self.log_dict(values, prog_bar=True, batch_size=len(reward), sync_dist=True)
        return policy_gradient + self.kl_coefficient * kl

    def validation_step(self, batch: Prompts, batch_idx: int) -> None:
        """Log the mean rewards of sampled and greedy completions, and the divergence of the sampled ones.

        Random numbers are the same in every validation, so that a difference between two is one of the policy.
        """
        sequences, reward, baseline = self.roll_out(batch, -1)
        kl = kl_divergence(
            completion_logits(self.model, sequences), completion_logits(self.reference, sequences), sequences
        )
        values = {"val_reward": reward.mean(), "val_greedy_reward": baseline.mean(), "val_kl": kl.mean()}
        self.log_dict(values, prog_bar=True, batch_size=len(reward), sync_dist=True)

    def roll_out(self, batch: Prompts, step: int) -> tuple[Sequences, Tensor, Tensor]:
        """Return the prompts with sampled completions, the samples' rewards and the greedy completions' ``[prompts]``.

        Args:
            batch: The prompts.
            step: Which random numbers to use.
        """
        randoms = uniforms(self.seed, step, batch.texts, self.max_new_tokens)
        sampled, greedy = sample_and_decode_greedily(self.model, batch.tokens, batch.attended, randoms)
        lengths, reward = self._score(batch.texts, sampled)
        _, baseline = self._score(batch.texts, greedy)
        within = torch.arange(self.max_new_tokens, device=sampled.device) < lengths.unsqueeze(-1)
        sequences = Sequences(
            tokens=torch.cat([batch.tokens, sampled], dim=-1),
            attended=torch.cat([batch.attended, torch.ones_like(sampled)], dim=-1),
            completion=torch.cat([torch.zeros_like(batch.attended, dtype=torch.bool), within], dim=-1),
        )
        return sequences, reward, baseline

    def _score(self, prompts: list[str], completions: Tensor) -> tuple[Tensor, Tensor]:
        """Return lengths in tokens and rewards ``[prompts]``."""
        lengths, rewards = [], []
        for prompt, tokens in zip(prompts, completions.tolist(), strict=True):
            lengths.append(completion_length(self.tokenizer, tokens))
            rewards.append(syntax_reward(prompt, body_of(self.tokenizer, tokens[: lengths[-1]])))
        return torch.tensor(lengths, device=self.device), torch.tensor(rewards, device=self.device)
