import pytest
import torch

pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")

from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow


def examples_of(lengths, vocab=50):
    """Return examples with random tokens, whose prompts and answers have the given lengths."""
    from examples.sft.chat import Example
    from examples.sft.functions import Pair

    draw = torch.Generator().manual_seed(0)
    parts = [[torch.randint(1, vocab, (n,), generator=draw).tolist() for n in each] for each in lengths]
    return [Example(Pair("", ""), prompt, answer) for prompt, answer in parts]


def tiny_model(family):
    torch.manual_seed(0)
    if family == "gpt2":  # learned positions, of which there are as many as the longest example has tokens
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=9))
    else:
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **size))
    return model.eval()


def module_of(model):
    """Return the module around a model that no folder holds."""
    from lightning.pytorch import LightningModule

    from examples.sft.model import SFTModule

    module = SFTModule.__new__(SFTModule)
    LightningModule.__init__(module)
    module.model = model
    return module


def test_rows_hold_several_examples_with_labels_on_answers_alone():
    from examples.sft.packing import pack

    one, two, three = examples_of([(3, 2), (1, 4), (4, 4)])
    rows = pack([one, two, three], 12, pad=0, multiple=3)
    nothing = [-100] * 12
    assert rows["input_ids"].tolist() == [
        [*one.prompt, *one.answer, *two.prompt, *two.answer, 0, 0],
        [*three.prompt, *three.answer, 0, 0, 0, 0],
        [0] * 12,
    ]
    assert rows["labels"].tolist() == [
        [-100, -100, -100, *one.answer, -100, *two.answer, -100, -100],
        [-100, -100, -100, -100, *three.answer, -100, -100, -100, -100],
        nothing,
    ]
    assert rows["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0], [0] * 12
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_packed_examples_have_the_loss_that_they_have_alone(family):
    from examples.sft.packing import pack

    model, examples = tiny_model(family), examples_of([(3, 2), (1, 4), (4, 5), (2, 1), (5, 3)])
    module = module_of(model)
    loss, tokens = module.answer_loss(pack(examples, 16, pad=0, multiple=4))
    assert tokens == sum(len(example.answer) for example in examples)
    alone = torch.tensor(0.0)
    for prompt, answer in [(example.prompt, example.answer) for example in examples]:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        alone += cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="sum")
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)
    # Each by itself, too: an error of one could hide behind another's.
    for example in examples:
        (single, _), (packed, _) = (
            module.answer_loss(pack([example], 16, pad=0)),
            module.answer_loss(_only(pack(examples, 16, pad=0), example)),
        )
        torch.testing.assert_close(packed, single, rtol=1e-5, atol=1e-5)


def _only(rows, example):
    """Remove the labels of all other examples."""
    labels = rows["labels"].clone()
    starts = (rows["input_ids"].unfold(1, len(example), 1) == torch.tensor(example.prompt + example.answer)).all(-1)
    ((row, start),) = starts.nonzero().tolist()
    mine = torch.zeros_like(labels, dtype=torch.bool)
    mine[row, start : start + len(example)] = True
    return {**rows, "labels": labels.masked_fill(~mine, -100)}


def test_answers_end_at_the_first_end():
    from examples.sft.generation import until

    assert until([5, 6, 0, 7, 0], 0) == [5, 6]
    assert until([5, 6], 0) == [5, 6]
