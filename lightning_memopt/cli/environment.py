"""What is installed on this machine, and what of the package works with it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from typing import Any, Literal

import torch

from lightning_memopt._version import __version__
from lightning_memopt.kernels import check as kernels

# Package, module, what needs it, and how it is installed.
PACKAGES = (
    ("torch", "torch", "everything", "torch"),
    ("lightning", "lightning.pytorch", "Trainer, strategy, fit", '"lightning-memopt[cli]"'),
    ("torchmetrics", "torchmetrics", "metrics, memory monitor", '"lightning-memopt[cli]"'),
    ("jsonargparse", "jsonargparse", "fit, plan --config", '"lightning-memopt[cli]"'),
    ("omegaconf", "omegaconf", "recipe files", '"lightning-memopt[cli]"'),
    ("rich", "rich", "plan, roles", '"lightning-memopt[cli]"'),
    ("matplotlib", "matplotlib", "figures, plan --sweep", "matplotlib"),
    ("transformers", "transformers", "plan --model config.json", "transformers"),
    ("safetensors", "safetensors", "export to safetensors", "safetensors"),
    ("triton", "triton", "kernels on CUDA devices", "triton"),
)

# What each extra enables, and its packages. The extra `dev` is for a checkout, where `make` installs it.
EXTRAS = {
    "cli": (
        "Trainer, Fabric, strategy, callbacks, metrics, all commands",
        ("lightning", "torchmetrics", "jsonargparse", "omegaconf", "rich"),
    ),
    "examples": (
        "examples/, figures, models of transformers",
        ("transformers", "accelerate", "tokenizers", "peft", "pillow", "tensorboard", "matplotlib"),
    ),
    "bench": (
        "other packages' optimizers in benchmarks/",
        ("galore-torch", "apollo-torch", "adam-mini", "torchao", "bitsandbytes"),
    ),
}


@dataclass(frozen=True)
class Package:
    """One package.

    Attributes:
        name: Its name.
        version: Its version; None if it is missing.
        needed_by: What needs it.
        install: What to give to pip to get it.
        problem: Why it cannot be used; empty if it can.
    """

    name: str
    version: str | None
    needed_by: str
    install: str
    problem: str


@dataclass(frozen=True)
class Extra:
    """One extra of this package.

    Attributes:
        name: Its name: ``pip install "lightning-memopt[name]"``.
        enables: What works with it.
        missing: Its packages that are not installed.
    """

    name: str
    enables: str
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: What was tried.
        state: ``works``, ``missing`` (something that it needs is not here), ``unused`` (of no use here), or ``fails``.
        detail: How, or why not.
    """

    name: str
    state: Literal["works", "missing", "unused", "fails"]
    detail: str


@dataclass(frozen=True)
class Environment:
    """What :func:`examine` found.

    Attributes:
        version: The version of this package.
        system: The machine, in words.
        packages: One entry for each of :data:`PACKAGES`.
        extras: One entry for each of :data:`EXTRAS`.
        devices: The CUDA devices, in words.
        backends: The backends of ``torch.distributed``.
        checks: What was tried.
    """

    version: str
    system: str
    packages: tuple[Package, ...]
    extras: tuple[Extra, ...]
    devices: tuple[str, ...]
    backends: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def to_install(self) -> list[str]:
        """What to give to pip to get all that is missing, and of use on this machine."""
        wanted = [entry for entry in self.packages if entry.problem and (entry.name != "triton" or self.devices)]
        return list(dict.fromkeys(entry.install for entry in wanted))


def examine() -> Environment:
    """Look at the machine, import the packages, and try an optimizer and FSDP2."""
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    packages = tuple(_package(*entry) for entry in PACKAGES)
    usable = {entry.name: not entry.problem for entry in packages}
    return Environment(__version__, system, packages, _extras(), _devices(), _backends(), tuple(_checks(usable)))


def _extras() -> tuple[Extra, ...]:
    return tuple(
        Extra(name, enables, tuple(package for package in packages if _version(package) is None))
        for name, (enables, packages) in EXTRAS.items()
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str, module: str, needed_by: str, install: str) -> Package:
    version = _version(name)
    if version is None:
        return Package(name, None, needed_by, install, "is missing")
    try:
        import_module(module)
    except Exception as error:  # of any type: a broken installation has its own
        return Package(name, version, needed_by, install, f"cannot be imported ({type(error).__name__}: {error})")
    return Package(name, version, needed_by, install, _wrong_version(name, version))


def _wrong_version(name: str, version: str) -> str:
    """Return which versions are needed, if this one will not do."""
    try:
        from packaging.requirements import Requirement

        needed = [Requirement(line) for line in metadata.requires("lightning-memopt") or ()]
    except (ImportError, metadata.PackageNotFoundError):
        return ""
    for entry in needed:
        if entry.name == name and not entry.specifier.contains(version, prereleases=True):
            return f"is not {entry.specifier}"
    return ""


def _devices() -> tuple[str, ...]:
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(f"{each.name}, {each.total_memory / 2**30:.0f} GiB" for each in found)


def _backends() -> tuple[str, ...]:
    if not torch.distributed.is_available():
        return ()
    names = ("gloo", "nccl", "mpi", "ucc", "xccl")
    return tuple(name for name in names if torch.distributed.is_backend_available(name))


def _checks(usable: dict[str, bool]) -> list[Check]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = usable["lightning"] and usable["torchmetrics"] and usable["jsonargparse"] and usable["omegaconf"]
    checks = [
        _try("optimizers", partial(_step, torch.nn.Linear(8, 8, device=device)), f"a step of AdaPMLean on {device}"),
        _try("FSDP2", partial(_sharded_step, device), f"the same, sharded over one process on {device}"),
        _needs("Trainer and strategy", usable["lightning"], "lightning_memopt.strategy"),
        _needs("fit, validate, test, predict", run, "lightning_memopt.cli.memopt_cli"),
        _needs("figures", usable["matplotlib"], "matplotlib.figure"),
    ]
    missing = kernels.missing(torch.device(device))
    if missing is not None:
        return [*checks, Check("kernels", "missing" if device == "cuda" else "unused", missing)]
    problem = kernels.failure(torch.device(device))
    detail = problem or f"they agree with PyTorch on {device}"
    return [*checks, Check("kernels", "fails" if problem else "works", detail)]


def _try(name: str, action: Callable[[], Any], detail: str) -> Check:
    try:
        action()
    except Exception as error:  # of any type: whatever is wrong with this machine
        return Check(name, "fails", f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Check(name, "works", detail)


def _needs(name: str, usable: bool, module: str) -> Check:
    if not usable:
        return Check(name, "missing", "a package is missing, see above")
    return _try(name, partial(import_module, module), f"{module} can be imported")


def _step(module: torch.nn.Module) -> None:
    from lightning_memopt.optim.classes import AdaPMLean

    optimizer = AdaPMLean(module.named_parameters(), lr=1e-3)
    device = next(module.parameters()).device
    module(torch.ones(2, 8, device=device)).square().mean().backward()
    optimizer.step()


def _sharded_step(device: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh(device, (1,))
        module = torch.nn.Linear(8, 8, device=device)
        fully_shard(module, mesh=mesh)
        _step(module)
    finally:
        dist.destroy_process_group()
