"""SCALE and Muon: denominators that are norms of the direction, against the formulas and torch's own Muon."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.kinds.newton_schulz import inverse_root
from lightning_memopt.kinds.second_moment import OrthogonalSecondMoment
from tests._compare import assert_equal, relative_error
from tests.kinds.contract.cases import gradient

SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
}
UP = "model.layers.0.mlp.up_proj.weight"
REST = {"model.embed_tokens.weight": (40, 16), "lm_head.weight": (40, 16), "model.norm.weight": (16,)}
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def weights(shapes, dtype=torch.float32):
    return {name: nn.Parameter(gradient(shape, 7, dtype)) for name, shape in shapes.items()}


def take_steps(optimizer, params, numbers, scale=1.0):
    for number in numbers:
        for place, param in enumerate(params.values()):
            common = gradient(tuple(param.shape), place)
            param.grad = ((gradient(tuple(param.shape), 100 * number + place) + common) * scale).to(param.dtype)
        optimizer.step()


class PlainMuon(torch.optim.Optimizer):
    """Muon on whole matrices in float32, one product after the other."""

    def __init__(self, params, **options):
        super().__init__(params, options)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for param in group["params"]:
            average = self.state[param].setdefault("average", torch.zeros_like(param))
            average.lerp_(param.grad, 1 - group["momentum"])
            x = param.grad.lerp(average, group["momentum"]) if group["nesterov"] else average
            x, (a, b, c) = x / x.norm(), group["coefficients"]
            for _ in range(5):
                square = x.mT @ x
                x = a * x + x @ (b * square + c * square @ square)
            m, n = param.shape
            factor = max(1, m / n) ** 0.5 if group["adjust_lr_fn"] == "original" else 0.2 * max(m, n) ** 0.5
            param.mul_(1 - group["lr"] * group["weight_decay"]).add_(x, alpha=-group["lr"] * factor)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_muon_is_torchs(adjust_lr_fn, nesterov):
    """Up to bfloat16: torch's iteration has 2⁻⁸ of relative error in every product, ours is exact to float32."""
    options = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    ours, plain, torchs = (weights(SHAPES) for _ in range(3))
    optimizers = [
        (lm.Muon(ours.items(), betas=(0.9, 0.95), **options), ours),
        (PlainMuon(plain.values(), momentum=0.9, coefficients=COEFFICIENTS, **options), plain),
    ]
    if hasattr(torch.optim, "Muon"):
        optimizers.append((torch.optim.Muon(torchs.values(), momentum=0.9, **options), torchs))
    for optimizer, params in optimizers:
        take_steps(optimizer, params, range(1, 9))
    start = weights(SHAPES)
    for name in SHAPES:
        moved = [params[name].detach() - start[name].detach() for _, params in optimizers]
        assert relative_error(moved[0], moved[1]) < 1e-5, name
        if len(moved) > 2:
            assert relative_error(moved[0], moved[2]) < 2e-2, name


def test_muon_leaves_the_rest_to_adamw():
    ours, torchs = weights({**SHAPES, **REST}), weights(REST)
    take_steps(lm.Muon(ours.items(), lr=0.01, weight_decay=0.1), ours, range(1, 6))
    optimizer = torch.optim.AdamW(torchs.values(), lr=0.01, betas=(0.95, 0.95), weight_decay=0.1, fused=True)
    for number in range(1, 6):
        for place, (name, param) in enumerate(ours.items()):
            if name in torchs:
                common = gradient(tuple(param.shape), place)
                torchs[name].grad = gradient(tuple(param.shape), 100 * number + place) + common
        optimizer.step()
    for name, param in torchs.items():
        assert_equal(ours[name], param)


def test_muon_of_transposed_weights_adjusts_by_outputs():
    """A ``Conv1D`` of GPT-2 holds the transposed weight: its update is that of the linear layer, transposed."""
    linear, conv = nn.Parameter(torch.zeros(64, 16)), nn.Parameter(torch.zeros(16, 64))
    linear.grad = gradient((64, 16), 1)
    conv.grad = linear.grad.mT.contiguous()
    options = {"lr": 0.1, "adjust_lr_fn": "original"}
    lm.Muon([("model.layers.0.mlp.up_proj.weight", linear)], **options).step()
    optimizer = lm.Muon([("transformer.h.0.mlp.c_fc.weight", conv)], **options)
    (block,) = [block for *_, block in optimizer.blocks()]
    assert block.layout.output_dim == -1
    optimizer.step()
    assert relative_error(conv.detach(), linear.detach().mT) < 1e-6
    assert float(torch.linalg.svdvals(linear.detach())[0]) == pytest.approx(0.2, rel=0.3)  # 0.1 · √(64 / 16)


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-10, 1e14], ids=str)
@pytest.mark.parametrize("recipe", ["muon", "scale"])
def test_any_size_of_gradients_is_safe(recipe, scale):
    params = weights({**SHAPES, **REST})
    optimizer = lm.MemOpt(params.items(), recipe, lr=0.1)
    take_steps(optimizer, params, range(1, 4), scale)
    assert all(bool(param.isfinite().all()) for param in params.values())
    moved = max(float((params[name].detach() - gradient(shape, 7)).abs().max()) for name, shape in SHAPES.items())
    assert moved <= 3 * 0.1 * (1.2 * 0.2 * 24**0.5 if recipe == "muon" else 24**0.5)
    assert (moved == 0) == (scale == 0 or (recipe == "scale" and scale == 1e-25)), "eps is 1e-8"


def test_muon_amplifies_small_singular_values_by_its_slope_at_most():
    """A gradient of rank 2 stays of rank 2: what float32 leaves elsewhere grows 484 times, not to a singular value."""
    param = nn.Parameter(torch.zeros(24, 16))
    param.grad = gradient((24, 2), 1) @ gradient((2, 16), 2)
    lm.Muon([(UP, param)], lr=1.0, adjust_lr_fn="original").step()
    values = torch.linalg.svdvals(param.detach())
    assert float(values[1]) > 0.6
    assert float(values[2]) < 1e-4


class PlainSCALE:
    """SCALE as its authors have it: means over inputs, for the embedding over tokens; the head's momentum first."""

    def __init__(self, params, lr):
        self.params, self.lr, self.average = params, lr, 0.0

    @torch.no_grad()
    def step(self):
        for name, param in self.params.items():
            grad = param.grad
            if name == "lm_head.weight":
                grad = self.average = 0.9 * self.average + 0.1 * grad
            root = grad.square().mean(0 if "embed" in name else 1, keepdim=True).sqrt()
            param.sub_(self.lr * grad / root.clamp(min=1e-8))


def test_scale_is_the_authors():
    shapes = {**SHAPES, "model.embed_tokens.weight": (40, 16), "lm_head.weight": (40, 16)}
    ours, theirs = weights(shapes), weights(shapes)
    take_steps(lm.SCALE(ours.items(), lr=0.01), ours, range(1, 21))
    take_steps(PlainSCALE(theirs, 0.01), theirs, range(1, 21))
    start = weights(shapes)
    for name in shapes:
        error = relative_error(ours[name].detach() - start[name].detach(), theirs[name].detach() - start[name].detach())
        assert error < 1e-6, name


def test_scale_keeps_the_heads_momentum_and_adamws_state_of_vectors():
    params = weights({**SHAPES, **REST})
    snapshot = lm.SCALE(params.items()).snapshot()
    held = {block.name: block.state.momentum + block.state.second_moment for block in snapshot.blocks}
    assert {name: size for name, size in held.items() if size} == {"lm_head.weight": 4 * 640, "model.norm.weight": 128}


@pytest.mark.parametrize("recipe", ["muon", "scale"])
def test_a_norm_of_the_direction_needs_no_bound(recipe):
    optimizer = lm.MemOpt(weights({**SHAPES, **REST}).items(), recipe)
    assert {block.max_update for block in optimizer.snapshot().blocks} == {None}


@pytest.mark.parametrize("momentum", ["none", "dense", "low_rank", "subspace"])
@pytest.mark.parametrize("second_moment", ["normalized", "orthogonal"])
def test_every_momentum_can_be_normalized(second_moment, momentum):
    """By the norm of its direction, whatever that consists of."""
    changes = {"*": {"momentum": momentum, "second_moment": second_moment}}
    ours, bare = weights(SHAPES), weights(SHAPES)
    optimizer = lm.MemOpt(ours.items(), "adamw", lr=1.0, overrides=changes)
    other = lm.MemOpt(bare.items(), "adamw", lr=1.0, overrides={"*": {**changes["*"], "second_moment": "none"}})
    for number in range(1, 4):
        before = [{name: param.detach().clone() for name, param in params.items()} for params in (ours, bare)]
        take_steps(optimizer, ours, [number])
        take_steps(other, bare, [number])
        for name in SHAPES:
            found, direction = (old[name] - new[name].detach() for old, new in zip(before, (ours, bare), strict=True))
            if second_moment == "normalized":
                expected = direction / direction.square().mean(1, keepdim=True).sqrt()
            else:
                expected = plain_orthogonal(direction.double()) * 0.2 * max(direction.shape) ** 0.5
            assert relative_error(found, expected) < 1e-4, (name, number)  # weights of about 1 round to 1e-7


def plain_orthogonal(x):
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s, (a, b, c) = s / s.norm(), COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u * s @ vt


@pytest.mark.parametrize("recipe", ["muon", "scale"])
def test_adamws_momentum_continues(recipe):
    params = weights({**SHAPES, **REST})
    adamw = torch.optim.AdamW(params.values())
    take_steps(adamw, params, [1, 2])
    optimizer = lm.MemOpt(params.items(), recipe)
    with pytest.warns(lm.ResumeWarning):
        optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    kept = {name for name, param in params.items() if "exp_avg" in optimizer.state[param]}
    assert kept == ({*SHAPES, *REST} if recipe == "muon" else {"lm_head.weight", "model.norm.weight"})
    beta1 = optimizer.param_groups[0]["betas"][0]
    for name in kept:  # as after two steps with the recipe's β₁
        counted = adamw.state[params[name]]["exp_avg"] * ((1 - beta1**2) / (1 - 0.9**2))
        torch.testing.assert_close(optimizer.state[params[name]]["exp_avg"], counted)


@pytest.mark.parametrize("recipe", ["muon", "scale"])
def test_state_is_loaded_by_kinds_that_leave_no_trace(recipe):
    params, others = weights({**SHAPES, **REST}), weights({**SHAPES, **REST})
    optimizer, resumed = lm.MemOpt(params.items(), recipe, lr=0.01), lm.MemOpt(others.items(), recipe, lr=0.01)
    take_steps(optimizer, params, [1, 2])
    take_steps(resumed, others, [1])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, param in params.items():
        others[name].data.copy_(param.data)
    take_steps(optimizer, params, [3])
    take_steps(resumed, others, [3])
    for name, param in params.items():
        assert_equal(others[name], param)


def test_a_smaller_momentum_releases_over_the_norm_of_the_larger():
    """What the factors drop moves the weights by β₁/(1−β₁) of its share in an update."""
    params = {UP: nn.Parameter(gradient((24, 16), 7))}
    optimizer = lm.Muon(params.items(), lr=0.01, betas=(0.9, 0.95), max_update=None)
    take_steps(optimizer, params, [1, 2, 3])
    (param,) = params.values()
    before, average = param.detach().clone(), optimizer.state[param]["exp_avg"].double()
    optimizer.reformat({UP: {"momentum": "low_rank", "rank": 3}})
    u, _, vt = torch.linalg.svd(average, full_matrices=False)
    values = u.mT @ plain_orthogonal(average) @ vt.mT
    values[:3] = 0
    expected = 0.01 * 9 * (1 - 0.9**3) * 0.2 * 24**0.5 * (u @ values @ vt)
    assert relative_error(before - param.detach(), expected) < 1e-4
    take_steps(optimizer, params, [4])
    optimizer.reformat({UP: {"momentum": "dense"}})
    take_steps(optimizer, params, [5])
    assert bool(param.isfinite().all())


@pytest.mark.parametrize("value", [(1.0, 2.0), ("a", 1.0, 1.0), 3.4])
def test_coefficients_are_three_numbers(value):
    with pytest.raises(ValueError, match=r"`ns_coefficients` must be three numbers, got"):
        OrthogonalSecondMoment(ns_coefficients=value)


def test_coefficients_that_diverge_are_refused():
    match = r"`ns_coefficients` must keep singular values between 0 and 2, got \(9.0, 1.0, 1.0\): 5 steps bring them"
    with pytest.raises(ValueError, match=match):
        OrthogonalSecondMoment(ns_coefficients=(9.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"`ns_steps` must be an integer from 1 to 10, got 11; more would amplify"):
        OrthogonalSecondMoment(ns_steps=11)
    assert OrthogonalSecondMoment(ns_coefficients=[2, -1.5, 0.5]).ns_coefficients == (2.0, -1.5, 0.5)


@pytest.mark.parametrize("option", ["bias_correction", "correct_eps"])
@pytest.mark.parametrize(("recipe", "kinds"), [("scale", "none × normalized"), ("galore", "galore × none")])
def test_without_an_average_there_is_nothing_to_correct(recipe, kinds, option):
    with pytest.raises(ValueError, match=f"sets '{option}', which has no effect on .* they have {kinds}"):
        lm.MemOpt(weights(SHAPES).items(), recipe, overrides={"mlp": {option: False}})


@pytest.mark.parametrize("second_moment", ["normalized", "orthogonal"])
def test_a_norm_of_the_direction_and_its_momentum_can_go_together(second_moment):
    params = weights(SHAPES)
    change = {"momentum": "low_rank", "rank": 2, "second_moment": second_moment}
    optimizer = lm.MemOpt(params.items(), "muon", overrides={"mlp": change})
    take_steps(optimizer, params, range(1, 4))
    optimizer.reformat({UP: {"momentum": "dense", "second_moment": "none"}})
    take_steps(optimizer, params, [4])
    assert all(param.isfinite().all() for param in params.values())


def test_kinds_without_state_replace_each_other():
    params = weights(SHAPES)
    optimizer = lm.Muon(params.items())
    take_steps(optimizer, params, range(1, 4))
    momentum = optimizer.state[params[UP]]["exp_avg"].clone()
    optimizer.reformat({"mlp": {"second_moment": "normalized"}})
    assert_equal(optimizer.state[params[UP]]["exp_avg"], momentum)
    assert next(block for block in optimizer.snapshot().blocks if block.name == UP).second_moment == "normalized"
    take_steps(optimizer, params, [4])


def test_the_iteration_needs_three_matrices_of_the_grams_size(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from _memory import PeakMemory

    size = 128
    with PeakMemory("cpu") as memory:
        rows = gradient((size, size), 1, torch.float64)
        gram = rows.mT @ rows
        memory.step(lambda: inverse_root(gram, COEFFICIENTS, 5))
    assert memory.peaks[0] <= 3.1 * 8 * size**2
