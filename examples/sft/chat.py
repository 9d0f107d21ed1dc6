"""Tokens of tasks and answers under the chat template of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from examples.sft.functions import Pair

# For tokenizers that have no template of their own. It needs no tokens that the model does not have yet.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}"
    "{{ '<assistant>\n' if add_generation_prompt }}"
)


class Example(NamedTuple):
    """A pair and its tokens.

    Attributes:
        pair: The text.
        prompt: Tokens up to where the answer begins, as a generation gets them.
        answer: Tokens of the answer, and of what ends it.
    """

    pair: Pair
    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.prompt) + len(self.answer)


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[Example]:
    """Return the tokens of pairs.

    Prompt and answer are tokenized apart, because a generation continues from the tokens of the prompt: a token that
    crosses the border would never be generated.

    Args:
        tokenizer: A tokenizer with a chat template.
        pairs: The texts.

    Raises:
        ValueError: If the template does not write the answer after the prompt, or does not end it with ``eos_token``.
    """
    if not pairs:
        return []  # a template refuses to write nothing
    tasks = [[{"role": "user", "content": pair.task}] for pair in pairs]
    chats = [[*task, {"role": "assistant", "content": pair.answer}] for task, pair in zip(tasks, pairs, strict=True)]
    prompts = tokenizer.apply_chat_template(tasks, tokenize=False, add_generation_prompt=True)
    answers = []
    for prompt, chat in zip(prompts, tokenizer.apply_chat_template(chats, tokenize=False), strict=True):
        answer = chat.removeprefix(prompt)
        if answer == chat:
            raise ValueError(
                f"The tokenizer's chat template does not continue its own prompt {prompt[-40:]!r}: with an answer, it "
                f"writes {chat[-80:]!r}. Give the tokenizer another `chat_template`."
            )
        if not tokenizer.eos_token or tokenizer.eos_token not in answer:
            raise ValueError(
                f"The tokenizer's chat template ends an answer with {answer[-20:]!r}, without the tokenizer's "
                f"`eos_token` {tokenizer.eos_token!r}, so no answer would ever end. Change one of them."
            )
        answers.append(answer)
    # The template has written the special tokens already.
    tokens = [tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, answers)]
    return [Example(*each) for each in zip(pairs, *tokens, strict=True)]
