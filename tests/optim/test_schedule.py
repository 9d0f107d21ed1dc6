"""The schedule: its values, its end, resuming, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.optim.schedule import DECAYS


def made(*args, lr=1.0, **kwargs):
    model = nn.Linear(2, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 3 * lr}]
    optimizer = torch.optim.SGD(groups, lr=lr)
    return optimizer, lm.WarmupSchedule(optimizer, *args, **kwargs)


def rates(optimizer, schedule, steps):
    """Return the rate of the first group in every step."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warmup_then_cosine():
    optimizer, schedule = made(4, total_steps=20)
    found = rates(optimizer, schedule, 101)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[12] == pytest.approx(0.55)
    assert found[20] == found[100] == pytest.approx(0.1)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.3)


def test_linear_and_constant():
    assert rates(*made(1, "linear", final=0.0, total_steps=5), 6) == pytest.approx([0.5, 1, 0.75, 0.5, 0.25, 0])
    assert rates(*made(1, "constant"), 4) == pytest.approx([0.5, 1, 1, 1])
    assert rates(*made(0, "constant", total_steps=2), 4) == [1, 1, 1, 1]
    assert rates(*made(5, total_steps=3), 7)[-1] == 1.0, "a run that ends during its warm-up"


@pytest.mark.parametrize("decay", DECAYS)
def test_a_resumed_schedule_goes_on(decay):
    optimizer, schedule = made(3, decay, total_steps=12)
    whole = rates(optimizer, schedule, 12)
    optimizer, schedule = made(3, decay, total_steps=12)
    first = rates(optimizer, schedule, 5)
    saved = optimizer.state_dict(), schedule.state_dict()
    optimizer, schedule = made(3, decay, total_steps=12)
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    assert [*first, *rates(optimizer, schedule, 7)] == whole


def test_a_resumed_run_may_be_longer():
    optimizer, schedule = made(0, "linear", final=0.0, total_steps=4)
    rates(optimizer, schedule, 2)
    longer, other = made(0, "linear", final=0.0, total_steps=8)
    longer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(schedule.state_dict())
    assert rates(longer, other, 2) == pytest.approx([1 - 2 / 8, 1 - 3 / 8]), "from the first step on"
    assert other.get_last_lr()[0] == pytest.approx(1 - 4 / 8)


def test_a_resume_sets_the_rate_of_every_group():
    optimizer, schedule = made(0, "linear", final=0.0, total_steps=4, lr=torch.tensor(1.0))
    rates(optimizer, schedule, 2)
    longer, other = made(0, "linear", final=0.0, total_steps=8, lr=torch.tensor(1.0))
    tensor = longer.param_groups[0]["lr"]
    other.load_state_dict(schedule.state_dict())
    assert [group["lr"].item() for group in longer.param_groups] == pytest.approx([0.75, 2.25])
    assert longer.param_groups[0]["lr"] is tensor, "a captured graph reads the same tensor"
    unknown, other = made(0, "linear", final=0.0)
    unknown.param_groups[0]["lr"] = 0.5  # of the optimizer's own state
    other.load_state_dict(schedule.state_dict())
    assert unknown.param_groups[0]["lr"] == 0.5, "what the schedule cannot know yet"


def test_a_resume_leaves_rates_alone_that_another_schedule_sets():
    def chain():
        optimizer, schedule = made(3, "constant")
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [schedule, cosine], milestones=[5])

    whole = rates(*chain(), 20)
    optimizer, schedule = chain()
    assert rates(optimizer, schedule, 15) == whole[:15]
    other, resumed = chain()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert rates(other, resumed, 5) == whole[15:]


def test_a_schedule_of_more_groups_is_refused():
    optimizer, schedule = made(3, "constant")
    saved = schedule.state_dict()
    fewer = lm.WarmupSchedule(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0), 3, "constant")
    before = fewer.state_dict()
    with pytest.raises(ValueError, match="saved with 2 parameter groups, the optimizer has 1: add the missing groups"):
        fewer.load_state_dict(saved)
    assert fewer.state_dict() == before


def test_groups_that_come_later_follow():
    optimizer, schedule = made(1, "constant", lr=1.0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 5.0})
    rates(optimizer, schedule, 2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1, 3, 5])
    optimizer, schedule = made(0, "linear", final=0.0, total_steps=4)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": torch.tensor(1.0)})
    rates(optimizer, schedule, 3)
    assert optimizer.param_groups[2]["lr"].item() == pytest.approx(0.25), "a tensor is no reference to itself"


def test_it_drives_our_optimizer_and_takes_tensors():
    model = nn.Linear(4, 4)
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=0.01)
    schedule = lm.WarmupSchedule(optimizer, 1, total_steps=3)
    model(torch.ones(1, 4)).sum().backward()
    assert rates(optimizer, schedule, 3) == pytest.approx([0.005, 0.01, 0.0055])
    tensor = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=torch.tensor(1.0))
    schedule = lm.WarmupSchedule(tensor, 1, "constant")
    assert tensor.param_groups[0]["lr"].item() == 0.5


def test_what_is_refused():
    for arguments, message in (
        ((-1,), "`warmup_steps` must not be negative, got -1"),
        ((1, "cosin"), "Unknown decay 'cosin'. Did you mean 'cosine'?"),
    ):
        with pytest.raises(ValueError, match=message):
            made(*arguments)
    with pytest.raises(TypeError, match="`warmup_steps` must be a number of steps, not a share of them, got 0.1"):
        made(0.1)
    with pytest.raises(TypeError, match="`total_steps` must be a number of steps, not a share of them, got inf"):
        made(1, total_steps=float("inf"))
    with pytest.raises(ValueError, match="`final` must be between 0 and 1, got 2"):
        made(1, final=2)
    with pytest.raises(ValueError, match="`total_steps` must be at least 1, or None, got 0"):
        made(1, total_steps=0)
    optimizer, schedule = made(1)
    optimizer.step()
    with pytest.raises(ValueError, match="how long its cosine decay is: pass `total_steps`.*MemOptCLI takes it"):
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_accelerate_steps_a_constant_schedule():
    accelerate = pytest.importorskip("accelerate")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    prepared = accelerate.Accelerator(cpu=True).prepare(model, optimizer, lm.WarmupSchedule(optimizer, 3, "constant"))
    prepared[0](torch.ones(1, 2)).sum().backward()
    prepared[1].step()
    prepared[2].step()
    assert optimizer.param_groups[0]["lr"] == 0.5
