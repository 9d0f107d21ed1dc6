"""``torch.nn.MultiheadAttention`` and the ``torch.nn.Transformer`` layers around it."""

from lightning_memopt.plans.roles.base import NamingScheme, Rule, register_naming_scheme

TORCH_ATTENTION = register_naming_scheme(
    NamingScheme(
        "torch_attention",
        (
            Rule(r"(^|\.)in_proj_weight$", ("query", "key", "value"), fused_dim=0),
            Rule(r"(^|\.)q_proj_weight$", ("query",)),
            Rule(r"(^|\.)k_proj_weight$", ("key",)),
            Rule(r"(^|\.)v_proj_weight$", ("value",)),
            Rule(r"(attn|attention|mha)\.out_proj\.weight$", ("attention_output",)),
            Rule(r"(^|\.)linear[12]\.weight$", ("mlp",)),
            Rule(r"(^|\.)(embedding|embeddings|embed|tok_emb|pos_emb)\.weight$", ("embedding",)),
            Rule(r"(^|\.)(head|lm_head)\.weight$", ("head",)),
        ),
    )
)
