"""Find the model to plan for: by name, from a transformers configuration, or a given module."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
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
        raise FileNotFoundError(
            f"There is no model configuration {str(file)!r} (working directory: {os.getcwd()}).{_of_a_hub(path)}"
        )
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
    if not isinstance(entries, dict) or not isinstance(entries.get("model_type"), str):
        raise ValueError(
            f"{str(file)!r} has no `model_type`, so it is not the config.json of a transformers model.{_of(entries)} "
            "Give such a file, or plan for the module itself."
        )
    kind, library = entries["model_type"], f"transformers {transformers.__version__}"
    known = list(transformers.CONFIG_MAPPING.keys())
    if kind not in known:
        raise ValueError(
            f"{str(file)!r} has the `model_type` {kind!r}, which {library} does not know.{_nearest(kind, known)} Give "
            "the config.json of a model whose code is in transformers, or plan for the module itself."
        )
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(entries)
        build = _architecture(config, file)
        with torch.device("meta"):
            return name, build(config).float()
    except _WrongArchitecture:
        raise
    except Exception as error:
        raise ValueError(
            f"{library} cannot create a model from {str(file)!r} ({' '.join(str(error).split())}): correct the file."
        ) from error


class _WrongArchitecture(ValueError):
    """The configuration names a class that cannot be made from it."""


def _architecture(config: Any, file: Path) -> Callable[[Any], nn.Module]:
    """Return the class that a configuration names, or else its causal language model or its base model.

    The model will be in float32: the dtype in which a checkpoint was saved does not determine that of a run.
    """
    import transformers

    names = config.architectures or []
    if not names:
        language = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        return (transformers.AutoModelForCausalLM if language else transformers.AutoModel).from_config
    name = names if isinstance(names, str) else names[0]
    found: Any = getattr(transformers, name, None)
    if isinstance(getattr(found, "config_class", None), type) and isinstance(config, found.config_class):
        return found
    family = type(config).__name__.removesuffix("Config")
    own = [each for each in dir(transformers) if each.startswith(family)]
    what = "does not exist" if found is None else f"is no model with the `model_type` {config.model_type!r}"
    raise _WrongArchitecture(
        f"{str(file)!r} names the architecture {name!r}, which {what} in transformers.{_nearest(name, own)} Correct or "
        "remove `architectures`. For a model with code of its own, plan for the module itself."
    )


def _of_a_hub(path: Path) -> str:
    """Return the way out where a path looks like the name of a model on a hub."""
    if len(path.parts) != 2 or path.is_absolute() or path.suffix == ".json":
        return ""
    built_in = path.name.lower() in model_names()
    own = f" The built-in model is called {path.name.lower()!r}." if built_in else ""
    return f" Names of a hub are not looked up: download the model's config.json and give its path.{own}"


def _of(entries: Any) -> str:
    """Return the `model_type` of the class that a configuration names, if it names one."""
    import transformers

    names = entries.get("architectures") if isinstance(entries, dict) else None
    found = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    kind = getattr(getattr(found, "config_class", None), "model_type", None)
    return f" That of {names[0]} is {kind!r}." if names and kind else ""


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
