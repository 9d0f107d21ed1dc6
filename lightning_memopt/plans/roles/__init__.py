"""Roles of weights: one table of words, and the naming schemes that users register."""

from lightning_memopt.plans.roles.deciding import classify, names_without_role
from lightning_memopt.plans.roles.names import canonical_names
from lightning_memopt.plans.roles.part import ROLES, Part, unsplit
from lightning_memopt.plans.roles.schemes import NAMING_SCHEMES, NamingScheme, Rule, register_naming_scheme

__all__ = [
    "NAMING_SCHEMES",
    "ROLES",
    "NamingScheme",
    "Part",
    "Rule",
    "canonical_names",
    "classify",
    "names_without_role",
    "register_naming_scheme",
    "unsplit",
]
