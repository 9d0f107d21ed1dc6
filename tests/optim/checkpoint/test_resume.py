"""What a resume changes is said once, in one line, and nothing where nothing changes."""

from __future__ import annotations

import functools
import re
import warnings

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.optim.binding import params_of
from lightning_memopt.optim.checkpoint.resume import loading_from
from tests._models import fill_grads, tiny_llama


def linear(**options) -> lm.MemOpt:
    torch.manual_seed(0)
    optimizer = lm.AdaPMLean(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).named_parameters(), **options)
    fill_grads(params_of(optimizer), 0)
    optimizer.step()
    return optimizer


def said(load) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    assert all(issubclass(entry.category, lm.ResumeWarning) for entry in caught)
    return [str(entry.message) for entry in caught]


def test_everything_that_changes_is_in_one_line():
    saved = linear(rank=4, lr=1e-3).state_dict()
    optimizer = linear(rank=16, lr=5e-4, weight_decay=0.1)
    with loading_from("'last.ckpt'"):
        (line,) = said(lambda: optimizer.load_state_dict(saved))
    assert line == (
        "AdaPMLean resumes from step 1 of 'last.ckpt'. Its settings replace the configured ones: lr 0.001 instead "
        "of 0.0005, weight_decay 0 instead of 0.1, rank 4 instead of 16 in 2 blocks. To keep yours, call after loading "
        "(with a Trainer, in `on_train_start`): `for group in optimizer.param_groups: group.update({'lr': 0.0005, "
        "'weight_decay': 0.1})`; `optimizer.reformat({'other': {'rank': 16}})`."
    )
    assert said(lambda: optimizer.load_state_dict(saved)) == []


def test_one_of_several_groups_is_named():
    def grouped(decay: float) -> lm.MemOpt:
        pairs = list(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).named_parameters())
        return lm.AdaPM([{"params": pairs[:2]}, {"params": pairs[2:], "weight_decay": decay}])

    (line,) = said(lambda: grouped(0.1).load_state_dict(grouped(0.2).state_dict()))
    assert "the configured ones: weight_decay 0.2 instead of 0.1 in group 1. To keep yours" in line
    assert line.endswith("`on_train_start`): `optimizer.param_groups[1].update({'weight_decay': 0.1})`.")


@pytest.mark.parametrize("several", [False, True], ids=["role", "blocks"])
def test_the_calls_keep_what_was_configured(several):
    model = tiny_llama()
    saved, ours = (lm.AdaPMLean(model.named_parameters(), lr=lr, rank=rank) for lr, rank in ((1e-3, 2), (2e-3, 5)))
    saved.reformat({"lm_head.weight": {"momentum": "none"}, "value": {"second_moment": "dense"}})
    if several:
        ours.reformat(
            {"model.layers.*.mlp.up_proj.weight": {"rank": 3}, "model.layers.1.mlp.down_proj.weight": {"rank": 4}}
        )
    before = ours.snapshot()
    (line,) = said(lambda: ours.load_state_dict(saved.state_dict()))
    assert ours.snapshot() != before
    names = {"optimizer": ours}
    for call in re.findall("`([^`]*optimizer[^`]*)`", line):
        exec(call, names)
    assert ours.param_groups[0]["lr"] == 2e-3
    assert [(block.name, block.momentum, block.rank, block.second_moment) for block in ours.snapshot().blocks] == [
        (block.name, block.momentum, block.rank, block.second_moment) for block in before.blocks
    ]
    assert ("'mlp'" in line) == (not several)


def test_a_long_call_is_cut():
    model = nn.ModuleList(nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)}) for _ in range(16))
    saved, ours = lm.AdaPMLean(model.named_parameters()), lm.AdaPMLean(model.named_parameters())
    saved.reformat({"*.weight": {"rank": 2}})
    ours.reformat({f"{at}.{name}.weight": {"momentum": "dense"} for at in range(0, 16, 2) for name in ("one", "two")})
    ours.reformat({f"{at}.one.weight": {"momentum": "none"} for at in range(1, 16, 2)})
    (line,) = said(lambda: ours.load_state_dict(saved.state_dict()))
    assert line.endswith("'15.two.weight'], {'rank': 4}))`.")
    assert "'10.two.weight', ...], {'momentum': 'dense'}))`" in line


def test_a_schedule_is_no_change():
    """The learning rate has moved, where it started is the same."""

    def scheduled(make) -> lm.MemOpt:
        optimizer = linear(lr=1e-2)
        schedule = make(optimizer)
        for _ in range(3):
            optimizer.step()
            schedule.step()
        return optimizer

    for make in (
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=9),
    ):
        saved = scheduled(make)
        assert saved.param_groups[0]["lr"] != 1e-2
        state = saved.state_dict()
        fresh, with_schedule = linear(lr=1e-2), linear(lr=1e-2)
        make(with_schedule)
        for optimizer in (fresh, with_schedule):
            assert said(functools.partial(optimizer.load_state_dict, state)) == []
    state = scheduled(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)).state_dict()
    (line,) = said(lambda: linear(lr=2e-2).load_state_dict(state))
    assert "lr 0.01 instead of 0.02" in line


def test_kinds_and_dtypes_are_told():
    saved = linear(state_dtype="bfloat16")
    saved.reformat({"0.weight": {"momentum": "none"}, "1.weight": {"second_moment": "dense"}})
    (line,) = said(lambda: linear().load_state_dict(saved.state_dict()))
    assert "momentum none instead of low_rank in 1 block" in line
    assert "second moment dense instead of factored in 1 block" in line
    assert "state in bfloat16 instead of float32 in 4 blocks" in line
    (line,) = said(lambda: linear().load_state_dict(linear(state_dtype="bfloat16").state_dict()))
    assert line.endswith("in 4 blocks. The dtype of state follows the checkpoint.")


def test_a_rank_that_cannot_be_changed_is_not_offered():
    def galore(rank: int) -> lm.MemOpt:
        torch.manual_seed(0)
        optimizer = lm.GaLore([("layers.0.mlp.up_proj.weight", nn.Parameter(torch.randn(20, 12)))], rank=rank)
        fill_grads(params_of(optimizer), 0)
        optimizer.step()
        return optimizer

    optimizer = galore(5)
    (line,) = said(lambda: optimizer.load_state_dict(galore(3).state_dict()))
    assert "rank 3 instead of 5 in 1 block" in line
    assert "State of 'galore' fits no other kind or rank: to use yours, create a new optimizer and load the" in line
    assert "reformat" not in line
    with pytest.raises(ValueError, match="which keeps no state that another rank could continue from"):
        optimizer.reformat({"mlp": {"rank": 5}})


def test_a_scheduler_that_sets_the_rate_again_is_told():
    saved, ours = linear(lr=1e-3), linear(lr=1e-2)
    for optimizer in (saved, ours):
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    (line,) = said(lambda: ours.load_state_dict(saved.state_dict()))
    assert line.endswith("A scheduler sets `lr` again at its next step: set its `base_lrs` as well.")


def test_a_conversion_is_told():
    model = tiny_llama()
    adamw = torch.optim.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.0)
    fill_grads(list(model.parameters()), 0)
    adamw.step()
    optimizer = lm.AdaPM(model.named_parameters(), lr=1e-3)
    (line,) = said(lambda: optimizer.load_state_dict(adamw.state_dict()))
    assert line == "AdaPM resumes from step 1 of a state dict, with state converted from AdamW."


def test_a_learning_rate_in_a_tensor_is_the_same_number():
    saved = linear(lr=torch.tensor(1e-3)).state_dict()
    assert said(lambda: linear(lr=1e-3).load_state_dict(saved)) == []


def test_other_processes_are_silent(monkeypatch):
    monkeypatch.setattr("lightning_memopt.optim.checkpoint.resume.rank", lambda: 1)
    assert said(lambda: linear(lr=1e-2).load_state_dict(linear(lr=1e-3).state_dict())) == []


def test_a_filter_silences_or_raises():
    saved = linear(lr=1e-3).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error", lm.ResumeWarning)
        with pytest.raises(lm.ResumeWarning, match="lr 0.001 instead of 0.01"):
            linear(lr=1e-2).load_state_dict(saved)
