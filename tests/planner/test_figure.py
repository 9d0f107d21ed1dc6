"""The picture of a sweep."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

import lightning_memopt as lm
from lightning_memopt.planner import sweep_memory
from lightning_memopt.planner.figure import sweep_figure
from lightning_memopt.planner.memory_plan import ADAMW


def test_a_sweep_and_its_figure():
    pytest.importorskip("matplotlib")
    plans = sweep_memory("llama-60m", ["adam_mini", "adafactor", "adamw"], world_sizes=(1, 2, 8), gpu_memory="512MiB")
    assert [plan.world_size for plan in plans] == [1, 2, 8]
    assert plans[1] == lm.plan_memory(
        "llama-60m", ["adam_mini", "adafactor", "adamw"], world_size=2, gpu_memory="512MiB"
    )
    figure = sweep_figure(plans)
    whole, state = figure.axes
    figure.draw_without_rendering()
    labels = [label.get_text() for label in whole.get_yticklabels()]
    assert labels
    assert all(label.endswith("iB") for label in labels), labels
    assert [line.get_label() for line in whole.lines] == [
        f"{ADAMW}\n= adamw", "adam_mini", "adafactor", "512 MiB per device",
    ]  # fmt: skip
    assert list(whole.lines[1].get_ydata()) == [plan.row("adam_mini").total_bytes for plan in plans]
    assert list(state.lines[2].get_ydata()) == [plan.row("adafactor").state_bytes for plan in plans]
    with pytest.raises(ValueError, match="nothing to plot"):
        sweep_figure([])
