"""The text that masks allow is the text that the tokenizer decodes to."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from mtj_loader.errors import GrammarError, UsageError
from mtj_loader.generation.tokenizer import Tokenizer
from mtj_loader.grammar import token_texts
from mtj_loader.grammar.token_texts import get_token_trie, read_token_texts
from tests.support.grammars import compile_gbnf, walk
from tests.support.tokenizers import CASES, load_case

PATTERN = re.compile(r" ?([a-z]+|é|日本)(, [a-zé ]+)*")
GBNF = 'root ::= " "? ([a-z]+ | "é" | "日本") (", " [a-zé ]+)*'


@pytest.mark.parametrize("name", CASES)
def test_token_texts_joined_are_the_decoded_text(name: str, tmp_path: Path) -> None:
    tokenizer = load_case(name, tmp_path)
    size = tokenizer.backend.get_vocab_size()
    first, later = read_token_texts(tokenizer, size)
    chooser, compared = random.Random(0), 0
    for _ in range(1_000):
        ids = chooser.choices([token for token in range(size) if later[token]], k=5)
        joined = first[ids[0]] + b"".join(later[token] for token in ids[1:])
        if not first[ids[0]] or joined.decode(errors="ignore").encode() != joined:
            continue  # not UTF-8, which grammars do not allow
        compared += 1
        assert tokenizer.decode(ids) == joined.decode()
    assert compared > 20


# One of each kind: byte-level; SentencePiece with and without a first space that is dropped, with
# and without tokens for bytes.
@pytest.mark.parametrize(
    "name",
    ["neox", "json_llama_3", "llama", "mistral", "json_llama_without_bytes", "unigram_bytes"],
)
def test_outputs_match_as_decoded(name: str, tmp_path: Path) -> None:
    tokenizer = load_case(name, tmp_path)
    size = tokenizer.backend.get_vocab_size()
    args = {"tokenizer": tokenizer, "vocab_size": size, "eos": {2}}
    grammar, leading = compile_gbnf(GBNF, **args), 0
    for seed in range(30):
        output = walk(grammar, seed, **args)
        if output.complete:
            assert PATTERN.fullmatch(output.text), output
            leading += output.text[0] == " "
    # This decoder drops all spaces of the first token, and no other token begins with a space.
    assert (leading == 0) == (name == "json_llama_without_bytes")


def test_a_first_space_that_the_decoder_drops_is_not_part_of_the_text(tmp_path: Path) -> None:
    tokenizer = load_case("llama", tmp_path)
    args = {"tokenizer": tokenizer, "vocab_size": tokenizer.backend.get_vocab_size(), "eos": {2}}
    matcher = compile_gbnf("root ::= [a-z]+", **args).start()
    token = tokenizer.backend.token_to_id("▁w")
    matcher.advance(token)
    with pytest.raises(GrammarError):
        matcher.advance(token)
    matcher.rollback(1)
    matcher.advance(token)  # at the beginning again


def test_special_tokens_are_never_text(tmp_path: Path) -> None:
    tokenizer = load_case("llama", tmp_path)
    args = {"tokenizer": tokenizer, "vocab_size": tokenizer.backend.get_vocab_size(), "eos": {2}}
    with pytest.raises(GrammarError):
        compile_gbnf("root ::= .*", **args).start().advance(1)


def test_the_trie_is_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    build = token_texts._build
    monkeypatch.setattr(token_texts, "_build", lambda *args: calls.append(args) or build(*args))
    tokenizer = load_case("gpt2", tmp_path)
    assert get_token_trie(tokenizer, 500) is get_token_trie(tokenizer, 500)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "decoder", [decoders.WordPiece(), decoders.BPEDecoder(), decoders.Strip(" ", 0, 1)]
)
def test_decoders_whose_text_depends_on_neighbors_are_refused(decoder: decoders.Decoder) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    backend.decoder = decoder
    with pytest.raises(GrammarError, match="do not support the decoder"):
        read_token_texts(Tokenizer(backend), 2)


def test_without_a_decoder_tokens_are_joined_with_spaces() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    assert read_token_texts(Tokenizer(backend), 2) == ([b"a", b"b"], [b" a", b" b"])


def test_very_long_tokens_are_left_out() -> None:
    vocab = {"a": 0, "b" * 2_000: 1, "c": 2}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, "a"))
    backend.decoder = decoders.Fuse()
    tokenizer = Tokenizer(backend)
    assert read_token_texts(tokenizer, 3) == ([b"a", b"", b"c"],) * 2
    get_token_trie(tokenizer, 3)


def test_llguidance_is_imported_only_when_needed_and_jax_never() -> None:
    code = (
        "import sys, mtj_loader.grammar.compile_grammar as grammar\n"
        "assert not {'jax', 'llguidance'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_error_says_how_to_install_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match="grammars need llguidance") as error:
        compile_gbnf('root ::= "a"')
    assert error.value.hint == "pip install 'mtj-loader[grammar]'"
