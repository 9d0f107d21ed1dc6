"""Plots of metrics: bars, lines and the map of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

from matplotlib import pyplot
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torchmetrics import Metric

import lightning_memopt as lm
from lightning_memopt.figures.style import STRONG
from lightning_memopt.metrics import (
    MemorySavings,
    MomentumAllocation,
    OptimizerStateBytes,
    PeakMemory,
    heat_map,
    memory_savings,
    optimizer_state_bytes,
)
from tests.metrics._measured import (
    HEAD,
    METRICS,
    MODEL,
    SNAPSHOTS,
    adamw,
    changed_over_steps,
    history,
    snapshot,
    updated,
)

NUMBERS = [OptimizerStateBytes, MemorySavings, PeakMemory]  # whose results are single numbers


@pytest.fixture(autouse=True)
def no_figures_left():
    pyplot.switch_backend("agg")
    pyplot.close("all")
    yield
    pyplot.close("all")


def drawn(ax: Any) -> int:
    """Return how many bars, cells, lines or points an axis shows."""
    return len(ax.patches) + len(ax.lines) + len(ax.collections)


def metric_of(kind: type[Metric]) -> Any:
    return changed_over_steps()[1] if kind is MomentumAllocation else updated(kind, snapshot())


@pytest.mark.parametrize("kind", METRICS)
def test_plot_draws_the_metric_as_it_is(kind):
    metric = metric_of(kind)
    figure, ax = metric.plot()
    assert ax in figure.axes
    assert drawn(ax) > 0
    assert [label.get_text() for label in ax.get_yticklabels()]
    figure.canvas.draw()
    pixels = torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.int32)  # four bytes each
    assert len(pixels.unique()) > 2, "there is something to see"


@pytest.mark.parametrize("kind", METRICS)
def test_plot_draws_a_result(kind):
    metric = metric_of(kind)
    figure, ax = metric.plot(metric.compute())
    assert ax in figure.axes
    assert drawn(ax) == drawn(metric.plot()[1]) > 0


@pytest.mark.parametrize("kind", METRICS)
def test_plot_draws_on_a_given_axis_and_leaves_no_figure_open(kind):
    metric, ax = metric_of(kind), Figure().add_subplot()
    figure, found = metric.plot(ax=ax)
    assert found is ax
    assert figure is ax.get_figure()
    assert drawn(ax) > 0
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("kind", NUMBERS)
def test_plot_draws_several_results_over_time(kind):
    metric = kind()
    results = [metric(snapshot(recipe)) for recipe in ("adapm_lean", "adam_snsm", "adamw")]
    for given in (results, tuple(results)):
        figure, ax = metric.plot(given)
        assert ax in figure.axes
        assert drawn(ax) >= len(kind.lines or results[0]), "a line or point per number"
        figure.draw_without_rendering()
        ticks = [label.get_text() for label in ax.get_yticklabels()]
        assert all(tick.endswith(("B", "%")) for tick in ticks), ticks
    ax = Figure().add_subplot()
    pyplot.close("all")
    assert metric.plot(results, ax=ax)[1] is ax
    assert pyplot.get_fignums() == []


def test_bars_show_the_sizes():
    taken = SNAPSHOTS["adam_snsm"]()
    _, ax = updated(OptimizerStateBytes, taken).plot()
    shown = {label.get_text() for label in ax.get_yticklabels()}
    assert {"embedding", "head", "mlp", "subspace", "dense", "subset_norm"} <= shown
    assert "other" not in shown, "what there is none of is left out"
    widths = sorted(bar.get_width() for bar in ax.patches)
    found = optimizer_state_bytes(taken)
    largest = max(value for key, value in found.items() if "/" in key)
    unit = ax.get_xlabel().removeprefix("memory (").removesuffix(")")
    assert widths[-1] * {"B": 1, "KiB": 1024}[unit] == pytest.approx(largest)
    _, ax = updated(MemorySavings, taken).plot()
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(list(memory_savings(taken).values()))
    _, ax = updated(PeakMemory, taken).plot()
    assert [label.get_text() for label in ax.get_yticklabels()][-1] == "peak"
    assert len(ax.patches) == 8


def test_more_state_than_adamws_shows_as_less_than_nothing():
    _, ax = updated(MemorySavings, lm.take_snapshot(adamw(MODEL, amsgrad=True), MODEL)).plot()
    assert ax.get_xlim()[0] < -1


def test_the_map_of_ranks_has_a_row_per_matrix_and_a_column_per_entry():
    _, metric = changed_over_steps()
    figure, ax = metric.plot()
    (mesh,) = ax.collections
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert HEAD in labels
    assert not any("norm" in label for label in labels), "vectors are left out"
    shown = mesh.get_array().reshape(len(labels), 4)
    colors = mesh.to_rgba(shown[labels.index(HEAD)])
    assert [tuple(color) for color in colors[2:]] == [to_rgba("white"), to_rgba(STRONG)], "none, dense"
    assert shown[labels.index(HEAD)].tolist()[:2] == [6, 2]
    assert [text.get_text() for text in figure.axes[1].texts] == ["none", "dense"]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 3, 7, 9, 10], "as wide as an entry was in force"
    assert len(figure.axes) == 2, "and a bar of colours"


def test_a_map_of_many_blocks_labels_some():
    ax = Figure().add_subplot()
    heat_map(ax, [0, 5], {f"block {count}": [count % 7, 3] for count in range(200)}, until=9)
    assert 30 <= len(ax.get_yticklabels()) <= 60


def test_a_loaded_history_takes_the_place_of_a_result_at_hand():
    _, metric = changed_over_steps()
    other = updated(MomentumAllocation, snapshot())
    other.compute()
    other.load_state_dict(metric.state_dict())
    assert history(other) == history(metric)
    other.plot()


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match="nothing to draw yet"), pytest.warns(UserWarning, match="before the ``upd"):
        MomentumAllocation().plot()
    vector = lm.AdaPMLean([("norm.weight", nn.Parameter(torch.zeros(5)))]).snapshot()
    with pytest.raises(ValueError, match="nothing to draw yet"):
        updated(MomentumAllocation, vector).plot()
