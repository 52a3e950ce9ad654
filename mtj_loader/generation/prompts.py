"""Reads, tokenizes and checks prompts."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import TypeGuard

import jax
import numpy as np
from numpy.typing import ArrayLike

from mtj_loader.display import show_value
from mtj_loader.errors import PromptError, TokenizerMissingError
from mtj_loader.generation.tokenizer import Tokenizer

_FORMS = "a string, a list of token ids, or a list of these"
_MARGIN_TOKENS = 1_000  # more than the last word of a text can have, in published vocabularies
_CHARS_PER_TOKEN = 6  # of text in few tokens: English has four to five


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      ids: at least one token.
      is_text: it was given as text, so the result is text.
      text: what was given; None for ids.
    """

    ids: tuple[int, ...]
    is_text: bool
    text: str | None = None


PromptLike = str | Sequence[int] | np.ndarray | jax.Array | Prompt


@dataclass(frozen=True)
class PromptRules:
    """What a model accepts as a prompt.

    Attributes:
      vocab_size: valid ids are 0 to one less.
      max_positions: the limit for the prompt plus the generated tokens.
      tokenizer: None allows only token ids.
      bos_id: replaces an empty text; None rejects it.
      missing: why there is no tokenizer, if the checkpoint has the files of one.
    """

    vocab_size: int
    max_positions: int
    tokenizer: Tokenizer | None = None
    bos_id: int | None = None
    missing: TokenizerMissingError | None = None

    def require_tokenizer(self, what: str, *, key: str) -> Tokenizer:
        """The tokenizer that the argument `key` needs.

        Raises:
          TokenizerMissingError: `missing`, or `what` if the checkpoint has no tokenizer files.
        """
        if self.tokenizer is None:
            error = self.missing or TokenizerMissingError(what, key=key, hint="pass token ids")
            raise error.with_traceback(None)  # `missing` is raised each time
        return self.tokenizer


def read_prompts(
    prompts: PromptLike | Sequence[PromptLike], rules: PromptRules, max_new_tokens: int
) -> tuple[list[Prompt], bool]:
    """Reads prompts and converts them to token ids.

    Args:
      prompts: a string, token ids (a sequence or an array of integers), a `Prompt`, which is not
        tokenized again, or a list of these.
      rules: what the model accepts.
      max_new_tokens: the room that each prompt must leave.

    Returns:
      The prompts, and whether a list of prompts was given, so that a list must be returned.

    Raises:
      PromptError: an id outside the vocabulary, an empty or too long prompt, or a list that mixes
        ids and prompts.
      TokenizerMissingError: text without a tokenizer.
    """
    for name, length in _lengths(prompts).items():
        if length > rules.max_positions:  # refused before the ids are looked at
            _check_length(name, length, max_new_tokens, rules.max_positions)
    plain = _to_lists(prompts)
    items = _split_prompts(plain)
    named = {"prompt": plain} if items is None else {f"prompts[{i}]": p for i, p in items}
    room = rules.max_positions - max_new_tokens
    read = [_read(item, name, rules, room) for name, item in named.items()]
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


def _lengths(prompts: object) -> dict[str, int]:
    """The lengths of prompts of token ids, by name, without a look at every id."""
    if _is_ids(prompts):
        return {"prompt": len(prompts)}
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        return {}
    return {f"prompts[{i}]": len(item) for i, item in enumerate(prompts) if _is_ids(item)}


def _is_ids(value: object) -> TypeGuard[Sized]:
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 1
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or not value:
        return False
    return isinstance(value[0], int | np.integer)


def _to_lists(value: object, levels: int = 2) -> object:
    """Converts tuples and arrays to lists; returns anything else unchanged.

    A list of prompts has two levels; what a list of ids contains is checked as an id.
    """
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return value.tolist()
    if levels and isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_to_lists(item, levels - 1) for item in value]
    return value


def _split_prompts(plain: object) -> list[tuple[int, object]] | None:
    """The prompts of a list with their indices; None for a single prompt."""
    if isinstance(plain, str | Prompt):
        return None
    if not isinstance(plain, list):
        raise PromptError("not a prompt", expected=_FORMS, found=type(plain).__name__)
    if not plain:
        what = "an empty list is neither a prompt nor a list of prompts"
        raise PromptError(what, expected=_FORMS, hint="for an empty text pass an empty string")
    nested = [isinstance(item, str | list | Prompt) for item in plain]
    if any(nested) and not all(nested):
        what = "a list of prompts contains something else"
        raise PromptError(what, expected=_FORMS, found=show_value(plain[nested.index(False)]))
    return list(enumerate(plain)) if nested[0] else None


def _read(item: object, name: str, rules: PromptRules, room: int) -> Prompt:
    if isinstance(item, str):
        return Prompt(tuple(_encode(item, name, rules, room)), is_text=True, text=item)
    ids = list(item.ids) if isinstance(item, Prompt) else item
    if not isinstance(ids, list) or not ids:
        hint = "for an empty text pass an empty string"
        raise PromptError("the prompt is empty", key=name, expected="token ids", hint=hint)
    checked = tuple(_check_ids(ids, name, rules))
    return item if isinstance(item, Prompt) else Prompt(checked, is_text=False)


def _encode(text: str, name: str, rules: PromptRules, room: int) -> list[int]:
    what = "the prompt is text, but the checkpoint has no tokenizer"
    tokenizer = rules.require_tokenizer(what, key=name)
    if is_too_long(text, room, tokenizer):
        raise PromptError(
            "the prompt exceeds the model's context",
            key=name,
            expected=f"at most {room:,} tokens",
            found=f"a text of {len(text):,} characters",
        )
    ids = tokenizer.encode(text)
    if not ids and rules.bos_id is None:
        what = "the prompt is empty, and the checkpoint has no bos_token_id to start with"
        raise PromptError(what, key=name, expected="at least one token")
    return _check_ids(ids or [rules.bos_id], name, rules)


def is_too_long(text: str, room: int, tokenizer: Tokenizer) -> bool:
    """Whether the beginning of a text shows that the text has too many tokens.

    Tokenizing a megabyte takes two seconds. A longer text gives the tokens of its beginning
    again, except for the last word of the beginning, so a beginning with more than twice the
    allowed tokens settles it. False does not mean that the text fits.

    Args:
      text: of any length.
      room: the most tokens that it may have.
      tokenizer: of the model.
    """
    enough = 2 * max(room, 0) + _MARGIN_TOKENS
    length = _CHARS_PER_TOKEN * enough
    while 2 * length < len(text):
        if len(tokenizer.encode(text[:length])) > enough:
            return True
        length *= 4
    return False


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
    return PromptError(what, key=key, expected=expected, found=show_value(found))


def _check_length(name: str, prompt: int, max_new_tokens: int, max_positions: int) -> None:
    if prompt + max_new_tokens > max_positions:
        raise PromptError(
            "the prompt and the new tokens exceed the model's context",
            key=name,
            expected=f"at most {max_positions} tokens in total",
            found=f"{prompt} in the prompt + {max_new_tokens} new = {prompt + max_new_tokens}",
        )
