"""Which modules become units of FSDP."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch")

from lightning_memopt import MemOptFSDPStrategy
from lightning_memopt.sharding.wrapping import blocks, divided_by_dtype, find_units, own_modules, resolve_policy
from tests._models import tiny_gpt2, tiny_llama
from tests.strategy._holder import Holder, Layer, Tower, names


def test_units_are_blocks_and_children():
    model = Holder(encoder=Tower(), head=nn.Linear(4, 4), loss=nn.CrossEntropyLoss(), dropout=nn.Dropout())
    assert names(model) == ["encoder.layers.0", "encoder.layers.1", "encoder", "head"]
    outermost = [unit.name for unit in find_units(model) if unit.outermost]
    assert outermost == ["encoder", "head"]


def test_containers_that_are_not_called_are_descended_into():
    model = Holder(
        nets=nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2), nn.ReLU())}),
        towers=nn.ModuleList([Tower(1), nn.Linear(2, 2)]),
        parameters_only=nn.ParameterList([nn.Parameter(torch.ones(2))]),
    )
    assert names(model) == ["nets.a", "nets.b", "towers.0.layers.0", "towers.0", "towers.1"]
    # The parameter list is in no unit, so its parameter stays plain.
    inside = {unit.module for unit in find_units(model)}
    assert [name for name, module in own_modules(model, inside) if list(module.parameters(recurse=False))] == [
        "parameters_only"
    ]


def test_blocks_are_the_outermost_lists_of_equal_modules():
    inner = Tower()
    mixed = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    model = Holder(
        stages=nn.ModuleList([nn.ModuleList([inner]), nn.ModuleList([Tower()])]),
        equal=nn.Sequential(Layer(), Layer()),
        mixed=mixed,
        single=nn.Sequential(Layer()),
    )
    found = blocks(model)
    assert inner in found
    assert set(model.equal) <= set(found)
    assert not set(inner.layers) & set(found)
    assert not set(mixed) & set(found)
    assert not set(model.single) & set(found)


def test_lists_of_containers_are_blocks_of_what_is_called():
    layer = nn.ModuleDict({"attention": nn.Linear(2, 2), "more": nn.ModuleDict({"mlp": nn.Linear(2, 2)})})
    assert names(Holder(layers=nn.ModuleList([layer]))) == ["layers.0.attention", "layers.0.more.mlp"]


@pytest.mark.parametrize(
    ("make", "layers"), [(tiny_llama, "model.model.layers.{}"), (tiny_gpt2, "model.transformer.h.{}")]
)
def test_units_of_transformers(make, layers):
    assert names(Holder(model=make())) == [layers.format(0), layers.format(1), "model"]


def test_units_of_torch():
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    model = Holder(encoder=nn.TransformerEncoder(layer, 2))
    assert names(model) == ["encoder.layers.0", "encoder.layers.1", "encoder"]


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        ([nn.Linear], ["net.layers.0.linear", "net.layers.1.linear", "net.last", "net"]),
        (nn.Linear, ["net.layers.0.linear", "net.layers.1.linear", "net.last", "net"]),
        ("torch.nn.Embedding", ["net.first", "net"]),
        (["torch.nn.Embedding", Layer], ["net.first", "net.layers.0", "net.layers.1", "net"]),
        (lambda module: isinstance(module, nn.Embedding), ["net.first", "net"]),
    ],
)
def test_wrap_by_class_by_path_and_by_function(wrap, expected):
    assert names(Holder(net=Tower()), resolve_policy("wrap", wrap)) == expected


def test_inner_units_come_first_also_where_a_module_has_two_names():
    tower = Tower()
    model = Holder(alias=tower.layers[0], net=tower)
    assert names(model) == ["alias", "net.layers.1", "net"]
    assert [unit.outermost for unit in find_units(model)] == [False, False, True]


def test_blocks_that_share_a_parameter_are_left_to_their_parent():
    model = Holder(net=Tower(3))
    model.net.layers[2].linear.weight = model.net.layers[0].linear.weight
    assert names(model) == ["net.layers.1", "net"]
    model.net.layers[1].linear.bias = nn.Parameter(model.net.last.bias.detach())
    assert names(model) == ["net.layers.1", "net"]
    model.net.last.bias = model.net.layers[1].linear.bias
    assert names(model) == ["net"]


def test_one_module_in_two_places_is_one_unit():
    model = Holder(net=Tower(), other=Tower())
    model.other.layers[0] = model.net.layers[0]
    assert names(model) == ["net.layers.0", "net.layers.1", "net", "other.layers.1", "other"]


def test_a_parameter_shared_by_children_is_refused():
    model = Holder(encoder=Tower(), head=nn.Linear(4, 4))
    model.head.weight = model.encoder.first.weight
    with pytest.raises(
        ValueError,
        match=r"'encoder.first.weight' and 'head.weight' are the same parameter, but 'encoder' and 'head' are sharded "
        r"separately, .* one module of the LightningModule whose `forward`",
    ):
        find_units(model)
    model = Holder(encoder=Tower())
    model.weight = model.encoder.first.weight
    with pytest.raises(ValueError, match="'weight' and 'encoder.first.weight' .* the Holder itself and 'encoder'"):
        find_units(model)


HALF = torch.bfloat16


class Adapted(nn.Module):
    """A layer whose weights train in bfloat16, with adapters that train in float32: a module, and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4, dtype=HALF)
        self.adapters = nn.ModuleDict({"down": nn.Linear(4, 2), "up": nn.Linear(2, 4)})

    def forward(self, value):
        return self.base(value.to(HALF)).float() + self.adapters["up"](self.adapters["down"](value))


class WithFactors(nn.Module):
    """A layer that holds the factors of its adapter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4, dtype=HALF)
        self.factors = nn.ParameterList([torch.zeros(4, 2), torch.zeros(2, 4)])

    def forward(self, value):
        return self.base(value.to(HALF)).float() + value @ self.factors[0] @ self.factors[1]


def divided(model):
    return [unit.name for unit in divided_by_dtype(model, find_units(model))]


def test_parameters_of_two_dtypes_train_in_units_of_their_own():
    model = Holder(net=nn.Sequential(Tower().to(HALF), Adapted(), WithFactors()))
    assert divided(model) == [
        "net.0.layers.0", "net.0.layers.1", "net.1.adapters.down", "net.1.adapters.up", "net.2.base", "net.2",
        "net"]  # fmt: skip
    model = Holder(layers=nn.ModuleList([Adapted(), Adapted()]))
    model.layers.requires_grad_(False)
    assert divided(model) == ["layers.0", "layers.1"]
    model.layers[0].adapters.requires_grad_(True)
    assert divided(model) == ["layers.0", "layers.1"], "frozen parameters have no gradients"
    model = Holder(net=nn.Sequential(Layer(), Layer()).append(WithFactors()))
    assert divided(model) == ["net.2.base", "net"]
    units = divided_by_dtype(model, find_units(model))
    assert [unit.outermost for unit in units] == [False, True]


def test_two_dtypes_in_one_module_are_refused():
    layer = Layer()
    layer.linear.bias = nn.Parameter(layer.linear.bias.detach().to(HALF))
    model = Holder(net=nn.Sequential(Layer(), nn.Sequential(layer, nn.ReLU())))
    with pytest.raises(
        ValueError,
        match=r"'net' \(Sequential\) trains parameters of several dtypes, 'net.0.linear.weight' \(torch.float32\) and "
        r"'net.1.0.linear.bias' \(torch.bfloat16\), .* separate module whose `forward`",
    ):
        divided(model)
    layer.linear.bias.requires_grad_(False)
    assert divided(model) == ["net"]


@pytest.mark.parametrize(
    ("wrap", "error", "match"),
    [
        ([], ValueError, "`wrap` is an empty list"),
        ("torch.nn.Lineal", ValueError, "`wrap` has 'torch.nn.Lineal', which cannot be imported .* full path"),
        (torch.Tensor, TypeError, "`wrap` must name classes of modules, got <class 'torch.Tensor'>"),
        (["torch.nn.Lineal"], ValueError, "'torch.nn.Lineal', which cannot be imported .* full path"),
        (["Linear"], ValueError, "'Linear', which cannot be imported"),
        (["torch.Tensor"], TypeError, "must name classes of modules, got <class 'torch.Tensor'>"),
        (3, TypeError, "`wrap` must be a class of modules, its import path, a list of these, .* got 3"),
    ],
)
def test_wrap_that_means_nothing_is_refused(wrap, error, match):
    with pytest.raises(error, match=match):
        MemOptFSDPStrategy(wrap=wrap)
    with pytest.raises(error, match=match.replace("`wrap`", "`activation_checkpointing`")):
        MemOptFSDPStrategy(activation_checkpointing=wrap)


def test_wrap_that_chooses_nothing_or_what_is_not_called_is_refused():
    model = Holder(net=Tower())
    for option, value in (("wrap", ["torch.nn.Conv2d"]), ("activation_checkpointing", "torch.nn.Conv2d")):
        message = f"No module of Holder is chosen by `{option}={value!r}`: .* are Embedding, Layer, Linear, ModuleList"
        with pytest.raises(ValueError, match=message.replace("[", "\\[")):
            blocks(model, resolve_policy(option, value))
    message = r"'net.layers' \(ModuleList\) is chosen by `wrap='torch.nn.ModuleList'`, but has no `forward`"
    with pytest.raises(ValueError, match=message):
        find_units(model, resolve_policy("wrap", "torch.nn.ModuleList"))
