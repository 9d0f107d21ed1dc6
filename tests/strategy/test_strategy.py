"""The strategy where no second process is needed: units, placement, initialisation, guards, names."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import StrategyRegistry

import lightning_memopt as lm
from lightning_memopt import MemOptFSDPStrategy
from lightning_memopt._registration import register_with_lightning
from lightning_memopt.plans.placement import shard_dim, shard_dims
from lightning_memopt.sharding.wrapping import blocks, divided_by_dtype, find_units, own_modules, resolve_policy
from lightning_memopt.strategy.gradients import clip_grad_norm_, clip_grad_value_
from lightning_memopt.strategy.mesh import resolved_data_size
from lightning_memopt.strategy.model.materialize import convert, move, pretrained_owners, refuse_uninitializable
from lightning_memopt.strategy.model.precision import sharded_plugin, sharding_policy
from lightning_memopt.strategy.model.refusals import refuse_fsdp1, refuse_parameters
from lightning_memopt.strategy.rebinding import KnownParameters, rebind
from tests._models import big_gpt2, big_llama, tiny_gpt2, tiny_llama


class Holder(LightningModule):
    """A LightningModule of given children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class Layer(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, value):
        return self.linear(value)


class Tower(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.first = nn.Embedding(4, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.last = nn.Linear(4, 4)

    def forward(self, value):
        for layer in self.layers:
            value = layer(value)
        return value


def names(model, policy=None):
    return [unit.name for unit in find_units(model, policy)]


# ---------------------------------------------------------------------- units


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
        r"apart .* one module with a `forward`",
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
        r"'net.1.0.linear.bias' \(torch.bfloat16\), .* module of their own with a `forward`",
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


# ---------------------------------------------------------------------- what cannot be sharded


def test_scalars_are_refused_in_units_only():
    model = Holder(net=Tower())
    model.temperature = nn.Parameter(torch.tensor(1.0))
    refuse_parameters(model, find_units(model))
    model.net.layers[0].gain = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"Scalar parameters .*: 'net.layers.0.gain'. Give them the shape \(1,\)"):
        refuse_parameters(model, find_units(model))


def test_parameters_without_a_shape_are_refused():
    model = Holder(net=nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="no shape yet .*: 'net.0.weight', 'net.0.bias'. Call the lazy modules"):
        refuse_parameters(model, find_units(model))


def test_parameters_with_hooks_are_refused():
    model = Holder(net=Tower())
    model.net.last.weight.register_hook(lambda grad: grad)
    model.net.last.bias.register_post_accumulate_grad_hook(lambda param: None)
    with pytest.raises(ValueError, match="Hooks .* would be lost, .*: 'net.last.weight', 'net.last.bias'. Register"):
        refuse_parameters(model, find_units(model))


def test_modules_of_the_older_fsdp_are_refused(monkeypatch):
    monkeypatch.setattr("lightning_memopt.strategy.model.refusals.FullyShardedDataParallel", Layer)
    with pytest.raises(TypeError, match="Found modules that are wrapped with .*: 'net.layers.0', .* only supports"):
        refuse_fsdp1(Holder(net=Tower()))


# ---------------------------------------------------------------------- placement


@pytest.mark.parametrize(
    ("name", "shape", "size", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", (16, 8), 4, 0),  # the long side
        ("model.layers.0.mlp.down_proj.weight", (8, 16), 4, 1),
        ("model.layers.0.mlp.down_proj.weight", (8, 18), 4, 0),  # uneven: only dimension 0
        ("model.layers.0.mlp.up_proj.weight", (18, 8), 4, 0),  # uneven, but dimension 0 anyway
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), 4, 1),  # heads are rows
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), 3, 0),
        ("transformer.h.0.attn.c_attn.weight", (8, 24), 4, 0),  # GPT-2's: fused along columns
        ("transformer.h.0.attn.c_proj.weight", (8, 8), 4, 0),  # GPT-2's: heads are columns of outputs
        ("transformer.h.0.mlp.c_fc.weight", (8, 32), 4, 1),
        ("self_attn.in_proj_weight", (24, 8), 4, 1),  # torch's: fused along rows
        ("self_attn.in_proj_weight", (24, 8), 3, 0),
        ("model.embed_tokens.weight", (96, 8), 4, 0),
        ("model.norm.weight", (8,), 4, 0),
        ("model.norm.weight", (3,), 4, 0),
        ("unknown.weight", (4, 64), 4, 1),
        ("conv.weight", (8, 64, 3), 4, 0),  # a kernel, flattened
        ("conv.weight", (8, 64, 3, 3), 4, 0),
        ("experts.weight", (8, 16, 32), 4, 0),  # a stack
        ("experts.weight", (3, 16, 32), 4, 2),  # too few matrices: their long side
        ("experts.weight", (3, 64, 32), 4, 1),
        ("experts.weight", (3, 63, 31), 4, 0),
        ("scalar", (), 4, 0),
    ],
)
def test_placement(name, shape, size, expected):
    parts = lm.classify([(name, shape)])[name]
    assert shard_dim(shape, parts, size) == expected


@pytest.mark.parametrize("size", [1, 2, 8, 64, 1024])
@pytest.mark.parametrize("model", [big_llama("1B"), big_gpt2()], ids=["llama", "gpt2"])
def test_placement_of_large_models(model, size):
    """`fully_shard` would refuse a dimension other than 0 that is not divided evenly."""
    dims = shard_dims(model, size)
    parts = lm.classify(model)
    for name, param in model.named_parameters():
        dim = dims[param]
        assert dim == 0 or param.shape[dim] % size == 0
        slot = parts[name][0].slot
        other = param.shape[1 - slot.dim] if slot is not None else 0
        assert slot is None or dim != slot.dim or other % size


def test_placement_is_of_the_global_shape_and_the_name():
    with torch.device("meta"):
        model = tiny_llama()
    real = tiny_llama()
    assert list(shard_dims(model, 4).values()) == list(shard_dims(real, 4).values())


# ---------------------------------------------------------------------- meta device


def materialize(model, policy=None):
    """As the strategy does, unit after unit."""
    units = [unit.module for unit in find_units(model, policy)]
    owners, replaced = pretrained_owners(model), {}
    for unit in (*units, model):
        own = [(name, module) for name, module in own_modules(unit, set(units))]
        replaced |= move(own, torch.device("cpu"), owners)
    return replaced


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_transformers_are_born_as_without_the_meta_device(make):
    with torch.device("meta"):
        model = Holder(model=make())
    materialize(model)
    expected = Holder(model=make())
    for (name, value), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert value.std().item() == pytest.approx(other.std().item(), rel=0.15, abs=1e-6), name
        assert value.mean().item() == pytest.approx(other.mean().item(), abs=0.01), name
        assert value.is_contiguous()
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=0, atol=0)
    assert (make is tiny_gpt2) == (model.model.lm_head.weight is model.model.get_input_embeddings().weight)


def test_scaled_initialisation_of_gpt2():
    with torch.device("meta"):
        model = Holder(model=tiny_gpt2())
    materialize(model)
    layer = model.model.transformer.h[0].mlp
    assert layer.c_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)
    assert layer.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_modules_of_torch_are_born_by_themselves():
    with torch.device("meta"):
        children = {"attention": nn.MultiheadAttention(8, 2), "norm": nn.BatchNorm1d(8), "conv": nn.Conv1d(3, 4, 5)}
        model = Holder(lstm=nn.LSTM(4, 5), layer=nn.TransformerEncoderLayer(8, 2, 16), **children)
    replaced = materialize(model)
    assert not any(tensor.is_meta or tensor.isnan().any() for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(model.norm.running_var, torch.ones(8))
    assert model.norm.num_batches_tracked == 0
    assert model.attention.in_proj_weight.std() > 0.1
    assert set(replaced.values()) == {*model.parameters(), *model.buffers()}
    assert all(tensor.is_meta for tensor in replaced)


def test_what_nobody_initialises_is_named():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.zeros(3))
            self.register_buffer("positions", torch.arange(3), persistent=False)
            self.register_buffer("mask", torch.ones(3, dtype=torch.bool))

        def forward(self, value):
            return value

    class Half(Table):
        def reset_parameters(self):
            nn.init.zeros_(self.codes)

    with torch.device("meta"):
        model = Holder(net=nn.Sequential(Table(), nn.Linear(2, 2), Half()))
    with pytest.raises(
        ValueError, match=r"net.0 \(Table\): codes, positions; net.2 \(Half\): positions. Give them a `reset_param"
    ):
        move([(f"net.{n}", m) for n, m in own_modules(model.net, set())], torch.device("cpu"), {})


def test_what_has_no_initialiser_is_refused_before_anything_changes():
    with torch.device("meta"):
        model = Holder(net=nn.Sequential(nn.Linear(2, 2), nn.ParameterList([nn.Parameter(torch.ones(2))])))
    with pytest.raises(ValueError, match=r"on the meta device .*: net.1 \(ParameterList\): 0. Give them"):
        refuse_uninitializable(own_modules(model, set()), {})
    refuse_uninitializable(own_modules(Holder(net=tiny_llama()), set()), {})


def test_values_that_exist_are_kept():
    layer = nn.BatchNorm1d(4)
    layer.running_mean.fill_(3)
    layer.weight = nn.Parameter(torch.empty(4, device="meta"), requires_grad=False)
    mean = layer.running_mean
    replaced = move([("", layer)], torch.device("cpu"), {})
    assert layer.running_mean is mean
    assert torch.equal(mean, torch.full((4,), 3.0))
    assert torch.equal(layer.weight, torch.ones(4))
    assert not layer.weight.requires_grad
    assert list(replaced.values()) == [layer.weight]


def test_conversion_leaves_the_old_parameters_alone():
    layer = nn.BatchNorm1d(4)
    old = layer.weight
    replaced = convert([("", layer)], torch.bfloat16)
    assert old.dtype == torch.float32
    assert layer.weight is replaced[old]
    assert layer.weight.dtype == layer.running_mean.dtype == torch.bfloat16
    assert layer.num_batches_tracked.dtype == torch.int64


def test_parameters_become_contiguous():
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.randn(3, 4).t())
    value = layer.weight.detach().clone()
    move([("", layer)], torch.device("cpu"), {})
    assert layer.weight.is_contiguous()
    assert torch.equal(layer.weight, value)


# ---------------------------------------------------------------------- guards, by name, class and instance


def test_registered_under_both_names_and_only_once():
    register_with_lightning()
    assert type(StrategyRegistry.get("memopt_fsdp")) is MemOptFSDPStrategy
    assert StrategyRegistry["memopt_fsdp_offload"]["init_params"] == {"cpu_offload": True}
    assert lm.MemOptFSDPStrategy is MemOptFSDPStrategy


def test_known_by_name_as_soon_as_the_package_is_imported():
    program = (
        "import lightning_memopt\n"
        "from lightning.pytorch import Trainer\n"
        "strategy = Trainer(strategy='memopt_fsdp', accelerator='cpu', devices=2, logger=False).strategy\n"
        "assert type(strategy).__name__ == 'MemOptFSDPStrategy'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)


GIVEN = pytest.mark.parametrize("strategy", ["memopt_fsdp", "memopt_fsdp_offload", MemOptFSDPStrategy])


def make_trainer(strategy, **options):
    strategy = strategy() if callable(strategy) else strategy
    return Trainer(strategy=strategy, **{"accelerator": "cpu", "devices": 1, "logger": False, **options})


@GIVEN
@pytest.mark.parametrize("precision", ["16-true", "64-true"])
def test_precisions_that_are_refused(strategy, precision):
    """Lightning checks instances of its own class itself, with an error of the same type."""
    with pytest.raises(ValueError, match=f"{precision}.*(bf16-mixed|Choose a different precision)"):
        make_trainer(strategy, precision=precision)


@GIVEN
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_precisions_that_are_supported(strategy, precision):
    trainer = make_trainer(strategy, precision=precision)
    assert trainer.precision == precision
    assert trainer.precision_plugin is trainer.strategy.precision_plugin


class OwnPlugin(Precision):
    """One that a user has written."""


@GIVEN
@pytest.mark.parametrize(
    "plugin", [DoublePrecision(), HalfPrecision("16-true"), MixedPrecision("16-mixed", "cpu"), OwnPlugin()]
)
def test_plugins_that_are_refused(strategy, plugin):
    with pytest.raises(ValueError, match=f"32-true, bf16-true, bf16-mixed .* got .* \\({type(plugin).__name__}\\)"):
        make_trainer(strategy, plugins=[plugin])


def test_plugins_stay_what_they_are():
    assert sharded_plugin(None) is None
    for plugin in (Precision(), HalfPrecision("bf16-true"), MixedPrecision("bf16-mixed", "cpu")):
        sharded = sharded_plugin(plugin)
        assert isinstance(sharded, type(plugin))
        assert sharded.precision == plugin.precision
        assert sharded_plugin(sharded) is sharded  # a strategy that is given to a second Trainer


def test_policy_of_mixed_precision():
    mixed = sharded_plugin(MixedPrecision("bf16-mixed", "cpu"))
    inner, outer = (sharding_policy(mixed, outermost=outermost) for outermost in (False, True))
    assert (inner.param_dtype, inner.reduce_dtype, inner.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert (outer.param_dtype, outer.reduce_dtype, outer.output_dtype) == (torch.bfloat16, torch.float32, torch.float32)
    plain = sharding_policy(sharded_plugin(HalfPrecision("bf16-true")), outermost=True)
    assert (plain.param_dtype, plain.reduce_dtype, plain.output_dtype) == (None, None, None)


@pytest.mark.parametrize("strategy", ["memopt_fsdp", MemOptFSDPStrategy])
def test_accelerators_that_are_refused(strategy):
    made = StrategyRegistry.get(strategy) if isinstance(strategy, str) else strategy()
    with pytest.raises(ValueError, match="CPUs and CUDA GPUs, got MPSAccelerator: set `accelerator='cpu'`"):
        made.accelerator = MPSAccelerator()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"replicate_size": 0}, ValueError, "`replicate_size` must be at least 1, got 0"),
        ({"data_parallel_size": -1}, ValueError, "`data_parallel_size` must be at least 1, got -1"),
        ({"tensor_parallel_size": "auto"}, TypeError, "`tensor_parallel_size` must be an integer, got 'auto'"),
        ({"data_parallel_size": True}, TypeError, "`data_parallel_size` must be an integer, got True"),
        ({"data_parallel_size": 6, "replicate_size": 4}, ValueError, "`replicate_size` 4 does not divide .* 6"),
    ],
)
def test_sizes_that_mean_nothing(options, error, match):
    with pytest.raises(error, match=match):
        MemOptFSDPStrategy(**options)


@pytest.mark.parametrize(
    ("data", "tensor", "replicate", "world", "expected"),
    [("auto", 1, 1, 6, 6), ("auto", 2, 1, 6, 3), ("auto", 2, 3, 6, 3), (4, 2, 2, 8, 4), ("auto", 4, 1, 6, None),
     (4, 1, 1, 8, None), ("auto", 1, 4, 6, None)],
)  # fmt: skip
def test_sizes(data, tensor, replicate, world, expected):
    if expected is not None:
        assert resolved_data_size(data, tensor, replicate, world) == expected
        return
    with pytest.raises(RuntimeError, match=f"multiplied should equal the world size \\({world}\\)"):
        resolved_data_size(data, tensor, replicate, world)


# ---------------------------------------------------------------------- optimizers


def replaced_model():
    """A model whose parameters were replaced after an optimizer was made, as sharding does."""
    model, known = Holder(net=Tower()), KnownParameters()
    known.learn(model)
    return model, known


def replace(model, known):
    for module in model.modules():
        for key in list(module._parameters):
            module._parameters[key] = nn.Parameter(module._parameters[key].detach().clone())
    return known.replaced(model)


def test_groups_and_state_survive_rebinding():
    model, known = replaced_model()
    weights, biases = (
        [param for name, param in model.named_parameters() if name.endswith(end)] for end in ("weight", "bias")
    )
    optimizer = torch.optim.AdamW([{"params": weights, "lr": 0.5}, {"params": biases, "weight_decay": 0.25}])
    model.net.last(torch.ones(4)).sum().backward()
    optimizer.step()
    before = optimizer.state[model.net.last.weight]["exp_avg"]
    rebind(optimizer, replace(model, known), model, known)
    names = {param: name for name, param in model.named_parameters()}
    assert {names[param].split(".")[-1] for param in optimizer.param_groups[0]["params"]} == {"weight"}
    assert {names[param].split(".")[-1] for param in optimizer.param_groups[1]["params"]} == {"bias"}
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["weight_decay"]) == (0.5, 0.25)
    assert torch.equal(optimizer.state[model.net.last.weight]["exp_avg"], before)
    assert set(optimizer.state) == {model.net.last.weight, model.net.last.bias}


def test_known_parameters_are_not_kept_alive():
    model, known = replaced_model()
    assert set(known.names().values()) == {name for name, _ in model.named_parameters()}
    assert not replace(model, known)  # nobody holds the old ones
    assert not known.names()


def test_own_optimizers_learn_names():
    model, known = replaced_model()
    optimizer = lm.AdaPMLean(model.parameters())
    rebind(optimizer, replace(model, known), model, known)
    assert {block.name for block in optimizer.snapshot().blocks} == {name for name, _ in model.named_parameters()}


def test_clipping_is_that_of_torch():
    params = [nn.Parameter(torch.randn(5, 3)) for _ in range(3)]
    for param in params[:2]:
        param.grad = torch.randn(5, 3)
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    for algorithm, reference, limit in (
        (clip_grad_norm_, nn.utils.clip_grad_norm_, 0.3),
        (clip_grad_norm_, nn.utils.clip_grad_norm_, 30.0),
        (clip_grad_value_, nn.utils.clip_grad_value_, 0.01),
    ):
        for param, copy in zip(params, copies, strict=True):
            copy.grad = None if param.grad is None else param.grad.clone()
        ours, theirs = algorithm(params, limit), reference(copies, limit)
        torch.testing.assert_close(ours, theirs)
        for param, copy in zip(params[:2], copies, strict=False):
            torch.testing.assert_close(param.grad, copy.grad)
    assert clip_grad_norm_([params[2]], 1.0) == 0
