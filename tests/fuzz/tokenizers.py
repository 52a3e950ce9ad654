"""Small tokenizers of several kinds, as the files of a checkpoint."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.support.models import DATA

_BYTES = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 512))][:256]


def seeds() -> list[dict[str, bytes]]:
    """File name → content, of each tokenizer."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    files = [
        {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": _json(settings)}
        for backend in (_bpe(), _byte_fallback(), _word_piece(), _word_level(), _unigram())
    ]
    return [*files, _gpt2(), *_sentencepiece()]


def _bpe() -> Tokenizer:
    vocab = {token: i for i, token in enumerate([*_BYTES, "He", "ll", "Hell", "ö"])}
    backend = Tokenizer(models.BPE(vocab, [("H", "e"), ("l", "l"), ("He", "ll")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<s>"])
    return backend


def _byte_fallback() -> Tokenizer:
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "H", "e", "He"]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, [("H", "e")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _word_piece() -> Tokenizer:
    vocab = {"[UNK]": 0, "hello": 1, "w": 2, "##orld": 3, ",": 4}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _word_level() -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "Hello": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def _unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("▁Hello", -1.0), ("▁", -2.0), ("w", -3.0), ("o", -3.5)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def _gpt2() -> dict[str, bytes]:
    vocab = {token: i for i, token in enumerate([*_BYTES, "He", "ll", "<|endoftext|>"])}
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
        "add_prefix_space": False,
        "added_tokens_decoder": {
            "258": {"content": "<|endoftext|>", "special": True, "lstrip": False, "rstrip": False}
        },
    }
    return {
        "vocab.json": _json(vocab),
        "merges.txt": b"#version: 0.2\nH e\nl l\n",
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json({"eos_token": "<|endoftext|>"}),
    }


def _sentencepiece() -> list[dict[str, bytes]]:
    settings = _json({"tokenizer_class": "LlamaTokenizer", "legacy": False})
    files = sorted((DATA / "tokenizers").glob("*/tokenizer.model"))
    return [
        {"tokenizer.model": path.read_bytes(), "tokenizer_config.json": settings} for path in files
    ]


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
