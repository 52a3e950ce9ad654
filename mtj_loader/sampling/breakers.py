"""Token ids of DRY's sequence breakers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

from mtj_loader.display import show_value
from mtj_loader.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Breakers = str | Sequence[str] | Sequence[int] | None  # texts, or ids of tokens

DEFAULT_BREAKERS = ("\n", ":", '"', "*")  # koboldcpp's
MAX_BREAKERS = 128  # as koboldcpp


def check_breakers(breakers: object) -> None:
    """Raises UsageError unless the value is of the type `Breakers`."""
    values = [breakers] if isinstance(breakers, str) else breakers
    if values is None:
        return
    if not isinstance(values, list | tuple) or not any(
        all(isinstance(value, kind) for value in values) for kind in (str, Integral)
    ):
        raise _error(
            "not sequence breakers", "a list of texts, or of token ids", show_value(values)
        )


def token_texts(tokenizer: Tokenizer, ids: Sequence[int] | None = None) -> list[str]:
    """The text of every token, with the space that it starts with, special tokens included.

    Takes about a second for 250,000 tokens; a caller keeps the result.

    Args:
      tokenizer: decodes the tokens.
      ids: of the tokens; None for all.
    """
    ids = range(tokenizer.get_vocab_size()) if ids is None else ids
    alone = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    twice = tokenizer.decode_batch([[i, i] for i in ids], skip_special_tokens=False)
    # Some tokenizers drop the space before the first token of a text.
    return [two[len(one) :] for one, two in zip(alone, twice, strict=True)]


def default_breaker_tokens(texts: Sequence[str]) -> tuple[int, ...]:
    """The tokens of koboldcpp's breakers, without breakers that no token contains."""
    return breaker_tokens([b for b in DEFAULT_BREAKERS if any(b in t for t in texts)], texts)


def breaker_tokens(breakers: Iterable[str], texts: Sequence[str]) -> tuple[int, ...]:
    """The tokens whose text contains one of the breakers, as koboldcpp finds them.

    koboldcpp also finds breakers that extend over several tokens; those are refused here.

    Args:
      breakers: at most 128 texts.
      texts: of every token, from `token_texts`.

    Returns:
      Sorted ids.

    Raises:
      UsageError: there are too many breakers, or no token contains one of them.
    """
    breakers = list(dict.fromkeys(breakers))
    if len(breakers) > MAX_BREAKERS:
        expected = f"at most {MAX_BREAKERS} texts"
        raise _error("there are too many sequence breakers", expected, len(breakers))
    tokens: set[int] = set()
    for breaker in breakers:
        found = [i for i, text in enumerate(texts) if breaker and breaker in text]
        if not found:
            what = "a sequence breaker is not within a single token"
            raise _error(what, "texts that a token of the vocabulary contains", show_value(breaker))
        tokens.update(found)
    return tuple(sorted(tokens))


def _error(what: str, expected: str, found: object) -> UsageError:
    return UsageError(what, key="dry_sequence_breakers", expected=expected, found=found)
