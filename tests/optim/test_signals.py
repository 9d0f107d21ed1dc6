"""Probe: what it says of the gradients equals what dense averages in float64 say, and training does not notice it."""

from __future__ import annotations

import copy
import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import lightning_memopt as lm
from lightning_memopt.optim.signals import MEMORY, SAMPLE, BlockSignals, Probe
from lightning_memopt.optim.spectra import kept_momentum
from tests._attempt import attempt
from tests._compare import assert_equal
from tests._models import tiny_gpt2, train
from tests._ranks import run_ranks
from tests._traffic import Traffic
from tests.kinds.contract.cases import gradient
from tests.optim._reformatting import grad_of, momentum_of

pytestmark = pytest.mark.slow

NAME = "model.layers.0.mlp.up_proj.weight"
BETA = 0.9


def optimizer_of(shapes: dict[str, tuple[int, ...]], recipe: Any = "adapm_lean", **options: Any) -> lm.MemOpt:
    params = [(name, nn.Parameter(gradient(shape, 50 + len(name)))) for name, shape in shapes.items()]
    return lm.MemOpt(params, recipe, **{"lr": 1e-3, "betas": (BETA, 0.99), **options})


def step(optimizer: lm.MemOpt, grads: dict[str, Tensor | None]) -> None:
    for _, param, block in optimizer.blocks():
        param.grad = grads[block.name.split(":")[0]]
    optimizer.step()


@dataclass
class Dense:
    """One block's signals by their definitions, from all its elements, in float64."""

    average: Any = 0.0
    square: Any = 0.0
    steps: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(7, dtype=torch.float64))
    energies: list[float] = field(default_factory=list)

    def see(self, grad: Tensor) -> None:
        grad = grad.double()
        old = self.average + torch.zeros_like(grad)
        self.steps += 1
        self.average = BETA * old + (1 - BETA) * grad
        self.square = 0.99 * self.square + 0.01 * grad.square()
        denominator = (self.square / (1 - 0.99**self.steps)).sqrt() + 1e-300
        update, full = grad * (1 - BETA**self.steps) / denominator, self.average / denominator
        products = [(grad * old).sum(), grad.square().sum(), old.square().sum(), torch.tensor(1.0)]
        products += [(update * full).sum(), update.square().sum(), full.square().sum()]
        self.sums += torch.stack(products)

    def read(self) -> tuple[float, ...]:
        product, grads, averages, steps, inner, short, full = self.sums.tolist()
        self.energies.insert(0, float(self.average.square().sum()))
        weights = [MEMORY**age for age in range(len(self.energies))]
        energy = sum(w * e for w, e in zip(weights, self.energies, strict=True)) / sum(weights)
        self.sums *= MEMORY
        oscillation = product / max((grads * averages) ** 0.5, 1e-300)
        return oscillation, grads / max(steps, 1e-300), energy, inner / (short * full) ** 0.5, full / short


def close(found: BlockSignals, expected: tuple[float, ...], rel: float = 1e-5, cosine: float = 1e-5) -> None:
    oscillation, gradient, momentum, agreement, damping = expected
    assert found.oscillation == pytest.approx(oscillation, abs=cosine)
    assert (found.gradient_energy, found.momentum_energy) == pytest.approx((gradient, momentum), rel=rel)
    assert found.agreement == pytest.approx(agreement, abs=cosine)
    assert found.damping == pytest.approx(damping, rel=rel)


# --- what signals are ------------------------------------------------------------------------------------------------

SMALL = {
    NAME: (16, 20),
    "model.layers.0.mlp.experts.weight": (2, 10, 12),
    "conv.weight": (8, 3, 2, 2),
    "model.layers.0.mlp.down_proj.weight": (1, SAMPLE),
}


@pytest.mark.parametrize("recipe", ["adapm_lean", "adamw", "adafactor", "adam_snsm"])
def test_small_blocks_are_known_exactly(recipe):
    """Blocks of up to 512 elements, with any momentum or none, over several readings; some gradients are missing."""
    optimizer = optimizer_of(SMALL, recipe, maximize=recipe == "adam_snsm")
    probe, dense = Probe(optimizer), {name: Dense() for name in SMALL}
    for number in range(1, 13):
        grads: dict[str, Tensor | None] = {
            name: gradient(shape, 100 * number + place) + 0.3 for place, (name, shape) in enumerate(SMALL.items())
        }
        if number % 5 == 0:
            grads[NAME] = None
        for name, grad in grads.items():
            if grad is not None:
                dense[name].see(grad)
        step(optimizer, grads)
        if number in (3, 4, 12):
            signals = probe.read()
            assert list(signals) == list(SMALL)
            for name in SMALL:
                close(signals[name], dense[name].read())
    assert probe.steps == 12


def test_large_blocks_are_known_within_the_sampling_error():
    """512 of 12,000 alike elements: energies are known to √(2/512) = 6%, the oscillation to 1/√(512 · 40) = 0.7%."""
    shape = (100, 120)
    optimizer = optimizer_of({NAME: shape})
    probe, dense = Probe(optimizer), Dense()
    for number in range(40):
        grad = gradient(shape, number) + (-1) ** number
        dense.see(grad)
        step(optimizer, {NAME: grad})
    close(probe.read()[NAME], dense.read(), rel=4 * (2 / SAMPLE) ** 0.5, cosine=4 / (SAMPLE * 40) ** 0.5)


@pytest.mark.parametrize("kind", [{"momentum": "low_rank"}, {"momentum": "subspace", "gap": 4}], ids=["low", "sub"])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (12, 12), (3, 12, 20), (1, 9)], ids=str)
def test_spectrum_is_that_of_the_momentum_kept(shape, kind):
    name = "lm_head.weight" if shape[0] == 1 else NAME  # elsewhere, one row is a vector
    for rank in (3, 100):
        for content in ("full", "zero"):
            maximize = rank == 100
            optimizer = optimizer_of(
                {name: shape}, "adamw", overrides={name: {**kind, "rank": rank}}, maximize=maximize
            )
            probe = Probe(optimizer)
            average: Any = 0.0
            for number in range(1, 6):
                grad = grad_of(shape, number, content)
                average = BETA * average + (1 - BETA) * grad.double()
                step(optimizer, {name: grad})
            found = probe.read()[name]
            ((_, param, block),) = optimizer.blocks()
            expected = torch.linalg.svdvals(momentum_of(optimizer, param)).square()
            expected = expected.reshape(-1, expected.shape[-1]).sum(0)[: block.recipe.momentum.rank]
            if content == "zero":
                assert replace(found, noise_damping=0.0) == BlockSignals(0.0, 0.0, 0.0)
                assert found.residual(1) == found.residual_energy == 0
                continue
            assert list(found.spectrum) == sorted(found.spectrum, reverse=True)
            spectrum = torch.tensor(found.spectrum, dtype=torch.float64)
            torch.testing.assert_close(spectrum, expected, rtol=1e-4, atol=1e-6 * float(expected[0]))
            exact = shape != (40, 12) and shape != (12, 40) and shape != (3, 12, 20)
            if exact and rank == 100 and kind["momentum"] == "low_rank":  # nothing is dropped
                assert found.residual(rank) == pytest.approx(0, abs=1e-5)
                assert found.residual_energy == pytest.approx(0, abs=1e-5 * found.momentum_energy)
            kept = momentum_of(optimizer, param) * (-1 if maximize else 1)
            lost = float((average - kept).square().sum())
            if average.numel() <= SAMPLE:
                lost = min(lost, float(average.square().sum()))
                assert found.residual_energy == pytest.approx(lost, rel=1e-4, abs=1e-5 * found.momentum_energy)
            whole = float(expected.sum()) + found.residual_energy
            assert found.residual(0) == 1
            assert found.residual(1) == pytest.approx(1 - float(expected[0]) / whole, abs=1e-4)


def test_spectrum_is_empty_where_there_is_no_momentum():
    optimizer = optimizer_of({NAME: (16, 20)}, "adamw", overrides={NAME: {"momentum": "none"}})
    probe = Probe(optimizer)
    step(optimizer, {NAME: gradient((16, 20), 1)})
    signals = probe.read()[NAME]
    assert signals.spectrum == ()
    assert signals.residual(5) == 1
    assert signals.residual_energy == signals.momentum_energy > 0


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("shape", [(16, 20), (3, 12, 20), (100, 70), (70, 300)], ids=str)
def test_spectrum_of_dense_momentum(shape, state_dtype):
    """All of it up to 64 values; of larger blocks the largest, which leave their sum to the rest."""
    optimizer = optimizer_of({NAME: shape}, "adamw", state_dtype=state_dtype)
    probe = Probe(optimizer)
    low = torch.linalg.svd(gradient(shape, 1))
    decay = torch.diag_embed(0.8 ** torch.arange(min(shape[-2:])).float())
    smooth = low.U[..., : decay.shape[-1]] @ decay @ low.Vh[..., : decay.shape[-1], :]
    for number in range(1, 4):
        step(optimizer, {NAME: 1e-12 * (smooth + 0.01 * gradient(shape, number))})
    ((_, param, block),) = optimizer.blocks()
    expected = torch.linalg.svdvals(optimizer.state[param]["exp_avg"].view(block.layout.local).double()).square()
    expected = expected.reshape(-1, expected.shape[-1]).sum(0)
    places = torch.unravel_index(torch.arange(0, math.prod(shape), 7), shape)
    kept = kept_momentum(optimizer.blocks(), optimizer.state, {NAME: places})[NAME]
    assert_equal(kept.elements, optimizer.state[param]["exp_avg"].view(shape).float()[places])
    found = torch.tensor(kept.spectrum, dtype=torch.float64)
    assert len(found) == min(64, *shape[-2:])
    if min(shape[-2:]) <= 64:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * float(expected[0]))
    else:
        torch.testing.assert_close(found[:10], expected[:10], rtol=0.02, atol=0)
        assert bool((found <= 1.001 * expected[:64]).all())
    assert len(probe.read()[NAME].spectrum) == len(found)


def test_dense_momentum_loses_what_its_spectrum_does_not_reach():
    """Of white noise on 160 directions, the 64 largest hold three quarters."""
    optimizer = optimizer_of({NAME: (160, 200)}, "adamw")
    probe = Probe(optimizer)
    for number in range(1, 4):
        step(optimizer, {NAME: gradient((160, 200), number)})
    ((_, param, _),) = optimizer.blocks()
    values = torch.linalg.svdvals(optimizer.state[param]["exp_avg"].double()).square()
    expected = float(1 - values[:64].sum() / values.sum())
    assert probe.read()[NAME].residual(64) == pytest.approx(expected, abs=0.12)
    assert expected > 0.2


def test_agreement_and_damping_tell_noise_from_signal():
    """Of pure noise, M keeps (1−β₁)/(1+β₁) of the energy; of a constant gradient, all."""
    found = {}
    for name, noise in (("constant", 0.0), ("noise", 1.0)):
        optimizer = optimizer_of({NAME: (16, 20)}, betas=(BETA, 0.999))
        probe = Probe(optimizer)
        for number in range(200):
            step(optimizer, {NAME: (1 - noise) * gradient((16, 20), 0) + noise * gradient((16, 20), number)})
        found[name] = probe.read()[NAME]
    assert (found["constant"].agreement, found["constant"].damping) == pytest.approx((1, 1), rel=1e-5)
    kept = (1 - BETA) / (1 + BETA)
    assert found["noise"].damping == pytest.approx(kept, rel=0.2)
    assert found["noise"].agreement == pytest.approx((1 - BETA) / kept**0.5, abs=0.05)


def test_spectrum_remembers_what_a_larger_rank_knew():
    optimizer = optimizer_of({NAME: (16, 20)}, rank=8)
    probe = Probe(optimizer)
    for number in range(1, 9):
        step(optimizer, {NAME: grad_of((16, 20), number)})
        if number == 4:
            before = probe.read()[NAME]
            optimizer.reformat({NAME: {"rank": 2}})
    after = probe.read()[NAME]
    assert len(before.spectrum) == len(after.spectrum) == 8
    assert after.residual(2) >= after.residual(8)
    # What rank 2 lost of directions that are known from rank 8 counts once: the rest is what rank 8 lost.
    assert after.residual_energy / after.momentum_energy == pytest.approx(
        before.residual_energy / before.momentum_energy, abs=0.25
    )
    whole = sum(after.spectrum) + after.residual_energy
    assert whole == pytest.approx(after.momentum_energy, rel=0.15)
    optimizer.reformat({NAME: {"momentum": "none"}})
    step(optimizer, {NAME: grad_of((16, 20), 9)})
    assert len(probe.read()[NAME].spectrum) == 8


def test_a_larger_rank_loses_less_at_once():
    """The share that a smaller rank lost is forgotten."""
    optimizer = optimizer_of({NAME: (16, 20)}, rank=1)
    probe = Probe(optimizer)
    for number in range(1, 25):
        step(optimizer, {NAME: grad_of((16, 20), number)})
        if number in (4, 8):
            less = probe.read()[NAME]
            optimizer.reformat({NAME: {"rank": 16 if number == 8 else 1}})
    more = probe.read()[NAME]
    assert less.residual_energy > 0.3 * less.momentum_energy
    assert more.residual_energy < 0.1 * more.momentum_energy


def oscillation(shape: tuple[int, ...], grad: Callable[[int], Tensor], recipe: str = "adafactor") -> float:
    optimizer = optimizer_of({NAME: shape}, recipe)
    probe = Probe(optimizer)
    for number in range(60):
        step(optimizer, {NAME: grad(number)})
    return probe.read()[NAME].oscillation


@pytest.mark.parametrize("shape", [(16, 20), (64, 96)], ids=["all elements", "sampled"])
def test_oscillation_tells_swings_drift_and_noise_apart(shape):
    """Also of a block without momentum."""
    one = gradient(shape, 1)
    assert oscillation(shape, lambda _: one) > 0.95
    assert oscillation(shape, lambda number: one * (-1) ** number) < -0.95
    assert abs(oscillation(shape, lambda number: gradient(shape, number))) < 4 / (320 * 60) ** 0.5
    noisy = oscillation(shape, lambda number: one * (-1) ** number + 2 * gradient(shape, 100 + number))
    assert -0.9 < noisy < -0.01
    scaled = oscillation(shape, lambda number: 1e-4 * (one * (-1) ** number + 2 * gradient(shape, 100 + number)))
    assert scaled == pytest.approx(noisy, abs=1e-5)


# --- which gradients count -------------------------------------------------------------------------------------------


def test_skipped_steps_are_not_seen():
    bad = gradient((16, 20), 9)
    bad[3, 4] = float("nan")
    seen = []
    for steps in ([1, 2, 3], [1, 9, 2, 9, 9, 3]):
        optimizer = optimizer_of({NAME: (16, 20)}, nonfinite="skip")
        probe = Probe(optimizer)
        for number in steps:
            step(optimizer, {NAME: bad if number == 9 else gradient((16, 20), number)})
        seen.append((probe.steps, probe.read()))
    assert seen[0] == seen[1]
    with pytest.raises(FloatingPointError):
        step(raising := optimizer_of({NAME: (16, 20)}), {NAME: bad})
    assert Probe(raising).read() == {}


def test_parameters_that_come_later():
    """Unfrozen ones and those of a new group: known from their first gradient on; vectors are left out."""
    names = {"a.weight": (8, 6), "b.weight": (6, 8), "norm.bias": (6,)}
    optimizer = optimizer_of(names)
    probe = Probe(optimizer)
    assert probe.read() == {}
    first, second, bias = (param for _, param, _ in optimizer.blocks())
    second.requires_grad_(False)
    first.grad, bias.grad = gradient((8, 6), 1), gradient((6,), 1)
    optimizer.step()
    assert list(probe.read()) == ["a.weight"]
    second.requires_grad_(True)
    added = nn.Parameter(gradient((4, 5), 3))
    optimizer.add_param_group({"params": [("c.weight", added)], "betas": (0.5, 0.9)})
    second.grad, added.grad, first.grad = gradient((6, 8), 2), gradient((4, 5), 4), None
    optimizer.step()
    signals = probe.read()
    assert list(signals) == ["a.weight", "b.weight", "c.weight"]
    assert signals["b.weight"].gradient_energy == pytest.approx(float(gradient((6, 8), 2).square().sum()), rel=1e-5)
    # The first step of a group whose beta1 is 0.5: M = G / 2.
    assert signals["c.weight"].momentum_energy == pytest.approx(signals["c.weight"].gradient_energy / 4, rel=1e-5)
    assert signals["a.weight"].oscillation == 0, "one gradient, and no average before it"
    probe.rest()
    optimizer.step()
    assert probe.steps == 3
    assert probe.read()["a.weight"].oscillation == 0
    probe.stop()
    optimizer.step()
    assert probe.steps == 3


@pytest.mark.parametrize("fused", ["gpt2", "in_proj"])
def test_blocks_of_fused_weights(fused):
    """Each has the signals of its own part."""
    if fused == "gpt2":
        model = tiny_gpt2()
        name, dim = "transformer.h.0.attn.c_attn.weight", 1
    else:
        model = nn.MultiheadAttention(22, 2)
        name, dim = "in_proj_weight", 0
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-3, betas=(BETA, 0.99))
    optimizer.bind(model)
    probe, params = Probe(optimizer), dict(model.named_parameters())
    shape = tuple(params[name].shape)
    dense = {role: Dense() for role in ("query", "key", "value")}
    for number in range(4):
        scale = torch.repeat_interleave(torch.tensor([1.0, 10.0, 0.1]), shape[dim] // 3)
        grad = (gradient(shape, number) + 0.5) * (scale if dim == 1 else scale.unsqueeze(1))
        for key, param in params.items():
            param.grad = grad if key == name else gradient(tuple(param.shape), number)
        for entry, part in zip(dense.values(), grad.chunk(3, dim), strict=True):
            entry.see(part)
        optimizer.step()
    signals = probe.read()
    for role, entry in dense.items():
        exact = shape[0] * shape[1] // 3 <= SAMPLE
        close(signals[f"{name}:{role}"], entry.read(), **({} if exact else {"rel": 0.3, "cosine": 0.1}))


# --- training does not notice ----------------------------------------------------------------------------------------


def test_training_and_random_numbers_are_not_touched():
    results = []
    for watched in (False, True):
        model = tiny_gpt2()
        optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-3)
        torch.manual_seed(7)
        probe = Probe(optimizer) if watched else None
        train(model, optimizer, 3)
        if probe is not None:
            probe.read()
            probe.state_dict()
        state = torch.rand(3), torch.randn(2, generator=torch.default_generator)
        results.append((state, [param.detach().clone() for param in model.parameters()]))
    assert_equal(results[0], results[1])


# --- saving ----------------------------------------------------------------------------------------------------------


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a file keeps of it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_loaded_probe_goes_on_bit_by_bit():
    shapes = {NAME: (64, 20), "lm_head.weight": (16, 20)}

    def steps(optimizer: lm.MemOpt, numbers: range) -> None:
        for number in numbers:
            step(optimizer, {name: gradient(shape, number) for name, shape in shapes.items()})

    optimizer = optimizer_of(shapes)
    probe = Probe(optimizer)
    steps(optimizer, range(7))
    probe.read()
    steps(optimizer, range(7, 10))
    state = probe.state_dict()
    state, weights = saved(state), copy.deepcopy(optimizer.state_dict())

    def rest(optimizer: lm.MemOpt, probe: Probe) -> list[Any]:
        found = []
        for start in (10, 14):
            steps(optimizer, range(start, start + 4))
            found.append((probe.steps, probe.read()))
        return found

    resumed = optimizer_of(shapes)
    resumed.load_state_dict(weights)
    for (_, ours, _), (_, theirs, _) in zip(resumed.blocks(), optimizer.blocks(), strict=True):
        ours.data.copy_(theirs.data)
    expected = rest(optimizer, probe)
    again = Probe(resumed)
    again.load_state_dict(state)
    assert rest(resumed, again) == expected
    never_saved = optimizer_of(shapes)
    probe = Probe(never_saved)
    steps(never_saved, range(7))
    probe.read()
    steps(never_saved, range(7, 10))
    assert rest(never_saved, probe) == expected

    old = {key: value for key, value in state.items() if key not in ("square", "weights", "lost")}
    old |= {key: state[key][:, :4] for key in ("sums", "latest")}  # as earlier versions saved it
    resumed.load_state_dict(weights)
    again = Probe(resumed)
    again.load_state_dict(old)
    for found, theirs in zip(rest(resumed, again), expected, strict=True):
        for name, ours in found[1].items():
            unknown: dict[str, Any] = {"agreement": 0, "damping": 0, "lost": None}
            assert replace(ours, **unknown) == replace(theirs[1][name], **unknown)
            assert 0 < ours.damping < 1
            assert ours.lost == pytest.approx(theirs[1][name].lost, rel=0.5)

    fewer = optimizer_of({"lm_head.weight": (16, 20)})
    part = Probe(fewer)
    part.load_state_dict(state)
    step(fewer, {"lm_head.weight": gradient((16, 20), 10)})
    assert list(part.read()) == ["lm_head.weight"]


# --- sharded ---------------------------------------------------------------------------------------------------------

# Uneven and empty shards, a stack, a kernel, a fused weight torn over ranks; small enough for all elements, and not.
SHARDED: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (50, 24),
    "model.layers.0.mlp.gate_proj.weight": (41, 12),
    "model.layers.0.mlp.down_proj.weight": (12, 42),
    "model.layers.0.mlp.experts.weight": (5, 10, 18),
    "model.layers.1.mlp.up_proj.weight": (12, 30),
    "model.layers.1.mlp.down_proj.weight": (24, 24),
    "model.layers.1.score.weight": (1, 30),
    "model.layers.1.short.weight": (2, 30),
    "conv.weight": (7, 3, 4, 4),
    "attention.in_proj_weight": (66, 22),
    "model.layers.0.input_layernorm.weight": (24,),
}
MESHES = {"two": (2,), "three": (3,), "hybrid": (2, 2)}


def sharded_optimizer(mesh: DeviceMesh | None) -> lm.MemOpt:
    params = {}
    for place, (name, shape) in enumerate(SHARDED.items()):
        params[name] = nn.Parameter(placed(name, gradient(shape, place, scale=0.1), mesh))
    # The short side of some of these is sharded: every rank has the whole basis of the subspace.
    subspaces = ("0.mlp.gate", "1.mlp.up", "1.mlp.down")
    overrides: dict[str, Any] = {f"*.{name}_proj.weight": {"momentum": "subspace", "gap": 3} for name in subspaces}
    overrides |= {"model.embed_tokens.weight": {"momentum": "none"}, "conv.weight": {"momentum": "dense"}}
    return lm.MemOpt(list(params.items()), "adapm_lean", lr=1e-2, rank=3, overrides=overrides)


def placed(name: str, value: Tensor, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return value
    dim = 1 if "down_proj" in name and value.shape[1] % mesh.size(mesh.ndim - 1) == 0 else 0
    return distribute_tensor(value, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(dim)], src_data_rank=None)


def sharded_steps(optimizer: lm.MemOpt, mesh: DeviceMesh | None, numbers: range) -> None:
    params = {block.name.split(":")[0]: param for _, param, block in optimizer.blocks()}
    for number in numbers:
        for place, name in enumerate(SHARDED):
            params[name].grad = None if number == 4 and place % 3 == 0 else sharded_grad(name, number, place, mesh)
        optimizer.step()


@functools.cache
def sharded_grad(name: str, number: int, place: int, mesh: DeviceMesh | None) -> Tensor:
    return placed(name, (gradient(SHARDED[name], 100 * number + place) + 0.2) * 1e-2, mesh)


def sharded_run(mesh: DeviceMesh | None) -> tuple[list[Any], Any, Any]:
    """Return all readings, and what could be saved half-way."""
    optimizer = sharded_optimizer(mesh)
    probe, found = Probe(optimizer), []
    sharded_steps(optimizer, mesh, range(1, 6))
    found.append(probe.read())
    sharded_steps(optimizer, mesh, range(6, 9))
    state = probe.state_dict()
    sharded_steps(optimizer, mesh, range(9, 12))
    found.append(probe.read())
    return found, state, optimizer


def same_signals(found: list[dict[str, BlockSignals]], expected: list[dict[str, BlockSignals]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert list(ours) == list(theirs)
        for name, other in theirs.items():
            energies = other.gradient_energy, other.momentum_energy
            close(ours[name], (other.oscillation, *energies, other.agreement, other.damping))
            size = max(other.spectrum, default=1.0)
            assert ours[name].spectrum == pytest.approx(other.spectrum, rel=1e-3, abs=1e-5 * size), name
            assert ours[name].lost == pytest.approx(other.lost, rel=1e-3, abs=1e-5 * other.momentum_energy), name


def equals_unsharded(mesh: DeviceMesh, expected: list[dict[str, BlockSignals]]) -> None:
    found, _, _ = sharded_run(mesh)
    same_signals(found, expected)
    everyone: list[Any] = [None] * mesh.size()
    dist.all_gather_object(everyone, found, group=whole_group(mesh))
    assert everyone == [found] * mesh.size(), "bit by bit the same on every rank"


def whole_group(mesh: DeviceMesh) -> Any:
    return mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD


def collectives_are_few(mesh: DeviceMesh, expected: Any) -> None:
    """None in a step; per reading one sum, and for the spectra a gather, a sum of Gram matrices, one over stacks.

    The sketch of dense momentum takes two more for each of its two iterations.
    """
    quiet, watched = Traffic(), Traffic()
    for traffic in (quiet, watched):
        optimizer = sharded_optimizer(mesh)
        probe = Probe(optimizer) if traffic is watched else None
        with traffic:
            sharded_steps(optimizer, mesh, range(1, 3))
    assert watched.calls == quiet.calls
    assert probe is not None
    with Traffic() as traffic:
        probe.read()
    assert traffic.calls["allreduce"] <= 3 + 2 * 2
    assert traffic.calls["all_gather_into_tensor"] <= 1
    with Traffic() as traffic:
        probe.state_dict()
    assert traffic.calls["allreduce"] <= 2
    assert traffic.calls["all_gather_into_tensor"] == 0


def goes_on_from_other_ranks(mesh: DeviceMesh, expected: Any) -> None:
    """What three ranks saved, two load, as if they had been one all the time; so does one process."""
    _, state, _ = sharded_run(mesh)
    if dist.get_rank() < 2:
        smaller = SMALLER["two"]
        for other in (smaller, None):
            reference, resumed = sharded_optimizer(other), sharded_optimizer(other)
            watching = Probe(reference)
            sharded_steps(reference, other, range(1, 6))
            watching.read()
            sharded_steps(reference, other, range(6, 9))
            probe = Probe(resumed)
            sharded_steps(resumed, other, range(1, 9))
            probe.stop()
            probe = Probe(resumed)
            probe.load_state_dict(saved(state))
            for optimizer in (reference, resumed):
                sharded_steps(optimizer, other, range(9, 12))
            same_signals([probe.read()], [watching.read()])
            assert probe.steps == watching.steps


SMALLER: dict[str, DeviceMesh] = {}


def on_a_rank(rank: int, world: int, expected: Any) -> dict[str, str]:
    found = {}
    for label, shape in MESHES.items():
        mesh = SMALLER[label] = DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape))
        if mesh.get_coordinate() is None:
            continue
        checks = [equals_unsharded, collectives_are_few]
        for check in checks + [goes_on_from_other_ranks] * (label == "three"):
            found[f"{label}, {check.__name__}"] = attempt(check, mesh, expected)
    return found


def test_sharded_signals():
    expected, _, _ = sharded_run(None)
    assert any(signals.spectrum for signals in expected[0].values())
    outcomes = run_ranks(on_a_rank, 4, expected)
    assert len(outcomes[0]) == 7
    for outcome in outcomes:
        wrong = "\n".join(f"{key}: {error}" for key, error in outcome.items() if error)
        assert not wrong, wrong
