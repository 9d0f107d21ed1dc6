"""Decides the role of every weight of a model: by its module, its name, and its shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from lightning_memopt.plans.roles.fused import EXCEPTIONS, FUSED
from lightning_memopt.plans.roles.modules import NOTHING, Facts, facts_of
from lightning_memopt.plans.roles.names import Place, canonical_names, place
from lightning_memopt.plans.roles.orientation import Outlook, outlook
from lightning_memopt.plans.roles.part import Part
from lightning_memopt.plans.roles.schemes import NAMING_SCHEMES, NamingScheme, first_fit, outputs, with_heads
from lightning_memopt.plans.roles.words import is_learned, role_of

# A three-dimensional weight of unknown role and module is a 1-D convolution if its last dimension is below this.
MAX_KERNEL = 16
Shape = tuple[int, ...]


def classify(model: Any, *, head_dim: int | None = None) -> dict[str, tuple[Part, ...]]:
    """Return the parts of every parameter, by canonical name.

    In this order of trust: a registered naming scheme; what only one class of modules does; the module that holds the
    weight, if it is an embedding, a norm or a convolution; the last word of the name, with the attention layer or MLP
    that contains it. A matrix in a linear layer of unknown part is ``linear``, any other unknown one ``other``.
    Low-rank adapters are ``lora``. Parameters whose sizes are 1 but for one are ``vector``, unless they are
    embeddings or heads.

    Args:
        model: A module, whose classes, attention layers and configuration also count, or pairs of name and shape.
        head_dim: Outputs per attention head, in place of what the model says.

    Raises:
        TypeError: If ``model`` is neither.
        ValueError: If ``head_dim`` does not divide the outputs of a query or key weight.
    """
    facts: Mapping[str, Facts] = {}
    if hasattr(model, "named_parameters"):
        facts = facts_of(model)
        model = ((name, tuple(param.shape)) for name, param in model.named_parameters())
    pairs = list(model)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)) or hasattr(pair[1], "shape"):
            raise TypeError("`model` must be a module, or pairs of name and shape: pass the module itself.")
    names = canonical_names(name for name, _ in pairs)
    entries = tuple(
        (name, tuple(shape), facts.get(name, NOTHING)) for name, (_, shape) in zip(names, pairs, strict=True)
    )
    return dict(_classified(entries, tuple(map(NAMING_SCHEMES.get, NAMING_SCHEMES.names())), head_dim))


def names_without_role(model: Any) -> list[str]:
    """Return the canonical names of a module's matrices whose role is ``other``."""
    return [name for name, parts in classify(model).items() if any(part.role == "other" for part in parts)]


@lru_cache(maxsize=16)
def _classified(
    entries: tuple[tuple[str, Shape, Facts], ...], schemes: tuple[NamingScheme, ...], head_dim: int | None
) -> Mapping[str, tuple[Part, ...]]:
    """Return the parts of every parameter. An optimizer asks several times, and a plan once per recipe."""
    view = outlook({name: shape for name, shape, _ in entries})
    ranked = _by_coverage(entries, schemes)
    found = {}
    for name, shape, facts in entries:
        found[name] = _parts(name, shape, facts, ranked, view, head_dim)
        _check_heads(found[name], name, shape, head_dim)
    return found


def _by_coverage(entries: Iterable[tuple[str, Shape, Facts]], schemes: Iterable[NamingScheme]) -> list[NamingScheme]:
    """Sort the schemes by the number of matrices that each one matches. Registration order breaks ties."""
    matrices = [(name, shape, facts.modules, dict(facts.numbers)) for name, shape, facts in entries if len(shape) > 1]
    return sorted(schemes, key=lambda scheme: -sum(isinstance(scheme.parts(*matrix), tuple) for matrix in matrices))


def _parts(
    name: str, shape: Shape, facts: Facts, schemes: Iterable[NamingScheme], view: Outlook, head_dim: int | None
) -> tuple[Part, ...]:
    if len(shape) < 2:
        return (Part("vector", why="one dimension"),)
    at = place(name)
    convolution = _is_convolution(at, shape, facts)
    flatten = convolution and len(shape) == 3
    if at.adapter and sum(size > 1 for size in shape) > 1:
        return (Part("lora", flatten=flatten, why=f"word {at.adapter}"),)
    numbers = _numbers(shape, facts, head_dim)
    bare = ".".join(at.path)
    found = _by_schemes(schemes, name, shape, facts, numbers) or first_fit(
        EXCEPTIONS, bare, shape, facts.modules, numbers
    )
    role, why = role_of(at)
    if found is None:
        decided = _by_module(role, why, at, shape, facts, convolution)
        if decided is not None:
            return (Part(decided[0], flatten=flatten and decided[0] != "vector", why=decided[1]),)
        if at.container not in ("linear", "router"):
            # Equal parts are a guess, which the numbers of a model replace. GPT-2's columns are no guess.
            told = {"heads", "kv_heads", "head_dim"} <= numbers.keys()
            rules = [rule for rule in FUSED if not (told and rule.sizes is None and rule.fused_dim == 0)]
            found = first_fit(rules, bare, shape, facts.modules, numbers, f"word {at.word}")
    if isinstance(found, tuple):
        return found
    if role == "head" and at.numbered and view.is_followed(name):
        role = ""  # only the last layer of a classifier is the head
    if found is not None or not role:
        linear = facts.sort in ("linear", "transposed") and len(shape) == 2
        role, why = ("linear", f"module {facts.module}") if linear else ("other", f"unknown word {at.word}")
        why = found or why
    output_dim = view.output_dim(name, at, shape, facts.sort)
    return (with_heads(Part(role, output_dim=output_dim, why=why), shape, numbers, numbers.get("head_dim")),)


def _by_schemes(
    schemes: Iterable[NamingScheme], name: str, shape: Shape, facts: Facts, numbers: Mapping[str, int]
) -> tuple[Part, ...] | str | None:
    """Return the parts by the first scheme that fits, or else why a weight cannot be split, or None."""
    refusal = None
    for scheme in schemes:
        found = scheme.parts(name, shape, facts.modules, numbers)
        if isinstance(found, tuple):
            return found
        refusal = refusal or found
    return refusal


def _by_module(role: str, why: str, at: Place, shape: Shape, facts: Facts, convolution: bool) -> tuple[str, str] | None:
    """Return the role that the module or the shape decides, and why; None if the role of the name does."""
    if facts.sort == "embedding":
        return "embedding", f"module {facts.module}"
    if sum(size != 1 for size in shape) < 2 and role not in ("embedding", "head"):
        return "vector", "shape"
    if facts.sort == "norm":
        return "vector", f"module {facts.module}"
    if convolution:
        pointwise = all(size == 1 for size in shape[2:])
        patches = role == "embedding" and (len(shape) > 3 or "patch" in f"{at.parent} {at.word}")
        if patches or (role == "mlp" and at.container == "mlp" and pointwise):
            return role, why
        return "convolution", f"module {facts.module}" if facts.module else "shape"
    if facts.sort == "" and role != "embedding":
        if at.vector:
            return "vector", f"word {at.word}"
        if at.raw and not role and is_learned(at):
            return "embedding", f"word {at.word}"
    return None


def _is_convolution(at: Place, shape: Shape, facts: Facts) -> bool:
    """Return whether a weight is a kernel: by its module, or by its name and shape where no module is known."""
    if facts.module:
        return facts.sort == "convolution"
    if at.raw or len(shape) < 3:
        return False
    named = "conv" in at.word.lower()
    known = bool(role_of(at)[0]) and shape[-1] > 1
    return len(shape) > 3 or named or (shape[-1] < MAX_KERNEL and not known)


def _numbers(shape: Shape, facts: Facts, head_dim: int | None) -> Mapping[str, int]:
    """Return the numbers of the attention layer around a weight, with the user's size of a head if given."""
    numbers = dict(facts.numbers)
    if head_dim is not None:
        numbers["head_dim"] = head_dim
        if "heads" not in numbers and shape[-1] % head_dim == 0:
            numbers["heads"] = numbers["kv_heads"] = shape[-1] // head_dim  # as many as the input has
    return numbers


def _check_heads(parts: Iterable[Part], name: str, shape: Shape, head_dim: int | None) -> None:
    """Refuse a size of a head that divides no outputs."""
    for part in parts:
        if head_dim is not None and part.role in ("query", "key") and part.head_dim is None:
            raise ValueError(
                f"`head_dim` {head_dim} does not divide the {outputs(part, shape)} outputs of {name!r} (shape {shape})."
            )
