"""Vision transformers in transformers. Their attention uses LLaMA's names."""

from lightning_memopt.plans.roles.base import NamingScheme, Rule, register_naming_scheme

VIT = register_naming_scheme(
    NamingScheme(
        "vit",
        (
            Rule(r"embeddings\.(cls_token|position_embeddings|patch_embeddings\.projection\.weight)$", ("embedding",)),
            Rule(r"mlp\.fc[12]\.weight$", ("mlp",)),
            Rule(r"(^|\.)classifier\.weight$", ("head",)),
        ),
    )
)
