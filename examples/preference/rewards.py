"""A reward that Python's own parser verifies."""

from __future__ import annotations

import bisect
import re
from typing import Any

from examples.sft.functions import check_function

# A line that is not indented is the first one after the function.
_AFTER = re.compile(r"^\S", re.MULTILINE)


def completion_length(tokenizer: Any, tokens: list[int]) -> int:
    """Return how many tokens a completion has, with the one that ends it.

    A completion ends with the tokenizer's end of text, or with the first token that starts a line without indentation.

    Args:
        tokenizer: From transformers.
        tokens: What a model drew.
    """
    end = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else len(tokens)
    # If a text has such a line, every longer text has it.
    lengths = range(1, end + 1)
    first = bisect.bisect_left(lengths, True, key=lambda n: bool(_AFTER.search(_text(tokenizer, tokens[:n]))))
    return min(first + 1, end)


def body_of(tokenizer: Any, tokens: list[int]) -> str:
    """Return the body that a completion writes: complete lines only, up to the first one without indentation.

    Args:
        tokenizer: From transformers.
        tokens: What a model drew, up to its `completion_length`.
    """
    text = _text(tokenizer, tokens)
    after = _AFTER.search(text)
    if after:
        return text[: after.start()]
    return text if tokens[-1] == tokenizer.eos_token_id else text[: text.rfind("\n") + 1]


def syntax_reward(prompt: str, body: str) -> float:
    """Return how much of a function's body is valid Python, between 0 and 1.

    It is 1 where `check_function` finds nothing, as for the rate of fine-tuning. Otherwise it is the share of the
    body's lines before the line of the first syntax error, without blank lines and comments, and less than 1. It says
    nothing of what the function does: ``return None`` earns as much as a correct body.

    Args:
        prompt: Signature and docstring, with the last newline.
        body: What comes after them.
    """
    lines = body.split("\n")
    code = [bool(line.strip()) and not line.strip().startswith("#") for line in lines]
    if not any(code):
        return 0.0
    try:
        check_function(prompt + body)
    except SyntaxError as error:
        valid = (error.lineno or 0) - 1 - prompt.count("\n")
        return min(sum(code[: max(valid, 0)]), sum(code) - 1) / sum(code)
    return 1.0


def _text(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
