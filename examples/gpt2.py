"""A GPT-2 from transformers, trained from random weights; its weights are transposed, and Q, K and V are fused."""

from __future__ import annotations

from transformers import GPT2Config, GPT2LMHeadModel

from examples.language_model import LanguageModel


class GPT2Module(LanguageModel):
    """A GPT-2 of any size; the arguments are those of ``transformers.GPT2Config``, without dropout.

    Args:
        vocab_size: Number of tokens, at least that of the data.
        n_embd: Width of the model.
        n_layer: Number of layers.
        n_head: Heads per layer.
        n_positions: Longest sequence.
    """

    def __init__(
        self, vocab_size: int = 2048, n_embd: int = 256, n_layer: int = 3, n_head: int = 8, n_positions: int = 128
    ) -> None:
        config = GPT2Config(
            vocab_size=vocab_size,
            n_embd=n_embd,
            n_layer=n_layer,
            n_head=n_head,
            n_positions=n_positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        super().__init__(GPT2LMHeadModel(config))
        self.save_hyperparameters()
