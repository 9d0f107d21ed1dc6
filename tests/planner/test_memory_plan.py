"""A plan: what fits, its table and its dictionary."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

import lightning_memopt as lm
from lightning_memopt.memory.sizes import parse_bytes
from lightning_memopt.planner.memory_plan import ADAMW, COLUMNS


def test_the_first_that_fits_keeps_the_most_state():
    recipes = ["adafactor", "adam_sn", "adapm"]

    def plan(memory: str | int) -> lm.MemoryPlan:
        return lm.plan_memory("llama-60m", recipes, world_size=2, gpu_memory=memory)

    sizes = {row.recipe: row.total_bytes for row in plan("1GiB").rows}
    assert plan(sizes[ADAMW] + 1).first_fit == ADAMW
    assert plan(sizes[ADAMW] + 1).rows[0].remaining == 1
    tight = plan(sizes[ADAMW])
    assert (tight.rows[0].remaining, tight.rows[0].fits, tight.first_fit) == (0, False, "adam_sn")
    assert plan(sizes["adam_sn"]).first_fit == "adapm"
    nothing = plan("1MiB")
    assert nothing.first_fit is None
    assert nothing.rows[0].remaining == parse_bytes("1MiB") - sizes[ADAMW]
    assert lm.plan_memory("llama-60m", recipes).first_fit is None


def test_rates_of_a_recipe_are_a_line_below_the_table():
    overrides = {"embedding": {"lr_multiplier": 10}, "*norm.weight": {"weight_decay": 0.01}}
    mine = {"name": "mine", "base": "adapm_lean", "overrides": overrides}
    plan = lm.plan_memory("llama-60m", [mine, "adapm_lean"], world_size=2)
    rates = ("lr × 10 in 1 embedding block", "decay 0.01 in 17 vector blocks")
    assert [row.rates for row in plan.rows] == [(), rates, ()]
    assert plan.table().splitlines()[-1] == f"mine: {', '.join(rates)}."
    assert plan.row("mine").state_bytes == plan.row("adapm_lean").state_bytes
    assert lm.plan_memory("llama-60m", "adapm_lean").note() == ""


def test_to_dict_is_json_and_the_table_has_every_number():
    plan = lm.plan_memory("llama-60m", "adapm_lean", world_size=2, gpu_memory="1GiB")
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["rows"][1]["state_bytes"] == plan.row("adapm_lean").state_bytes
    assert data["first_fit"] == ADAMW
    table = plan.table()
    for text in (*COLUMNS, "llama-60m", "58,073,600", "2 ranks", *plan.cells()[1]):
        assert text in table
    assert COLUMNS[-1] not in lm.plan_memory("llama-60m", "adapm_lean").table()
