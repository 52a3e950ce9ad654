"""The special and the added tokens of a tokenizer, by the rules of transformers 5.

They are in tokenizer_config.json, in older checkpoints also in special_tokens_map.json and
added_tokens.json, and in tokenizer.json or tokenizer.model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tokenizers import AddedToken, Tokenizer, processors

from mtj_loader.errors import FormatError
from mtj_loader.formats.typed_reader import format_value
from mtj_loader.generation.tokenizer_files import MAX_ID, check_ids

# Special tokens by role, in the order in which transformers adds them.
_ROLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("extra_special_tokens", "additional_special_tokens")  # the new and the old name
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
_FILES = "tokenizer_config.json, special_tokens_map.json or added_tokens.json"

Object = Mapping[str, object]


@dataclass(frozen=True)
class TokenSettings:
    """What the files say about tokens.

    Attributes:
      numbered: tokens with their ids.
      special: special tokens by role, such as `bos_token`; None means that there is none.
      unnamed: special tokens without a role.
      replaces_model_tokens: `unnamed` replaces the special tokens of a tokenizer.model.
      add_bos, add_eos: whether a text gets the token at its beginning or end.
    """

    numbered: Mapping[int, AddedToken]
    special: Mapping[str, AddedToken | None]
    unnamed: Sequence[AddedToken]
    replaces_model_tokens: bool
    add_bos: bool
    add_eos: bool

    def without_ends(self) -> TokenSettings:
        """The same, but a text gets no token at its ends: tokenizer.json decides that."""
        return replace(self, add_bos=False, add_eos=False)


def read_token_settings(
    config: Object,
    special_map: Object,
    added: Object,
    in_file: Mapping[int, AddedToken] | None = None,
) -> TokenSettings:
    """Reads the settings; a file that does not exist is an empty object.

    Args:
      config: tokenizer_config.json.
      special_map: special_tokens_map.json, which takes precedence.
      added: added_tokens.json: token → id.
      in_file: the added tokens of tokenizer.json, which take precedence over `added`. If the config
        has `added_tokens_decoder`, neither these nor `added` and `special_map` are used.

    Raises:
      FormatError: a value is not a token, or not an id.
    """
    decoder = config.get("added_tokens_decoder")
    legacy_map = {} if decoder is not None else special_map
    special, unnamed = _special_tokens({**config, **legacy_map})
    replaces = any(key in config and not isinstance(config[key], dict) for key in _LISTS)
    tokens = (*special.values(), *(unnamed if replaces else ()))
    texts_of_special = {token.content for token in tokens if token is not None}
    if decoder is not None:
        numbered = _numbered_tokens(decoder)
    else:
        numbered = _legacy_tokens(added, texts_of_special) | dict(in_file or {})
    by_text = {token.content: token for token in numbered.values()}
    return TokenSettings(
        numbered,
        {role: token and by_text.get(token.content, token) for role, token in special.items()},
        unnamed,
        replaces,
        add_bos=config.get("add_bos_token") is True,
        add_eos=config.get("add_eos_token") is True,
    )


def add_tokens(
    tokenizer: Tokenizer,
    settings: TokenSettings,
    defaults: Mapping[str, str],
    model_tokens: Sequence[AddedToken] = (),
    *,
    resets_flags: bool = False,
) -> None:
    """Adds the tokens that are never split, and those at the beginning and end of a text.

    Args:
      tokenizer: with its vocabulary; it is changed.
      settings: of the checkpoint.
      defaults: special tokens by role, as the tokenizer's class defines them.
      model_tokens: the special tokens of a tokenizer.model.
      resets_flags: the class gives its special tokens the default flags.

    Raises:
      FormatError: a token does not get the id that a file states.
    """
    special = {role: AddedToken(text, special=True) for role, text in defaults.items()}
    special = _in_order({**special, **settings.special})
    _add_numbered(tokenizer, settings.numbered, {token.content for token in special.values()})
    kept = () if settings.replaces_model_tokens else model_tokens
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = [*special.values(), *kept, *settings.unnamed]
    _add(tokenizer, [token for token in named if token.content not in known])
    if resets_flags:
        _add(tokenizer, [AddedToken(token.content, special=True) for token in named])
    ends = {"bos_token": settings.add_bos, "eos_token": settings.add_eos}
    added = {role: special[role].content for role in ends if ends[role] and role in special}
    if added:
        _add_ends(tokenizer, added)


def _add(tokenizer: Tokenizer, tokens: Sequence[AddedToken]) -> None:
    """Adds tokens; a new one gets the number of tokens as its id."""
    texts = dict.fromkeys(token.content for token in tokens)
    new = [text for text in texts if text and tokenizer.token_to_id(text) is None]
    for number, text in enumerate(new, start=tokenizer.get_vocab_size()):
        if (other := tokenizer.id_to_token(number)) is not None:
            what = "the ids of the vocabulary have gaps, so a new token gets the id of another"
            found = f"the id {number} for {text!r} and {other!r}"
            raise FormatError(what, file=_FILES, found=found)
    tokenizer.add_tokens(list(tokens))


def _add_numbered(
    tokenizer: Tokenizer, numbered: Mapping[int, AddedToken], special: set[str]
) -> None:
    """Adds tokens in the order of their ids, and checks that they get them."""
    tokens = [token for _, token in sorted(numbered.items(), key=lambda item: item[0])]
    for token in tokens:
        token.special = token.special or token.content in special
    _add(tokenizer, tokens)  # at once: every call reads the whole vocabulary
    for number, token in numbered.items():
        found = tokenizer.token_to_id(token.content)
        if found != number:
            what = "an added token does not get its specified id"
            key = f"added token {token.content!r}"
            raise FormatError(what, file=_FILES, key=key, expected=number, found=found)


def _add_ends(tokenizer: Tokenizer, added: Mapping[str, str]) -> None:
    """Adds the beginning-of-text and the end-of-text token to every text."""
    special = []
    for role, text in added.items():
        number = tokenizer.token_to_id(text)
        if number is None:
            what = "the token to add to each text is not in the vocabulary"
            raise FormatError(what, file=_FILES, key=role, found=repr(text))
        special.append({"id": role, "ids": [number], "tokens": [text]})
    # The template names tokens by role, because a token's text may contain template syntax.
    template = [part for part in ("bos_token", "$A", "eos_token") if part in {"$A", *added}]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=special
    )


def _in_order(special: Mapping[str, AddedToken | None]) -> dict[str, AddedToken]:
    roles = dict.fromkeys((*(role for role in _ROLES if role in special), *special))
    return {role: token for role in roles if (token := special[role]) is not None}


def _special_tokens(values: Object) -> tuple[dict[str, AddedToken | None], list[AddedToken]]:
    """The special tokens by role, and those without one."""
    special = {
        key: None if value is None else _read_token(value, key, special=True)
        for key, value in values.items()
        if key in _ROLES or (key.endswith("_token") and isinstance(value, str | dict))
        if value != ""  # the first conversions of Llama: not set
    }
    key = next((key for key in _LISTS if values.get(key)), "")
    unnamed = values.get(key, [])
    if isinstance(unnamed, dict):
        named = {role: _read_token(value, key, special=True) for role, value in unnamed.items()}
        return special | named, []
    if not isinstance(unnamed, list):
        raise FormatError("not a list of tokens", file=_FILES, key=key, found=format_value(unnamed))
    return special, [_read_token(value, key) for value in unnamed]


def _numbered_tokens(decoder: object) -> dict[int, AddedToken]:
    """The tokens of `added_tokens_decoder`: id → token."""
    key = "added_tokens_decoder"
    if not isinstance(decoder, dict) or not all(map(_is_id, decoder)):
        expected = f"an object whose keys are ids, 0 to {MAX_ID}"
        raise FormatError("not added tokens", file=_FILES, key=key, expected=expected)
    tokens = {int(number): _read_token(value, key) for number, value in decoder.items()}
    if len(tokens) < len(decoder):
        raise FormatError("two added tokens have the same id", file=_FILES, key=key)
    return tokens


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= MAX_ID


def _legacy_tokens(added: Object, special: set[str]) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json: text → id."""
    return {
        number: AddedToken(text, special=text in special, normalized=text not in special)
        for text, number in check_ids(added, file="added_tokens.json").items()
    }


def _read_token(value: object, key: str, *, special: bool = False) -> AddedToken:
    """Reads a token: its text, or an object with `content` and flags."""
    fields = {"content": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
        raise FormatError("not a token", file=_FILES, key=key, found=format_value(value))
    flags = {name: bool(fields[name]) for name in _FLAGS if name in fields}
    if special or isinstance(value, str):
        flags["special"] = True
    return AddedToken(fields["content"], **flags)
