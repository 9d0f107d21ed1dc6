"""bfloat16 weights: extra bits as state, and rounding of the last bit."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.kinds.noise import Noise
from lightning_memopt.optim.weights import LOW_BITS, LOW_DTYPES, joined_, split_
from tests._compare import assert_equal, relative_error
from tests._models import tiny_llama
from tests.kinds.contract.cases import gradient
from tests.optim._sharded import fill, named, plain

BF16 = torch.bfloat16
STEPS = (1, 2, 4, 6, 7)


def halves(value, kept, noise=None):
    weights, low = torch.empty_like(value, dtype=BF16), torch.empty_like(value, dtype=LOW_DTYPES[kept])
    split_(value.clone(), weights, low, noise)
    return weights, low


def numbers():
    ordinary = torch.cat([gradient((1000,), seed, scale=scale) for seed, scale in enumerate((1e-30, 1e-3, 1.0, 1e30))])
    edges = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-42, 3.38e38, 1 + 2**-8, 1 + 2**-9, -1 - 2**-8, 1 + 2**-8 + 2**-16]
    return torch.cat([ordinary, torch.tensor(edges)])


def test_all_bits_hold_every_number():
    value = numbers()
    weights, low = halves(value, 32)
    assert_equal(joined_(torch.empty_like(value), weights, low), value)
    assert ((weights.float() - value).abs() <= (value.bfloat16().float() - value).abs()).all(), "rounds to nearest"


def test_24_bits_hold_the_nearest_number():
    value = numbers()[:-4]
    found = joined_(torch.empty_like(value), *halves(value, 24))
    assert ((found - value).abs() <= value.abs() * 2.0**-16 + 2.0**-142).all()
    assert not (found.view(torch.int32) & 0xFF).any()
    assert_equal(halves(found, 24)[0], halves(found, 32)[0])


def test_24_bits_round_by_chance_without_bias():
    count, value = 1 << 16, 1 + 2.0**-23 * 77
    found = joined_(torch.empty(count), *halves(torch.full((count,), value), 24, Noise.of(3, (count,), (0,))))
    assert set(found.tolist()) == {1.0, 1 + 2.0**-15}
    assert float((found > 1).double().mean()) == pytest.approx(77 / 256, abs=0.01)


# --- whole optimizers ------------------------------------------------------------------------------------------------


def params_of(dtype):
    return {name: nn.Parameter(param.detach().to(BF16).to(dtype)) for name, param in plain().items()}


def take(optimizer, params, steps):
    for step in steps:
        fill(whole := plain(), step)
        for name, param in params.items():
            grad = whole[name].grad
            param.grad = None if grad is None else grad.to(BF16).to(param.dtype)
        optimizer.step()


def trained(recipe, dtype, steps=STEPS, **options):
    params = params_of(dtype)
    optimizer = lm.MemOpt(named(params), recipe, lr=1e-2, weight_decay=0.1, **options)
    take(optimizer, params, steps)
    return params, optimizer


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_all_bits_are_the_run_in_float32(recipe):
    """The weights of each step are those of float32, and their halves are what the model computes with."""
    params, optimizer = trained(recipe, BF16, master_weight_bits=32)
    expected, _ = trained(recipe, torch.float32)
    for name, weight in optimizer.full_weights().items():
        assert weight.dtype == torch.float32
        # torch's fused AdamW makes the update of float32 weights.
        assert relative_error(weight, expected[name].detach()) < 1e-6, name
        torch.testing.assert_close(params[name].detach().float(), weight, rtol=2**-8, atol=1e-38)


@pytest.mark.parametrize(
    "options", [{"master_weight_bits": 24}, {"master_weight_bits": 24, "bf16_stochastic_round": False}, {}]
)
@pytest.mark.parametrize("recipe", ["adapm_lean", "adam_snsm"])
def test_fewer_bits_stay_near(recipe, options):
    bits = options.get("master_weight_bits", 16)
    _, optimizer = trained(recipe, BF16, **options)
    expected, _ = trained(recipe, torch.float32)
    for name, weight in optimizer.full_weights().items():
        assert relative_error(weight, expected[name].detach()) < (2e-4 if bits == 24 else 3e-2), name


def mean_of_a_drift(**options):
    weight = nn.Parameter(torch.ones(64, 64, dtype=BF16))
    optimizer = lm.AdaPMLean([("mlp.up_proj.weight", weight)], lr=1e-5, betas=(0.0, 0.95), **options)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return float(optimizer.full_weights()["mlp.up_proj.weight"].double().mean())


def test_small_updates_add_up():
    """A hundred updates of 1e-5 of a weight of 1, whose last bit is 4e-3."""
    assert mean_of_a_drift(bf16_stochastic_round=False) == 1.0
    assert mean_of_a_drift() == pytest.approx(1 - 1e-3, abs=2e-4)
    assert mean_of_a_drift(master_weight_bits=24) == pytest.approx(1 - 1e-3, abs=2e-5)
    assert mean_of_a_drift(master_weight_bits=32) == pytest.approx(1 - 1e-3, abs=2e-6)


def test_rounding_does_not_touch_torchs_generator_and_repeats():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, _ = trained("adapm_lean", BF16)
    assert_equal(torch.get_rng_state(), before)
    two, _ = trained("adapm_lean", BF16)
    other, _ = trained("adapm_lean", BF16, seed=1)
    assert_equal(list(one.values()), list(two.values()))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_other_dtypes_have_no_extra_bits():
    for dtype in (torch.float32, torch.float64, torch.float16):
        weight = nn.Parameter(torch.ones(8, 8, dtype=dtype))
        optimizer = lm.AdaPMLean([("mlp.up_proj.weight", weight)], master_weight_bits=32)
        assert LOW_BITS not in optimizer.state[weight]
        assert optimizer.full_weights()["mlp.up_proj.weight"].dtype == torch.float32


def test_a_model_converted_later_gets_its_bits():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-3, master_weight_bits=24)
    model.bfloat16()
    for number, param in enumerate(model.parameters()):
        param.grad = gradient(tuple(param.shape), number).bfloat16()
    optimizer.step()
    for param in model.parameters():
        assert optimizer.state[param][LOW_BITS].dtype == torch.int8
        assert optimizer.state[param][LOW_BITS].any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"master_weight_bits": 20}, ValueError, "must be 16 .* 24 or 32 .*, got 20"),
        ({"master_weight_bits": True}, ValueError, "got True"),
        ({"master_weight_bits": 24.0}, ValueError, "got 24.0"),
        ({"bf16_stochastic_round": "no"}, TypeError, "must be True or False, got 'no'"),
    ],
)
def test_invalid_options(options, error, message):
    with pytest.raises(error, match=message):
        lm.AdaPMLean(tiny_llama().named_parameters(), **options)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("recipe", ["adapm_lean", "adam_snsm", "adamw"])
def test_resuming_changes_nothing(recipe, bits):
    expected, _ = trained(recipe, BF16, master_weight_bits=bits)
    params, optimizer = trained(recipe, BF16, STEPS[:3], master_weight_bits=bits)
    saved = copy.deepcopy(optimizer.state_dict())
    again = lm.MemOpt(named(params), recipe, master_weight_bits=bits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lm.ResumeWarning)
        again.load_state_dict(saved)
    take(again, params, STEPS[3:])
    assert_equal(list(params.values()), list(expected.values()))


@pytest.mark.parametrize("before", [16, 24, 32])
@pytest.mark.parametrize("after", [16, 24, 32])
def test_bits_follow_the_optimizer_not_the_checkpoint(before, after):
    params, optimizer = trained("adapm_lean", BF16, master_weight_bits=before)
    full = optimizer.full_weights()
    again = lm.AdaPMLean(named(params), lr=1e-2, weight_decay=0.1, master_weight_bits=after)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    told = [str(each.message) for each in caught if "bits" in str(each.message)]
    assert len(told) == (before > after), told
    for name, weight in again.full_weights().items():
        lost = 2.0 ** -(after - 9)  # a last bit: the weight itself is not rounded again
        torch.testing.assert_close(weight, full[name], rtol=lost if after < before else 0, atol=1e-38, msg=name)
    states = [again.state[param] for param in params.values() if param.numel()]
    assert all((LOW_BITS in state) == (after > 16) for state in states)


def test_bits_of_another_shape_are_refused():
    params, optimizer = trained("adapm_lean", BF16, master_weight_bits=24)
    for bits in (torch.zeros(3, 3, dtype=torch.int8), torch.zeros(50, 24)):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0][LOW_BITS] = bits
        before = optimizer.full_weights()
        with pytest.raises(ValueError, match=r"'low_bits' of shape .*, expected \(50, 24\) and int8 or int16"):
            optimizer.load_state_dict(saved)
        assert_equal(list(optimizer.full_weights().values()), list(before.values()))


@pytest.mark.parametrize("bits", [24, 32])
def test_weights_of_float32_go_on_in_bfloat16_and_back(bits):
    _, optimizer = trained("adapm_lean", torch.float32, STEPS[:2])
    saved, halved = copy.deepcopy(optimizer.state_dict()), params_of(BF16)
    with torch.no_grad():
        for name, weight in optimizer.full_weights().items():
            halved[name].copy_(weight)
    half = lm.AdaPMLean(named(halved), lr=1e-2, weight_decay=0.1, master_weight_bits=bits)
    half.load_state_dict(saved)
    take(half, halved, STEPS[2:4])
    single = {name: nn.Parameter(weight) for name, weight in half.full_weights().items()}
    back = lm.AdaPMLean(named(single), lr=1e-2, weight_decay=0.1)
    with pytest.warns(lm.ResumeWarning, match="were bfloat16 and are not now.*`full_weights"):
        back.load_state_dict(copy.deepcopy(half.state_dict()))
    take(back, single, STEPS[4:])
    expected, _ = trained("adapm_lean", torch.float32)
    for name, weight in single.items():
        assert relative_error(weight.detach(), expected[name].detach()) < 1e-2, name


@pytest.mark.parametrize("bits", [24, 32])
def test_weights_that_something_else_sets_to_zero_train_on(bits):
    """Of a clamped or pruned weight, nothing is left beside it: less than zero would be NaN."""
    weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = lm.AdaPMLean([("mlp.up_proj.weight", weight)], lr=1e-3, master_weight_bits=bits)
    for step in range(3):
        weight.grad = gradient((64, 64), step, BF16)
        optimizer.step()
    with torch.no_grad():
        weight.copy_(weight.clamp(min=0))
        weight[:8] = -0.0
    assert optimizer.state[weight][LOW_BITS][weight == 0].lt(0).any()
    assert optimizer.full_weights()["mlp.up_proj.weight"].isfinite().all()
    weight.grad = gradient((64, 64), 3, BF16)
    optimizer.step()
    assert weight.isfinite().all()
    assert not (weight == 0).any()


def test_a_model_that_leaves_bfloat16_is_warned():
    model = tiny_llama().bfloat16()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-3, master_weight_bits=24)
    for _ in range(2):
        for number, param in enumerate(model.parameters()):
            param.grad = gradient(tuple(param.shape), number).to(param.dtype)
        with pytest.warns(UserWarning, match="lose the bits") if param.dtype == torch.float32 else nullcontext():
            optimizer.step()
        for param in model.parameters():
            param.grad = None
        model.float()
        assert all(weight.dtype == torch.float32 for weight in optimizer.full_weights().values())


def test_loading_after_the_model_became_bfloat16_keeps_the_bits():
    params, optimizer = trained("adapm_lean", BF16, master_weight_bits=24)
    single = {name: nn.Parameter(param.detach().float()) for name, param in params.items()}
    again = lm.AdaPMLean(named(single), lr=1e-2, weight_decay=0.1, master_weight_bits=24)
    for param in single.values():
        param.data = param.data.bfloat16()
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(list(again.full_weights().values()), list(optimizer.full_weights().values()))


def test_reformat_keeps_the_bits():
    params, optimizer = trained("adapm_lean", BF16, STEPS[:3], master_weight_bits=32)
    before = {name: weight.clone() for name, weight in optimizer.full_weights().items()}
    optimizer.reformat({"query": {"momentum": "dense"}})
    assert_equal(list(optimizer.full_weights().values()), list(before.values()))
    optimizer.reformat({"query": {"momentum": "none"}})
    name = "model.layers.0.self_attn.q_proj.weight"
    released = optimizer.full_weights()[name]
    twin, single = trained("adapm_lean", torch.float32, STEPS[:3])
    single.reformat({"query": {"momentum": "dense"}})
    single.reformat({"query": {"momentum": "none"}})
    torch.testing.assert_close(released, twin[name].detach(), rtol=2e-6, atol=1e-7)
    assert not torch.equal(released, before[name])
