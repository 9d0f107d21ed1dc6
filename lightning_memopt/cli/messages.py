"""Turn what the parser says about a mistake into one line with what was wrong and what to do.

The parser lists every type that a value could have had, with a reason for each. One of them is what was meant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module

from jsonargparse import ArgumentParser

from lightning_memopt._registry import listed, unknown
from lightning_memopt.cli.class_paths import unknown_class, why_not
from lightning_memopt.cli.commands import COMMANDS
from lightning_memopt.cli.module_folders import OPTIONS

LONGEST = 400
FILES = (".yaml", ".yml", ".json")
_KEY = re.compile(r'Parser key "([^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*(.*)")
_NAME = re.compile(r"Expected a dot import path string: (\w+)$", re.MULTILINE)
_TYPE = re.compile(r"Expected a <class '([\w.]+)'>")
_VALUE = re.compile(r"(?:Got value|Given value): (.*)")
_OPTION = re.compile(r"(?:Option|option) '([^']+)' is not accepted")
_REQUIRED = re.compile(r"arguments are required: ([\w., ]+)")
# Options under their names in other libraries, which are too far from ours to be found by spelling.
_ELSEWHERE = {"learning_rate": "lr", "beta1": "betas", "beta2": "betas", "epsilon": "eps", "update_proj_gap": "gap"}
_INTERPOLATION = "Interpolations need `--parser_mode omegaconf` before --config, or `omegaconf+` to follow overrides."


def explain(message: str, args: Sequence[str], options: Sequence[str]) -> str:
    """Return a parser's message as one line.

    Args:
        message: What the parser says.
        args: The command line.
        options: The names of the parser's options.
    """
    for reading in (_about_command, _about_option, _about_required, _about_value):
        if found := reading(message, args, options):
            return found
    line = " ".join(_KEY.sub(lambda match: f"--{match[1]}:", message).split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"


def _about_command(message: str, args: Sequence[str], options: Sequence[str]) -> str | None:
    if match := re.search(r"argument subcommand: invalid choice: '([^']+)'", message):
        return unknown("command", match[1], list(COMMANDS))
    if match := re.search(r"Option '([^']+)' is not accepted before subcommand '([^']+)'", message):
        return f"{match[1]} belongs to {match[2]}: put --config, and options, after `{match[2]}`."
    return None


def _about_option(message: str, args: Sequence[str], options: Sequence[str]) -> str | None:
    if match := re.search(r"Subcommand '\w+' does not accept option '([^']+)'", message):
        return unknown_option(match[1], options)
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        if match[1].endswith(FILES):
            return f"{match[1]} looks like a config: put --config before it."
        return unknown_option(match[1].partition("=")[0].removeprefix("--"), options)
    for path, detail in _CLASS.findall(message):
        if match := _OPTION.search(detail):
            return unknown_argument(path, match[1])
    return None


def unknown_argument(path: str, name: str) -> str:
    """Return that a class takes no such argument, and the one that may be meant."""
    known = arguments_of(path)
    other = _ELSEWHERE.get(name)
    if other in known:
        return f"Unknown option of {path} {name!r}: it is {other!r} here. Available: {listed(known, 30)}."
    return unknown(f"option of {path}", name, known)


def unknown_option(name: str, options: Sequence[str]) -> str:
    """Return that there is no such option, and the nearest one."""
    said = unknown("option", name, list(options)).partition(" Available:")[0]
    return f"{said} --help lists all."


def _about_required(message: str, args: Sequence[str], options: Sequence[str]) -> str | None:
    for path, detail in _CLASS.findall(message):
        if match := _REQUIRED.search(detail):
            option = f"--{_keys(message)}.{match[1].partition(',')[0].strip()}=VALUE"
            return f"{path} needs {match[1].strip()}: add {option}, or set it in the config."
    match = _REQUIRED.search(message)
    if not match:
        return None
    section = match[1].strip().rpartition(".")[2]
    if not any(arg.partition("=")[0] in OPTIONS for arg in args):
        return f"There is no {section}: add --config FILE, or name the class with --{section}=package.module.Class."
    return f"The config has no `{section}:`: add it, or name the class with --{section}=package.module.Class."


def _about_value(message: str, args: Sequence[str], options: Sequence[str]) -> str | None:
    keys = _keys(message)
    if not keys:
        return None
    for path, detail in _CLASS.findall(message):
        if re.search(r"has no attribute|No module named|cannot import name", detail):
            return f"--{keys} {path}: {why_not(path) or detail}"
    inner = message[list(_KEY.finditer(message))[-1].end() :]
    types = [name for name in _TYPE.findall(inner) if name != "NoneType"]
    values = _VALUE.findall(inner)
    if (name := _NAME.search(inner)) and not types:
        return f"--{keys}: {unknown_class(name[1])}"
    if not values:
        return None
    value = values[0].strip()
    hint = f" {_INTERPOLATION}" if "${" in value else ""
    if types:
        return f"--{keys} must be {' or '.join(dict.fromkeys(types))}, got {value!r}.{hint}"
    return f"--{keys} {value!r} is not accepted.{hint}" if hint else None


def _keys(message: str) -> str:
    """Return the key of the value that is wrong, with those of the classes that it is an argument of."""
    return ".".join(_KEY.findall(message))


def arguments_of(path: str) -> list[str]:
    """Return the names that a class of the config takes, without what the program passes itself."""
    module, _, name = path.rpartition(".")
    found = ArgumentParser().add_class_arguments(getattr(import_module(module), name), fail_untyped=False)
    return [name for name in found if name not in ("params", "optimizer")]
