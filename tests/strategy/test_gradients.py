"""Clipping."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch")

from lightning_memopt.strategy.gradients import clip_grad_norm_, clip_grad_value_


def test_clipping_is_that_of_torch():
    params = [nn.Parameter(torch.randn(5, 3)) for _ in range(3)]
    for param in params[:2]:
        param.grad = torch.randn(5, 3)
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    for algorithm, reference, limit in (
        (clip_grad_norm_, nn.utils.clip_grad_norm_, 0.3),
        (clip_grad_norm_, nn.utils.clip_grad_norm_, 30.0),
        (partial(clip_grad_norm_, norm_type=1), partial(nn.utils.clip_grad_norm_, norm_type=1), 0.3),
        (partial(clip_grad_norm_, norm_type=math.inf), partial(nn.utils.clip_grad_norm_, norm_type=math.inf), 0.3),
        (clip_grad_value_, nn.utils.clip_grad_value_, 0.01),
    ):
        for param, copy in zip(params, copies, strict=True):
            copy.grad = None if param.grad is None else param.grad.clone()
        ours, theirs = algorithm(params, limit), reference(copies, limit)
        torch.testing.assert_close(ours, theirs)
        for param, copy in zip(params[:2], copies, strict=False):
            torch.testing.assert_close(param.grad, copy.grad)
    assert clip_grad_norm_([params[2]], 1.0) == 0


def test_a_norm_that_is_not_finite_may_be_refused():
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.tensor([1.0, float("inf")])
    with pytest.raises(RuntimeError, match="The norm of the gradients is inf, so they cannot be clipped"):
        clip_grad_norm_([param], 1.0, error_if_nonfinite=True)
    assert param.grad.tolist() == [1.0, float("inf")]
