"""Reads and checks the prompts that callers pass, and converts them to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from numpy.typing import ArrayLike

from mtj_loader.errors import PromptError, TokenizerMissingError
from mtj_loader.generation.tokenizer import Tokenizer

PromptLike = str | Sequence[int] | np.ndarray | jax.Array

_FORMS = "a string, a list of token ids, or a list of these"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      ids: at least one token.
      is_text: it was given as text, so the result is text.
    """

    ids: tuple[int, ...]
    is_text: bool


@dataclass(frozen=True)
class PromptRules:
    """What a model accepts as a prompt.

    Attributes:
      vocab_size: valid ids are 0 to one less.
      max_positions: the limit for the prompt plus the generated tokens.
      tokenizer: None allows only token ids.
      bos_id: replaces an empty text; None rejects it.
    """

    vocab_size: int
    max_positions: int
    tokenizer: Tokenizer | None = None
    bos_id: int | None = None


def read_prompts(
    prompts: PromptLike | Sequence[PromptLike], rules: PromptRules, max_new_tokens: int
) -> tuple[list[Prompt], bool]:
    """Reads prompts and converts them to token ids.

    Args:
      prompts: a string, token ids (a sequence or an array of integers), or a list of these.
      rules: what the model accepts.
      max_new_tokens: the room that each prompt must leave.

    Returns:
      The prompts, and whether a list of prompts was given, so that a list must be returned.

    Raises:
      PromptError: an id outside the vocabulary, an empty or too long prompt, or a list that mixes
        ids and prompts.
      TokenizerMissingError: text without a tokenizer.
    """
    plain = _to_lists(prompts)
    items = _split_prompts(plain)
    named = {"prompt": plain} if items is None else {f"prompts[{i}]": p for i, p in items}
    read = [_read(item, name, rules) for name, item in named.items()]
    for name, prompt in zip(named, read, strict=True):
        _check_length(name, len(prompt.ids), max_new_tokens, rules.max_positions)
    return read, items is not None


def check_batch(ids: ArrayLike, rules: PromptRules) -> np.ndarray:
    """Checks token ids [batch, seq] and returns them as int32.

    Raises:
      PromptError: another shape, no tokens, an id outside the vocabulary, or too long.
    """
    try:
        array: np.ndarray = np.asarray(ids)
    except ValueError:  # rows of unequal length
        array = np.empty(0, object)
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        found = f"{array.dtype} {list(array.shape)}"
        raise PromptError("not a batch of token ids", expected="integers [batch, seq]", found=found)
    outside = np.argwhere((array < 0) | (array >= rules.vocab_size))
    if len(outside):
        first = tuple(outside[0].tolist())
        raise _invalid_id(f"ids{list(first)}", array[first].item(), rules)
    _check_length("ids", array.shape[1], 0, rules.max_positions)
    return array.astype(np.int32)


def _to_lists(value: object) -> object:
    """Converts tuples and arrays to lists; returns anything else unchanged."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_to_lists(item) for item in value]
    return value


def _split_prompts(plain: object) -> list[tuple[int, object]] | None:
    """The prompts of a list with their indices; None for a single prompt."""
    if isinstance(plain, str):
        return None
    if not isinstance(plain, list):
        raise PromptError("not a prompt", expected=_FORMS, found=type(plain).__name__)
    if not plain:
        what = "an empty list is neither a prompt nor a list of prompts"
        raise PromptError(what, expected=_FORMS, hint="for an empty text pass an empty string")
    nested = [isinstance(item, str | list) for item in plain]
    if any(nested) and not all(nested):
        what = "a list of prompts contains something else"
        raise PromptError(what, expected=_FORMS, found=repr(plain[nested.index(False)]))
    return list(enumerate(plain)) if nested[0] else None


def _read(item: object, name: str, rules: PromptRules) -> Prompt:
    if isinstance(item, str):
        return Prompt(tuple(_encode(item, name, rules)), is_text=True)
    ids = item if isinstance(item, list) else []
    if not ids:
        hint = "for an empty text pass an empty string"
        raise PromptError("the prompt is empty", key=name, expected="token ids", hint=hint)
    return Prompt(tuple(_check_ids(ids, name, rules)), is_text=False)


def _encode(text: str, name: str, rules: PromptRules) -> list[int]:
    if rules.tokenizer is None:
        what = "the prompt is text, but the checkpoint has no tokenizer"
        raise TokenizerMissingError(what, key=name, hint="pass token ids")
    ids = rules.tokenizer.encode(text)
    if not ids and rules.bos_id is None:
        what = "the prompt is empty, and the checkpoint has no bos_token_id to start with"
        raise PromptError(what, key=name, expected="at least one token")
    return _check_ids(ids or [rules.bos_id], name, rules)


def _check_ids(ids: Sequence[object], name: str, rules: PromptRules) -> list[int]:
    checked = []
    for position, number in enumerate(ids):
        if type(number) is not int or not 0 <= number < rules.vocab_size:  # a bool is not an id
            raise _invalid_id(f"{name}[{position}]", number, rules)
        checked.append(number)
    return checked


def _invalid_id(key: str, found: object, rules: PromptRules) -> PromptError:
    expected = f"an integer, 0 to {rules.vocab_size - 1}"
    what = "not a token id of this model"
    return PromptError(what, key=key, expected=expected, found=repr(found))


def _check_length(name: str, prompt: int, max_new_tokens: int, max_positions: int) -> None:
    if prompt + max_new_tokens > max_positions:
        raise PromptError(
            "the prompt and the new tokens exceed the model's context",
            key=name,
            expected=f"at most {max_positions} tokens in total",
            found=f"{prompt} in the prompt + {max_new_tokens} new = {prompt + max_new_tokens}",
        )
