"""What the strategy adds to the errors of torch, and to those of other ranks."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_memopt.strategy import agreement
from lightning_memopt.strategy.errors import explain


def test_an_error_about_a_freed_gradient_says_what_to_call_instead():
    error = RuntimeError("The tensor has a non-zero number of elements, but its data is not allocated yet.")
    explain(error, nn.Linear(2, 2))
    (note,) = error.__notes__
    assert note.startswith("Weights and gradients are sharded: use `lightning_memopt.grad_norm(module)` instead of")


@pytest.mark.parametrize("error", [ValueError("its data is not allocated yet"), RuntimeError("out of memory")])
def test_other_errors_get_no_note(error):
    explain(error, nn.Linear(2, 2))
    assert not hasattr(error, "__notes__")


def test_an_error_of_another_rank_names_the_rank(monkeypatch):
    def gather(outcomes: list[Any], own: Any, group: Any) -> None:
        outcomes[:] = [own, (None, OSError("disk full"))]

    monkeypatch.setattr(agreement, "rank_and_size", lambda group: (0, 2))
    monkeypatch.setattr(agreement.dist, "all_gather_object", gather)
    with pytest.raises(OSError, match="disk full") as caught:
        agreement.on_all(lambda: 1)
    assert caught.value.__notes__ == ["This happened on rank 1."]
