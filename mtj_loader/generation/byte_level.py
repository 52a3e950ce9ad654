"""Byte-level BPE tokenizers from vocab.json and merges.txt.

The rules are those of the tokenizer classes of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mtj_loader.errors import FormatError
from mtj_loader.generation.tokenizer_files import File, backend_errors, check_ids, read_json
from mtj_loader.storage.base import read_small

# Ten times the files of Qwen3, the largest ones among the supported families.
_MAX_FILE_BYTES, _MAX_MERGES = 30_000_000, 2_000_000

# How Qwen2 splits a text into words (Qwen2Tokenizer in transformers).
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class ByteLevelClass:
    """A tokenizer class of transformers.

    Attributes:
      special_tokens: its special tokens by role, unless the checkpoint has others.
      composes: it normalizes a text to Unicode form C.
      words: the regular expression that splits a text into words; None for GPT-2's.
    """

    special_tokens: Mapping[str, str]
    composes: bool = False
    words: str | None = None


_GPT2_TOKENS: dict[str, str] = dict.fromkeys(
    ("unk_token", "bos_token", "eos_token"), "<|endoftext|>"
)
_NEOX_TOKENS: dict[str, str] = _GPT2_TOKENS | {"pad_token": "<|padding|>"}
_QWEN2_TOKENS: dict[str, str] = dict.fromkeys(
    ("unk_token", "eos_token", "pad_token"), "<|endoftext|>"
)

CLASSES: Mapping[str, ByteLevelClass] = {
    "GPT2Tokenizer": ByteLevelClass(_GPT2_TOKENS),
    "CodeGenTokenizer": ByteLevelClass(_GPT2_TOKENS),
    "GPTNeoXTokenizer": ByteLevelClass(_NEOX_TOKENS, composes=True),
    "Qwen2Tokenizer": ByteLevelClass(_QWEN2_TOKENS, composes=True, words=_QWEN2_WORDS),
}


def build(vocab: File, merges: File) -> Tokenizer:
    """Builds a tokenizer without the steps of its class and without its added tokens.

    Args:
      vocab: vocab.json: token → id.
      merges: merges.txt: two tokens per line, in merge order.

    Raises:
      FormatError: a file is damaged, or the files do not match.
    """
    tokens, pairs = _read_vocab(vocab), _read_merges(merges)
    for first, second in pairs:
        missing = [token for token in (first, second, first + second) if token not in tokens]
        if missing:
            what = "vocab.json lacks a token that a merge needs"
            found = f"no {missing[0]!r} for the merge of {first!r} and {second!r} in merges.txt"
            raise FormatError(what, file=vocab, found=found)
    with backend_errors("merges.txt does not match vocab.json", file=merges):
        return Tokenizer(models.BPE(vocab=tokens, merges=pairs))


def set_steps(tokenizer: Tokenizer, kind: str, config: Mapping[str, object]) -> None:
    """Sets the steps before and after the model.

    Args:
      tokenizer: is changed.
      kind: one of `CLASSES`.
      config: tokenizer_config.json, for its `add_prefix_space`.
    """
    rules, add_space = CLASSES[kind], config.get("add_prefix_space") is True
    words = pre_tokenizers.ByteLevel(add_prefix_space=add_space, use_regex=rules.words is None)
    if rules.words is not None:
        split = pre_tokenizers.Split(Regex(rules.words), behavior="isolated")
        words = pre_tokenizers.Sequence([split, words])
    tokenizer.normalizer = normalizers.NFC() if rules.composes else None
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()


def _read_vocab(file: File) -> dict[str, int]:
    vocab = dict(check_ids(read_json(file, _MAX_FILE_BYTES), file=file))
    token_of: dict[int, str] = {}
    for token, number in vocab.items():
        if (other := token_of.setdefault(number, token)) != token:
            found = f"{other!r} and {token!r}"
            raise FormatError(f"two tokens have the id {number}", file=file, found=found)
    return vocab


def _read_merges(file: File) -> list[tuple[str, str]]:
    try:
        text = read_small(file, _MAX_FILE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("not UTF-8", file=file, found=f"byte {error.start}") from error
    if (count := text.count("\n")) > _MAX_MERGES:
        expected, found = f"at most {_MAX_MERGES:,}", f"{count:,} lines"
        raise FormatError("too many merges", file=file, expected=expected, found=found)
    merges = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            where = f"line {number}: {line[:60]!r}"  # only the beginning: the file is untrusted
            raise FormatError("not a merge", file=file, expected="two tokens", found=where)
        merges.append((parts[0], parts[1]))
    return merges
