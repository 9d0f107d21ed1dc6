import pytest
import torch

pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")

from types import SimpleNamespace

from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow

PROMPTS = [[7, 8, 9], [11, 12, 13, 14, 15, 16, 17], [19]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=16, **size)).eval()


@pytest.mark.parametrize("adapters", [False, True])
@torch.no_grad()
def test_greedy_decoding_is_that_of_transformers(model, adapters):
    from examples.pretrain.decoding import decode, padded

    if adapters:
        peft = pytest.importorskip("peft", exc_type=ImportError)
        config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
        model = peft.get_peft_model(model, config).eval()
    for prompt, answer in zip(PROMPTS, decode(model, *padded(PROMPTS, left=True), 6), strict=True):
        tokens = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": [], "pad_token_id": 0}
        expected = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
        assert answer.tolist() == expected[0, len(prompt) :].tolist()


def test_what_is_chosen_continues_the_text(model):
    from examples.pretrain.decoding import decode, padded

    def choose(logits, step):
        """Return a rank among the tokens that changes with every step."""
        return logits.argsort(-1, descending=True)[:, step]

    found = decode(model, *padded(PROMPTS, left=True), 4, choose)
    for row, prompt in enumerate(PROMPTS):
        tokens = list(prompt)
        for step in range(4):
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[:, -1]
            tokens.append(int(choose(logits, step)))
        assert found[row].tolist() == tokens[len(prompt) :]


def test_rows_are_padded_on_either_side():
    from examples.pretrain.decoding import padded, positions

    left, attended = padded([[5, 6], [7]], left=True)
    assert (left.tolist(), attended.tolist()) == ([[5, 6], [0, 7]], [[1, 1], [0, 1]])
    assert positions(attended).tolist() == [[0, 1], [0, 0]]
    right, attended = padded([[5, 6], [7]], left=False)
    assert (right.tolist(), attended.tolist()) == ([[5, 6], [7, 0]], [[1, 1], [1, 0]])


def sample(model, tokens, **options):
    """Return what `SampleText` prints for a prompt of these tokens."""
    from examples.pretrain.finish import SampleText

    printed = []
    module = SimpleNamespace(model=model, device="cpu", print=printed.append)

    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": tokens}

        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    trainer = SimpleNamespace(datamodule=SimpleNamespace(tokenizer=Tokenizer()))
    callback = SampleText(**options)
    callback.setup(trainer, module, "fit")
    callback.on_train_end(trainer, module)
    (text,) = printed
    return [int(word) for word in text.removeprefix("A sample of the model:\n").split()]


def test_a_sample_begins_with_the_prompt_and_ends_where_the_model_does(model):
    from examples.pretrain.decoding import decode, padded

    short = sample(model, PROMPTS[0], max_new_tokens=5)
    assert short[:3] == PROMPTS[0]
    assert len(short) == 8
    assert sample(model, PROMPTS[0], max_new_tokens=5) == short
    assert sample(model, PROMPTS[0], max_new_tokens=5, seed=1) != short
    assert len(sample(model, PROMPTS[0], max_new_tokens=60)) == 16
    likely = decode(model, *padded(PROMPTS[:1], left=True), 5)[0].tolist()
    assert sample(model, PROMPTS[0], max_new_tokens=5, temperature=1e-4)[3:] == likely


def test_samples_that_cannot_be_made(model):
    from examples.pretrain.finish import SampleText

    with pytest.raises(ValueError, match="`prompt` is empty, and a model predicts only what follows a token"):
        SampleText(prompt="")
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1, got 0"):
        SampleText(max_new_tokens=0)
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        SampleText(temperature=0)
    with pytest.raises(ValueError, match="`prompt` has 16 tokens, and the model's longest sequence 16"):
        sample(model, [1] * 16)
