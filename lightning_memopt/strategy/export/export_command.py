"""The command ``lightning-memopt export``: a checkpoint in a format that others read."""

from __future__ import annotations

import argparse
import pickle
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.memory.sizes import format_bytes
from lightning_memopt.strategy.checkpoint.save import CURRENT
from lightning_memopt.strategy.export.contents import Contents, contents, opened
from lightning_memopt.strategy.export.transformers_model import model_of_config, model_of_module, with_weights
from lightning_memopt.strategy.export.weights import converted, with_all_bits, without_prefix
from lightning_memopt.strategy.export.writing import check_free, write_pickled, write_pretrained, write_safetensors
from lightning_memopt.strategy.files.places import place_of
from lightning_memopt.terminal.parser import EXPECTED, Parser

DTYPES = ("float32", "bfloat16", "float16")
_SAFETENSORS, _PICKLED, _CHECKPOINT = ".safetensors", ".pt", ".ckpt"
_EPILOG = (
    "Examples: lightning-memopt export last.ckpt weights.safetensors; lightning-memopt export last.ckpt one.ckpt "
    "--optimizer; lightning-memopt export last.ckpt folder --module my_module.MyModel"
)


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Args:
        args: The arguments after ``export`` on the command line.
    """
    parser = _parser()
    options = parser.parse_args(args)
    place = place_of(options.out)
    if not isinstance(place, Path):
        parser.error(f"{options.out!r} is a URL, and an export is written to local files: name a path, and copy it.")
    out = place
    _check(parser, options, out)
    try:
        check_free(out, force=options.force)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            written = _export(options, out)
    except (*EXPECTED, pickle.UnpicklingError) as error:
        parser.error(" ".join(str(error).split()))
    for warning in caught:
        print(f"Warning: {warning.message}", file=sys.stderr)
    print(written)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="lightning-memopt export",
        allow_abbrev=False,
        description="Write the weights of a checkpoint, or all of it, in a format that others read. Nothing in the "
        "checkpoint is run.",
        epilog=_EPILOG,
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="A checkpoint: a directory, a file, or a URL.")
    parser.add_argument(
        "out",
        metavar="OUT",
        help=f"A file that ends in {_SAFETENSORS} or {_PICKLED}, or a folder for transformers' from_pretrained.",
    )
    parser.add_argument(
        "--optimizer",
        action="store_true",
        help=f"Write everything as one checkpoint file, {_CHECKPOINT} or {_PICKLED}, which a Trainer on any strategy "
        "continues from.",
    )
    parser.add_argument("--strip", metavar="PREFIX", help="Write only weights with this prefix, without it: model.")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="Convert floating-point weights (default: as they are saved). float32 adds the bits that "
        "`master_weight_bits` keeps beside bfloat16 weights.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--module",
        metavar="CLASS",
        help="For a folder: import path of the LightningModule that holds the model. It is created from the "
        "hyperparameters in the checkpoint.",
    )
    source.add_argument(
        "--model-config", metavar="PATH", help="For a folder: the model's config.json, or the folder that holds it."
    )
    parser.add_argument("--force", action="store_true", help="Replace OUT if it exists.")
    return parser


def _check(parser: Parser, options: argparse.Namespace, out: Path) -> None:
    """Refuse options that do not go together."""
    if options.optimizer:
        if out.suffix not in (_CHECKPOINT, _PICKLED):
            parser.error(f"--optimizer writes a file that ends in {_CHECKPOINT} or {_PICKLED}, got {str(out)!r}.")
        given = [name for name in ("strip", "dtype", "module", "model_config") if getattr(options, name)]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} changes weights, and --optimizer writes them as they are.")
    elif out.suffix == _CHECKPOINT:
        parser.error(
            f"{str(out)!r}: a {_CHECKPOINT} file holds the optimizer, too. Add --optimizer, or name a file that ends "
            f"in {_SAFETENSORS} or {_PICKLED}."
        )
    elif out.suffix in (_SAFETENSORS, _PICKLED):
        if options.module or options.model_config:
            parser.error(f"--module and --model-config describe a folder, got the file {str(out)!r}.")
    elif options.module or options.model_config:
        if options.strip:
            parser.error("--strip has no effect on a folder, which gets the names of the model.")
    elif out.suffix and not out.is_dir():
        parser.error(
            f"{str(out)!r}: unknown format {out.suffix!r}. Name a file that ends in {_SAFETENSORS} or {_PICKLED}, or a "
            "folder."
        )
    else:
        parser.error(
            f"The folder {str(out)!r} needs the model's configuration: name the LightningModule's class with --module, "
            "or a config.json with --model-config."
        )


def _export(options: argparse.Namespace, out: Path) -> str:
    """Write the output, and return a line that says what was written."""
    path = options.checkpoint
    with opened(path, verify=True) as found:
        content = contents(found, verify=True)
    step = content.rest.get("global_step")
    source = f"{path}, step {step}" if isinstance(step, int) else path
    if options.optimizer:
        write_pickled(content.checkpoint(), out)
        states = len(content.optimizers)
        return f"{out}: {_sizes(content.weights)} and {states} optimizer state{'s' * (states != 1)}, from {source}"
    weights = content.weights
    if options.dtype == "float32" and CURRENT not in content.rest:  # averages have no bits in the optimizer
        weights = with_all_bits(weights, content.optimizers)
    weights = without_prefix(weights, options.strip) if options.strip else weights
    weights = converted(weights, getattr(torch, options.dtype) if options.dtype else None)
    if options.module or options.model_config:
        model = _model(options, content)
        write_pretrained(with_weights(model, weights), out)
        return f"{out}: {type(model).__name__}, {_sizes(model.state_dict())}, from {source}"
    write = write_safetensors if out.suffix == _SAFETENSORS else write_pickled
    write(weights, out)
    return f"{out}: {_sizes(weights)}, from {source}"


def _model(options: argparse.Namespace, content: Contents) -> Any:
    if options.model_config:
        return model_of_config(Path(options.model_config))
    return model_of_module(options.module, content.rest.get("hyper_parameters") or {})


def _sizes(weights: dict[str, Any]) -> str:
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    return f"{len(tensors)} weights, {format_bytes(sum(value.nbytes for value in tensors))}"
