"""Token ids of DRY's sequence breakers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

from mtj_loader.display import show_value
from mtj_loader.errors import UsageError

DEFAULT_BREAKERS = ("\n", ":", '"', "*")  # koboldcpp's
MAX_BREAKERS = 128  # as koboldcpp


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """The text of every token, with the space that it starts with, special tokens included.

    Takes about a second for 250,000 tokens; a caller keeps the result.
    """
    ids = range(tokenizer.get_vocab_size())
    alone = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    twice = tokenizer.decode_batch([[i, i] for i in ids], skip_special_tokens=False)
    # Some tokenizers drop the space before the first token of a text.
    return [two[len(one) :] for one, two in zip(alone, twice, strict=True)]


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
