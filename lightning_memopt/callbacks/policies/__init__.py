"""Policies that decide how much momentum each block gets, one file each."""

from lightning_memopt.callbacks.policies.base import POLICIES, Candidate, Policy, Problem
from lightning_memopt.callbacks.policies.benefit import benefit
from lightning_memopt.callbacks.policies.energy import energy
from lightning_memopt.callbacks.policies.fidelity import fidelity
from lightning_memopt.callbacks.policies.paper import paper
from lightning_memopt.callbacks.policies.roles import roles
from lightning_memopt.callbacks.policies.schedule import schedule
from lightning_memopt.callbacks.policies.uniform import uniform

__all__ = [
    "POLICIES",
    "Candidate",
    "Policy",
    "Problem",
    "benefit",
    "energy",
    "fidelity",
    "paper",
    "roles",
    "schedule",
    "uniform",
]
