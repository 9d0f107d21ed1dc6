"""Roles of weights; importing this package registers the built-in model families."""

from lightning_memopt.plans.roles import bert, gpt2, llama, nanogpt, torch_attention, vit
from lightning_memopt.plans.roles.base import (
    NAMING_SCHEMES,
    ROLES,
    NamingScheme,
    Part,
    Rule,
    canonical_names,
    classify,
    names_without_role,
    register_naming_scheme,
)

__all__ = [
    "NAMING_SCHEMES",
    "ROLES",
    "NamingScheme",
    "Part",
    "Rule",
    "bert",
    "canonical_names",
    "classify",
    "gpt2",
    "llama",
    "names_without_role",
    "nanogpt",
    "register_naming_scheme",
    "torch_attention",
    "vit",
]
