"""What kernels need, and what happens without it."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_memopt.kernels import check
from lightning_memopt.kernels.check import usable

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "found", "text"),
    [
        (CUDA, None, r"kernels on cuda:0, but Triton is not installed \(`pip install triton`\)"),
        (CPU, object(), "kernels on cpu, but they run on CUDA devices only"),
    ],
)
def test_what_is_missing(monkeypatch, device, found, text):
    monkeypatch.setattr(check, "find_spec", lambda name: found)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    way_out = "`fused=None` uses kernels where they are available, `fused=False` never. Nothing has changed"
    with pytest.raises(RuntimeError, match=rf"`fused=True` needs {text}\. {way_out}"):
        usable(device, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not usable(device, None)
        assert not usable(device, False)
