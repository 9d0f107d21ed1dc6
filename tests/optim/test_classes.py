"""The recipes' classes: each says only what is its own, and offers every option of MemOpt."""

from __future__ import annotations

import jsonargparse
import pytest
import torch

import lightning_memopt as lm
from lightning_memopt.optim import classes
from lightning_memopt.plans.recipe import known_options

CLASSES = [entry for entry in vars(classes).values() if isinstance(entry, type) and hasattr(entry, "_recipe")]


def options_of(cls):
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(cls, "optimizer", skip={"params"})
    return {action.dest.removeprefix("optimizer.") for action in parser._actions if "." in action.dest}


@pytest.mark.parametrize("cls", CLASSES)
def test_the_command_line_shows_every_option(cls):
    expected = {name for name in options_of(lm.MemOpt) if not name.startswith("recipe")}
    assert options_of(cls) - ({"paper", *known_options()} - expected) == expected
    assert {"rank", "max_update", "fused", "overrides", "head_dim"} <= expected


def test_a_class_is_a_recipe_and_takes_no_other():
    with pytest.raises(TypeError, match=r"AdaPM is the recipe 'adapm', got `recipe` 'adapm_lean': .* use `MemOpt`"):
        lm.AdaPM([("a", torch.nn.Parameter(torch.ones(2)))], recipe="adapm_lean")
