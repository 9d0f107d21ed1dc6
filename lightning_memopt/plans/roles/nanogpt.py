"""GPT-2 in nanoGPT: the names of GPT-2, with ``torch.nn.Linear`` weights of shape [outputs, inputs]."""

from lightning_memopt.plans.roles.base import NamingScheme, Rule, register_naming_scheme

NANOGPT = register_naming_scheme(
    NamingScheme(
        "nanogpt",
        (
            Rule(r"(^|\.)(wte|wpe)\.weight$", ("embedding",)),
            Rule(r"(^|\.)lm_head\.weight$", ("head",)),
            Rule(r"attn\.c_attn\.weight$", ("query", "key", "value"), fused_dim=0),
            Rule(r"attn\.(c_q|query)\.weight$", ("query",)),
            Rule(r"attn\.(c_k|key)\.weight$", ("key",)),
            Rule(r"attn\.(c_v|value)\.weight$", ("value",)),
            Rule(r"attn\.c_proj\.weight$", ("attention_output",)),
            Rule(r"mlp\.(c_fc|c_proj)\.weight$", ("mlp",)),
        ),
    )
)
