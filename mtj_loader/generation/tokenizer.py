"""Tokenizes text with the `tokenizers` library, from the files of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import tokenizers
from tokenizers import models

from mtj_loader.errors import PromptError, TokenizerMissingError
from mtj_loader.formats.sentencepiece import parse_model
from mtj_loader.generation import byte_level, from_sentencepiece
from mtj_loader.generation.added_tokens import TokenSettings, add_tokens, read_token_settings
from mtj_loader.generation.from_sentencepiece import PLAIN
from mtj_loader.generation.tokenizer_files import File, backend_errors, check_flags, read_json
from mtj_loader.generation.tokenizer_json import is_byte_level, read_tokenizer_json
from mtj_loader.storage.base import read_small

Files = Mapping[str, File]

# The class that transformers 5 uses for a family; the plain one for others. A class that the
# checkpoint names is used instead, unless the class here is the plain one, or the family is in
# `_OVERRULED` because its checkpoints name wrong ones.
_CLASSES = {
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "gpt_neo": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "gptj": "GPT2Tokenizer",
    "mistral": PLAIN,
    "mixtral": PLAIN,
    "mpt": "GPTNeoXTokenizer",
    "opt": "GPT2Tokenizer",
    "phi3": PLAIN,
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "stablelm": PLAIN,
    "xglm": "XGLMTokenizer",
}
_OVERRULED = ("phi3", "qwen2")
_RENAMED = {
    "PreTrainedTokenizer": PLAIN,
    "BloomTokenizer": PLAIN,  # transformers 5 has no such class
    "LLaMATokenizer": "LlamaTokenizer",  # in the first conversions, before transformers had it
}

_MODEL = "tokenizer.model"
_MAX_MODEL_BYTES = 20_000_000  # four times the largest published ones
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's spelling of a single byte


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that returns the same ids as transformers' AutoTokenizer.

    Attributes:
      backend: of the `tokenizers` library.
      unknown_class: the class that the checkpoint names, if its rules are not known here, so that
        ids may differ from those of transformers.
    """

    backend: tokenizers.Tokenizer
    unknown_class: str | None = None

    def __repr__(self) -> str:
        return f"<Tokenizer with {self.backend.get_vocab_size():,} tokens>"

    def encode(self, text: str) -> list[int]:
        """The ids of a text, including the special tokens that the checkpoint adds to a prompt.

        Raises:
          PromptError: the text contains half a surrogate pair.
          FormatError: the tokenizer is damaged, so that it fails for this text.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = ascii(error.object[error.start])
            raise PromptError("the text is not valid Unicode", found=found) from error
        with backend_errors("the checkpoint's tokenizer fails for this text"):
            return self.backend.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens such as end of text and padding.

        Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary are skipped.

        Raises:
          FormatError: the tokenizer is damaged, so that it fails for these ids.
        """
        with backend_errors("the checkpoint's tokenizer fails to decode"):
            return self.backend.decode(list(ids), skip_special_tokens=True)

    def is_byte(self, token: int) -> bool:
        """Whether the token is a single byte of SentencePiece, such as `<0xE4>`."""
        name = self.backend.id_to_token(token)
        return name is not None and _BYTE_TOKEN.fullmatch(name) is not None

    def is_skipped(self, token: int) -> bool:
        """Whether `decode` skips the token: it is special, or outside the vocabulary."""
        name = self.backend.id_to_token(token)
        return name is None or name in self._special

    @cached_property
    def _special(self) -> frozenset[str]:
        added = self.backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)


def load_tokenizer(
    files: Files, model_type: str | None = None, class_name: object = None
) -> Tokenizer | None:
    """Reads a checkpoint's tokenizer.

    It is in tokenizer.json; or else, depending on the tokenizer's class, in vocab.json with
    merges.txt or in tokenizer.model.

    Args:
      files: by file name, those of `TOKENIZER_FILES` that exist.
      model_type: of config.json; tells the class if the checkpoint does not name it.
      class_name: `tokenizer_class` of config.json; used if tokenizer_config.json has none.

    Returns:
      None if the files contain no tokenizer; token ids still work then.

    Raises:
      FormatError: a file is damaged.
      TokenizerMissingError: the rules of the tokenizer's class are not known here.
    """
    config = _optional_json(files, "tokenizer_config.json")
    check_flags(config, file=files.get("tokenizer_config.json"))
    kind = choose_class(model_type, config.get("tokenizer_class") or class_name)
    special_map = _optional_json(files, "special_tokens_map.json")
    added = _optional_json(files, "added_tokens.json")
    if "tokenizer.json" in files:
        tokenizer = read_tokenizer_json(files["tokenizer.json"])
        in_file = tokenizer.get_added_tokens_decoder()
        settings = read_token_settings(config, special_map, added, in_file).without_ends()
        tokenizer, defaults = _without_steps(tokenizer, kind)
        model_tokens = ()
    elif _has_merges(files) or _MODEL in files:
        settings = read_token_settings(config, special_map, added)
        tokenizer, defaults, model_tokens = _read_vocabulary(files, kind, settings)
    else:
        return None
    _set_steps(tokenizer, kind, config)
    with backend_errors("the tokens of the checkpoint cannot be added"):
        resets = kind == "Qwen2Tokenizer"
        add_tokens(tokenizer, settings, defaults, model_tokens, resets_flags=resets)
    known = kind in byte_level.CLASSES or kind in from_sentencepiece.CLASSES
    return Tokenizer(tokenizer, unknown_class=None if known else kind)


def _without_steps(
    tokenizer: tokenizers.Tokenizer, kind: str
) -> tuple[tokenizers.Tokenizer, Mapping[str, str]]:
    """A tokenizer.json as the class reads it, and the usual special tokens of the class.

    A class with its own steps takes only the model and the template from the file.
    """
    if not _has_own_steps(tokenizer, kind):
        return tokenizer, {}
    bare = tokenizers.Tokenizer(tokenizer.model)
    if kind != "GPTNeoXTokenizer":  # transformers discards the template of this class
        bare.post_processor = tokenizer.post_processor
    if kind in byte_level.CLASSES:
        return bare, byte_level.CLASSES[kind].special_tokens
    return bare, from_sentencepiece.CLASSES[kind] or {}


def _read_vocabulary(
    files: Files, kind: str, settings: TokenSettings
) -> tuple[tokenizers.Tokenizer, Mapping[str, str], Sequence[tokenizers.AddedToken]]:
    """The tokenizer for the files of a class, its usual special tokens, and those of the file."""
    if kind in byte_level.CLASSES and _has_merges(files):
        tokenizer = byte_level.build(files["vocab.json"], files["merges.txt"])
        return tokenizer, byte_level.CLASSES[kind].special_tokens, ()
    if kind not in from_sentencepiece.CLASSES or _MODEL not in files:
        raise _unsupported(files, kind)
    file = files[_MODEL]
    model = parse_model(read_small(file, _MAX_MODEL_BYTES), file=str(file))
    tokenizer = from_sentencepiece.build(model, kind, settings, file=file)
    defaults = from_sentencepiece.CLASSES[kind] or model.special_tokens
    return tokenizer, defaults, from_sentencepiece.own_tokens(model)


def _has_merges(files: Files) -> bool:
    return "vocab.json" in files and "merges.txt" in files


def _has_own_steps(tokenizer: tokenizers.Tokenizer, kind: str) -> bool:
    """Whether the class sets the steps before and after the model."""
    if not isinstance(tokenizer.model, models.BPE):
        return False
    is_llama = kind == "LlamaTokenizer" and not is_byte_level(tokenizer)
    return kind in byte_level.CLASSES or kind == "GemmaTokenizer" or is_llama


def _set_steps(tokenizer: tokenizers.Tokenizer, kind: str, config: Mapping[str, object]) -> None:
    """Sets the steps before and after the model, if the class has its own."""
    if not _has_own_steps(tokenizer, kind):
        return
    if kind in byte_level.CLASSES:
        byte_level.set_steps(tokenizer, kind, config)
    else:
        from_sentencepiece.set_steps(tokenizer, kind, config)


def choose_class(model_type: str | None, named: object) -> str:
    """The tokenizer's class, as transformers' AutoTokenizer chooses it.

    Args:
      model_type: of config.json.
      named: the class that the checkpoint names; None for none.
    """
    usual = _CLASSES.get(model_type or "")
    if usual is not None and (usual == PLAIN or model_type in _OVERRULED):
        return usual
    name = named.removesuffix("Fast") if isinstance(named, str) and named else usual or PLAIN
    return _RENAMED.get(name, name)


def _optional_json(files: Files, name: str) -> dict[str, object]:
    return read_json(files[name]) if name in files else {}


def _unsupported(files: Files, kind: str) -> TokenizerMissingError:
    merges, model = " or ".join(byte_level.CLASSES), " or ".join(from_sentencepiece.CLASSES)
    return TokenizerMissingError(
        "there is no tokenizer.json, and the tokenizer's class has no rules for the other files",
        key="tokenizer_class",
        expected=f"{merges} for vocab.json with merges.txt; {model} for tokenizer.model",
        found=f"{kind}, {', '.join(files)}",
        hint="save tokenizer.json with transformers' AutoTokenizer, or pass token ids",
    )
