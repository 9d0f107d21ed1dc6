"""LLaMA and its many descendants (Mistral, Qwen, Gemma, Mixtral), with the names of transformers and Meta's code."""

from lightning_memopt.plans.roles.base import NamingScheme, Rule, register_naming_scheme

LLAMA = register_naming_scheme(
    NamingScheme(
        "llama",
        (
            Rule(r"(^|\.)(embed_tokens|tok_embeddings)\.weight$", ("embedding",)),
            Rule(r"(^|\.)(lm_head|output)\.weight$", ("head",)),
            Rule(r"(attn|attention)\.(q_proj|wq)\.weight$", ("query",)),
            Rule(r"(attn|attention)\.(k_proj|wk)\.weight$", ("key",)),
            Rule(r"(attn|attention)\.(v_proj|wv)\.weight$", ("value",)),
            Rule(r"(attn|attention)\.(o_proj|wo)\.weight$", ("attention_output",)),
            Rule(r"(mlp|feed_forward)\.(gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3)\.weight$", ("mlp",)),
            Rule(r"\.(mlp|block_sparse_moe)\.gate\.weight$", ("other",)),  # router of a mixture of experts
            Rule(r"\.experts\.(\d+\.)?(gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3)(\.weight)?$", ("mlp",)),
        ),
    )
)
