"""Sizes of meshes."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning.pytorch")

from lightning_memopt import MemOptFSDPStrategy
from lightning_memopt.strategy.mesh import resolved_data_size


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"replicate_size": 0}, ValueError, "`replicate_size` must be at least 1, got 0"),
        ({"data_parallel_size": -1}, ValueError, "`data_parallel_size` must be at least 1, got -1"),
        ({"tensor_parallel_size": "auto"}, TypeError, "`tensor_parallel_size` must be an integer, got 'auto'"),
        ({"data_parallel_size": True}, TypeError, "`data_parallel_size` must be an integer, got True"),
        ({"data_parallel_size": 6, "replicate_size": 4}, ValueError, "`replicate_size` 4 does not divide .* 6"),
    ],
)
def test_sizes_that_mean_nothing(options, error, match):
    with pytest.raises(error, match=match):
        MemOptFSDPStrategy(**options)


@pytest.mark.parametrize(
    ("data", "tensor", "replicate", "world", "expected"),
    [("auto", 1, 1, 6, 6), ("auto", 2, 1, 6, 3), ("auto", 2, 3, 6, 3), (4, 2, 2, 8, 4), ("auto", 4, 1, 6, None),
     (4, 1, 1, 8, None), ("auto", 1, 4, 6, None)],
)  # fmt: skip
def test_sizes(data, tensor, replicate, world, expected):
    if expected is not None:
        assert resolved_data_size(data, tensor, replicate, world) == expected
        return
    with pytest.raises(RuntimeError, match=f"multiplied should equal the world size \\({world}\\)"):
        resolved_data_size(data, tensor, replicate, world)
