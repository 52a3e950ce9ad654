"""The bytes that every token adds to a text, and llguidance's trie of them."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import tokenizers

from mtj_loader.errors import GrammarError, UsageError

if TYPE_CHECKING:
    import llguidance

_MAX_TOKEN_BYTES = 1_000  # llguidance's trie is at most 1,024 levels deep
_MAX_TRIE_BYTES = 4_000_000  # and has 22 bits for the number of a node
_DECODERS = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip"}
_REPLACEMENT = "\ufffd"  # what decoders return for bytes that are not UTF-8


class TextTokenizer(Protocol):
    """What is used of `generation.tokenizer.Tokenizer`, which is in a higher layer."""

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """Of the `tokenizers` library."""
        ...

    def is_byte(self, token: int) -> bool:
        """Whether the token is a single byte of SentencePiece."""
        ...

    def is_skipped(self, token: int) -> bool:
        """Whether the token has no text."""
        ...


@dataclass(frozen=True, eq=False)
class TokenTrie:
    """The tokens of a model as llguidance needs them.

    A token may add another text at the beginning of the output than later: many decoders drop the
    first space. Such a token has a second id in the trie, beyond the model's vocabulary.

    Attributes:
      vocab_size: the model's, V.
      ll_tokenizer: llguidance's tokenizer; the ids of the model are the first V of its ids.
      first_ids: int32 [V], the id in the trie of each token at the beginning of the output.
    """

    vocab_size: int
    ll_tokenizer: llguidance.LLTokenizer
    first_ids: np.ndarray


def import_llguidance() -> Any:  # noqa: ANN401
    """Imports llguidance, which is an optional dependency.

    Raises:
      UsageError: it is not installed.
    """
    try:
        import llguidance  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            "grammars need llguidance", hint="pip install 'mtj-loader[grammar]'"
        ) from error
    return llguidance


_tries: weakref.WeakKeyDictionary[TextTokenizer, dict[int, TokenTrie]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def get_token_trie(tokenizer: TextTokenizer, vocab_size: int) -> TokenTrie:
    """The trie for a tokenizer, built at its first use (0.2 s for 50,000 tokens).

    Args:
      tokenizer: decodes the tokens; the trie is kept as long as it.
      vocab_size: the model's; ids beyond the tokenizer's have no text and are never allowed.

    Raises:
      UsageError: llguidance is not installed.
      GrammarError: the tokens are too long, or their texts depend on their neighbors.
    """
    with _lock:
        tries = _tries.setdefault(tokenizer, {})
        if vocab_size not in tries:
            tries[vocab_size] = _build(tokenizer, vocab_size)
        return tries[vocab_size]


def _build(tokenizer: TextTokenizer, vocab_size: int) -> TokenTrie:
    first, later = read_token_texts(tokenizer, vocab_size)
    # The ids behind the vocabulary: one without a text, end of text for llguidance, then those of
    # tokens with another text at the beginning.
    nothing, end = vocab_size, vocab_size + 1
    words = [*later, b"", b""]
    first_ids = np.arange(vocab_size, dtype=np.int32)
    for token, (at_start, text) in enumerate(zip(first, later, strict=True)):
        if not at_start:
            first_ids[token] = nothing
        elif at_start != text:
            first_ids[token] = len(words)
            words.append(at_start)
    if (size := sum(map(len, words))) > _MAX_TRIE_BYTES:
        expected, found = f"at most {_MAX_TRIE_BYTES:,} bytes", f"{size:,}"
        what = "the tokens of this model are too long for grammars"
        raise GrammarError(what, expected=expected, found=found)
    # Slices speed up masks of grammars for JSON alone, and slow down the building of the trie.
    ll_tokenizer = import_llguidance().LLTokenizer(_Words(words, end), slices=[])
    return TokenTrie(vocab_size, ll_tokenizer, first_ids)


class _Words:
    """What LLTokenizer reads of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: list[bytes], eos_token_id: int) -> None:
        self.tokens, self.eos_token_id = tokens, eos_token_id

    def __call__(self, _: str) -> list[int]:
        """Encodes a text; used only where text is forced, which our grammars turn off."""
        raise NotImplementedError


def read_token_texts(tokenizer: TextTokenizer, vocab_size: int) -> tuple[list[bytes], list[bytes]]:
    """The UTF-8 that each token adds, at the beginning of an output and later.

    Returns:
      two lists of `vocab_size`; empty for a token that grammars do not allow: it is special, has no
      text, or is outside the tokenizer's vocabulary.

    Raises:
      GrammarError: the text of a token depends on the tokens around it.
    """
    backend = tokenizer.backend
    _check_decoder(backend)
    first, later = [b""] * vocab_size, [b""] * vocab_size
    ids = [token for token in range(vocab_size) if not tokenizer.is_skipped(token)]
    alone = backend.decode_batch([[token] for token in ids])
    anchor, prefix = _find_anchor(tokenizer, ids, alone)
    joined = backend.decode_batch([[anchor, token] for token in ids])
    for token, at_start, text in zip(ids, alone, joined, strict=True):
        if _REPLACEMENT in text:
            first[token] = later[token] = _read_bytes(tokenizer, token)
        elif text.startswith(prefix):
            first[token], later[token] = at_start.encode(), text[len(prefix) :].encode()
        else:
            what = "grammars do not support this tokenizer: its tokens have no fixed text"
            raise GrammarError(what, found=f"{prefix!r} becomes {text!r}")
        if len(later[token]) > _MAX_TOKEN_BYTES or b"\xff" in later[token]:
            first[token] = later[token] = (
                b""  # 0xFF is never UTF-8, and marks llguidance's specials
            )
    return first, later


def _check_decoder(backend: tokenizers.Tokenizer) -> None:
    """Refuses decoders for which a text is not the texts of its tokens joined."""
    steps = [] if backend.decoder is None else [json.loads(backend.decoder.__getstate__())]
    while steps:
        step = steps.pop()
        steps += step.get("decoders", [])
        strips = step["type"] == "Strip" and (step["start"] > 1 or step["stop"] > 0)
        if step["type"] not in _DECODERS or strips:
            what = "grammars do not support the decoder of this tokenizer"
            raise GrammarError(what, expected=", ".join(sorted(_DECODERS)), found=step)


def _find_anchor(
    tokenizer: TextTokenizer, ids: Sequence[int], texts: Sequence[str]
) -> tuple[int, str]:
    """A token with a plain text, to decode others after it.

    Not a single byte: bytes in a row are decoded together, and each becomes U+FFFD if that fails.
    Under a mask it does not: between other tokens, a grammar allows whole characters only.
    """
    for token, text in zip(ids, texts, strict=True):
        if text.isascii() and text.isalpha() and not tokenizer.is_byte(token):
            return token, text
    raise GrammarError("grammars do not support this tokenizer: it has no token of letters")


def _read_bytes(tokenizer: TextTokenizer, token: int) -> bytes:
    """The bytes of a token that is not UTF-8."""
    name = tokenizer.backend.id_to_token(token) or ""
    if tokenizer.is_byte(token):
        return bytes([int(name[1:-1], 16)])
    return bytes(_BYTE_OF[char] for char in name) if set(name) <= _BYTE_OF.keys() else b""


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


_BYTE_OF = _byte_level_alphabet()
