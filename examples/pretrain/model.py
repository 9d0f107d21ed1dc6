"""A LightningModule that trains a causal language model from random weights."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM

from examples.pretrain.sizes import config_of


class LanguageModel(LightningModule):
    """Train a LLaMA or a GPT-2 on batches of tokens ``[batch, sequence]``.

    The class has no ``configure_optimizers``, because the command line supplies the optimizer. In Python, assign one::

        module.configure_optimizers = lambda: lightning_memopt.AdaPMLean(module.named_parameters(), lr=2e-3)

    Args:
        model: Name of a size, from ``llama-1m`` to ``llama-7b`` and from ``gpt2-1m`` to ``gpt2-1558m``.
        vocab_size: Number of tokens, at least that of the data.
        seq_len: Longest sequence.
        config: Other arguments of transformers' configuration, such as ``{"num_key_value_heads": 2}``.
    """

    def __init__(
        self,
        model: str = "llama-3m",
        vocab_size: int = 2048,
        seq_len: int = 128,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForCausalLM.from_config(config_of(model, vocab_size, seq_len, config))
        # Models from transformers start in evaluation mode, and Lightning keeps that mode.
        self.model.train()
        self.val_loss = MeanMetric()

    def setup(self, stage: str) -> None:
        """Check that the tokens fit the model, because an index out of range crashes a GPU without a clear error.

        Raises:
            ValueError: If the vocabulary or the sequences exceed those of the model.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        for name, limit in (
            ("vocab_size", self.model.config.vocab_size),
            ("seq_len", self.model.config.max_position_embeddings),
        ):
            given = getattr(data, name, None)
            if given is not None and given > limit:
                raise ValueError(
                    f"The data's `{name}` is {given}, the model's only {limit}: set the model's `{name}` to {given}."
                )
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is not None:
            # What separates texts in the data begins and ends a generation, too.
            for config in (self.model.config, self.model.generation_config):
                config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id

    def loss(self, batch: Tensor) -> Tensor:
        """Return the mean negative log-likelihood per predicted token, in nats."""
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return and log the loss of a batch."""
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add to the mean over all tokens; sequences have equal lengths."""
        self.val_loss.update(self.loss(batch), weight=len(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all tokens of all processes, and the perplexity."""
        loss = self.val_loss.compute()
        self.val_loss.reset()
        self.log_dict({"val_loss": loss, "val_perplexity": loss.exp()}, prog_bar=True, sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the mean over all tokens."""
        self.log("test_loss", self.loss(batch), batch_size=len(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the most likely next token after each position."""
        return self.model(input_ids=batch, use_cache=False).logits.argmax(-1)
