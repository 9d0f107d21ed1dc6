"""Sections of benchmarks/gpu.py that time only an optimizer's step: step, max_update and profile."""

from __future__ import annotations

import gc
import inspect
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import step_time
import torch
from _gpu_report import Report
from _memory import PeakMemory
from _report import ROOT
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

Build = Callable[[nn.Module], torch.optim.Optimizer]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = ("130m", "1b") if CUDA else ("tiny",)
RECIPES = ("adamw", "rmsprop_sn", "adafactor", "adam_sn", "adapm", "adapm_mini", "adapm_lean", "adam_snsm")
WARM_UP = 4  # steps before the timed ones, whose peak of memory is recorded
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaEventSynchronize")  # the profiler calls cudaDeviceSynchronize itself


@dataclass(frozen=True)
class Timing:
    """Medians of a step in milliseconds, and its scratch memory in MiB."""

    total: float
    host: float
    scratch: float


def _torch(**options: bool) -> Build:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, **options)


def _recipe(name: str, **options: Any) -> Build:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        import lightning_memopt as lm

        optimizer = lm.MemOpt(model.named_parameters(), recipe=name, lr=1e-3, **options)
        optimizer.bind(model)
        return optimizer

    return build


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return the milliseconds until the device is done, and until the host is done."""
    if not CUDA:
        started = time.perf_counter()
        function()
        return ((time.perf_counter() - started) * 1e3,) * 2
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started = time.perf_counter()
    first.record()
    function()
    host = time.perf_counter() - started
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last), host * 1e3


def measure(build: Build, model: nn.Module, gradients: step_time.Gradients, rounds: int) -> Timing:
    """Time an optimizer on new gradients every round; writing them is not timed."""
    gradients.renew()
    with PeakMemory(DEVICE) as memory:
        optimizer = build(model)
        for _ in range(WARM_UP):
            gradients.renew()
            memory.step(optimizer.step)
    pairs = []
    for _ in range(rounds):
        gradients.renew()
        pairs.append(timed(optimizer.step))
    totals, hosts = zip(*pairs, strict=True)
    # The first step allocates state.
    return Timing(statistics.median(totals), statistics.median(hosts), max(memory.peaks[1:]) / 2**20)


def models(sizes: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, step_time.Gradients]]:
    """Yield one size after the other; the previous one is freed if the caller drops its references."""
    for size in sizes:
        model = step_time.build_model(step_time.SIZES[size], DEVICE, torch.float32)
        yield size, model, step_time.Gradients(model, DEVICE)
        del model
        _free()


def _free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def step(report: Report, quick: bool) -> None:
    """Time every recipe's step against fused AdamW's."""
    builds = {"torch fused": _torch(fused=True), "torch foreach": _torch(foreach=True)}
    builds |= {name: _recipe(name) for name in RECIPES}
    for size, model, gradients in models(SIZES):
        head = ["optimizer", "ms", "x fused AdamW", "host (ms)", "scratch (MiB)"]
        table = report.table(f"One step, LLaMA {size} shapes, float32", head)
        fused = float("nan")
        for name, build in builds.items():
            with table.attempt(name):
                found = measure(build, model, gradients, 10 if quick else 20)
                fused = found.total if name == "torch fused" else fused
                ratio = f"{found.total / fused:.2f}"
                table.add(name, f"{found.total:.2f}", ratio, f"{found.host:.2f}", f"{found.scratch:.1f}")
            _free()


def max_update(report: Report, quick: bool) -> None:
    """Time the cost of bounding an update: the default of `max_update` against None."""
    import lightning_memopt as lm

    if "max_update" not in inspect.signature(lm.MemOpt.__init__).parameters:
        report.line("max_update: skipped, MemOpt has no such argument.")
        return
    for size, model, gradients in models(SIZES[:1]):
        head = ["recipe", "max_update", "ms", "host (ms)", "scratch (MiB)"]
        table = report.table(f"A bounded update, LLaMA {size} shapes, float32", head)
        for recipe in ("adapm_lean", "adapm"):
            for name, options in (("default", {}), ("None", {"max_update": None})):
                with table.attempt(recipe, name):
                    found = measure(_recipe(recipe, **options), model, gradients, 10 if quick else 20)
                    table.add(recipe, name, f"{found.total:.2f}", f"{found.host:.2f}", f"{found.scratch:.1f}")
                _free()


def profile(report: Report, quick: bool) -> None:
    """Count the kernels and synchronizations of one step, and list the lines that wait for the device."""
    head = ["recipe", "launches", "synchronisations", "kernels (ms)", "step (ms)", "device busy"]
    for size, model, gradients in models(SIZES[:1]):
        table = report.table(f"What a step launches, LLaMA {size} shapes", head)
        places = report.table("Where the host waits", ["recipe", "line", "times in a step"])
        for recipe in ("adapm_lean", "adam_snsm", "adafactor"):
            with table.attempt(recipe):
                gradients.renew()
                optimizer = _recipe(recipe)(model)
                usual = statistics.median(timed(optimizer.step)[0] for _ in range(5))
                events = _events(optimizer.step)
                (report.folder / f"profile_{recipe}.txt").write_text(_listing(events))
                launches = sum(event.count for event in events if "Launch" in event.key)
                waits = sum(event.count for event in events if event.key in SYNCHRONISATIONS)
                kernels = sum(_kernel_us(event) for event in events) / 1e3
                table.add(recipe, f"{launches}", f"{waits}", f"{kernels:.1f}", f"{usual:.1f}", f"{kernels / usual:.0%}")
            with places.attempt(recipe):
                for place, count in waiting_lines(optimizer.step).most_common():
                    places.add(recipe, f"`{place}`", f"{count}")
            optimizer = None
            _free()


def _events(function: Callable[[], object]) -> Any:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with torch.profiler.profile(activities=activities) as recording:
        function()
        if CUDA:
            torch.cuda.synchronize()
    return recording.key_averages()


def _listing(events: Any) -> str:
    return events.table(sort_by="self_device_time_total" if CUDA else "self_cpu_time_total", row_limit=25)


def _kernel_us(event: Any) -> float:
    """Return the time of a kernel, and 0 for the annotation that spans the whole step."""
    spans = getattr(event, "is_user_annotation", False) or event.key.startswith("Optimizer.step")
    return 0.0 if spans or event.device_type != DeviceType.CUDA else event.self_device_time_total


def waiting_lines(function: Callable[[], object]) -> Counter[str]:
    """Return how often each line waits for the device, as counted by torch's debug mode."""
    if not CUDA:
        return Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [each for each in caught if "called a synchronizing CUDA operation" in str(each.message)]
    return Counter(f"{_relative(each.filename)}:{each.lineno}" for each in found)


def _relative(path: str) -> str:
    return str(Path(path).relative_to(ROOT)) if Path(path).is_relative_to(ROOT) else Path(path).name
