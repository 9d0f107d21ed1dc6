"""Parts of a fused weight: which entries they are, and that training them is training separate weights."""

from __future__ import annotations

import pytest
import torch

import lightning_memopt as lm
from lightning_memopt.plans.roles import Part
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.slot import Slot
from tests._compare import assert_equal
from tests.kinds.contract.cases import gradient

SLOTS = [Slot(0, 0, 3), Slot(0, 4, 2), Slot(0, 9, 3), Slot(0, 0, 1, 3), Slot(0, 1, 2, 4), Slot(0, 4, 2, 6)]


def entries(slot: Slot, size: int) -> list[int]:
    period = slot.period or size
    return [entry for entry in range(size) if 0 <= entry % period - slot.start < slot.length]


@pytest.mark.parametrize("slot", SLOTS, ids=str)
def test_a_slot_counts_and_takes_its_entries(slot):
    whole = torch.arange(12.0).unsqueeze(1).expand(12, 2).contiguous()
    assert [slot.count(size) for size in range(13)] == [
        sum(entry < size for entry in entries(slot, 12)) for size in range(13)
    ]
    view = slot.view(whole)
    assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert_equal(view.reshape(-1, 2), whole[entries(slot, 12)])
    assert_equal(slot.view(whole).reshape(-1, 2), whole[entries(slot, 12)])


@pytest.mark.parametrize("slot", SLOTS, ids=str)
def test_the_entries_in_every_piece_are_found(slot):
    whole = torch.arange(12.0)
    for start in range(13):
        for size in range(13 - start):
            piece = whole[start : start + size]
            found = torch.cat([run.view(piece).reshape(-1) for run in slot.within(start, size)])
            assert_equal(found, whole[[entry for entry in entries(slot, 12) if start <= entry < start + size]])


def test_columns_can_repeat():
    whole = gradient((3, 12), 1)
    slot = Slot(1, 2, 2, period=6)
    layout = Layout.of(whole, slot=slot, output_dim=-1)
    assert layout.matrix == (3, 4)
    assert_equal(layout.take(whole), whole[:, [2, 3, 8, 9]])


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("slot", [Slot(0, 2, 3), Slot(0, 2, 2, 6)], ids=str)
def test_what_was_taken_is_put_back(slot, dim):
    slot = Slot(dim, slot.start, slot.length, slot.period)
    whole = gradient((12, 5) if dim == 0 else (5, 12), 1)
    layout, expected = Layout.of(whole, slot=slot), whole.clone()
    index = torch.tensor(entries(slot, 12))
    expected.index_copy_(dim, index, 2 * expected.index_select(dim, index))
    part = layout.take(whole)
    part.mul_(2)
    layout.put(whole, part)
    assert_equal(whole, expected)


def per_head(shape: tuple[int, int], dim: int) -> tuple[Part, ...]:
    size = shape[dim] // 6
    return tuple(
        Part(role, Slot(dim, place * size, size, 3 * size), output_dim=dim - 2)
        for place, role in enumerate(("query", "key", "value"))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("recipe", "shape", "dim"),
    [(recipe, shape, dim) for recipe in ("adamw", "adapm", "adapm_mini", "adapm_lean", "adam_snsm", "adafactor")
     for shape, dim in (((24, 20), 0), ((20, 24), 1))] + [("adapm_lean", (600, 400), 0)],
)  # fmt: skip
def test_interleaved_blocks_train_like_separate_weights(recipe, shape, dim, dtype, monkeypatch):
    """Two layers, whose small blocks are stacked together. Blocks of the last shape are too large for that."""
    monkeypatch.setattr("lightning_memopt.optim.binding.classify", lambda pairs, **_: parts_of(dict(pairs)))
    names = [f"layers.{layer}.attention.query_key_value" for layer in range(2)]
    parts = per_head(shape, dim)

    def parts_of(shapes):
        found = {name: (Part(name.rpartition(":")[2], output_dim=dim - 2),) for name in shapes}
        return {name: parts if name in names else found[name] for name in shapes}

    def separate(tensor):
        tables = [Layout.of(tensor, slot=part.slot).take(tensor) for part in parts]
        return [table.clone() for table in tables]

    fused = {name: torch.nn.Parameter(gradient(shape, place).to(dtype)) for place, name in enumerate(names)}
    single = {
        f"{name}:{part.role}": torch.nn.Parameter(piece)
        for name, param in fused.items()
        for part, piece in zip(parts, separate(param.detach()), strict=True)
    }
    options = {"lr": 0.01, "weight_decay": 0.1, "recipe": recipe}
    optimizers = lm.MemOpt(fused.items(), **options), lm.MemOpt(single.items(), **options)
    for number in range(1, 5):
        for place, (name, param) in enumerate(fused.items()):
            param.grad = gradient(shape, 10 * number + place).to(dtype)
            for part, piece in zip(parts, separate(param.grad), strict=True):
                single[f"{name}:{part.role}"].grad = piece
        for optimizer in optimizers:
            optimizer.step()
    for name, param in fused.items():
        for part, piece in zip(parts, separate(param.detach()), strict=True):
            other = single[f"{name}:{part.role}"]
            torch.testing.assert_close(piece, other.detach())  # torch's fused AdamW rounds otherwise


NAME, SHAPE = "h.0.self_attention.query_key_value.weight", (24, 8)


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for number, param in enumerate(optimizer.param_groups[0]["params"]):
        param.grad = gradient(tuple(param.shape), number)
    optimizer.step()
    return optimizer


def test_state_of_adamw_is_split():
    saved = stepped(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(SHAPE))])).state_dict()
    param = torch.nn.Parameter(torch.zeros(SHAPE))
    optimizer = lm.AdamMini([(NAME, param)], head_dim=2)  # four heads of [query, key, value]
    optimizer.load_state_dict(saved)
    assert_equal(
        optimizer.state[param]["key.exp_avg"], Slot(0, 2, 2, 6).view(saved["state"][0]["exp_avg"]).reshape(8, 8)
    )


def test_compressed_state_from_before_a_split_is_refused():
    saved = stepped(lm.AdaPMLean([(NAME, torch.nn.Parameter(torch.zeros(SHAPE)))])).state_dict()
    optimizer = lm.AdamMini([(NAME, torch.nn.Parameter(torch.zeros(SHAPE)))], head_dim=2)
    saved["param_groups"][0]["recipe"] = "adam_mini"
    with pytest.raises(ValueError, match="is split into query, key, value here, and was whole where it was saved"):
        optimizer.load_state_dict(saved)
