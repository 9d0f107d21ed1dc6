"""The transformers model inside a LightningModule, with the weights of a checkpoint."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_memopt.strategy.export.weights import without_prefix

_WAY_OUT = "Give the model's configuration with --model-config, the file or folder of a transformers config.json."


def model_of_config(path: Path) -> Any:
    """Return the model that a transformers configuration describes, on the meta device.

    Args:
        path: A ``config.json``, or the folder that holds it.

    Raises:
        ImportError: If transformers is not installed.
        OSError: If it cannot be read.
        ValueError: If it is not the configuration of a model of transformers.
    """
    transformers = _transformers()
    file = path / "config.json" if path.is_dir() else path
    entries = json.loads(file.read_text())
    kind, name = (entries.get("model_type"), (entries.get("architectures") or [None])[0]) if entries else (None, None)
    cls: Any = getattr(transformers, str(name), None)
    if kind not in transformers.CONFIG_MAPPING or cls is None or not issubclass(cls, transformers.PreTrainedModel):
        raise ValueError(
            f"{str(file)!r} has the `model_type` {kind!r} and the architecture {name!r}, which transformers "
            f"{transformers.__version__} does not know: give the config.json of a model whose code is in transformers."
        )
    with torch.device("meta"):
        return cls(transformers.CONFIG_MAPPING[kind].from_dict(entries))


def model_of_module(path: str, hyperparameters: Mapping[str, Any]) -> Any:
    """Return the model inside a LightningModule, which is created on the meta device.

    Args:
        path: The import path of the LightningModule's class.
        hyperparameters: What the checkpoint holds of its arguments.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the class cannot be imported or created, or holds no model of transformers, or several.
    """
    transformers = _transformers()
    module, _, name = path.rpartition(".")
    # A console script searches its own folder instead. The end of the list, so that nothing is shadowed.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--module {path} cannot be imported ({error}): give the full path of a class, such as my_module.MyModel."
        ) from error
    try:
        known = inspect.signature(cls).parameters
        with torch.device("meta"):
            made = cls(**{key: value for key, value in hyperparameters.items() if key in known})
    except Exception as error:
        raise ValueError(
            f"{path} could not be created on the meta device from the hyperparameters in the checkpoint "
            f"({type(error).__name__}: {error}). {_WAY_OUT}"
        ) from error
    models = [each for each in made.modules() if isinstance(each, transformers.PreTrainedModel)]
    inside = {part for model in models for part in model.modules() if part is not model}
    outer = [model for model in models if model not in inside]
    if len(outer) != 1:
        raise ValueError(f"{path} holds {len(outer)} models of transformers, and one folder holds one. {_WAY_OUT}")
    return outer[0]


def with_weights(model: Any, weights: Mapping[str, Any]) -> Any:
    """Put weights into a model on the meta device, in their own dtype.

    Args:
        model: A model of transformers.
        weights: The weights of a module that holds the model under any name.

    Raises:
        ValueError: If they are not the model's, or those of several such models.
    """
    names = list(model.state_dict())
    prefixes = [
        name.removesuffix(names[0])
        for name in weights
        if name.endswith(names[0]) and name.removesuffix(names[0])[-1:] in ("", ".")
    ]
    found = {prefix: sum(prefix + name in weights for name in names) for prefix in prefixes}
    best = [prefix for prefix, count in found.items() if count == max(found.values())]
    if len(best) > 1:
        raise ValueError(
            f"The checkpoint holds {len(best)} models with the weights of {type(model).__name__}: "
            f"{', '.join(map(repr, best))}. Export the weights of one with `--strip {best[0]}` to a .safetensors file."
        )
    prefix = best[0] if best else ""
    try:
        model.load_state_dict(without_prefix(weights, prefix), assign=True)
    except RuntimeError as error:
        raise ValueError(f"The weights of the checkpoint are not those of {type(model).__name__}: {error}") from error
    model.tie_weights()  # each name has got a tensor of its own
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"A folder needs transformers ({error}): pip install transformers. Or name a file that ends in "
            ".safetensors or .pt."
        ) from error
    return transformers
