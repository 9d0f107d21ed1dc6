"""BERT and its relatives (RoBERTa, ELECTRA), with the names of transformers."""

from lightning_memopt.plans.roles.base import NamingScheme, Rule, register_naming_scheme

BERT = register_naming_scheme(
    NamingScheme(
        "bert",
        (
            Rule(r"embeddings\.(word|position|token_type)_embeddings\.weight$", ("embedding",)),
            Rule(r"attention\.self\.query\.weight$", ("query",)),
            Rule(r"attention\.self\.key\.weight$", ("key",)),
            Rule(r"attention\.self\.value\.weight$", ("value",)),
            Rule(r"attention\.output\.dense\.weight$", ("attention_output",)),
            Rule(r"layer\.\d+\.(intermediate|output)\.dense\.weight$", ("mlp",)),
            Rule(r"(^|\.)cls\.predictions\.decoder\.weight$", ("head",)),
        ),
    )
)
