"""What an optimizer checks once, when all names, roles and gradients are there: before its first step."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_memopt.optim.binding import Binding
from lightning_memopt.optim.ineffective import warn_of_no_effect
from lightning_memopt.optim.unknown_roles import warn_of_unknown_roles


def check_before_first_step(optimizer: Optimizer, binding: Binding) -> None:
    """Refuse overrides of roles that no weight has, and warn of what has no effect or saves little.

    Raises:
        ValueError: If an override matches nothing.
    """
    binding.settle(optimizer)
    entries = list(binding.entries(optimizer))
    training = [block for _, param, block in entries if param.requires_grad]
    frozen = [block for _, param, block in entries if not param.requires_grad]
    warn_of_no_effect(training, frozen, binding.all_plans(), head_dim=binding.head_dim)
    warn_of_unknown_roles(training, bound=binding.bound)
