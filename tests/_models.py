"""Small models, and large ones on the meta device, that several tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB, LENGTH = 96, 16

# hidden, intermediate, layers, heads: the sizes of the GaLore and SNSM papers, and LLaMA 7B.
LLAMA_SHAPES = {
    "60M": (512, 1376, 8, 8),
    "130M": (768, 2048, 12, 12),
    "350M": (1024, 2736, 24, 16),
    "1B": (2048, 5461, 24, 32),
    "7B": (4096, 11008, 32, 32),
}


def tiny_llama(
    seed: int = 0, hidden: int = 32, intermediate: int = 88, layers: int = 2, vocabulary: int = VOCAB
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=LENGTH,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def tiny_gpt2(seed: int = 0, layers: int = 2) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=32, n_layer=layers, n_head=4, vocab_size=VOCAB, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def big_llama(size: str) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads = LLAMA_SHAPES[size]
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                vocab_size=32000,
            )
        )


def big_gpt2() -> GPT2LMHeadModel:
    """GPT-2 1.5B."""
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> list[float]:
    """Take steps on random tokens that depend on the seed and the step only; return the losses."""
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        tokens = torch.randint(0, VOCAB, (4, LENGTH), generator=generator)
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fill_grads(params: list[Tensor], seed: int, scale: float = 1e-2) -> None:
    """Give every parameter a gradient that depends on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)
