"""Where a text begins and ends: the token ids that generation_config.json and config.json name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtj_loader.errors import ConfigError

# What an id that the model has not got means. The padding token means nothing: nothing is padded
# with it here, and published configs have it at -1 or just past the vocabulary.
_CONSEQUENCES = {
    "eos_token_id": "no text ends there",
    "bos_token_id": "an empty prompt is refused",
}


def eos_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> frozenset[int]:
    """The end-of-text tokens; there may be none.

    Args:
      config: config.json, parsed.
      generation_config: generation_config.json, parsed; empty where there is none. It wins.

    Raises:
      ConfigError: `eos_token_id` is something else than an id, a list of ids, or null.
    """
    return frozenset(_token_ids("eos_token_id", config, generation_config)[1])


def bos_id(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> int | None:
    """The token that stands in for an empty prompt, None where the checkpoint names none.

    Raises:
      ConfigError: `bos_token_id` is something else than an id, a list of ids, or null.
    """
    return next(iter(_token_ids("bos_token_id", config, generation_config)[1]), None)


def outside_vocabulary(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], vocab_size: int
) -> list[str]:
    """A sentence for each of these settings that names an id which the model does not have.

    Ids that the tokenizer lacks and the model has, in the padding of published vocabularies, are
    fine. Others do not spoil the weights, so they are no error.

    Raises:
      ConfigError: a setting is something else than an id, a list of ids, or null.
    """
    found = []
    for key, consequence in _CONSEQUENCES.items():
        file, ids = _token_ids(key, config, generation_config)
        beyond = [str(i) for i in ids if i >= vocab_size]
        if beyond:
            where = f"{key} {', '.join(beyond)} in {file}"
            found.append(f"{where} is not among the {vocab_size:,} tokens: {consequence}")
    return found


def _token_ids(
    key: str, config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> tuple[str, list[int]]:
    """The ids of a setting, and the file that has it."""
    sources = {"generation_config.json": generation_config, "config.json": config}
    for file, source in sources.items():
        value = source.get(key)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):  # bool is an int to isinstance
            expected = "a token id, or a list of them"
            raise ConfigError("not a token id", file=file, key=key, expected=expected, found=value)
        return file, ids
    return "", []
