"""LLaMA and GPT-2 in sizes from one million to billions of parameters."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config, LlamaConfig, PretrainedConfig

# Width, width inside an MLP, layers, heads. From 60m on, those of GaLore (Zhao et al. 2024), which others compare with.
LLAMA = {
    "llama-1m": (128, 352, 4, 4),
    "llama-3m": (256, 704, 3, 8),
    "llama-10m": (320, 864, 6, 5),
    "llama-60m": (512, 1376, 8, 8),
    "llama-130m": (768, 2048, 12, 12),
    "llama-350m": (1024, 2736, 24, 16),
    "llama-1b": (2048, 5461, 24, 32),
    "llama-7b": (4096, 11008, 32, 32),
}
# Width, layers, heads. From 124m on, those of Radford et al. 2019.
GPT2 = {
    "gpt2-1m": (128, 4, 4),
    "gpt2-3m": (256, 3, 8),
    "gpt2-124m": (768, 12, 12),
    "gpt2-355m": (1024, 24, 16),
    "gpt2-774m": (1280, 36, 20),
    "gpt2-1558m": (1600, 48, 25),
}


def config_of(name: str, vocab_size: int, seq_len: int, changes: dict[str, Any] | None = None) -> PretrainedConfig:
    """Return the configuration of a model, without dropout.

    Args:
        name: One of ``LLAMA`` or ``GPT2``. The numbers in the names count all parameters; up to 10m, those without
            embedding and head.
        vocab_size: Number of tokens.
        seq_len: Longest sequence.
        changes: Other arguments of transformers' configuration, which replace those of the name.

    Raises:
        ValueError: If there is no such name.
    """
    others = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, **(changes or {})}
    if name in LLAMA:
        width, inside, layers, heads = LLAMA[name]
        given = {"hidden_size": width, "intermediate_size": inside, "num_hidden_layers": layers}
        given |= {"num_attention_heads": heads, "max_position_embeddings": seq_len}
        return LlamaConfig(**{**given, **others})
    if name in GPT2:
        width, layers, heads = GPT2[name]
        given = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": seq_len}
        given |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(**{**given, **others})
    raise ValueError(f"There is no model {name!r}; use one of {', '.join([*LLAMA, *GPT2])}.")
