"""The outputs of a weight are where ``output_dim`` says: what a module ignores or returns shows it.

Every module that holds a weight gets inputs of which one feature is zero, and the gradient of one of its outputs is set
to zero. A weight then has no gradient for that input or for that output, in the dimension where they are. These zeros
are exact. Modules leave out different features, so that a zero is not that of a neighbor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_memopt as lm
from lightning_memopt.sharding.layout import as_matrix
from tests.roles._cases import Case, forward, loss_of
from tests.roles._models import CASES
from tests.roles._truth import line_of, pattern

pytestmark = pytest.mark.slow

# An embedding has no input features, and the others no orientation that matters.
LEFT_OUT = {"embedding", "vector", "convolution", "other"}


def input_feature(number: int, size: int) -> int:
    return number % size


def output_feature(number: int, size: int) -> int:
    return (3 * number + 1) % size


def _is_features(value: Any, size: int | None = None) -> bool:
    found = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 and value.shape[-1] > 1
    return found and (size is None or value.shape[-1] == size)


def _without(tensor: Tensor, feature: int) -> Tensor:
    kept = torch.ones(tensor.shape[-1], dtype=torch.bool)
    kept[feature] = False
    return torch.where(kept, tensor, 0)


def _mask_inputs(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    values = {**dict(enumerate(args)), **kwargs}
    size = next((value.shape[-1] for value in values.values() if _is_features(value)), 0)
    masked = {
        key: _without(value, input_feature(number, size)) if _is_features(value, size) else value
        for key, value in values.items()
    }
    return tuple(masked[place] for place in range(len(args))), {key: masked[key] for key in kwargs}


def _mask_output(number: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    outputs = output if isinstance(output, tuple | list) else [output]
    first = next((value for value in outputs if _is_features(value) and value.requires_grad), None)
    if first is not None:
        first.register_hook(partial(_without, feature=output_feature(number, first.shape[-1])))


@contextmanager
def hooked(numbers: Mapping[nn.Module, int], before: Callable | None, after: Callable) -> Iterator[None]:
    """Register hooks on modules, which get the module's number first."""
    handles = []
    for module, number in numbers.items():
        handles.append(module.register_forward_hook(partial(after, number), with_kwargs=True))
        if before is not None:
            handles.append(module.register_forward_pre_hook(partial(before, number), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def users(case: Case, model: nn.Module, params: Mapping[Tensor, str]) -> tuple[dict[nn.Module, int], dict[str, int]]:
    """Number the innermost modules that hold these weights and are called, and the weights after their modules.

    Some modules use the weights of their children. Modules that share weights have the same number.
    """
    called: set[nn.Module] = set()
    modules = dict(model.named_modules())
    with hooked(dict.fromkeys(modules.values(), 0), None, lambda number, module, *rest: called.add(module)):
        forward(model, case.inputs())
    ranked = {param: number for number, param in enumerate(params)}
    numbers: dict[nn.Module, int] = {}
    weights: dict[str, int] = {}
    for path, param in model.named_parameters(remove_duplicate=False):
        if param not in params:
            continue
        while path and modules[path := path.rpartition(".")[0]] not in called:
            pass
        number = numbers.setdefault(modules[path], weights.get(params[param], ranked[param]))
        weights[params[param]] = number
    return numbers, weights


def shown(matrix: Tensor, output_dim: int, number: int) -> bool:
    """Return whether a gradient lacks the module's input or output, in the dimensions where they should be."""
    input_dim = -3 - output_dim
    at_input = matrix.select(input_dim, input_feature(number, matrix.shape[input_dim]))
    at_output = matrix.select(output_dim, output_feature(number, matrix.shape[output_dim]))
    return not (at_input.any() and at_output.any())


def check_orientation(case: Case) -> None:
    model = case.build()
    params = {
        param: name
        for name, param in model.named_parameters()
        if param.ndim > 1
        and line_of(case.lines, name, param.shape).answers[0].parts[0].role not in LEFT_OUT
        and not (case.unproven and pattern(case.unproven).fullmatch(name))
    }
    modules, numbers = users(case, model, params)
    with hooked(modules, _mask_inputs, _mask_output):
        loss_of(forward(model, case.inputs())).backward()
    found = lm.classify(model)
    trained = {name: param.grad for param, name in params.items() if param.grad is not None and param.grad.any()}
    assert len(trained) > len(params) / 2
    wrong = []
    for name, grad in trained.items():
        part = found[name][0]
        matrix = grad.reshape(as_matrix(tuple(grad.shape), part.flatten))
        if not shown(matrix, part.output_dim, numbers[name]):
            wrong.append(f"{name} {list(grad.shape)}: not dimension {part.output_dim}")
    assert not wrong, f"{len(wrong)} of {len(trained)} weights have other outputs:\n" + "\n".join(wrong)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_outputs_are_where_they_are_said_to_be(case):
    check_orientation(case)
