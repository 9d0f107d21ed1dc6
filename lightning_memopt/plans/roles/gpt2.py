"""GPT-2 in transformers. ``Conv1D`` stores weights as [inputs, outputs]. Query, key and value are one weight."""

from lightning_memopt.plans.roles.base import NamingScheme, Rule, register_naming_scheme

GPT2 = register_naming_scheme(
    NamingScheme(
        "gpt2",
        (
            Rule(r"(^|\.)(wte|wpe)\.weight$", ("embedding",)),
            Rule(r"(^|\.)lm_head\.weight$", ("head",)),
            Rule(r"attn\.c_attn\.weight$", ("query", "key", "value"), fused_dim=1, output_dim=-1),
            Rule(r"attn\.c_proj\.weight$", ("attention_output",), output_dim=-1),
            Rule(r"mlp\.(c_fc|c_proj)\.weight$", ("mlp",), output_dim=-1),
        ),
    )
)
