"""The contract of a kind, one function per property; each takes any kind and any shape of block."""

from __future__ import annotations

import dataclasses
import inspect
import io
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_memopt.kinds.base import Kind
from lightning_memopt.kinds.momentum import Momentum
from lightning_memopt.sharding.collectives import Pending
from tests._compare import assert_equal, relative_error
from tests.kinds.contract.cases import BAD_OPTION_VALUES, gradient, label, layout_of, tick_at
from tests.kinds.contract.running import (
    averages_squares,
    cloned,
    dense,
    finish,
    pretend_sharded,
    step,
    steps,
    task_of,
)

Shape = tuple[int, ...]


def check_frozen_dataclass(kind: Kind, shape: Shape) -> None:
    assert dataclasses.is_dataclass(kind)
    assert kind == replace(kind)
    assert hash(kind) == hash(replace(kind)), "a kind is hashable: equal kinds can be grouped"
    for entry in fields(kind):
        value = getattr(kind, entry.name)
        for part in value if isinstance(value, tuple) else (value,):
            assert isinstance(part, str | int | float | bool | None), f"{entry.name} holds {value!r}, no plain value"
        with pytest.raises(FrozenInstanceError):
            setattr(kind, entry.name, value)


def check_state_is_exactly_what_it_declares(kind: Kind, shape: Shape) -> None:
    layout = layout_of(shape)
    state = kind.init(layout)
    assert tuple(state) == kind.keys
    assert {key: tuple(value.shape) for key, value in state.items()} == kind.shapes(layout)
    assert sum(_storage_bytes(value) for value in state.values()) == kind.nbytes(layout)
    for key, value in state.items():
        assert type(value) is torch.Tensor
        assert value.device.type == "cpu"
        assert value.dtype == torch.float32
        assert not value.any(), f"{key} does not start at zero"
        assert not value.requires_grad


def check_meta_state_equals_real_state(kind: Kind, shape: Shape) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        real_layout = layout_of(shape, state_dtype=dtype)
        meta_layout = replace(real_layout, device=torch.device("meta"))
        real, meta = kind.init(real_layout), kind.init(meta_layout)
        assert real.keys() == meta.keys()
        for key, value in real.items():
            assert meta[key].device.type == "meta"
            assert (meta[key].shape, meta[key].dtype) == (value.shape, value.dtype)
            assert value.dtype == dtype
            assert _storage_bytes(meta[key]) == _storage_bytes(value) == value.numel() * value.element_size()
        assert kind.nbytes(meta_layout) == kind.nbytes(real_layout)


def check_state_loads_weights_only(kind: Kind, shape: Shape) -> None:
    layout, state = _trained(kind, shape, 3)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert_equal(loaded, state)


def check_update_writes_in_place(kind: Kind, shape: Shape) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layout = layout_of(shape, state_dtype=dtype)
        state = kind.init(layout)
        before = {key: (id(value), value.data_ptr(), value.dtype) for key, value in state.items()}
        steps(kind, _gradients(shape, 4), state, layout)
        assert {key: (id(value), value.data_ptr(), value.dtype) for key, value in state.items()} == before
        assert all(_storage_bytes(value) == value.numel() * value.element_size() for value in state.values())
        assert all(value.any() for value in state.values()), "a part of the state was never written"


def check_squares_are_never_negative(kind: Kind, shape: Shape) -> None:
    """A checkpoint in which they are is refused."""
    assert set(kind.squares) <= set(kind.keys)
    for dtype in (torch.float32, torch.bfloat16):
        layout = layout_of(shape, state_dtype=dtype)
        state = kind.init(layout)
        for number, grad in enumerate(_gradients(shape, 4)):
            step(kind, grad, state, layout, tick_at(number + 1))
            assert not any(bool((state[key] < 0).any()) for key in kind.squares)


def check_gradient_is_not_modified(kind: Kind, shape: Shape) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        layout = layout_of(shape, torch.float64 if dtype == torch.float64 else torch.float32)
        state = kind.init(layout)
        for number in range(1, 5):
            grad = gradient(shape, number, dtype)
            copy = grad.clone()
            step(kind, grad, state, layout, tick_at(number))
            assert_equal(grad, copy)


def check_result_is_not_the_state_of_later_steps(kind: Kind, shape: Shape) -> None:
    """Reading a direction or denominator twice gives the same numbers, and reading it changes no state."""
    layout, state = _trained(kind, shape, 3)
    grad = gradient(shape, 99)
    result = finish(task_of(kind, layout.take(grad), state, layout, tick_at(4)))
    after = cloned(state)
    first = dense(result, layout)
    assert_equal(dense(result, layout), first)
    assert_equal(state, after)


def check_deterministic(kind: Kind, shape: Shape) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layout = layout_of(shape, state_dtype=dtype)
        one, two = kind.init(layout), kind.init(layout)
        first = steps(kind, _gradients(shape, 5), one, layout)
        torch.manual_seed(1234)
        torch.rand(17)  # the global random numbers are none of a kind's business
        position = torch.get_rng_state()
        assert_equal(steps(kind, _gradients(shape, 5), two, layout), first)
        assert_equal(two, one)
        assert_equal(torch.get_rng_state(), position)


def check_resumable(kind: Kind, shape: Shape) -> None:
    """A copy of the state is all that continuing needs."""
    for dtype in (torch.float32, torch.bfloat16):
        layout = layout_of(shape, state_dtype=dtype)
        state = kind.init(layout)
        grads = _gradients(shape, 9)
        steps(kind, grads[:4], state, layout)
        resumed, fresh = cloned(state), replace(kind)
        assert_equal(
            steps(fresh, grads[4:], resumed, layout_of(shape, state_dtype=dtype), first=5),
            steps(kind, grads[4:], state, layout, first=5),
        )
        assert_equal(resumed, state)


def check_finite(kind: Kind, shape: Shape) -> None:
    ones = torch.ones(shape)
    rank_one = gradient(shape[:-1] + (1,), 3) * ones if shape else ones
    sequences = {
        "zero": [0 * ones] * 5,
        "zero, then random": [0 * ones, *_gradients(shape, 4)],
        "random, then zero": [*_gradients(shape, 3), *[0 * ones] * 4],
        "all equal": [ones] * 5,
        "rank one": [rank_one] * 5,
        "huge": _gradients(shape, 5, scale=1e12),
        "tiny": _gradients(shape, 5, scale=1e-12),
        "tiny, huge, tiny": [gradient(shape, i, scale=scale) for i, scale in enumerate((1e-12, 1e12, 1e-12, 1e-12))],
        "one element": [(torch.arange(ones.numel()) == 0).view(shape) * 2.0] * 5,
    }
    for name, grads in sequences.items():
        layout = layout_of(shape)
        state = kind.init(layout)
        for number, grad in enumerate(grads, start=1):
            result = step(kind, grad, state, layout, tick_at(number))
            assert result.isfinite().all(), f"not finite after {number} gradients that are {name}"
            if not isinstance(kind, Momentum) and not kind.of_direction:  # of those, U / D is judged
                assert (result > 0).all(), f"a denominator of 0 or less after {number} gradients that are {name}"
        assert all(value.isfinite().all() for value in state.values()), f"state not finite after gradients: {name}"


def check_zero_gradients_move_nothing(kind: Kind, shape: Shape) -> None:
    if not isinstance(kind, Momentum):
        return
    layout = layout_of(shape)
    state = kind.init(layout)
    assert_equal(steps(kind, [torch.zeros(shape)] * 4, state, layout), torch.zeros(layout.matrix))


def check_nothing_full_size_waits(kind: Kind, shape: Shape) -> None:
    """Across a request only gradient, state and small tensors are alive; and a sum of a single part changes nothing."""
    if len(shape) < 2:
        return
    m, n = (24, 24) if shape[-2] == shape[-1] else (40, 8) if shape[-2] > shape[-1] else (8, 40)
    shape = (*shape[:-2], m, n)
    whole = layout_of(shape)
    if "rank" in kind.options():
        kind = replace(kind, rank=1)
    if getattr(kind, "subset_size", None) == 1:
        return  # that is a dense second moment
    for dim in (-2, -1):
        layout = pretend_sharded(whole, dim)
        if kind.needs_whole(layout):
            continue
        state, expected = kind.init(whole), kind.init(whole)
        for number in range(1, 5):
            grad = layout.take(gradient(shape, number))
            largest = max(4 * grad.numel() - 1, kind.scratch(layout, tick_at(number)))  # waves bound what it says there
            known = {value.untyped_storage().data_ptr() for value in (grad, *state.values())}

            def look(task: Any, known: set[int] = known, largest: int = largest, dim: int = dim) -> None:
                for name, value in _waiting_tensors(task):
                    if value.untyped_storage().data_ptr() not in known:
                        assert value.untyped_storage().nbytes() <= largest, (
                            f"{name}, {tuple(value.shape)}, is alive across a request with dimension {dim} sharded"
                        )

            result = finish(task_of(kind, grad, state, layout, tick_at(number)), look)
            alone = step(kind, gradient(shape, number), expected, whole, tick_at(number))
            if m != n:  # which side of a square a kind takes for the short one may depend on the sharding
                assert_equal(dense(result, layout), alone)
            assert relative_error(dense(result, layout), alone) < 1e-5
            assert_equal(state, expected)


def check_infer(kind: Kind, shape: Shape) -> None:
    layout = layout_of(shape)
    state = kind.init(layout)
    assert kind.infer(state, layout) == kind.resolve(layout)
    if "rank" in kind.options():
        assert replace(kind, rank=3).infer(state, layout) == kind.resolve(layout), "the rank is in the shapes"
    for key, value in state.items():
        for wrong in ([size + 1 for size in value.shape], (7, *value.shape, 7)):
            if tuple(wrong) == tuple(value.shape):
                continue
            with pytest.raises(ValueError, match=key):
                kind.infer({**state, key: value.new_zeros(wrong)}, layout)


def check_resolved_kind_is_the_same(kind: Kind, shape: Shape) -> None:
    layout = layout_of(shape)
    resolved = kind.resolve(layout)
    assert resolved.resolve(layout) == resolved
    assert resolved.shapes(layout) == kind.shapes(layout)
    one, two = kind.init(layout), resolved.init(layout)
    assert_equal(steps(resolved, _gradients(shape, 4), two, layout), steps(kind, _gradients(shape, 4), one, layout))


def check_dense_round_trip(kind: Kind, shape: Shape) -> None:
    layout = layout_of(shape)
    value = gradient(layout.matrix, 5)
    value = value if isinstance(kind, Momentum) else value.square()
    state = kind.from_dense(value.clone(), layout)
    assert tuple(state) == kind.keys
    assert {key: tuple(part.shape) for key, part in state.items()} == kind.shapes(layout)
    assert all(_storage_bytes(part) == part.numel() * part.element_size() for part in state.values())
    if not kind.restorable:
        return
    back = kind.to_dense(state, layout)
    assert (tuple(back.shape), back.dtype) == (layout.matrix, layout.dtype)
    error = float((back - value).norm())
    # The best any state of this size can do: nothing, the tail of the spectrum, or what a mean over subsets loses.
    if not kind.keys:
        best = float(value.norm())
    elif "rank" in kind.options():
        rank = kind.resolve(layout).rank
        best = float(torch.linalg.svdvals(value.double())[..., rank:].norm())
    elif sum(part.numel() for part in state.values()) >= value.numel():
        best = 0.0
    elif isinstance(kind, Momentum):
        best = float(value.norm())
    else:
        best = float((value - value.mean((-2, -1), keepdim=True)).norm())  # a constant per matrix: all can do that
        assert relative_error(back.mean((-2, -1)), value.mean((-2, -1))) < 1e-5, "the mean of the squares was lost"
    assert error <= best + 1e-5 * float(value.norm())
    again = kind.from_dense(back.clone(), layout)
    assert relative_error(kind.to_dense(again, layout), back) < 1e-5, "not a fixed point"


def check_trained_state_is_a_fixed_point(kind: Kind, shape: Shape) -> None:
    layout, state = _trained(kind, shape, 6)
    if not kind.restorable or not kind.keys:
        return
    statistic = kind.to_dense(state, layout)
    again = kind.to_dense(kind.from_dense(statistic.clone(), layout), layout)
    assert relative_error(again, statistic) < 2e-5


def check_stack_is_a_loop_over_matrices(kind: Kind, shape: Shape) -> None:
    layout = layout_of(shape)
    if len(layout.matrix) < 3:
        return
    kind = kind.resolve(layout)
    state = kind.init(layout)
    steps(kind, _gradients(shape, 4), state, layout)  # draws are over: the rest needs no random number
    if getattr(kind, "projection", None) == "random":
        return
    ones = [{key: value[i].clone() for key, value in state.items()} for i in range(shape[0])]
    single = layout_of(shape[1:])
    for number in (5, 6, 7):
        grad = gradient(shape, number)
        together = step(kind, grad, state, layout, tick_at(number))
        apart = [step(kind, grad[i], ones[i], single, tick_at(number)) for i in range(shape[0])]
        assert relative_error(together, torch.stack(apart)) < 1e-5


def check_scales_with_the_gradient(kind: Kind, shape: Shape) -> None:
    layout = layout_of(shape)
    for factor in (2.0**-20, 2.0**20):
        one, two = kind.init(layout), kind.init(layout)
        for number in range(1, 7):
            grad, changes = gradient(shape, number), {"eps": 0.0} if averages_squares(kind) else {}
            small = step(kind, grad, one, layout, tick_at(number), **changes)
            large = step(kind, grad * factor, two, layout, tick_at(number), **changes)
            has_unit = not kind.averages_squares if isinstance(kind, Momentum) else bool(kind.keys)
            expected = small * factor if has_unit else small
            assert relative_error(large, expected) < 2e-5


def check_float64(kind: Kind, shape: Shape) -> None:
    """Parameters in float64 get float64 state and arithmetic: single precision only adds rounding."""
    if getattr(kind, "handover", None) == "keep":
        return  # the numbers depend on the signs of singular vectors, which no precision determines
    layout, wide = layout_of(shape), layout_of(shape, torch.float64)
    state, wide_state = kind.init(layout), kind.init(wide)
    assert all(value.dtype == torch.float64 for value in wide_state.values())
    result = steps(kind, _gradients(shape, 5), state, layout)
    expected = steps(kind, [grad.double() for grad in _gradients(shape, 5)], wide_state, wide)
    assert expected.dtype == torch.float64
    assert relative_error(result, expected) < 5e-5


def check_options_are_validated(kind: Kind, shape: Shape) -> None:
    for entry in fields(kind):
        bad = BAD_OPTION_VALUES.get(entry.name, [])
        bad = [*bad, "perhaps", 3] if isinstance(getattr(kind, entry.name), bool) else bad
        for value in (*bad, Nonsense()):
            with pytest.raises((ValueError, TypeError)) as info:
                replace(kind, **{entry.name: value})
            assert entry.name in str(info.value), f"{entry.name}={value!r}: the error does not name the option"
            assert repr(value) in str(info.value), f"{entry.name}={value!r}: the error does not name the value"


class Nonsense:
    """A value that no option can mean."""

    def __repr__(self) -> str:
        return "<nonsense>"


CHECKS: list[Callable[[Kind, Shape], None]] = [
    value for name, value in list(globals().items()) if name.startswith("check_") and callable(value)
]


def check_registry(registry: Any, keys_of_other_axis: dict[str, str]) -> None:
    """Names match, and no two kinds share a state key, on either axis: a checkpoint's keys tell the kind."""
    seen = dict(keys_of_other_axis)
    for name in registry.names():
        cls = registry.get(name)
        assert cls.name == name
        assert dataclasses.is_dataclass(cls)
        assert isinstance(cls.keys, tuple)
        for key in cls.keys:
            assert key not in seen, f"{name!r} and {seen[key]!r} both keep {key!r}"
            assert key != "step"
            seen[key] = name
        assert cls.__doc__, f"{label(cls)} has no docstring"
        assert inspect.isgeneratorfunction(cls.update), "update is a generator: `yield from ()` where it asks nothing"


def _gradients(shape: Shape, count: int, scale: float = 1.0) -> list[Tensor]:
    return [gradient(shape, seed, scale=scale) for seed in range(count)]


def _trained(kind: Kind, shape: Shape, count: int) -> tuple[Any, dict[str, Tensor]]:
    layout = layout_of(shape)
    state = kind.init(layout)
    steps(kind, _gradients(shape, count), state, layout)
    return layout, state


def _storage_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _waiting_tensors(task: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors in the local variables of a suspended generator and of those it delegates to."""
    found: list[tuple[str, Tensor]] = []

    def collect(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append((name, value))
        elif isinstance(value, Pending):
            collect(f"{name}.value", value.value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for entry in fields(value):
                collect(f"{name}.{entry.name}", getattr(value, entry.name))
        elif isinstance(value, dict):
            for key, part in value.items():
                collect(f"{name}[{key!r}]", part)
        elif isinstance(value, list | tuple):
            for position, part in enumerate(value):
                collect(f"{name}[{position}]", part)

    while task is not None and getattr(task, "gi_frame", None) is not None:
        for name, value in task.gi_frame.f_locals.items():
            collect(f"{task.gi_code.co_name}:{name}", value)
        task = task.gi_yieldfrom
    return found
