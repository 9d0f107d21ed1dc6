"""Rates by role: the same as groups made by hand, under every scheduler, and as lasting as the blocks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import lightning_memopt as lm
from lightning_memopt.optim import stepping
from tests._compare import assert_equal, assert_same_weights, relative_error
from tests._models import fill_grads, tiny_gpt2, tiny_llama
from tests.kinds.contract.cases import gradient

RATES: dict[str, dict[str, float]] = {
    "embedding": {"lr_multiplier": 11.3},
    "vector": {"weight_decay": 0},
    "*.layers.1.*": {"lr_multiplier": 0.3, "weight_decay": 0.02},
    "*.layers.1.mlp.*": {"lr_multiplier": 1.7},
}
MLP = "model.layers.0.mlp.up_proj.weight"


def of(name: str, ndim: int) -> tuple[float, float]:
    """Return the multiplier and the weight decay of `RATES`, written out, where a group's decay is 0.1."""
    if ".layers.1." in name:
        return (1.7 if ".mlp." in name else 0.3), 0.02
    return (11.3 if "embed" in name else 1.0), (0.0 if ndim < 2 else 0.1)


def by_hand(model: nn.Module, lr: float) -> torch.optim.AdamW:
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, param in model.named_parameters():
        groups.setdefault(of(name, param.ndim), []).append(param)
    found = [
        {"params": params, "lr": lr * multiplier, "weight_decay": decay, "multiplier": multiplier}
        for (multiplier, decay), params in groups.items()
    ]
    assert len(found) == 5
    return torch.optim.AdamW(found, lr=lr, fused=True)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_adamw_with_rates_is_torchs_with_groups_made_by_hand(dtype, lr):
    ours, theirs = tiny_llama().to(dtype), tiny_llama().to(dtype)
    mine = lm.MemOpt(ours.named_parameters(), "adamw", lr=lr, weight_decay=0.1, overrides=RATES)
    reference = by_hand(theirs, float(lr))
    scheduler = lr_scheduler.LambdaLR(mine, lambda step: 1 / (step + 1))
    for step in range(6):
        for group in reference.param_groups:
            group["lr"] = float(mine.param_groups[0]["lr"]) * group["multiplier"]
        for model in (ours, theirs):
            fill_grads(list(model.parameters()), step)
        mine.step()
        reference.step()
        scheduler.step()
    assert_same_weights(ours, theirs)


SCHEDULERS: dict[str, Callable[..., Any]] = {
    "cosine": lambda optimizer, lr: lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "warmup": lambda optimizer, lr: lr_scheduler.LinearLR(optimizer, 0.25, total_iters=4),
    "one cycle": lambda optimizer, lr: lr_scheduler.OneCycleLR(optimizer, lr, total_steps=8),
    "exponential": lambda optimizer, lr: lr_scheduler.ExponentialLR(optimizer, 0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_works(name):
    """Multiplying by 8 rounds nothing, so a schedule of eight times the rate is eight times the schedule."""
    ours, theirs = tiny_llama(), tiny_llama()
    mine = lm.MemOpt(ours.named_parameters(), "adamw", lr=2**-8, overrides={"embedding": {"lr_multiplier": 8}})
    rest = [param for param_name, param in theirs.named_parameters() if "embed" not in param_name]
    groups = [{"params": rest}, {"params": [theirs.model.embed_tokens.weight], "lr": 2**-5}]
    reference = torch.optim.AdamW(groups, lr=2**-8, weight_decay=0.0, fused=True)
    pairs = [
        (mine, SCHEDULERS[name](mine, 2**-8)),
        (reference, SCHEDULERS[name](reference, [2**-8, 2**-5])),
    ]
    for step in range(6):
        for model, (optimizer, scheduler) in zip((ours, theirs), pairs, strict=True):
            fill_grads(list(model.parameters()), step)
            optimizer.step()
            scheduler.step()
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_a_multiplier_scales_every_step_of_every_recipe(recipe):
    found = []
    for factor in (1, 8):
        model = tiny_gpt2()
        for param in model.parameters():
            param.detach().zero_()  # so that a factor of 8 rounds nothing
        overrides = {"*": {"lr_multiplier": factor}}
        optimizer = lm.MemOpt(model.named_parameters(), recipe, lr=1e-3, overrides=overrides)
        for step in range(4):
            fill_grads(list(model.parameters()), step)
            optimizer.step()
        found.append((model, optimizer.state_dict()["state"]))
    (model, state), (faster, state_of_faster) = found
    for name, param in model.named_parameters():
        assert_equal(dict(faster.named_parameters())[name].detach(), 8 * param.detach(), name)
    assert_equal(state_of_faster, state)


def test_parts_of_a_fused_weight_have_rates_of_their_own():
    """Compared with AdamW on query, key and value as three parameters."""
    name, values = "h.attn.in_proj_weight", gradient((36, 12), 1, torch.float64)
    fused = nn.Parameter(values.clone())
    parts = [nn.Parameter(part.clone()) for part in values.chunk(3)]
    overrides = {"query": {"lr_multiplier": 3}, f"{name}:value": {"lr_multiplier": 0.7, "weight_decay": 0.2}}
    optimizer = lm.MemOpt([(name, fused)], "adamw", lr=1e-2, weight_decay=0.1, overrides=overrides)
    rates = zip(parts, (3e-2, 1e-2, 0.7 * 1e-2), (0.1, 0.1, 0.2), strict=True)
    groups = [{"params": [part], "lr": lr, "weight_decay": decay} for part, lr, decay in rates]
    reference = torch.optim.AdamW(groups, fused=True)
    for step in range(5):
        fused.grad = gradient((36, 12), 10 + step, torch.float64)
        for part, grad in zip(parts, fused.grad.chunk(3), strict=True):
            part.grad = grad.clone()
        optimizer.step()
        reference.step()
    assert relative_error(fused, torch.cat(parts)) <= 1e-14  # a part of a weight is not updated by torch's kernel


def test_the_rates_of_a_group_are_what_is_changed():
    """Groups keep their own learning rates, and a multiplier applies to that of a block's group."""
    model = tiny_llama()
    fast, slow = list(model.named_parameters())[:3], list(model.named_parameters())[3:]
    optimizer = lm.MemOpt(
        [{"params": fast, "lr": 1e-2, "recipe": "adapm"}, {"params": slow, "lr_scale": 7.0}],
        "adamw",
        lr=1e-3,
        weight_decay=0.1,
        overrides={"query": {"lr_multiplier": 3}, "vector": {"weight_decay": 0}},
    )
    moved = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    for name, lr in (
        ("model.layers.0.self_attn.q_proj.weight", 3e-2),
        ("model.layers.1.self_attn.q_proj.weight", 3e-3),
    ):
        param = model.get_parameter(name)
        assert relative_error(moved[name] * (1 - lr * 0.1) - param, torch.full_like(param, lr)) < 1e-4
    norm = model.model.norm.weight
    assert relative_error(moved["model.norm.weight"] - norm, torch.full_like(norm, 1e-3)) < 1e-4
    assert "lr_multiplier" not in optimizer.param_groups[0]


def test_blocks_with_equal_rates_share_a_batch(monkeypatch):
    sizes: list[int] = []
    original = stepping.update
    monkeypatch.setattr(
        stepping, "update", lambda updates, *rest: sizes.append(len(updates)) or original(updates, *rest)
    )

    def batches(overrides: dict[str, Any] | None) -> list[int]:
        model = tiny_llama()
        optimizer = lm.MemOpt(model.named_parameters(), "adapm_lean", weight_decay=0.1, overrides=overrides)
        fill_grads(list(model.parameters()), 0)
        sizes.clear()
        optimizer.step()
        return sorted(sizes)

    plain = batches(None)
    assert batches({"*": {"lr_multiplier": 3}}) == batches({"*": {"weight_decay": 0.1}}) == plain
    assert batches({"vector": {"weight_decay": 0}}) == plain  # vectors are a batch of their own anyway
    assert sum(batches({"query": {"lr_multiplier": 3}, "key": {"lr_multiplier": 3}})) == sum(plain)
    assert len(batches({"query": {"lr_multiplier": 3}})) == len(plain) + 1


def test_dropped_momentum_is_released_at_the_rate_of_its_block():
    moved = []
    for factor in (1, 8):
        param = nn.Parameter(gradient((20, 12), 1))
        overrides = {"mlp": {"lr_multiplier": factor, "weight_decay": 0.5}}
        optimizer = lm.MemOpt([(MLP, param)], "adapm_lean", rank=6, overrides=overrides)
        for step in range(4):
            param.grad = gradient((20, 12), 10 + step)
            optimizer.step()
        param.detach().zero_()
        optimizer.reformat({MLP: {"rank": 2}})
        moved.append(param.detach().clone())
    assert moved[0].any()
    assert_equal(moved[1], 8 * moved[0])


def test_rates_last_through_reformat_bind_and_rebind():
    model = tiny_llama()
    optimizer = lm.MemOpt(list(model.parameters()), "adapm_lean", overrides=RATES)
    optimizer.bind(model)
    before = [block.rates for *_, block in optimizer.blocks()]
    optimizer.reformat({MLP: {"rank": 2}, "model.embed_tokens.weight": lm.Recipe("dense", "dense")})
    optimizer.rebind({param: nn.Parameter(param.detach().clone()) for param in model.parameters()})
    assert [block.rates for *_, block in optimizer.blocks()] == before
    assert len(set(before)) == 5


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_have_the_same_rates(copied):
    model = tiny_llama()
    optimizer = lm.MemOpt(model.named_parameters(), "adapm_lean", lr=1e-2, weight_decay=0.1, overrides=RATES)
    other, its = copied((model, optimizer))
    for one, each in ((model, optimizer), (other, its)):
        fill_grads(list(one.parameters()), 3)
        each.step()
    assert_same_weights(model, other)


def test_what_an_earlier_version_has_pickled_has_the_rates_of_its_group():
    model = tiny_llama()
    optimizer = lm.MemOpt(model.named_parameters(), "adapm_lean")
    for *_, block in optimizer.blocks():
        del vars(block)["rates"]
    fill_grads(list(model.parameters()), 0)
    optimizer.step()
    assert {block.lr_multiplier for block in optimizer.snapshot().blocks} == {1.0}


def steps(model: nn.Module, optimizer: lm.MemOpt, numbers: range) -> None:
    for number in numbers:
        fill_grads(list(model.parameters()), number)
        optimizer.step()


def test_a_resumed_run_continues_as_if_uninterrupted():
    options: dict[str, Any] = {"recipe": "adapm_lean", "lr": 1e-2, "weight_decay": 0.1, "overrides": RATES}
    model = tiny_llama()
    optimizer = lm.MemOpt(model.named_parameters(), **options)
    steps(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(model, optimizer, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = tiny_llama(seed=1)
    other.load_state_dict(saved["model"])
    resumed = lm.MemOpt(other.named_parameters(), **options)
    resumed.load_state_dict(saved["optimizer"])
    steps(other, resumed, range(3, 6))
    assert_same_weights(model, other)


def test_a_checkpoint_holds_no_rates_and_changes_none():
    model = tiny_llama()
    plain = lm.MemOpt(model.named_parameters(), "adapm_lean", weight_decay=0.1)
    steps(model, plain, range(2))
    own = lm.MemOpt(model.named_parameters(), "adapm_lean", weight_decay=0.1, overrides=RATES)
    before = [block.rates for *_, block in own.blocks()]
    own.load_state_dict(plain.state_dict())
    assert [block.rates for *_, block in own.blocks()] == before
    saved = own.state_dict()
    assert saved.keys() == plain.state_dict().keys()
    assert saved["param_groups"] == plain.state_dict()["param_groups"]
    assert_equal(saved["state"], plain.state_dict()["state"])


def test_a_multiplied_rate_that_is_absurd_raises_and_weights_stay_finite():
    param = nn.Parameter(torch.zeros(20, 12, dtype=torch.float16))
    optimizer = lm.MemOpt([(MLP, param)], "adapm_lean", lr=1e-3, overrides={"mlp": {"lr_multiplier": 1e9}})
    with pytest.raises(FloatingPointError, match=f"become infinite or NaN in: {MLP}"):
        steps(nn.ParameterList([param]), optimizer, range(1))
    assert bool(param.isfinite().all())


def test_the_table_has_a_column_if_a_block_differs_from_its_group():
    model = tiny_llama()

    def table(**options: Any) -> list[str]:
        return lm.MemOpt(model.named_parameters(), **options).plan_table().splitlines()

    same = {"embedding": {"lr_multiplier": 1}, "vector": {"weight_decay": 0.1}}
    assert table(weight_decay=0.1, overrides=same) == table(weight_decay=0.1)
    assert "rates" not in table()[0]
    header, _, *lines = table(weight_decay=0.1, overrides=RATES)
    assert header.split()[-4:] == ["rates", "bytes", "AdamW", "bytes"]
    assert " lr × 11.3 " in lines[0]
    assert any("layers.1.mlp.up_proj" in line and " lr × 1.7, decay 0.02 " in line for line in lines)
    assert any("layers.0.input_layernorm" in line and " decay 0 " in line for line in lines)
    assert "lr" not in next(line for line in lines if "layers.0.mlp.up_proj" in line)
