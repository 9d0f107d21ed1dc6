"""Planning, without a real run beside it: see test_planned.py for that."""

from __future__ import annotations

import doctest
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

import lightning_memopt as lm
from lightning_memopt.planner import planning, sweep_memory
from lightning_memopt.planner.figure import sweep_figure
from lightning_memopt.planner.memory_plan import ADAMW
from tests._models import tiny_gpt2, tiny_llama
from tests._ranks import run_ranks

pytestmark = pytest.mark.slow


def test_a_module_stays_as_it_is():
    model = tiny_gpt2()
    before = {name: (param, param.clone()) for name, param in model.named_parameters(remove_duplicate=False)}
    attributes = set(vars(model))
    plan = lm.plan_memory(model, "adapm_mini", world_size=2, precision="bf16-true")
    assert plan.parameters == sum(param.numel() for param in model.parameters())
    assert set(vars(model)) == attributes
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    for name, (param, value) in before.items():
        assert after[name] is param
        torch.testing.assert_close(param, value, rtol=0, atol=0)
    model(input_ids=torch.zeros(1, 4, dtype=torch.long))


def test_a_module_may_be_on_the_meta_device_or_compiled():
    with torch.device("meta"):
        meta = tiny_llama()
    expected = lm.plan_memory(tiny_llama(), "adapm_mini", world_size=3)
    assert lm.plan_memory(meta, "adapm_mini", world_size=3) == expected
    assert lm.plan_memory(torch.compile(meta), "adapm_mini", world_size=3).rows == expected.rows


def test_released_gradients_are_at_most_those_planned():
    """And the extra bits of weights are state."""
    model = tiny_llama().bfloat16()
    plan = lm.plan_memory(model, "adapm_lean", gradient_release=True, master_weight_bits=24)
    optimizer = lm.AdaPMLean(model.named_parameters(), master_weight_bits=24)
    optimizer.release_gradients(model)
    held = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(each.grad.nbytes for each in model.parameters() if each.grad is not None))
        )
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    adamw, lean = plan.rows
    assert 0 < max(held) <= lean.gradient_bytes <= adamw.gradient_bytes == plan.gradient_bytes
    assert lean.state_bytes == optimizer.snapshot().state_bytes
    held_bits = sum(state["low_bits"].nbytes for state in optimizer.state.values())
    assert held_bits == sum(block.state.other for block in optimizer.snapshot().blocks) == plan.parameter_bytes // 2
    parts = (plan.parameter_bytes, plan.buffer_bytes, lean.gradient_bytes, lean.state_bytes, lean.scratch_bytes)
    assert lean.total_bytes == sum(parts)


def test_a_7b_model_takes_few_bytes_per_parameter():
    plans = [lm.plan_memory("llama-7b", "adapm_lean", precision="bf16-true", gradient_release=r) for r in (False, True)]
    bytes_each = [plan.row("adapm_lean").total_bytes / plan.parameters for plan in plans]
    assert bytes_each[0] < 4.3
    assert bytes_each[1] < 2.5


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_keep_the_gradients_of_two_units(ranks):
    plan = lm.plan_memory("llama-130m", "adapm_lean", world_size=ranks, gradient_release=True)
    layer = lm.plan_memory("llama-130m", "adapm_lean", world_size=ranks)
    assert plan.rows[1].gradient_bytes < plan.gradient_bytes == layer.rows[1].gradient_bytes
    # The outermost unit, with embedding and head, is the largest, and its gradients are the last ones.
    ends = 2 * 32_000 * 768 * 4 / ranks
    assert ends < plan.rows[1].gradient_bytes < 1.3 * ends


def test_one_rank_holds_what_the_optimizer_says():
    model = tiny_llama()
    for recipe in lm.recipe_names():
        plan = lm.plan_memory(model, recipe)
        optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe)
        optimizer.bind(model)
        snapshot = optimizer.snapshot()
        assert plan.rows[1].state_bytes == snapshot.state_bytes
        assert plan.rows[1].saved == snapshot.saved
        assert plan.rows[0].state_bytes == snapshot.adamw_bytes
    size = 4 * sum(param.numel() for param in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert (plan.parameter_bytes, plan.gradient_bytes, plan.unsharded_bytes) == (size, size, 0)
    assert plan.buffer_bytes == buffers > 0
    assert plan.rows[0].total_bytes == 4 * size + buffers


def test_frozen_parameters_have_neither_gradient_nor_state():
    model = tiny_llama()
    all_of_it = lm.plan_memory(model, "adapm_lean", world_size=2)
    model.model.embed_tokens.weight.requires_grad_(False)
    plan = lm.plan_memory(model, "adapm_lean", world_size=2)
    frozen = 2 * model.model.embed_tokens.weight.numel()
    assert plan.parameter_bytes == all_of_it.parameter_bytes
    assert plan.unsharded_bytes <= all_of_it.unsharded_bytes
    unit = model.model.layers.requires_grad_(False)
    assert lm.plan_memory(model, "adapm_lean", world_size=2).unsharded_bytes < plan.unsharded_bytes
    unit.requires_grad_(True)
    assert plan.gradient_bytes == all_of_it.gradient_bytes - frozen
    assert plan.row(ADAMW).state_bytes == all_of_it.row(ADAMW).state_bytes - 2 * frozen
    assert plan.row("adapm_lean").state_bytes < all_of_it.row("adapm_lean").state_bytes
    nothing = lm.plan_memory(nn.Linear(4, 4).requires_grad_(False), "adapm_lean")
    assert [(row.state_bytes, row.saved) for row in nothing.rows] == [(0, 0.0)] * 2


def test_precisions():
    whole, true, mixed = (
        lm.plan_memory("llama-60m", "adapm_lean", world_size=4, precision=precision)
        for precision in ("32-true", "bf16-true", "bf16-mixed")
    )
    assert true.parameter_bytes * 2 == whole.parameter_bytes == mixed.parameter_bytes
    assert true.gradient_bytes * 2 == whole.gradient_bytes == mixed.gradient_bytes
    # In bf16-mixed, gradients are reduced in float32.
    assert true.unsharded_bytes * 2 == whole.unsharded_bytes > mixed.unsharded_bytes > true.unsharded_bytes
    assert true.row(ADAMW).state_bytes * 2 == whole.row(ADAMW).state_bytes == mixed.row(ADAMW).state_bytes
    assert len({plan.row("adapm_lean").state_bytes for plan in (whole, true, mixed)}) == 1


def test_recipes_in_every_form(tmp_path):
    Path("mine.yaml").write_text("base: adapm_lean\nroles: {mlp: {momentum: dense}}\n")
    given = ["adam_mini", Path("mine.yaml"), {"name": "other", "base": "adamw"}, lm.load_plan("adafactor")]
    plan = lm.plan_memory("llama-60m", given)
    assert [row.recipe for row in plan.rows] == [ADAMW, "adam_mini", "mine", "other", "adafactor"]
    assert plan.row("other").state_bytes == plan.row(ADAMW).state_bytes
    assert [row.recipe for row in lm.plan_memory("llama-60m").rows[1:]] == lm.recipe_names()


def test_the_example_in_the_docstring():
    assert doctest.testmod(planning) == (0, 2)


def peak_of_planning(rank: int, world: int) -> int:
    """Plan in a process of its own, and return the most KiB that were resident in it."""
    lm.plan_memory("llama-3-70b", ["adapm_lean", "galore"], world_size=64)
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


def test_a_model_of_70_billion_parameters_needs_little_memory():
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell how much memory a process used")
    (peak,) = run_ranks(peak_of_planning, 1)
    assert peak < 2 << 20


def test_state_is_divided_as_evenly_as_weights():
    """Of GPT-2's 1,600 rows, 800 of 1,024 ranks hold two and the others none."""
    recipes = ["adapm_lean", "adam_snsm"]
    whole, part = (lm.plan_memory("gpt2-xl", recipes, world_size=ranks) for ranks in (1, 1024))
    weights = part.parameter_bytes * 1024 / whole.parameter_bytes
    assert 1.21 < weights < 1.22
    for recipe in recipes:
        excess = part.row(recipe).state_bytes * 1024 / whole.row(recipe).state_bytes
        assert 1.1 < excess < 1.01 * weights, f"{recipe}: {excess:.3f}"


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"Unknown model 'lama-7b'. Did you mean 'llama-7b'\?.*mixtral.*config file", {"model": "lama-7b"}),
        (TypeError, "`model` must be a name.*got 3", {"model": 3}),
        (FileNotFoundError, "no model configuration 'nowhere/config.json'", {"model": "nowhere/config.json"}),
        (ValueError, "Unknown recipe 'adapm_leen'.*adapm_lean", {"recipe": "adapm_leen"}),
        (ValueError, "`recipe` is an empty list: name some of adamw", {"recipe": []}),
        (ValueError, "`world_size` must be at least 1, got 0", {"world_size": 0}),
        (ValueError, "`replicate_size` 2 does not divide `world_size` 1: choose a multiple", {"replicate_size": 2}),
        (TypeError, "`cpu_offload` must be True or False, got 'no'", {"cpu_offload": "no"}),
        (TypeError, "`world_size` must be an integer, got 2.5", {"world_size": 2.5}),
        (ValueError, "such as '512MiB'.*got '24 gigs'", {"gpu_memory": "24 gigs"}),
        (ValueError, "`gpu_memory` 0 means 0 bytes, too few", {"gpu_memory": 0}),
        (TypeError, "A size must be a string.*got 2.5", {"gpu_memory": 2.5}),
        (ValueError, "Unknown precision '16-mixed'.*bf16-mixed", {"precision": "16-mixed"}),
        (ValueError, "ReLU has no parameters.*configure_model", {"model": nn.ReLU()}),
        (ValueError, "without a shape cannot be planned for: 'weight', 'bias'", {"model": nn.LazyLinear(3)}),
    ],
)
def test_bad_input_names_the_value_and_the_way_out(error, message, options):
    with pytest.raises(error, match=message):
        lm.plan_memory(**{"model": "llama-60m", "recipe": "adafactor", **options})


def test_what_is_missing_is_named(monkeypatch):
    Path("config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        lm.plan_memory("config.json")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        sweep_figure(sweep_memory("llama-60m", "adafactor", world_sizes=[1]))
    with pytest.raises(KeyError, match="'adapm' is not in the plan; available: torch.optim.AdamW, adafactor"):
        lm.plan_memory("llama-60m", "adafactor").row("adapm")


def test_counters_are_told_apart():
    model = tiny_llama()
    plan = lm.plan_memory(model, "adapm_lean")
    optimizer = lm.AdaPMLean(model.named_parameters())
    assert plan.counter_bytes == optimizer.snapshot().counter_bytes == 4 * len(list(model.parameters()))


def test_short_forms_of_precision_and_sizes_without_a_unit():
    assert lm.plan_memory("llama-60m", "adapm", precision="bf16").precision == "bf16-mixed"
    with pytest.raises(ValueError, match="'bf16-mixed' for '16-mixed'"):
        lm.plan_memory("llama-60m", "adapm", precision="16-mixed")
    with pytest.raises(ValueError, match="`gpu_memory` '24' means 24 bytes.*'24GiB'"):
        lm.plan_memory("llama-60m", "adapm", gpu_memory="24")
