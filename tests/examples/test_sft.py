import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")
pytest.importorskip("peft", exc_type=ImportError)

from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import lightning_memopt as lm
from tests._ranks import run_ranks
from tests.examples._run import RECIPES, ROOT, configs, fit_on_ranks

pytestmark = pytest.mark.slow

SFT, LORA = ("sft/sft.yaml",), ("sft/lora.yaml",)
OVERLAYS = [(*SFT, f"sft/{recipe}.yaml") for recipe in RECIPES]
LEAN = (*SFT, "sft/adapm_lean.yaml")
FUNCTION = 'def {name}(a, b):\n    """Return {name} of two numbers."""\n    {body}\n'


@pytest.fixture
def functions(tmp_path):
    """Return a folder with 40 files of three functions, whose answers have different lengths."""
    folder = tmp_path / "functions"
    folder.mkdir()
    for number in range(40):
        bodies = ("return a", f"return a + {number} * b", f"if a:\n        return b\n    return {number}")
        texts = (FUNCTION.format(name=f"f{number}{'xyz'[i]}", body=body) for i, body in enumerate(bodies))
        (folder / f"{number}.py").write_text("\n\n".join(texts))
    return folder


@pytest.fixture
def small(functions, transformers_folder, tmp_path):
    """Return arguments that make a config quick: three steps, then a validation."""
    return [
        f"--data.root={functions}", f"--model.path={transformers_folder}", f"--model.save_dir={tmp_path / 'saved'}",
        "--data.seq_len=256", "--data.batch_size=4", "--trainer.val_check_interval=3",
        "--trainer.check_val_every_n_epoch=null", "--trainer.logger=false",
    ]  # fmt: skip


@pytest.fixture
def tokenizer(transformers_folder):
    from examples.sft.chat import CHAT_TEMPLATE

    found = AutoTokenizer.from_pretrained(transformers_folder)
    found.chat_template = CHAT_TEMPLATE
    return found


def loaded_data(functions, tokenizer, **options):
    """Return the data module as a trainer on one process leaves it."""
    from examples.sft.data import FunctionsDataModule

    data = FunctionsDataModule(str(functions), **{"seq_len": 256, "batch_size": 4, **options})
    module = SimpleNamespace(tokenizer=tokenizer)
    data.trainer = SimpleNamespace(lightning_module=module, distributed_sampler_kwargs=None)
    data.prepare_data()
    data.setup()
    return data


def whole(folder):
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return {name.replace(".base_layer", ""): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("names", [SFT, LORA, *OVERLAYS], ids=lambda names: Path(names[-1]).stem)
def test_every_config_trains(names, small, fit, transformers_folder, tmp_path):
    cli = fit(*configs(*names), *small)
    assert cli.trainer.global_step == 3
    assert cli.trainer.callback_metrics["val_loss"].isfinite()
    assert 0 <= cli.trainer.callback_metrics["parses"] <= 1
    (optimizer,) = cli.trainer.optimizers
    before, after = whole(transformers_folder), whole(tmp_path / "saved")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if names == LORA:
        assert {block.role for block in optimizer.snapshot().blocks} == {"lora"}
        # transformers loads the model that was adapted, and adds the adapter.
        assert (tmp_path / "saved" / "adapter_config.json").is_file()
        assert not changed
        assert any("lora_B" in name and tensor.any() for name, tensor in after.items())
    else:
        assert isinstance(optimizer, torch.optim.AdamW if names[-1] == "sft/adamw.yaml" else lm.MemOpt)
        assert changed == set(before)
    template = AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template
    assert template == cli.model.tokenizer.chat_template
    assert (tmp_path / "runs" / names[0][4:-5] / "last.ckpt").exists()


def passes(task, answer):
    return "x(" in task


def on_ranks(rank, world_size, commands, folder):
    """Run the commands; answers pass by their task, because what three steps have taught is not Python."""
    sys.path.insert(0, str(ROOT))
    from lightning.pytorch.cli import LightningCLI

    from examples.sft import generation

    generation.parses = passes
    fit = {"fit": LightningCLI.subcommands()["fit"]}  # as `keep_parsers`
    LightningCLI.subcommands = staticmethod(lambda: fit)
    return fit_on_ranks(rank, world_size, commands, folder)


def test_two_ranks_train_and_report_as_one_process(small, fit, tmp_path, monkeypatch):
    # Of one task, the second rank gets none; of three, it gets one.
    rates = {n: {"class_path": "examples.sft.generation.ParseRate", "init_args": {"num_tasks": n}} for n in (1, 3)}
    few = {n: f"--trainer.callbacks={json.dumps([rate])}" for n, rate in rates.items()}
    commands = [[*configs(*LORA), *small, few[1]], *([*configs(*names), *small] for names in OVERLAYS if names != LEAN)]
    commands += [[*configs(*LEAN), *small, few[3]]]
    found, other = run_ranks(on_ranks, 2, commands, str(tmp_path))
    assert found == other
    assert all(run["steps"] == 3 and run["sharded"] == 1 for run in found)
    assert found[0]["metrics"]["parses"] in (0, 1)
    sharded = whole(tmp_path / "saved")
    monkeypatch.setattr("examples.sft.generation.parses", passes)
    alone = {name: value.item() for name, value in fit(*commands[-1]).trainer.callback_metrics.items()}
    assert found[-1]["metrics"] == pytest.approx(alone, rel=1e-4)
    assert 0 < alone["parses"] < 1
    for name, tensor in whole(tmp_path / "saved").items():
        torch.testing.assert_close(
            sharded[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, of=name: f"{of}: {text}"
        )


def test_a_folder_that_is_no_model(small, fit, transformers_folder, tmp_path):
    with pytest.raises(ValueError, match=r"'nowhere' does not exist: run the pretraining example first, or give a"):
        fit(*configs(*SFT), *small, "--model.path=nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no tokenizer_config.json: run the pretraining example first"):
        fit(*configs(*SFT), *small, f"--model.path={tmp_path}")


def test_pairs_longer_than_the_model_are_refused(small, fit):
    with pytest.raises(ValueError, match="`max_length` is 200, the model's `max_position_embeddings` only 128"):
        fit(*configs(*SFT), *small, "--data.max_length=200")


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
'''


def test_pairs_are_functions_with_a_docstring_and_a_body():
    from examples.sft.functions import pairs_of, parses

    pairs = pairs_of(SOURCE)
    assert [pair.task.splitlines()[0] for pair in pairs] == [
        "def top(self) -> int:", "async def wait(seconds, *, clock=None):", "def inner():"
    ]  # fmt: skip
    top, wait, _ = pairs
    assert top.task == 'def top(self) -> int:\n    """Return the last one."""'
    assert top.answer == ("# It may be missing.\nif not self.items:\n    return None\n\nreturn self.items[-1]")
    assert wait.task.endswith('\n\n    And wait.\n    """')
    assert all(parses(*pair) for pair in pairs)
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


def test_a_template_of_the_folder_is_used(small, fit, transformers_folder, tmp_path):
    theirs = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
    theirs += "{{ '[assistant]' if add_generation_prompt }}"
    folder = tmp_path / "with_template"
    tokenizer = AutoTokenizer.from_pretrained(transformers_folder)
    tokenizer.chat_template = theirs
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(transformers_folder).save_pretrained(folder)
    cli = fit(*configs(*SFT), *small, f"--model.path={folder}")
    example = cli.datamodule.examples["train"][0]
    assert tokenizer.decode(example.prompt) == f"[user]{example.pair.task}<|endoftext|>[assistant]"
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == theirs


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
        from transformers import LlamaConfig, LlamaForCausalLM

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


@pytest.mark.parametrize("ranks", [2, 4])
def test_batches_are_the_same_on_any_number_of_ranks(functions, tokenizer, ranks):
    data = loaded_data(functions, tokenizer)

    def batches(split, rank, count):
        """Return the batches of two epochs that a rank gets."""
        data.trainer.distributed_sampler_kwargs = {"num_replicas": count, "rank": rank} if count > 1 else None
        loader = data.train_dataloader() if split == "train" else data.val_dataloader()
        return [batch["input_ids"] for _ in range(2) for batch in loader]

    for split in ("train", "val"):
        alone = batches(split, 0, 1)
        parts = [batches(split, rank, ranks) for rank in range(ranks)]
        together = [torch.cat(batch) for batch in zip(*parts, strict=True)]
        assert [sorted(batch.tolist()) for batch in together] == [sorted(batch.tolist()) for batch in alone]
        assert len(alone) == 2 * (len(data.rows[split]["labels"]) // 4)
        half = len(alone) // 2
        assert (alone[0].tolist() == alone[half].tolist()) is (split == "val")
    # All rows of validation are in a batch.
    assert len(data.rows["val"]["labels"]) % 4 == 0


def test_training_continues_with_the_next_rows(functions, tokenizer):
    data = loaded_data(functions, tokenizer)
    everything = [batch["input_ids"].tolist() for batch in data.train_dataloader()]
    loader = data.train_dataloader()
    first = [batch["input_ids"].tolist() for _, batch in zip(range(3), loader, strict=False)]
    state = loader.state_dict()
    again = data.train_dataloader()
    again.load_state_dict(state)
    assert first + [batch["input_ids"].tolist() for batch in again] == everything


def test_a_batch_that_ranks_cannot_divide(functions, tokenizer):
    data = loaded_data(functions, tokenizer)
    data.trainer.distributed_sampler_kwargs = {"num_replicas": 3, "rank": 0}
    with pytest.raises(ValueError, match="a multiple of their number, which is 3, got 4"):
        data.train_dataloader()


def test_folders_without_enough_functions(functions, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="105 train functions .*, 0 have at most 20 tokens. They fill 0 rows of 256"):
        loaded_data(functions, tokenizer, max_length=20)
    with pytest.raises(ValueError, match="105 have .*, less than a batch of 64"):
        loaded_data(functions, tokenizer, batch_size=64)
    for path in functions.iterdir():
        path.write_text("x = 1")
    with pytest.raises(ValueError, match="train files of .* have no function with a docstring"):
        loaded_data(functions, tokenizer)


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", 0), ("max_length", 1), ("max_length", 600), ("val_fraction", 1.0), ("max_chars", 0)],
)
def test_settings_out_of_range(option, value):
    from examples.sft.data import FunctionsDataModule

    with pytest.raises(ValueError, match=f"`{option}` must be .*{value}"):
        FunctionsDataModule(**{option: value})


@pytest.mark.parametrize("adapters", [False, True])
@torch.no_grad()
def test_generation_is_that_of_transformers(adapters):
    from peft import LoraConfig, get_peft_model

    from examples.sft.generation import generate

    model = tiny_model("llama")
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")).eval()
    prompts = [example.prompt for example in examples_of([(3, 0), (7, 0), (1, 0)])]
    found = generate(model, prompts, 6, length=9, pad=0)
    for prompt, answer in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": [], "pad_token_id": 0}
        expected = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
        assert answer.tolist() == expected[0, len(prompt) :].tolist()


def test_answers_end_at_the_first_end():
    from examples.sft.generation import until

    assert until([5, 6, 0, 7, 0], 0) == [5, 6]
    assert until([5, 6], 0) == [5, 6]


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
