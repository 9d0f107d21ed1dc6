"""A LightningModule around a causal language model from transformers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel


class LanguageModel(LightningModule):
    """Train a causal language model on batches of tokens ``[batch, sequence]``.

    The class has no ``configure_optimizers``, because the command line supplies the optimizer. In Python, assign one::

        module.configure_optimizers = lambda: lightning_memopt.AdaPMLean(module.named_parameters(), lr=3e-3)

    Args:
        model: A model that returns a loss when it is given labels, such as ``LlamaForCausalLM``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        # Models from transformers start in evaluation mode, and Lightning keeps that mode.
        self.model.train()

    def setup(self, stage: str) -> None:
        """Check that the tokens fit the model, because an index out of range crashes a GPU without a clear error.

        Raises:
            ValueError: If the vocabulary or the sequences exceed those of the model.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        for name, ours in (("vocab_size", "vocab_size"), ("seq_len", "max_position_embeddings")):
            given, limit = getattr(data, name, None), getattr(self.model.config, ours)
            if given is not None and given > limit:
                raise ValueError(
                    f"The data's `{name}` is {given}, the model's `{ours}` only {limit}: raise the model's to {given}."
                )

    def loss(self, batch: Tensor) -> Tensor:
        """Return the mean negative log-likelihood per predicted token, in nats."""
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return and log the loss of a batch."""
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the mean over all tokens; sequences have equal lengths, so batches are weighted by their size."""
        self.log("val_loss", self.loss(batch), prog_bar=True, batch_size=len(batch), sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the mean over all tokens."""
        self.log("test_loss", self.loss(batch), batch_size=len(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the most likely next token after each position."""
        return self.model(input_ids=batch, use_cache=False).logits.argmax(-1)
