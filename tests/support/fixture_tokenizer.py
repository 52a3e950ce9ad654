"""The tokenizer of the checkpoint in tests/data."""

from __future__ import annotations

from pathlib import Path

from mtj_loader.generation.tokenizer import Tokenizer, load_tokenizer

FIXTURE = Path(__file__).parents[1] / "data" / "shakespeare-neox"


def load_fixture_tokenizer() -> Tokenizer:
    tokenizer = load_tokenizer({"tokenizer.json": FIXTURE / "tokenizer.json"})
    assert tokenizer is not None
    return tokenizer


TOKENIZER = load_fixture_tokenizer()
