"""Naming schemes: rules, as data, for the weights of one family of models."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lightning_memopt._registry import Registry, unknown
from lightning_memopt.plans.roles.part import ROLES, Part
from lightning_memopt.sharding.slot import Slot

# Numbers of the attention layer around a weight, which sizes may refer to.
NUMBERS = ("heads", "kv_heads", "head_dim", "qk_nope_head_dim", "v_head_dim")
Numbers = Mapping[str, int]
Size = int | str
_TOKENS = re.compile(r"\w+|[*/]")
_FACTOR = rf"({'|'.join(NUMBERS)}|\d+)"
_SIZE = re.compile(rf"^\s*{_FACTOR}(\s*[*/]\s*{_FACTOR})*\s*$")


@dataclass(frozen=True)
class Rule:
    """One line of a naming scheme.

    A size is a number, or a product or quotient of the model's own: ``heads``, ``kv_heads``, ``head_dim``,
    ``qk_nope_head_dim``, ``v_head_dim``, as in ``"heads / kv_heads * head_dim"``. They come from the attention layer or
    the configuration of a model.

    A fused weight is not split unless its sizes add up. It is ``other`` then, or ``linear`` in a linear layer, and
    ``Part.why`` tells the reason.

    Example:
        The fused weights that public models have, with ``QKV = ("query", "key", "value")``::

            stacked = Rule("qkv", QKV, fused_dim=0)
            keys = "kv_heads * head_dim"
            with_few_keys = Rule("qkv", QKV, fused_dim=0, sizes=("heads * head_dim", keys, keys))
            per_head = Rule("qkv", QKV, fused_dim=0, sizes=("head_dim",) * 3, repeat="heads")
            group = ("heads / kv_heads * head_dim", "head_dim", "head_dim")
            per_group = Rule("qkv", QKV, fused_dim=0, sizes=group, repeat="kv_heads")
            in_four_stripes = Rule("qkv", QKV, fused_dim=0, repeat=4)

    Attributes:
        pattern: A regular expression, searched in the canonical name.
        roles: The role of the weight. A fused weight has several, in their order along ``fused_dim``.
        fused_dim: The dimension along which a fused weight is split.
        output_dim: The dimension of the outputs: ``-2`` as in ``torch.nn.Linear``, ``-1`` for transposed weights.
        sizes: The size of each role's part; None for equal parts of a weight that is as many squares as roles.
        repeat: How often the parts follow each other.
        head_dim: Outputs per head of queries and keys.
        flatten: Whether a three-dimensional weight is one matrix, its trailing dimensions flattened.
        module: A regular expression for the class of a module around the weight. The rule then applies to models only,
            not to bare names.
    """

    pattern: str
    roles: tuple[str, ...]
    fused_dim: int | None = None
    output_dim: int = -2
    sizes: tuple[Size, ...] | None = None
    repeat: Size = 1
    head_dim: Size = "head_dim"
    flatten: bool = False
    module: str | None = None

    def matches(self, name: str, modules: tuple[str, ...] = ()) -> bool:
        """Return whether the rule is for this parameter, inside modules of these classes."""
        if not re.search(self.pattern, name):
            return False
        return self.module is None or any(re.fullmatch(self.module, each) for each in modules)

    def parts(self, shape: tuple[int, ...], numbers: Numbers, why: str) -> tuple[Part, ...] | str:
        """Return the parts of a parameter, or why it cannot be split."""
        flatten = self.flatten and len(shape) == 3
        slots: tuple[Slot | None, ...] = (None,)
        if self.fused_dim is not None:
            found = self.slots(shape, numbers)
            if isinstance(found, str):
                return found
            slots = found
        size = value(self.head_dim, numbers)
        return tuple(
            with_heads(Part(role, slot, self.output_dim, flatten=flatten, why=why), shape, numbers, size)
            for role, slot in zip(self.roles, slots, strict=True)
        )

    def slots(self, shape: tuple[int, ...], numbers: Numbers) -> tuple[Slot, ...] | str:
        """Return the place of every role's part, or why the weight cannot be split."""
        assert self.fused_dim is not None
        if len(shape) != 2:
            return f"not split: {len(shape)} dimensions"
        dim, count = self.fused_dim % 2, len(self.roles)
        length, other = shape[dim], shape[1 - dim]
        lines = "columns" if dim else "rows"
        wanted = (self.repeat, *(self.sizes or ()))
        missing = {name for size in wanted for name in _names(size)} - numbers.keys()
        if missing:
            return f"not split: {', '.join(sorted(missing))} unknown"
        found = [value(size, numbers) for size in wanted]
        whole = [number for number in found if number]
        if len(whole) < len(found):
            return f"not split: {wanted[found.index(None)]} is no whole number"
        repeat, *sizes = whole
        if self.sizes is None:
            if length != count * other or other % repeat:
                return f"not split: {length} {lines} are not {count} × {other}"
            sizes = [other // repeat] * count
        if repeat * sum(sizes) != length:
            times = f"{repeat} × ({' + '.join(map(str, sizes))})" if repeat > 1 else " + ".join(map(str, sizes))
            return f"not split: {length} {lines} are not {times}"
        period = sum(sizes) if repeat > 1 else None
        return tuple(Slot(dim, sum(sizes[:at]), size, period) for at, size in enumerate(sizes))


@dataclass(frozen=True)
class NamingScheme:
    """The names that one family of models gives its weights. The first rule that fits decides."""

    name: str
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.rules, tuple | list) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise TypeError(f"In naming scheme {self.name!r}: `rules` must be a tuple of `Rule`, got {self.rules!r}.")
        if not self.rules:
            raise ValueError(f"In naming scheme {self.name!r}: there are no rules.")
        for rule in self.rules:
            _check(rule, f"In naming scheme {self.name!r}: ")

    def __hash__(self) -> int:
        return hash(self.name)  # rules may be a list

    def parts(
        self, name: str, shape: tuple[int, ...], modules: tuple[str, ...], numbers: Numbers
    ) -> tuple[Part, ...] | str | None:
        """Return the parts of a parameter, why it cannot be split, or None if no rule is for it."""
        return first_fit(self.rules, name, shape, modules, numbers, f"scheme {self.name}")


NAMING_SCHEMES: Registry[NamingScheme] = Registry("naming scheme")


def register_naming_scheme(scheme: NamingScheme) -> NamingScheme:
    """Add a model family. For every model, its rules then take precedence over the built-in words.

    Registering an equal scheme again changes nothing.

    Raises:
        TypeError: If it is no scheme.
        ValueError: If another scheme has the name.
    """
    if not isinstance(scheme, NamingScheme):
        raise TypeError(f"`scheme` must be a `NamingScheme`, got {scheme!r}.")
    if scheme.name in NAMING_SCHEMES and NAMING_SCHEMES.get(scheme.name) == scheme:
        return scheme
    return NAMING_SCHEMES.register(scheme.name)(scheme)


def first_fit(
    rules: Iterable[Rule],
    name: str,
    shape: tuple[int, ...],
    modules: tuple[str, ...],
    numbers: Numbers,
    why: str | None = None,
) -> tuple[Part, ...] | str | None:
    """Return the parts by the first rule that fits, or else why the weight cannot be split, or None without a rule."""
    refusals = []
    for rule in rules:
        if rule.matches(name, modules):
            found = rule.parts(shape, numbers, why or _why(rule, name, modules))
            if not isinstance(found, str):
                return found
            refusals.append(found)
    return min(refusals, key=lambda reason: reason.endswith("unknown"), default=None)  # numbers tell more


def with_heads(part: Part, shape: tuple[int, ...], numbers: Numbers, size: int | None) -> Part:
    """Return the part of a query or key with the outputs per head: ``size``, or by the number of heads."""
    if part.role not in ("query", "key"):
        return part
    rows = outputs(part, shape)
    heads = numbers.get("heads" if part.role == "query" else "kv_heads")
    if size is None and heads and rows % heads == 0:
        size = rows // heads
    return replace(part, head_dim=size) if size and rows % size == 0 else part


def outputs(part: Part, shape: tuple[int, ...]) -> int:
    """Return the number of outputs of a part."""
    if part.slot is not None:
        return part.slot.count(shape[part.slot.dim])
    matrix = (shape[0], math.prod(shape[1:])) if part.flatten or len(shape) > 3 else shape
    return matrix[part.output_dim]


def value(size: Size, numbers: Numbers) -> int | None:
    """Return a size as a number, or None if it refers to one that is unknown or is no whole number."""
    if isinstance(size, int):
        return size
    found, operation = 1, "*"
    for token in _TOKENS.findall(size):
        if token in "*/":
            operation = token
            continue
        number = int(token) if token.isdigit() else numbers.get(token)
        if not number or (operation == "/" and found % number):
            return None
        found = found * number if operation == "*" else found // number
    return found


def _why(rule: Rule, name: str, modules: tuple[str, ...]) -> str:
    if rule.module is None:
        return f"word {'.'.join(name.split('.')[-2:])}"
    return f"class {next(each for each in modules if re.fullmatch(rule.module, each))}"


def _names(size: Size) -> list[str]:
    return [token for token in _TOKENS.findall(str(size)) if token[0].isalpha()]


def _check(rule: Rule, where: str) -> None:
    """Refuse a rule that can fit no weight."""
    try:
        for pattern in filter(None, (rule.pattern, rule.module)):
            re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}{pattern!r} is not a regular expression: {error}.") from error
    if isinstance(rule.roles, str):
        raise TypeError(f"{where}the rule {rule.pattern!r} has the roles {rule.roles!r}: give a tuple of roles.")
    if len(set(rule.roles)) < len(rule.roles):
        raise ValueError(f"{where}the rule {rule.pattern!r} has a role twice: {rule.roles}. State is kept by role.")
    if rule.output_dim not in (-2, -1) or rule.fused_dim not in (None, 0, 1, -2, -1):
        raise ValueError(
            f"{where}the rule {rule.pattern!r} has `output_dim` {rule.output_dim} and `fused_dim` {rule.fused_dim}: "
            "outputs are in dimension -2, or -1 if transposed; a fused weight has the dimensions 0 and 1."
        )
    for role in rule.roles:
        if role not in ROLES:
            raise ValueError(where + unknown("role", role, list(ROLES)))
    fused = f"{where}the rule {rule.pattern!r} has {len(rule.roles)} roles"
    if (rule.fused_dim is None) != (len(rule.roles) == 1):
        raise ValueError(
            f"{fused} and `fused_dim` {rule.fused_dim}; a fused weight needs both several roles and a dimension."
        )
    if rule.fused_dim is None and (rule.sizes is not None or rule.repeat != 1):
        raise ValueError(f"{fused} and `sizes` or `repeat`, which only fused weights have: give several roles.")
    if rule.sizes is not None and len(rule.sizes) != len(rule.roles):
        raise ValueError(f"{fused} and {len(rule.sizes)} sizes; give one size for each role.")
    for size in (rule.repeat, rule.head_dim, *(rule.sizes or ())):
        if not _SIZE.match(str(size)) or size == 0:
            raise ValueError(
                f"{where}the rule {rule.pattern!r} has the size {size!r}: give a positive number, or a product or "
                f"quotient of {', '.join(NUMBERS)}."
            )
