"""The cost of the optimizers that benchmarks/quality.py compares: state, time and temporary memory of a step."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from _step_models import SIZES, Gradients, build_model
from _variants import VARIANTS
from step_time import measure

SIZE = "60m"
ROUNDS = 20  # two full gaps of SNSM


def costs(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measure steps on the shapes of a LLaMA with 60 million parameters, each in turns with fused AdamW's."""
    model = build_model(SIZES[SIZE], "cpu", torch.float32)
    gradients = Gradients(model, "cpu")
    for name in names:
        build = partial(VARIANTS[name].build, lr=1e-3, weight_decay=0.0)
        result = measure(name, build, model, gradients, Namespace(device="cpu", steps=ROUNDS))
        yield {
            "cost": name,
            "size": SIZE,
            "ratio": round(result.ratio, 2),
            "milliseconds": round(result.median * 1e3, 1),
            "temporaries": round(result.temporaries, 2),
            "state": round(result.state, 5),
        }
