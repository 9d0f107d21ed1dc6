from __future__ import annotations

import pytest


@pytest.fixture
def workplace(monkeypatch, tmp_path_factory):
    """Run in an empty folder, with a wide console."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    monkeypatch.setenv("COLUMNS", "120")
    pyplot.close("all")
    yield
    assert pyplot.get_fignums() == [], "no figure is left open"
