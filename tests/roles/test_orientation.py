"""The outputs of a weight are where ``output_dim`` says: what a module ignores or returns shows it.

Every module that holds a weight gets inputs whose first feature is zero, and the gradient of its last output is set to
zero. A weight then has no gradient for that input or for that output, in the dimension where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_memopt as lm
from lightning_memopt.sharding.layout import as_matrix
from tests.roles._cases import Case, forward, loss_of
from tests.roles._models import CASES
from tests.roles._truth import line_of, pattern

# An embedding has no input features, and the others no orientation that matters.
LEFT_OUT = {"embedding", "vector", "convolution", "other"}


def _is_features(value: Any, first: Tensor | None = None) -> bool:
    floats = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
    return floats and (first is None or value.shape[-1] == first.shape[-1])


def _without_first_feature(tensor: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(tensor[..., :1]), tensor[..., 1:]], dim=-1)


def _mask_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    values = {**dict(enumerate(args)), **kwargs}
    first = next((value for value in values.values() if _is_features(value)), None)
    masked = {
        key: _without_first_feature(value) if first is not None and _is_features(value, first) else value
        for key, value in values.items()
    }
    return tuple(masked[place] for place in range(len(args))), {key: masked[key] for key in kwargs}


def _mask_output_gradient(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    outputs = output if isinstance(output, tuple | list) else [output]
    first = next((value for value in outputs if _is_features(value) and value.requires_grad), None)
    if first is not None and first.shape[-1] > 1:
        first.register_hook(lambda gradient: torch.cat([gradient[..., :-1], 0 * gradient[..., -1:]], dim=-1))


@contextmanager
def hooked(modules: Mapping[str, nn.Module], *, before: Callable | None, after: Callable) -> Iterator[None]:
    handles = [module.register_forward_hook(after, with_kwargs=True) for module in modules.values()]
    if before is not None:
        handles += [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def users(case: Case, model: nn.Module, params: list[Tensor]) -> dict[str, nn.Module]:
    """Return the innermost modules that hold these weights and are called. Some use those of their children."""
    called, found = set(), {}
    everything, wanted = dict(model.named_modules()), {id(param) for param in params}
    with hooked(everything, before=None, after=lambda module, *rest: called.add(id(module))):
        forward(model, case.inputs())
    for name, param in model.named_parameters(remove_duplicate=False):
        path = name.rpartition(".")[0] if id(param) in wanted else ""
        while path and id(everything[path]) not in called:
            path = path.rpartition(".")[0]
        if path:
            found[path] = everything[path]
    return found


def shown(grad: Tensor, output_dim: int, flatten: bool) -> bool:
    """Return whether a gradient lacks the first input or the last output."""
    matrix = grad.reshape(as_matrix(tuple(grad.shape), flatten))
    return not (matrix.select(output_dim, -1).any() and matrix.select(-3 - output_dim, 0).any())


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_outputs_are_where_they_are_said_to_be(case):
    model = case.build()
    params = {
        name: param
        for name, param in model.named_parameters()
        if param.ndim > 1
        and line_of(case.lines, name, param.shape).answers[0].parts[0].role not in LEFT_OUT
        and not (case.unproven and pattern(case.unproven).fullmatch(name))
    }
    with hooked(users(case, model, list(params.values())), before=_mask_inputs, after=_mask_output_gradient):
        loss_of(forward(model, case.inputs())).backward()
    parts = lm.classify(model)
    trained = {name: param.grad for name, param in params.items() if param.grad is not None and param.grad.any()}
    assert len(trained) > len(params) / 2
    wrong = [
        f"{name} {list(grad.shape)}: not dimension {parts[name][0].output_dim}"
        for name, grad in trained.items()
        if not shown(grad, parts[name][0].output_dim, parts[name][0].flatten)
    ]
    assert not wrong, f"{len(wrong)} of {len(trained)} weights have other outputs:\n" + "\n".join(wrong)
