"""A LLaMA from transformers, trained from random weights."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from examples.language_model import LanguageModel


class LlamaModule(LanguageModel):
    """A LLaMA of any size; the arguments are those of ``transformers.LlamaConfig``.

    The defaults give a model with 3.5 million parameters.

    Args:
        vocab_size: Number of tokens, at least that of the data.
        hidden_size: Width of the model.
        intermediate_size: Width inside an MLP.
        num_hidden_layers: Number of layers.
        num_attention_heads: Heads per layer.
        num_key_value_heads: Heads of keys and values; None means as many as ``num_attention_heads``.
        max_position_embeddings: Longest sequence.
        tie_word_embeddings: Whether the head shares the embedding's weight.
    """

    def __init__(
        self,
        vocab_size: int = 2048,
        hidden_size: int = 256,
        intermediate_size: int = 704,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 128,
        tie_word_embeddings: bool = False,
    ) -> None:
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=tie_word_embeddings,
        )
        super().__init__(LlamaForCausalLM(config))
        self.save_hyperparameters()
