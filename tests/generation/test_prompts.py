"""Prompts: what is accepted, and their length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from mtj_loader.errors import PromptError
from mtj_loader.generation.prompts import (
    Prompt,
    PromptRules,
    check_batch,
    read_prompts,
)
from tests.support.fixture_tokenizer import TOKENIZER

RULES = PromptRules(vocab_size=10, max_positions=8, tokenizer=TOKENIZER)
LOOP: list = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "(?s)an empty list is neither a prompt nor a list of prompts.*empty string"),
        ((), "an empty list is neither"),
        ([[1], []], r"(?s)the prompt is empty.*prompts\[1\]"),
        (["!", 3], "(?s)a list of prompts contains something else.*3"),
        ([3, [4]], "(?s)contains something else.*found: 3"),
        (5, "(?s)not a prompt.*a string, a list of token ids.*int"),
        (None, "(?s)not a prompt.*NoneType"),
        (b"ab", "(?s)not a prompt.*bytes"),
        (np.int32(3), "(?s)not a prompt.*int"),
        ({"a": 1}, "(?s)not a prompt.*dict"),
        ([1, 10], r"(?s)not a token id of this model.*prompt\[1\].*integer, 0 to 9.*found: 10"),
        ([[1], [2, -1]], r"(?s)not a token id.*prompts\[1\]\[1\].*found: -1"),
        ([True, 1], r"(?s)not a token id.*prompt\[0\].*True"),
        ([1, 2.0], r"(?s)not a token id.*prompt\[1\].*2.0"),
        (np.array([1.0]), "not a token id"),
        ([[[1]]], r"(?s)not a token id.*prompts\[0\]\[0\].*\[1\]"),
        (LOOP, r"(?s)not a token id.*prompts\[0\]\[0\].*\[\.\.\.\]"),
        ([10**5000], r"(?s)not a token id.*prompt\[0\].*too long to print"),
        (["!", 10**5000], "(?s)contains something else.*too long to print"),
        ([["x" * 10_000]], r"(?s)not a token id.*x{199}…$"),
        ("", "(?s)the prompt is empty, and the checkpoint has no bos_token_id"),
        ("zebra", r"(?s)not a token id of this model.*prompt\[0\]"),
        ([1, 2, 3, 4, 5], "(?s)exceed.*at most 8 tokens in total.*5 in the prompt . 4 new = 9"),
        ([[1], [2] * 9], r"(?s)exceed.*prompts\[1\].*9 in the prompt . 4 new"),
    ],
)
def test_invalid_prompts(given: object, message: str):
    with pytest.raises(PromptError, match=message):
        read_prompts(given, RULES, 4)  # pyright: ignore[reportArgumentType]


class BillionIds(Sequence):
    """Only the first may be read."""

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert index == 0
        return 1


@pytest.mark.parametrize("given", [BillionIds(), [BillionIds()]])
def test_the_length_of_a_prompt_is_checked_before_its_ids(given: list[int] | list[list[int]]):
    with pytest.raises(PromptError, match="exceed the model's context"):
        read_prompts(given, RULES, 4)


def test_a_prompt_may_use_all_positions():
    assert read_prompts([1, 2, 3, 4], RULES, 4) == ([Prompt((1, 2, 3, 4), False)], False)


def test_a_prompt_that_was_read_is_not_tokenized_again():
    (prompt,), _ = read_prompts(["!"], RULES, 4)
    without_tokenizer = replace(RULES, tokenizer=None)
    assert read_prompts(prompt, without_tokenizer, 4) == ([prompt], False)
    mixed = [prompt, [2, 3]]
    assert read_prompts(mixed, without_tokenizer, 4) == ([prompt, Prompt((2, 3), False)], True)
    with pytest.raises(PromptError, match=r"(?s)not a token id.*prompt\[0\].*12"):
        read_prompts(Prompt((12,), is_text=True), RULES, 4)


class CountingTokenizer:
    """Every word is a token; counts the characters that it reads."""

    chars = 0

    def encode(self, text: str) -> list[int]:
        self.chars += len(text)
        return [1] * len(text.split())


def long_rules() -> tuple[PromptRules, CountingTokenizer]:
    tokenizer = CountingTokenizer()
    return PromptRules(10, 2048, tokenizer), tokenizer  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("word", ["to be ", "s" * 20 + " ", "s" * 300 + " "])
def test_a_prompt_that_is_far_too_long_is_not_tokenized(word: str):
    rules, tokenizer = long_rules()
    with pytest.raises(PromptError, match=r"(?s)exceed.*prompts\[1\].*at most 2,044 tokens.*10,"):
        read_prompts(["!", word * (10_000_000 // len(word) + 1)], rules, 4)
    assert tokenizer.chars < 4_000_000


def test_a_long_text_of_few_tokens_is_not_too_long():
    rules, tokenizer = long_rules()
    text = "".join(("s" * 400 + " ") * 2044)
    (prompt,), _ = read_prompts(text, rules, 4)
    assert len(prompt.ids) == 2044
    assert tokenizer.chars < 2 * len(text)
    with pytest.raises(PromptError, match="2045 in the prompt"):
        read_prompts(text + "s", rules, 4)


def test_an_empty_text_becomes_the_bos_token():
    rules = replace(RULES, bos_id=3)
    assert read_prompts(["", "!"], rules, 4) == (
        [Prompt((3,), True, ""), Prompt((1,), True, "!")],
        True,
    )
    with pytest.raises(PromptError, match=r"(?s)not a token id.*12"):
        read_prompts("", replace(RULES, bos_id=12), 4)


# Batches for logits


def test_a_batch_of_ids_is_checked():
    checked = check_batch([[1, 2], [3, 9]], RULES)
    assert (checked.tolist(), checked.dtype) == ([[1, 2], [3, 9]], np.int32)
    assert check_batch(np.array([[7]], np.uint64), RULES).tolist() == [[7]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], r"(?s)not a batch of token ids.*integers \[batch, seq\].*int64 \[2\]"),
        ([[1], [2, 3]], "not a batch of token ids"),
        ([[1.0]], r"(?s)not a batch of token ids.*float64 \[1, 1\]"),
        ([[True]], "(?s)not a batch of token ids.*bool"),
        ([[]], "not a batch of token ids"),
        ("To be", "not a batch of token ids"),
        ([[1, 2], [3, 10]], r"(?s)not a token id.*ids\[1, 1\].*0 to 9.*10"),
        ([[1, -1]], r"(?s)not a token id.*ids\[0, 1\].*-1"),
        ([[1] * 9], "(?s)exceed.*at most 8 tokens.*9"),
    ],
)
def test_invalid_batches_of_ids(ids: object, message: str):
    with pytest.raises(PromptError, match=message):
        check_batch(ids, RULES)  # pyright: ignore[reportArgumentType]
