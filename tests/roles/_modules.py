"""Models without transformers: nanoGPT, Meta's LLaMA, and torch's own layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.roles._cases import VOCAB, Case, hidden_states, tokens
from tests.roles._decoders import GPT2_EMBEDDINGS


class NanoAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head, self.n_embd = heads, width
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = (entry.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for entry in self.c_attn(x).chunk(3, dim=-1))
        return self.c_proj(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2))


class NanoMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = NanoAttention(width, heads), NanoMLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(VOCAB, width), "wpe": nn.Embedding(16, width)}
            | {"h": nn.ModuleList([NanoBlock(width, heads)]), "ln_f": nn.LayerNorm(width)}
        )
        self.lm_head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.transformer["wte"](input_ids) + self.transformer["wpe"].weight[: input_ids.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class MetaAttention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.wq, self.wk, self.wv))
        out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(-2))


class MetaMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MetaBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = MetaAttention(width, 4, 2), MetaMLP(width, 80)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class MetaLlama(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList([MetaBlock(width)])
        self.norm, self.output = nn.RMSNorm(width), nn.Linear(width, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok_embeddings(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


class Classifier(nn.Module):
    """An encoder of torch around which everything has a usual name."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.pos_embed = nn.Embedding(VOCAB, width), nn.Parameter(0.02 * torch.randn(1, 8, width))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, 4, 80, batch_first=True), 1, enable_nested_tensor=False
        )
        self.head = nn.Linear(width, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(input_ids) + self.pos_embed))


def _translator() -> nn.Module:
    return nn.Transformer(32, 4, 1, 1, 80, batch_first=True)


def _source_and_target() -> dict[str, Tensor]:
    return {"src": hidden_states()["x"], "tgt": hidden_states()["x"].flip(1)}


TORCH = """
*.in_proj_weight         query/8@0:32 key/8@32:32 value@64:32
*.out_proj.weight        attention_output
*.linear{1,2}.weight     mlp
"""

CASES: list[Case] = [
    Case(
        "nanogpt",
        NanoGPT,
        GPT2_EMBEDDINGS
        + """
        lm_head.weight                 head
        *.attn.c_attn.weight           query/8@0:32 key/8@32:32 value@64:32
        *.attn.c_proj.weight           attention_output
        *.mlp.{c_fc,c_proj}.weight     mlp
        """,
        tokens,
    ),
    Case(
        "meta_llama",
        MetaLlama,
        """
        tok_embeddings.weight          embedding
        output.weight                  head
        *.attention.wq.weight          query/8
        *.attention.wk.weight          key/8
        *.attention.wv.weight          value
        *.attention.wo.weight          attention_output
        *.feed_forward.w{1,2,3}.weight mlp
        """,
        tokens,
    ),
    Case(
        "torch_encoder",
        Classifier,
        TORCH
        + """
        embedding.weight               embedding
        pos_embed                      embedding
        head.weight                    head
        """,
        tokens,
    ),
    Case("torch_transformer", _translator, TORCH, _source_and_target, proof="all"),
]
