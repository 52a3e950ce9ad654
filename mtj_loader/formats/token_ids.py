"""The token ids that start and end a text, from generation_config.json and config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtj_loader.errors import ConfigError
from mtj_loader.formats.typed_reader import format_value, shorten

# What happens if the vocabulary lacks an id. The padding token is not checked: it is not used
# here, and published configs set it to -1 or just past the vocabulary.
_CONSEQUENCES = {
    "eos_token_id": "no text ends there",
    "bos_token_id": "an empty prompt is rejected",
}


def eos_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> frozenset[int]:
    """The end-of-text tokens; may be empty.

    Args:
      config: config.json, parsed.
      generation_config: generation_config.json, parsed; empty if there is none. It takes
        precedence.

    Raises:
      ConfigError: `eos_token_id` is not an id, a list of ids, or null.
    """
    return frozenset(_token_ids("eos_token_id", config, generation_config)[1])


def bos_id(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> int | None:
    """The token used for an empty prompt, None if the checkpoint has none.

    Raises:
      ConfigError: `bos_token_id` is not an id, a list of ids, or null.
    """
    return next(iter(_token_ids("bos_token_id", config, generation_config)[1]), None)


def outside_vocabulary(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], vocab_size: int
) -> list[str]:
    """Warnings for settings with ids outside of the model's vocabulary.

    An id that only the tokenizer lacks is fine: published vocabularies are padded. These are no
    errors because the weights can still be used.

    Raises:
      ConfigError: a setting is not an id, a list of ids, or null.
    """
    found = []
    for key, consequence in _CONSEQUENCES.items():
        file, ids = _token_ids(key, config, generation_config)
        beyond = [str(i) for i in ids if i >= vocab_size]
        if beyond:
            where = f"{key} {shorten(', '.join(beyond))} in {file}"
            found.append(f"{where} is not among the {vocab_size:,} tokens: {consequence}")
    return found


def token_id_problems(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], *, folder: str
) -> list[ConfigError]:
    """The settings that are not an id, a list of ids, or null.

    Args:
      config: config.json, parsed.
      generation_config: generation_config.json, parsed; empty if there is none.
      folder: where the files are, for messages.
    """
    problems = []
    for key in _CONSEQUENCES:
        try:
            _token_ids(key, config, generation_config, f"{folder}/")
        except ConfigError as error:
            problems.append(error)
    return problems


def _token_ids(
    key: str, config: Mapping[str, Any], generation_config: Mapping[str, Any], folder: str = ""
) -> tuple[str, list[int]]:
    """The file of a setting, and its ids."""
    sources = {"generation_config.json": generation_config, "config.json": config}
    for file, source in sources.items():
        ids = _read_ids(source.get(key), key, folder + file)
        if ids is not None:
            return file, ids
    return "", []


def _read_ids(value: object, key: str, file: str) -> list[int] | None:
    if value is None:
        return None
    ids: list[Any] = value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):  # True is an int for isinstance
        expected, found = "a token id, or a list of them", format_value(value)
        raise ConfigError("not a token id", file=file, key=key, expected=expected, found=found)
    return ids
