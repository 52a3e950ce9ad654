"""The settings of `Model.generate` as options of a command.

Names, types, defaults and descriptions come from `mtj_loader.engine.generate_options`. This module
says only how they are grouped and spelled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any, cast

from mtj_loader.cli.shared_options import make_option
from mtj_loader.engine.generate_options import GenerateKeywords, descriptions, keywords
from mtj_loader.errors import UsageError

# Panel of the help → its options, in order.
_PANELS = {
    "Output": "max_new_tokens min_new_tokens ban_eos stop n echo logprobs prompt_logprobs",
    "Sampling": "temperature top_k top_p min_p top_a tfs typical_p top_n_sigma dynatemp_range "
    "dynatemp_exponent smoothing_factor smoothing_curve xtc_threshold xtc_probability mirostat "
    "mirostat_tau mirostat_eta sampler_order seed",
    "Penalties": "repetition_penalty repetition_penalty_range repetition_penalty_slope "
    "repetition_penalty_curve presence_penalty frequency_penalty dry_multiplier dry_base "
    "dry_allowed_length dry_range dry_sequence_breakers",
    "Constraints": "grammar grammar_file json_schema json_schema_file banned_strings banned_tokens "
    "logit_bias",
}
_FILE = {"type": Path | None, "metavar": "FILE"}
_REPEATABLE = " May be repeated."
_SPELLINGS: dict[str, dict[str, Any]] = {
    "logprobs": {
        "type": int | None,
        "metavar": "N",
        "help": "With --json: how many of the most "
        "likely tokens to report with their log-probabilities, besides the chosen one.",
    },
    "prompt_logprobs": {
        "help": "With --json: report log-probabilities of the prompt's tokens too."
    },
    "repetition_penalty_curve": {"metavar": "NAME"},
    "mirostat": {"type": int | None, "metavar": "0|2"},
    "sampler_order": {"type": str | None, "metavar": "6,5,…"},
    "dry_sequence_breakers": {
        "type": list[str] | None,
        "flags": ("--dry-sequence-breaker",),
        "metavar": "TEXT",
        "help": "A text that no repeated sequence contains; by default a line break, a colon, a "
        "double quote and an asterisk, as in koboldcpp. An empty text: none." + _REPEATABLE,
    },
    "grammar": {"type": str | None, "metavar": "GBNF"},
    "grammar_file": _FILE | {"help": "A file or pipe that contains the grammar."},
    "json_schema": {"type": str | None, "metavar": "JSON"},
    "json_schema_file": _FILE | {"help": "A file or pipe that contains the schema."},
    "banned_strings": {"type": list[str] | None, "flags": ("--banned-string",)},
    "banned_tokens": {"type": list[int] | None, "flags": ("--banned-token",), "metavar": "ID"},
    "logit_bias": {"type": list[str] | None, "metavar": "ID=NUMBER"},
    "stop": {"type": list[str] | None},
}
_MAX_FILE_BYTES = 100_000_000  # several times the longest context


def _fields() -> Iterator[tuple[str, Any, Any]]:
    """The name, the annotated type and the default of every option."""
    parameters, texts = keywords(), descriptions()
    for panel, names in _PANELS.items():
        for name in names.split():
            more = _SPELLINGS.get(name, {})
            text = texts.get(name, " ")
            text = text[0].upper() + text[1:]
            if "type" in more:  # None: not given
                text += _REPEATABLE if more["type"] in (list[str] | None, list[int] | None) else ""
                yield name, make_option(name, more["type"], text, panel, more), None
            else:
                parameter = parameters[name]
                option = make_option(name, parameter.annotation, text, panel, more)
                yield name, option, parameter.default


class SettingOptions(make_dataclass("_SettingOptions", _fields(), frozen=True)):
    """The settings of `Model.generate` as they are given on the command line."""

    def keywords(self) -> GenerateKeywords:
        """The keyword arguments of `Model.generate`; options that are not given are left out.

        Raises:
          UsageError: a text cannot be read as what the setting takes.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in values.items() if value is not None}
        for name in ("grammar", "json_schema"):
            if (path := given.pop(f"{name}_file", None)) is not None:
                if name in given:
                    flag = f"--{name.replace('_', '-')}"
                    raise UsageError(
                        f"{flag} and {flag}-file exclude each other", key=f"{flag}-file"
                    )
                given[name] = read_text_file(path, f"the {name.replace('_', ' ')}")
        for name in _READERS.keys() & given.keys():
            given[name] = _READERS[name](given[name])
        return cast("GenerateKeywords", given)


def read_text_file(path: Path, what: str) -> str:
    """Reads a text from a file or a pipe; every line end becomes a newline.

    Args:
      path: of the file.
      what: the text is, for messages.

    Raises:
      UsageError: the file cannot be read, is not UTF-8 or is too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            expected = f"at most {_MAX_FILE_BYTES:,} bytes"
            raise UsageError(f"{what} is too large", file=path, expected=expected, found="more")
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError) as error:
        found = error if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UsageError(f"cannot read {what}", file=path, found=found) from error


def read_ids(text: str, what: str = "token ids") -> list[int]:
    """Reads numbers with spaces or commas between them.

    Raises:
      UsageError: there is anything else.
    """
    parts = re.split(r"[\s,]+", text.strip())
    if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        expected = "numbers, for example '12 7 300'"
        raise UsageError(f"cannot read {what}", expected=expected, found=repr(text))
    return [int(part) for part in parts]


def _read_biases(texts: list[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for text in texts:
        token, _, number = text.partition("=")
        try:
            bias = float(number)
        except ValueError:
            bias = None
        if bias is None or not re.fullmatch(r"[0-9]{1,9}", token) or int(token) in biases:
            raise UsageError(
                "cannot read the bias of a token",
                key="--logit-bias",
                expected="ID=NUMBER, for example 12=-1.5, once for each token",
                found=repr(text),
            )
        biases[int(token)] = bias
    return biases


_READERS: dict[str, Callable[[Any], object]] = {
    "logit_bias": _read_biases,
    "sampler_order": lambda text: read_ids(text, "the order of samplers"),
    "dry_sequence_breakers": lambda texts: [] if texts == [""] else texts,
}
