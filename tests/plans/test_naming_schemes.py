"""Naming schemes that users register."""

from __future__ import annotations

import pytest
from torch import nn

import lightning_memopt as lm
from lightning_memopt.plans.roles import NAMING_SCHEMES, Part
from lightning_memopt.sharding.layout import Slot

QKV = ("query", "key", "value")
KEYS = "kv_heads * head_dim"


@pytest.fixture
def register():
    names = []

    def add(*rules, name="toy"):
        names.append(name)
        return lm.register_naming_scheme(lm.NamingScheme(name, rules))

    yield add
    for name in names:
        NAMING_SCHEMES._entries.pop(name, None)


def parts(name, shape, **kwargs):
    return lm.classify({name: shape}.items(), **kwargs)[name]


def roles(name, shape):
    return tuple(part.role for part in parts(name, shape))


def test_no_scheme_is_needed_for_public_models():
    assert NAMING_SCHEMES.names() == []


def test_a_new_family_is_one_registration(register):
    scheme = register(lm.Rule(r"\.weird$", QKV, fused_dim=0))
    assert roles("a.weird", (6, 2)) == QKV
    assert parts("a.weird", (6, 2))[0].why == "scheme toy"
    assert parts("b.weird", (5, 2))[0].why == "not split: 5 rows are not 3 × 2"
    assert roles("b.weird", (5, 2)) == ("other",)
    with pytest.raises(ValueError, match="naming scheme 'toy' is registered already"):
        lm.register_naming_scheme(lm.NamingScheme("toy", (lm.Rule("other", ("mlp",)),)))
    assert lm.register_naming_scheme(scheme) is scheme, "as when a notebook's cell runs again"


def test_schemes_precede_the_words_but_not_vectors_and_adapters(register):
    register(lm.Rule(r"q_proj", ("mlp",)))
    assert roles("layers.0.self_attn.q_proj.weight", (4, 4)) == ("mlp",)
    assert roles("layers.0.self_attn.q_proj.bias", (4,)) == ("vector",)
    assert roles("layers.0.self_attn.q_proj.lora_A.default.weight", (4, 8)) == ("lora",)
    model = nn.ModuleDict({"q_proj": nn.Embedding(8, 4), "k_proj": nn.Embedding(8, 4)})
    assert {name: part.role for name, (part,) in lm.classify(model).items()} == {
        "q_proj.weight": "mlp",
        "k_proj.weight": "embedding",
    }


def test_a_refused_split_is_not_tried_otherwise(register):
    register(lm.Rule(r"\.qkv\.", QKV, fused_dim=0, sizes=(4, 2, 2)))
    assert [part.slot for part in parts("a.qkv.weight", (8, 9))] == [Slot(0, 0, 4), Slot(0, 4, 2), Slot(0, 6, 2)]
    (part,) = parts("a.qkv.weight", (12, 4))  # thirds, by the built-in words
    assert (part.role, part.why) == ("other", "not split: 12 rows are not 4 + 2 + 2")


def test_a_later_rule_may_fit(register):
    register(lm.Rule(r"weird", QKV, fused_dim=0), lm.Rule(r"weird", QKV, fused_dim=-1, output_dim=-1))
    assert [part.slot.dim for part in parts("a.weird", (2, 6))] == [1, 1, 1]
    assert [part.slot.dim for part in parts("a.weird", (6, 2))] == [0, 0, 0]


def test_the_scheme_that_fits_most_matrices_comes_first(register):
    register(lm.Rule(r"(^|\.)one$", ("mlp",)), name="first")
    register(lm.Rule(r"(^|\.)(one|two)$", ("head",)), name="second")
    assert roles("one", (4, 4)) == ("mlp",)
    found = lm.classify({"one": (4, 4), "two": (4, 4)}.items())
    assert [part.role for (part,) in found.values()] == ["head", "head"]


class Own(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 4, 2, 8
        self.mix = nn.Linear(32, rows, bias=False)


@pytest.mark.parametrize(
    ("rule", "rows", "expected"),
    [
        (
            {"sizes": ("heads * head_dim", KEYS, KEYS)},
            64,
            [Slot(0, 0, 32), Slot(0, 32, 16), Slot(0, 48, 16)],
        ),
        (
            {"sizes": ("head_dim",) * 3, "repeat": "heads"},
            96,
            [Slot(0, 0, 8, 24), Slot(0, 8, 8, 24), Slot(0, 16, 8, 24)],
        ),
        (
            {"sizes": ("heads/kv_heads*head_dim", "head_dim", "head_dim"), "repeat": "kv_heads"},
            64,
            [Slot(0, 0, 16, 32), Slot(0, 16, 8, 32), Slot(0, 24, 8, 32)],
        ),
        ({"repeat": 4}, 96, [Slot(0, 0, 8, 24), Slot(0, 8, 8, 24), Slot(0, 16, 8, 24)]),
        ({"sizes": (16, 8, 8), "repeat": 2}, 64, [Slot(0, 0, 16, 32), Slot(0, 16, 8, 32), Slot(0, 24, 8, 32)]),
    ],
)
def test_rules_express_every_layout(register, rule, rows, expected):
    register(lm.Rule(r"mix", QKV, fused_dim=0, **rule))
    found = lm.classify(Own(rows))["mix.weight"]
    assert [part.slot for part in found] == expected
    assert [part.head_dim for part in found] == [8, 8, None]


def test_heads_orientation_and_flattening(register):
    register(
        lm.Rule(r"one", ("query",), head_dim=2),
        lm.Rule(r"two", ("query",), output_dim=-1, flatten=True, head_dim="v_head_dim"),
    )
    assert parts("one", (4, 3)) == (Part("query", head_dim=2),)
    assert parts("two", (3, 2, 4)) == (Part("query", output_dim=-1, flatten=True),)


def test_rules_for_a_class(register):
    register(lm.Rule(r"mix", ("value",), module="Ow."))
    assert lm.classify(Own(8))["mix.weight"] == (Part("value"),)
    assert roles("mix.weight", (8, 32)) == ("other",)
    assert lm.classify(nn.ModuleDict({"mix": nn.Linear(2, 2)}))["mix.weight"] == (Part("linear"),)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"roles": ("queri",)}, "Unknown role 'queri'. Did you mean 'query'"),
        ({"roles": ("query", "key")}, "has 2 roles and `fused_dim` None"),
        ({"roles": ("query",), "fused_dim": 0}, "has 1 roles and `fused_dim` 0"),
        ({"roles": ("query",), "repeat": 2}, "has 1 roles and `sizes` or `repeat`, which only fused weights have"),
        ({"roles": ("query", "key"), "fused_dim": 0, "sizes": (1,)}, "has 2 roles and 1 sizes; give one size"),
        (
            {"roles": ("query",), "head_dim": "hed_dim"},
            "has the size 'hed_dim': give a positive number, or a product or quotient of heads, kv_heads, head_dim",
        ),
        ({"roles": ("query", "key"), "fused_dim": 0, "repeat": 0}, "has the size 0: give a positive number"),
        ({"roles": ("query", "key"), "fused_dim": 0, "sizes": ("heads +", 1)}, r"has the size 'heads \+'"),
    ],
)
def test_bad_schemes_are_refused(rule, message):
    with pytest.raises(ValueError, match=f"In naming scheme 'bad': .*{message}"):
        lm.NamingScheme("bad", (lm.Rule("x", **rule),))


@pytest.mark.parametrize(
    ("rule", "error", "match"),
    [
        ({"pattern": "(qkv"}, ValueError, r"'\(qkv' is not a regular expression: missing \)"),
        ({"pattern": "qkv", "module": "["}, ValueError, r"'\[' is not a regular expression"),
        ({"pattern": "qkv", "output_dim": 0}, ValueError, "has `output_dim` 0 and `fused_dim` None: outputs are in"),
        (
            {"pattern": "qkv", "roles": QKV, "fused_dim": 2},
            ValueError,
            "and `fused_dim` 2: outputs are in dimension -2",
        ),
        ({"pattern": "qkv", "roles": ("key", "key"), "fused_dim": 0}, ValueError, "has a role twice"),
        ({"pattern": "qkv", "roles": "query"}, TypeError, "has the roles 'query': give a tuple of roles"),
    ],
)
def test_rules_that_fit_no_weight_are_refused(rule, error, match):
    with pytest.raises(error, match=f"In naming scheme 'toy': .*{match}"):
        lm.NamingScheme("toy", (lm.Rule(**{"roles": ("mlp",), **rule}),))


def test_what_is_no_scheme_is_refused():
    rule = lm.Rule("x", ("mlp",))
    for rules in (rule, [("x", ("mlp",))]):
        with pytest.raises(TypeError, match="In naming scheme 'toy': `rules` must be a tuple of `Rule`, got"):
            lm.NamingScheme("toy", rules)
    with pytest.raises(ValueError, match="In naming scheme 'toy': there are no rules"):
        lm.NamingScheme("toy", ())
    with pytest.raises(TypeError, match="`scheme` must be a `NamingScheme`, got Rule"):
        lm.register_naming_scheme(rule)
