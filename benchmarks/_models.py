"""Small language models, trained from random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from _train import Settings


def build_model(settings: Settings) -> nn.Module:
    """Return the model of the settings, with weights drawn from torch's global generator."""
    return MODELS[settings.model](settings)


def llama(settings: Settings) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def gpt2(settings: Settings) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=settings.vocabulary,
        n_embd=settings.hidden,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_positions=settings.length,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[Settings], nn.Module]] = {"llama": llama, "gpt2": gpt2}
