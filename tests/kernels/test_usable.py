"""What kernels need, and what happens without it."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.kernels import check
from lightning_memopt.kernels.check import usable
from tests._compare import assert_equal

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "installed", "text"),
    [
        (CUDA, False, r"kernels on cuda:0, but Triton is not installed \(`pip install triton`\)"),
        (CPU, True, "kernels on cpu, but they run on CUDA devices only"),
    ],
)
def test_what_is_missing(monkeypatch, device, installed, text):
    monkeypatch.setattr(check, "installed", lambda: installed)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    way_out = "`fused=None` uses kernels where they are available, `fused=False` never. Nothing has changed"
    with pytest.raises(RuntimeError, match=rf"`fused=True` needs {text}\. {way_out}"):
        usable(device, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not usable(device, None)
        assert not usable(device, False)


def optimizer_with(fused: object) -> lm.AdaPMLean:
    weight = nn.Parameter(torch.ones(6, 4))
    weight.grad = torch.ones(6, 4)
    return lm.AdaPMLean([("weight", weight)], fused=fused)


def require_refusal(optimizer: lm.MemOpt) -> None:
    """Check that a step needs kernels, and changes nothing."""
    (weight,) = optimizer.param_groups[0]["params"]
    before, state = weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="`fused=True` needs kernels on cpu, but they run on CUDA devices only"):
        optimizer.step()
    assert_equal(weight.detach(), before)
    assert_equal(optimizer.state_dict()["state"], state)


def test_an_optimizer_that_needs_kernels_takes_no_step_without():
    require_refusal(optimizer_with(True))


def test_what_is_asked_for_outlasts_copies_and_loading():
    optimizer = optimizer_with(True)
    require_refusal(copy.deepcopy(optimizer))
    require_refusal(pickle.loads(pickle.dumps(optimizer)))
    other = optimizer_with(False)
    other.step()
    optimizer.load_state_dict(other.state_dict())
    require_refusal(optimizer)
    other.load_state_dict(optimizer.state_dict())
    other.step()


@pytest.mark.parametrize("fused", [None, False])
def test_others_do_without(fused):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer_with(fused).step()


def test_other_values_are_refused():
    text = r"`fused` must be True, False or None \(where kernels are available\), got 'yes'"
    with pytest.raises(TypeError, match=text):
        optimizer_with("yes")
