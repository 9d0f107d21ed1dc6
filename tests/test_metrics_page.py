"""The page of metrics: every result with what it counts, and every scalar that callbacks log."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch")
pytest.importorskip("docstring_parser")

from torchmetrics import Metric

import lightning_memopt as lm
from lightning_memopt.callbacks.memory_report import SCALARS

ROOT = Path(__file__).resolve().parents[1]
PAGE = runpy.run_path(str(ROOT / "docs" / "metrics.py"))
TEXT = "\n".join(PAGE["page"]()) + "\n"


def test_the_page_of_metrics_is_up_to_date():
    assert (ROOT / "docs" / "metrics.md").read_text() == TEXT, "run: python docs/metrics.py > docs/metrics.md"


def test_the_page_has_every_metric_and_every_scalar():
    public = [getattr(lm.metrics, name) for name in lm.metrics.__all__]
    classes = [thing.__name__ for thing in public if isinstance(thing, type) and issubclass(thing, Metric)]
    assert [name for name in re.findall(r"^## (\w+)$", TEXT, flags=re.MULTILINE) if name in classes] == classes
    logged = re.findall(r"\| `memopt/(\w+)` \|$", TEXT, flags=re.MULTILINE)
    assert sorted(logged) == sorted(SCALARS)
    assert len(SCALARS) == 17, "docs/memory.md says how many there are"
    assert re.findall(r"^\| `memopt/(\w+)/<block>`", TEXT, flags=re.MULTILINE) == ["rank", "oscillation", "residual"]


class Silent(lm.metrics.PeakMemory):
    """A metric with a result more."""

    def compute(self):
        return {**super().compute(), "new": self.most[0]}


class Wordy(lm.metrics.PeakMemory):
    """A metric that names what it does not compute.

    - ``gone``: Nothing.
    """


def rows_of(metric: type[Metric], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    monkeypatch.setitem(PAGE["rows"].__globals__, "function_of", lambda metric: lm.metrics.peak_memory)
    return list(PAGE["rows"](metric))


def test_a_result_without_a_line_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="No docstring of Silent says what its result `new` counts: add a line"):
        rows_of(Silent, monkeypatch)


def test_a_line_without_a_result_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="A docstring of Wordy names `gone`, which is no result: peak, parameters, "):
        rows_of(Wordy, monkeypatch)
