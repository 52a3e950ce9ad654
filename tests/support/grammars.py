"""Random outputs under the masks of a grammar."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from mtj_loader.generation.tokenizer import Tokenizer
from mtj_loader.grammar.compile_grammar import Grammar, read_grammar
from mtj_loader.grammar.matcher import Matcher
from tests.support.fixture_tokenizer import TOKENIZER

VOCAB_SIZE = TOKENIZER.backend.get_vocab_size() + 37  # the model's may be larger
EOS = frozenset({0, VOCAB_SIZE - 1})


def compile_gbnf(text: str, **kwargs: object) -> Grammar:
    return _read(text, None, **kwargs)


def compile_schema(schema: object, **kwargs: object) -> Grammar:
    return _read(None, schema, **kwargs)


def _read(gbnf, schema, *, tokenizer=TOKENIZER, eos=EOS, vocab_size=VOCAB_SIZE) -> Grammar:
    return read_grammar(gbnf, schema, tokenizer, eos, vocab_size)


def read_mask(matcher: Matcher, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """The allowed tokens: bool [V]."""
    words = np.full(-(-vocab_size // 32), 0xA5A5A5A5, np.uint32)
    matcher.mask(words)
    bits = (words[np.arange(32 * words.size) // 32] >> (np.arange(32 * words.size) % 32)) & 1
    assert not bits[vocab_size:].any()
    return bits[:vocab_size].astype(bool)


@dataclass(frozen=True)
class Walk:
    ids: list[int]
    text: str
    complete: bool


def walk(
    grammar: Grammar,
    seed: int,
    *,
    tokenizer: Tokenizer = TOKENIZER,
    eos: Collection[int] = EOS,
    vocab_size: int = VOCAB_SIZE,
    max_tokens: int = 40,
) -> Walk:
    """An output of random tokens, until it ends or has `max_tokens`."""
    chooser, matcher, ids = random.Random(seed), grammar.start(), []
    while len(ids) < max_tokens and not matcher.finished:
        mask = read_mask(matcher, vocab_size)
        allowed = np.flatnonzero(mask).tolist()
        ends = [token for token in allowed if token in eos]
        # Ends seldom, or most outputs would have a few characters.
        token = chooser.choice(ends if ends and chooser.random() < 0.2 else allowed)
        matcher.advance(token)
        if token in eos:
            assert matcher.finished
            return Walk(ids, tokenizer.decode(ids), complete=True)
        ids.append(token)
    return Walk(ids, tokenizer.decode(ids), complete=matcher.finished)


def accepts(grammar: Grammar, text: str, *, tokenizer: Tokenizer = TOKENIZER) -> bool:
    """Whether a grammar accepts a text and may end after it."""
    matcher = grammar.start()
    for token in tokenizer.encode(text):
        if not read_mask(matcher)[token]:
            return False
        matcher.advance(token)
    return bool(read_mask(matcher)[min(EOS)])
