"""Bytes of an optimizer's temporaries during a step, and bytes of its state.

On the CPU, torch's profiler records the allocator itself, so work space inside an operator counts, and in-place
operations and views cost nothing. Build everything inside the recording: the profiler does not report the release of a
block that was allocated before it started. Memory that LAPACK allocates outside torch's allocator is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_MARK = "memopt_step"


class PeakMemory:
    """Record the peak of allocated bytes in each step, above what was allocated when the step began."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.peaks: list[int] = []
        self._profile: Any = None

    def __enter__(self) -> PeakMemory:
        if not self.device.startswith("cuda"):
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        if self._profile is not None:
            self._profile.__exit__(*details)
            self.peaks = list(_peaks(self._profile))

    def step(self, function: Callable[[], object]) -> None:
        """Run one measured step."""
        if self._profile is not None:
            with record_function(_MARK):
                function()
            return
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        torch.cuda.synchronize(self.device)
        self.peaks.append(torch.cuda.max_memory_allocated(self.device) - before)


def _peaks(recording: Any) -> Iterator[int]:
    # The public event list only has each operator's net change; the allocator's own events are in the raw results.
    events = recording.profiler.kineto_results.events()
    spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == _MARK)
    changes = sorted(
        ((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda change: change[0]
    )
    for start, end in spans:
        level = peak = 0
        for when, nbytes in changes:
            if start <= when <= end:
                level += nbytes
                peak = max(peak, level)
        yield peak


def state_bytes(state: Any) -> int:
    """Return the bytes of all distinct storages reachable from an optimizer's state, through other objects too."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[Any] = list(state.values())
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if is_traceable_wrapper_subclass(item):
            stack.extend(getattr(item, name) for name in item.__tensor_flatten__()[0])
        elif isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
        elif hasattr(item, "__dict__"):
            stack.extend(vars(item).values())
    return sum(storages.values())


def self_check() -> None:
    """Check the recorder on cases with a known peak."""
    unit = 4 * 1024 * 1024
    source = torch.ones(1024, 1024)
    box: dict[str, torch.Tensor] = {}

    def replace_state() -> None:
        box["state"] = box["state"] * 2 if "state" in box else source.clone()

    cases: list[tuple[str, Callable[[], object], int]] = [
        ("in place", lambda: source.mul_(1.0).add_(0.0), 0),
        ("views", lambda: source.view(-1)[: source.numel() // 2].view(512, 1024).t().T[:10], 0),
        ("one temporary", lambda: source.add_(source * 2).mul_(0.25), unit),
        ("two alive at once", lambda: (source * 2) + 1, 2 * unit),
        ("one after the other", lambda: [source.add_(source.square()).mul_(0.25) for _ in range(3)], unit),
        ("slices", lambda: [source[i : i + 256].square() for i in range(0, 1024, 256)][0], unit),
        ("one slice at a time", lambda: [source[i : i + 256].square().sum() for i in range(0, 1024, 256)], unit // 4),
        ("two dtypes", lambda: source.double().float(), 3 * unit),
        ("inside an operator", lambda: source.logsumexp(1), unit),
        ("state replaced", replace_state, unit),
    ]
    for name, function, expected in cases:
        box.clear()
        with PeakMemory("cpu") as memory:
            for _ in range(3):
                memory.step(function)
        wrong = abs(memory.peaks[-1] - expected) > 0.01 * unit
        print(f"{'WRONG' if wrong else 'ok':5} {name}: peak {memory.peaks[-1]}, expected {expected}")
        if wrong:
            raise SystemExit(f"the memory recorder is wrong about {name!r}: {memory.peaks}")
