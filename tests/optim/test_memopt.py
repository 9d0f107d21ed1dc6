"""MemOpt as a torch.optim.Optimizer that a Lightning user trusts."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from tests._compare import assert_equal, assert_same_weights
from tests._models import fill_grads, tiny_gpt2, tiny_llama, train

CLASSES = [
    lm.AdaPM, lm.AdaPMMini, lm.AdaPMLean, lm.SNSMLean, lm.MuonLean, lm.AdamSN, lm.AdamSNSM, lm.AdaGradSNSM,
    lm.RMSPropSN, lm.AdamMini, lm.Adafactor, lm.SCALE, lm.Muon,
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}, {"eps": 1e-4, "lr": 1e-2}])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_adamw_is_torchs_adamw(make, options):
    """Bit for bit, except weights that hold several blocks: torch's fused function cannot update a part of a weight."""
    ours, fused, plain = make(), make(), make()
    defaults = {"lr": 1e-3, "weight_decay": 0.0, **options}
    optimizer = lm.MemOpt(ours.named_parameters(), recipe="adamw", **defaults)
    pairs = [
        (ours, optimizer),
        (fused, torch.optim.AdamW(fused.parameters(), fused=True, **defaults)),
        (plain, torch.optim.AdamW(plain.parameters(), foreach=False, **defaults)),
    ]
    for step in range(50):
        for model, each in pairs:
            fill_grads(list(model.parameters()), step)  # the same for all, whatever the weights are
            each.step()
    parts = Counter(param for _, param, _ in optimizer.blocks())
    assert (max(parts.values()) > 1) == (make is tiny_gpt2)
    for mine, one, other in zip(ours.parameters(), fused.parameters(), plain.parameters(), strict=True):
        if parts[mine] == 1:
            assert_equal(mine, one)
        else:
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_every_recipe_learns(recipe):
    model = tiny_llama(layers=1)
    lr = {"adagrad_snsm": 3e-2, "rmsprop_sn": 1e-3}.get(recipe, 3e-3)
    optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe, lr=lr)
    tokens = torch.arange(64).reshape(4, 16) % 7
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("cls", CLASSES)
def test_classes_are_their_recipes(cls):
    assert "arXiv" in cls.__doc__
    assert "State:" in cls.__doc__
    assert "Learning rate:" in cls.__doc__
    one, other = tiny_llama(), tiny_llama()
    optimizer = cls(one.named_parameters(), lr=1e-3)
    name = optimizer.param_groups[0]["recipe"]
    assert name in lm.recipe_names()
    train(one, optimizer, 3)
    train(other, lm.MemOpt(other.named_parameters(), recipe=name, lr=1e-3), 3)
    assert_same_weights(one, other)


def test_paper_variants():
    model = tiny_llama()
    assert lm.AdaPM(model.named_parameters(), paper=True).defaults["betas"] == (0.9, 0.999)
    assert lm.AdaPM(model.named_parameters(), paper=True, betas=(0.8, 0.9)).defaults["betas"] == (0.8, 0.9)
    optimizer = lm.AdamSNSM(model.named_parameters(), paper=True, gap=50)
    recipe = optimizer._binding.blocks[model.lm_head.weight][0].recipe
    assert recipe.second_moment.reduction == "sum"
    assert (recipe.momentum.gap, recipe.momentum.projection, recipe.momentum.handover) == (50, "svd", "reset")
    assert recipe.momentum.correct_complement
    assert recipe.second_moment.correct_eps
    assert not recipe.momentum.stagger


def test_state_is_complete_before_the_first_step():
    model = tiny_gpt2()
    optimizer = lm.AdaPM(model.named_parameters())
    before = {param: {key: value.shape for key, value in state.items()} for param, state in optimizer.state.items()}
    assert set(before) == set(model.parameters())
    train(model, optimizer, 1)
    after = {param: {key: value.shape for key, value in state.items()} for param, state in optimizer.state.items()}
    assert before == after


def test_state_holds_tensors_only_and_groups_hold_scalars_only():
    optimizer = lm.AdaPMLean(tiny_gpt2().named_parameters())
    assert all(isinstance(value, torch.Tensor) for state in optimizer.state.values() for value in state.values())
    (group,) = optimizer.state_dict()["param_groups"]
    assert set(group) == {"lr", "betas", "eps", "weight_decay", "maximize", "max_update", "recipe", "params"}


def test_closure_is_evaluated_once_with_gradients():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-2)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.square().mean()
        loss.backward()
        return loss

    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.requires_grad
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_lr_schedulers():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=5)
    seen = []
    for _ in range(4):
        train(model, optimizer, 1)
        scheduler.step()
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
    assert len(set(seen)) == 4
    again = lm.AdaPMLean(model.named_parameters(), lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["max_lr"] == optimizer.param_groups[0]["max_lr"]


def test_maximize_is_descent_on_the_negative_loss():
    one, other = tiny_llama(), tiny_llama()
    up = lm.AdaPMLean(one.named_parameters(), maximize=True)
    down = lm.AdaPMLean(other.named_parameters())
    for seed in range(4):
        fill_grads(list(one.parameters()), seed)
        fill_grads(list(other.parameters()), seed)
        for param in other.parameters():
            param.grad.neg_()
        one.lm_head.weight.grad = one.lm_head.weight.grad[:1].expand(96, 32)  # shares memory with itself
        other.lm_head.weight.grad = other.lm_head.weight.grad[:1].expand(96, 32)
        kept = [param.grad.clone() for param in one.parameters()]
        up.step()
        down.step()
        for param, grad in zip(one.parameters(), kept, strict=True):
            assert_equal(param.grad, grad)
    assert_same_weights(one, other)


def test_parameters_without_gradient_keep_their_state():
    model = tiny_llama()
    optimizer = lm.AdaPM(model.named_parameters())
    train(model, optimizer, 2)
    head = model.lm_head.weight
    before = (head.clone(), {key: value.clone() for key, value in optimizer.state[head].items()})
    fill_grads(list(model.parameters()), seed=0)
    head.grad = None
    optimizer.step()
    assert_equal(head, nn.Parameter(before[0]))
    for key, value in optimizer.state[head].items():
        assert_equal(value, before[1][key])


def test_frozen_parameters_have_no_state_until_they_train():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    optimizer = lm.AdaPMLean(model.named_parameters())
    assert not optimizer.state[model.lm_head.weight]
    assert "lm_head.weight" not in [block.name for block in optimizer.snapshot().blocks]
    train(model, optimizer, 2)
    model.lm_head.weight.requires_grad_(True)
    train(model, optimizer, 2)
    assert float(optimizer.state[model.lm_head.weight]["step"]) == 2
    assert "lm_head.weight" in [block.name for block in optimizer.snapshot().blocks]


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_pickle_and_deepcopy_go_on_alike(recipe, tmp_path):
    model = tiny_gpt2()
    optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe, gap=None)
    train(model, optimizer, 2)
    torch.save({"model": model, "optimizer": optimizer}, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    twins = [(loaded["model"], loaded["optimizer"]), copy.deepcopy((model, optimizer))]
    train(model, optimizer, 2, seed=1)
    for twin, its_optimizer in twins:
        train(twin, its_optimizer, 2, seed=1)
        assert_same_weights(model, twin)
        assert repr(its_optimizer) == repr(optimizer)


def test_grad_scaler_skips_overflowing_steps():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model.lm_head.weight.detach().clone()
    scaler.scale(model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.square().mean()).backward()
    model.lm_head.weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert_equal(model.lm_head.weight.detach(), before)
    optimizer.zero_grad()
    scaler.scale(model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_bfloat16_parameters_get_float32_arithmetic(recipe):
    """The update is the float32 one, rounded once at the end."""
    model, twin = tiny_llama().bfloat16(), tiny_llama().bfloat16().float()
    optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe, lr=1e-2)
    reference = lm.MemOpt(twin.named_parameters(), recipe=recipe, lr=1e-2)
    for seed in range(4):
        fill_grads(list(model.parameters()), seed)
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = param.grad.float()
            other.data = param.data.float()
        optimizer.step()
        reference.step()
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param, other.bfloat16(), rtol=2**-7, atol=1e-5)
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}


def test_float64_parameters_get_float64_arithmetic():
    model = tiny_llama().double()
    optimizer = lm.AdaPMLean(model.named_parameters())
    train(model, optimizer, 2)
    state = optimizer.state[model.lm_head.weight]
    assert state["low_rank_q"].dtype == torch.float64


def test_autocast_and_matmul_precision_of_the_caller_do_not_reach_the_step():
    one, other = tiny_llama(), tiny_llama()
    plain, hostile = lm.AdaPMLean(one.named_parameters()), lm.AdaPMLean(other.named_parameters())
    before = torch.get_float32_matmul_precision()
    for seed in range(3):
        fill_grads(list(one.parameters()), seed)
        fill_grads(list(other.parameters()), seed)
        plain.step()
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hostile.step()
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)
    assert_same_weights(one, other)


@pytest.mark.parametrize("recipe", lm.recipe_names())
@pytest.mark.parametrize(
    "shape", [(0, 4), (4, 0), (3, 0, 2), (16, 8, 3), (8, 3, 3, 3), (6, 4, 5), (1, 9), (9, 1), (), (5,), (2, 2)]
)
def test_parameters_of_any_shape(recipe, shape):
    weight = nn.Parameter(torch.ones(shape))
    optimizer = lm.MemOpt([("w", weight)], recipe=recipe, lr=1e-2)
    for seed in range(3):
        fill_grads([weight], seed)
        optimizer.step()
    assert weight.isfinite().all()
    assert weight.numel() == 0 or not torch.equal(weight, torch.ones(shape))


def test_memory_format_does_not_matter():
    one = nn.Conv2d(4, 8, 3)
    other = copy.deepcopy(one).to(memory_format=torch.channels_last)
    for model in (one, other):
        optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-2)
        for seed in range(3):
            fill_grads(list(model.parameters()), seed)
            optimizer.step()
    torch.testing.assert_close(one.weight, other.weight.contiguous(), rtol=1e-6, atol=1e-7)


def test_runs_are_repeatable_and_do_not_touch_the_global_generator():
    states, models = [], []
    for _ in range(2):
        model = tiny_llama()
        torch.manual_seed(3)
        train(model, lm.AdamSNSM(model.named_parameters(), projection="random"), 3)
        states.append(torch.get_rng_state())
        models.append(model)
    assert_same_weights(*models)
    torch.manual_seed(3)
    assert_equal(states[0], torch.get_rng_state())


# ------------------------------------------------------------------------------------------------------------- tables


def test_plan_table_and_print():
    model = tiny_gpt2()
    optimizer = lm.AdaPM(model.named_parameters(), lr=2e-3)
    table = optimizer.plan_table()
    line = next(line for line in table.splitlines() if "h.0.attn.c_attn.weight:query" in line)
    assert line.split() == [
        "transformer.h.0.attn.c_attn.weight:query", "query", "word", "c_attn", "32×32", "columns", "0–31",
        "low_rank", "r=4", "dense", "10", "5,120", "8,192",
    ]  # fmt: skip
    assert "saved" in table.splitlines()[-1]
    assert repr(optimizer).startswith("AdaPM(recipe='adapm', lr=0.002, betas=(0.9, 0.95)")
    assert table in repr(optimizer)


# ---------------------------------------------------------------------------------------------- what happens elsewhere


def test_a_model_may_change_its_dtype_before_the_first_step_only():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters())
    model.double()
    train(model, optimizer, 2)
    assert optimizer.state[model.lm_head.weight]["low_rank_q"].dtype == torch.float64
    model.float()
    fill_grads(list(model.parameters()), 0)
    with pytest.raises(ValueError, match="has taken steps in torch.float64 arithmetic: create a new optimizer"):
        optimizer.step()


def test_a_default_device_does_not_matter():
    model = tiny_llama()
    with torch.device("meta"):
        optimizer = lm.AdaPMLean(model.named_parameters())
    assert optimizer.state[model.lm_head.weight]["step"].device.type == "cpu"
    fill_grads(list(model.parameters()), 0)
    torch.set_default_device("meta")
    try:
        optimizer.step()
    finally:
        torch.set_default_device(None)


def test_snapshots_change_nothing():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    optimizer = lm.AdaPMLean(model.named_parameters())
    before = set(optimizer.state_dict()["state"])
    optimizer.snapshot()
    print(optimizer)
    assert set(optimizer.state_dict()["state"]) == before


def test_frozen_integers_are_no_obstacle():
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    model = nn.Linear(4, 4)
    optimizer = lm.AdaPMLean([("quantized", weight), *model.named_parameters()])
    model(torch.ones(4)).sum().backward()
    optimizer.step()


def test_a_one_dimensional_convolution_is_one_matrix():
    model = nn.Sequential(nn.Conv1d(64, 64, 3))
    assert lm.AdaPMLean(model.named_parameters()).state[model[0].weight]["low_rank_q"].shape == (64, 4)
    experts = {"experts": nn.Parameter(torch.ones(4, 32, 64))}
    assert lm.AdaPMLean(experts.items()).state[experts["experts"]]["low_rank_q"].shape == (4, 32, 4)
