"""Saving, loading and reformatting."""

from __future__ import annotations

import copy

import pytest
import torch

import lightning_memopt as lm
from lightning_memopt.optim.gradients import follow
from tests._compare import assert_equal
from tests._models import big_llama, fill_grads, tiny_gpt2, tiny_llama, train

pytestmark = pytest.mark.slow


def round_trip(state_dict, path):
    torch.save(state_dict, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_a_resumed_run_equals_an_uninterrupted_one(recipe, make, state_dtype, tmp_path):
    model = make(layers=1)
    recurs = any("gap" in role.options() for role in lm.load_plan(recipe).roles.values())
    options = {"recipe": recipe, "state_dtype": state_dtype, "gap": 3 if recurs else None}
    optimizer = lm.MemOpt(model.named_parameters(), **options)
    train_quietly(model, optimizer, 2)
    twin = copy.deepcopy(model)
    resumed = lm.MemOpt(twin.named_parameters(), **options, lr=0.5)
    resumed.load_state_dict(round_trip(optimizer.state_dict(), tmp_path / "o.pt"))
    for seed in range(2, 5):  # until every subspace was chosen again
        fill_grads(list(model.parameters()), seed)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = ours.grad
        optimizer.step()
        resumed.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_equal(ours, theirs)
    assert_equal(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_dtypes_survive_loading_into_bfloat16_parameters(tmp_path):
    model = tiny_llama().bfloat16()
    optimizer = lm.AdaPMLean(model.named_parameters())
    train(model, optimizer, 2)
    again = lm.AdaPMLean(model.named_parameters())
    again.load_state_dict(round_trip(optimizer.state_dict(), tmp_path / "o.pt"))
    for param, state in optimizer.state.items():
        for key, value in state.items():
            assert_equal(again.state[param][key], value)


def test_loading_copies():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters())
    saved = optimizer.state_dict()
    again = lm.AdaPMLean(model.named_parameters())
    again.load_state_dict(saved)
    train(model, again, 1)
    assert all(float(state["step"]) == 0 for state in saved["state"].values())


def test_a_checkpoint_from_before_the_first_step_loads():
    model = tiny_llama()
    saved = lm.AdaPM(model.named_parameters()).state_dict()
    again = lm.AdaPM(model.named_parameters())
    again.load_state_dict(saved)
    train(model, again, 1)


def test_torchs_adamw_continues_as_recipe_adamw():
    model = tiny_llama()
    reference = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    train(model, reference, 3)
    twin = copy.deepcopy(model)
    ours = lm.MemOpt(twin.named_parameters(), recipe="adamw")
    ours.load_state_dict(reference.state_dict())
    train(model, reference, 3, seed=1)
    train(twin, ours, 3, seed=1)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_torchs_adamw_continues_on_fused_and_channels_last_weights():
    for make in (tiny_gpt2, lambda: torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)):
        torch.manual_seed(0)
        model = make()
        reference = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
        twin = copy.deepcopy(model)
        for step in range(6):
            if step == 3:
                twin.load_state_dict(model.state_dict())
                ours = lm.MemOpt(twin.named_parameters(), recipe="adamw")
                ours.load_state_dict(reference.state_dict())
            for params, optimizer in ((model, reference), *([(twin, ours)] if step >= 3 else [])):
                fill_grads(list(params.parameters()), step)
                optimizer.step()
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("recipe", ["muon", "adagrad_snsm", "rmsprop_sn", "adapm"])
def test_averages_of_adamw_count_the_steps_under_betas_of_another_recipe(recipe):
    """20 equal gradients leave 2% of their square under β₂ = 0.999, which 0.95 would take for 64%."""
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((6,), (8, 6))]
    saved = torch.optim.AdamW(weights, lr=1e-3)
    optimizer = lm.MemOpt(zip(("norm.weight", "embed_tokens.weight"), weights, strict=True), recipe, lr=1e-3)
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    for _ in range(20):
        for weight in weights:
            weight.grad = torch.full_like(weight, 0.5)
        saved.step()
    optimizer.load_state_dict(saved.state_dict())
    wanted = {"exp_avg": 0.5 * (1 - beta1**20), "exp_avg_sq": 0.25 * (20 if beta2 == 1 else 1 - beta2**20)}
    found = {key: value for state in optimizer.state.values() for key, value in state.items() if key in wanted}
    assert found
    for key, value in found.items():
        torch.testing.assert_close(value, torch.full_like(value, wanted[key]))


@pytest.mark.parametrize("betas", [[0.9], None, "x", (0.9, float("nan")), (1.5, 0.9)], ids=str)
def test_betas_of_another_recipe_are_checked_before_anything_changes(betas):
    weight = torch.nn.Parameter(torch.zeros(8, 6))
    adamw = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    adamw.step()
    saved = adamw.state_dict()
    saved["param_groups"][0]["betas"] = betas
    optimizer = lm.AdaPMLean([("up_proj.weight", weight)])
    with pytest.raises((ValueError, TypeError), match="In parameter group 0 of the state dict: `betas"):
        optimizer.prepare_load(saved)


def test_the_dtype_of_state_comes_back_from_the_checkpoint():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), state_dtype="bfloat16")
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    resumed = lm.AdaPMLean(twin.named_parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.snapshot() == optimizer.snapshot()
    before = torch.get_rng_state()
    train_quietly(twin, resumed)
    optimizer.reformat({"lm_head.weight": {"rank": 3}})
    resumed.reformat({"lm_head.weight": {"rank": 3}})
    assert_equal(torch.get_rng_state(), before)
    train_quietly(model, optimizer)
    follow(twin.lm_head.weight, resumed, resumed._binding)  # as after a move to another device
    assert resumed.snapshot() == optimizer.snapshot()
    state = resumed.state[twin.lm_head.weight]
    assert {value.dtype for key, value in state.items() if key != "step"} == {torch.bfloat16}


def train_quietly(model, optimizer, steps=3):
    """Take steps without any draw from torch's generator."""
    for seed in range(steps):
        fill_grads(list(model.parameters()), seed)
        optimizer.step()


def test_bind_after_loading_changes_nothing():
    model = tiny_llama()
    optimizer = lm.AdamMini(model.named_parameters())
    optimizer.bind(model)
    train(model, optimizer, 2)
    resumed = lm.AdamMini(model.named_parameters())
    resumed.load_state_dict(optimizer.state_dict())
    resumed.bind(model)
    assert resumed.snapshot() == optimizer.snapshot()


def test_bind_keeps_a_reformat_before_the_first_step():
    model = tiny_llama()
    optimizer = lm.AdaPMMini(model.named_parameters())
    optimizer.reformat({"lm_head.weight": {"rank": 2}})
    optimizer.bind(model)
    assert optimizer.snapshot().blocks[-1].rank == 2


def test_a_reduction_can_change_on_resume():
    """The state is the mean, whatever is done with it."""
    model = tiny_llama()
    optimizer = lm.AdamSN(model.named_parameters(), reduction="sum")
    train(model, optimizer, 2)
    means = lm.AdamSN(model.named_parameters())
    train_quietly(model, means)
    means.load_state_dict(optimizer.state_dict())
    square = optimizer.state[model.lm_head.weight]["subset_norm_sq"]
    assert_equal(means.state[model.lm_head.weight]["subset_norm_sq"], square)


def test_a_tensor_lr_is_not_shared():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=torch.tensor(1e-3))
    again = lm.AdaPMLean(model.named_parameters())
    again.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert float(again.param_groups[0]["lr"]) == pytest.approx(1e-3)


def test_keys_and_shapes_are_the_plan():
    """A checkpoint from after a reformat loads into an optimizer that was made without it."""
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters())
    train(model, optimizer, 2)
    optimizer.reformat({"lm_head.weight": {"rank": 7}, "model.embed_tokens.weight": lm.Recipe("dense", "dense")})
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    resumed = lm.AdaPMLean(twin.named_parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.snapshot() == optimizer.snapshot()
    train(model, optimizer, 3, seed=1)
    train(twin, resumed, 3, seed=1)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_equal(ours, theirs)


def test_head_sizes_come_back_from_the_checkpoint():
    model = tiny_llama()
    optimizer = lm.AdamMini(model.named_parameters())
    optimizer.bind(model)
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    resumed = lm.AdamMini(twin.named_parameters())  # knows nothing of heads
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2, seed=1)
    train(twin, resumed, 2, seed=1)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_equal(ours, theirs)


def test_hooks_run_and_can_change_what_is_loaded():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-3)
    seen = []

    def halve(opt, state_dict):
        assert state_dict["state"]
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] /= 2
        return state_dict

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(float(opt.param_groups[0]["lr"])))
    optimizer.load_state_dict(lm.AdaPMLean(model.named_parameters(), lr=1e-3).state_dict())
    assert seen == [5e-4]


def refused(optimizer, state_dict, match):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state_dict)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, state in before["state"].items():
        for key, value in state.items():
            assert_equal(after["state"][index][key], value)


def test_state_dicts_that_do_not_belong_are_refused():
    llama, gpt2 = tiny_llama(), tiny_gpt2()
    optimizer = lm.AdaPMLean(llama.named_parameters())
    train(llama, optimizer, 1)
    of_gpt2 = lm.AdaPMLean(gpt2.named_parameters()).state_dict()
    refused(
        optimizer, of_gpt2, r"state for 'transformer\.wte\.weight', which the optimizer does not train: create model"
    )
    del of_gpt2["param_names"]
    refused(optimizer, of_gpt2, "has 28 parameters, that of the optimizer 21")
    refused(
        optimizer,
        lm.AdaPM(llama.named_parameters()).state_dict(),
        r"was saved with recipe 'adapm', the optimizer has 'adapm_lean'. Nothing was loaded. Create .*recipe='adapm'",
    )
    groups = [{"params": [entry]} for entry in llama.named_parameters()]
    refused(optimizer, lm.AdaPMLean(groups).state_dict(), "has 21 parameter groups, the optimizer 1")


def test_incomplete_state_dicts_are_refused():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters())
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][3]
    refused(optimizer, saved, r"no state for 'model\.layers\.0\.self_attn\.v_proj\.weight', which was frozen")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][99] = saved["state"][3]
    refused(optimizer, saved, r"state for parameters \[99\] that no group lists")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = -1.0
    refused(optimizer, saved, "In parameter group 0 of the state dict: `lr` must be finite")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["low_rank_q"] = "gone"
    refused(optimizer, saved, "has 'low_rank_q' = 'gone', which is not a tensor")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["low_rank_q"] = saved["state"][0]["low_rank_q"].bfloat16()
    refused(optimizer, saved, "mixes dtypes")


def test_broken_state_is_refused_by_name():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters())
    for change, match in (
        (lambda state: state.pop("low_rank_r"), r"does not fit the block 'model\.embed_tokens\.weight'.*low_rank_q"),
        (lambda state: state.pop("step"), r"'model\.embed_tokens\.weight' in the state dict has no key 'step'"),
        (lambda state: state.update(max_exp_avg_sq=torch.zeros(2)), "unknown keys.*max_exp_avg_sq"),
        (
            lambda state: state.update(factored_row=torch.zeros(5, 1)),
            r"'factored_row' has shape \(5, 1\), expected \(96, 1\)",
        ),
    ):
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved["state"][0])
        refused(optimizer, saved, match)


def test_snapshots_need_no_data():
    snapshot = lm.AdaPMLean(big_llama("60M").named_parameters()).snapshot()
    assert snapshot.saved > 0.96
    assert sum(block.adamw_bytes for block in snapshot.blocks) == snapshot.adamw_bytes


def test_adamw_state_of_another_shape_is_refused():
    """A fused weight of other heads: nothing of it may be cut off in silence."""
    for rows in (80, 40):
        old = torch.nn.Parameter(torch.zeros(rows, 22))
        adamw = torch.optim.AdamW([old])
        old.grad = torch.ones_like(old)
        adamw.step()
        optimizer = lm.AdaPMLean([("attention.in_proj_weight", torch.nn.Parameter(torch.zeros(66, 22)))])
        refused(optimizer, adamw.state_dict(), rf"'attention\.in_proj_weight' .* 'exp_avg' of shape \({rows}, 22\)")


@pytest.fixture(scope="module")
def trained():
    """Return a model that AdamW trained for eight steps, its state, and the losses."""
    model = tiny_llama()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, adamw, train(model, adamw, 8)


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_adamw_is_continued_with_every_recipe(trained, recipe):
    """The compressed state stands for what it is made of, the step counts on, and the loss does not jump."""
    model, adamw, losses = copy.deepcopy(trained)
    optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe, lr=3e-3)
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert {float(state["step"]) for state in optimizer.state.values()} == {8.0}
    norm = model.model.norm.weight
    beta2 = optimizer.param_groups[0]["betas"][1]
    counted = adamw.state[norm]["exp_avg_sq"] * ((8 if beta2 == 1 else 1 - beta2**8) / (1 - 0.999**8))
    torch.testing.assert_close(optimizer.state[norm]["exp_avg_sq"], counted)
    losses += train(model, optimizer, 4, seed=1)
    assert max(losses[8:]) < losses[0] + 0.2
