"""Reformat: kinds and ranks change between two steps, the momentum goes on, and what is refused changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_memopt as lm
from tests._compare import assert_equal, relative_error
from tests._models import tiny_llama, train
from tests.kinds.contract.cases import gradient
from tests.optim._reformatting import MOMENTA, NAME, PAIRS, SHAPES, grad_of, made, momentum_of

pytestmark = pytest.mark.slow

# --- what is kept of the momentum ------------------------------------------------------------------------------------


def rank_of(momentum: str, dense: Tensor) -> int:
    """Return how many singular triplets a state can hold."""
    short = min(dense.shape[-2:])
    return {"none": 0, "dense": short}.get(momentum) if " " not in momentum else min(int(momentum.split()[1]), short)


def tail(dense: Tensor, rank: int) -> Tensor:
    """Return the error of the best approximation of some rank, for every matrix of a stack."""
    return torch.linalg.svdvals(dense)[..., rank:].square().sum(-1).sqrt()


def distance(one: Tensor, other: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(one - other)


@pytest.mark.parametrize(
    ("content", "state_dtype"),
    [("full", "float32"), ("deficient", "float32"), ("zero", "float32"), ("full", "bfloat16")],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_change_keeps_the_best_approximation(shape, content, state_dtype):
    """The error is the tail of the spectrum; nothing is lost where the rank does not fall; weights move only then."""
    digits = 1e-5 if state_dtype == "float32" else 1e-2
    starts = {kind: made(SHAPES[shape], MOMENTA[kind], content=content, state_dtype=state_dtype) for kind in MOMENTA}
    for before, after in PAIRS:
        optimizer, param = copy.deepcopy(starts[before])
        dense, weights = momentum_of(optimizer, param), param.detach().clone()
        optimizer.reformat({NAME: MOMENTA[after]})
        now, what = momentum_of(optimizer, param), f"{before} to {after}"
        size = float(torch.linalg.matrix_norm(dense).max())
        error, allowed = distance(now, dense), tail(dense, rank_of(after, dense))
        assert (error <= allowed + digits * size).all(), f"{what}: {error}, best is {allowed}"
        assert (error >= allowed - digits * size).all(), what
        if rank_of(after, dense) >= rank_of(before, dense):
            assert_equal(param.detach(), weights, what)
        elif content == "full":
            assert bool((param != weights).any()), what
        if content == "zero" or before == "none":
            assert_equal(param.detach(), weights, what)
            assert not now.any(), what
        facts = optimizer.snapshot().blocks[0]
        assert facts.local_bytes == facts.momentum_bytes + facts.second_moment_bytes
        for step in (4, 5):  # subspaces are chosen again in the fourth
            param.grad = grad_of(SHAPES[shape], step, content)
            optimizer.step()
        assert all(value.isfinite().all() for value in (param, *optimizer.state[param].values())), what


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum", ["low_rank", "subspace"])
def test_growing_keeps_every_bit(momentum, shape, state_dtype):
    optimizer, param = made(SHAPES[shape], MOMENTA[f"{momentum} 3"], state_dtype=state_dtype)
    block = optimizer._binding.blocks[param][0]
    old, weights = dict(optimizer.state[param]), param.detach().clone()
    dense = block.recipe.momentum.to_dense({key: old[key] for key in block.recipe.momentum.keys}, block.layout)
    optimizer.reformat({NAME: {"rank": 7}})
    state, block = optimizer.state[param], optimizer._binding.blocks[param][0]
    grown = {key: state[key] for key in block.recipe.momentum.keys}
    assert_equal(block.recipe.momentum.to_dense(grown, block.layout), dense)
    for key, value in grown.items():
        dim = -2 if key == "low_rank_r" else -1
        assert value.shape[dim] == 7
        assert_equal(value.narrow(dim, 0, 3), old[key])
        assert not value.narrow(dim, 3, 4).any()
    if state_dtype == "float32":
        optimizer.reformat({NAME: {"momentum": "dense"}})
        assert_equal(optimizer.state[param]["exp_avg"].view(dense.shape), dense)
    assert_equal(param.detach(), weights)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("momentum", "steps"), [("low_rank", 1), ("subspace", 4)])
@pytest.mark.parametrize("before", ["same", "none"])
def test_new_directions_fill_with_the_next_step(momentum, steps, before, shape, state_dtype):
    """Low-rank factors take them up in the next step, a subspace when it is next chosen (here within four steps)."""
    kind = MOMENTA[f"{momentum} 3" if before == "same" else "none"]
    optimizer, param = made(SHAPES[shape], kind, state_dtype=state_dtype)
    optimizer.reformat({NAME: {**MOMENTA[f"{momentum} 8"]}})
    for step in range(steps):
        param.grad = gradient(SHAPES[shape], 50 + step)
        optimizer.step()
    basis = optimizer.state[param]["low_rank_q" if momentum == "low_rank" else "subspace_p"].double()
    identity = torch.eye(8).double().expand(*basis.shape[:-2], 8, 8)
    torch.testing.assert_close(basis.mT @ basis, identity, rtol=0, atol=0.02)
    assert (torch.linalg.matrix_rank(momentum_of(optimizer, param), rtol=1e-4) == 8).all()


def test_a_shrinking_subspace_keeps_directions_that_hold_no_momentum_yet():
    optimizer, param = made((20, 12), MOMENTA["subspace 8"], content="zero")
    state = optimizer.state[param]
    state["subspace_p"].copy_(torch.eye(12)[:, :8])
    state["subspace_x"][:, 5] = 1.0
    optimizer.reformat({NAME: {"rank": 3}})
    basis, coordinates = (optimizer.state[param][key] for key in ("subspace_p", "subspace_x"))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3))
    assert abs(float(basis[5].abs().max())) == pytest.approx(1.0)
    assert float(coordinates.norm()) == pytest.approx(20**0.5)


def test_options_alone_change_no_tensor():
    model = tiny_llama()
    optimizer = lm.AdamSNSM(model.named_parameters())
    train(model, optimizer, 2)
    state = optimizer.state[model.lm_head.weight]
    basis = state["subspace_p"]
    optimizer.reformat({"lm_head.weight": {"gap": 5}})
    assert optimizer.state[model.lm_head.weight]["subspace_p"] is basis
    assert optimizer._binding.blocks[model.lm_head.weight][0].recipe.momentum.gap == 5


# --- nothing starts again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "change", "expected"),
    [
        ("lm_head.weight", {"rank": 9}, ("low_rank", 9, "factored")),
        ("lm_head.weight", {"momentum": "dense"}, ("dense", None, "factored")),
        ("lm_head.weight", {"momentum": "none"}, ("none", None, "factored")),
        ("lm_head.weight", {"momentum": "subspace", "rank": 5, "gap": 4}, ("subspace", 5, "factored")),
        ("lm_head.weight", {"second_moment": "subset_norm"}, ("low_rank", 4, "subset_norm")),
        ("lm_head.weight", {"second_moment": "dense"}, ("low_rank", 4, "dense")),
        ("lm_head.weight", {"second_moment": "blockwise"}, ("low_rank", 4, "blockwise")),
        ("lm_head.weight", {"second_moment": "none"}, ("low_rank", 4, "none")),
        ("lm_head.weight", lm.Recipe("dense", "dense"), ("dense", None, "dense")),
        ("model.norm.weight", {"momentum": "none"}, ("none", None, "dense")),
    ],
)
def test_one_block_changes_and_everything_else_goes_on(block, change, expected):
    """Counters, groups, the schedule, other blocks and the optimizer itself stay what they are."""
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
    losses = []
    for step in range(12):
        losses += train(model, optimizer, 1, seed=step)
        scheduler.step()
    before = {param: dict(state) for param, state in optimizer.state.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.reformat({block: change})
    facts = next(facts for facts in optimizer.snapshot().blocks if facts.name == block)
    assert (facts.momentum, facts.rank, facts.second_moment) == expected
    assert facts.local_bytes == facts.momentum_bytes + facts.second_moment_bytes
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups
    for name, param in model.named_parameters():
        same = before[param].keys() if name != block else {"step"}
        assert all(optimizer.state[param][key] is before[param][key] for key in same)
        assert float(optimizer.state[param]["step"]) == 12.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.95**13)
    more = train(model, optimizer, 6, seed=100)
    assert max(more) < max(losses) + 0.1  # on new tokens every time
    assert {float(state["step"]) for state in optimizer.state.values()} == {18.0}


def test_the_bias_correction_goes_on():
    """The step after equals that of an optimizer which had this kind, and this momentum, from the beginning."""
    one, param = made((20, 12), MOMENTA["dense"], steps=2, betas=(0.9, 0.99))
    other, twin = made((20, 12), MOMENTA["low_rank 8"], steps=2, betas=(0.9, 0.99))
    one.reformat({NAME: MOMENTA["low_rank 8"]}, dropped="discard")
    with torch.no_grad():
        twin.copy_(param)
    for key, value in one.state[param].items():
        other.state[twin][key].copy_(value)
    for step in (3, 4, 5):
        param.grad, twin.grad = grad_of((20, 12), step), grad_of((20, 12), step)
        one.step()
        other.step()
    assert_equal(param.detach(), twin.detach())


def test_there_and_back_without_loss_changes_nothing():
    """Through every kind that can hold it, and back: the run is that of an optimizer that was left alone."""
    one, param = made((20, 12), MOMENTA["low_rank 3"])
    other, twin = made((20, 12), MOMENTA["low_rank 3"])
    for name in ("low_rank 8", "dense", "subspace 8", "low_rank 3"):
        one.reformat({NAME: MOMENTA[name]})
    assert relative_error(param.detach(), twin.detach()) <= 1e-6  # the last one shrinks: rounding is released
    assert relative_error(momentum_of(one, param), momentum_of(other, twin)) <= 1e-6
    for step in range(7, 12):
        param.grad, twin.grad = grad_of((20, 12), step), grad_of((20, 12), step)
        one.step()
        other.step()
    assert relative_error(param.detach(), twin.detach()) <= 1e-5


# --- refusals --------------------------------------------------------------------------------------------------------


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lm_head": {"rank": 3}}, "Unknown block 'lm_head'. Did you mean 'lm_head.weight'"),
    ({"lm_head.weight": {"rank": 0}}, "`rank` must be an integer of at least 1"),
    ({"lm_head.weight": {"momentum": "low"}}, "Unknown momentum kind 'low'"),
    ({"lm_head.weight": {"second_moment": "thick"}}, "Unknown second-moment kind 'thick'"),
    ({"lm_head.weight": {"gap": 3}}, "Option 'gap' has no effect with momentum 'low_rank'"),
    ({"lm_head.weight": {"ranks": 3}}, "Unknown option 'ranks'"),
    ({"model.norm.weight": {"momentum": "low_rank"}}, r"'low_rank' needs a matrix, but 'model\.norm\.weight'"),
    ({"model.norm.weight": {"second_moment": "factored"}}, r"'factored' needs a matrix, but 'model\.norm\.weight'"),
    (
        {"lm_head.weight": {"second_moment": "blockwise", "outputs_per_number": 5}},
        "`outputs_per_number` 5 does not divide the outputs",
    ),
    (
        {"model.layers.0.mlp.up_proj.weight": {"second_moment": "dense"}},
        "keeps no state that 'dense' could continue from",
    ),
]


def content(model: nn.Module, optimizer: lm.MemOpt) -> Any:
    return copy.deepcopy((list(model.parameters()), optimizer.state_dict()["state"], repr(optimizer)))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("changes", "match"), REFUSED)
def test_a_refused_reformat_changes_nothing(changes, match, first):
    """Whether the mistake comes first or last."""
    model = tiny_llama()
    overrides = {"model.layers.0.mlp.up_proj.weight": {"second_moment": "none"}}
    optimizer = lm.AdaPMLean(model.named_parameters(), overrides=overrides)
    train(model, optimizer, 1)
    before = content(model, optimizer)
    good = {"model.embed_tokens.weight": {"rank": 2}, "model.layers.1.mlp.up_proj.weight": {"momentum": "none"}}
    with pytest.raises(ValueError, match=match):
        optimizer.reformat({**changes, **good} if first else {**good, **changes})
    assert_equal(content(model, optimizer)[:2], before[:2])
    assert content(model, optimizer)[2] == before[2]
    train(model, optimizer, 1)


def test_an_unknown_way_to_drop_changes_nothing():
    optimizer, param = made((20, 12), MOMENTA["dense"])
    before = repr(optimizer)
    with pytest.raises(ValueError, match="Unknown value of `dropped` 'relase'. Did you mean 'release'"):
        optimizer.reformat({NAME: MOMENTA["none"]}, dropped="relase")
    assert repr(optimizer) == before


def test_a_change_must_be_a_recipe_or_a_mapping():
    optimizer, param = made((20, 12), MOMENTA["dense"])
    with pytest.raises(TypeError, match=f"In the change of '{NAME}': A change must be a Recipe or a mapping"):
        optimizer.reformat({NAME: "low_rank"})
    with pytest.raises(TypeError, match="`changes` must map blocks, roles or patterns to changes, .*got 'query'"):
        optimizer.reformat("query")


def test_a_part_of_a_name_has_a_suggestion():
    optimizer = lm.AdaPMLean(tiny_llama().named_parameters())
    with pytest.raises(
        ValueError, match=r"Unknown block 'q_proj'\. Did you mean '\*q_proj\*'\? Blocks: model.*more\.$"
    ):
        optimizer.reformat({"q_proj": {"rank": 3}})


def test_names_are_needed():
    with pytest.raises(ValueError, match="has no name"):
        lm.AdaPMLean(list(tiny_llama().parameters())).reformat({"lm_head.weight": {"rank": 3}})


def test_a_frozen_block_changes_before_it_has_state():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    optimizer = lm.AdaPMLean(model.named_parameters())
    optimizer.reformat({"lm_head.weight": {"momentum": "subspace", "rank": 5}})
    model.lm_head.weight.requires_grad_(True)
    train(model, optimizer, 2)
    assert optimizer.state[model.lm_head.weight]["subspace_p"].shape == (32, 5)


def test_kinds_come_back_with_the_options_of_the_recipe():
    """Named kinds have the options that the optimizer was made with, in the running optimizer and after a load."""
    model = tiny_llama()
    name = "lm_head.weight"
    optimizer = lm.AdamSNSM(model.named_parameters(), gap=20)
    train(model, optimizer, 2)
    optimizer.reformat({name: {"momentum": "dense"}, "model.embed_tokens.weight": {"momentum": "subspace", "rank": 3}})
    optimizer.reformat({name: {"momentum": "subspace", "rank": 5}})
    twin = copy.deepcopy(model)
    resumed = lm.AdamSNSM(twin.named_parameters(), gap=20)
    resumed.load_state_dict(optimizer.state_dict())
    for each in (optimizer, resumed):
        kinds = {block.name: block.recipe.momentum for *_, block in each.blocks()}
        assert (kinds[name].gap, kinds[name].rank) == (20, 5)
        assert (kinds["model.embed_tokens.weight"].gap, kinds["model.embed_tokens.weight"].rank) == (20, 3)


def test_a_change_that_is_no_mapping_is_refused():
    optimizer = lm.AdaPMLean(tiny_llama().named_parameters())
    with pytest.raises(TypeError, match="A change must be a Recipe or a mapping"):
        optimizer.reformat({"lm_head.weight": "dense"})
