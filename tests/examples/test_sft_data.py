import textwrap
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")

from transformers import AutoTokenizer

from tests.examples._sft import FUNCTION, write_functions

pytestmark = pytest.mark.slow

SOURCE = '''
class Stack:
    @property
    def top(self) -> int:
        """Return the last one."""
        # It may be missing.
        if not self.items:
            return None

        return self.items[-1]

async def wait(seconds, *, clock=None):
    """Wait.

    And wait.
    """
    def inner():
        """Tick."""
        return "tock"
    await clock(inner)

def one_line(): "Doc"; return 1
def without(): return 2
def only_docstring():
    """Nothing else."""
class Deep:
    def margin(self):
        """Have text at the margin."""
        return \'\'\'
text\'\'\'
    def two(self,
            x=1):
      "Have an indentation of two."
      return "a\fb"
'''


@pytest.fixture
def functions(tmp_path):
    return write_functions(tmp_path / "functions")


@pytest.fixture
def tokenizer(transformers_folder):
    from examples.sft.chat import CHAT_TEMPLATE

    found = AutoTokenizer.from_pretrained(transformers_folder)
    found.chat_template = CHAT_TEMPLATE
    return found


def loaded_data(functions, tokenizer, rank=0, ranks=1, callbacks=(), **options):
    """Return the data module as a trainer leaves it; four rows per step, over all processes, unless options differ."""
    from examples.sft.data import FunctionsDataModule

    data = FunctionsDataModule(str(functions), **{"seq_len": 256, "batch_size": 4 // ranks, **options})
    config = SimpleNamespace(max_position_embeddings=128)
    module = SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(config=config))
    sampler = {"num_replicas": ranks, "rank": rank} if ranks > 1 else None
    data.trainer = SimpleNamespace(lightning_module=module, distributed_sampler_kwargs=sampler, callbacks=callbacks)
    data.prepare_data()
    data.setup()
    return data


def test_pairs_are_functions_with_a_docstring_and_a_body():
    from examples.sft.functions import pairs_of, parses

    pairs = pairs_of(SOURCE)
    assert [pair.task.splitlines()[0] for pair in pairs] == [
        "def top(self) -> int:", "async def wait(seconds, *, clock=None):", "def inner():", "def two(self,"
    ]  # fmt: skip
    top, wait, _, two = pairs
    assert top.task == 'def top(self) -> int:\n    """Return the last one."""'
    assert top.answer == ("# It may be missing.\nif not self.items:\n    return None\n\nreturn self.items[-1]")
    assert wait.task.endswith('\n\n    And wait.\n    """')
    # Prompt and body are the code of the file.
    assert wait.prompt + wait.body in SOURCE
    assert textwrap.indent(top.prompt + top.body, "    ") in SOURCE
    assert two.prompt + two.body == 'def two(self,\n        x=1):\n  "Have an indentation of two."\n  return "a\fb"\n'
    assert all(parses(*pair) for pair in pairs)
    assert pairs_of(SOURCE.replace("\n", "\r\n")) == pairs
    assert pairs_of("def broken(:") == pairs_of("a\0b") == []


@pytest.mark.parametrize(
    ("answer", "python"),
    [
        ("return a", True), ("if a:\n    return b\nreturn a", True), ("", False), ("# soon", False),
        ("return (", False), ("  return a", False), ("    return a\nreturn b", False), ("x = '", False), ("a\0", False),
    ],
)  # fmt: skip
def test_what_counts_as_python(answer, python):
    from examples.sft.functions import parses

    assert parses('def f(a, b):\n    """Do."""', answer) is python


def test_splits_are_those_of_pretraining_and_no_task_is_in_both(functions, tmp_path):
    from examples.pretrain.texts import Texts
    from examples.sft.functions import pairs_of, read_pairs

    # The same function in all files.
    for path in functions.iterdir():
        path.write_text(path.read_text() + "\n\n" + FUNCTION.format(name="same", body="return b"))
    texts = Texts(functions, "**/*.py", 0.3, None)
    pairs = read_pairs(texts, tmp_path / "cache")
    assert read_pairs(texts, tmp_path / "cache") == pairs == read_pairs(texts, tmp_path / "elsewhere")
    of_texts = {split: {pair for text in texts.read(split) for pair in pairs_of(text)} for split in pairs}
    assert set(pairs["train"]) == of_texts["train"]
    assert set(pairs["val"]) == of_texts["val"] - of_texts["train"]
    tasks = [pair.task for split in pairs.values() for pair in split]
    assert len(tasks) == len(set(tasks)) == 121


def test_prompt_and_answer_are_tokenized_apart_and_make_the_chat(tokenizer):
    from examples.sft.chat import encode
    from examples.sft.functions import Pair

    task = 'def add(a, b):\n    """Add."""'
    (example,) = encode(tokenizer, [Pair(task, "return a + b")])
    assert tokenizer.decode(example.prompt) == f"<user>\n{task}\n<assistant>\n"
    assert tokenizer.decode(example.answer) == "return a + b<|endoftext|>"
    assert example.answer[-1] == tokenizer.eos_token_id
    assert len(example) == len(example.prompt) + len(example.answer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}{{ '>' if add_generation_prompt }}", "does not continue its own prompt"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "ends an answer with 'return a', without"),
    ],
)
def test_templates_that_cannot_be_learned(tokenizer, template, message):
    from examples.sft.chat import encode
    from examples.sft.functions import Pair

    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, [Pair("def f(a):", "return a")])


@pytest.mark.parametrize("ranks", [2, 4])
def test_batches_are_the_same_on_any_number_of_ranks(functions, tokenizer, ranks):
    def batches(split, rank, count):
        """Return the batches of two epochs that a rank gets."""
        data = loaded_data(functions, tokenizer, rank, count)
        loader = data.train_dataloader() if split == "train" else data.val_dataloader()
        return [batch["input_ids"] for _ in range(2) for batch in loader]

    rows = loaded_data(functions, tokenizer).rows
    for split in ("train", "val"):
        alone = batches(split, 0, 1)
        parts = [batches(split, rank, ranks) for rank in range(ranks)]
        together = [torch.cat(batch) for batch in zip(*parts, strict=True)]
        assert [sorted(batch.tolist()) for batch in together] == [sorted(batch.tolist()) for batch in alone]
        assert len(alone) == 2 * (len(rows[split]["labels"]) // 4)
        half = len(alone) // 2
        assert (alone[0].tolist() == alone[half].tolist()) is (split == "val")
    # All rows of validation are in a batch.
    assert len(rows["val"]["labels"]) % 4 == 0


def test_training_continues_with_the_next_rows(functions, tokenizer):
    whole = loaded_data(functions, tokenizer).train_dataloader()
    everything = [batch["input_ids"].tolist() for batch in whole]
    data = loaded_data(functions, tokenizer)
    loader = data.train_dataloader()
    first = [batch["input_ids"].tolist() for _, batch in zip(range(3), loader, strict=False)]
    resumed = loaded_data(functions, tokenizer)
    resumed.load_state_dict(data.state_dict())
    rest = [batch["input_ids"].tolist() for batch in resumed.train_dataloader()]
    assert first + rest == everything


def test_folders_without_enough_functions(functions, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="do not suffice") as refused:
        loaded_data(functions, tokenizer, max_length=20)
    for split, count in (("train", 105), ("val", 15)):
        assert f"0 of {count} {split} functions have at most 20 tokens, half at most " in str(refused.value)
    with pytest.raises(ValueError, match="105 of 105 .* less than the 64 of a batch on all"):
        loaded_data(functions, tokenizer, batch_size=64)
    for path in functions.iterdir():
        path.write_text("x = 1")
    with pytest.raises(ValueError, match="No train file has a function .*\n- No val file has a function"):
        loaded_data(functions, tokenizer)


def test_one_message_says_everything_that_is_wrong(functions, tokenizer):
    from examples.sft.generation import ParseRate

    rate = ParseRate(max_new_tokens=100)
    with pytest.raises(ValueError, match="do not suffice, or do not fit") as refused:
        loaded_data(functions, tokenizer, max_length=130, batch_size=64, callbacks=[rate])
    _, *wrong = str(refused.value).split("\n- ")
    assert len(wrong) == 3
    assert "train functions have at most 130 tokens" in wrong[0]
    assert "`max_length` is 130, the model's `max_position_embeddings` only 128" in wrong[1]
    assert "a prompt of at most 30 tokens and an answer of at most 100: change `max_new_tokens`" in wrong[2]


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", 0), ("max_length", 1), ("max_length", 600), ("val_fraction", 1.0), ("max_chars", 0)],
)
def test_settings_out_of_range(option, value):
    from examples.sft.data import FunctionsDataModule

    with pytest.raises(ValueError, match=f"`{option}` must be .*{value}"):
        FunctionsDataModule(**{option: value})


def test_tasks_of_the_parse_rate(functions, tokenizer):
    from examples.sft.generation import ParseRate

    data = loaded_data(functions, tokenizer)
    trainer = SimpleNamespace(datamodule=data)
    rate = ParseRate(num_tasks=4, max_new_tokens=30)
    rate.setup(trainer, None, "validate")
    assert len(rate.tasks) == 4
    assert all(len(task.answer) <= 30 and len(task.prompt) <= 98 for task in rate.tasks)
    assert set(map(len, (task.answer for task in data.examples["val"]))) > set(map(len, (t.answer for t in rate.tasks)))
    with pytest.raises(ValueError, match="prompt of at most 28 tokens and an answer of at most 100"):
        ParseRate(max_new_tokens=100).setup(trainer, None, "validate")
    for option in ("num_tasks", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"`{option}` must be at least 1, got 0"):
            ParseRate(**{option: 0})
