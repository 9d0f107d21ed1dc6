"""Find the model to plan for: by name, from a transformers configuration, or a given module."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_memopt.planner.skeletons import model_names, skeleton


def find_model(model: str | os.PathLike[str] | nn.Module) -> tuple[str, nn.Module]:
    """Return the name and the module of a model. A module that was not passed in is on the meta device.

    Args:
        model: A name of :func:`~lightning_memopt.planner.skeletons.model_names`, the path of a transformers
            configuration (``config.json``) or of the folder that holds it, or a module.

    Raises:
        TypeError: If it is none of these.
        ValueError: If the name is unknown, or the file is not a model configuration.
        FileNotFoundError: If the file does not exist.
        ImportError: If a configuration is given and transformers is missing.
    """
    if isinstance(model, nn.Module):
        return type(model).__name__, model
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"`model` must be a name, the path of a transformers config file, or a module, got {model!r}.")
    text, path = os.fspath(model), Path(model)
    if isinstance(model, str) and text.lower() in model_names() and not (path / "config.json").exists():
        return text.lower(), skeleton(text)
    if path.exists() or path.suffix == ".json" or isinstance(model, os.PathLike) or os.sep in text:
        return _from_config(path)
    return text.lower(), skeleton(text)


def _from_config(path: Path) -> tuple[str, nn.Module]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"There is no model configuration {str(file)!r} (working directory: {os.getcwd()}).")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"Reading the model configuration {str(path)!r} needs transformers: pip install transformers."
        ) from error
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    try:
        entries = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not JSON ({error}): give the config.json of a model.") from error
    kind = entries.get("model_type") if isinstance(entries, dict) else None
    library = f"transformers {transformers.__version__}"
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{str(file)!r} has the `model_type` {kind!r}, which {library} does not know: give the config.json of a "
            "model whose code is in transformers, or plan for the module itself."
        )
    try:
        with torch.device("meta"):
            return name, _build(transformers.CONFIG_MAPPING[kind].from_dict(entries))
    except Exception as error:
        raise ValueError(
            f"{library} cannot create a model from {str(file)!r} ({' '.join(str(error).split())}): correct the file."
        ) from error


def _build(config: Any) -> nn.Module:
    """Return the architecture that a configuration names, or else its causal language model or its base model.

    The model is in float32: the dtype in which a checkpoint was saved does not determine that of a run.
    """
    import transformers

    names = config.architectures or ()
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)(config).float()
    language = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if language else transformers.AutoModel
    model = auto.from_config(config).float()
    if names:
        warnings.warn(
            f"transformers has no class {', '.join(names)}, which the configuration names as its architecture, so the "
            f"plan is for {type(model).__name__}. For a model with custom code, plan for the module itself.",
            stacklevel=2,
        )
    return model
